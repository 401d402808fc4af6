"""Exercise 4: one guided Euler step.                                     difficulty 2 of 5, about 8 lines

The ODE from noise to data is dx / dsigma = (x - denoised) / sigma, where `denoised` is f at x: EDM's ODE with
sigma(t) = t and the score (denoised - x) / sigma^2.

euler_step: one Euler step from sigma_t to sigma_s. Derive it, then rewrite it as a weighted mean of x_t and
denoised: in that form a step from 700 to 0 returns exactly `denoised`, because no large numbers cancel.
x_t, denoised [b f c h w]; each sigma a number or [b] (solver.per_clip) -> x_s [b f c h w], fp32.

guided: an estimate f(w) that is linear in the guidance w, with f(0) the estimate without the image and f(1)
the one with it; w above 1 extrapolates (OSV section 4.2). w: a number, or a tensor that broadcasts to
b f 1 1 1. None: f(1) from one evaluation for each clip, at half the cost. model.unconditional(cond) is the
condition without its image. Use solver.consistency, on a doubled batch or twice. Mirrors solver.py.
Read before: EDM, ODE formulation and Denoising score matching; OSV section 4.2.
"""
import solver  # noqa: F401
from model import Cond, unconditional  # noqa: F401


def euler_step(x_t, denoised, sigma_t, sigma_s):
    raise NotImplementedError


def guided(net, x_t, sigma, cond, guidance=None):
    raise NotImplementedError
