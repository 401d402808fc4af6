"""solver.py against closed forms: Gaussian data has an analytic denoiser and an analytic ODE solution.

For x0 ~ N(mu, s^2) and x = x0 + sigma * noise, the mean of x0 given x is
    D(x, sigma) = (s^2 x + sigma^2 mu) / (s^2 + sigma^2)
and the probability-flow ODE dx / d sigma = (x - D) / sigma takes x from sigma_t to sigma_s as
    x_s = mu + (x_t - mu) sqrt((s^2 + sigma_s^2) / (s^2 + sigma_t^2)).
"""
import numpy as np
import pytest
import torch
from conftest import assert_close_relative, relative_error

import model
import solver


class GaussianNet:
    """A stand-in for the UNet whose raw output F makes `consistency` the denoiser of N(mu, s^2). mu is the
    condition latents, so without its condition the data is N(0, s^2). It records its inputs."""

    def __init__(self, s=0.6):
        self.s, self.calls = s, []

    def __call__(self, x, c_noise, image_embeds, time_ids):
        self.calls.append((x, c_noise, image_embeds, time_ids))
        x, mu = x.double().chunk(2, dim=2)
        square = (8 * c_noise.double()).exp().view(-1, 1, 1, 1, 1)              # sigma^2 = exp(8 c_noise)
        x = x * (square + 1).sqrt()                                             # undo c_in
        denoised = (self.s ** 2 * x + square * mu) / (self.s ** 2 + square)
        return ((x / (square + 1) - denoised) * ((square + 1) / square).sqrt()).float()

    def ode(self, x_t, sigma_t, sigma_s, mu):
        return mu + (x_t - mu) * ((self.s ** 2 + sigma_s ** 2) / (self.s ** 2 + sigma_t ** 2)) ** 0.5


def make_cond(b=2, f=3, h=4, w=5):
    time_ids = torch.tensor([[6.0, 127, 0.02]]).repeat(b, 1)
    return model.Cond(torch.randn(b, 1, 8), torch.randn(b, f, 4, h, w), time_ids)


def pick(cond, *clips):
    return model.Cond(*(t[list(clips)] for t in cond))


def svd_scheduler(num_steps, folder):
    from diffusers import EulerDiscreteScheduler
    model.save_configs(folder)
    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(num_steps)
    return scheduler


# ---------------------------------------------------------------------------------------------------------
# Noise levels


@pytest.mark.parametrize("n", [2, 5, 25, 100])
def test_karras_sigmas_follow_the_formula(n):
    lo, hi = 0.002 ** (1 / 7), 700.0 ** (1 / 7)
    expected = [(hi + i / (n - 1) * (lo - hi)) ** 7 for i in range(n)] + [0.0]
    sigmas = solver.karras_sigmas(n)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (n + 1,)
    np.testing.assert_allclose(sigmas.numpy(), np.array(expected), rtol=1e-7)  # fp32 keeps 6e-8
    assert sigmas[0] == 700 and sigmas[-2] == torch.tensor(0.002) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_karras_sigmas_are_those_of_the_diffusers_scheduler(tmp_path):
    for n in range(1, 51):
        assert torch.equal(solver.karras_sigmas(n), svd_scheduler(n, tmp_path).sigmas), n


def test_karras_sigmas_take_any_range_and_curvature():
    assert torch.allclose(solver.karras_sigmas(5, 1, 5, rho=1), torch.tensor([5.0, 4, 3, 2, 1, 0]))
    assert torch.equal(solver.karras_sigmas(1, 0.1, 10), torch.tensor([10.0, 0]))


@pytest.mark.parametrize("n, sigma_min, sigma_max", [(0, 0.002, 700), (5, 0, 700), (5, 2, 1)])
def test_karras_sigmas_refuse_an_impossible_grid(n, sigma_min, sigma_max):
    with pytest.raises(AssertionError, match="no grid"):
        solver.karras_sigmas(n, sigma_min, sigma_max)


