"""Exercise 3: the consistency function and its boundary.     difficulty 2 of 5, 15 minutes, about 4 lines

    f(x_t, sigma) = c_skip x_t + c_out F(c_in x_t; c_noise, cond)               OSV Eq. 4

and f(x, 0) = x exactly, whatever F says. The network is called net(inputs, c_noise, image_embeds, time_ids):
    inputs          b f 2c h w      the scaled noisy latent, then the condition latent as it is
    c_noise         b               one number per clip
x_t [b f c h w], sigma a number or [b] -> x0_pred [b f c h w], fp32. solver.per_clip shapes sigma; use
solver.precondition, so that in the capstone it is yours. Mirrors solver.py.
"""
import torch  # noqa: F401

import solver  # noqa: F401


def consistency(net, x_t, sigma, cond):
    raise NotImplementedError
