"""support/fused.py: each kernel against PyTorch in fp64. support/kernels.py: fast networks equal plain ones.

Without a GPU, Triton's interpreter runs the kernels. It takes milliseconds for each program, so tensors are
small. Most tests of whole networks replace the kernels by the PyTorch expressions that the kernels are held
to, see `as_on_a_gpu`. With a GPU, all tests run the compiled kernels.
"""
import copy
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_relative, randomize, relative_error, unet_config, vae_config
from diffusers import AutoencoderKLTemporalDecoder as DiffusersVAE
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from einops import rearrange
from test_model import diffusers_unet, same_weights, unet_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora
import model
from support import fused, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS_LAST = {"memory_format": torch.channels_last}
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")       # exp = inf, 1 / inf = 0
needs_triton = pytest.mark.skipif(fused.triton is None, reason="there is no Triton for this platform")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
half_precision = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
# A group has a program of its own, so Triton's interpreter gets few groups. `few_groups` makes tiles narrower
# by the same factor: all other programs and loops are those of 32 groups.
GROUPS = 32 if DEVICE == "cuda" else 4
# n c h w of frames, and of clips (b c f s), where L is long and n small; odd sizes, one row, one table.
SHAPES = [(n, GROUPS * size, h, w) for n, size, h, w in (
    (2, 1, 4, 5), (1, 3, 5, 33), (1, 10, 3, 4), (2, 10, 1, 1), (1, 2, 2, 70), (3, 1, 1, 1))]
FEWER = [(n, GROUPS * size, h, w) for n, size, h, w in (                            # the same edge cases
    (2, 1, 4, 5), (1, 3, 2, 9), (1, 10, 1, 3), (3, 1, 1, 1))]

# ---------------------------------------------------------------------------------------------------------
# What the kernels are compared with: PyTorch expressions, computed in fp64


def exact_group_norm(x, weight, bias, groups, eps, silu, shift=None):
    x = x.double() if shift is None else x.double() + shift.double()[:, :, None, None]
    y = F.group_norm(x, groups, weight.double(), bias.double(), eps)
    return F.silu(y) if silu else y


def exact_layer_norm(x, weight, bias, eps):
    return F.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), eps)


def exact_residual(x, y, bias=None, scale=None):
    y = y.double() if bias is None else y.double() + bias.double()[..., None, None]
    y = y if scale is None else scale.double() * y
    return y if x is None else x.double() + y


def exact_geglu(x):
    x, gate = x.double().chunk(2, dim=-1)
    return x * F.gelu(gate)


def exact_frame_attention(q, k, v, num_heads):
    b = len(q)
    q, k, v = (rearrange(x.double(), "b f s (a c) -> (b s) a f c", a=num_heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "(b s) a f c -> b f s (a c)", b=b)


# Rounding. To bf16 Triton's interpreter truncates, which is up to twice as far from the exact number.
EPS = {torch.float16: 2 ** -11, torch.bfloat16: 2 ** (-8 if DEVICE == "cuda" or fused.triton is None else -7)}


def kernels_take_cpu_tensors(x, channels_last=False):
    """fused.has_kernels, except that the device does not matter."""
    return x.dtype != torch.float64 and (not channels_last or x.is_contiguous(**CHANNELS_LAST))


@pytest.fixture(params=[False, True], ids=["few chunks", "many"])
def tiles(request, monkeypatch):
    """Small tensors, and tiles of four rows: kernels then loop as often as they do in a network."""
    if request.param:
        for name, value in {"TILE": 128, "BLOCK": 32, "PROGRAMS": 6}.items():
            monkeypatch.setattr(fused, name, value)


@pytest.fixture
def few_groups(request, monkeypatch):
    """Narrows the tiles, those of the fixture `tiles` too, as GROUPS narrows the tensors."""
    if "tiles" in request.fixturenames:
        request.getfixturevalue("tiles")
    for name in ("TILE", "BLOCK"):
        monkeypatch.setattr(fused, name, getattr(fused, name) * GROUPS // 32)


# ---------------------------------------------------------------------------------------------------------
# GroupNorm


def inputs(shape, dtype=torch.float32, mean=0.0, std=1.0):
    """x, channels-last, and weight and bias. All of them require gradients."""
    x = torch.randn(shape, device=DEVICE) * std + mean
    x = x.to(dtype).contiguous(**CHANNELS_LAST)
    weight, bias = (torch.randn(shape[1], device=DEVICE).to(dtype) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (x, weight, bias)]


def group_norm(x, weight, bias, silu=True, eps=1e-6, shift=None):
    """The kernels."""
    return fused.GroupNorm.apply(x, weight, bias, GROUPS, eps, silu, shift)


def expected(x, weight, bias, silu=True, eps=1e-6, shift=None):
    return exact_group_norm(x, weight, bias, GROUPS, eps, silu, shift)


@needs_triton
@pytest.mark.usefixtures("few_groups")
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm_kernels_compute_group_norm_and_silu(shape, tiles):
    """Values and all gradients agree with fp64, up to fp32 rounding. A group of a single number has variance
    0, and the gradient of x is 0."""
    silu = shape[1] != 10 * GROUPS
    x, weight, bias = inputs(shape)
    y, reference = group_norm(x, weight, bias, silu), expected(x, weight, bias, silu)
    assert y.is_contiguous(**CHANNELS_LAST)
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weight, bias), grad)
    theirs = torch.autograd.grad(reference, (x, weight, bias), grad.double())
    single = shape[1] * shape[2] * shape[3] == GROUPS                                  # then 1 / std is 1000
    for a, b, atol in zip(ours, theirs, (1e-3 if single else 1e-5, 1e-5, 1e-5)):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=atol)


@needs_triton
@pytest.mark.usefixtures("few_groups")
@pytest.mark.parametrize("shape, factor, tolerance", [
    *((shape, 1.0, 1e-5) for shape in FEWER[:3]), (FEWER[0], 300.0, 3e-4)])
