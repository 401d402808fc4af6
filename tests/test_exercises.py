"""Grades the twelve exercises. By default it grades the repository's own functions, so the graders are tested
with everything else; a folder of answers is graded with

    $ OSV_IMPL=exercises python -m pytest tests/test_exercises.py -k ex01

No expected value here is computed with the formula that an exercise asks for: they are properties, slow
loops, data so simple that the answer is known (a single point; a Gaussian), or finite differences.
"""
import math
import os
import sys
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
GRADED = plug.library() if FOLDER == "repo" else plug.answers(plug.ROOT / FOLDER)

for name in GRADED:                                 # a fixture per answer: a grader names what it grades
    globals()[name] = pytest.fixture(lambda name=name: GRADED[name], name=name)


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


# ---------------------------------------------------------------------------------------------------------
# Worlds in which the answer is known


class KnownNet:
    """Called like the UNet. `mean(x, sigma, mu, embeds)` says what the clean latent is, and the raw output is
    the v that says so. Remembers its calls as (x, sigma, embeds, ids), x with the scaling undone."""

    def __init__(self, mean):
        self.mean, self.calls, self.inputs = mean, [], []

    def __call__(self, inputs, c_noise, image_embeds, time_ids):
        __tracebackhide__ = True
        b = len(inputs)
        if list(c_noise.shape) != [b]:
            fail("c_noise", f"shape {list(c_noise.shape)}, should be {[b]}", "one number per clip")
        if not b == len(image_embeds) == len(time_ids):
            fail("the batch", f"{b} latents and {len(image_embeds)} conditions", "as many as clips")
        self.inputs.append(inputs)
        sigma = (4 * c_noise.double()).exp().view(-1, 1, 1, 1, 1)
        x, mu = inputs.double().chunk(2, dim=2)
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
    return Cond(draw(b, 1, 8) + 0.5, draw(b, f, 4, h, w), torch.tensor([[6.0, 127, 0.02]]).repeat(b, 1))


def pick(cond, i):
    return Cond(*(t[i:i + 1] for t in cond))


