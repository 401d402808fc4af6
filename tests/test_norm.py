"""The kernels of norm.py in Triton's interpreter (or on a GPU); memory layout of the networks."""
import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_relative, randomize, relative_error, unet_config, vae_config
from torch import nn
from torch.utils.checkpoint import checkpoint

import model
import norm
from norm import (
    FusedFrameAttention,
    FusedGEGLU,
    FusedGroupNorm,
    FusedLayerNorm,
    FusedResidual,
    GroupNorm,
    GroupNormSiLU,
    LayerNorm,
    frame_attention,
    geglu,
    residual,
    triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")       # to inf, and 1 / inf is 0
needs_triton = pytest.mark.skipif(triton is None, reason="there is no Triton for this platform")
# n c h w of frames, and of clips (b c f s), where L is long and n short; odd sizes, one row, one table.
SHAPES = [(2, 32, 4, 5), (1, 96, 5, 33), (1, 320, 3, 4), (2, 320, 1, 1), (1, 64, 2, 70), (3, 32, 1, 1)]
FEWER = [(2, 32, 4, 5), (1, 96, 2, 9), (1, 320, 1, 3), (3, 32, 1, 1)]               # the same edges


def inputs(shape, dtype=torch.float32, mean=0.0, std=1.0):
    """x, channels-last, and weight and bias, all of which want gradients."""
    x = torch.randn(shape, device=DEVICE) * std + mean
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], device=DEVICE).to(dtype) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (x, weight, bias)]


def fused(x, weight, bias, silu=True, eps=1e-6):
    return FusedGroupNorm.apply(x, weight, bias, 32, eps, silu)


def expected(x, weight, bias, silu=True, eps=1e-6):
    """In fp64, by PyTorch."""
    y = F.group_norm(x.double(), 32, weight.double(), bias.double(), eps)
    return F.silu(y) if silu else y


@pytest.fixture(params=[False, True], ids=["few chunks", "many"])
def tiles(request, monkeypatch):
    """Tensors of a test are small: with tiles of four rows the kernels have as much to walk over as they have
    in a network."""
    if request.param:
        for name, value in {"TILE": 128, "BLOCK": 32, "PROGRAMS": 6}.items():
            monkeypatch.setattr(norm, name, value)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_group_norm_and_silu(shape, tiles):
    """Values and all gradients as in fp64; fp32 keeps 1e-7 of each, and sums of them a few times that. A
    group of one number has no variance, and x no gradient."""
    silu = shape[1] != 320
    x, weight, bias = inputs(shape)
    y, reference = fused(x, weight, bias, silu), expected(x, weight, bias, silu)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weight, bias), grad)
    theirs = torch.autograd.grad(reference, (x, weight, bias), grad.double())
    alone = shape[1] * shape[2] * shape[3] == 32
    for a, b, atol in zip(ours, theirs, (1e-3 if alone else 1e-5, 1e-5, 1e-5)):     # 1 / std is 1000 then
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=atol)


@needs_triton
@pytest.mark.parametrize("shape, factor, tolerance", [
    *((shape, 1.0, 1e-5) for shape in FEWER[:3]), (FEWER[0], 300.0, 3e-4)])
