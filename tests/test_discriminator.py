"""The fused kernel in Triton's interpreter (or on a GPU), the heads, and who gets gradients."""
import math
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                # read when Triton is imported

import pytest
import torch.nn.functional as F
from conftest import randomize, unet_config, vae_config
from torch import nn

import losses
import model
from discriminator import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DinoFeatures,
    Discriminator,
    FusedUpsampleNormalize,
    SpatialHead,
    TemporalHead,
    UNetFeatures,
    triton,
    upsample_normalize,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(triton is None, reason="there is no Triton for this platform")
SIZES = [((4, 4), (8, 8)), ((5, 7), (14, 28)), ((8, 6), (3, 5)), ((1, 1), (9, 4)), ((3, 9), (3, 9)),
         ((7, 5), (1, 1)), ((9, 16), (41, 73)), ((2, 30), (31, 17)), ((13, 3), (14, 2)),
         ((10, 150), (13, 602)), ((9, 300), (5, 77)), ((3, 2), (4, 701))]      # many programs a row; one wide

# ---- upsample + normalise -------------------------------------------------------------------------------


def fused(x, size, dtype=None):
    return FusedUpsampleNormalize.apply(x, size, IMAGENET_MEAN, IMAGENET_STD, dtype or x.dtype)


def expected(x, size):
    """In fp64, by PyTorch."""
    mean, std = (torch.tensor(v, dtype=torch.float64, device=x.device).view(3, 1, 1)
                 for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (F.interpolate(x.double(), size, mode="bilinear") - mean) / std


def place_error(size_in):
    """Where an output pixel looks is an fp32 number up to max(size_in), so its rounding grows with that,
    times the difference of neighbours over std, about 20."""
    return max(2e-5, 20 * max(size_in) * 2 ** -23)


@needs_triton
@pytest.mark.parametrize("size_in, size_out", SIZES)
def test_kernel_is_interpolate_and_normalise(size_in, size_out):
    """Up, down, odd, one pixel, wide: values and gradients as in fp64."""
    x = torch.randn(2, 3, *size_in, device=DEVICE, requires_grad=True)
    y = fused(x, size_out)
    reference = expected(x, size_out)
    torch.testing.assert_close(y.double(), reference, rtol=0, atol=place_error(size_in))
    grad = torch.randn_like(y)
    ours, = torch.autograd.grad(y, x, grad)
    theirs, = torch.autograd.grad(reference, x, grad.double())
    # A pixel sums about this many gradients, each divided by std, in fp32.
    terms = max(1, math.prod(size_out) / math.prod(size_in))
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=place_error(size_in) * terms)


@needs_triton
@pytest.mark.parametrize("dtype_in", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype_out", [torch.float32, torch.bfloat16])
def test_kernel_rounds_once(dtype_in, dtype_out):
    """Arithmetic is fp32 whatever goes in and out: the error is that of one rounding of the result."""
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
    grad = torch.randn_like(y).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)     # strides of its own
    ours, = torch.autograd.grad(y, base, grad)
    theirs, = torch.autograd.grad(reference, base, grad.double())
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-4)


@needs_triton
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_kernel_gradcheck():
    """The map is linear, so finite differences are exact for any step, also in fp32."""
    x = torch.randn(1, 3, 2, 2, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fused(x, (3, 3)), x, eps=1.0, atol=1e-3, nondet_tol=0.0,
                                    fast_mode=True)


@needs_triton
def test_kernel_backward_is_bitwise_repeatable():
    x = torch.randn(2, 3, 9, 8, device=DEVICE, requires_grad=True)
    y = fused(x, (28, 42))
    grad = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@needs_triton
@pytest.mark.parametrize("apply", [
    fused, lambda x, size: upsample_normalize(x, size, IMAGENET_MEAN, IMAGENET_STD)])