def test_group_norm_kernels_add_a_shift(shape, factor, tolerance, tiles):
    """The norm of x + shift and the gradients of both, also for a shift much larger than x."""
    x, weight, bias = inputs(shape)
    shift = (factor * torch.randn(shape[:2], device=DEVICE)).requires_grad_()
    y, reference = (norm(x, weight, bias, eps=0.1, shift=shift) for norm in (group_norm, expected))
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance)
    grad, wanted = torch.randn_like(y), (x, weight, bias, shift)
    ours = torch.autograd.grad(y, wanted, grad)
    theirs = torch.autograd.grad(reference, wanted, grad.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


@needs_triton
@pytest.mark.usefixtures("few_groups")
def test_group_norm_kernels_add_one_shift_to_all_frames(tiles):
    """An expanded tensor, which requires no gradient."""
    (x, weight, bias), shift = inputs(FEWER[0]), torch.randn(1, FEWER[0][1], device=DEVICE)
    y = group_norm(x, weight, bias, False, 0.1, shift.expand(FEWER[0][:2]))
    shifted = x + shift[:, :, None, None]
    torch.testing.assert_close(y, group_norm(shifted, weight, bias, False, 0.1), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad is not None and shift.grad is None


@needs_triton
@pytest.mark.usefixtures("few_groups")
def test_frozen_weights_of_group_norm_leave_the_other_gradients_unchanged():
    x, weight, bias = inputs((1, 2 * GROUPS, 7, 5))
    grad = torch.randn_like(x)
    all_three = torch.autograd.grad(group_norm(x, weight, bias), (x, weight, bias), grad)
    of_x, = torch.autograd.grad(group_norm(x, weight.detach(), bias.detach()), x, grad)
    of_bias, = torch.autograd.grad(group_norm(x.detach(), weight.detach(), bias), bias, grad)
    assert torch.equal(of_x, all_three[0]) and torch.equal(of_bias, all_three[2])


@needs_triton
@pytest.mark.usefixtures("few_groups")
@pytest.mark.parametrize("mean, std", [(1000.0, 1.0), (-3.0, 1e-3)])
def test_group_norm_kernels_keep_a_small_deviation_from_a_large_mean(mean, std, tiles):
    """A sum of squares would lose it: fp32 represents 1000^2 with an error of 0.06. The error that remains is
    the rounding of the mean, as large as that of the input."""
    x, weight, bias = inputs((2, 2 * GROUPS, 6, 11), mean=mean, std=std)
    y, reference = group_norm(x, weight, bias), expected(x, weight, bias)
    atol = 1e-5 + 4 * abs(mean) / std * 2 ** -24
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=atol)
    grad = torch.randn_like(y)
    ours, = torch.autograd.grad(y, x, grad)
    theirs, = torch.autograd.grad(reference, x, grad.double())
    torch.testing.assert_close(ours * std, theirs.float() * std, rtol=1e-4, atol=10 * atol)


@needs_triton
@pytest.mark.usefixtures("few_groups")
def test_group_norm_kernels_with_an_outlier_in_the_first_row():
    """The pivot of a chunk is the mean of its first rows. An outlier there costs little precision."""
    x, weight, bias = inputs((1, GROUPS, 40, 16))
    with torch.no_grad():
        x[:, :, 0, 0] = 1000
    assert_close_relative(group_norm(x, weight, bias), expected(x, weight, bias), 1e-6)
    y = group_norm(x, weight, bias, False)[:, :, 1:]
    torch.testing.assert_close(y.double(), expected(x, weight, bias, False)[:, :, 1:], rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.usefixtures("few_groups")
@half_precision
def test_group_norm_kernels_round_once(dtype):
    """Arithmetic is fp32, so the error is one rounding of the result, behind the SiLU too."""
    x, weight, bias = inputs((2, 2 * GROUPS, 5, 4), dtype)
    y, reference = group_norm(x, weight, bias), expected(x, weight, bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), reference, rtol=1.01 * EPS[dtype], atol=2e-5)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weight, bias), grad)
    theirs = torch.autograd.grad(reference, (x, weight, bias), grad.double())
    for a, b in zip(ours, theirs):                                                  # b is rounded as well
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=2.02 * EPS[dtype], atol=1e-4)


@needs_triton
@pytest.mark.usefixtures("few_groups")
def test_group_norm_of_half_precision_with_fp32_weights():
    x, weight, bias = inputs((2, 2 * GROUPS, 3, 3))
    y = group_norm(x.detach().bfloat16(), weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected(x.bfloat16(), weight, bias), rtol=2 ** -7, atol=1e-5)
    y.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


@needs_triton
@pytest.mark.usefixtures("few_groups")
@pytest.mark.filterwarnings("ignore:Input #[012] requires gradient and is not a double")
def test_group_norm_gradcheck():
    """Against finite differences, which share no formula with the kernels. Steps are wide because of fp32."""
    x, weight, bias = inputs((1, GROUPS, 1, 2))
    assert torch.autograd.gradcheck(lambda *tensors: group_norm(*tensors, eps=0.1), (x, weight, bias),
                                    eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=0.0, fast_mode=True)


