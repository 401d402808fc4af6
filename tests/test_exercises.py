"""Grades the twelve exercises. By default it grades the repository's own functions, so the graders are tested
with everything else; a folder of answers is graded with

    $ OSV_IMPL=exercises python -m pytest tests/test_exercises.py -k ex01

In five exercises a second function is asked for that the library does not have (plug.DESIGNS); only answers
are graded in it, and test_exercise_mutations.py has an answer of each.

No expected value here is computed with the formula that an exercise asks for: they are properties, slow
loops, data so simple that the answer is known (a single point; a Gaussian), or finite differences.

Of every answer the graders also require that it leaves its arguments as they are (update_ema and merge_lora
change their first one) and that it does not call the library's own function.
"""
import functools
import inspect
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exercises"))

import plug  # noqa: E402

import discriminator  # noqa: E402
from model import Cond  # noqa: E402
from solver import SIGMA_MAX, SIGMA_MIN  # noqa: E402

FOLDER = os.environ.get("OSV_IMPL", "repo")
LIBRARY = plug.library()
GRADED = LIBRARY if FOLDER == "repo" else plug.answers(plug.ROOT / FOLDER)


def graded(name):
    """The answer that is graded. The library has none for plug.DESIGNS: test_exercise_mutations.py has."""
    if name not in GRADED:
        pytest.skip("the library has no such function")
    return GRADED[name]


for name in [*LIBRARY, *(name for names in plug.DESIGNS.values() for name in names)]:
    # A fixture per answer: a grader names what it grades.
    globals()[name] = pytest.fixture(lambda name=name: graded(name), name=name)


# ---------------------------------------------------------------------------------------------------------
# What a failure says: the quantity, the largest difference, where it is, and one hint.


def expect(quantity, actual, expected, hint, tolerance=1e-5, floor=1.0):
    """|actual - expected| <= tolerance * (floor + |expected|), element by element."""
    __tracebackhide__ = True
    expected = torch.as_tensor(expected, dtype=torch.float64)
    if actual is None:
        fail(quantity, "None", hint)
    actual = torch.as_tensor(actual).detach().double().cpu()
    if actual.shape != expected.shape:
        fail(quantity, f"shape {list(actual.shape)}, should be {list(expected.shape)}", hint)
    excess = (actual - expected).abs() / (floor + expected.abs())
    excess = torch.where(actual == expected, 0, excess).nan_to_num(torch.inf, torch.inf)
    if excess.numel() and excess.max() > tolerance:
        at = [int(i) for i in torch.unravel_index(excess.argmax(), excess.shape)]
        yours, right = actual[tuple(at)].item(), expected[tuple(at)].item()
        where = f" at {at}" if at else ""
        fail(quantity, f"off by {abs(yours - right):.3g}{where}: {yours:.6g}, should be {right:.6g}", hint)


def require(quantity, holds, hint):
    __tracebackhide__ = True
    if not holds:
        fail(quantity, "this is not the case", hint)


def fail(quantity, what, hint):
    __tracebackhide__ = True
    pytest.fail(f"{quantity.rstrip(',')}: {what}.\n    Hint: {hint}", pytrace=False)


def require_fp32(quantity, tensor, hint):
    __tracebackhide__ = True
    if tensor.dtype != torch.float32:
        fail(f"the precision of {quantity}", f"{tensor.dtype}, should be torch.float32", hint)


# ---------------------------------------------------------------------------------------------------------
# What is required of every answer


def careful(name, answer):
    """The answer, which fails if it changes a tensor that it was given. A class is returned with such a
    `forward`."""
    if inspect.isclass(answer):
        return type(answer.__name__, (answer,), {"forward": careful(name, answer.forward)})

    def call(*args, **kwargs):
        __tracebackhide__ = True
        given = [(f"argument {i + 1}" if i < len(args) else [*kwargs][i - len(args)], tensor, tensor.clone())
                 for i, value in enumerate([*args, *kwargs.values()])
                 for tensor in torch.utils._pytree.tree_leaves(value) if isinstance(tensor, torch.Tensor)]
        result = answer(*args, **kwargs)
        if result is None:
            fail(f"what {name} returns", "None", "the function ends without `return`")
        for argument, tensor, before in given:
            if not torch.equal(tensor, before):
                after = tensor.detach().clone()
                tensor.data.copy_(before)                       # for the next grader
                expect(f"{argument} of {name} after the call", after, before.detach().double(),
                       "it is changed in place, and others still need it: make a new tensor", 0)
        return result

    return call


def grader(test):
    """`test` with careful answers; a call of the library's own function by an answer fails it."""
    @functools.wraps(test)
    def run(**answers):
        __tracebackhide__ = True
        yours = [name for name, answer in answers.items() if answer is not LIBRARY.get(name)]
        with plug.watching(yours) as called:
            test(**{name: answer if name in ("update_ema", "merge_lora") else careful(name, answer)
                    for name, answer in answers.items()})
        for name in called:
            fail(name, "the library's own function is called", "write it; all other functions may be called")
    return run


# ---------------------------------------------------------------------------------------------------------
# Worlds in which the answer is known


class KnownNet:
    """Called like the UNet. `mean(x, sigma, mu, embeds)` says what the clean latent is, and the raw output is
    the v that says so. Remembers its calls as (x, sigma, embeds, ids), x with the scaling undone."""

    def __init__(self, mean):
        self.mean, self.calls, self.inputs = mean, [], []

    def __call__(self, x, c_noise, image_embeds, time_ids):
        __tracebackhide__ = True
        b = len(x)
        if list(c_noise.shape) != [b]:
            fail("c_noise", f"shape {list(c_noise.shape)}, should be {[b]}", "one number per clip")
        if not b == len(image_embeds) == len(time_ids):
            fail("the batch", f"{b} latents and {len(image_embeds)} conditions", "as many as clips")
        self.inputs.append(x)
        sigma = (4 * c_noise.double()).exp().view(-1, 1, 1, 1, 1)
        x, mu = x.double().chunk(2, dim=2)
        x = x * (sigma ** 2 + 1).sqrt()
        self.calls.append((x, sigma.flatten(), image_embeds, time_ids))
        x0 = self.mean(x, sigma, mu, image_embeds.double().mean((1, 2)).view(-1, 1, 1, 1, 1))
        return (((x - x0) / sigma - sigma * x0) / (sigma ** 2 + 1).sqrt()).float()


S = 0.6                                             # standard deviation of the Gaussian worlds


def point_net():
    """All clips are the one given as condition: every path of the ODE is a straight line to it."""
    return KnownNet(lambda x, sigma, mu, e: mu + 0 * x)


def gaussian_teacher():
    """Clips are N(mu, S^2), mu the condition: a teacher's denoiser."""
    return KnownNet(lambda x, sigma, mu, e: (S ** 2 * x + sigma ** 2 * (mu + e)) / (S ** 2 + sigma ** 2))


def gaussian_student():
    """The same clips, after perfect distillation: the end of the ODE."""
    return KnownNet(lambda x, sigma, mu, e: mu + e + (x - mu - e) * S / (S ** 2 + sigma ** 2).sqrt())


def make_cond(b=2, f=3, h=4, w=5):
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    time_ids = torch.tensor([6.0, 127, 0.02]) + torch.arange(1.0, b + 1)[:, None]
    return Cond(draw(b, 1, 8) + 0.5, draw(b, f, 4, h, w), time_ids)


def pick(cond, i):
    return Cond(*(t[i:i + 1] for t in cond))


def column(values):
    return torch.tensor(values).view(-1, 1, 1, 1, 1)


def mean_of(cond):
    """mu + e of the Gaussian worlds, fp64."""
    return cond.image_latents.double() + cond.image_embeds.double().mean((1, 2)).view(-1, 1, 1, 1, 1)


# Where b, f, c, h and w are all 4, a [b] that multiplies another axis makes no error, only a wrong number.
CUBE = 4, 4, 4, 4, 4


# ---------------------------------------------------------------------------------------------------------
# 1. Karras grid


def test_ex01_ends(karras_sigmas):
    for n, low, high, *rho in ((100, SIGMA_MIN, SIGMA_MAX), (25, SIGMA_MIN, SIGMA_MAX), (5, 0.5, 80.0),
                               (9, 0.1, 10.0, 3.0)):
        sigmas = karras_sigmas(n, low, high, *rho)
        expect(f"the length of karras_sigmas({n})", len(sigmas), n + 1, "n levels, and then 0")
        for what, i, value in (("first", 0, high), ("last but one", -2, low), ("last", -1, 0)):
            expect(f"the {what} of {n} levels", sigmas[i], value,
                   "n levels include both ends; 0 is one more", 1e-5, floor=0)
        require("sigmas descend", bool((sigmas.diff() < 0).all()), "from noise to data")
        require("sigmas are fp32", sigmas.dtype == torch.float32, "compute in fp64 if you like, return fp32")


def test_ex01_even_in_the_root(karras_sigmas):
    for n, low, high, rho in ((100, SIGMA_MIN, SIGMA_MAX, 7.0), (9, 0.1, 10.0, 3.0), (5, 1.0, 5.0, 1.0)):
        steps = karras_sigmas(n, low, high, rho)[:n].double().pow(1 / rho).diff()
        expect(f"the steps of sigma^(1/{rho:g}) for n = {n}", steps, steps.mean().expand(n - 1),
               "the even spacing is in sigma^(1/rho); raise to rho at the end", 1e-3, floor=0)


