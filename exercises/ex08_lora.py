"""Exercise 8: a linear layer with a low-rank update.         difficulty 3 of 5, 30 minutes, about 14 lines

    y = W x + b + alpha / rank * B A x,    A [rank in], B [out rank]            LoRA, arXiv 2106.09685

lora_A, lora_B: fp32 nn.Linear without bias. B starts at 0, so training starts at the layer replaced; A must
not (why?): normal, std 1 / rank. `active` False: no update. On bf16 layers the update has the precision of x.
merge_lora: each layer of lora.lora_layers(unet), {path: layer}, becomes (unet.set_submodule(path, linear)) an
nn.Linear with weight W + scale times the update, in W's precision; W stays as it is. Mirrors lora.py.
"""
import torch
from torch import nn


class LoRALinear(nn.Linear):
    def __init__(self, layer, rank, alpha):
        nn.Module.__init__(self)                    # not nn.Linear's: W and b are shared, not made anew
        raise NotImplementedError                   # and in_features, out_features, rank, alpha, active

    def forward(self, x):
        raise NotImplementedError


@torch.no_grad()
def merge_lora(unet, scale=1):
    raise NotImplementedError                       # returns unet