def test_no_frames_are_no_error(apply):
    x = torch.empty(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    y = apply(x, (14, 14))
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


# ---- heads ----------------------------------------------------------------------------------------------


def test_a_spatial_head_sees_no_motion():
    """Frames in another order: the same logits in another order."""
    head, x, order = SpatialHead(8, 8).eval(), torch.randn(6, 8, 3, 4), torch.tensor([3, 0, 5, 1, 4, 2])
    logits = head(x, 6).view(6, 12)
    torch.testing.assert_close(head(x[order], 6).view(6, 12), logits[order])


def test_a_temporal_head_sees_motion_but_no_shape():
    head, x = TemporalHead(8, 8).eval(), torch.randn(6, 8, 3, 4)
    logits = head(x, 6)
    shuffled = head(x[[3, 0, 5, 1, 4, 2]], 6)
    assert abs(logits.sum() - shuffled.sum()) > 1e-3
    places = torch.randperm(12)
    moved = head(x.flatten(2)[:, :, places].view_as(x), 6)
    torch.testing.assert_close(moved.view(6, 12), logits.view(6, 12)[:, places])


def test_spectral_norm_bounds_every_convolution():
    head = SpatialHead(8, 8)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "original" in name:
                parameter.mul_(50)
        for _ in range(200):
            head(torch.randn(2, 8, 4, 4), 2)        # each training pass is one step of power iteration
    for conv in (head.conv_in, head.conv_res, head.conv_out):
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2).item() == pytest.approx(1, abs=0.02)


# ---- discriminator --------------------------------------------------------------------------------------


def small_dino(num_layers=4, image_size=56):
    from transformers import Dinov2Config, Dinov2Model
    config = Dinov2Config(hidden_size=32, num_hidden_layers=num_layers, num_attention_heads=2,
                          image_size=image_size, patch_size=14)
    return Dinov2Model(config)


def build(kind, **settings):
    """A discriminator of each kind, and a condition for the one that wants it."""
    torch.manual_seed(0)
    if kind == "unet":
        features = UNetFeatures(randomize(model.UNet(**unet_config())))
    else:
        vae = randomize(model.VAE(**vae_config())) if kind == "pixel" else None
        features = DinoFeatures(small_dino(), kind, vae=vae)
    return Discriminator(features, **settings)


def inputs(num_clips=2, num_frames=3, height=8, width=8):
    shape = num_clips, num_frames, 4, height, width
    cond = model.Cond(torch.randn(num_clips, 1, 24), torch.randn(shape), torch.rand(num_clips, 3))
    return torch.randn(shape, requires_grad=True), cond


@pytest.mark.parametrize("kind", ["latent", "subpixel", "pixel", "unet"])
def test_gradients_reach_latents_and_heads_but_never_the_frozen_network(kind):
    disc = build(kind)
    latents, cond = inputs()
    logits = disc(latents, cond)
    assert logits.ndim == 2 and len(logits) == 2 and logits.dtype == torch.float32
    logits.square().sum().backward()
    assert latents.grad.abs().sum() > 0
    frozen = {id(p) for net in disc.frozen for p in net.parameters()}
    assert frozen
    for name, parameter in disc.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in frozen), name


def test_large_frames_are_decoded_a_few_at_a_time(monkeypatch):
    """And again on the way back: the same as each part decoded by itself, forward and backward."""
    disc = build("pixel")
    features, (latents, _) = disc.features, inputs(2, 3)
    flat = latents.flatten(0, 1)                                                            # (b f) c h w
    whole = features.decode(flat, 3)
    monkeypatch.setattr(DinoFeatures, "LATENTS_AT_ONCE", 2 * 8 * 8)
    cut = features.decode(flat, 3)
    parts = torch.cat([features.vae.decode(part, len(part)) for part in flat.split([2, 1, 2, 1])])
    assert torch.equal(cut, parts) and not torch.equal(cut, whole)
    ours, theirs = (torch.autograd.grad(x.square().sum(), latents)[0] for x in (cut, parts))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_frozen_network_stays_frozen_whatever_is_asked():
    disc = build("latent")
    disc.train().requires_grad_(True)
    assert not disc.features.backbone.training and disc.heads.training
    assert not any(p.requires_grad for p in disc.features.backbone.parameters())
    assert all(p.requires_grad for p in disc.heads.parameters())
    disc.requires_grad_(False)
    assert not any(p.requires_grad for p in disc.parameters())


