"""Exercise 8: a linear layer with a low-rank update.         difficulty 3 of 5, 30 minutes, about 14 lines

    y = W x + b + alpha / rank * B A x,    A [rank in], B [out rank]            LoRA, arXiv 2106.09685

lora_A and lora_B are fp32 nn.Linear without bias. B starts at 0, so training starts at the layer replaced;
A must not (why?): normal, std 1 / rank. `active` False: as if there were no update. W may be bf16: then the
update is computed in the precision of x. merged() returns a new, plain nn.Linear that computes the same, in
W's precision, and leaves this layer as it is. Mirrors model.py.
"""
from torch import nn


class LoRALinear(nn.Linear):
    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)                    # not nn.Linear's: W and b are shared, not made anew
        # Set in_features, out_features, weight, bias, rank, alpha, active, lora_A, lora_B.
        raise NotImplementedError

    def forward(self, x):
        raise NotImplementedError

    def merged(self):
        raise NotImplementedError