@needs_triton
@pytest.mark.usefixtures("few_groups")
def test_group_norm_kernels_are_bitwise_repeatable():
    x, weight, bias = inputs((1, 3 * GROUPS, 7, 5))
    grad = torch.randn_like(x)
    results = []
    for _ in range(2):
        y = group_norm(x, weight, bias)
        results.append((y, *torch.autograd.grad(y, (x, weight, bias), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_triton
@pytest.mark.usefixtures("few_groups")
def test_group_norm_kernels_take_gradients_in_any_layout():
    """The input must be channels-last."""
    x, weight, bias = inputs((2, 2 * GROUPS, 3, 5))
    y, grad = group_norm(x, weight, bias), torch.randn(2, 2 * GROUPS, 3, 5, device=DEVICE)
    first, second = (torch.autograd.grad(y, x, g, retain_graph=True)[0]
                     for g in (grad, grad.contiguous(**CHANNELS_LAST)))
    assert torch.equal(first, second)
    with pytest.raises(AssertionError, match="not channels-last"):
        group_norm(x.detach().contiguous(), weight, bias)


@needs_triton
@pytest.mark.usefixtures("few_groups")
def test_a_clip_is_a_view_of_its_frames():
    """(b f) c h w -> b c f s copies nothing and is channels-last again: same kernels, larger tables."""
    x, weight, bias = inputs((6, 2 * GROUPS, 2, 5))
    clips = x.unflatten(0, (2, 3)).transpose(1, 2).flatten(3)
    assert clips.data_ptr() == x.data_ptr() and clips.is_contiguous(**CHANNELS_LAST)
    torch.testing.assert_close(group_norm(clips, weight, bias).double(), expected(clips, weight, bias),
                               rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.usefixtures("few_groups")
def test_group_norm_of_no_frames():
    x, weight, bias = inputs((0, 2 * GROUPS, 4, 4))
    group_norm(x, weight, bias).sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 23 GB of GPU memory")
@pytest.mark.parametrize("shape", [(25, 256, 576, 1024), (1, 256, 25, 576 * 1024)])
@torch.no_grad()
def test_group_norm_of_more_elements_than_32_bits_can_count(shape):
    """The largest tensors of the VAE, 25 frames of 1024x576. Rows repeat, so the last ones are known."""
    pattern, weight, bias = inputs((1, 256, 1, 64), torch.bfloat16)
    x = pattern.repeat(shape[0], 1, shape[2], shape[3] // 64).contiguous(**CHANNELS_LAST)
    y = group_norm(x, weight, bias)
    assert y.numel() > 2 ** 31
    torch.testing.assert_close(y[-1:, :, -1:, -64:].double(), expected(pattern, weight, bias),
                               rtol=0.004, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 64, 7), (2, 64, 3, 5), (2, 64, 3, 2, 2)])
@torch.no_grad()
def test_fast_group_norm_takes_tensors_of_any_rank(shape):
    """It has the keys of nn.GroupNorm. On a CPU it calls nn.GroupNorm."""
    plain, x = randomize(nn.GroupNorm(32, 64, 1e-5)), torch.randn(shape)
    norm, expected = kernels.fast(copy.deepcopy(plain)), plain(x)
    assert type(norm) is kernels.FastGroupNorm and torch.equal(norm(x), expected)
    torch.testing.assert_close(norm.to(DEVICE)(x.to(DEVICE)).cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_fast_group_norm_keeps_a_small_deviation_from_a_large_mean(layout):
    """As the kernels do. On a CPU, nn.GroupNorm of a channels-last tensor subtracts two large squares."""
    norm, x = kernels.fast(nn.GroupNorm(32, 64)).to(DEVICE), 1000 + torch.randn(2, 64, 9, 7, device=DEVICE)
    y = norm(x.contiguous(memory_format=layout))
    torch.testing.assert_close(y.double(), F.group_norm(x.double(), 32), rtol=1e-4, atol=3e-4)


@needs_gpu
def test_fast_group_norm_compiles_as_one_graph():
    norm, (x, _, _) = kernels.fast(nn.GroupNorm(32, 64)).to(DEVICE), inputs((2, 64, 8, 8))
    compiled, grad, results = torch.compile(norm, fullgraph=True), torch.randn_like(x), []
    for call in (norm, compiled):
        y = call(x)
        results.append((y, *torch.autograd.grad(y, (x, *norm.parameters()), grad)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------
# LayerNorm

# .. c of tokens: widths of SVD and of the toy world, odd widths, one row, one column.
TOKENS = [(1, 2, 5, 320), (11, 96), (2, 7, 64), (1, 640), (3, 1280), (70, 33), (5, 1), (1, 3, 2)]


def layer_norm_inputs(shape, dtype=torch.float32, mean=0.0):
    tensors = torch.randn(shape) + mean, torch.randn(shape[-1]), torch.randn(shape[-1])
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in tensors]


@needs_triton
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("shape", TOKENS)
def test_layer_norm_kernels_compute_layer_norm(shape, mean, tiles):
    """Values and gradients agree with fp64, except for the digits that fp32 spends on the mean."""
    tensors, tolerance = layer_norm_inputs(shape, mean=mean), 1e-5 * (1 + mean)
    y, reference = fused.LayerNorm.apply(*tensors, 1e-2), exact_layer_norm(*tensors, 1e-2)
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, tensors, grad, retain_graph=True)
    theirs = torch.autograd.grad(reference, tensors, grad.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)
    frozen = [tensor.detach() for tensor in tensors[1:]]
    y = fused.LayerNorm.apply(tensors[0], *frozen, 1e-2)
    torch.testing.assert_close(torch.autograd.grad(y, tensors[0], grad)[0], ours[0])


@needs_triton
@half_precision
def test_layer_norm_kernels_round_once(dtype):
    """Weights may have the dtype of x or be fp32."""
    for weights in (dtype, torch.float32):
        x, weight, bias = layer_norm_inputs((9, 96), dtype)
        weight, bias = (tensor.detach().to(weights).requires_grad_() for tensor in (weight, bias))
        y, reference = fused.LayerNorm.apply(x, weight, bias, 1e-5), exact_layer_norm(x, weight, bias, 1e-5)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), reference, rtol=1.01 * EPS[dtype], atol=1e-5)
        grad = torch.randn_like(y)
        ours = torch.autograd.grad(y, (x, weight, bias), grad)
        theirs = torch.autograd.grad(reference, (x, weight, bias), grad.double())
        for a, b in zip(ours, theirs):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a.double(), b.double(), rtol=2.02 * EPS[dtype], atol=1e-4)


@needs_triton
def test_layer_norm_kernels_take_any_layout():
    """Of input and gradient. A tensor without rows works too."""
    _, weight, bias = layer_norm_inputs((64,))
    x = torch.randn(6, 64, 5, device=DEVICE).transpose(1, 2).requires_grad_()               # 6 5 64
    grad = torch.randn(6, 64, 5, device=DEVICE).transpose(1, 2)
    results = []
    for given, g in ((x, grad), (x.detach().contiguous().requires_grad_(), grad.contiguous())):
        y = fused.LayerNorm.apply(given, weight, bias, 1e-5)
        results.append((y, *torch.autograd.grad(y, (given, weight, bias), g)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    empty = torch.empty(2, 0, 64, device=DEVICE, requires_grad=True)
    fused.LayerNorm.apply(empty, weight, bias, 1e-5).sum().backward()
    assert empty.grad.shape == empty.shape and not weight.grad.any()


def test_fast_layer_norm_is_that_of_pytorch():
    """It has the same keys. On a CPU and in fp64 it calls nn.LayerNorm, on a GPU the kernels."""
    plain, x = randomize(nn.LayerNorm(96)), torch.randn(2, 5, 96)
    norm, y = kernels.fast(copy.deepcopy(plain)), plain(x)
    assert torch.equal(norm(x), y) and torch.equal(norm.double()(x.double()), plain.double()(x.double()))
    on_device = norm.float().to(DEVICE)(x.to(DEVICE))
    torch.testing.assert_close(on_device.cpu(), y, rtol=1e-5, atol=1e-5)
    assert (DEVICE == "cuda") == (on_device.grad_fn.name() == "LayerNormBackward")


# ---------------------------------------------------------------------------------------------------------
# GEGLU

# .. 2d of tokens: b f s 2d as in SVD, widths that are no power of two, odd widths, one row, one column.
HALVES = [(1, 2, 5, 640), (3, 70), (2, 33, 192), (1, 2560), (300, 2), (7, 3, 34)]


@needs_triton
@pytest.mark.parametrize("shape", HALVES)
def test_geglu_kernels_compute_the_gate(shape, tiles):
    """Values and gradients agree with fp64. Gates reach both ends of GELU."""
    x = (3 * torch.randn(shape, device=DEVICE)).requires_grad_()
    y, reference = fused.GEGLU.apply(x), exact_geglu(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    ours, = torch.autograd.grad(y, x, grad)
    theirs, = torch.autograd.grad(reference, x, grad.double())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")          # to inf, and exp(-inf) is 0
def test_geglu_kernels_far_from_zero():
    """Where GELU equals its argument or 0, no exponential overflows and nothing becomes NaN."""
    gates = torch.tensor([-1e30, -1e4, -40., -13., -0., 0., 13., 40., 1e4, 1e30], device=DEVICE)
    x = torch.cat([torch.ones_like(gates), gates]).requires_grad_()
    y = fused.GEGLU.apply(x)
    torch.testing.assert_close(y, gates.clamp(min=0), rtol=1e-6, atol=1e-7)
    grad, = torch.autograd.grad(y.sum(), x)
    slope = (gates > 0).float() + 0.5 * (gates == 0)
    torch.testing.assert_close(grad, torch.cat([gates.clamp(min=0), slope]), rtol=1e-6, atol=1e-7)


@needs_triton
@half_precision
def test_geglu_kernels_round_once(dtype):
    """PyTorch rounds twice, so the kernels are closer to fp64, forward and backward. (Triton's interpreter
    truncates to bf16. There the fp32 result is rounded here instead.)"""
    x = torch.randn(40, 384, device=DEVICE).to(dtype).requires_grad_()
    x64, (hidden, gate) = x.detach().double().requires_grad_(), x.chunk(2, dim=-1)
    ours, theirs, exact = fused.GEGLU.apply(x), hidden * F.gelu(gate), exact_geglu(x64)
    assert ours.dtype == dtype
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        ours = fused.GEGLU.apply(x.float()).to(dtype)
    torch.testing.assert_close(ours.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)
    grad = torch.randn_like(ours)
    gradients = [torch.autograd.grad(y, given, grad.to(y.dtype))[0]
                 for y, given in ((ours, x), (theirs, x), (exact, x64))]
    for kernel, pytorch, truth in ((ours, theirs, exact), gradients):
        assert relative_error(kernel, truth) < 0.8 * relative_error(pytorch, truth)


@needs_triton
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_geglu_gradcheck():
    x = torch.randn(3, 12, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(fused.GEGLU.apply, (x,), eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=0.0,
                                    fast_mode=True)


@needs_triton
def test_geglu_kernels_take_any_layout():
    """Of input and gradient. A tensor without tokens works too. An odd width is refused."""
    x = torch.randn(6, 64, 5, device=DEVICE).transpose(1, 2).requires_grad_()               # 6 5 64
    grad = torch.randn(6, 32, 5, device=DEVICE).transpose(1, 2)
    results = []
    for given, g in ((x, grad), (x.detach().contiguous().requires_grad_(), grad.contiguous())):
        y = fused.GEGLU.apply(given)
        results.append((y, *torch.autograd.grad(y, given, g)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    empty = torch.empty(2, 0, 64, device=DEVICE, requires_grad=True)
    y = fused.GEGLU.apply(empty)
    y.sum().backward()
    assert y.shape == (2, 0, 32) and empty.grad.shape == empty.shape
    with pytest.raises(AssertionError, match="no halves"):
        fused.GEGLU.apply(torch.zeros(2, 5, device=DEVICE))


@needs_triton
def test_geglu_kernels_in_a_checkpointed_layer_with_lora(monkeypatch):
    """Gradients reach the input and the update, and checkpointing changes no bit of them."""
    monkeypatch.setattr(kernels, "has_kernels", kernels_take_cpu_tensors)
    net = randomize(model.FeedForward(24)).requires_grad_(False).to(DEVICE)
    net.net[0].proj = lora.with_lora(net.net[0].proj, 4, 4)
    nn.init.normal_(net.net[0].proj.lora_B.weight)
    fast, exact = kernels.fast(copy.deepcopy(net)), copy.deepcopy(net).double()
    x, grad = (torch.randn(2, 3, 24, device=DEVICE) for _ in range(2))
    results = []
    for layer, run in ((exact, exact), (fast, fast), (fast, partial(checkpoint, fast, use_reentrant=False))):
        given = x.to(layer.net[2].weight.dtype).requires_grad_()
        wanted = [given, *(weight for weight in layer.parameters() if weight.requires_grad)]
        y = run(given)
        results.append((y, *torch.autograd.grad(y, wanted, grad.to(y.dtype))))
    for truth, once, twice in zip(*results, strict=True):
        assert torch.equal(once, twice)
        assert_close_relative(once, truth, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_fast_geglu_is_the_plain_expression_elsewhere(dtype):
    """On a CPU, in fp64 and under torch.compile, bit for bit."""
    plain = randomize(model.GEGLU(24, 34)).to(DEVICE, dtype)
    fast, x = kernels.fast(copy.deepcopy(plain)), torch.randn(3, 5, 24, device=DEVICE).to(dtype)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    for layer in (compiled,) if DEVICE == "cuda" and dtype != torch.float64 else (fast, compiled):
        assert torch.equal(layer(x), plain(x))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens, c", [(2304, 320), (1000, 1280), (257, 33)])
def test_fast_geglu_on_a_gpu(tokens, c, dtype):
    """It runs the kernels, at the widths of SVD and at an odd one, and rounds once."""
    tolerance = max(torch.finfo(dtype).eps / 2, 1e-6)
    net = kernels.fast(randomize(model.GEGLU(c, 4 * c)).to(DEVICE, dtype))
    x = torch.randn(1, 2, tokens, c, device=DEVICE, dtype=dtype)                # b f s c
    projected = net.proj(x).detach().requires_grad_()
    y, reference = fused.GEGLU.run(projected), exact_geglu(projected)
    assert torch.equal(y, net(x)) and net(x).grad_fn.name() == "GEGLUBackward"
    assert_close_relative(y, reference, tolerance)
    grad = torch.randn_like(y)
    ours, = torch.autograd.grad(y, projected, grad)
    theirs, = torch.autograd.grad(reference, projected, grad.double())
    assert_close_relative(ours, theirs, tolerance)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 13 GB of GPU memory")
def test_geglu_of_more_elements_than_32_bits_can_count():
    """Rows repeat, so the last ones are known."""
    pattern = torch.randn(8, 2560, device=DEVICE, dtype=torch.bfloat16)
    x = pattern.repeat(2 ** 31 // pattern.numel() + 2, 1).requires_grad_()
    y = fused.GEGLU.apply(x)
    assert x.numel() > 2 ** 31
    y.backward(torch.ones_like(y))
    last = pattern.double().requires_grad_()
    exact_geglu(last).sum().backward()
    assert_close_relative(y[-8:], exact_geglu(pattern), 2 ** -8)
    assert_close_relative(x.grad[-8:], last.grad, 2 ** -8)


# ---------------------------------------------------------------------------------------------------------
# Attention among frames

# b f s c and heads: SVD's and the toy world's; a single frame, a full tile of frames and one more, one pixel.
HEADS = [(1, 14, 6, 128, 2), (2, 5, 3, 32, 1), (1, 25, 2, 64, 1), (3, 16, 1, 48, 3), (1, 17, 2, 64, 4),
         (2, 1, 4, 32, 2), (1, 32, 1, 32, 1)]


def attention_inputs(b, f, s, c, heads, dtype=torch.float32, scale=2.0):
    return [(scale * torch.randn(b, f, s, c)).to(DEVICE, dtype).requires_grad_() for _ in "qkv"]


@needs_triton
@pytest.mark.parametrize("shape", HEADS)
def test_attention_kernels_compute_attention(shape):
    """Values and gradients agree with scaled_dot_product_attention in fp64."""
    qkv = attention_inputs(*shape)
    y, reference = fused.FrameAttention.apply(*qkv, shape[-1]), exact_frame_attention(*qkv, shape[-1])
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, qkv, grad)
    theirs = torch.autograd.grad(reference, qkv, grad.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@needs_triton
def test_attention_kernels_with_scores_whose_exponentials_overflow():
    q, k, v = (x.detach() for x in attention_inputs(1, 6, 3, 32, 1, scale=30.0))
    y, reference = fused.FrameAttention.apply(q, k, v, 1), exact_frame_attention(q, k, v, 1)
    torch.testing.assert_close(y.double(), reference, rtol=1e-3, atol=1e-2)


@needs_triton
@half_precision
def test_attention_kernels_in_half_precision(dtype):
    """Weights, the gradients of scores, and results are rounded."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter cannot multiply bf16 matrices")
    qkv = attention_inputs(1, 14, 5, 64, 2, dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    results = []
    for given, function in ((exact, exact_frame_attention), (qkv, fused.FrameAttention.apply)):
        y = function(*given, 2)
        results.append((y, *torch.autograd.grad(y, given, torch.ones_like(y) + y.detach())))
    assert {x.dtype for x in results[1]} == {dtype}
    for truth, ours in zip(*results):
        assert relative_error(ours, truth) < torch.finfo(dtype).eps


@needs_triton
def test_attention_kernels_take_any_layout_of_inputs_and_gradients():
    qkv = attention_inputs(2, 5, 3, 32, 1)
    transposed = [x.detach().transpose(0, 3).contiguous().transpose(0, 3).requires_grad_() for x in qkv]
    grad, results = torch.randn(32, 5, 3, 2, device=DEVICE).transpose(0, 3), []
    for given in (qkv, transposed):
        y = fused.FrameAttention.apply(*given, 1)
        results.append((y, *torch.autograd.grad(y, given, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    empty = [torch.empty(1, 5, 0, 32, device=DEVICE, requires_grad=True) for _ in "qkv"]
    fused.FrameAttention.apply(*empty, 1).sum().backward()
    assert all(x.grad.shape == x.shape for x in empty)


# ---------------------------------------------------------------------------------------------------------
# Residual connections

RESIDUALS = [(with_x, with_bias, with_scale) for with_x in (True, False)
             for with_bias in ("one", "per table", None) for with_scale in (True, False)]


def residual_inputs(shape, with_x=True, with_bias="one", with_scale=True):
    """x and y, channels-last, bias [c] or [n c], scale [1]. Those that are left out are None."""
    x, y, scale = inputs(shape)[0], inputs(shape)[0], torch.rand(1, device=DEVICE, requires_grad=True)
    size = shape[:2] if with_bias == "per table" else shape[1]
    bias = torch.randn(size, device=DEVICE, requires_grad=True)
    return x if with_x else None, y, bias if with_bias else None, scale if with_scale else None


@needs_triton
@pytest.mark.usefixtures("few_groups")
@pytest.mark.parametrize("given", RESIDUALS, ids=str)
def test_residual_kernel_computes_the_expression(given, tiles):
    """Values and gradients agree with fp64, for each combination of arguments that may be left out."""
    for shape in FEWER:
        tensors = residual_inputs(shape, *given)
        wanted = [tensor for tensor in tensors if tensor is not None]
        y, reference = fused.Residual.apply(*tensors), exact_residual(*tensors)
        assert y.is_contiguous(**CHANNELS_LAST)
        torch.testing.assert_close(y.double(), reference, rtol=1e-6, atol=1e-6)
        grad = torch.randn_like(y)
        for layout in (torch.channels_last, torch.contiguous_format):
            ours = torch.autograd.grad(y, wanted, grad.contiguous(memory_format=layout), retain_graph=True)
            theirs = torch.autograd.grad(reference, wanted, grad.double(), retain_graph=True)
            for a, b in zip(ours, theirs):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
@half_precision
def test_residual_kernel_rounds_once(dtype):
    """bias and scale may be fp32 or have the dtype of x."""
    x, y, bias, scale = (tensor.detach() for tensor in residual_inputs((2, 96, 5, 4)))
    x, y = x.to(dtype), y.to(dtype)
    for others in ((bias, scale), (bias.to(dtype), scale.to(dtype))):
        out, exact = fused.Residual.apply(x, y, *others), exact_residual(x, y, *others)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=1.01 * EPS[dtype], atol=1e-6)


@needs_triton
def test_residual_saves_nothing_that_does_not_train():
    """If bias and scale are frozen, the gradients of x and y depend on the scale only."""
    x, y, bias, scale = residual_inputs((2, 32, 4, 4))
    out = fused.Residual.apply(x, y, bias.detach(), scale.detach())
    assert [tensor.numel() for tensor in out.grad_fn.saved_tensors] == [1]
    with pytest.raises(AssertionError, match="not channels-last"):
        fused.Residual.apply(x, y.detach().contiguous(), None, None)


@needs_triton
def test_kernels_without_gradients_compute_the_same():
    """Under no_grad the functions skip autograd, and give the same bits."""
    (x, weight, bias), tokens = inputs((2, 32, 1, 3)), layer_norm_inputs((5, 16))
    qkv = attention_inputs(1, 2, 3, 16, 1)
    for function, args in ((fused.GroupNorm.run, (x, weight, bias, 4, 1e-5, True)),
                           (fused.LayerNorm.run, (*tokens, 1e-5)), (fused.GEGLU.run, tokens[:1]),
                           (fused.FrameAttention.run, (*qkv, 1)),
                           (fused.residual, (x, x, bias, weight[:1]))):
        recorded = function(*args)
        with torch.no_grad():
            alone = function(*args)
        assert recorded.grad_fn is not None and alone.grad_fn is None and torch.equal(recorded, alone)
    y = torch.randn(2, 3, 5, 16, device=DEVICE), torch.randn(2, 3, 5, 16, device=DEVICE)            # b f s c
    row = torch.randn(2, 16, device=DEVICE)                                                         # b c
    torch.testing.assert_close(fused.add_tokens(*y, row), y[0] + y[1] + row[:, None, None])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residual_and_attention_on_a_gpu(dtype):
    """At the sizes of a UNet they run the kernels, and round a few times at most."""
    y, bias, scale = (tensor.detach().to(dtype) for tensor in residual_inputs((14, 320, 36, 64))[1:])
    x, *qkv = y.flip(0).contiguous(**CHANNELS_LAST), *attention_inputs(1, 14, 2304, 320, 5)
    qkv = [tensor.detach().to(dtype) for tensor in qkv]
    for name, ours, exact, tensors in (
            ("Residual", fused.residual, exact_residual, (x, y, bias, scale)),
            ("FrameAttention", lambda *qkv: fused.FrameAttention.run(*qkv, 5),
             lambda *qkv: exact_frame_attention(*qkv, 5), qkv)):
        given = [tensor.clone().requires_grad_() for tensor in tensors]
        given64 = [tensor.double().requires_grad_() for tensor in tensors]
        out, reference = ours(*given), exact(*given64)
        assert out.grad_fn.name() == f"{name}Backward"
        grad, tolerance = torch.randn_like(out), max(2 * torch.finfo(dtype).eps, 1e-5)
        for a, b in zip((out, *torch.autograd.grad(out, given[:3], grad)),
                        (reference, *torch.autograd.grad(reference, given64[:3], grad.double()))):
            assert_close_relative(a, b, tolerance)


# ---------------------------------------------------------------------------------------------------------
# Fast networks compute what plain networks compute


def stand_in(exact, channels_last=False):
    """A function with the result of a kernel, from PyTorch: exact arithmetic, rounded once at the end."""
    def function(*args):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.ndim > 2]
        layout = CHANNELS_LAST if channels_last else {}
        assert not channels_last or all(x.is_contiguous(**layout) for x in tensors), "not channels-last"
        return exact(*args).to(tensors[0].dtype).contiguous(**layout)
    return function


def attention_within_limits(q, k, v, num_heads):
    assert q.shape[1] <= fused.MAX_FRAMES and q.shape[3] // num_heads in fused.HEAD_WIDTHS
    return exact_frame_attention(q, k, v, num_heads)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Fast layers take the path that they take on a GPU. On a CPU, stand-ins replace the kernels, because
    Triton's interpreter is slow and cannot multiply bf16."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "has_kernels", kernels_take_cpu_tensors)
        for function, exact in ((fused.GroupNorm, exact_group_norm), (fused.Residual, exact_residual)):
            monkeypatch.setattr(function, "run", stand_in(exact, channels_last=True))
        for function, exact in ((fused.LayerNorm, exact_layer_norm), (fused.GEGLU, exact_geglu),
                                (fused.FrameAttention, attention_within_limits)):
            monkeypatch.setattr(function, "run", stand_in(exact))


def fast_copy(net):
    """A fast copy of a network, with convolution weights channels-last as on a machine with a GPU."""
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        return kernels.fast(copy.deepcopy(net))


def small_unet(dtype=torch.float32, targets=None, **config):
    """A random UNet on DEVICE, with a random LoRA beside the layers whose names end in `targets`."""
    net = randomize(model.UNet(**unet_config(**config))).to(DEVICE, dtype)
    return net if targets is None else randomize_lora(lora.add_lora(net, 2, alpha=3, targets=targets))


def randomize_lora(net):
    """Makes updates about a third as large as the weights. Larger ones would amplify rounding errors."""
    for layer in lora.lora_layers(net).values():
        nn.init.normal_(layer.lora_B.weight, std=0.04)
    return net


def small_vae(dtype=torch.float32, **config):
    """A random VAE on DEVICE."""
    return randomize(model.VAE(**vae_config((64, 96), **config))).to(DEVICE, dtype)


def run_unet(net, x, image_embeds):
    """The UNet on x [b f 8 h w] and image_embeds, with fixed other conditions that differ between clips."""
    c_noise, time_ids = torch.tensor([-1.5, 0.8]), torch.tensor([[6, 127, 0.02], [24, 30, 0.1]])
    return net(x, c_noise[:len(x)].to(x), image_embeds, time_ids[:len(x)].to(x))


def encode(net, frames):
    return torch.cat(net.moments(frames), dim=1)


def decode(net, latents):
    return net.decode(latents, 3)


def outputs_and_gradients(net, run, *given):
    """{name: tensor}: the output of run(net, *given), and the gradients of inputs and trained parameters.

    Mixing factors are single numbers, so their gradients are joined. The bias of keys is left out: it adds
    the same number to all scores of a query, so its gradient is 0 up to rounding.
    """
    dtype = torch.float64 if next(net.parameters()).dtype == torch.float64 else torch.float32
    given = [x.to(DEVICE, dtype, copy=True).requires_grad_() for x in given]
    net.zero_grad()
    out = run(net, *given)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight.to(out)).sum().backward()
    tensors = {f"input {i}": x for i, x in enumerate(given)} | dict(net.named_parameters())
    gradients = {name: x.grad for name, x in tensors.items() if x.grad is not None}
    mixing = [gradients.pop(name) for name in list(gradients) if name.endswith("mix_factor")]
    gradients |= {"mixing factors": torch.cat(mixing)} if mixing else {}
    return {"output": out.detach()} | {k: v for k, v in gradients.items() if not k.endswith("to_k.bias")}


def assert_as_exact(fast, plain, exact):
    """Fails unless `fast` is about as close to `exact` as `plain` is. Each is {name: tensor}.

    A single tensor may be accidentally exact, so the criteria are the root mean square of the relative errors
    of all tensors, and the largest. Over 8 seeds on a CPU, the former was 0.8 to 1.3 times that of the plain
    network in bf16, because the kernels round less often, and 1.1 to 1.7 times in fp32, because channels-last
    convolutions add in another order. The latter was at most 3.1 times that of the plain network.
    """
    assert fast.keys() == plain.keys() == exact.keys() and len(exact) > 20
    of_fast, of_plain = (torch.tensor([relative_error(net[name], exact[name]) for name in exact])
                         for net in (fast, plain))
    ratio = (of_fast.square().mean() / of_plain.square().mean()).sqrt().item()
    limit = 1.5 if of_plain.mean() > 1e-4 else 2
    assert ratio <= limit, f"{ratio:.2f} times the error of the plain network"
    worst = f"{list(exact)[of_fast.argmax()]}: {of_fast.max():.1e}, of the plain network {of_plain.max():.1e}"
    assert of_fast.max() <= 4 * of_plain.max(), worst


precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@precisions
@pytest.mark.parametrize("targets", [None, lora.LORA_TARGETS, lora.LORA_CONVS],
                         ids=["all weights", "LoRA on linears", "LoRA on convolutions too"])
def test_fast_unet_is_as_exact_as_the_plain_one(as_on_a_gpu, dtype, targets):
    """Output and all gradients, with and without checkpointing. The fp64 network that both are compared with
    computes what diffusers computes."""
    net = small_unet(dtype, targets)
    fast, exact = fast_copy(net), copy.deepcopy(net).double()
    given = torch.randn(2, 3, 8, 4, 8), torch.randn(2, 1, 24)
    reference, plain = (outputs_and_gradients(unet, run_unet, *given) for unet in (exact, net))
    for checkpointing in (False, True):
        fast.set_checkpointing(checkpointing)
        assert_as_exact(outputs_and_gradients(fast, run_unet, *given), plain, reference)
    if targets is None:
        theirs = DiffusersUNet(**unet_config()).to(DEVICE).double().eval()
        theirs.load_state_dict(exact.state_dict())
        given = [x.to(DEVICE).double() for x in given]
        with torch.no_grad():
            output = run_unet(partial(diffusers_unet, theirs), *given)
        assert_close_relative(reference["output"], output, 1e-12)


@precisions
def test_fast_vae_encoder_is_as_exact_as_the_plain_one(as_on_a_gpu, dtype):
    net, frames = small_vae(dtype), torch.rand(3, 3, 16, 24) * 2 - 1
    networks = fast_copy(net), net, copy.deepcopy(net).double()
    results = [outputs_and_gradients(vae, encode, frames) for vae in networks]
    assert_as_exact(*results)
    with torch.no_grad():
        latents = [vae.encode(frames.to(DEVICE)).double() for vae in networks[:2]]
        theirs = diffusers_vae(networks[2]).encode(frames.to(DEVICE).double()).latent_dist
        assert_close_relative(results[2]["output"], torch.cat([theirs.mean, theirs.logvar], dim=1), 1e-12)
    errors = [relative_error(mode, theirs.mean) for mode in latents]
    assert errors[0] < 2 * errors[1]


@precisions
def test_fast_vae_decoder_is_as_exact_as_the_plain_one(as_on_a_gpu, monkeypatch, dtype):
    """Also without gradients, where it upsamples a few frames at a time."""
    net, latents = small_vae(dtype), torch.randn(6, 4, 8, 12)
    networks = fast_copy(net), net, copy.deepcopy(net).double()
    results = [outputs_and_gradients(vae, decode, latents) for vae in networks]
    assert_as_exact(*results)
    with torch.no_grad():
        theirs = diffusers_vae(networks[2]).decode(latents.to(DEVICE).double(), num_frames=3).sample
        assert_close_relative(results[2]["output"], theirs, 1e-12)
        for pixels in (1, 4 * 16 * 24, 2 ** 21):
            monkeypatch.setattr(kernels, "PIXELS_AT_ONCE", pixels)
            frames = decode(networks[0], latents.to(DEVICE))
            assert relative_error(frames, theirs) < 2 * relative_error(results[1]["output"], theirs)


def diffusers_vae(net):
    """The VAE of diffusers with the weights of ours."""
    theirs = DiffusersVAE(**vae_config((64, 96))).to(DEVICE, net.quant_conv.weight.dtype).eval()
    theirs.load_state_dict(net.state_dict())
    return theirs


@pytest.mark.parametrize("frames, heads", [(32, 2), (33, 2), (5, 1), (5, 8)])
@torch.no_grad()
def test_fast_temporal_attention_is_plain_beyond_the_limits_of_the_kernel(as_on_a_gpu, frames, heads):
    """More than 32 frames, or heads that are not 16, 32 or 64 channels wide."""
    net = randomize(model.TemporalAttention(32, num_heads=heads)).to(DEVICE)
    x = torch.randn(2, frames, 3, 32, device=DEVICE)                            # b f s c
    assert_close_relative(fast_copy(net)(x), net(x), 2e-6)


@needs_triton
@pytest.mark.parametrize("kind", ["unet", "encoder", "decoder"])
def test_networks_with_kernels_are_as_exact_as_plain_ones(monkeypatch, kind):
    """The kernels themselves, in Triton's interpreter if there is no GPU. There are few groups, because each
    has a program of its own."""
    monkeypatch.setattr(model, "NORM_GROUPS", 2)
    monkeypatch.setattr(fused, "UNROLL", 1)
    monkeypatch.setattr(kernels, "has_kernels", kernels_take_cpu_tensors)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if kind == "unet":
        net = small_unet(targets=lora.LORA_CONVS, channels=(32, 64))
        run, given = run_unet, (torch.randn(1, 2, 8, 2, 4), torch.randn(1, 1, 24))
    else:
        net = randomize(model.VAE(**vae_config((32, 64)))).to(DEVICE)
        run, given = (encode, [torch.rand(1, 3, 6, 8)])
        if kind == "decoder":
            run, given = (decode, [torch.randn(3, 4, 2, 3)])
    networks = fast_copy(net), net, copy.deepcopy(net).double()
    assert_as_exact(*(outputs_and_gradients(network, run, *given) for network in networks))


# ---------------------------------------------------------------------------------------------------------
# Upsampling in the VAE's decoder


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4), (5, 3), (6, 8)])
def test_folded_upsampling_computes_the_same(height, width):
    """Values and gradients, at the borders too, up to the order of sums."""
    net, x = randomize(model.Upsample(6)).double(), torch.randn(2, 6, height, width).double().requires_grad_()
    folded = kernels.FoldedUpsample(6).double()
    folded.load_state_dict(net.state_dict())
    grad, results = torch.randn(2, 6, 2 * height, 2 * width).double(), []
    for upsample in (net, folded):
        y = upsample(x)
        results.append((y, *torch.autograd.grad(y, (x, *upsample.parameters()), grad)))
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert relative_error(results[0][0], net.conv(doubled)) < 1e-14
    for plain, fast in zip(*results):
        assert_close_relative(fast, plain, 1e-14)


def test_folded_weights_are_rounded_once():
    net = randomize(kernels.FoldedUpsample(16))
    exact = copy.deepcopy(net.bfloat16()).double()
    torch.testing.assert_close(net.folded(), exact.folded().bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("frames_at_once", [1, 4, 100])
def test_fast_decoder_upsamples_a_few_frames_at_a_time(as_on_a_gpu, frames_at_once, monkeypatch):
    """This saves memory and changes no number. With gradients, all frames are upsampled together."""
    net, latents = fast_copy(randomize(model.VAE(**vae_config())).to(DEVICE)), torch.randn(6, 4, 4, 5)
    latents, seen = latents.to(DEVICE), []
    whole = decode(net, latents)                                                            # with gradients
    for block in net.decoder.up_blocks[1:]:
        block.resnets[0].spatial_res_block.register_forward_hook(
            lambda module, args, out: seen.append((len(out), out.shape[-1])))
    monkeypatch.setattr(kernels, "PIXELS_AT_ONCE", frames_at_once * 32 * 40)            # at full resolution
    with torch.no_grad():
        assert_close_relative(decode(net, latents), whole, 2e-6 if DEVICE == "cpu" else 1e-5)
    last = [count for count, width in seen if width == 40]
    assert last == {1: [1] * 6, 4: [4, 2], 100: [6]}[frames_at_once]
    seen.clear()
    decode(net, latents)
    assert {count for count, width in seen} == {6}


# ---------------------------------------------------------------------------------------------------------
# fast()


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_fast_replaces_classes_and_nothing_else(tmp_path, kind):
    """Parameters stay the same objects with the same bits. A second call changes nothing."""
    net = small_unet(targets=lora.LORA_CONVS) if kind == "unet" else small_vae()
    before, parameters = copy.deepcopy(net), dict(net.named_parameters())
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        assert kernels.fast(net) is net
        classes = [type(layer) for layer in net.modules()]
        assert kernels.fast(net) is net and classes == [type(layer) for layer in net.modules()]
    assert same_weights(net, before)
    after = dict(net.named_parameters())
    assert after.keys() == parameters.keys() and all(after[key] is parameters[key] for key in after)
    faster = kernels.FAST | ({model.Upsample: kernels.FoldedUpsample} if kind == "vae" else {})
    for layer, plain in zip(net.modules(), before.modules()):
        assert type(layer) is faster.get(type(plain), type(plain)) and isinstance(layer, type(plain))
    for weight in after.values():
        assert weight.ndim < 4 or weight.movedim(1, -1).is_contiguous()
    save = model.save_unet if kind == "unet" else model.save_vae
    for name, network in (("plain", before), ("fast", net)):
        save(lora.merge_lora(network), tmp_path / name)
    files = [sorted((tmp_path / name).iterdir()) for name in ("plain", "fast")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    for plain, fast in zip(*files):
        assert plain.read_bytes() == fast.read_bytes()


def test_fast_knows_all_fast_classes():
    """A class that is missing in FAST would never be used."""
    classes = {value for value in vars(kernels).values() if isinstance(value, type)}
    assert classes == {*kernels.FAST.values(), kernels.FoldedUpsample}


@torch.no_grad()
def test_fast_works_before_and_after_lora(as_on_a_gpu):
    """The order of fast, add_lora and merge_lora does not matter. Merged weights stay channels-last."""
    plain, inputs = small_unet(), [torch.randn(2, 3, 8, 4, 8), torch.randn(2, 1, 24)]
    inputs = [x.to(DEVICE) for x in inputs]
    reference = randomize_lora(lora.add_lora(copy.deepcopy(plain), 2, 3, lora.LORA_CONVS))
    before, expected = run_unet(plain, *inputs), run_unet(reference, *inputs)
    assert relative_error(before, expected) > 0.1
    fast_first = lora.add_lora(fast_copy(plain), 2, 3, lora.LORA_CONVS)
    fast_first.load_state_dict(reference.state_dict())
    fast_second = fast_copy(reference)
    for net in (fast_first, fast_second):
        assert_close_relative(run_unet(net, *inputs), expected, 1e-5)
        with lora.without_lora(net):
            assert_close_relative(run_unet(net, *inputs), before, 1e-5)
        updated = lora.lora_layers(net)
        classes = {path: type(layer) for path, layer in net.named_modules() if path not in updated}
        lora.merge_lora(net)
        assert_close_relative(run_unet(net, *inputs), expected, 1e-5)
        assert net.state_dict().keys() == plain.state_dict().keys()
        assert all(type(layer) is classes[path] for path, layer in net.named_modules() if path in classes)
        assert all(weight.ndim < 4 or weight.movedim(1, -1).is_contiguous() for weight in net.parameters())
    assert_close_relative(run_unet(kernels.fast(lora.merge_lora(reference)), *inputs), expected, 1e-5)


def fail(*args, **kwargs):
    pytest.fail("called where it should not be")


@pytest.fixture
def no_kernels_for_frames(monkeypatch):
    """The kernels for channels-last frames fail. The kernels for tokens remain: they depend on no layout."""
    monkeypatch.setattr(kernels, "residual", fail)
    monkeypatch.setattr(fused.GroupNorm, "run", fail)


def examples(dtype):
    """[(network, function for outputs_and_gradients, inputs)]"""
    unet, vae = small_unet(dtype), small_vae(dtype)
    return [(unet, run_unet, [torch.randn(2, 3, 8, 4, 8), torch.randn(2, 1, 24)]),
            (vae, encode, [torch.rand(3, 3, 16, 24)]), (vae, decode, [torch.randn(3, 4, 4, 6)])]


@precisions
def test_fast_networks_on_a_cpu_are_as_exact_as_plain_ones(no_kernels_for_frames, monkeypatch, dtype):
    """Temporal convolutions and the decoder's upsampling have faster forms there, which add in another order.
    All other layers are plain, so the encoder gives the same bits."""
    monkeypatch.setattr(f"{__name__}.DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for net, run, inputs in examples(dtype):
        networks = kernels.fast(copy.deepcopy(net)), net, copy.deepcopy(net).double()
        fast, plain, exact = (outputs_and_gradients(network, run, *inputs) for network in networks)
        assert_as_exact(fast, plain, exact)
        assert run is not encode or all(torch.equal(fast[name], plain[name]) for name in plain)


@torch.no_grad()
def test_fast_networks_in_fp64_are_plain_ones(as_on_a_gpu, no_kernels_for_frames):
    for net, run, inputs in examples(torch.float64):
        inputs = [x.to(DEVICE).double() for x in inputs]
        assert_close_relative(run(fast_copy(net), *inputs), run(net, *inputs), 1e-13)


def test_fast_unet_in_another_layout_is_the_plain_one(as_on_a_gpu, no_kernels_for_frames):
    """Layers of frames need channels-last tensors for their kernels. Layers of tokens still use theirs."""
    net = small_unet()
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        fast = kernels.fast(copy.deepcopy(net))
    inputs = torch.randn(2, 3, 8, 4, 8, device=DEVICE), torch.randn(2, 1, 24, device=DEVICE)
    assert_close_relative(run_unet(fast, *inputs), run_unet(net, *inputs), 1e-5)


@pytest.mark.parametrize("make", [lambda net: net, kernels.fast], ids=["plain", "fast"])
@torch.no_grad()
def test_vae_decoder_compiles_as_one_graph(make):
    """There is no graph break, so torch.compile gets the whole decoder. It computes the same. On a CPU."""
    net, latents = make(randomize(model.VAE(**vae_config((64, 96))))), torch.randn(3, 4, 8, 8)
    compiled = torch.compile(net.decode, backend="eager", fullgraph=True)
    assert_close_relative(compiled(latents, 3), net.decode(latents, 3), 1e-6)


# ---------------------------------------------------------------------------------------------------------
# Memory layout


@torch.no_grad()
def test_fast_networks_stay_channels_last(as_on_a_gpu, monkeypatch, tmp_path):
    """After loading, moving and casting, through skip connections, resizes and temporal layers. No layer uses
    its plain form, and no convolution has to copy its input first."""
    model.save_unet(randomize(model.UNet(**unet_config(num_attention_heads=(2, 3)))), tmp_path / "unet")
    model.save_vae(randomize(model.VAE(**vae_config())), tmp_path / "vae")
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        unet = kernels.fast(model.load_unet(tmp_path, dtype=torch.bfloat16)).to(DEVICE)
        vae = kernels.fast(model.load_vae(tmp_path)).to(DEVICE).bfloat16()
    for plain in kernels.FAST.keys() - {model.Downsample}:      # which is plain in the UNet
        monkeypatch.setattr(plain, "forward", fail)
    layouts = []

    def watch(function):
        def call(x, *args, **kwargs):
            out = function(x, *args, **kwargs)
            layouts.append([tensor.is_contiguous(**CHANNELS_LAST) for tensor in (x, out)])
            return out
        return call

    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(F, name, watch(getattr(F, name)))
    monkeypatch.setattr(F, "conv3d", fail)
    x, *rest = (tensor.to(DEVICE) for tensor in unet_inputs())
    for run in (lambda: unet(x, *rest), lambda: vae.encode(torch.randn(2, 3, 32, 16, device=DEVICE)),
                lambda: vae.decode(torch.randn(6, 4, 4, 6, device=DEVICE), 3)):
        layouts.clear()
        run()
        layouts[0][0] = True                                    # the input of the network comes from outside
        assert len(layouts) > 15 and all(map(all, layouts))