@pytest.mark.parametrize("kind", ["latent", "subpixel", "pixel"])
def test_a_clip_is_judged_alone(kind):
    disc = build(kind).eval()
    latents, _ = inputs(3)
    torch.testing.assert_close(disc(latents)[1:2], disc(latents[1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height, width", [(8, 8), (5, 9), (9, 16), (16, 3), (1, 1)])
def test_any_latent_size(height, width):
    disc = build("latent")
    latents, _ = inputs(1, 2, height, width)
    rows, columns = (side // 14 for side in disc.features.size_for(height, width))
    assert disc(latents).shape == (1, 5 * 2 * 2 * rows * columns)      # levels, kinds of head, frames, places
    if height > 1:
        assert rows / columns == pytest.approx(height / width, rel=0.5)


def test_levels_are_those_of_the_paper_relatives():
    assert DinoFeatures(small_dino(12)).levels == [0, 3, 6, 9, 12]  # after blocks 2 5 8 11, counted from 0
    assert DinoFeatures(small_dino(4)).levels == [0, 1, 2, 3, 4]


def test_cls_joins_every_patch_token():
    features = DinoFeatures(small_dino()).eval()
    latents, _ = inputs(1, 2)
    seen = []
    features.backbone.embeddings.register_forward_hook(lambda module, args, out: seen.append(out))
    maps = features(latents)
    tokens = seen[0]                                                    # (b f) 1 + p d
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), tokens[:, 1:] + tokens[:, :1])
    assert [m.shape for m in maps] == [(2, 32, 4, 4)] * 5


def test_order_of_heads_does_not_change_the_losses():
    latents, _ = inputs()
    one, two = build("latent").eval(), build("latent", heads=("temporal", "spatial")).eval()
    two.load_state_dict(one.state_dict())
    a, b = one(latents), two(latents)
    assert not torch.equal(a, b)
    torch.testing.assert_close(losses.hinge_d(a, a), losses.hinge_d(b, b))
    torch.testing.assert_close(losses.hinge_g(a), losses.hinge_g(b))


def test_each_step_gives_gradients_to_its_own_network_only():
    """As the trainers route them: the D step sees the sample detached, the G step sees D frozen."""
    disc, net = build("latent"), nn.Conv3d(4, 4, 1)
    real, _ = inputs()
    fake = net(torch.randn(2, 4, 3, 8, 8)).transpose(1, 2)              # b f c h w
    losses.hinge_d(disc(real.detach()), disc(fake.detach())).backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in disc.heads.parameters())
    disc.zero_grad(set_to_none=True)
    disc.requires_grad_(False)
    losses.hinge_g(disc(fake)).backward()
    assert all(p.grad is None for p in disc.parameters())
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_it_learns_what_only_temporal_heads_can_see():
    """Clips that brighten against the same with frames shuffled: each frame alone is as likely in both."""
    torch.manual_seed(0)
    loss = {}
    for heads in (("spatial",), ("temporal",)):
        disc = build("latent", heads=heads, width=16)
        trained = [p for p in disc.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=5e-3, betas=(0.0, 0.99))
        for _ in range(20):
            start = torch.randn(8, 1, 1, 1, 1)
            real = (start + torch.linspace(-1, 1, 6).view(1, 6, 1, 1, 1)).expand(8, 6, 4, 4, 4)
            fake = torch.stack([clip[torch.randperm(6)] for clip in real])
            loss[heads] = losses.hinge_d(disc(real), disc(fake))
            optimizer.zero_grad()
            loss[heads].backward()
            optimizer.step()
    assert loss[("spatial",)] > 1.8                                     # 2 is knowing nothing
    assert loss[("temporal",)] < 1.4
