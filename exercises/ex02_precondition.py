"""Exercise 2: EDM preconditioning.                                       difficulty 1 of 5, about 5 lines

A noisy latent is x = x0 + sigma noise; noise has unit variance. The network sees c_in x and c_noise. Its raw
output F gives the estimate f = c_skip x + c_out F of x0. Four conditions determine the four scalings:

1. c_in x has unit variance.
2. The raw output that makes f = x0 (the network's target) has unit variance.
3. |c_out| is as small as 2 permits, because c_out multiplies the network's error.
4. For data of unit variance the target is SVD's v = (noise - sigma x0) / sqrt(sigma^2 + 1).

skip_and_out: derive c_skip and c_out from 2 to 4 for data of std sigma_data; two numbers from two numbers.
precondition: all four, for sigma_data = 1. sigma: a number or a tensor of any shape and precision -> four
fp32 tensors of that shape. c_noise = ln(sigma) / 4, finite also at sigma = 0. Mirrors solver.py.
Read before: EDM, Preconditioning and training, to Eq. 7, not Table 1. Afterwards: EDM's appendix on
preconditioning, the same derivation.
"""
import torch  # noqa: F401

from solver import Precondition  # noqa: F401


def skip_and_out(sigma, sigma_data):
    raise NotImplementedError                       # return c_skip, c_out


def precondition(sigma):
    raise NotImplementedError                       # return Precondition(c_skip, c_out, c_in, c_noise)
