"""Exercise 4: one guided Euler step.                      difficulty 2 of 5, 25 minutes, about 7 lines

    dx / dsigma = (x - denoised) / sigma                        EDM Eq. 3; one step from sigma_t to sigma_s:
    x_s = x_t + (sigma_s - sigma_t) (x_t - denoised) / sigma_t
    denoised = f_uncond + w (f_cond - f_uncond)                 guidance, OSV section 4.2

x_t, denoised [b f c h w]; each sigma a number or [b] (solver.per_clip); a step to 0 returns `denoised`.
guidance w: None (conditional only, one clip in the batch for each of x_t), a number, or broadcastable to
b f 1 1 1. model.unconditional(cond) is the condition without its image. Use solver.consistency, once on a
doubled batch or twice. Mirrors solver.py.
"""
import solver  # noqa: F401
from model import Cond, unconditional  # noqa: F401


def euler_step(x_t, denoised, sigma_t, sigma_s):
    raise NotImplementedError


def guided(net, x_t, sigma, cond, guidance=None):
    raise NotImplementedError