def test_ex01_one_level(karras_sigmas):
    expect("the grid of one level", karras_sigmas(1, 0.1, 10.0), [10.0, 0.0], "i / (n - 1) is 0 / 0 there")


# ---------------------------------------------------------------------------------------------------------
# 2. Preconditioning

SIGMAS = torch.tensor([0.002, 0.1, 1.0, 3.0, 14.81, 700.0])


def test_ex02_network_input_has_unit_variance(precondition):
    x0, noise = torch.randn(2, 100_000)
    for sigma in SIGMAS.tolist():
        std = (precondition(sigma).c_in * (x0 + sigma * noise)).std()
        expect(f"the std of c_in x at sigma = {sigma:g}", std, 1.0,
               "x0 and noise are independent: what is the "
               "variance of x0 + sigma noise?", 0.01)


def test_ex02_v_gives_back_the_data(precondition):
    x0, noise = torch.randn(2, 6, 50).double()
    sigma = SIGMAS[:, None].double()
    v = (noise - sigma * x0) / (sigma ** 2 + 1).sqrt()
    c = precondition(SIGMAS[:, None])
    expect("c_skip x + c_out v, which is x0,", c.c_skip * (x0 + sigma * noise) + c.c_out * v, x0,
           "put x = x0 + sigma noise and v in, and compare the coefficients of x0 and of noise", 2e-4)


def test_ex02_noise_level(precondition):
    c_noise = precondition(torch.tensor([1.0, 2.0, 4.0, 0.0])).c_noise
    expect("c_noise at sigma = 1", c_noise[0], 0.0, "ln 1")
    expect("what doubling sigma adds to c_noise", c_noise[:3].diff(), [math.log(2) / 4] * 2,
           "natural log, / 4")
    require("c_noise is finite at sigma = 0", bool(c_noise[3].isfinite()), "clamp before the logarithm")
    doubling = precondition(SIGMA_MIN * 2.0 ** torch.arange(10)).c_noise.diff()
    expect("what doubling sigma adds to c_noise, from 0.002 on,", doubling, [math.log(2) / 4] * 9,
           "what keeps 0 finite must not change the noise levels that exist")


def test_ex02_shapes(precondition):
    for sigma in (2, 3.0, torch.tensor(3.0), SIGMAS[:1], SIGMAS, SIGMAS.view(2, 3, 1), column([1.0, 2.0])):
        shape = torch.as_tensor(sigma).shape
        for key, value in precondition(sigma)._asdict().items():
            require(f"{key} of a sigma of shape {list(shape)} has that shape", value.shape == shape,
                    "the four follow sigma's shape; a number is shape []")


def test_ex02_boundary(precondition):
    c = precondition(0.0)
    expect("c_skip at sigma = 0", c.c_skip, 1.0, "f(x, 0) = x", 0)
    expect("c_out at sigma = 0", c.c_out, 0.0, "f(x, 0) = x", 0)


def test_ex02_precision(precondition):
    for given in (SIGMAS.bfloat16(), SIGMAS.double(), SIGMAS.half()):
        for key, value in precondition(given)._asdict().items():
            require(f"{key} of a {given.dtype} sigma is fp32", value.dtype == torch.float32,
                    "sigma^2 + 1 is 490,001 at the top: too much for fp16, too fine for bf16")
            require(f"{key} is finite", bool(value.isfinite().all()), "go to fp32 before you square")


# EDM's two conditions for any std of the data. Each grader computes with variances of independent variables.
STDS = [(sigma, std) for std in (0.5, 1.0, 2.0) for sigma in (0.02, 0.3, 1.0, 5.0, 80.0)]


def skip_and_out_of(skip_and_out, sigma, std):
    """The answer's c_skip and c_out as fp64 numbers."""
    found = skip_and_out(sigma, std)
    require("skip_and_out returns two values", isinstance(found, (tuple, list)) and len(found) == 2,
            "return c_skip, c_out")
    return [float(value) for value in found]


def test_ex02_design_target_has_unit_variance(skip_and_out):
    variances = []
    for sigma, std in STDS:
        c_skip, c_out = skip_and_out_of(skip_and_out, sigma, std)
        variances.append(((1 - c_skip) ** 2 * std ** 2 + c_skip ** 2 * sigma ** 2) / max(c_out ** 2, 1e-30))
    expect("the variance of the network's target, by level and std of the data,", variances,
           [1.0] * len(STDS), "the target is (x0 - c_skip x) / c_out; x0 and noise are independent", 1e-3)


def test_ex02_design_error_is_amplified_least(skip_and_out):
    """Any other c_skip needs a larger c_out for a target of unit variance."""
    for sigma, std in STDS:
        c_skip, c_out = skip_and_out_of(skip_and_out, sigma, std)
        others = torch.linspace(-0.5, 1.5, 2001).double()
        least = ((1 - others) ** 2 * std ** 2 + others ** 2 * sigma ** 2).sqrt().min()
        expect(f"|c_out| at sigma = {sigma:g} for data of std {std:g}", abs(c_out), least,
               "c_out multiplies the network's error: choose the c_skip that makes it small", 1e-3, floor=0)


def test_ex02_design_network_says_v(skip_and_out):
    x0, noise = torch.randn(2, 50).double()
    for sigma in (0.02, 1.0, 80.0):
        c_skip, c_out = skip_and_out_of(skip_and_out, sigma, 1.0)
        v = (noise - sigma * x0) / (sigma ** 2 + 1) ** 0.5
        expect(f"the network's target at sigma = {sigma:g} for data of std 1, which is v,",
               (x0 - c_skip * (x0 + sigma * noise)) / (c_out or 1e-30), v,
               "the two conditions leave the sign of c_out open; SVD's v decides it", 1e-3)


def test_ex02_design_boundary(skip_and_out):
    for std in (0.5, 1.0, 2.0):
        expect(f"c_skip and c_out at sigma = 0 for data of std {std:g}",
               skip_and_out_of(skip_and_out, 0.0, std), [1.0, 0.0], "f(x, 0) = x")


# ---------------------------------------------------------------------------------------------------------
# 3. Consistency function


def test_ex03_boundary(consistency):
    x, cond = torch.randn(2, 3, 4, 4, 5), make_cond()
    for raw in (torch.randn_like(x), torch.full_like(x, 1e30)):
        expect("f(x, 0), which is x,", consistency(lambda *_, **__: raw, x, 0.0, cond), x,
               "c_skip and c_out at 0", 0)


def test_ex03_finds_the_mean(consistency):
    cond, sigma = make_cond(), torch.tensor([0.3, 20.0])
    x = torch.randn(2, 3, 4, 4, 5) * (sigma ** 2 + 1).sqrt().view(-1, 1, 1, 1, 1)
    net = gaussian_teacher()
    actual = consistency(net, x, sigma, cond)
    mu, square = cond.image_latents + column(cond.image_embeds.mean((1, 2)).tolist()), column([0.09, 400.0])
    expect("the sigma that c_noise tells", net.calls[0][1], sigma,
           "c_noise, not sigma, goes to the net", 1e-4)
    expect("the condition latents inside the inputs", net.inputs[0][:, :, 4:], cond.image_latents,
           "noisy latents first, scaled; then the condition, not scaled")
    expect("the noisy latents inside the inputs", net.calls[0][0], x, "scaled by c_in, nothing else", 1e-4)
    expect("f of a network that knows the answer", actual, (S ** 2 * x + square * mu) / (S ** 2 + square),
           "c_skip multiplies x_t itself, c_out the raw output", 1e-3)
    expect("the image embeddings that the network sees", net.calls[0][2], cond.image_embeds,
           "cond.image_embeds as they are", 0)
    expect("the time ids that the network sees", net.calls[0][3], cond.time_ids,
           "cond.time_ids as they are", 0)
    require_fp32("f", actual, "arithmetic with sigma is fp32")


def test_ex03_sigma_of_all_clips_or_of_each(consistency):
    x, cond = 3 * torch.randn(CUBE), make_cond(*CUBE[:2], 4, 4)
    right = lambda square: (S ** 2 * x + square * mean_of(cond)) / (S ** 2 + square)
    for sigma in (2.0, torch.tensor(2.0)):
        expect("f for one sigma for all clips", consistency(gaussian_teacher(), x, sigma, cond), right(4.0),
               "solver.per_clip gives each clip its own", 1e-3)
        expect("f for one sigma and one clip", consistency(gaussian_teacher(), x[:1], sigma, pick(cond, 0)),
               right(4.0)[:1], "c_noise has one number per clip, also if there is one clip", 1e-3)
    each = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expect("f for a sigma per clip", consistency(gaussian_teacher(), x, each, cond),
           right(column([1.0, 4.0, 9.0, 16.0])), "sigma belongs to the first axis: solver.per_clip", 1e-3)