def test_strided_levels_are_levels_of_the_fine_grid():
    sigmas = solver.karras_sigmas(100)
    for k in range(1, 101):
        grid = solver.strided(sigmas, k)
        assert grid.shape == (k + 1,) and grid[0] == 700 and grid[-1] == 0
        assert (grid.diff() < 0).all() and torch.isin(grid, sigmas).all()
    assert torch.equal(solver.strided(sigmas, 100), sigmas)
    for k in (0, 101):
        with pytest.raises(AssertionError, match="no .*-step grid"):
            solver.strided(sigmas, k)


def test_strided_levels_for_few_steps():
    """Computed by hand: level i of 100 is (hi + i / 99 (lo - hi))^7; k = 2 and 3 take every 50th and 33rd."""
    sigmas = solver.karras_sigmas(100)
    assert solver.strided(sigmas, 1).tolist() == [700, 0]
    assert solver.strided(sigmas, 2).tolist() == pytest.approx([700, 14.81, 0], abs=5e-3)
    assert solver.strided(sigmas, 3).tolist() == pytest.approx([700, 70.54, 2.269, 0], abs=5e-3)


def test_strided_grids_of_few_steps_interlace():
    """Between two neighbouring levels of the k-step grid lies a level of the (k + 1)-step grid: its
    look-ahead level, with less noise. (From k = 5 on this no longer holds: both grids contain level 80 of
    100.)"""
    sigmas = solver.karras_sigmas(100)
    for k in range(1, 5):
        coarse, fine = solver.strided(sigmas, k), solver.strided(sigmas, k + 1)
        assert (fine[1:-1] < coarse[:-1]).all() and (fine[1:-1] > coarse[1:]).all(), k


# ---------------------------------------------------------------------------------------------------------
# Preconditioning and the consistency function

SIGMAS = torch.cat([solver.karras_sigmas(40), torch.tensor([1.0])])


def test_precondition_is_the_table_of_edm():
    """The columns of Karras et al., Table 1, with sigma_data = 1, computed in fp64."""
    sigma = SIGMAS[SIGMAS > 0].double()
    c_skip, c_out, c_in, c_noise = solver.precondition(sigma)
    for actual, expected in [(c_skip, 1 / (sigma ** 2 + 1)), (c_out, -sigma / (sigma ** 2 + 1) ** 0.5),
                             (c_in, 1 / (1 + sigma ** 2) ** 0.5), (c_noise, sigma.log() / 4)]:
        assert actual.dtype == torch.float32                                    # sigma is fp64
        torch.testing.assert_close(actual.double(), expected, rtol=5e-7, atol=1e-7)
    assert solver.precondition(sigma.bfloat16()).c_skip.dtype == torch.float32


def test_precondition_identities():
    c_skip, c_out, c_in, c_noise = solver.precondition(SIGMAS)
    torch.testing.assert_close(c_in ** 2 * (SIGMAS ** 2 + 1), torch.ones_like(SIGMAS))
    torch.testing.assert_close(c_skip + c_out ** 2, torch.ones_like(SIGMAS))    # unit variance of F's target
    assert c_noise.isfinite().all()


@pytest.mark.parametrize("sigma", [0.002, 1.0, 14.81, 700.0])
def test_network_input_has_unit_variance(sigma):
    net, cond = GaussianNet(), make_cond(1, 10, 100, 100)
    x0, noise = torch.randn(2, 1, 10, 4, 100, 100)
    solver.consistency(net, x0 + sigma * noise, sigma, cond)
    std = net.calls[0][0][:, :, :4].std().item()                                # of 400,000 numbers: +- 0.001
    assert std == pytest.approx(1, abs=0.01)


def test_consistency_at_zero_noise_is_the_identity():
    """The boundary condition f(x, 0) = x holds bitwise for every output of the network."""
    x = torch.randn(2, 3, 4, 4, 5)
    for output in (torch.randn_like(x), torch.full_like(x, 1e30), torch.full_like(x, -1e30)):
        assert torch.equal(solver.consistency(lambda *_: output, x, 0.0, make_cond()), x)


