"""Exercise 8: a linear layer with a low-rank update.                    difficulty 3 of 5, about 19 lines

    y = W x + b + alpha / rank * B A x,    A [rank in], B [out rank]            LoRA, arXiv 2106.09685

LoRALinear shares the Parameters W and b of `layer`. lora_A and lora_B are fp32 nn.Linear layers without
bias. B starts at 0, so the output is unchanged at first. A starts normal with std 1 / rank; if it started at
0 too, nothing would train (why?). With active = False there is no update. On a bf16 layer the output has the
precision of x.

merge_lora: each layer of lora.lora_layers(unet), a dict {path: layer}, becomes an nn.Linear with the weight
W + scale * update in W's precision (unet.set_submodule(path, linear)). W itself is not changed. Returns unet.
Mirrors lora.py. Read before: arXiv 2106.09685, section 4.1.
"""
import torch
from torch import nn


class LoRALinear(nn.Linear):
    def __init__(self, layer, rank, alpha):
        nn.Module.__init__(self)                    # nn.Linear's would allocate a second W and b
        raise NotImplementedError                   # set in_features, out_features, rank, alpha, active too

    def forward(self, x):
        raise NotImplementedError


@torch.no_grad()
def merge_lora(unet, scale=1):
    raise NotImplementedError
