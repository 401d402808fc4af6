"""Exercise 11: the fused kernel's backward, as a gather.     difficulty 5 of 5, 90 minutes, 12 + 25 lines

Output row Y of a bilinear resize reads at y = clamp((Y + 1/2) h / H - 1/2, 0, h - 1) among the input rows;
row i has the weight max(0, 1 - |y - i|) in it. Columns alike. Then each channel is divided by its std.
Backward, an input pixel *gathers* from the outputs that read it (a scatter would need atomics):

    grad_x[n, ch, i, j] = 1 / std[ch] sum_Y sum_X weight(Y, i) weight(X, j) grad[n, ch, Y, X]

grad [n 3 H W], size (h, w), std: 3 numbers -> grad_x [n 3 h w]. First PyTorch: two weight matrices. Then
Triton: one program per row of grad_x; tl.arange takes powers of 2. Mirrors support/upsample.py.
"""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"            # Triton on the CPU; read when Triton is imported


def upsample_backward(grad, size, std):
    raise NotImplementedError


def upsample_backward_triton(grad, size, std):
    raise NotImplementedError
