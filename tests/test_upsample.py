"""support/upsample.py: the fused kernel, in Triton's interpreter or on a GPU, against PyTorch in fp64."""
import math

import pytest
import torch
import torch.nn.functional as F

import discriminator
from discriminator import IMAGENET_MEAN, IMAGENET_STD
from support.upsample import FusedUpsampleNormalize, triton, upsample_normalize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(triton is None, reason="there is no Triton for this platform")
# The wide ones have several programs per row; a program has 8 rows.
SIZES = [((4, 4), (8, 8)), ((5, 7), (14, 28)), ((8, 6), (3, 5)), ((1, 1), (9, 4)), ((3, 9), (3, 9)),
         ((7, 5), (1, 1)), ((5, 16), (23, 73)), ((2, 30), (31, 17)), ((13, 3), (14, 2)),
         ((9, 150), (10, 602)), ((3, 300), (2, 77)), ((3, 2), (4, 701))]


def fused(x, size, dtype=None):
    return FusedUpsampleNormalize.apply(x, size, IMAGENET_MEAN, IMAGENET_STD, dtype or x.dtype)


def expected(x, size):
    """PyTorch's expression in fp64."""
    mean, std = (torch.tensor(v, dtype=torch.float64, device=x.device).view(3, 1, 1)
                 for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (F.interpolate(x.double(), size, mode="bilinear") - mean) / std


def place_error(size_in):
    """The tolerance for rounded positions. The position that an output pixel samples is an fp32 number up to
    max(size_in), and its rounding error is multiplied by the difference of neighbours over std, about 20."""
    return max(2e-5, 20 * max(size_in) * 2 ** -23)


@needs_triton
@pytest.mark.parametrize("size_in, size_out", SIZES)
def test_kernel_is_interpolate_and_normalise(size_in, size_out):
    """Values and gradients equal those in fp64: larger, smaller, odd, one-pixel and wide sizes."""
    x = torch.randn(2, 3, *size_in, device=DEVICE, requires_grad=True)
    y = fused(x, size_out)
    reference = expected(x, size_out)
    torch.testing.assert_close(y.double(), reference, rtol=0, atol=place_error(size_in))
    grad = torch.randn_like(y)
    ours, = torch.autograd.grad(y, x, grad)
    theirs, = torch.autograd.grad(reference, x, grad.double())
    # An input pixel sums about this many gradients, each divided by std, in fp32.
    terms = max(1, math.prod(size_out) / math.prod(size_in))
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=place_error(size_in) * terms)


@needs_triton
@pytest.mark.parametrize("dtype_in", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype_out", [torch.float32, torch.bfloat16])
def test_kernel_rounds_once(dtype_in, dtype_out):
    """Arithmetic is fp32 for every input and output dtype: the only error is the final rounding."""
    x = torch.randn(1, 3, 6, 5, device=DEVICE).to(dtype_in).requires_grad_()
    y = fused(x, (14, 14), dtype_out)
    assert y.dtype == dtype_out
    reference = expected(x, (14, 14))
    torch.testing.assert_close(y.double(), reference, rtol=torch.finfo(dtype_out).eps, atol=2e-5)
    y.sum().backward()
    assert x.grad.dtype == dtype_in
    gradient, = torch.autograd.grad(reference.sum(), x)
    torch.testing.assert_close(x.grad, gradient, rtol=torch.finfo(dtype_in).eps, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("view", [
    lambda x: x.to(memory_format=torch.channels_last), lambda x: x.transpose(2, 3),
    lambda x: x[:, :, ::2, 1:], lambda x: x[:1].expand(3, -1, -1, -1),
], ids=["channels last", "transposed", "sliced", "expanded"])
def test_kernel_takes_any_strides(view):
    base = torch.randn(2, 3, 8, 6, device=DEVICE, requires_grad=True)
    y, reference = fused(view(base), (10, 13)), expected(view(base), (10, 13))
    torch.testing.assert_close(y.double(), reference, rtol=0, atol=2e-5)
    grad = torch.randn_like(y).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)     # not contiguous
    ours, = torch.autograd.grad(y, base, grad)
    theirs, = torch.autograd.grad(reference, base, grad.double())
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-4)


@needs_triton
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_kernel_gradcheck():
    """The map is linear, so finite differences are exact for any step size, even in fp32."""
    x = torch.randn(1, 3, 2, 2, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fused(x, (3, 3)), x, eps=1.0, atol=1e-3, nondet_tol=0.0,
                                    fast_mode=True)


@needs_triton
def test_kernel_backward_is_bitwise_repeatable():
    x = torch.randn(2, 3, 9, 8, device=DEVICE, requires_grad=True)
    y = fused(x, (10, 42))
    grad = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@needs_triton
def test_no_frames_are_no_error():
    x = torch.empty(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    y = fused(x, (14, 14))
    assert y.shape == (0, 3, 14, 14)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 13 GB of GPU memory")
def test_more_elements_than_32_bits_can_count():
    x = torch.randn(2700, 3, 36, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y = fused(x, (518, 518))
    assert y.numel() > 2 ** 31
    torch.testing.assert_close(y[-1:].double(), expected(x[-1:], (518, 518)), rtol=0.01, atol=0.01)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad[0], x.grad[-1])


@pytest.mark.parametrize("size_in, size_out", SIZES)
def test_the_expression_elsewhere_is_the_same(size_in, size_out):
    x, atol = torch.randn(2, 3, *size_in), place_error(size_in)
    y = upsample_normalize(x, size_out, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(y.double(), expected(x, size_out), rtol=0, atol=atol)
    half = upsample_normalize(x.bfloat16(), size_out, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
    torch.testing.assert_close(half.double(), expected(x.bfloat16(), size_out), rtol=0, atol=atol)


def test_gradcheck_of_the_expression():
    x = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: upsample_normalize(x, (5, 2), IMAGENET_MEAN, IMAGENET_STD), x)


def test_discriminator_offers_it_too():
    """Part of the contract: discriminator.upsample_normalize."""
    assert discriminator.upsample_normalize is upsample_normalize
