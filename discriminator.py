"""The discriminator: frozen features of a video, and small trainable heads that judge them.

    upsample_normalize      latents -> the backbone's input size, ImageNet-normalised, in one kernel
    SpatialHead             Conv2d -> ResBlock2d -> Conv2d, each frame alone               (b f) c h w
    TemporalHead            Conv1d -> ResBlock1d -> Conv1d, each place alone             (b h w) c 1 f
    DinoFeatures            frozen DINOv2; what it looks at is the paper's main idea, `kind`:
        latent              the latents themselves, 4 -> 3 channels and upsampled: no VAE decoder (default)
        subpixel            the same through a sub-pixel convolution (version 2 of the paper, Appendix D)
        pixel               frames decoded by the VAE, as in ADD (arXiv 2311.17042)
    UNetFeatures            frozen encoder of the diffusion UNet, as in SF-V (arXiv 2406.04324): kind `unet`
    load_features           one of these, by its kind
    Discriminator           features and a pair of heads per level: latents [b f c h w] -> logits [b k]

OSV, arXiv 2409.11367, section 4.1 and Figs. 3 and 4. A spatial head sees no motion and a temporal head no
shape: with spatial heads alone the generator learns to repeat the first frame.
"""
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from model import ModelError, load_unet
from norm import GroupNorm, tl, triton  # None where there is no Triton
from solver import precondition

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ---------------------------------------------------------------------------------------------------------
# Upsample + normalise
#
# Bilinear weights are a product of a row's and a column's. Output row Y looks at the place
# y = (Y + 1/2) h / H - 1/2 among the input rows: lam = y - gap of it sees row gap + 1, 1 - lam row gap. Call
# "gap" the output rows that look between the same two input rows; those above the first row's centre, gap -1,
# see row 0 alone, those below the last one's, gap h - 1, row h - 1 alone. Columns alike. Then, per channel,
# (value - mean) / std. Both kernels walk down the gaps, so that a gap hands on to the next what they share.

