"""From noise to data: the noise levels and the equations around the network's raw output, all in fp32.

    karras_sigmas, strided    grids of noise levels                                           EDM Eq. 5
    precondition              scalings c_skip, c_out, c_in, c_noise of SVD's v-prediction     EDM Table 1
    consistency               f(x, sigma), the network's estimate of the clean latent         OSV Eq. 4
    guided                    f with classifier-free guidance                                 OSV section 4.2
    euler_step                one Euler step of the probability-flow ODE                      EDM Eqs. 1, 3
    solve                     m Euler steps of the guided teacher                             OSV Eq. 8

The noise level is `sigma`: x_t = x0 + sigma_t * noise, from 700 (noise) down to 0 (data). Subscript t is the
noisier end of a step and s the cleaner one. A sigma is a number, or a tensor with one value per clip [b].

EDM is Karras et al., arXiv 2206.00364. OSV is arXiv 2409.11367.
"""
from collections import namedtuple

import torch

from model import Cond, unconditional

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 700.0, 7.0      # SVD's scheduler_config.json; rho is EDM's
NUM_SIGMAS = 100                                   # OSV section 5: "100 timesteps"

# ---------------------------------------------------------------------------------------------------------
# Noise levels


def karras_sigmas(n, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO):
    """n noise levels from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho), then 0 (EDM Eq. 5).
    Returns fp32 [n + 1]."""
    assert n >= 1 and 0 < sigma_min <= sigma_max, f"no grid of {n} levels from {sigma_max} to {sigma_min}"
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)                         # n: i / (n - 1)
    lo, hi = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (hi + ramp * (lo - hi)) ** rho                                     # EDM Eq. 5
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def strided(sigmas, k):
    """The k-step grid inside `sigmas` [n + 1]: k levels from the top, floor(n / k) apart, then 0 -> [k + 1].

    Students are sampled on this grid. They were trained at each of its levels, and the last step, to 0,
    stays long. (karras_sigmas(k) would end at sigma_min: for k = 2 its second step starts from 0.002, where
    almost no noise is left to remove.)
    """
    n = len(sigmas) - 1
    assert 1 <= k <= n, f"no {k}-step grid inside {n} noise levels"
    return torch.cat([sigmas[:k * (n // k):n // k], sigmas[-1:]])


def per_clip(sigma, x):
    """sigma, a number or [b] -> fp32 [b 1 1 1 1] on the device of x [b f c h w]."""
    return torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x)).view(-1, 1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------
# Preconditioning and the consistency function


Precondition = namedtuple("Precondition", "c_skip c_out c_in c_noise")


def precondition(sigma):
    """The scalings of EDM Table 1 for sigma_data = 1, fp32 and shaped like sigma. The negative sign of c_out
    makes the raw output F SVD's v-prediction.

        c_skip = 1 / (sigma^2 + 1)     c_out = -sigma / sqrt(sigma^2 + 1)
        c_in = 1 / sqrt(sigma^2 + 1)   c_noise = ln(sigma) / 4

    At sigma = 0, c_skip = 1 and c_out = 0. So f(x, 0) = x, the boundary condition of a consistency function
    (OSV Eq. 4), holds exactly.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float32)
    square = sigma.square() + 1
    c_noise = sigma.clamp(min=1e-20).log() / 4                                  # finite at sigma = 0
    return Precondition(1 / square, -sigma * square.rsqrt(), square.rsqrt(), c_noise)      # EDM Table 1


def consistency(net, x_t, sigma, cond):
    """Clean latent f_theta(x_t, sigma) = c_skip x_t + c_out F_theta(c_in x_t; c_noise, cond), OSV Eq. 4.

    For a distilled student this is the clean latent at the end of the ODE. For a teacher it is the mean of
    all clean latents that x_t may come from ("denoised").

    net: model.UNet, or any function with its arguments. x_t [b f c h w] -> x0_pred [b f c h w].
    """
    c_skip, c_out, c_in, c_noise = precondition(per_clip(sigma, x_t))
    inputs = torch.cat([c_in * x_t, cond.image_latents.float()], dim=2)         # b f 2c h w
    F_x = net(inputs, c_noise.flatten(), cond.image_embeds, cond.time_ids)      # b f c h w
    return c_skip * x_t + c_out * F_x                                           # OSV Eq. 4


def guided(net, x_t, sigma, cond, guidance=None):
    """Classifier-free guidance: f_uncond + w (f_cond - f_uncond), both in one batch (OSV section 4.2).

    guidance: w, a number or a tensor that broadcasts to b f 1 1 1; SVD increases w linearly over the frames.
    None turns guidance off: f_cond alone, at half the cost. x_t [b f c h w] -> denoised [b f c h w].
    """
    if guidance is None:
        return consistency(net, x_t, sigma, cond)
    both = Cond(*(torch.cat(pair) for pair in zip(unconditional(cond), cond)))  # (2 b): first unconditional
    sigma = per_clip(sigma, x_t).flatten().repeat(2)                            # (2 b)
    # One call on a batch of 2 b clips, then b f c h w each:
    denoised_uncond, denoised_cond = consistency(net, x_t.repeat(2, 1, 1, 1, 1), sigma, both).chunk(2)
    return denoised_uncond + guidance * (denoised_cond - denoised_uncond)


# ---------------------------------------------------------------------------------------------------------
# The probability-flow ODE


def euler_step(x_t, denoised, sigma_t, sigma_s):
    """Takes one Euler step of dx / d sigma = (x - denoised) / sigma from sigma_t to sigma_s (EDM Eqs. 1, 3):

        x_s = x_t + (sigma_s - sigma_t) / sigma_t (x_t - denoised)
            = denoised + sigma_s / sigma_t (x_t - denoised)

    The second form is the one computed. In it no large numbers cancel: a step to 0 returns exactly
    `denoised`. x_t, denoised [b f c h w] -> x_s [b f c h w].
    """
    return denoised + per_clip(sigma_s, x_t) / per_clip(sigma_t, x_t) * (x_t - denoised)    # EDM Eqs. 1, 3


@torch.no_grad()
def solve(teacher, x_t, sigmas, cond, guidance=None, progress=iter):
    """Takes len(sigmas) - 1 Euler steps of the guided teacher, from sigmas[0] to sigmas[-1] (OSV Eq. 8).

    sigmas [m + 1], or [m + 1, b] with a grid per clip. A step that starts at sigma 0 leaves x unchanged, so a
    grid may be padded with zeros. progress: wraps the loop (tqdm). x_t [b f c h w] -> x_s [b f c h w].
    """
    for i in progress(range(len(sigmas) - 1)):
        denoised = guided(teacher, x_t, sigmas[i], cond, guidance)
        x_s = euler_step(x_t, denoised, sigmas[i], sigmas[i + 1])               # OSV Eq. 8
        x_t = torch.where(per_clip(sigmas[i], x_t) > 0, x_s, x_t)               # at sigma 0, x_s is 0 / 0
    return x_t
