"""Exercise 11: the fused kernel's backward, as a gather.                difficulty 5 of 5, about 32 lines

A bilinear resize from h x w to H x W, then each channel is divided by its std. Output row Y reads the input
at the row y = clamp((Y + 1/2) h / H - 1/2, 0, h - 1); input row i has the weight max(0, 1 - |y - i|) in it.
Columns alike. In the backward pass each input pixel gathers from the outputs that read it. (Scattering from
each output pixel would need atomic additions.)

    grad_x[n, ch, i, j] = 1 / std[ch] sum_Y sum_X weight(Y, i) weight(X, j) grad[n, ch, Y, X]

grad [n 3 H W], perhaps strided; size (h, w); std: 3 numbers -> grad_x [n 3 h w]. First in PyTorch, with two
matrices of weights. Then in Triton: one program for each row of grad_x; tl.arange takes powers of 2, so
loads and stores need masks. Mirrors support/upsample.py. Read before: Triton's tutorials 1 and 2.
"""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"            # Triton on the CPU; read when Triton is imported


def upsample_backward(grad, size, std):
    raise NotImplementedError


def upsample_backward_triton(grad, size, std):
    raise NotImplementedError
