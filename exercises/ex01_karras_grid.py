"""Exercise 1: the noise levels.                                          difficulty 1 of 5, about 4 lines

A sampler goes from noise to data over n noise levels. They are evenly spaced in sigma^(1/rho), not in sigma:
the lower the noise, the smaller the step. A last level of 0, the data, follows. EDM Eq. 5:

    sigma_i = (a + i / (n - 1) (b - a))^rho,    a = sigma_max^(1/rho), b = sigma_min^(1/rho), i = 0 .. n - 1

Returns fp32 [n + 1], descending. With n = 1, the one level is sigma_max. Mirrors solver.py.
Read before: EDM (arXiv 2206.00364), Improvements to deterministic sampling, to Eq. 5; toy/world.py,
first 20 lines.
"""
import torch  # noqa: F401

from solver import RHO, SIGMA_MAX, SIGMA_MIN


def karras_sigmas(n, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO):
    raise NotImplementedError