def test_kernel_takes_a_shift_along(shape, factor, tolerance, tiles):
    """The norm of x + shift, and what each of them has to do with it; also a shift that swamps x."""
    x, weight, bias = inputs(shape)
    shift = (factor * torch.randn(shape[:2], device=DEVICE)).requires_grad_()
    y = FusedGroupNorm.apply(x, weight, bias, 32, 0.1, True, shift)
    reference = expected(x.double() + shift.double()[:, :, None, None], weight, bias, eps=0.1)
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance)
    grad, wanted = torch.randn_like(y), (x, weight, bias, shift)
    ours = torch.autograd.grad(y, wanted, grad)
    theirs = torch.autograd.grad(reference, wanted, grad.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


@needs_triton
def test_kernel_takes_one_shift_for_all_frames(tiles):
    """Expanded, and at rest."""
    (x, weight, bias), shift = inputs(FEWER[0]), torch.randn(1, FEWER[0][1], device=DEVICE)
    y = FusedGroupNorm.apply(x, weight, bias, 32, 0.1, False, shift.expand(FEWER[0][:2]))
    shifted = x + shift[:, :, None, None]
    torch.testing.assert_close(y, fused(shifted, weight, bias, False, 0.1), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad is not None and shift.grad is None


@needs_triton
def test_frozen_weights_leave_the_other_gradients_as_they_are():
    x, weight, bias = inputs((2, 64, 7, 5))
    grad = torch.randn_like(x)
    all_three = torch.autograd.grad(fused(x, weight, bias), (x, weight, bias), grad)
    of_x, = torch.autograd.grad(fused(x, weight.detach(), bias.detach()), x, grad)
    of_bias, = torch.autograd.grad(fused(x.detach(), weight.detach(), bias), bias, grad)
    assert torch.equal(of_x, all_three[0]) and torch.equal(of_bias, all_three[2])


@needs_triton
@pytest.mark.parametrize("mean, std", [(1000.0, 1.0), (-3.0, 1e-3)])
def test_kernel_keeps_a_small_deviation_from_a_large_mean(mean, std, tiles):
    """Sums of squares would lose it: 1000^2 in fp32 is known to 0.06. What is left is the rounding of the
    mean, of which the input itself has as much."""
    x, weight, bias = inputs((2, 64, 6, 11), mean=mean, std=std)
    y, reference = fused(x, weight, bias), expected(x, weight, bias)
    atol = 1e-5 + 4 * abs(mean) / std * 2 ** -24
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=atol)
    grad = torch.randn_like(y)
    ours, = torch.autograd.grad(y, x, grad)
    theirs, = torch.autograd.grad(reference, x, grad.double())
    torch.testing.assert_close(ours * std, theirs.float() * std, rtol=1e-4, atol=10 * atol)


@needs_triton
def test_kernel_survives_an_outlier_in_front():
    """The pivot is the mean of the first rows; one that is far off costs little."""
    x, weight, bias = inputs((1, 32, 40, 16))
    with torch.no_grad():
        x[:, :, 0, 0] = 1000
    assert_close_relative(fused(x, weight, bias), expected(x, weight, bias), 1e-6)
    y = fused(x, weight, bias, False)[:, :, 1:]
    torch.testing.assert_close(y.double(), expected(x, weight, bias, False)[:, :, 1:], rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_rounds_once(dtype):
    """Arithmetic is fp32: the error is that of one rounding of the result, also behind the SiLU. (To bf16 the
    interpreter does not round, it cuts off.)"""
    x, weight, bias = inputs((2, 64, 5, 4), dtype)
    y, reference = fused(x, weight, bias), expected(x, weight, bias)
    eps = torch.finfo(dtype).eps / 2 * (2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), reference, rtol=1.01 * eps, atol=2e-5)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weight, bias), grad)
    theirs = torch.autograd.grad(reference, (x, weight, bias), grad.double())
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=2.02 * eps, atol=1e-4)     # theirs, too


@needs_triton
def test_half_precision_network_may_have_fp32_parameters():
    x, weight, bias = inputs((2, 64, 3, 3))
    y = fused(x.detach().bfloat16(), weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected(x.bfloat16(), weight, bias), rtol=2 ** -7, atol=1e-5)
    y.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


@needs_triton
@pytest.mark.filterwarnings("ignore:Input #[012] requires gradient and is not a double")
def test_kernel_gradcheck():
    """Against finite differences, no formula of ours or PyTorch's: wide steps, since it is fp32."""
    x, weight, bias = inputs((1, 32, 1, 2))
    assert torch.autograd.gradcheck(lambda *tensors: fused(*tensors, eps=0.1), (x, weight, bias), eps=1e-2,
                                    atol=1e-2, rtol=1e-2, nondet_tol=0.0, fast_mode=True)


