"""Exercise 12: one step, k steps, and a look ahead.          difficulty 3 of 5, 30 minutes, about 14 lines

sample: start from noise at sigmas[0], jump to f, return to each next level above 0 with *fresh* noise and
jump again (arXiv 2303.01469, Algorithm 1). tts: time_travel instead, looking ahead at the second of three
sigmas (OSV v2, Eq. 13); its `readout` may be ignored:
    f = f_theta(x_t, sigma_t);    eps = (eps_0 + (x_t - f) / sigma_t) / 2, eps_0 fresh noise;
    return f_theta(f + sigma_s eps, sigma_s)
Noise: sampler.draw_noise(shape, generator, device), shape and device those of cond.image_latents. Use
solver.consistency. Mirrors sampler.py.
"""
import torch

import sampler  # noqa: F401
import solver  # noqa: F401


@torch.no_grad()
def sample(net, cond, sigmas, generator, tts=False):
    raise NotImplementedError


@torch.no_grad()
def time_travel(net, cond, sigma_t, sigma_s, generator, readout="look_ahead"):
    raise NotImplementedError