if triton:

    @triton.jit
    def _first_output(place, scale):
        """The first output row (or column) that looks at `place` among the inputs or beyond."""
        return tl.maximum(tl.ceil((place + 0.5) / scale - 0.5).to(tl.int32), 0)

    @triton.jit
    def _outputs(gap, h, H, scale):
        """The output rows of a gap: the first, and the one after the last."""
        first = tl.where(gap < 0, 0, _first_output(gap, scale))
        end = tl.where(gap == h - 1, H, tl.minimum(_first_output(gap + 1, scale), H))
        return first, end

    @triton.jit
    def _of_channel(plane, a, b, c):
        channel = plane % 3
        return tl.where(channel == 0, a, tl.where(channel == 1, b, c))

    @triton.jit
    def _neighbours(row, x0, x1, inside):
        """An input row at the columns left and right of where the output's columns look."""
        return tl.load(row + x0, inside, 0.0), tl.load(row + x1, inside, 0.0)

    @triton.jit
    def _forward_kernel(x, out, h, w, H, W, W_by_VEC, scale_y, scale_x, mean0, mean1, mean2, std0, std1, std2,
                        GAPS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
        """One program: GAPS gaps, BLOCK columns of one plane. What remains per output pixel is one
        multiplication, one addition and the write. Programs that share a row follow each other, so that the
        cache sees a row whole: its pieces do not end where memory's 32-byte sectors do."""
        blocks, bands = tl.cdiv(W, BLOCK), tl.cdiv(h + 1, GAPS)
        program = tl.program_id(0)
        band, plane = program // blocks % bands, program // blocks // bands
        mean, std = _of_channel(plane, mean0, mean1, mean2), _of_channel(plane, std0, std1, std2)
        x += plane.to(tl.int64) * h * w                         # a plane fits 32 bits, a batch may not
        out += plane.to(tl.int64) * (H * W_by_VEC) * VEC        # says that it is a multiple: wider writes
        X = program % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = X // VEC < W_by_VEC
        place = tl.clamp((X + 0.5) * scale_x - 0.5, 0.0, w - 1.0)
        x0 = place.to(tl.int32)
        x1, lam = tl.minimum(x0 + 1, w - 1), place - x0
        top = band * GAPS - 1
        left, right = _neighbours(x + tl.maximum(top, 0) * w, x0, x1, inside)
        # Normalised already here: mixtures of two normalised rows are normalised, too.
        below = (left.to(tl.float32) * (1 - lam) + right.to(tl.float32) * lam - mean) / std
        left, right = _neighbours(x + tl.minimum(top + 1, h - 1) * w, x0, x1, inside)
        for k in range(0, tl.minimum(GAPS, h - top)):
            gap = top + k
            above = below
            below = (left.to(tl.float32) * (1 - lam) + right.to(tl.float32) * lam - mean) / std
            left, right = _neighbours(x + tl.minimum(gap + 2, h - 1) * w, x0, x1, inside)   # for the next gap
            slope = below - above
            first, end = _outputs(gap, h, H, scale_y)
            for row in range(0, end - first):
                Y = first + row
                value = above + slope * ((Y + 0.5) * scale_y - 0.5 - gap)
                tl.store(out + Y * W_by_VEC * VEC + X, value.to(out.dtype.element_ty), inside)

    @triton.jit
    def _backward_kernel(grad, grad_x, h, w, H, W, W_by_VEC, scale_y, scale_x, std0, std1, std2, STEP,
                         ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
                         VEC: tl.constexpr, AT_ONCE: tl.constexpr):
        """One program: ROWS rows, STEP columns of the input's gradient, gathered from the output pixels that
        looked at them: nothing is written twice, and the order of each sum is fixed. First down the BLOCK
        output columns, where neighbouring threads read neighbours, then once per row across the columns."""
        blocks, bands = tl.cdiv(w, STEP), tl.cdiv(h, ROWS)
        program = tl.program_id(0)
        band, plane = program // blocks % bands, program // blocks // bands
        grad += plane.to(tl.int64) * (H * W_by_VEC) * VEC
        grad_x += plane.to(tl.int64) * h * w
        start = program % blocks * STEP
        base = tl.where(start == 0, 0, _first_output(start - 1, scale_x)) // VEC * VEC
        X = base + tl.arange(0, BLOCK)
        # Column j is looked at from (j - 1, j + 1), with a weight that falls from 1 at j to 0 at the ends.
        j = start + tl.arange(0, COLUMNS)
        first = tl.where(j == 0, 0, _first_output(j - 1, scale_x))
        taps = first[None] + tl.arange(0, TAPS)[:, None]                                # TAPS COLUMNS
        place = tl.clamp((taps + 0.5) * scale_x - 0.5, 0.0, w - 1.0)
        weight = tl.maximum(1 - tl.abs(place - j[None]), 0.0) / _of_channel(plane, std0, std1, std2)
        weight = tl.where(taps < W, weight, 0.0)
        taps = tl.reshape(tl.minimum(taps - base, BLOCK - 1), [TAPS * COLUMNS])
        mine = (j < start + STEP) & (j < w)
        top = band * ROWS
        handed_on = tl.zeros([BLOCK], tl.float32)
        for k in range(0, tl.minimum(ROWS, h - top) + 1):
            gap = top - 1 + k
            first_row, end_row = _outputs(gap, h, H, scale_y)
            # lam = at_first + row * scale_y grows evenly, so two sums are enough: of g, and of row times g.
            plain, times_row = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for done in range(0, end_row - first_row, AT_ONCE):
                for more in tl.static_range(AT_ONCE):                       # so many reads are under way
                    row = done + more
                    there = X // VEC < tl.where(first_row + row < end_row, W_by_VEC, 0)
                    value = tl.load(grad + (first_row + row) * W_by_VEC * VEC + X, there, 0.0).to(tl.float32)
                    plain += value
                    times_row += row * value
            at_first = (first_row + 0.5) * scale_y - 0.5 - gap
            mixed = tl.where(gap == h - 1, 0.0, at_first * plain + scale_y * times_row)
            mixed = tl.where(gap < 0, plain, mixed)
            total, handed_on = handed_on + plain - mixed, mixed
            across = tl.reshape(tl.gather(total, taps, 0), [TAPS, COLUMNS])
            value = tl.sum(across * weight, axis=0).to(grad_x.dtype.element_ty)
            tl.store(grad_x + gap * w + j, value, mine & (k > 0))


class FusedUpsampleNormalize(torch.autograd.Function):
    """The kernels, on CUDA tensors (and on CPU tensors in Triton's interpreter, as CI runs them)."""

    @staticmethod
    def forward(ctx, x, size, mean, std, dtype):
        (n, c, h, w), (H, W) = x.shape, size
        assert c == 3 and max(h * w, H * W) < 2 ** 31, \
            f"[{n} {c} {h} {w}] -> {H}x{W}: not 3 channels, or too large"
        ctx.shape, ctx.dtype, ctx.size, ctx.std = x.shape, x.dtype, size, std
        out = x.new_empty((n, c, H, W), dtype=dtype)
        if n:
            vec, block, gaps = math.gcd(W, 8), 256, 8
            _forward_kernel[(n * c * triton.cdiv(h + 1, gaps) * triton.cdiv(W, block),)](
                x.contiguous(), out, h, w, H, W, W // vec, h / H, w / W, *mean, *std,
                GAPS=gaps, BLOCK=block, VEC=vec, num_warps=1)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (n, c, h, w), (H, W) = ctx.shape, ctx.size
        grad_x = grad.new_empty(ctx.shape, dtype=ctx.dtype)
        if n:
            vec, rows = math.gcd(W, 8), 8
            taps = triton.next_power_of_2(2 * W // w + 1)       # whole numbers in an interval of 2 W / w
            block = max(256, triton.next_power_of_2(2 * W // w + 1 + vec))
            step = min(w, 128, (block - vec) * w // W - 1)      # looked at from (step + 1) W / w places
            step = triton.cdiv(w, triton.cdiv(w, step))         # programs of one size
            _backward_kernel[(n * c * triton.cdiv(h, rows) * triton.cdiv(w, step),)](
                grad.contiguous(), grad_x, h, w, H, W, W // vec, h / H, w / W, *ctx.std, step,
                ROWS=rows, COLUMNS=triton.next_power_of_2(step), TAPS=taps, BLOCK=block, VEC=vec,
                AT_ONCE=8, num_warps=2)
        return grad_x, None, None, None, None


def upsample_normalize(x, size, mean, std, dtype=None):
    """Bilinear resize (align_corners=False, no antialiasing) to size (H, W), then (value - mean) / std.

    x [n 3 h w], fp32, fp16 or bf16, any strides -> [n 3 H W] contiguous, in `dtype` (default: that of x); the
    arithmetic is fp32. mean, std: three numbers each. Up or down, any sizes. On CUDA it is one Triton kernel
    forward and one backward, bitwise repeatable; elsewhere, and in fp64, it is the PyTorch expression.
    """
    dtype = dtype or x.dtype
    if triton and x.is_cuda and x.dtype != torch.float64:
        return FusedUpsampleNormalize.apply(x, tuple(size), tuple(mean), tuple(std), dtype)
    compute = torch.promote_types(x.dtype, torch.float32)
    mean, std = (torch.tensor(v, dtype=compute, device=x.device).view(3, 1, 1) for v in (mean, std))
    if not len(x):                                  # interpolate refuses an empty batch
        return x[:, :, :1, :1].expand(0, 3, *size).to(dtype)
    return ((F.interpolate(x.to(compute), tuple(size), mode="bilinear") - mean) / std).to(dtype)


# ---------------------------------------------------------------------------------------------------------
# Heads


class Head(nn.Module):
    """conv -> norm -> LeakyReLU -> residual block -> conv to one logit per place. Spectral norm on each
    convolution bounds how steep the judgement gets; there is no batch statistic in it, so a clip's logits do
    not depend on its neighbours. n c y x -> n 1 y x, fastest where channels are last in memory."""

    def __init__(self, c, width, kernel):
        super().__init__()
        conv = lambda c_in, c_out, kernel: spectral_norm(
            nn.Conv2d(c_in, c_out, kernel, padding=[k // 2 for k in kernel]))
        self.conv_in = conv(c, width, (1, 1))
        self.norm_in = GroupNorm(math.gcd(width, 8), width)
        self.conv_res = conv(width, width, kernel)
        self.norm_res = GroupNorm(math.gcd(width, 8), width)
        self.conv_out = conv(width, 1, kernel)

    def forward(self, x):
        x = F.leaky_relu(self.norm_in(self.conv_in(x)), 0.2)
        x = (x + F.leaky_relu(self.norm_res(self.conv_res(x)), 0.2)) * 0.5 ** 0.5       # keeps the variance
        return self.conv_out(x)


class SpatialHead(Head):
    """Judges each frame alone: (b f) c h w -> b k."""

    def __init__(self, c, width):
        super().__init__(c, width, kernel=(3, 3))

    def forward(self, x, num_frames):
        return rearrange(super().forward(x), "(b f) 1 h w -> b (f h w)", f=num_frames)


class TemporalHead(Head):
    """Judges the history of each place alone: (b f) c h w -> (b h w) c f -> b k. The paper's Conv1d: windows
    are 7 frames wide and one place high."""

    def __init__(self, c, width):
        super().__init__(c, width, kernel=(1, 7))

    def forward(self, x, num_frames):
        size = x.shape[-2:]
        x = rearrange(x, "(b f) c h w -> (b h w) f c", f=num_frames).mT[:, :, None]         # (b h w) c 1 f
        return rearrange(super().forward(x), "(b h w) 1 1 f -> b (f h w)", h=size[0], w=size[1])


# ---------------------------------------------------------------------------------------------------------
# Features


def load_dino(path):
    """DINOv2 of any size through transformers: a folder, or a hub id such as facebook/dinov2-small."""
    from transformers import Dinov2Model
    try:
        return Dinov2Model.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be loaded as a DINOv2 model ({error})") from error


class DinoFeatures(nn.Module):
    """Latents -> feature maps of a frozen DINOv2 at five depths.

    backbone        transformers' Dinov2Model
    kind            "latent", "subpixel" or "pixel": see the top of this file
    vae             for "pixel": the VAE whose decoder makes frames of latents; frozen too
    resolution      pixels: the backbone sees a picture of about this area in the video's aspect ratio, each
                    side a multiple of the patch size
    """

    SUBPIXEL = 4                                    # upscaling of the sub-pixel convolution (v2, Appendix D)
    LATENTS_AT_ONCE = 2 * 72 * 128                  # what the VAE decodes together: two frames of SVD's size

    def __init__(self, backbone, kind="latent", in_channels=4, vae=None, resolution=None):
        super().__init__()
        assert kind in ("latent", "subpixel", "pixel"), f"kind {kind!r}: not latent, subpixel or pixel"
        assert (vae is not None) == (kind == "pixel"), \
            f"kind {kind!r} {'needs a' if vae is None else 'has no'} vae"
        self.backbone, self.kind, self.vae = backbone, kind, vae
        config = backbone.config
        self.patch, self.resolution = config.patch_size, resolution or min(config.image_size, 224)
        # Blocks 2, 5, 8, 11 of 12 and the patch embedding before them; the same fractions of another depth.
        self.levels = [0] + [round(config.num_hidden_layers * (i + 1) / 4) for i in range(4)]
        self.channels = [config.hidden_size] * len(self.levels)
        if kind == "latent":
            self.to_rgb = nn.Conv2d(in_channels, 3, 1)
        elif kind == "subpixel":
            self.to_rgb = nn.Sequential(nn.Conv2d(in_channels, 3 * self.SUBPIXEL ** 2, 3, padding=1),
                                        nn.PixelShuffle(self.SUBPIXEL))

    def size_for(self, height, width):
        """Frame height and width -> what the backbone sees."""
        scale = self.resolution / math.sqrt(height * width) / self.patch
        return tuple(max(1, round(side * scale)) * self.patch for side in (height, width))

    def forward(self, latents, cond=None):          # b f c h w; cond is for other features
        num_frames = latents.shape[1]
        x = rearrange(latents, "b f c h w -> (b f) c h w")
        if self.kind == "pixel":
            x = self.decode(x / self.vae.config["scaling_factor"], num_frames)                  # (b f) 3 H W
        else:
            x = self.to_rgb(x)                                                                  # (b f) 3 h w
        # Values are taken to be in [-1, 1], the backbone was trained on [0, 1]: folded into mean and std.
        mean, std = ([2 * v - 1 for v in IMAGENET_MEAN], [2 * v for v in IMAGENET_STD])
        frames = upsample_normalize(x, self.size_for(*x.shape[2:]), mean, std, self.backbone.dtype)
        tokens = self.backbone(pixel_values=frames, output_hidden_states=True).hidden_states
        height = frames.shape[2] // self.patch
        # The CLS token, which knows the whole frame, joins each of its patches.
        return [rearrange(tokens[i][:, 1:] + tokens[i][:, :1], "n (h w) d -> n d h w", h=height)
                for i in self.levels]

    def decode(self, latents, num_frames):
        """(b f) c h w -> (b f) 3 H W. What a decoder keeps of a clip of SVD's size for the way back is more
        than a GPU has: large frames are decoded a few at a time, and again on the way back. Real and
        generated clips are cut at the same places."""
        at_once = max(1, self.LATENTS_AT_ONCE // latents[0, 0].numel())
        if num_frames <= at_once:
            return self.vae.decode(latents, num_frames)
        parts = [part for clip in latents.split(num_frames) for part in clip.split(at_once)]
        decode = partial(checkpoint, self.vae.decode, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([decode(part, len(part)) for part in parts])


class UNetFeatures(nn.Module):
    """Noised latents -> feature maps of the frozen UNet's way down, one per resolution (SF-V).

    The UNet knows only noisy latents, so real and generated ones get noise first: ln sigma ~ N(-1, 1). It
    also sees the condition, so it can tell a video that does not belong to its image.
    """

    LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.0, 1.0       # SF-V, Table 3: mean -2 does not train, 0 and 1 are worse

    def __init__(self, unet):
        super().__init__()
        self.backbone = unet
        self.channels = [block.resnets[-1].spatial_res_block.conv2.out_channels for block in unet.down_blocks]
        at, self.levels = 0, []                     # which of the way's outputs end a resolution
        for block in unet.down_blocks:
            at += len(block.resnets)
            self.levels.append(at)
            at += len(block.downsamplers)

    def forward(self, latents, cond):               # b f c h w
        sigma = torch.randn(len(latents), 1, 1, 1, 1, device=latents.device)
        sigma = (self.LOG_SIGMA_MEAN + self.LOG_SIGMA_STD * sigma).exp()                        # b 1 1 1 1
        c = precondition(sigma)
        x = c.c_in * (latents + sigma * torch.randn_like(latents))
        x = torch.cat([x, cond.image_latents.to(x.dtype)], dim=2)                               # b f 2c h w
        outputs, _, _ = self.backbone.encode(x, c.c_noise.flatten(), cond.image_embeds, cond.time_ids)
        return [outputs[i] for i in self.levels]


def load_features(kind, path, dino, vae):
    """What a discriminator of this kind looks at, as precise as `vae` and where it is. path: the pipeline's
    folder or hub id; dino: DINOv2's, or None for the one inside. Raises ModelError."""
    weight = vae.quant_conv.weight
    if kind == "unet":
        return UNetFeatures(load_unet(path, dtype=weight.dtype, device=weight.device))
    backbone = load_dino(dino or Path(path) / "dinov2").to(weight.device, weight.dtype)
    return DinoFeatures(backbone, kind, vae=vae if kind == "pixel" else None)


# ---------------------------------------------------------------------------------------------------------
# Discriminator


class Discriminator(nn.Module):
    """disc(latents [b f c h w], cond=None) -> logits [b k], k = every head's places; positive means real.

    The features' networks are frozen: they never train, never leave eval and never get gradients, though
    gradients pass through them to the latents. What trains are the heads and the map from latents to pixels.
    features: DinoFeatures or UNetFeatures, or any module with `.channels` that maps (latents, cond) to a list
    of maps [(b f) c h w]. heads: which kinds, for ablations.
    """

    def __init__(self, features, heads=("spatial", "temporal"), width=128):
        super().__init__()
        self.features = features
        kinds = {"spatial": SpatialHead, "temporal": TemporalHead}
        self.heads = nn.ModuleList(
            nn.ModuleDict({name: kinds[name](c, min(c, width)) for name in heads}) for c in features.channels)
        networks = getattr(features, "backbone", None), getattr(features, "vae", None)
        self.frozen = [net for net in networks if net]
        self.train().requires_grad_(True)

    def train(self, mode=True):
        super().train(mode)
        for net in self.frozen:
            net.eval()
        return self

    def requires_grad_(self, requires_grad=True):
        """Switches what trains; the frozen networks stay frozen whatever is asked."""
        super().requires_grad_(requires_grad)
        for net in self.frozen:
            net.requires_grad_(False)
        return self

    def forward(self, latents, cond=None):
        num_frames = latents.shape[1]
        maps = self.features(latents, cond)                                     # levels of (b f) c h w
        dtype = maps[0].dtype                   # heads are fp32, but compute in what the features come in
        with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            logits = [head(x, num_frames) for x, heads in zip(maps, self.heads) for head in heads.values()]
        return torch.cat([x.float() for x in logits], dim=1)                                          # b k