def test_ex03_precision(consistency):
    x, sigma, net = torch.randn(2, 3, 4, 4, 5).bfloat16(), torch.tensor([0.3, 20.0]), gaussian_teacher()
    cond = Cond(*(t.bfloat16() for t in make_cond()))
    square, mu = column([0.09, 400.0]).double(), mean_of(cond)
    actual = consistency(net, x, sigma, cond)
    require_fp32("f of a bf16 x_t", actual, "arithmetic with sigma is fp32, and so is what comes of it")
    require_fp32("the inputs of the network", net.inputs[0], "c_in x_t is fp32; the network may round")
    expect("the noisy latents inside the inputs, for a bf16 x_t", net.calls[0][0], x.double(),
           "c_in x_t is fp32; the network may round")
    expect("f of a bf16 x_t", actual, (S ** 2 * x.double() + square * mu) / (S ** 2 + square),
           "from bf16 to fp32 first, then the arithmetic", 1e-3)
    net = lambda x, *_, **__: x[:, :, :4].bfloat16() * 0 + 1
    expect("f of a bf16 output", consistency(net, x, 2.0, cond),
           0.2 * x.double() - 0.8 ** 0.5, "c_out F is fp32, whatever F is", 1e-5)


def test_ex03_gradient_reaches_the_network(consistency):
    gain = torch.ones((), requires_grad=True)
    net = lambda x, *_, **__: gain * x[:, :, :4]
    x0_pred = consistency(net, torch.randn(2, 3, 4, 4, 5), 2.0, make_cond())
    require("f has a graph", x0_pred.requires_grad, "no no_grad, no detach: this is what trains")
    x0_pred.sum().backward()
    require("the network receives a gradient", gain.grad is not None, "no no_grad here: this is what trains")


# ---------------------------------------------------------------------------------------------------------
# 4. Euler step and guidance


def test_ex04_straight_lines(euler_step):
    """If all data is one point, the ODE's paths are straight and Euler makes no error."""
    x0, noise = torch.randn(2, 3, 2, 4, 4, 5)
    for t, s in (([10.0, 2.0, 700.0], [5.0, 0.1, 14.8]), ([1.0, 1.0, 1.0], [1.0, 0.0, 3.0])):
        x_s = euler_step(x0 + column(t) * noise, x0, torch.tensor(t), torch.tensor(s))
        expect(f"the step from sigma {t} to {s}", x_s, x0 + column(s) * noise,
               "a point stays on the line from x0 through x_t", 1e-4)
    expect("a step with numbers for sigmas", euler_step(x0 + 4 * noise, x0, 4.0, 1.0), x0 + noise,
           "solver.per_clip takes both", 1e-4)


def test_ex04_sigmas_belong_to_clips_and_precision(euler_step):
    x0, noise = torch.randn(2, *CUBE)
    t, s = [9.0, 7.0, 5.0, 3.0], [1.0, 2.0, 0.0, 2.5]
    for x_t in (x0 + column(t) * noise, (x0 + column(t) * noise).bfloat16()):
        x_s = euler_step(x_t, x0, torch.tensor(t), torch.tensor(s))
        slow = [x.double() + s_i / t_i * (y.double() - x.double())                  # the theorem of Thales
                for x, y, t_i, s_i in zip(x0, x_t, t, s)]
        expect(f"steps of four clips, x_t {x_t.dtype},", x_s, torch.stack(slow),
               "a sigma belongs to a clip, the first axis; the arithmetic is fp32", 1e-5)
        require_fp32(f"x_s for x_t {x_t.dtype}", x_s, "arithmetic with sigma is fp32")


def test_ex04_a_step_to_zero_is_the_estimate(euler_step):
    x, denoised = 700 * torch.randn(1, 2, 4, 4, 5), torch.randn(1, 2, 4, 4, 5)
    expect("a step from 700 to 0", euler_step(x, denoised, 700.0, 0.0), denoised,
           "the same formula can be written without a difference of large numbers", 2e-4)


def test_ex04_half_the_step_half_the_error(euler_step):
    """Gaussian data: the ODE's end is known, and Euler is a method of first order."""
    x_t, errors = torch.tensor(2.0).view(1, 1, 1, 1, 1), []
    for m in (64, 128):
        x, grid = x_t, torch.linspace(2.0, 0.5, m + 1)
        for t, s in zip(grid, grid[1:]):
            x = euler_step(x, S ** 2 * x / (S ** 2 + t ** 2), t, s)
        errors.append((x - x_t * ((S ** 2 + 0.25) / (S ** 2 + 4)) ** 0.5).abs().item())
    expect("the ratio of the errors of 64 and 128 steps", errors[0] / errors[1], 2.0,
           "sigma in the denominator is where the step starts", 0.1)


def test_ex04_guidance_interpolates(guided):
    x, cond, nothing = torch.randn(2, 3, 4, 4, 5) * 3, make_cond(), make_cond()
    nothing = nothing._replace(image_embeds=0 * nothing.image_embeds, image_latents=0 * nothing.image_latents)
    mu = cond.image_latents + column(cond.image_embeds.mean((1, 2)).tolist())
    square = column([4.0, 9.0])
    mean = lambda mu: (S ** 2 * x + square * mu) / (S ** 2 + square)
    sigma = torch.tensor([2.0, 3.0])
    for w, expected, what in ((None, mean(mu), "no guidance"), (1.0, mean(mu), "w = 1, with the image alone"),
                              (0.0, mean(0 * mu), "w = 0, without the image")):
        expect(f"guided at {what},", guided(gaussian_teacher(), x, sigma, cond, w), expected,
               "w = 1 is the condition alone, w = 0 is none", 1e-3)
    parts = [guided(gaussian_teacher(), x, sigma, cond, w) for w in (0.0, 1.0, 3.0)]
    expect("guided at w = 3, three times as far from w = 0 as w = 1 is,", parts[2] - parts[0],
           3 * (parts[1] - parts[0]).double(), "linear in w", 1e-3)


def test_ex04_guidance_per_frame(guided):
    x, cond, w = torch.randn(2, 3, 4, 4, 5), make_cond(), [1.0, 2.0, 3.5]
    both = guided(gaussian_teacher(), x, 2.0, cond, torch.tensor(w).view(1, 3, 1, 1, 1))
    for f in range(3):
        expect(f"frame {f} with guidance {w} over the frames", both[:, f],
               guided(gaussian_teacher(), x, 2.0, cond, w[f])[:, f], "w only multiplies: let it broadcast")


def test_ex04_guidance_per_clip_and_precision(guided):
    x, cond, w = torch.randn(CUBE), make_cond(*CUBE[:2], 4, 4), [0.0, 1.0, 2.0, 3.0]
    for x_t in (x, x.bfloat16()):
        each = guided(gaussian_teacher(), x_t, 2.0, cond, column(w))
        require_fp32(f"guided x_t {x_t.dtype}", each, "consistency returns fp32: keep it")
        for i in range(4):
            mu = w[i] * mean_of(cond)[i]
            expect(f"clip {i} with guidance {w} over the clips, x_t {x_t.dtype},", each[i],
                   (S ** 2 * x_t[i].double() + 4.0 * mu) / (S ** 2 + 4.0),
                   "w may have any shape that broadcasts to b f 1 1 1", 1e-3)


def test_ex04_guidance_keeps_the_rest_of_the_condition(guided):
    """In any order, so each row of time ids is looked for: their columns are sorted."""
    cond, seen = make_cond(), {}
    for w in (None, 2.0):
        net = gaussian_teacher()
        guided(net, torch.randn(2, 3, 4, 4, 5), 2.0, cond, w)
        seen[w] = torch.cat([call[3] for call in net.calls]).sort(0).values
    expect("the time ids without guidance", seen[None], cond.time_ids, "they are part of the condition", 0)
    expect("the time ids with and without the image", seen[2.0], cond.time_ids.repeat_interleave(2, 0),
           "model.unconditional takes away the image, not fps, motion and noise", 0)


def test_ex04_guidance_costs(guided):
    for w, evaluations in ((None, 2), (2.0, 4)):
        net = gaussian_teacher()
        guided(net, torch.randn(2, 3, 4, 4, 5), 2.0, make_cond(), w)
        expect(f"evaluations for two clips with guidance {w}", sum(len(call[0]) for call in net.calls),
               evaluations, "without guidance there is nothing to compute twice", 0)


# ---------------------------------------------------------------------------------------------------------
# 5. m-step solve


def test_ex05_straight_lines(solve):
    cond = make_cond()
    x0, noise = cond.image_latents, torch.randn(2, 3, 4, 4, 5)
    for grid in ([700.0, 14.8, 1.0, 0.1], [80.0, 20.0], [5.0, 0.0]):
        x_s = solve(point_net(), x0 + grid[0] * noise, torch.tensor(grid), cond)
        expect(f"the end of the grid {grid}", x_s, x0 + grid[-1] * noise, "m + 1 levels are m steps", 1e-3)


def test_ex05_visits_each_level_once(solve):
    net, grid = gaussian_teacher(), torch.tensor([10.0, 5.0, 2.0, 1.0])
    solve(net, 10 * torch.randn(2, 3, 4, 4, 5), grid, make_cond())
    expect("the network evaluations of a 3-step solve", len(net.calls), 3, "one per step", 0)
    expect("the levels it was asked at", torch.stack([call[1][0] for call in net.calls]), grid[:3],
           "each step starts where the last one ended", 1e-4)