def test_consistency_has_finite_gradients_at_zero_noise():
    x, output = torch.randn(2, 3, 4, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 4, 5, requires_grad=True)
    solver.consistency(lambda *_: output, x, torch.tensor([0.0, 1.0]), make_cond()).sum().backward()
    assert x.grad.isfinite().all() and output.grad.isfinite().all()


def test_consistency_gives_the_network_its_inputs_in_order():
    """(c_in x, condition latents) on the channel axis, ln(sigma) / 4, embedding, time ids."""
    net, cond, x = GaussianNet(), make_cond(), torch.randn(2, 3, 4, 4, 5)
    solver.consistency(net, x, torch.tensor([3.0, 0.5]), cond)
    (inputs, c_noise, image_embeds, time_ids), = net.calls
    torch.testing.assert_close(inputs[:, :, :4] * torch.tensor([10.0, 1.25]).sqrt().view(-1, 1, 1, 1, 1), x)
    assert torch.equal(inputs[:, :, 4:], cond.image_latents)
    torch.testing.assert_close(c_noise, torch.tensor([3.0, 0.5]).log() / 4)
    assert image_embeds is cond.image_embeds and time_ids is cond.time_ids


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 14.81, 700.0])
def test_consistency_of_the_gaussian_network_is_the_analytic_denoiser(sigma):
    net, cond = GaussianNet(), make_cond()
    x = cond.image_latents + (net.s ** 2 + sigma ** 2) ** 0.5 * torch.randn(2, 3, 4, 4, 5)
    expected = (net.s ** 2 * x + sigma ** 2 * cond.image_latents) / (net.s ** 2 + sigma ** 2)
    assert_close_relative(solver.consistency(net, x, sigma, cond), expected, 1e-6)


def test_consistency_and_euler_step_are_those_of_the_diffusers_scheduler(tmp_path):
    """Every step of SVD's 25-step sampler, v-prediction included, from the same x and raw output F."""
    scheduler, cond = svd_scheduler(25, tmp_path), make_cond()
    for i, timestep in enumerate(scheduler.timesteps):
        x, output = torch.randn(2, 3, 4, 4, 5) * scheduler.sigmas[i], torch.randn(2, 3, 4, 4, 5)
        scaled = scheduler.scale_model_input(x, timestep)
        step = scheduler.step(output, timestep, x)

        def net(inputs, c_noise, *_):
            assert_close_relative(inputs[:, :, :4], scaled, 1e-6)
            assert_close_relative(c_noise, timestep.repeat(2), 1e-6)
            return output

        x0_pred = solver.consistency(net, x, scheduler.sigmas[i], cond)
        assert_close_relative(x0_pred, step.pred_original_sample, 1e-6)
        x_s = solver.euler_step(x, x0_pred, scheduler.sigmas[i], scheduler.sigmas[i + 1])
        assert_close_relative(x_s, step.prev_sample, 1e-6)


@pytest.mark.parametrize("sigma", [3, 3.0, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([3.0, 3.0]),
                                   torch.tensor([3.0, 3.0], dtype=torch.float64)])
