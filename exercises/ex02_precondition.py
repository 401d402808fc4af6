"""Exercise 2: EDM preconditioning.                           difficulty 1 of 5, 15 minutes, about 4 lines

The network sees c_in x and is told c_noise; its raw output F becomes f = c_skip x + c_out F. The four are
fixed by what one wants: c_in x has unit variance when the data has; SVD was trained to say
F = v = (noise - sigma x0) / sqrt(sigma^2 + 1), and then f must be x0 (so solve for c_skip and c_out, with
x = x0 + sigma noise); c_noise = ln(sigma) / 4. EDM Table 1 with sigma_data = 1; OSV Eq. 4.

sigma is a number or a tensor of any shape and any precision -> four fp32 tensors of that shape. c_noise must
stay finite at sigma = 0. Mirrors solver.py.
"""
import torch  # noqa: F401

from solver import Precondition  # noqa: F401


def precondition(sigma):
    raise NotImplementedError                       # return Precondition(c_skip, c_out, c_in, c_noise)