def test_ex05_half_the_step_half_the_error(solve):
    cond, errors = make_cond(), []
    mu = (cond.image_latents + column(cond.image_embeds.mean((1, 2)).tolist())).double()
    x_t = mu + 2 * torch.randn(2, 3, 4, 4, 5).double()
    exact = mu + (x_t - mu) * ((S ** 2 + 0.25) / (S ** 2 + 4)) ** 0.5
    for m in (16, 32):
        x_s = solve(gaussian_teacher(), x_t.float(), torch.linspace(2.0, 0.5, m + 1), cond)
        errors.append((x_s - exact).abs().mean())
    expect("the ratio of the errors of 16 and 32 steps", errors[0] / errors[1], 2.0, "x must move on", 0.1)


def test_ex05_grid_per_clip_and_padding(solve):
    cond, x = make_cond(*CUBE[:2], 4, 4), torch.randn(CUBE)
    grid = torch.tensor([[9.0, 4.0, 1.0, 0.5], [0.3, 0.1, 0.0, 0.0],
                         [5.0, 0.0, 0.0, 0.0], [8.0, 7.0, 6.0, 0.0]]).T                         # m + 1, b
    together = solve(gaussian_teacher(), x, grid, cond)
    for i, m in ((0, 4), (1, 3), (2, 2), (3, 4)):
        alone = solve(gaussian_teacher(), x[i:i + 1], grid[:m, i], pick(cond, i))
        expect(f"clip {i} of a batch with a grid for each clip", together[i:i + 1], alone,
               "solver.per_clip and euler_step take [b]; what does a step from 0 to 0 divide by?", 1e-4)


def test_ex05_guides_and_never_trains(solve):
    cond, x, grid = make_cond(), torch.randn(2, 3, 4, 4, 5).requires_grad_(), torch.tensor([5.0, 1.0])
    net = gaussian_teacher()
    x_s = solve(net, x, grid, cond, 2.0)
    require("the teacher's result has no graph", not x_s.requires_grad, "torch.no_grad")
    expect("evaluations of one guided step of two clips", sum(len(call[0]) for call in net.calls), 4,
           "hand guidance on", 0)


def test_ex05_guidance_moves_the_end(solve):
    """The point that w (f_cond - f_uncond) leads to is w times the condition: again a straight line."""
    cond, noise = make_cond(), torch.randn(2, 3, 4, 4, 5)
    w = torch.tensor([1.0, 2.0, 3.5]).view(1, 3, 1, 1, 1)
    x_s = solve(point_net(), w * cond.image_latents + 9 * noise, torch.tensor([9.0, 3.0, 1.0]), cond, w)
    expect("the end of two guided steps", x_s, w * cond.image_latents + noise,
           "guidance as given, at every step", 1e-3)


def test_ex05_progress(solve):
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    cond, grid = make_cond(), torch.tensor([10.0, 5.0, 2.0, 1.0])
    solve(gaussian_teacher(), torch.randn(2, 3, 4, 4, 5), grid, cond, progress=progress)
    expect("the steps that the progress bar counts", len(seen), 3, "for i in progress(...)", 0)


def test_ex05_precision(solve):
    cond, noise = make_cond(), torch.randn(2, 3, 4, 4, 5).bfloat16()
    x_s = solve(point_net(), 8 * noise, torch.tensor([8.0, 3.0, 1.0]), cond)
    require_fp32("x_s for a bf16 x_t", x_s, "the first step makes x fp32: keep it")
    expect("the end of two steps from a bf16 x_t", x_s, 7 / 8 * cond.image_latents + noise.double(),
           "x between the steps is fp32", 1e-4)


# ---------------------------------------------------------------------------------------------------------
# 6. Pseudo-Huber


def test_ex06_near_and_far(pseudo_huber):
    zero = torch.zeros(1, 1)
    expect("d(x, x)", pseudo_huber(zero + 3, zero + 3, 0.5), 0.0, "c is taken away again")
    expect("d far away", pseudo_huber(zero + 1000, zero, 0.5), 999.5, "|x - y| - c", 1e-5)
    expect("d close by, over d twice as close,", pseudo_huber(zero + 2e-2, zero, 1.0)
           / pseudo_huber(zero + 1e-2, zero, 1.0), 4.0, "a parabola", 2e-3)
    expect("d(x, y) - d(y, x)", pseudo_huber(zero + 2, zero, 0.5) - pseudo_huber(zero, zero + 2, 0.5), 0.0,
           "a distance")


def test_ex06_slope(pseudo_huber):
    """Finite differences: the slope is x / |(x, c)|, the sine of the angle under which c sees x."""
    zero, h = torch.zeros(1, 1).double(), 1e-2
    for x, c in ((3.0, 4.0), (-3.0, 4.0), (4.0, 3.0), (0.0, 2.0)):
        slope = (pseudo_huber(zero + x + h, zero, c) - pseudo_huber(zero + x - h, zero, c)) / (2 * h)
        expect(f"the slope of d at {x:g} for c = {c:g}", slope, math.sin(math.atan2(x, c)),
               "c^2 under the root", 1e-3)


def test_ex06_mean_and_weight(pseudo_huber):
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 3, 5)
    expect("d of clips 1 and 2 off, c = 0,", pseudo_huber(x, 0 * x, 0.0), 1.5, "the mean over all elements")
    expect("the same with weights 10 and 1", pseudo_huber(x, 0 * x, 0.0, torch.tensor([10.0, 1.0])), 6.0,
           "weight [b] multiplies each clip's distance: give it trailing dimensions")


def test_ex06_weight_of_each_clip(pseudo_huber):
    """Slowly: one clip at a time."""
    x, y, weight = torch.randn(CUBE), torch.randn(CUBE), torch.tensor([10.0, 3.0, 1.0, 0.5])
    alone = torch.stack([pseudo_huber(x[i:i + 1], y[i:i + 1], 0.7).double() for i in range(4)])
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        loss = pseudo_huber(x, y, 0.7, weight.to(kind))
        require_fp32(f"d with {kind} weights", loss, "the arithmetic is fp32")
        expect(f"d with {kind} weights, against the weighted mean of the clips' d,", loss,
               (alone * weight).mean(), "weight times (root - c), of each clip (first axis); then the mean")


