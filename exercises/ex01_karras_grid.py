"""Exercise 1: the noise levels.                              difficulty 1 of 5, 10 minutes, about 5 lines

A sampler walks from noise to data over n levels that are evenly spaced not in sigma but in sigma^(1/rho):
the lower the noise, the smaller the steps. Then comes 0, the data itself. EDM (arXiv 2206.00364) Eq. 5:

    sigma_i = (a + i / (n - 1) (b - a))^rho,    a = sigma_max^(1/rho), b = sigma_min^(1/rho), i = 0 .. n - 1

Returns fp32 [n + 1], descending. One level alone is sigma_max. Mirrors solver.py.
"""
import torch  # noqa: F401

from solver import RHO, SIGMA_MAX, SIGMA_MIN


def karras_sigmas(n, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO):
    raise NotImplementedError