def test_sigma_may_be_a_number_or_one_value_per_clip(sigma):
    net, cond, x = GaussianNet(), make_cond(), torch.randn(2, 3, 4, 4, 5)
    expected = solver.consistency(net, x, torch.full((2,), 3.0), cond)
    assert torch.equal(solver.consistency(net, x, sigma, cond), expected)
    assert torch.equal(solver.euler_step(x, expected, sigma, 1), solver.euler_step(x, expected, 3.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_for_half_precision_latents(dtype):
    """700^2 overflows fp16, and bf16 cannot represent 701. Half-precision latents must give the same result
    as the same numbers in fp32, and a surrounding autocast must change nothing."""
    net, cond = GaussianNet(), make_cond()
    x = (700 * torch.randn(2, 3, 4, 4, 5)).to(dtype)
    sigmas = torch.tensor([700.0, 14.81, 0.5])
    with torch.autocast("cpu", torch.bfloat16):
        actual = solver.solve(net, x, sigmas, cond, guidance=2.0)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, solver.solve(net, x.float(), sigmas, cond, guidance=2.0))


# ---------------------------------------------------------------------------------------------------------
# Guidance


def test_guidance_one_is_conditional_and_zero_unconditional():
    net, cond, x = GaussianNet(), make_cond(), torch.randn(2, 3, 4, 4, 5)
    conditional = solver.consistency(net, x, 2.0, cond)
    unconditional = solver.consistency(net, x, 2.0, model.unconditional(cond))
    assert relative_error(unconditional, conditional) > 0.1                     # the condition has an effect
    assert_close_relative(solver.guided(net, x, 2.0, cond, 1.0), conditional, 1e-6)
    assert_close_relative(solver.guided(net, x, 2.0, cond, 0.0), unconditional, 1e-6)
    expected = unconditional + 3 * (conditional - unconditional)
    for w in (3, 3.0, torch.tensor(3.0), torch.full((1, 3, 1, 1, 1), 3.0)):
        assert_close_relative(solver.guided(net, x, 2.0, cond, w), expected, 1e-6)


def test_guidance_may_differ_between_frames_and_clips():
    net, cond, x = GaussianNet(), make_cond(), torch.randn(2, 3, 4, 4, 5)
    w = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.5, 7.0]]).view(2, 3, 1, 1, 1)
    actual = solver.guided(net, x, 2.0, cond, w)
    for clip in range(2):
        for frame in range(3):
            alone = solver.guided(net, x, 2.0, cond, w[clip, frame].item())
            assert torch.equal(actual[clip, frame], alone[clip, frame])


def test_guidance_drops_the_image_and_keeps_the_time_ids():
    """The unconditional half of the doubled batch has zero embedding, zero latents and the same ids."""
    net, cond, x = GaussianNet(), make_cond(), torch.randn(2, 3, 4, 4, 5)
    solver.guided(net, x, torch.tensor([2.0, 3.0]), cond, 2.0)
    (inputs, c_noise, image_embeds, time_ids), = net.calls
    assert not image_embeds[:2].any() and torch.equal(image_embeds[2:], cond.image_embeds)
    assert not inputs[:2, :, 4:].any() and torch.equal(inputs[2:, :, 4:], cond.image_latents)
    assert torch.equal(inputs[:2, :, :4], inputs[2:, :, :4])
    assert torch.equal(time_ids, cond.time_ids.repeat(2, 1)) and torch.equal(c_noise, c_noise[:2].repeat(2))


def test_no_guidance_costs_one_pass():
    net, cond, x = GaussianNet(), make_cond(), torch.randn(2, 3, 4, 4, 5)
    assert torch.equal(solver.guided(net, x, 2.0, cond), solver.consistency(net, x, 2.0, cond))
    assert all(len(inputs) == 2 for inputs, *_ in net.calls)


# ---------------------------------------------------------------------------------------------------------
# The ODE


def solve_error(net, num_steps, cond, x):
    """Relative error of the Euler solution from sigma = 10 to 0.1 against the analytic one."""
    sigmas = solver.karras_sigmas(num_steps + 1, 0.1, 10.0)[:-1]
    return relative_error(solver.solve(net, x, sigmas, cond), net.ode(x, 10.0, 0.1, cond.image_latents))


def test_euler_converges_to_the_analytic_solution_with_order_one():
    """Doubling the number of steps halves the error."""
    net, cond = GaussianNet(), make_cond()
    x = cond.image_latents + 10 * torch.randn(2, 3, 4, 4, 5)
    errors = np.array([solve_error(net, n, cond, x) for n in (32, 64, 128, 256)])
    orders = np.log2(errors[:-1] / errors[1:])
    assert ((0.93 < orders) & (orders < 1.07)).all(), orders
    assert errors[-1] < 0.01


def test_twenty_five_steps_from_pure_noise_reach_the_data():
    """On SVD's grid, with its last step to sigma = 0, samples have the mean and almost the spread of the
    data."""
    net, cond = GaussianNet(), make_cond(4, 8, 16, 16)
    x_T = 700 * torch.randn_like(cond.image_latents)
    residual = solver.solve(net, x_T, solver.karras_sigmas(25), cond) - cond.image_latents
    exact = net.ode(x_T, 700.0, 0.0, cond.image_latents) - cond.image_latents
    assert residual.mean().item() == pytest.approx(0, abs=0.02)
    assert 0.8 < (residual.std() / exact.std()).item() < 1                      # coarse steps lose variance


