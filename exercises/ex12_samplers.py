"""Exercise 12: one step, k steps, and a look ahead.                     difficulty 3 of 5, about 16 lines

sample: start from noise at the level sigmas[0], jump to f, add *fresh* noise of the next level, jump again,
and so on while that level is above 0 (arXiv 2303.01469, Algorithm 1). Returns the last f. With tts=True it
returns time_travel at the first two of three sigmas instead.

time_travel (OSV v2, section 4.3, Eq. 13): from noise at sigma_t jump to f. A look ahead at the lower level
sigma_s starts at f with a noise that is the mean of two: fresh noise, and the noise that x_t would contain
if f were its clean latent. Returns f there. `readout` may be ignored.

mixed_noise: the mean of two independent noises does not have unit variance (which one does it have?), but
the network is told sigma_s as if it had. Mix the two, with two factors, so that the variance is 1 and the
correlation with the implied noise is keep, 0 to 1. In time_travel, use the mean of Eq. 13 all the same.

Noise: sampler.draw_noise(shape, generator, device), shape and device those of cond.image_latents. Use
solver.consistency. Mirrors sampler.py. Read before: OSV section 4.3; arXiv 2303.01469, Algorithm 1.
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


def mixed_noise(fresh, implied, keep):
    raise NotImplementedError