def test_ex06_gradient(pseudo_huber):
    """Against the slope: x / |(x, c)| of each element, over the number of elements."""
    x, y = torch.tensor([[3.0], [-3.0]], requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    loss = pseudo_huber(x, y, 4.0, torch.tensor([1.0, 2.0]))
    require("d has a gradient", loss.requires_grad, "this is what trains: no no_grad, no detach")
    loss.backward()
    expect("the gradient for x", x.grad, [[0.3], [-0.6]], "no detach; the weight counts here too")
    expect("the gradient for y", y.grad, [[-0.3], [0.6]], "d(x, y) = d(y, x): the loop detaches, not d")


def test_ex06_precision(pseudo_huber):
    x = torch.full((1, 4), 256.0).bfloat16()
    for value in (1.0, 0.5):
        loss = pseudo_huber(x, torch.full((1, 4), value).bfloat16(), 0.0)
        require("d of bf16 is an fp32 scalar", loss.dtype == torch.float32 and loss.shape == (),
                "float() first")
        expect(f"d between 256 and {value:g} in bf16", loss, 256 - value,
               "255.5 and 255 squared are not bf16 numbers: float() first, then the difference")


def test_ex06_lambda(consistency_weight):
    t, s = torch.tensor([700.0, 5.0, 0.01]), torch.tensor([517.0, 3.0, 0.0])
    expect("lambda with exponent 0", consistency_weight(t, s, 0.0), [1.0] * 3, "a power")
    expect("lambda^10 (sigma_t - sigma_s)", consistency_weight(t, s).pow(10) * (t - s), [1.0] * 3,
           "one over the gap, to the power", 1e-4)
    expect("lambda with exponent 1, times the gap", consistency_weight(t, s, 1.0) * (t - s), [1.0] * 3,
           "one over the gap", 1e-4)


def test_ex06_lambda_precision(consistency_weight):
    t, s = torch.tensor([256.0, 2.0]).bfloat16(), torch.tensor([0.5, 1.0]).bfloat16()
    weight = consistency_weight(t, s, 1.0)
    require_fp32("lambda of bf16 levels", weight, "the arithmetic is fp32")
    expect("one over lambda of bf16 levels, exponent 1,", 1 / weight, [255.5, 1.0],
           "255.5 is not a bf16 number: float() first, then the difference")


# Gaps of 99 pairs of a grid from 700 to 0.002, of a shuffled one, and of three levels.
GAPS = {"a grid of 100 levels": torch.linspace(700 ** (1 / 7), 0.002 ** (1 / 7), 100).pow(7),
        "four levels in no order": torch.tensor([3.0, 10.0, 9.5, 1.0]),
        "three levels": torch.tensor([5.0, 3.0, 0.5])}


def test_ex06_design_weights_stay_within_the_factor(exponent_within):
    """By the definition of the weight: the largest over the smallest."""
    for name, sigmas in GAPS.items():
        sigma_t, sigma_s = torch.maximum(sigmas[:-1], sigmas[1:]), torch.minimum(sigmas[:-1], sigmas[1:])
        for factor in (1.0, 3.0, 100.0):
            weights = (1 / (sigma_t - sigma_s).double()) ** float(exponent_within(sigma_t, sigma_s, factor))
            expect(f"the largest weight over the smallest one, {name}, factor {factor:g},",
                   weights.max() / weights.min(), factor,
                   "which two gaps have the largest and the smallest weight? Take logarithms", 1e-3, floor=0)


def test_ex06_design_only_the_gaps_count(exponent_within):
    sigma_t, sigma_s = torch.tensor([700.0, 5.0, 2.0]), torch.tensor([600.0, 4.0, 0.0])
    exponent = float(exponent_within(sigma_t, sigma_s, 3.0))
    require("the exponent is positive for a factor above 1", exponent > 0, "lambda falls with the gap")
    for what, other in (("in the other order", (sigma_t.flip(0), sigma_s.flip(0))),
                        ("all 8 times as large", (8 * sigma_t, 8 * sigma_s)),
                        ("all 50 higher", (sigma_t + 50, sigma_s + 50))):
        expect(f"the exponent for the same levels {what}", float(exponent_within(*other, 3.0)), exponent,
               "the weight depends on sigma_t - sigma_s, and the factor on the ratio of two gaps", 1e-4)


# ---------------------------------------------------------------------------------------------------------
# 7. Hinge


def test_ex07_discriminator(hinge_d):
    nothing = torch.zeros(4)
    expect("hinge_d of a discriminator that always says 0", hinge_d(nothing, nothing), 2.0,
           "one from each side")
    expect("hinge_d of a perfect one", hinge_d(nothing + 5, nothing - 1), 0.0, "real is positive")
    expect("hinge_d of one that has it backwards", hinge_d(nothing - 5, nothing + 5), 12.0,
           "real is positive")
    mixed = hinge_d(torch.tensor([0.0, 9.0]), torch.tensor([-9.0, -9.0, -9.0, 3.0]))
    expect("hinge_d of 2 reals, one of them unsure, and 4 fakes, one of them taken for real,", mixed, 1.5,
           "each side has a mean of its own; what is right by more than 1 counts 0")


def test_ex07_any_shape(hinge_d, hinge_g):
    real, fake = torch.randn(1, 3, 4), torch.randn(5, 3, 4)
    for name, loss, flat in (("hinge_d", hinge_d(real, fake), hinge_d(real.flatten(), fake.flatten())),
                             ("hinge_g", hinge_g(fake), hinge_g(fake.flatten())),
                             ("hinge_g, linear,", hinge_g(fake, True), hinge_g(fake.flatten(), True))):
        expect(f"{name} of logits with three axes, against the same in a row,", loss, flat.detach().double(),
               "the mean over all logits")


def test_ex07_discriminator_slopes(hinge_d):
    real, fake = torch.tensor([0.0, 1.5], requires_grad=True), torch.tensor([0.0, -1.5], requires_grad=True)
    hinge_d(real, fake).backward()
    expect("the slope for real logits [0, 1.5]", real.grad, [-0.5, 0],
           "no reward beyond the margin; no detach")
    expect("the slope for fake logits [0, -1.5]", fake.grad, [0.5, 0],
           "no reward beyond the margin; no detach")


def test_ex07_generator(hinge_g):
    fake = torch.tensor([-1.0, 0.0, 3.0, 2.0], requires_grad=True)
    expect("hinge_g of logits [-1, 0, 3, 2]", hinge_g(fake), 0.75, "it wants fakes to be taken for real")
    hinge_g(fake).backward()
    expect("its slope", fake.grad, [-0.25, -0.25, 0, 0], "no reward where D already believes; no detach")
    fake.grad = None
    expect("hinge_g(linear=True)", hinge_g(fake, linear=True), -1.0, "minus the mean, no margin")
    require("hinge_g(linear=True) has a gradient", hinge_g(fake, linear=True).requires_grad, "no detach")
    hinge_g(fake, linear=True).backward()
    expect("its slope with linear=True", fake.grad, [-0.25] * 4, "the same for all logits; no detach")


def test_ex07_precision(hinge_d, hinge_g):
    large, one = torch.tensor([-256.0]).bfloat16(), torch.ones(1).bfloat16()
    several = torch.tensor([256.0, 1.0, 1.0, 1.0]).bfloat16()
    for name, loss, right in (("hinge_d of real -256", hinge_d(large, -one), 257.0),
                              ("hinge_d of fake 256", hinge_d(one, -large), 257.0),
                              ("hinge_g of -256", hinge_g(large), 257.0),
                              ("hinge_g, linear, of 256, 1, 1, 1", hinge_g(several, linear=True), -64.75)):
        require(f"{name} in bf16 is an fp32 scalar", loss.dtype == torch.float32 and loss.shape == (),
                "float()")
        expect(f"{name} in bf16", loss, right, f"{abs(right):g} is not a bf16 number: float() first")


def test_ex07_design_finds_the_slopes(still_teaches):
    """Losses whose slopes are known. The last one is largest where it teaches nothing."""
    logits = torch.tensor([[-8.0, -2.0, 0.0], [0.5, 2.0, 8.0]])
    for name, loss, expected in (
            ("the mean", lambda x: x.mean(), [[1, 1, 1], [1, 1, 1]]),
            ("minus the mean", lambda x: -x.mean(), [[1, 1, 1], [1, 1, 1]]),
            ("mean relu(x)", lambda x: x.relu().mean(), [[0, 0, 0], [1, 1, 1]]),
            ("mean log(1 - sigmoid(x))", lambda x: F.logsigmoid(-x).mean(), [[0, 1, 1], [1, 1, 1]]),
            ("-mean log sigmoid(x)", lambda x: -F.logsigmoid(x).mean(), [[1, 1, 1], [1, 1, 0]]),
            ("mean tanh(x)^2", lambda x: x.tanh().square().mean(), [[0, 1, 0], [1, 1, 0]])):
        expect(f"which logits {name} still teaches", still_teaches(loss, logits), expected,
               "not the loss, its slope decides, of either sign: torch.autograd.grad", 0)


def test_ex07_design_size_of_the_batch(still_teaches):
    for n in (1, 1000):
        expect(f"the share of {n} equal logits that a loss of slope 0.1 still teaches",
               still_teaches(lambda x: 0.1 * x.mean(), torch.zeros(n)).double().mean(), 1.0,
               "the mean divides each slope by the number of logits: undo this", 0)
        expect(f"the share of {n} equal logits that a loss of slope 0.001 still teaches",
               still_teaches(lambda x: 0.001 * x.mean(), torch.zeros(n)).double().mean(), 0.0,
               "a slope below `least` counts as none", 0)
    expect("which logits a loss of slope 0.1 teaches, for least = 0.5,",
           still_teaches(lambda x: 0.1 * x.mean(), torch.zeros(2), least=0.5), [0, 0], "`least` is given", 0)


def test_ex07_design_verdict(still_teaches):
    found = still_teaches(lambda x: x.mean(), torch.zeros(2, 3))
    require("still_teaches returns a tensor of bool", getattr(found, "dtype", None) == torch.bool,
            "a comparison, one for each logit")
    logits = torch.zeros(2, requires_grad=True)
    still_teaches(lambda x: x.mean(), logits)
    require("the given logits have no .grad afterwards", logits.grad is None,
            "torch.autograd.grad, or a copy of your own")


# ---------------------------------------------------------------------------------------------------------
# 8. LoRA


def lora(LoRALinear, alpha=6.0, bias=True, trained=True, dtype=torch.float32, size=(7, 5)):
    """A layer of 7 -> 5 with rank 3, and the linear layer it replaces."""
    linear = nn.Linear(*size, bias, dtype=dtype)
    layer = LoRALinear(linear, 3, alpha)
    if trained:
        nn.init.normal_(layer.lora_B.weight)
    return layer, linear


def test_ex08_starts_as_the_layer_it_replaces(LoRALinear):
    layer, linear = lora(LoRALinear, trained=False)
    x = torch.randn(4, 7)
    expect("the output at the start", layer(x), linear(x).detach(), "B = 0", 0)
    require("weight and bias are shared", layer.weight is linear.weight and layer.bias is linear.bias,
            "the same Parameters, no copies")
    layer(x).square().sum().backward()
    require("B has a gradient at the start", bool(layer.lora_B.weight.grad.any()),
            "if A is 0 too, neither will ever move: the gradient of each is a product with the other")


def test_ex08_start_of_A(LoRALinear):
    for rank in (4, 16):
        A = LoRALinear(nn.Linear(2000, 5), rank, 1.0).lora_A.weight.detach()
        expect(f"the shape of A, rank {rank},", list(A.shape), [rank, 2000], "A [rank in]", 0)
        expect(f"the std of A at the start, times rank {rank},", A.std() * rank, 1.0,
               "normal, std 1 / rank: nn.Linear's own start depends on the number of inputs", 0.05, floor=0)
        expect(f"the mean of A at the start, times rank {rank},", A.mean() * rank, 0.0, "normal", 0.05)
        expect("the share of A beyond two std", (A.abs() > 2 / rank).double().mean(), 0.0455, "normal", 0.01)


def test_ex08_attributes(LoRALinear):
    """merge_lora, save_lora and without_lora read them."""
    layer, linear = lora(LoRALinear, alpha=6.0)
    for name, value in (("rank", 3), ("alpha", 6.0), ("active", True), ("in_features", 7),
                        ("out_features", 5)):
        expect(f"the attribute {name}", getattr(layer, name, None), value,
               "nn.Module.__init__ sets none of them: they are yours to set", 0)
    for name, like in (("lora_A", [3, 7]), ("lora_B", [5, 3])):
        pair = getattr(layer, name, None)
        require(f"{name} is an nn.Linear without bias", isinstance(pair, nn.Linear) and pair.bias is None,
                "nn.Linear(..., bias=False)")
        expect(f"the shape of {name}.weight", list(pair.weight.shape), like, "A [rank in], B [out rank]", 0)
        require(f"{name} can train", pair.weight.requires_grad, "these are what trains")
    expect("the names of the parameters", len(dict(layer.named_parameters())), 4,
           "weight, bias, lora_A.weight, lora_B.weight: checkpoints hold no more", 0)


def test_ex08_gradients(LoRALinear):
    """Finite differences of the output's sum, for x, A and B."""
    layer, _ = lora(LoRALinear, dtype=torch.float64)
    layer, x = layer.double(), torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    layer(x).sin().sum().backward()
    for name, tensor in (("x", x), ("A", layer.lora_A.weight), ("B", layer.lora_B.weight)):
        require(f"{name} receives a gradient", tensor.grad is not None, "no no_grad, no detach")
        slopes = torch.zeros_like(tensor)
        for place in range(tensor.numel()):
            up, down = tensor.detach().clone(), tensor.detach().clone()
            up.view(-1)[place] += 1e-4
            down.view(-1)[place] -= 1e-4
            ends = []
            for moved in (up, down):
                if name == "x":
                    ends.append(layer(moved).sin().sum().item())
                    continue
                kept, tensor.data = tensor.data, moved
                ends.append(layer(x.detach()).sin().sum().item())
                tensor.data = kept
            slopes.view(-1)[place] = (ends[0] - ends[1]) / 2e-4
        expect(f"the gradient for {name}", tensor.grad, slopes,
               "the update is a function of x, A and B", 1e-4)


def test_ex08_update(LoRALinear):
    """A slow sum over the ranks."""
    x = torch.randn(2, 4, 7)
    for alpha, bias in ((3.0, True), (6.0, True), (0.75, False)):
        layer, linear = lora(LoRALinear, alpha, bias)
        A, B, expected = layer.lora_A.weight, layer.lora_B.weight, linear(x).double()
        for r in range(3):
            for o in range(5):
                expected[..., o] += alpha / 3 * (x * A[r]).sum(-1) * B[o, r]
        expect(f"the output with rank 3 and alpha = {alpha:g}", layer(x), expected.detach(), "alpha / rank")


def test_ex08_inactive(LoRALinear):
    layer, linear = lora(LoRALinear)
    x, layer.active = torch.randn(4, 7), False
    expect("the output with active = False", layer(x), linear(x).detach(),
           "the teacher is the same network", 0)


def test_ex08_precision(LoRALinear):
    layer, _ = lora(LoRALinear, dtype=torch.bfloat16)
    require("A and B are fp32 on a bf16 layer", layer.lora_A.weight.dtype == layer.lora_B.weight.dtype
            == torch.float32, "what trains is fp32: 1 + 1e-3 is 1 in bf16")
    require("a bf16 layer answers in bf16", layer(torch.randn(4, 7).bfloat16()).dtype == torch.bfloat16,
            "cast A and B to the precision of x")


def test_ex08_merged(merge_lora):
    for alpha, bias, scale in ((3.0, True, 1), (6.0, False, 1), (6.0, True, -1)):
        layer, linear = lora(plug.lora.LoRALinear, alpha, bias)
        x, weight, before = torch.randn(4, 7), linear.weight, linear.weight.detach().clone()
        expected = (linear(x) + scale * (layer(x) - linear(x))).detach()
        given = nn.Sequential(layer, nn.Identity())
        net = merge_lora(given, scale)
        require("merge_lora returns the network", net is given, "return unet")
        require("what is merged is a plain nn.Linear", type(net[0]) is nn.Linear, "no LoRA is left in it")
        expect(f"the merged output, alpha = {alpha:g}, rank 3, scale {scale}", net(x), expected,
               "it computes the same: alpha / rank and bias too")
        expect("the old weight after merging", weight, before, "a new weight, not a change of the old one", 0)
        require("the merged weight has no graph", net[0].weight.is_leaf, "torch.no_grad, nn.Parameter")


def test_ex08_merged_everywhere(merge_lora):
    """Layers inside of layers, and several of them."""
    layers = [lora(plug.lora.LoRALinear, size=(6, 6))[0] for _ in range(3)]
    net = nn.Sequential(nn.Sequential(layers[0], nn.ModuleDict({"to_q": layers[1]})["to_q"]),
                        nn.Sequential(nn.Sequential(layers[2])), nn.Linear(6, 6))
    x = torch.randn(4, 6)
    before = net(x).detach().double()
    merge_lora(net)
    for path, layer in (("0.0", net[0][0]), ("0.1", net[0][1]), ("1.0.0", net[1][0][0])):
        require(f"the layer {path} is a plain nn.Linear", type(layer) is nn.Linear,
                "unet.set_submodule(path, linear) follows the dots in a path")
    expect("the output of the network, merged,", net(x), before, "each layer with its own update")
    expect("the number of layers in it", sum(1 for _ in net.modules()), 8, "replaced, not added", 0)


def test_ex08_merged_precision(merge_lora):
    for alpha in (6.0, 0.01):
        layer, _ = lora(plug.lora.LoRALinear, alpha, dtype=torch.bfloat16, size=(64, 64))
        A, B, W = layer.lora_A.weight.double(), layer.lora_B.weight.double(), layer.weight.double()
        net = merge_lora(nn.Sequential(layer))
        require("a merged bf16 layer is bf16", net[0].weight.dtype == torch.bfloat16,
                "add in fp32, cast once")
        exact = W + alpha / 3 * sum(B[:, r, None] * A[None, r] for r in range(3))
        nearest = (net[0].weight.double() - exact).abs() / exact.abs()
        expect(f"the rounding of the merged weight, alpha = {alpha:g}, in units of bf16's,",
               (nearest * 256).clamp(min=1.0).max(), 1.0, "add in fp32, round once, at the end", 1e-3)


# ---------------------------------------------------------------------------------------------------------
# 9. EMA


def test_ex09_ends(update_ema):
    for decay, expected, what in ((1.0, 5.0, "keeps the average"), (0.0, 1.0, "takes the weights")):
        ema, weights = {"a": torch.full((2, 3), 5.0)}, {"a": torch.ones(2, 3)}
        update_ema(ema, weights, decay)
        expect(f"the average after decay = {decay:g}, which {what},", ema["a"], torch.full((2, 3), expected),
               "decay is how much of the old stays", 1e-6)
        expect("the weights afterwards", weights["a"], torch.ones(2, 3), "only the average changes", 0)


def test_ex09_half_life(update_ema):
    """Weights jump from 0 to 1: after as many steps as it takes decay to halve, the average is half way."""
    decay, ema = 0.5 ** (1 / 16), {"a": torch.zeros(3)}
    for _ in range(16):
        update_ema(ema, {"a": torch.ones(3)}, decay)
    expect("the average after one half-life", ema["a"], [0.5] * 3,
           "what is missing shrinks by decay each step")


def test_ex09_each_element(update_ema):
    """Slowly: one number at a time."""
    ema = {"a": torch.randn(2, 3), "b": torch.randn(4), "c": torch.randn(())}
    weights, before = {n: torch.randn_like(t) for n, t in ema.items()}, {n: t.clone() for n, t in ema.items()}
    kept = {n: t.clone() for n, t in weights.items()}
    update_ema(ema, weights, 0.75)
    for name in ema:
        slow = [3 * old + new for old, new in zip(before[name].flatten().tolist(),
                                                  kept[name].flatten().tolist())]
        expect(f"four times the average named {name}, decay 0.75,", 4 * ema[name].flatten(), slow,
               "element by element, each tensor with its own")
        expect(f"the weights named {name} afterwards", weights[name], kept[name],
               "only the average changes", 0)


def test_ex09_same_memory(update_ema):
    """Checkpoints, CUDA graphs and other names refer to the memory of the average."""
    ema = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in ema.items()}
    for _ in range(2):
        update_ema(ema, {"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(4))}, 0.5)
    for name, (tensor, memory) in before.items():
        require(f"the average named {name} is the same tensor", ema.get(name) is tensor, "mul_, lerp_")
        require(f"the average named {name} has the same memory", tensor.data_ptr() == memory,
                "a new tensor in .data is new memory: mul_, lerp_")
        require(f"the average named {name} is in fp32", tensor.dtype == torch.float32,
                "do not convert the tensors of ema")


def test_ex09_in_place_and_by_name(update_ema):
    ema = {"a": torch.zeros(2), "b": torch.zeros(2)}
    places = dict(ema)
    update_ema(ema, {"b": nn.Parameter(torch.ones(2)), "a": nn.Parameter(torch.full((2,), 4.0))}, 0.5)
    expect("the average named a", places["a"], [2.0, 2.0],
           "by name, and in the tensor that is there: mul_, lerp_")
    expect("the average named b", places["b"], [0.5] * 2,
           "by name, and in the tensor that is there: mul_, lerp_")
    require("the average has no graph", not any(t.requires_grad for t in [*ema.values(), *places.values()]),
            "weights are Parameters: torch.no_grad")
    weights = {"b": nn.Parameter(torch.ones(2)), "a": nn.Parameter(torch.ones(2))}
    update_ema(ema, weights, 0.5)
    require("the weights can still train", all(w.requires_grad for w in weights.values()),
            "they are the student's own Parameters")


def test_ex09_design_lag(decay_for):
    """Slowly: average a weight that grows by 1 in each step. The average lags behind it by the mean age."""
    for steps in (1, 2.5, 20, 100):
        decay, average = float(decay_for(steps)), 0.0
        require(f"the decay for {steps} steps is above 0 and below 1", 0 < decay < 1, "some of the old stays")
        for weight in range(5000):
            average = decay * average + (1 - decay) * weight
        expect(f"the mean age of the weights in the average, {steps} steps asked for,", weight - average,
               steps, "sum the ages 0, 1, 2, .. with the weights that the average gives them", 1e-3, floor=0)


def test_ex09_design_no_steps(decay_for):
    expect("the decay for a mean age of 0", float(decay_for(0)), 0.0, "the average is the newest weights")


# ---------------------------------------------------------------------------------------------------------
# 10. Latents -> tokens -> temporal head


class PatchMeans(nn.Module):
    """Called like DINOv2. A patch's token is its mean colour, CLS that of the frame; depth l times l + 1."""

    config = SimpleNamespace(patch_size=2, image_size=12, hidden_size=3, num_hidden_layers=8)
    dtype = torch.float32

    def forward(self, pixel_values, output_hidden_states=False):
        self.seen = pixel_values
        patches = F.avg_pool2d(pixel_values, 2).flatten(2).transpose(1, 2)                      # n p d
        cls = 10 * pixel_values.mean((2, 3))[:, None] + torch.tensor([100.0, 200, 300])
        return SimpleNamespace(
            hidden_states=[(depth + 1) * torch.cat([cls, patches], dim=1) for depth in range(9)])


def test_ex10_pixels(DinoFeatures):
    features = DinoFeatures(PatchMeans())
    nn.init.zeros_(features.to_rgb.weight)
    for value in (-1.0, 0.0, 1.0):
        nn.init.constant_(features.to_rgb.bias, value)
        features(torch.randn(1, 2, 4, 4, 6))
        expected = [((value + 1) / 2 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
        seen = features.backbone.seen
        expect(f"what the backbone sees of a flat {value:g}", seen.mean((0, 2, 3)), expected,
               "mean and std for values in [-1, 1] follow from those for [0, 1]", 1e-4)
    expect("the size that the backbone sees", list(seen.shape[2:]), features.size_for(4, 6),
           "self.size_for(h, w)", 0)


def test_ex10_each_frame_by_itself(DinoFeatures):
    features, latents = DinoFeatures(PatchMeans()), torch.randn(2, 3, 4, 4, 6)
    maps = features(latents)
    expect("the number of maps", len(maps), len(features.levels), "one per depth in self.levels", 0)
    for n in range(6):
        alone = features(latents[n // 3:n // 3 + 1, n % 3:n % 3 + 1])
        expect(f"map {n} of 2 clips of 3, against frame {n % 3} of clip {n // 3} alone,", maps[0][n],
               alone[0][0].detach(), "the frames of a clip follow each other: (b f)")


def test_ex10_patches(DinoFeatures):
    """Slowly: one patch at a time."""
    features = DinoFeatures(PatchMeans())
    maps, seen = features(torch.randn(1, 2, 4, 4, 6)), features.backbone.seen
    expected = torch.zeros(5, 2, 3, seen.shape[2] // 2, seen.shape[3] // 2)                     # l n d h w
    for map, depth in enumerate((0, 2, 4, 6, 8)):                # the start, and after each quarter of 8
        for n in range(2):
            for i in range(expected.shape[3]):
                for j in range(expected.shape[4]):
                    patch = seen[n, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2].mean((1, 2))
                    cls = 10 * seen[n].mean((1, 2)) + torch.tensor([100.0, 200, 300])
                    expected[map, n, :, i, j] = (depth + 1) * (patch + cls)
        expect(f"map {map}, of depth {depth} (frame, channel, row, column),", maps[map],
               expected[map].detach(),
               "hidden_states by depth; CLS comes first and is added to each patch; rows first", 1e-4)


def test_ex10_gradient_reaches_the_latents(DinoFeatures):
    latents, features = torch.randn(1, 2, 4, 4, 6, requires_grad=True), DinoFeatures(PatchMeans())
    for number, x in enumerate(features(latents)):
        slope, = torch.autograd.grad(x.square().sum(), latents, retain_graph=True, allow_unused=True) \
            if x.requires_grad else [None]
        require(f"latents receive a gradient from map {number}", slope is not None and bool(slope.any()),
                "the G step goes through these features: no no_grad, no detach")
    weight = features.to_rgb.weight
    require("to_rgb receives a gradient", torch.autograd.grad(x.sum(), weight)[0] is not None, "it trains")


def test_ex10_gradient_reaches_the_maps(TemporalHead):
    head, x = TemporalHead(5, 4), torch.randn(2 * 3, 5, 2, 4, requires_grad=True)
    logits = head(x, 3)
    expect("the kernel's size", list(head.conv_res.kernel_size), [1, 7], "given: the axes are 1 f", 0)
    require("logits have a graph", logits.requires_grad, "no no_grad: the heads train")
    logits[0, 0].backward()
    require("the maps receive a gradient", x.grad is not None, "the G step goes through the heads")
    require("a logit of clip 0 does not depend on clip 1", not x.grad[3:].any(), "(b f), not (f b)")


def test_ex10_temporal_head(TemporalHead):
    """Slowly: one place of one clip at a time."""
    for clips, frames in ((2, 3), (1, 6)):
        head, x = TemporalHead(5, 4).eval(), torch.randn(6, 5, 2, 4)
        logits = head(x, num_frames=frames)
        expected = torch.zeros(clips, frames, 2, 4)                                             # b f h w
        for b in range(clips):
            for i in range(2):
                for j in range(4):
                    history = torch.stack([x[frames * b + f, :, i, j] for f in range(frames)], dim=1)   # c f
                    judged = discriminator.Head.forward(head, history[None, :, None])               # 1 1 1 f
                    expected[b, :, i, j] = judged[0, 0, 0].detach()
        expect(f"the logits of {clips} clips of {frames}", logits, expected.flatten(1),
               "(b f) c h w -> (b h w) c f, and back to b (f h w)")


# ---------------------------------------------------------------------------------------------------------
# 11. Backward as a gather


def check_backward(backward):
    """The resize is linear: resizing one input pixel at a time gives its matrix; the transpose is wanted."""
    std = (0.5, 1.0, 4.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Blocks of 32 or of 128 are too small for the last two.
    for n, h, w, H, W in ((2, 2, 3, 4, 6), (3, 3, 2, 7, 9), (1, 5, 6, 4, 3), (1, 1, 4, 3, 4),
                          (1, 4, 4, 9, 12), (1, 1, 140, 5, 300), (1, 1, 3, 70, 5)):
        pixels = torch.eye(h * w).view(h * w, 1, h, w)
        matrix = F.interpolate(pixels, (H, W), mode="bilinear").flatten(1)                      # (h w) (H W)
        grad = torch.randn(n, 3, H, W)
        expected = (grad.flatten(2) @ matrix.T).view(-1, 3, h, w) / torch.tensor(std).view(3, 1, 1)
        grad = grad.to(device).transpose(2, 3).contiguous().transpose(2, 3)                     # strided
        expect(f"grad_x for {h}x{w} -> {H}x{W} (clip, channel, row, column)", backward(grad, (h, w), std),
               expected, "sum over all outputs that looked at it; clamp places beyond the border", 1e-4)


def test_ex11_pytorch(upsample_backward):
    check_backward(upsample_backward)


def test_ex11_triton(upsample_backward_triton):
    pytest.importorskip("triton")
    hint = "the kernel fills the result: tl.store into a tensor that is then returned"
    with launches() as launched:
        check_backward(upsample_backward_triton)
    require("a kernel was launched", bool(launched), hint)
    with launches(spoiled=True):
        result = upsample_backward_triton(torch.randn(1, 3, 4, 6).to(launched[0]), (2, 3), (0.5, 1.0, 4.0))
    require("the result is what the kernel stored, all of it", bool(result.isnan().all()), hint)


GUARD = 4096                                        # elements before and after each tensor of a kernel


@contextmanager
def launches(spoiled=False):
    """Yields a list of the devices on which Triton kernels are launched while the with statement lasts. A
    kernel works on copies of its tensors with guards around them: one that writes there fails, and one that
    reads there reads NaN. spoiled: what the kernel changes becomes NaN."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction
    launched = []

    def guarded(run):
        def launch(kernel, *args, **kwargs):
            __tracebackhide__ = True
            notice, copies = sys.getprofile(), {}
            if notice:                                          # of plug.watching: a launch is a call as well
                notice(SimpleNamespace(f_code=kernel.fn.__code__), "call", None)

            def copy(tensor):
                if not isinstance(tensor, torch.Tensor) or not tensor.numel():
                    return tensor
                size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
                memory = tensor.new_empty(size + 2 * GUARD)
                memory.view(torch.uint8).fill_(255)                     # NaN in each floating-point format
                memory[GUARD:-GUARD] = tensor.detach().as_strided((size,), (1,))
                copies[memory] = tensor
                return memory.as_strided(tensor.shape, tensor.stride(), GUARD)

            kwargs = {key: copy(value) for key, value in kwargs.items()}
            with plug.watching(()):                             # Triton's interpreter is slow when watched
                result = run(kernel, *map(copy, args), **kwargs)
            for memory, tensor in copies.items():
                guards = torch.cat([memory[:GUARD], memory[-GUARD:]]).view(torch.uint8)
                require("all that the kernel stores lies inside its tensors", bool((guards == 255).all()),
                        "a block is wider than a row: tl.store(..., mask)")
                inside = memory[GUARD:-GUARD]
                place = tensor.detach().as_strided(inside.shape, (1,))
                if spoiled and not torch.equal(inside, place):
                    inside.fill_(torch.nan)
                place.copy_(inside)
                launched.append(tensor.device)
            return result
        return launch

    before = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", guarded(kind.run))
        # Fills torch.empty with NaN. Otherwise memory that a kernel does not write may hold an older, right
        # result by chance.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield launched
        finally:
            torch.use_deterministic_algorithms(before)


# ---------------------------------------------------------------------------------------------------------
# 12. Samplers


def generators(b=2):
    return [torch.Generator().manual_seed(i) for i in range(b)]


def large_cond():
    """Enough pixels for statistics: 2 clips of 20,480 numbers, each std known to 1 %."""
    return make_cond(2, 5, 32, 32)._replace(image_embeds=torch.zeros(2, 1, 8))


def test_ex12_one_step(sample):
    net, cond = gaussian_student(), large_cond()
    x0 = sample(net, cond, torch.tensor([700.0, 0.0]), generators())
    expect("evaluations of one-step sampling", len(net.calls), 1, "one level and 0: one jump", 0)
    expect("the level the network is asked at", net.calls[0][1], [700.0] * 2, "sigmas[0]", 1e-4)
    expect("the std of what it sees", net.calls[0][0].std(), 700.0, "noise times sigmas[0]", 0.02, floor=0)
    expect("the std of samples around the condition", (x0 - cond.image_latents).std(), S, "return f", 0.02)


def test_ex12_starts_from_noise_alone(sample):
    net = gaussian_student()
    sample(net, large_cond(), torch.tensor([2.0, 0.0]), generators())
    expect("the std of what the network sees at sigma = 2", net.calls[0][0].std(), 2.0,
           "noise times sigmas[0], nothing else", 0.02, floor=0)


def test_ex12_condition(sample, time_travel):
    """The whole condition reaches the network at every level."""
    cond = make_cond()
    for name, draw in (("sample", lambda net: sample(net, cond, torch.tensor([9.0, 2.0, 0.0]), generators())),
                       ("time_travel", lambda net: time_travel(net, cond, torch.tensor(9.0),
                                                               torch.tensor(2.0), generators()))):
        net = gaussian_student()
        draw(net)
        for i, call in enumerate(net.calls):
            for field, seen, latents in zip(cond._fields, (call[2], net.inputs[i][:, :, 4:], call[3]), cond):
                expect(f"{field} in evaluation {i} of {name}", seen, latents, "cond goes on as it is", 0)


def test_ex12_noise_belongs_to_the_clip(sample):
    cond, grid = make_cond(), torch.tensor([700.0, 14.8, 0.0])
    both = sample(gaussian_student(), cond, grid, generators())
    alone = sample(gaussian_student(), pick(cond, 1), grid, generators()[1:])
    expect("clip 1 of a batch, against the same clip alone,", both[1:], alone,
           "draw_noise with all generators", 1e-4)


def test_ex12_k_steps(sample):
    net, cond, grid = gaussian_student(), large_cond(), torch.tensor([700.0, 70.5, 2.27, 0.0])
    x0 = sample(net, cond, grid, generators())
    expect("evaluations of 3-step sampling", len(net.calls), 3, "one per level, none at 0", 0)
    expect("the levels", torch.stack([call[1][0] for call in net.calls]), grid[:3],
           "from noise to data", 1e-4)
    first = net.calls[0][0] / 700.0
    for i in (1, 2):
        x, sigma = net.calls[i][0], grid[i].double()
        guess = net.mean(*[net.calls[i - 1][0], grid[i - 1].double()], cond.image_latents, 0)
        noise = (x - guess) / sigma
        expect(f"the std of the noise added at level {i}", noise.std(), 1.0, "f + sigmas[i] noise", 0.03)
        expect(f"how much of the noise at level {i} is the first noise again", (noise * first).mean(), 0.0,
               "fresh noise at each level: draw again", 0.03)
    expect("the std of samples around the condition", (x0 - cond.image_latents).std(), S,
           "return the last f", 0.02)


def test_ex12_never_trains(sample, time_travel):
    gain = torch.ones((), requires_grad=True)
    net, far, near = lambda x, *_, **__: gain * x[:, :, :4], torch.tensor(700.0), torch.tensor(14.8)
    for x0 in (sample(net, make_cond(), torch.tensor([700.0, 0.0]), generators()),
               time_travel(net, make_cond(), far, near, generators())):
        require("samples have no graph", not x0.requires_grad, "torch.no_grad")
        require_fp32("samples", x0, "consistency returns fp32: keep it")


def test_ex12_time_travel(time_travel):
    net, cond = gaussian_student(), large_cond()
    x0 = time_travel(net, cond, torch.tensor(700.0), torch.tensor(14.8), generators())
    expect("evaluations of the Time Travel Sampler", len(net.calls), 2,
           "one evaluation at sigma_t, one at sigma_s", 0)
    expect("the levels", torch.stack([call[1][0] for call in net.calls]), [700.0, 14.8],
           "sigma_t first, then sigma_s", 1e-4)
    (x_t, *_), (x_s, *_) = net.calls
    guess = net.mean(x_t, torch.tensor(700.0).double(), cond.image_latents, 0)
    implied, used = (x_t - guess) / 700, (x_s - guess) / 14.8
    share = (used * implied).mean() / implied.square().mean()
    expect("the share of the implied noise in the second evaluation", share, 0.5,
           "half of eps is the noise that the first guess implies", 0.02)
    expect("the std of the rest", (used - implied / 2).std(), 0.5, "the other half is fresh", 0.02)
    expect("the result", x0, net.mean(x_s, torch.tensor(14.8).double(), cond.image_latents, 0),
           "f at the look-ahead level", 1e-3)


def test_ex12_sample_travels(sample):
    net, cond = gaussian_student(), make_cond()
    x0 = sample(net, cond, torch.tensor([700.0, 14.8, 0.0]), generators(), tts=True)
    expect("the levels with tts=True", torch.stack([call[1][0] for call in net.calls]), [700.0, 14.8],
           "the second of three sigmas is where to look ahead", 1e-4)
    expect("the result with tts=True", x0,
           net.mean(net.calls[-1][0], torch.tensor(14.8).double(), mean_of(cond), 0),
           "return what the Time Travel Sampler returns", 1e-3)
    (x_t, *_), (x_s, *_) = net.calls
    guess = net.mean(x_t, torch.tensor(700.0).double(), mean_of(cond), 0)
    implied, used = (x_t - guess) / 700, (x_s - guess) / 14.8
    expect("the share of the implied noise in the second evaluation with tts=True",
           (used * implied).mean() / implied.square().mean(), 0.5,
           "the Time Travel Sampler, not two steps of the other one", 0.2)


def test_ex12_design_variance_and_correlation(mixed_noise):
    """Two noises that are exactly uncorrelated and of unit variance, so that no tolerance is needed."""
    fresh, implied = torch.linalg.qr(torch.randn(4000, 2))[0].T * 4000 ** 0.5
    for keep in (0.0, 0.25, 0.5 ** 0.5, 0.9, 1.0):
        eps = mixed_noise(fresh.clone(), implied.clone(), keep)
        expect(f"the mean square of eps for keep = {keep:.3g}", eps.square().mean(), 1.0,
               "variances of independent variables add", 1e-4)
        expect(f"the correlation of eps with the implied noise for keep = {keep:.3g}",
               (eps * implied).mean(), keep, "keep is that correlation, not a share of the variance", 1e-4)
        require(f"for keep = {keep:.3g}, eps has a positive share of the fresh noise",
                keep == 1 or bool((eps * fresh).mean() > 0), "add the two, do not subtract")


def test_ex12_design_is_linear(mixed_noise):
    """Of noises of any kind: the two factors depend on keep alone."""
    fresh, implied = torch.randn(2, 3, 4, 4, 5) * 3 + 1, torch.rand(2, 3, 4, 4, 5)
    for keep in (0.25, 0.9):
        eps, doubled = mixed_noise(fresh, implied, keep), mixed_noise(2 * fresh, 2 * implied, keep)
        expect(f"eps of two noises twice as large, over two, keep = {keep:g},", doubled / 2,
               eps.detach().double(), "do not divide by the std of the sample: it is known", 1e-4)
        parts = mixed_noise(fresh, 0 * implied, keep) + mixed_noise(0 * fresh, implied, keep)
        expect(f"eps of each noise alone, added, keep = {keep:g},", parts, eps.detach().double(),
               "a sum of the two noises with two factors", 1e-4)


for name, function in list(globals().items()):
    if name.startswith("test_ex"):
        globals()[name] = grader(function)