@pytest.mark.parametrize("sigma_t, sigma_s", [(700.0, 0.0), (700.0, 14.81), (14.81, 0.002), (0.002, 0.0)])
def test_one_step_is_exact_for_a_point_mass(sigma_t, sigma_s):
    """For data that is a single point, the ODE's paths are straight lines, which Euler steps follow
    exactly."""
    net, cond = GaussianNet(s=0.0), make_cond()
    x = cond.image_latents + sigma_t * torch.randn(2, 3, 4, 4, 5)
    actual = solver.solve(net, x, torch.tensor([sigma_t, sigma_s]), cond)
    expected = net.ode(x, sigma_t, sigma_s, cond.image_latents)
    # |x| is at most about 4 sigma_t. Each of a dozen fp32 operations has a relative error of 6e-8.
    assert (actual - expected).abs().max() <= 12 * 6e-8 * 4 * max(sigma_t, 1)


def test_steps_compose():
    net, cond, x = GaussianNet(), make_cond(), 10 * torch.randn(2, 3, 4, 4, 5)
    sigmas = torch.tensor([10.0, 4.0, 1.0, 0.0])
    x_s = x
    for i in range(3):
        x_s = solver.solve(net, x_s, sigmas[i:i + 2], cond, 2.0)
    assert torch.equal(solver.solve(net, x, sigmas, cond, 2.0), x_s)


def test_each_clip_may_have_its_own_grid():
    """sigmas [m + 1, b]: a shorter grid is padded with zeros, and steps from 0 change nothing."""
    net, cond, x = GaussianNet(), make_cond(3), 10 * torch.randn(3, 3, 4, 4, 5)
    grids = torch.tensor([[10.0, 4.0, 1.0, 0.5], [3.0, 0.2, 0.0, 0.0], [0.002, 0.0, 0.0, 0.0]])
    actual = solver.solve(net, x, grids.T, cond, 2.0)
    assert actual.isfinite().all()
    for i, grid in enumerate(grids):
        grid = torch.cat([grid[grid > 0], grid[grid == 0][:1]])                 # without the padding
        assert torch.equal(actual[i:i + 1], solver.solve(net, x[i:i + 1], grid, pick(cond, i), 2.0))


def test_clips_do_not_influence_each_other():
    net, cond, x = GaussianNet(), make_cond(3), 10 * torch.randn(3, 3, 4, 4, 5)
    w = torch.rand(3, 3, 1, 1, 1)
    together = solver.solve(net, x, torch.tensor([10.0, 1.0, 0.0]), cond, w)
    for i in range(3):
        alone = solver.solve(net, x[i:i + 1], torch.tensor([10.0, 1.0, 0.0]), pick(cond, i), w[i:i + 1])
        assert torch.equal(together[i:i + 1], alone)


def test_solve_leaves_its_input_alone_and_records_no_gradient():
    net, cond = GaussianNet(), make_cond()
    x = torch.randn(2, 3, 4, 4, 5, requires_grad=True)
    before, modes = x.detach().clone(), []

    def teacher(*args):
        modes.append(torch.is_grad_enabled())
        return net(*args)

    assert not solver.solve(teacher, x, torch.tensor([2.0, 1.0]), cond).requires_grad
    assert modes == [False] and torch.equal(x, before)


def test_solve_reports_progress_once_per_step():
    net, cond, x = GaussianNet(), make_cond(), torch.randn(2, 3, 4, 4, 5)
    seen = []

    def progress(steps):
        for step in steps:
            seen.append((step, len(net.calls)))
            yield step

    solver.solve(net, x, torch.tensor([3.0, 2.0, 1.0]), cond, progress=progress)
    assert seen == [(0, 0), (1, 1)] and len(net.calls) == 2