@needs_triton
def test_kernel_is_bitwise_repeatable():
    x, weight, bias = inputs((2, 96, 7, 5))
    grad = torch.randn_like(x)
    results = []
    for _ in range(2):
        y = fused(x, weight, bias)
        results.append((y, *torch.autograd.grad(y, (x, weight, bias), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_triton
def test_kernel_takes_gradients_of_any_layout():
    x, weight, bias = inputs((2, 64, 3, 5))
    y, grad = fused(x, weight, bias), torch.randn(2, 64, 3, 5, device=DEVICE)
    first, second = (torch.autograd.grad(y, x, g, retain_graph=True)[0]
                     for g in (grad, grad.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(first, second)
    with pytest.raises(AssertionError, match="not channels-last"):
        fused(x.detach().contiguous(), weight, bias)


@needs_triton
def test_a_clip_is_a_view_of_its_frames():
    """(b f) c h w -> b c f s moves nothing, and is channels-last again: the same kernel, other tables."""
    x, weight, bias = inputs((6, 64, 2, 5))
    clips = x.unflatten(0, (2, 3)).transpose(1, 2).flatten(3)
    assert clips.data_ptr() == x.data_ptr() and clips.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(clips, weight, bias).double(), expected(clips, weight, bias),
                               rtol=1e-5, atol=1e-5)


@needs_triton
def test_no_frames_are_no_error():
    x, weight, bias = inputs((0, 64, 4, 4))
    fused(x, weight, bias).sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 23 GB of GPU memory")
@pytest.mark.parametrize("shape", [(25, 256, 576, 1024), (1, 256, 25, 576 * 1024)])
@torch.no_grad()
def test_more_elements_than_32_bits_can_count(shape):
    """The VAE's widest norms, 25 frames of 1024x576. Each row but for its number is one of 64."""
    pattern, weight, bias = inputs((1, 256, 1, 64), torch.bfloat16)
    x = pattern.repeat(shape[0], 1, shape[2], shape[3] // 64).contiguous(memory_format=torch.channels_last)
    y = fused(x, weight, bias)
    assert y.numel() > 2 ** 31
    torch.testing.assert_close(y[-1:, :, -1:, -64:].double(), expected(pattern, weight, bias),
                               rtol=0.004, atol=1e-4)


@pytest.mark.parametrize("silu", [True, False])
def test_module_is_pytorchs(silu):
    """The same keys, and elsewhere than on CUDA the same expression."""
    ours, theirs = (GroupNormSiLU if silu else GroupNorm)(32, 64, 1e-5), randomize(nn.GroupNorm(32, 64, 1e-5))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 64, 3, 5)
    y = F.silu(theirs(x)) if silu else theirs(x)
    assert torch.equal(ours(x), y)
    shift = torch.randn(2, 64)
    assert torch.equal(ours(x, shift), ours(x + shift[:, :, None, None]))
    ours, x, shift = ours.to(DEVICE), x.to(DEVICE), shift.to(DEVICE)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        torch.testing.assert_close(ours(x).cpu(), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x - shift[:, :, None, None], shift).cpu(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_module_keeps_a_small_deviation_from_a_large_mean(layout):
    """As the kernels do. (PyTorch's group norm of a channels-last CPU tensor subtracts squares of 1e6.)"""
    net, x = GroupNorm(32, 64).to(DEVICE), 1000 + torch.randn(2, 64, 9, 7, device=DEVICE)
    y = net(x.contiguous(memory_format=layout))
    torch.testing.assert_close(y.double(), F.group_norm(x.double(), 32), rtol=1e-4, atol=3e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="compiling the kernels takes a GPU")
def test_module_compiles_as_one_graph():
    net, (x, _, _) = GroupNormSiLU(32, 64).to(DEVICE), inputs((2, 64, 8, 8))
    compiled, grad = torch.compile(net, fullgraph=True), torch.randn_like(x)
    results = []
    for call in (net, compiled):
        y = call(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append((y, *torch.autograd.grad(y, (x, *net.parameters()), grad)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


# ---- LayerNorm ------------------------------------------------------------------------------------------

# .. c of tokens: SVD's and the toy world's widths, odd ones, one row, one column.
TOKENS = [(1, 2, 5, 320), (11, 96), (2, 7, 64), (1, 640), (3, 1280), (70, 33), (5, 1), (1, 3, 2)]


def expected_layer_norm(x, weight, bias, eps=1e-5):
    """In fp64, by PyTorch."""
    return F.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), eps)


def layer_norm_inputs(shape, dtype=torch.float32, mean=0.0):
    tensors = torch.randn(shape) + mean, torch.randn(shape[-1]), torch.randn(shape[-1])
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in tensors]


@needs_triton
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("shape", TOKENS)
def test_layer_norm_kernel_is_layer_norm(shape, mean, tiles):
    """Values and gradients as in fp64, less what the mean takes of fp32's digits."""
    tensors, tolerance = layer_norm_inputs(shape, mean=mean), 1e-5 * (1 + mean)
    y, reference = FusedLayerNorm.apply(*tensors, 1e-2), expected_layer_norm(*tensors, 1e-2)
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, tensors, grad, retain_graph=True)
    theirs = torch.autograd.grad(reference, tensors, grad.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)
    frozen = [tensor.detach() for tensor in tensors[1:]]
    y = FusedLayerNorm.apply(tensors[0], *frozen, 1e-2)
    torch.testing.assert_close(torch.autograd.grad(y, tensors[0], grad)[0], ours[0])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_kernel_rounds_once(dtype):
    """(To bf16 the interpreter cuts off.) The parameters may stay fp32."""
    eps = torch.finfo(dtype).eps / 2 * (2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1)
    for parameters in (dtype, torch.float32):
        x, weight, bias = layer_norm_inputs((9, 96), dtype)
        weight, bias = (tensor.detach().to(parameters).requires_grad_() for tensor in (weight, bias))
        y, reference = FusedLayerNorm.apply(x, weight, bias, 1e-5), expected_layer_norm(x, weight, bias)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), reference, rtol=1.01 * eps, atol=1e-5)
        grad = torch.randn_like(y)
        ours = torch.autograd.grad(y, (x, weight, bias), grad)
        theirs = torch.autograd.grad(reference, (x, weight, bias), grad.double())
        for a, b in zip(ours, theirs):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a.double(), b.double(), rtol=2.02 * eps, atol=1e-4)


@needs_triton
def test_layer_norm_kernel_takes_any_layout():
    """Of the input and of the gradient; and no rows at all."""
    _, weight, bias = layer_norm_inputs((64,))
    x = torch.randn(6, 64, 5, device=DEVICE).transpose(1, 2).requires_grad_()               # 6 5 64
    grad = torch.randn(6, 64, 5, device=DEVICE).transpose(1, 2)
    results = []
    for given, g in ((x, grad), (x.detach().contiguous().requires_grad_(), grad.contiguous())):
        y = FusedLayerNorm.apply(given, weight, bias, 1e-5)
        results.append((y, *torch.autograd.grad(y, (given, weight, bias), g)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    nothing = torch.empty(2, 0, 64, device=DEVICE, requires_grad=True)
    FusedLayerNorm.apply(nothing, weight, bias, 1e-5).sum().backward()
    assert nothing.grad.shape == nothing.shape and not weight.grad.any()


def test_layer_norm_module_is_pytorchs():
    """The same keys, and elsewhere than on CUDA the same expression; there the kernels."""
    ours, theirs, x = LayerNorm(96), randomize(nn.LayerNorm(96)), torch.randn(2, 5, 96)
    ours.load_state_dict(theirs.state_dict())
    y = theirs(x)
    assert torch.equal(ours(x), y) and torch.equal(ours.double()(x.double()), theirs.double()(x.double()))
    on_device = ours.float().to(DEVICE)(x.to(DEVICE))
    torch.testing.assert_close(on_device.cpu(), y, rtol=1e-5, atol=1e-5)
    assert DEVICE == "cpu" or "FusedLayerNorm" in on_device.grad_fn.name()


# ---- GEGLU ----------------------------------------------------------------------------------------------

# .. 2d of tokens: SVD's b f s 2d and widths that are no power of two, odd ones, one row, one column.
HALVES = [(1, 2, 5, 640), (3, 70), (2, 33, 192), (1, 2560), (300, 2), (7, 3, 34)]


def expected_geglu(x):
    """In fp64, by PyTorch."""
    x, gate = x.double().chunk(2, dim=-1)
    return x * F.gelu(gate)


@needs_triton
@pytest.mark.parametrize("shape", HALVES)
def test_geglu_kernel_is_pytorchs_expression(shape, tiles):
    """Values and gradients as in fp64; gates are wide enough to reach both ends of gelu."""
    x = (3 * torch.randn(shape, device=DEVICE)).requires_grad_()
    y, reference = FusedGEGLU.apply(x), expected_geglu(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    ours, = torch.autograd.grad(y, x, grad)
    theirs, = torch.autograd.grad(reference, x, grad.double())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")          # to inf, and exp(-inf) is 0
def test_geglu_kernel_far_from_zero():
    """Where gelu is its argument or 0: no exponential overflows, nothing becomes NaN."""
    gates = torch.tensor([-1e30, -1e4, -40., -13., -0., 0., 13., 40., 1e4, 1e30], device=DEVICE)
    x = torch.cat([torch.ones_like(gates), gates]).requires_grad_()
    y = FusedGEGLU.apply(x)
    torch.testing.assert_close(y, gates.clamp(min=0), rtol=1e-6, atol=1e-7)
    grad, = torch.autograd.grad(y.sum(), x)
    slope = (gates > 0).float() + 0.5 * (gates == 0)
    torch.testing.assert_close(grad, torch.cat([gates.clamp(min=0), slope]), rtol=1e-6, atol=1e-7)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_geglu_kernel_rounds_once(dtype):
    """So it is nearer to fp64 than PyTorch's two steps, forward and backward. (To bf16 the interpreter does
    not round, it cuts off: there the result in fp32 is rounded here.)"""
    x = torch.randn(40, 384, device=DEVICE).to(dtype).requires_grad_()
    x64, (hidden, gate) = x.detach().double().requires_grad_(), x.chunk(2, dim=-1)
    ours, theirs, exact = FusedGEGLU.apply(x), hidden * F.gelu(gate), expected_geglu(x64)
    assert ours.dtype == dtype
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        ours = FusedGEGLU.apply(x.float()).to(dtype)
    torch.testing.assert_close(ours.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)
    grad = torch.randn_like(ours)
    gradients = [torch.autograd.grad(y, given, grad.to(y.dtype))[0]
                 for y, given in ((ours, x), (theirs, x), (exact, x64))]
    for one, other, truth in ((ours, theirs, exact), gradients):
        assert relative_error(one, truth) < 0.8 * relative_error(other, truth)


@needs_triton
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_geglu_kernel_gradcheck():
    x = torch.randn(3, 12, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(FusedGEGLU.apply, (x,), eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=0.0,
                                    fast_mode=True)


@needs_triton
def test_geglu_kernel_takes_any_layout():
    """Of the input and of the gradient, which are made contiguous; and no tokens at all."""
    x = torch.randn(6, 64, 5, device=DEVICE).transpose(1, 2).requires_grad_()               # 6 5 64
    grad = torch.randn(6, 32, 5, device=DEVICE).transpose(1, 2)
    results = []
    for given, g in ((x, grad), (x.detach().contiguous().requires_grad_(), grad.contiguous())):
        y = FusedGEGLU.apply(given)
        results.append((y, *torch.autograd.grad(y, given, g)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    nothing = torch.empty(2, 0, 64, device=DEVICE, requires_grad=True)
    y = FusedGEGLU.apply(nothing)
    y.sum().backward()
    assert y.shape == (2, 0, 32) and nothing.grad.shape == nothing.shape
    with pytest.raises(AssertionError, match="no halves"):
        FusedGEGLU.apply(torch.zeros(2, 5, device=DEVICE))


@needs_triton
def test_geglu_kernel_in_a_checkpointed_layer_with_lora(monkeypatch):
    """The projection may be anything; what is computed twice is the same. Gradients reach input and LoRA."""
    net = randomize(model.FeedForward(24)).requires_grad_(False).to(DEVICE)
    net.net[0].proj = model.lora_beside(net.net[0].proj, 4, 4)
    nn.init.normal_(net.net[0].proj.lora_B.weight)
    x, grad = (torch.randn(2, 3, 24, device=DEVICE) for _ in range(2))
    wanted = [x.requires_grad_(), *(weight for weight in net.parameters() if weight.requires_grad)]
    assert len(wanted) == 3
    again, results = partial(checkpoint, net, use_reentrant=False), []
    for gate, run in ((expected_geglu, net), (FusedGEGLU.apply, net), (FusedGEGLU.apply, again)):
        monkeypatch.setattr(model, "geglu", lambda x: gate(x).to(x.dtype))
        y = run(x)
        results.append((y, *torch.autograd.grad(y, wanted, grad)))
    for exact, plain, checkpointed in zip(*results):
        assert torch.equal(plain, checkpointed)
        assert_close_relative(plain, exact, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_geglu_is_pytorchs(dtype):
    """Elsewhere than on CUDA, in fp64 and for torch.compile the same expression, bit by bit."""
    x = torch.randn(3, 5, 68, device=DEVICE).to(dtype)
    hidden, gate = x.chunk(2, dim=-1)
    compiled = torch.compile(geglu, backend="eager", fullgraph=True)
    for function in (compiled,) if DEVICE == "cuda" and dtype != torch.float64 else (geglu, compiled):
        assert torch.equal(function(x), hidden * F.gelu(gate))


@pytest.mark.skipif(DEVICE == "cpu", reason="compares with PyTorch's GPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens, c", [(2304, 320), (1000, 1280), (257, 33)])
def test_geglu_on_a_gpu(tokens, c, dtype):
    """SVD's widths, and an odd one, through the module: that on a GPU it is the kernels, and as exact."""
    tolerance = max(torch.finfo(dtype).eps / 2, 1e-6)
    net = randomize(model.GEGLU(c, 4 * c)).to(DEVICE, dtype)
    x = torch.randn(1, 2, tokens, c, device=DEVICE, dtype=dtype)                # b f s c
    projected = net.proj(x).detach().requires_grad_()
    y, reference = geglu(projected), expected_geglu(projected)
    assert torch.equal(y, net(x)) and "FusedGEGLU" in y.grad_fn.name()
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
    y = FusedGEGLU.apply(x)
    assert x.numel() > 2 ** 31
    y.backward(torch.ones_like(y))
    last = pattern.double().requires_grad_()
    expected_geglu(last).sum().backward()
    assert_close_relative(y[-8:], expected_geglu(pattern), 2 ** -8)
    assert_close_relative(x.grad[-8:], last.grad, 2 ** -8)


# ---- attention among frames ----------------------------------------------------------------------------

# b f s c and heads: SVD's and the toy world's; one frame, frames that fill a tile or one more, one pixel.
HEADS = [(1, 14, 6, 128, 2), (2, 5, 3, 32, 1), (1, 25, 2, 64, 1), (3, 16, 1, 48, 3), (1, 17, 2, 64, 4),
         (2, 1, 4, 32, 2), (1, 32, 1, 32, 1)]


def attention_inputs(b, f, s, c, heads, dtype=torch.float32, scale=2.0):
    return [(scale * torch.randn(b, f, s, c)).to(DEVICE, dtype).requires_grad_() for _ in "qkv"]


@needs_triton
@pytest.mark.parametrize("shape", HEADS)
def test_attention_kernel_is_pytorchs(shape):
    """Values and gradients as in fp64, by scaled_dot_product_attention."""
    qkv = attention_inputs(*shape)
    y = FusedFrameAttention.apply(*qkv, shape[-1])
    reference = frame_attention(*(x.double() for x in qkv), shape[-1])
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, qkv, grad)
    theirs = torch.autograd.grad(reference, qkv, grad.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@needs_triton
def test_attention_kernel_with_scores_that_overflow_exponentials():
    q, k, v = (x.detach() for x in attention_inputs(1, 6, 3, 32, 1, scale=30.0))
    y, reference = FusedFrameAttention.apply(q, k, v, 1), frame_attention(*(x.double() for x in (q, k, v)), 1)
    torch.testing.assert_close(y.double(), reference, rtol=1e-3, atol=1e-2)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_kernel_in_half_precision(dtype):
    """Weights and gradients of scores are rounded, then results. (The interpreter cannot multiply bf16.)"""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("for a GPU")
    qkv = attention_inputs(1, 14, 5, 64, 2, dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    results = []
    for inputs, function in ((exact, frame_attention), (qkv, FusedFrameAttention.apply)):
        y = function(*inputs, 2)
        results.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y) + y.detach())))
    assert {x.dtype for x in results[1]} == {dtype}
    for truth, ours in zip(*results):
        assert relative_error(ours, truth) < torch.finfo(dtype).eps


@needs_triton
def test_attention_kernel_takes_any_layout_of_inputs_and_gradients():
    qkv = attention_inputs(2, 5, 3, 32, 1)
    strange = [x.detach().transpose(0, 3).contiguous().transpose(0, 3).requires_grad_() for x in qkv]
    grad, results = torch.randn(32, 5, 3, 2, device=DEVICE).transpose(0, 3), []
    for inputs in (qkv, strange):
        y = FusedFrameAttention.apply(*inputs, 1)
        results.append((y, *torch.autograd.grad(y, inputs, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    nothing = [torch.empty(1, 5, 0, 32, device=DEVICE, requires_grad=True) for _ in "qkv"]
    FusedFrameAttention.apply(*nothing, 1).sum().backward()
    assert all(x.grad.shape == x.shape for x in nothing)


# ---- residual connections -------------------------------------------------------------------------------

RESIDUALS = [(joined, biased, scaled) for joined in (True, False) for biased in (True, "each", False)
             for scaled in (True, False)]


def residual_inputs(shape, joined=True, biased=True, scaled=True):
    """x and y, channels-last, bias, for all or for each of n, and scale; what is not wanted is None."""
    x, bias, _ = inputs(shape)
    y, scale = inputs(shape)[0], torch.rand(1, device=DEVICE, requires_grad=True)
    bias = torch.randn(shape[:2] if biased == "each" else shape[1], device=DEVICE, requires_grad=True)
    return x if joined else None, y, bias if biased else None, scale if scaled else None


@needs_triton
@pytest.mark.parametrize("given", RESIDUALS)
def test_residual_kernel_is_pytorchs_expression(given, tiles):
    """Values and gradients as in fp64, of each combination of what may be left out."""
    for shape in FEWER:
        tensors = residual_inputs(shape, *given)
        wanted = [tensor for tensor in tensors if tensor is not None]
        y = FusedResidual.apply(*tensors)
        reference = residual(*(None if tensor is None else tensor.double() for tensor in tensors))
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), reference, rtol=1e-6, atol=1e-6)
        grad = torch.randn_like(y)
        for layout in (torch.channels_last, torch.contiguous_format):
            ours = torch.autograd.grad(y, wanted, grad.contiguous(memory_format=layout), retain_graph=True)
            theirs = torch.autograd.grad(reference, wanted, grad.double(), retain_graph=True)
            for a, b in zip(ours, theirs):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_residual_kernel_rounds_once(dtype):
    """bias and scale may be fp32, or whatever x is. (To bf16 the interpreter cuts off.)"""
    x, y, bias, scale = (tensor.detach() for tensor in residual_inputs((2, 96, 5, 4)))
    eps = torch.finfo(dtype).eps / 2 * (2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1)
    x, y = x.to(dtype), y.to(dtype)
    for others in ((bias, scale), (bias.to(dtype), scale.to(dtype))):
        out, exact = FusedResidual.apply(x, y, *others), residual(*(t.double() for t in (x, y, *others)))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=1.01 * eps, atol=1e-6)


@needs_triton
def test_residual_keeps_nothing_that_does_not_train():
    """x + scale * (y + bias) with all but x and y frozen: their gradients need neither of them."""
    x, y, bias, scale = residual_inputs((2, 32, 4, 4))
    out = FusedResidual.apply(x, y, bias.detach(), scale.detach())
    assert [tensor.numel() for tensor in out.grad_fn.saved_tensors] == [1]
    with pytest.raises(AssertionError, match="not channels-last"):
        FusedResidual.apply(x, y.detach().contiguous(), None, None)


def as_if_on_a_gpu(x, channels_last=False):
    """For has_kernels: layouts and dtypes count, devices do not."""
    return x.dtype != torch.float64 and (
        not channels_last or x.is_contiguous(memory_format=torch.channels_last))


@needs_triton
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("c_in, c_emb, kind", [(64, 16, False), (32, None, True)])
def test_residual_blocks_with_kernels_are_those_in_fp64(monkeypatch, c_in, c_emb, kind, lora):
    """Of UNet and VAE, with and without a shortcut: output, and the gradients of all that trains."""
    monkeypatch.setattr(norm, "has_kernels", as_if_on_a_gpu)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net = randomize(model.SpatioTemporalResBlock(c_in, 64, c_emb, mix_is_temporal=kind)).to(DEVICE)
    if lora:
        model.add_lora(net, 2, targets=r"conv(1|2|_shortcut)|time_emb_proj")
        for layer in model.lora_layers(net).values():
            nn.init.normal_(layer.lora_B.weight)
    exact = copy.deepcopy(net).double()
    for parameter in (*net.parameters(), *exact.parameters()):
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    x = torch.randn(6, c_in, 5, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    emb = torch.randn(2, 16, device=DEVICE) if c_emb else None
    results, grad = [], torch.randn(6, 64, 5, 3, device=DEVICE)
    for block, dtype in ((net, torch.float32), (exact, torch.float64)):
        given = x.to(dtype).requires_grad_()
        out = block(given, 3, emb if emb is None else emb.to(dtype))
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        results.append((out, *torch.autograd.grad(out, (given, *trained), grad.to(dtype))))
    assert len(results[0]) > 8
    for one, other in zip(*results):
        assert_close_relative(one, other, 1e-5)


@needs_triton
def test_transformers_with_kernels_are_those_in_fp64(monkeypatch):
    """All their norms, gates and attention, of heads that have a kernel: output and gradients."""
    monkeypatch.setattr(norm, "has_kernels", as_if_on_a_gpu)
    net = randomize(model.SpatioTemporalTransformer(64, 2, 1, 24)).to(DEVICE)
    exact, results = copy.deepcopy(net).double(), []
    x, grad = (torch.randn(6, 64, 3, 2, device=DEVICE).contiguous(memory_format=torch.channels_last)
               for _ in range(2))
    context = torch.randn(2, 1, 24, device=DEVICE)
    for block, dtype in ((net, torch.float32), (exact, torch.float64)):
        given = x.to(dtype).requires_grad_()
        out = block(given, 3, context.to(dtype))
        wanted = given, *(weight for name, weight in block.named_parameters()
                          if not re.search(r"norm2|attn2\.to_[qk]", name))        # which have no influence
        results.append((out, *torch.autograd.grad(out, wanted, grad.to(dtype))))
    for one, other in zip(*results):
        assert_close_relative(one, other, 1e-5)
    with torch.no_grad():                                       # then the kernels of the way forward alone
        assert torch.equal(net(x, 3, context), results[0][0])


@pytest.mark.skipif(DEVICE == "cpu", reason="compares with PyTorch's GPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_on_a_gpu(dtype):
    """At a UNet's sizes: that on a GPU it is the kernels, and that they round a few times at most."""
    y, bias, scale = (tensor.detach().to(dtype) for tensor in residual_inputs((14, 320, 36, 64))[1:])
    x, *qkv = y.flip(0).contiguous(memory_format=torch.channels_last), *attention_inputs(1, 14, 2304, 320, 5)
    qkv = [tensor.detach().to(dtype) for tensor in qkv]
    for name, function, tensors in (
            ("FusedResidual", lambda *given: residual(*given, scale.to(given[0].dtype)), (x, y, bias)),
            ("FusedFrameAttention", partial(frame_attention, num_heads=5), qkv)):
        ours = [tensor.clone().requires_grad_() for tensor in tensors]
        exact = [tensor.double().requires_grad_() for tensor in tensors]
        out, reference = function(*ours), function(*exact)
        assert name in out.grad_fn.name()
        grad, tolerance = torch.randn_like(out), max(2 * torch.finfo(dtype).eps, 1e-5)
        for a, b in zip((out, *torch.autograd.grad(out, ours, grad)),
                        (reference, *torch.autograd.grad(reference, exact, grad.double()))):
            assert_close_relative(a, b, tolerance)


# ---- memory layout --------------------------------------------------------------------------------------


def watch(net):
    """Notes which convolutions and norms ran, and what they got or gave that is not channels-last. (The input
    of the first convolution comes from outside.)"""
    ran, wrong, last = [], {}, {"memory_format": torch.channels_last}

    def look(function, name, x, *others):
        out = function(x, *others)
        ran.append(name)
        for what, tensor in {"in": x, "out": out}.items():
            if not tensor.is_contiguous(**last) and f"{name} {what}" != "conv_in in":
                wrong[f"{name} {what}"] = tensor.shape, tensor.stride()
        return out

    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.GroupNorm)):
            method = "forward" if isinstance(module, nn.GroupNorm) else "_conv_forward"
            setattr(module, method, partial(look, getattr(module, method), name))
    return ran, wrong


@torch.no_grad()
def test_networks_stay_channels_last(tmp_path, monkeypatch):
    """Where there is a GPU, and here as if there were one, whose norms keep the layout, as PyTorch's would.

    Between frames, clips and tokens, through skips and resizes, and after loading, saving and casting: no
    convolution gets anything else, which would be converted first, and no norm, which would be slow."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(GroupNorm, "forward", lambda net, x, shift=None: nn.GroupNorm.forward(net, x))
    model.save_unet(randomize(model.UNet(**unet_config())), tmp_path / "unet")
    model.save_vae(randomize(model.VAE(**vae_config())), tmp_path / "vae")
    unet = model.load_unet(tmp_path, dtype=torch.bfloat16).to(DEVICE)
    vae = model.load_vae(tmp_path).to(DEVICE).bfloat16()
    watched = [watch(net) for net in (unet, vae.encoder, vae.decoder)]
    x, *rest = torch.randn(2, 3, 8, 8, 16), torch.randn(2), torch.randn(2, 1, 24), torch.rand(2, 3)
    unet(x.to(DEVICE), *(tensor.to(DEVICE) for tensor in rest))
    vae.encode(torch.randn(2, 3, 32, 16, device=DEVICE))
    vae.decode(torch.randn(6, 4, 4, 6, device=DEVICE), 3)
    for ran, wrong in watched:
        assert len(ran) > 20 and not wrong
