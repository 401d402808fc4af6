"""losses.py against closed forms."""
import pytest
import torch

from losses import consistency_weight, hinge_d, hinge_g, pseudo_huber
from solver import NUM_SIGMAS, karras_sigmas


def test_hinge_d_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    assert hinge_d(real, fake).item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1) / 2)
    assert hinge_d(torch.zeros(5), torch.zeros(7)).item() == 2
    assert hinge_d(torch.ones(5), -torch.ones(7)).item() == 0


def test_hinge_d_pushes_real_up_and_fake_down_within_the_margin_only():
    real, fake = torch.tensor([0.0, 1.5], requires_grad=True), torch.tensor([0.0, -1.5], requires_grad=True)
    hinge_d(real, fake).backward()
    assert real.grad.tolist() == [-0.5, 0] and fake.grad.tolist() == [0.5, 0]


def test_hinge_g_by_hand():
    fake = torch.tensor([-1.0, 0.0, 3.0], requires_grad=True)
    assert hinge_g(fake).item() == pytest.approx((2 + 1 + 0) / 3)
    hinge_g(fake).backward()
    torch.testing.assert_close(fake.grad, torch.tensor([-1 / 3, -1 / 3, 0]))
    assert hinge_g(fake, linear=True).item() == pytest.approx(-2 / 3)


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    zero = torch.zeros(1, 1)
    assert pseudo_huber(zero, zero, 0.001).item() == 0
    for distance in (1e-5, 1e-4, 0.3, 20.0):
        expected = (distance ** 2 + 1e-6) ** 0.5 - 1e-3
        loss = pseudo_huber(zero + distance, zero, 0.001)
        # sqrt(1e-6 + d^2) - 1e-3 cancels: numbers near 1e-3 have rounding errors of 6e-11 in fp32.
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1.2e-10)
    x = torch.tensor([[3.0], [1e-5]], requires_grad=True)
    pseudo_huber(x, torch.zeros(2, 1), 0.001).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.5], [0.5 * 1e-2]]), rtol=1e-3, atol=0)


def test_pseudo_huber_gradient_is_analytic():
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    pseudo_huber(x, y, 0.1).backward()
    d = (x - y).detach()
    torch.testing.assert_close(x.grad, d / (d.square() + 0.01).sqrt() / 12)


def test_pseudo_huber_weighs_clips():
    x, weight = torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 3, 5), torch.tensor([10.0, 1.0])
    assert pseudo_huber(x, torch.zeros(2, 3, 5), 0.0, weight).item() == pytest.approx((10 * 1 + 1 * 2) / 2)


def test_losses_are_fp32_scalars_in_any_precision():
    half = torch.randn(4, 6).bfloat16()
    for loss in (hinge_d(half, half), hinge_g(half), hinge_g(half, True), pseudo_huber(half, -half, 0.001)):
        assert loss.dtype == torch.float32 and loss.shape == ()
    # 256 + 1 is 256 in bf16, so the arithmetic must be fp32.
    assert hinge_d(torch.tensor([-256.0]).bfloat16(), torch.tensor([-1.0])).item() == 257


def test_consistency_weight_keeps_the_high_noise_levels():
    """Steps of m = 5 on the grid of 100: exponent 1 gives the highest level less than 1/1000 of the lowest
    one's weight, 0.1 a third."""
    sigmas = karras_sigmas(NUM_SIGMAS)
    sigma_t, sigma_s = sigmas[[0, 94]], sigmas[[5, 99]]
    one, tenth = consistency_weight(sigma_t, sigma_s, 1.0), consistency_weight(sigma_t, sigma_s)
    torch.testing.assert_close(one, 1 / (sigma_t - sigma_s))
    assert one[0] / one[1] < 1e-3 and 0.3 < tenth[0] / tenth[1] < 0.5
    assert consistency_weight(sigma_t, sigma_s, 0.0).tolist() == [1, 1]
