"""Exercise 5: m steps of the teacher.                                    difficulty 2 of 5, about 5 lines

OSV Eq. 8: the teacher takes m guided Euler steps, from sigmas[0] to sigmas[m]. Each step starts at the point
where the step before it ended.

sigmas [m + 1], or [m + 1, b] with a grid for each clip. A grid may end in several zeros: a step that starts
at sigma = 0 leaves x unchanged, without NaN. The teacher never trains, so nothing here has a gradient. Use
solver.guided and solver.euler_step. `progress` wraps the iterable of the loop (a progress bar).
x_t [b f c h w] -> x_s [b f c h w], fp32. Mirrors solver.py.
Read before: OSV section 4.2, Eq. 8.
"""
import torch

import solver  # noqa: F401


@torch.no_grad()
def solve(teacher, x_t, sigmas, cond, guidance=None, progress=iter):
    raise NotImplementedError