def column(values):
    return torch.tensor(values).view(-1, 1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------
# 1. Karras grid


def test_ex01_ends(karras_sigmas):
    for n, low, high in ((100, SIGMA_MIN, SIGMA_MAX), (25, SIGMA_MIN, SIGMA_MAX), (5, 0.5, 80.0)):
        sigmas = karras_sigmas(n, low, high)
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


# ---------------------------------------------------------------------------------------------------------
# 3. Consistency function


def test_ex03_boundary(consistency):
    x, cond = torch.randn(2, 3, 4, 4, 5), make_cond()
    for raw in (torch.randn_like(x), torch.full_like(x, 1e30)):
        expect("f(x, 0), which is x,", consistency(lambda *_: raw, x, 0.0, cond), x,
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
    require("f is fp32", actual.dtype == torch.float32, "arithmetic with sigma is fp32")


def test_ex03_gradient_reaches_the_network(consistency):
    gain = torch.ones((), requires_grad=True)
    net = lambda x, *_: gain * x[:, :, :4]
    consistency(net, torch.randn(2, 3, 4, 4, 5), 2.0, make_cond()).sum().backward()
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
    cond, x = make_cond(), torch.randn(2, 3, 4, 4, 5)
    grid = torch.tensor([[9.0, 4.0, 1.0, 0.5], [0.3, 0.1, 0.0, 0.0]]).T                         # m + 1, b
    together = solve(gaussian_teacher(), x, grid, cond)
    for i, m in ((0, 4), (1, 3)):
        alone = solve(gaussian_teacher(), x[i:i + 1], grid[:m, i], pick(cond, i))
        expect(f"clip {i} of a batch with two grids", together[i:i + 1], alone,
               "solver.per_clip and euler_step take [b]; what does a step from 0 to 0 divide by?", 1e-4)


def test_ex05_guides_and_never_trains(solve):
    cond, x, grid = make_cond(), torch.randn(2, 3, 4, 4, 5).requires_grad_(), torch.tensor([5.0, 1.0])
    net = gaussian_teacher()
    x_s = solve(net, x, grid, cond, 2.0)
    require("the teacher's result has no graph", not x_s.requires_grad, "torch.no_grad")
    expect("evaluations of one guided step of two clips", sum(len(call[0]) for call in net.calls), 4,
           "hand guidance on", 0)


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


def test_ex06_precision(pseudo_huber):
    x = torch.full((1, 4), 256.0).bfloat16()
    loss = pseudo_huber(x, torch.ones(1, 4).bfloat16(), 0.0)
    require("d of bf16 is an fp32 scalar", loss.dtype == torch.float32 and loss.shape == (), "float() first")
    expect("d between 256 and 1 in bf16", loss, 255.0, "255 squared is not a bf16 number: float() first")


def test_ex06_lambda(consistency_weight):
    t, s = torch.tensor([700.0, 5.0, 0.01]), torch.tensor([517.0, 3.0, 0.0])
    expect("lambda with exponent 0", consistency_weight(t, s, 0.0), [1.0] * 3, "a power")
    expect("lambda^10 (sigma_t - sigma_s)", consistency_weight(t, s).pow(10) * (t - s), [1.0] * 3,
           "one over the gap, to the power", 1e-4)
    expect("lambda with exponent 1, times the gap", consistency_weight(t, s, 1.0) * (t - s), [1.0] * 3,
           "one over the gap", 1e-4)


# ---------------------------------------------------------------------------------------------------------
# 7. Hinge


def test_ex07_discriminator(hinge_d):
    nothing = torch.zeros(4)
    expect("hinge_d of a discriminator that always says 0", hinge_d(nothing, nothing), 2.0,
           "one from each side")
    expect("hinge_d of a perfect one", hinge_d(nothing + 5, nothing - 1), 0.0, "real is positive")
    expect("hinge_d of one that has it backwards", hinge_d(nothing - 5, nothing + 5), 12.0,
           "real is positive")
    mixed = hinge_d(torch.tensor([0.0, 9.0]), torch.tensor([-9.0, -9.0, -9.0, 1.0]))
    expect("hinge_d of 2 reals, one of them unsure, and 4 fakes, one of them taken for real,", mixed, 1.0,
           "each side has a mean of its own; what is right by more than 1 counts 0")


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
    expect("hinge_g(linear=True)", hinge_g(fake, linear=True), -1.0, "minus the mean, no margin")


def test_ex07_precision(hinge_d, hinge_g):
    large = torch.tensor([-256.0]).bfloat16()
    for name, loss in (("hinge_d", hinge_d(large, torch.tensor([-1.0]))), ("hinge_g", hinge_g(large))):
        require(f"{name} of bf16 is an fp32 scalar", loss.dtype == torch.float32 and loss.shape == (),
                "float()")
        expect(f"{name} of -256 in bf16", loss, 257.0, "256 + 1 is not a bf16 number: float() first")


# ---------------------------------------------------------------------------------------------------------
# 8. LoRA


def lora(LoRALinear, alpha=6.0, bias=True, trained=True, dtype=torch.float32):
    """A layer of 7 -> 5 with rank 3, and the linear layer it replaces."""
    linear = nn.Linear(7, 5, bias, dtype=dtype)
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
        net = merge_lora(nn.Sequential(layer, nn.Identity()), scale)
        require("what is merged is a plain nn.Linear", type(net[0]) is nn.Linear, "no LoRA is left in it")
        expect(f"the merged output, alpha = {alpha:g}, rank 3, scale {scale}", net(x), expected,
               "it computes the same: alpha / rank and bias too")
        expect("the old weight after merging", weight, before, "a new weight, not a change of the old one", 0)
        require("the merged weight has no graph", net[0].weight.is_leaf, "torch.no_grad, nn.Parameter")


def test_ex08_merged_precision(merge_lora):
    layer, _ = lora(plug.lora.LoRALinear, dtype=torch.bfloat16)
    net = merge_lora(nn.Sequential(layer))
    require("a merged bf16 layer is bf16", net[0].weight.dtype == torch.bfloat16, "add in fp32, cast once")


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


# ---------------------------------------------------------------------------------------------------------
# 10. Latents -> tokens -> temporal head


class PatchMeans(nn.Module):
    """Called like DINOv2. A patch's token is its mean colour, CLS that of the frame; depth l times l + 1."""

    config = SimpleNamespace(patch_size=2, image_size=12, hidden_size=3, num_hidden_layers=4)
    dtype = torch.float32

    def forward(self, pixel_values, output_hidden_states=False):
        self.seen = pixel_values
        patches = F.avg_pool2d(pixel_values, 2).flatten(2).transpose(1, 2)                      # n p d
        cls = 10 * pixel_values.mean((2, 3))[:, None] + torch.tensor([100.0, 200, 300])
        return SimpleNamespace(
            hidden_states=[(depth + 1) * torch.cat([cls, patches], dim=1) for depth in range(5)])


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
    for depth in range(5):
        for n in range(2):
            for i in range(expected.shape[3]):
                for j in range(expected.shape[4]):
                    patch = seen[n, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2].mean((1, 2))
                    cls = 10 * seen[n].mean((1, 2)) + torch.tensor([100.0, 200, 300])
                    expected[depth, n, :, i, j] = (depth + 1) * (patch + cls)
        expect(f"the map of depth {depth} (frame, channel, row, column)", maps[depth],
               expected[depth].detach(),
               "CLS comes first; the patches after it go row by row", 1e-4)


def test_ex10_gradient_reaches_the_latents(DinoFeatures):
    latents = torch.randn(1, 2, 4, 4, 6, requires_grad=True)
    sum(x.square().sum() for x in DinoFeatures(PatchMeans())(latents)).backward()
    require("latents receive a gradient", latents.grad is not None, "the G step goes through these features")


def test_ex10_temporal_head(TemporalHead):
    """Slowly: one place of one clip at a time."""
    head, x = TemporalHead(5, 4).eval(), torch.randn(2 * 3, 5, 2, 4)
    logits = head(x, num_frames=3)
    expected = torch.zeros(2, 3, 2, 4)                                                          # b f h w
    for b in range(2):
        for i in range(2):
            for j in range(4):
                history = torch.stack([x[3 * b + f, :, i, j] for f in range(3)], dim=1)         # c f
                judged = discriminator.Head.forward(head, history[None, :, None])                   # 1 1 1 f
                expected[b, :, i, j] = judged[0, 0, 0].detach()
    expect("the logits of 2 clips", logits, expected.flatten(1),
           "(b f) c h w -> (b h w) c f, and back to b (f h w)")


# ---------------------------------------------------------------------------------------------------------
# 11. Backward as a gather


def check_backward(backward):
    """The resize is linear: resizing one input pixel at a time gives its matrix; the transpose is wanted."""
    std = (0.5, 1.0, 4.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for h, w, H, W in ((2, 3, 4, 6), (3, 2, 7, 9), (5, 6, 4, 3), (1, 4, 3, 4), (4, 4, 14, 28)):
        pixels = torch.eye(h * w).view(h * w, 1, h, w)
        matrix = F.interpolate(pixels, (H, W), mode="bilinear").flatten(1)                      # (h w) (H W)
        grad = torch.randn(2, 3, H, W)
        expected = (grad.flatten(2) @ matrix.T).view(2, 3, h, w) / torch.tensor(std).view(3, 1, 1)
        grad = grad.to(device).transpose(2, 3).contiguous().transpose(2, 3)                     # strided
        expect(f"grad_x for {h}x{w} -> {H}x{W} (clip, channel, row, column)", backward(grad, (h, w), std),
               expected, "sum over all outputs that looked at it; clamp places beyond the border", 1e-4)


def test_ex11_pytorch(upsample_backward):
    check_backward(upsample_backward)


def test_ex11_triton(upsample_backward_triton):
    pytest.importorskip("triton")
    check_backward(upsample_backward_triton)


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


def test_ex12_never_trains(sample):
    gain = torch.ones((), requires_grad=True)
    x0 = sample(lambda x, *_: gain * x[:, :, :4], make_cond(), torch.tensor([700.0, 0.0]), generators())
    require("samples have no graph", not x0.requires_grad, "torch.no_grad")


def test_ex12_time_travel(time_travel):
    net, cond = gaussian_student(), large_cond()
    x0 = time_travel(net, cond, torch.tensor(700.0), torch.tensor(14.8), generators())
    expect("evaluations of the Time Travel Sampler", len(net.calls), 2, "two looks", 0)
    expect("the levels", torch.stack([call[1][0] for call in net.calls]), [700.0, 14.8],
           "far, then near", 1e-4)
    (x_t, *_), (x_s, *_) = net.calls
    guess = net.mean(x_t, torch.tensor(700.0).double(), cond.image_latents, 0)
    implied, used = (x_t - guess) / 700, (x_s - guess) / 14.8
    share = (used * implied).mean() / implied.square().mean()
    expect("the share of the implied noise in the second look", share, 0.5,
           "half of eps is the noise that the first guess implies", 0.02)
    expect("the std of the rest", (used - implied / 2).std(), 0.5, "the other half is fresh", 0.02)
    expect("the result", x0, net.mean(x_s, torch.tensor(14.8).double(), cond.image_latents, 0),
           "f at the look-ahead level", 1e-3)


def test_ex12_sample_travels(sample):
    net = gaussian_student()
    sample(net, make_cond(), torch.tensor([700.0, 14.8, 0.0]), generators(), tts=True)
    expect("the levels with tts=True", torch.stack([call[1][0] for call in net.calls]), [700.0, 14.8],
           "the second of three sigmas is where to look ahead", 1e-4)
