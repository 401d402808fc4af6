"""Stable Video Diffusion in plain PyTorch: the networks, and how they get on and off the disk.

    UNet         denoiser; spatial layers of an image model, each followed by a temporal one      unet/
    VAE          pixels <-> latents, 8x smaller; per-frame encoder, temporal decoder               vae/
    Cond         what the UNet is told about the clip: encode_condition(), unconditional()
    LoRA         add_lora, merge_lora, save_lora, load_lora
    load_*       load_unet, load_vae, load_image_encoder: a folder in the diffusers layout, or a hub id
    save_*       save_unet, save_vae, save_image_encoder, save_configs: the same layout, as diffusers opens it
    export       a student and the rest of its pipeline in one folder, with a model card; a command, too:

    $ python model.py export --model assets/toy --student out/stage2/merged --output_dir out/osv
    $ python model.py merge --model stabilityai/... --student lora.safetensors --output_dir out/merged

Attribute names are those of the published checkpoint, so that loading is a strict `load_state_dict` with
no key mapping. Layout inside the networks is (b f) c h w: frames ride in the batch, and every temporal
layer regroups them by itself; on a GPU nothing moves for that, since in memory channels come last.
Letters in shape comments: b clips, f frames, c d channels, h w latent size, s positions (h w), n any batch.

Blattmann et al., "Stable Video Diffusion" (arXiv 2311.15127) describes the networks; the parameterisation
of their output (EDM with v-prediction) is in solver.py.
"""
import argparse
import json
import math
import re
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from clip import CLIPVision, clip_pixels
from norm import GroupNorm, GroupNormSiLU, LayerNorm, add_tokens, frame_attention, geglu, residual

ASSETS = Path(__file__).resolve().parent / "assets"
NORM_GROUPS = 32                                   # every GroupNorm of SVD
PIXELS_AT_ONCE = 2 ** 21                           # of frames that the VAE's decoder enlarges together
SVD = "stabilityai/stable-video-diffusion-img2vid"
STABILITY = ("model.diffusion_model.", "first_stage_model.", "conditioner.", "input_blocks.")   # and its keys
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ModelError(ValueError):
    """A checkpoint that cannot be used. The message says what, where and what to do."""


# ---------------------------------------------------------------------------------------------------------
# Layers that UNet and VAE share


def channels_last(net):
    """Where there is a GPU: the channels of all convolutions' weights go last in memory. A convolution's
    output follows its weight, and all else here follows its input: this sets the layout of the network."""
    if torch.cuda.is_available():
        for weight in net.parameters():
            if weight.ndim > 3:
                weight.data = weight.data.movedim(1, -1).contiguous().movedim(-1, 1)


def sinusoid(x, dim):
    """Sinusoidal embedding of x [n] -> [n dim]: cosines first, periods from 2 pi to 2 pi 10^4."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x.float()[:, None] * frequencies                                   # n dim/2
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                      # n dim


class MLP(nn.Module):
    """The two-layer embedding network of noise level, time ids and frame index."""

    def __init__(self, c_in, c_hidden, c_out):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_hidden)
        self.linear_2 = nn.Linear(c_hidden, c_out)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class TemporalConv(nn.Conv3d):
    """A (3, 1, 1) convolution. Each pixel's history is a row of its own, so it runs as a 2-D convolution."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, (3, 1, 1), padding=(1, 0, 0))

    def _conv_forward(self, x, weight, bias):                                   # b c f s
        return F.conv2d(x, weight[..., 0], bias, padding=(1, 0))


def without_bias(conv, x):
    """conv(x) less the bias, which on a GPU is a slow pass of its own: what follows takes it along.
    _conv_forward is what the forward of PyTorch's convolutions calls, and of all of ours."""
    return conv._conv_forward(x, conv.weight, None)


class ResBlock(nn.Module):
    """Residual block on each frame alone, (b f) c h w: 3x3 convolutions, told the noise level by a shift."""

    conv = partial(nn.Conv2d, kernel_size=3, padding=1)

    def __init__(self, c_in, c_out, c_emb=None, eps=1e-6):
        super().__init__()
        self.norm1 = GroupNormSiLU(NORM_GROUPS, c_in, eps)
        self.conv1 = self.conv(c_in, c_out)
        if c_emb:
            self.time_emb_proj = nn.Linear(c_emb, c_out)
        self.norm2 = GroupNormSiLU(NORM_GROUPS, c_out, eps)
        self.conv2 = self.conv(c_out, c_out)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def change(self, x, emb=None):                                              # n c .. .., b d
        """What the block adds to its input, less the bias of conv2."""
        h, shift = without_bias(self.conv1, self.norm1(x)), self.conv1.bias[None]           # 1 c
        if emb is not None:                                                     # one row per clip
            shift = shift + self.time_emb_proj(F.silu(emb))                     # b c
        shift = repeat(shift, "b c -> (b f) c", f=len(h) // len(shift))
        h = self.norm2(h, shift)                                                # lets go of what it was
        return without_bias(self.conv2, h)

    def forward(self, x, emb=None):
        change, bias = self.change(x, emb), self.conv2.bias
        if hasattr(self, "conv_shortcut"):
            x, bias = without_bias(self.conv_shortcut, x), bias + self.conv_shortcut.bias
        return residual(x, change, bias)


class TemporalResBlock(ResBlock):
    """The same along time, b c f s; s are the pixels. Its norms see all frames of a clip together."""

    conv = TemporalConv


class TimeMixer(nn.Module):
    """alpha * spatial + (1 - alpha) * temporal, alpha = sigmoid(mix_factor) learned per layer."""

    def __init__(self, mix_factor):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([float(mix_factor)]))

    def alpha(self, x):                                                         # 1, in the dtype of x
        return self.mix_factor.sigmoid().to(x.dtype)

    def forward(self, spatial, temporal):
        return torch.lerp(temporal, spatial, self.alpha(spatial))


class SpatioTemporalResBlock(nn.Module):
    """ResBlock on frames, TemporalResBlock on pixels, mixed: alpha x + (1 - alpha) (x + change), which is
    x + (1 - alpha) change, one pass over memory. The decoder of the VAE stores the mixing weight of the
    temporal branch instead of the spatial one: `mix_is_temporal`."""

    def __init__(self, c_in, c_out, c_emb=None, eps=1e-6, temporal_eps=None, mix_factor=0.5,
                 mix_is_temporal=False):
        super().__init__()
        self.spatial_res_block = ResBlock(c_in, c_out, c_emb, eps)
        self.temporal_res_block = TemporalResBlock(c_out, c_out, c_emb, temporal_eps or eps)
        self.time_mixer = TimeMixer(mix_factor)
        self.mix_is_temporal = mix_is_temporal

    def forward(self, x, num_frames, emb=None):                                 # (b f) c h w
        return self.on_clips(self.on_frames(x, emb), num_frames, emb)

    def on_frames(self, x, emb=None, enlarge=None):
        """The spatial half. enlarge: a layer that frames pass first, and if no gradient is wanted a few at a
        time: where it halves the channels, all of them in front of it would be most of a decoder's memory."""
        if not enlarge:
            return self.spatial_res_block(x, emb)
        together = len(x) if torch.is_grad_enabled() else max(1, PIXELS_AT_ONCE // (4 * x[0, 0].numel()))
        return torch.cat([self.spatial_res_block(enlarge(part)) for part in x.split(together)])

    def on_clips(self, x, num_frames, emb=None):
        height, alpha, temporal = x.shape[2], self.time_mixer.alpha(x), self.temporal_res_block
        x = rearrange(x, "(b f) c h w -> b c f (h w)", f=num_frames)
        scale = alpha if self.mix_is_temporal else 1 - alpha
        x = residual(x, temporal.change(x, emb), temporal.conv2.bias, scale)    # b c f s
        return rearrange(x, "b c f (h w) -> (b f) c h w", h=height)


class Attention(nn.Module):
    """Multi-head self-attention among the pixels of each frame, x [b f s c]."""

    def __init__(self, c, c_context=None, num_heads=1, bias=False):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(c, c, bias=bias)
        self.to_k = nn.Linear(c_context or c, c, bias=bias)
        self.to_v = nn.Linear(c_context or c, c, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.to_out[0](self.attend(q, k, v, self.num_heads))

    @staticmethod
    def attend(q, k, v, num_heads):
        b = len(q)
        q, k, v = (rearrange(x, "b f s (a c) -> (b f) a s c", a=num_heads) for x in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "(b f) a s c -> b f s (a c)", b=b)


class TemporalAttention(Attention):
    """The same among the frames, each pixel alone."""

    attend = staticmethod(frame_attention)


class Downsample(nn.Module):
    """3x3 convolution with stride 2. padding 1 pads all around (UNet). 2 is for the VAE, which pads by 1 at
    bottom and right only: that is all but the first row and column of it, and needs no padded copy of x."""

    def __init__(self, c, padding):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=padding)

    def forward(self, x):
        x = without_bias(self.conv, x)
        x = x if self.conv.padding[0] == 1 else x[..., 1:, 1:]                  # which residual makes whole
        return residual(None, x, self.conv.bias)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):                                                       # n c h w
        h = without_bias(self.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return residual(None, h, self.conv.bias)                                # n c 2h 2w


class FoldedUpsample(Upsample):
    """The same for the VAE, in a third of the time: of the nine taps those that fall on the same small pixel
    are added up beforehand, at most four are left. That is a transposed 4x4 convolution with stride 2, which
    needs no enlarged copy of x. It takes the weight as it is: no LoRA beside it would be seen."""

    def forward(self, x):                                                       # n c h w
        h = F.conv_transpose2d(x, self.folded(), stride=2, padding=1)
        return residual(None, h, self.conv.bias)                                # n c 2h 2w

    def folded(self):
        """The 4x4 weight. It is the 3x3 one turned round, as transposed convolutions have it, and then as x
        would have been, doubled: each number is put on 2x2 places."""
        weight = self.conv.weight.flip(2, 3).transpose(0, 1)                    # c_in c_out 3 3
        weight = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)           # c_in c_out 4 4
        return weight.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------
# UNet


class ContextAttention(Attention):
    """Cross-attention to the image embedding, which is a single token.

    The softmax over one key is 1 for every query, so attention returns to_out(to_v(context)) whatever the
    query: one row per clip instead of one per pixel, exactly. to_q and to_k (and the norm before them) have
    no influence and no gradient; they stay because the checkpoint holds them.
    """

    def forward(self, context):                                                 # b 1 d
        return self.to_out[0](self.to_v(context))                               # b 1 c


class GEGLU(nn.Module):
    """Gated linear unit (Shazeer, arXiv 2002.05202)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x):
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.net = nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c))      # 1 was a dropout

    def forward(self, x):
        return self.net(x)


class SpatialTransformerBlock(nn.Module):
    """Attention among the pixels of a frame, then to the image embedding, then feed-forward."""

    attention = Attention

    def __init__(self, c, num_heads, c_context):
        super().__init__()
        self.norm1 = LayerNorm(c)
        self.attn1 = self.attention(c, num_heads=num_heads)
        self.norm2 = LayerNorm(c)
        self.attn2 = ContextAttention(c, c_context)
        self.norm3 = LayerNorm(c)
        self.ff = FeedForward(c)

    def forward(self, x, context):                                              # b f s c,  b 1 d
        x = add_tokens(x, self.attn1(self.norm1(x)), self.attn2(context)[:, 0])
        return x + self.ff(self.norm3(x))


class TemporalTransformerBlock(SpatialTransformerBlock):
    """The same along time, with one more feed-forward in front."""

    attention = TemporalAttention

    def __init__(self, c, num_heads, c_context):
        super().__init__(c, num_heads, c_context)
        self.norm_in = LayerNorm(c)
        self.ff_in = FeedForward(c)

    def forward(self, x, context):
        return super().forward(x + self.ff_in(self.norm_in(x)), context)


class SpatioTemporalTransformer(nn.Module):
    """Pairs of spatial and temporal transformer blocks, mixed, around one residual connection."""

    def __init__(self, c, num_heads, num_layers, c_context):
        super().__init__()
        self.norm = GroupNorm(NORM_GROUPS, c, 1e-6)
        self.proj_in = nn.Linear(c, c)
        self.transformer_blocks = nn.ModuleList(
            SpatialTransformerBlock(c, num_heads, c_context) for _ in range(num_layers))
        self.temporal_transformer_blocks = nn.ModuleList(
            TemporalTransformerBlock(c, num_heads, c_context) for _ in range(num_layers))
        self.time_pos_embed = MLP(c, 4 * c, c)
        self.time_mixer = TimeMixer(0.5)
        self.proj_out = nn.Linear(c, c)

    def forward(self, x, num_frames, context):                                  # (b f) c h w
        residual, height = x, x.shape[2]
        frame = torch.arange(num_frames, device=x.device)
        position = self.time_pos_embed(sinusoid(frame, x.shape[1]).to(x.dtype))[:, None]    # f 1 c
        x = self.proj_in(rearrange(self.norm(x), "(b f) c h w -> b f (h w) c", f=num_frames))       # b f s c
        for spatial_block, temporal_block in zip(self.transformer_blocks, self.temporal_transformer_blocks):
            x = spatial_block(x, context)
            x = self.time_mixer(x, temporal_block(x + position, context))
        return residual + rearrange(self.proj_out(x), "b f (h w) c -> (b f) c h w", h=height)


class UNetBlock(nn.Module):
    """One resolution of the UNet: layers of a residual block each and, where there is one, a transformer.

    On the way down each layer's output is appended to `skips`; on the way up each layer's input is joined
    with the last of them. With `checkpointing` a layer keeps only its input for the backward pass and
    computes the rest again: the same gradients, a third more time, a fraction of the memory.
    """

    checkpointing = False

    def __init__(self, channels_in, c, c_emb, transformers=(), down=False, up=False, eps=1e-6):
        """channels_in: input channels of each residual block; transformers: arguments of the
        SpatioTemporalTransformer behind each, as far as they go; down, up: ends in a resize by 2."""
        super().__init__()
        self.resnets = nn.ModuleList(SpatioTemporalResBlock(c_in, c, c_emb, eps) for c_in in channels_in)
        self.attentions = nn.ModuleList(SpatioTemporalTransformer(c, *sizes) for sizes in transformers)
        self.downsamplers = nn.ModuleList([Downsample(c, padding=1)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c)] if up else [])

    def layer(self, i, x, num_frames, emb, context):
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self.run_layer(i, x, num_frames, emb, context)
        # The reentrant kind: it hooks nothing on the many tensors that a layer would keep, a third less for a
        # processor to do, and a CUDA graph can hold it. It lets gradients through only if an input wants one.
        inputs = i, x if x.requires_grad else x.detach().requires_grad_(), num_frames, emb, context
        return checkpoint(self.run_layer, *inputs, use_reentrant=True, preserve_rng_state=False)

    def run_layer(self, i, x, num_frames, emb, context):
        x = self.resnets[i](x, num_frames, emb)
        return self.attentions[i](x, num_frames, context) if i < len(self.attentions) else x

    def down(self, x, skips, num_frames, emb, context):
        for i in range(len(self.resnets)):
            x = self.layer(i, x, num_frames, emb, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x

    def up(self, x, skips, num_frames, emb, context):
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), num_frames, emb, context)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class UNet(nn.Module):
    """SVD's spatio-temporal UNet. Keyword arguments are the keys of unet/config.json; the defaults are SVD's
    own, 1,524,623,082 parameters. Settings that SVD's layout has per block may be one number for all."""

    class_name = "UNetSpatioTemporalConditionModel"                             # in diffusers

    def __init__(
        self, *, in_channels=8, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
        transformer_layers_per_block=1, num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024,
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=768, num_frames=14, sample_size=96,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        channels, depth = list(block_out_channels), len(block_out_channels)
        layers, transformer_layers, heads, c_context = per_level = [
            [v] * depth if isinstance(v, int) else list(v) for v in (
                layers_per_block, transformer_layers_per_block, num_attention_heads, cross_attention_dim)]
        if any(len(setting) != depth for setting in (*per_level, down_block_types, up_block_types)):
            raise ModelError(f"block_out_channels has {depth} levels, another setting has more or fewer")
        if any(c % a for c, a in zip(channels, heads)):
            raise ModelError(f"num_attention_heads {heads} do not divide block_out_channels {channels}")
        kinds = {f"{cross}{way}BlockSpatioTemporal": bool(cross)
                 for cross in ("CrossAttn", "") for way in ("Down", "Up")}
        c_first, c_emb = channels[0], 4 * channels[0]
        transformers = list(zip(heads, transformer_layers, c_context))

        self.conv_in = nn.Conv2d(in_channels, c_first, 3, padding=1)
        self.time_embedding = MLP(c_first, c_emb, c_emb)
        self.add_embedding = MLP(projection_class_embeddings_input_dim, c_emb, c_emb)

        # On the way down every layer's output is kept: first conv_in's, then per level one per layer and one
        # for the downsampler. The way up takes them back in reverse, one layer more per level.
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        c, c_skips = c_first, [c_first]
        for i, kind in enumerate(down_block_types):
            last = i == depth - 1
            self.down_blocks.append(UNetBlock(
                [c] + [channels[i]] * (layers[i] - 1), channels[i], c_emb,
                [transformers[i]] * layers[i] if kinds[kind] else [], down=not last,
                eps=1e-6 if kinds[kind] else 1e-5))
            c = channels[i]
            c_skips += [c] * (layers[i] + (not last))
        self.mid_block = UNetBlock([c, c], c, c_emb, transformers[-1:], eps=1e-5)
        for i, kind in zip(reversed(range(depth)), up_block_types):
            channels_in = []
            for _ in range(layers[i] + 1):
                channels_in.append(c + c_skips.pop())
                c = channels[i]
            self.up_blocks.append(UNetBlock(
                channels_in, c, c_emb, [transformers[i]] * len(channels_in) if kinds[kind] else [], up=i > 0))

        self.conv_norm_out = GroupNormSiLU(NORM_GROUPS, c, 1e-5)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)
        channels_last(self)

    def set_checkpointing(self, on=True):
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            block.checkpointing = on

    def forward(self, x, c_noise, image_embeds, time_ids):
        """Raw output F_x of the network.

        x             b f 8 h w   c_in-scaled noisy latent, then the condition latent; h, w multiples of 8
        c_noise       b           0.25 ln(sigma)
        image_embeds  b 1 d       CLIP embedding of the first frame
        time_ids      b 3         (fps - 1, motion bucket, noise augmentation)
        returns       b f 4 h w   in the dtype of x, whatever the network computes in
        """
        dtype_in, num_frames = x.dtype, x.shape[1]
        skips, emb, context = self.encode(x, c_noise, image_embeds, time_ids)
        x = self.mid_block.down(skips[-1], [], num_frames, emb, context)        # whose layers nobody skips to
        for block in self.up_blocks:
            x = block.up(x, skips, num_frames, emb, context)
        x = self.conv_out(self.conv_norm_out(x))                                # (b f) 4 h w
        return rearrange(x, "(b f) c h w -> b f c h w", f=num_frames).to(dtype_in)

    def encode(self, x, c_noise, image_embeds, time_ids):
        """The way down. Returns the output of every layer on it, (b f) c h w each, and what the blocks that
        follow need besides: emb [b d] of noise level and ids, context [b 1 d]."""
        num_clips, num_frames, _, height, width = x.shape
        stride = 2 ** (len(self.down_blocks) - 1)
        assert height % stride == 0 and width % stride == 0, \
            f"latent size {height}x{width}: not a multiple of {stride}"
        assert image_embeds.shape[:2] == (num_clips, 1), f"image_embeds {[*image_embeds.shape]}: not [b 1 d]"
        dtype = self.conv_in.weight.dtype
        x, context = rearrange(x, "b f c h w -> (b f) c h w").to(dtype), image_embeds.to(dtype)

        noise_level = sinusoid(c_noise, self.time_embedding.linear_1.in_features).to(dtype)          # b c
        ids = sinusoid(rearrange(time_ids, "b n -> (b n)"), self.config["addition_time_embed_dim"])
        ids = rearrange(ids.to(dtype), "(b n) c -> b (n c)", b=num_clips)
        emb = self.time_embedding(noise_level) + self.add_embedding(ids)        # b d

        x = self.conv_in(x)                                                     # (b f) c h w
        skips = [x]
        for block in self.down_blocks:
            x = block.down(x, skips, num_frames, emb, context)
        return skips, emb, context


# ---------------------------------------------------------------------------------------------------------
# VAE


class ImageAttention(Attention):
    """Single-head attention among all pixels of a frame, with norm and residual: the middle of the VAE."""

    def __init__(self, c):
        super().__init__(c, bias=True)
        self.group_norm = GroupNorm(NORM_GROUPS, c, 1e-6)

    def forward(self, x):                                                       # n c h w
        h = super().forward(rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c"))
        return x + rearrange(h, "n 1 (h w) c -> n c h w", h=x.shape[2])


class VAELevel(nn.Module):
    """One resolution of encoder or decoder: residual blocks, then a resize, but for the last; enlarging is
    left to the first block of the next one. Or the middle, with an attention between two residual blocks. (A
    checkpoint with more of them there carries weights that its reference implementation never runs, and
    neither do we.)"""

    def __init__(self, resnets, attentions=(), down=(), up=()):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x, num_frames=None, enlarge=None):            # which the blocks of the decoder ask for
        for i, resnet in enumerate(self.resnets[:2] if self.attentions else self.resnets):
            for attention in self.attentions[:i]:
                x = attention(x)
            if num_frames:                          # half by half: the first one lets go of its input
                x = resnet.on_frames(x, enlarge=enlarge)
                x, enlarge = resnet.on_clips(x, num_frames), None
            else:
                x = resnet(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class Encoder(nn.Module):
    """Frames one by one: n 3 H W -> n 2*latent h w."""

    def __init__(self, c_in, c_latent, channels, num_layers):
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (c, c_out) in enumerate(zip([channels[0], *channels], channels), 1):
            resnets = [ResBlock(c_out if j else c, c_out) for j in range(num_layers)]
            down = [Downsample(c_out, padding=2)] if i < len(channels) else []
            self.down_blocks.append(VAELevel(resnets, down=down))
        c = channels[-1]
        self.mid_block = VAELevel([ResBlock(c, c), ResBlock(c, c)], [ImageAttention(c)])
        self.conv_norm_out = GroupNormSiLU(NORM_GROUPS, c, 1e-6)
        self.conv_out = nn.Conv2d(c, 2 * c_latent, 3, padding=1)

    def forward(self, x):
        x = residual(None, without_bias(self.conv_in, x), self.conv_in.bias)
        for level in (*self.down_blocks, self.mid_block):
            x = level(x)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """All frames of a clip together, so that they do not flicker: (b f) latent h w -> (b f) 3 H W."""

    def __init__(self, c_image, c_latent, channels, num_layers):
        super().__init__()
        block = partial(SpatioTemporalResBlock, temporal_eps=1e-5, mix_factor=0.0, mix_is_temporal=True)
        channels = channels[::-1]                                               # from the bottom up
        c = channels[0]
        self.conv_in = nn.Conv2d(c_latent, c, 3, padding=1)
        self.mid_block = VAELevel([block(c, c) for _ in range(num_layers)], [ImageAttention(c)])
        self.up_blocks = nn.ModuleList()
        for i, (c, c_out) in enumerate(zip([channels[0], *channels], channels), 1):
            resnets = [block(c_out if j else c, c_out) for j in range(num_layers + 1)]
            self.up_blocks.append(VAELevel(resnets, up=[FoldedUpsample(c_out)] if i < len(channels) else []))
        self.conv_norm_out = GroupNormSiLU(NORM_GROUPS, channels[-1], 1e-6)
        self.conv_out = nn.Conv2d(channels[-1], c_image, 3, padding=1)
        self.time_conv_out = TemporalConv(c_image, c_image)

    def forward(self, x, num_frames):
        x, enlarge = self.conv_in(x), None
        for level in (self.mid_block, *self.up_blocks):
            x = level(x, num_frames, enlarge)
            enlarge, = level.upsamplers or [None]
        x = self.conv_out(self.conv_norm_out(x))                                # (b f) 3 H W
        height = x.shape[2]
        x = self.time_conv_out(rearrange(x, "(b f) c h w -> b c f (h w)", f=num_frames))
        return rearrange(x, "b c f (h w) -> (b f) c h w", h=height)


class VAE(nn.Module):
    """SVD's autoencoder. Keyword arguments are the keys of vae/config.json; the defaults are SVD's own.

    Latents here are unscaled. Diffusion works on latents * config["scaling_factor"] (unit variance), while
    the condition latent enters the UNet unscaled.
    """

    class_name = "AutoencoderKLTemporalDecoder"                                 # in diffusers

    def __init__(
        self, *, in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4, scaling_factor=0.18215,
        sample_size=768, force_upcast=True,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.encoder = Encoder(in_channels, latent_channels, block_out_channels, layers_per_block)
        self.decoder = Decoder(out_channels, latent_channels, block_out_channels, layers_per_block)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        channels_last(self)

    def moments(self, frames):
        """frames [n 3 H W] in [-1, 1] -> mean and log-variance [n 4 h w] of the Gaussian posterior."""
        stride = 2 ** (len(self.encoder.down_blocks) - 1)
        assert frames.shape[2] % stride == 0 and frames.shape[3] % stride == 0, \
            f"frame size {frames.shape[2]}x{frames.shape[3]}: not a multiple of {stride}"
        moments = self.quant_conv(self.encoder(frames.to(self.quant_conv.weight.dtype)))
        mean, logvar = moments.to(frames.dtype).chunk(2, dim=1)                 # n 4 h w each
        return mean, logvar.clamp(-30, 20)

    def encode(self, frames):
        """frames [n 3 H W] in [-1, 1] -> mode [n 4 h w], unscaled. Each frame is encoded by itself; so that
        memory does not grow with their number, of 1024x576 only 5 at a time."""
        return torch.cat([self.moments(x)[0] for x in frames.split(1 + 8_000_000 // frames[0].numel())])

    def decode(self, latents, num_frames):
        """latents [n 4 h w] unscaled, n a multiple of num_frames -> frames [n 3 H W], about in [-1, 1]."""
        assert len(latents) % num_frames == 0, f"{len(latents)} latents: not whole clips of {num_frames}"
        return self.decoder(latents.to(self.quant_conv.weight.dtype), num_frames).to(latents.dtype)


# ---------------------------------------------------------------------------------------------------------
# Image conditioning


class Cond(NamedTuple):
    """What the UNet is told about a clip besides the noisy latent."""

    image_embeds: torch.Tensor      # b 1 d      CLIP embedding of the clean image
    image_latents: torch.Tensor    # b f 4 h w  VAE mode of the noise-augmented image, unscaled, on each frame
    time_ids: torch.Tensor          # b 3        fps - 1, motion bucket, noise augmentation


def default_size(unet):
    """(width, height) that a UNet was trained for. SVD's config says 768 square; it was trained wide."""
    side = 8 * unet.config["sample_size"]
    return (1024, 576) if side == 768 else (side, side)


def unconditional(cond):
    """The same clip without its image: zero embedding and zero latents, as in SVD's training dropout."""
    return cond._replace(image_embeds=torch.zeros_like(cond.image_embeds),
                         image_latents=torch.zeros_like(cond.image_latents))


def embed_image(image_encoder, images):
    """images [n 3 H W] in [-1, 1] -> CLIP embedding [n 1 d]."""
    pixels = clip_pixels(images).to(image_encoder.visual_projection.weight.dtype)
    return image_encoder(pixels)[:, None].to(images.dtype)                      # n 1 d


def encode_condition(vae, image_encoder, images, noise, *, num_frames, fps, motion_bucket_id,
                     noise_aug_strength):
    """What SVD is told about clips that start with `images`.

    images, noise       b 3 H W   pixels in [-1, 1]; standard normal, added with std `noise_aug_strength`
    fps                 frames per second; SVD was trained on the number fps - 1
    motion_bucket_id    1 (still) to 255 (fast); a number, or a tensor [b]
    """
    latents = vae.encode(images + noise_aug_strength * noise)                   # b 4 h w, unscaled
    ids = [torch.as_tensor(v, dtype=torch.float32, device=images.device).expand(len(images))
           for v in (fps - 1, motion_bucket_id, noise_aug_strength)]
    return Cond(embed_image(image_encoder, images), repeat(latents, "b c h w -> b f c h w", f=num_frames),
                torch.stack(ids, dim=1))


# ---------------------------------------------------------------------------------------------------------
# LoRA (Hu et al., arXiv 2106.09685)

LORA_TARGETS = r"attn1\.to_[qkv]|attn2\.to_v|attn[12]\.to_out\.0|ff(_in)?\.net\.(0\.proj|2)"
LORA_CONVS = LORA_TARGETS + r"|proj_(in|out)|conv(1|2|_shortcut)|time_emb_proj|(down|up)samplers\.0\.conv"
LORA_FILE = "pytorch_lora_weights.safetensors"                                  # diffusers' name
PEFT_FILE = "adapter_model.safetensors"                                         # PEFT's own, with a config


class LoRALinear(nn.Linear):
    """W x + b + alpha / rank * B A x, with W and b those of the linear layer it takes the place of."""

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)                    # not nn.Linear's: no second weight is allocated
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # What trains is fp32, whatever the network is.
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=self.weight.device)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=self.weight.device)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)          # starts as the layer it replaces
        self.rank, self.alpha, self.active = rank, alpha, True

    def forward(self, x):
        if not self.active:
            return super().forward(x)
        low = F.linear(x, self.lora_A.weight.to(x.dtype)).flatten(0, -2)                    # n rank
        out, B = super().forward(x), self.lora_B.weight.to(x.dtype)
        return torch.addmm(out.flatten(0, -2), low, B.T, alpha=self.alpha / self.rank).view_as(out)


class LoRAConv:
    """The same beside a convolution: A has its window, and B makes its channels of the rank's. A mixin."""

    def __init__(self, conv, rank, alpha):
        nn.Module.__init__(self)                    # then all that the convolution is, but its modules
        self.__dict__ |= {key: value for key, value in vars(conv).items() if key != "_modules"}
        self.plain = [conv]                         # in a list, so no module of this one; they share weights
        kind = nn.Conv3d if isinstance(conv, TemporalConv) else nn.Conv2d
        like = dict(bias=False, device=self.weight.device)
        self.lora_A = kind(self.in_channels, rank, self.kernel_size, **like)
        self.lora_B = kind(rank, self.out_channels, 1, **like)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)
        self.rank, self.alpha, self.active = rank, alpha, True

    def _conv_forward(self, x, weight, bias):
        out = super()._conv_forward(x, weight, bias)
        if not self.active:
            return out
        # 2-D, those of a TemporalConv too: r c kh kw, c r 1 1
        A, B = (m.weight.to(x.dtype).reshape(m.weight.shape[:4]) for m in (self.lora_A, self.lora_B))
        delta = F.conv2d(F.conv2d(x, A, None, self.stride[:2], self.padding[:2]), B)
        return torch.add(out, delta, alpha=self.alpha / self.rank)


class LoRAConv2d(LoRAConv, nn.Conv2d):
    """Of each frame."""


class LoRATemporalConv(LoRAConv, TemporalConv):
    """Of each pixel's history."""


LORA_LAYERS = nn.Linear, nn.Conv2d, TemporalConv


def lora_beside(layer, rank, alpha):
    """What takes the place of one of LORA_LAYERS."""
    return dict(zip(LORA_LAYERS, (LoRALinear, LoRAConv2d, LoRATemporalConv)))[type(layer)](layer, rank, alpha)


def add_lora(unet, rank, alpha=None, targets=LORA_TARGETS):
    """Freezes the network and puts a trainable low-rank update beside each linear layer and convolution that
    `targets` names: a regular expression for the end of the path. alpha defaults to rank (scale 1).

    The default is all of attention and feed-forward but attn2.to_q and to_k, which have no influence (see
    ContextAttention). LORA_CONVS is a longer list, that of LCM-LoRA's published adapters and PCM: with
    all convolutions, what leads into and out of transformers, and the shift that tells the noise level.
    Returns the network. Raises ModelError if nothing matches.
    """
    assert rank > 0, f"rank {rank}: not positive"
    if lora_layers(unet):
        raise ModelError("the network has LoRA layers already: merge_lora them first")
    unet.requires_grad_(False)
    layers = {path: layer for path, layer in unet.named_modules()
              if type(layer) in LORA_LAYERS and re.search(rf"(^|\.)({targets})$", path)}
    if not layers:
        raise ModelError(f"no layer's name ends in {targets!r}: nothing to add LoRA to")
    for path, layer in layers.items():
        unet.set_submodule(path, lora_beside(layer, rank, rank if alpha is None else alpha))
    return unet


def lora_layers(unet):
    """{path: layer} of the LoRA layers in a network."""
    return {path: layer for path, layer in unet.named_modules() if hasattr(layer, "lora_A")}


@contextmanager
def without_lora(unet):
    """The network as it was before add_lora, for as long as the context lasts."""
    layers = lora_layers(unet).values()
    for layer in layers:
        layer.active = False
    try:
        yield unet
    finally:
        for layer in layers:
            layer.active = True


@torch.no_grad()
def merge_lora(unet, scale=1):
    """Folds every update into its layer, in place: same outputs, no extra cost. scale=-1 takes an update that
    was merged out again, up to rounding. Returns the network."""
    for path, layer in lora_layers(unet).items():
        plain = layer.plain[0] if isinstance(layer, LoRAConv) else nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        delta = layer.lora_B.weight.flatten(1) @ layer.lora_A.weight.flatten(1)     # of a convolution, too
        delta = delta.view_as(layer.weight) * (scale * layer.alpha / layer.rank)
        plain.weight = nn.Parameter((layer.weight.float() + delta).to(layer.weight.dtype))
        plain.bias = layer.bias
        unet.set_submodule(path, plain)
    return unet


def save_lora(unet, folder):
    """Writes the update alone, with PEFT's key names: unet.<path>.lora_A.weight and .lora_B.weight."""
    layers = lora_layers(unet)
    if not layers:
        raise ModelError("the network has no LoRA layers to save: call add_lora first")
    tensors = {f"unet.{path}.lora_{m}.weight": getattr(layer, f"lora_{m}").weight
               for path, layer in layers.items() for m in "AB"}
    sizes = {(layer.rank, layer.alpha) for layer in layers.values()}
    if len(sizes) > 1:
        raise ModelError(f"LoRA layers of different (rank, alpha) {sorted(sizes)} do not fit one file")
    (rank, alpha), = sizes
    settings = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": sorted(layers)}
    write_safetensors(Path(folder) / LORA_FILE, tensors, {"lora_adapter_metadata": json.dumps(settings)})


def lora_file(path):
    """The file of a LoRA: `path` itself or, in a folder, the name that diffusers or PEFT gives it."""
    inside = [file for file in (Path(path) / LORA_FILE, Path(path) / PEFT_FILE) if file.is_file()]
    return inside[0] if inside else Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)


def load_lora(unet, path, whole=True):
    """Puts the update saved at `path` (a folder or a .safetensors file) beside the layers of a network. Whole
    weights that trained with it, as in stage 2's student.safetensors, take the place of the network's; with
    whole=False they do not fit.
    Returns the network. Raises ModelError for a key or shape that does not fit, and then changes nothing."""
    file, metadata = lora_file(path), {}
    tensors = {re.sub(r"^(unet|base_model\.model)\.", "", key): tensor
               for key, tensor in read_safetensors([file], metadata)}
    if not tensors:
        raise ModelError(f"{file}: no LoRA weights in it")
    if file.name == PEFT_FILE:                                      # its settings are in a file of their own
        metadata["lora_adapter_metadata"] = json.dumps(read_json(file.with_name("adapter_config.json")))
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        settings = {key.removeprefix("unet."): value for key, value in settings.items()}
        alpha = None if settings.get("lora_alpha") is None else settings["lora_alpha"] + 0
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: its lora_adapter_metadata cannot be read ({error})") from error
    for setting in ("use_rslora", "alpha_pattern"):               # scales that alpha / rank does not describe
        if settings.get(setting):
            raise ModelError(f"{file}: made with {setting}, which is not supported")
    layers = {p: m for p, m in unet.named_modules() if type(m) in LORA_LAYERS}
    loaded, own = {}, dict(unet.named_parameters())
    fitting = {key: tensors.pop(key) for key in own
               if whole and key in tensors and tensors[key].shape == own[key].shape}
    for path in sorted({key.rsplit(".lora_", 1)[0] for key in tensors}):
        pair = [tensors.pop(f"{path}.lora_{m}.weight", None) for m in "AB"]
        if path not in layers or None in pair:
            raise ModelError(f"{file}: {path}.lora_* does not fit a layer of this network")
        out, *window = layers[path].weight.shape                    # c_in, and of a convolution height, width
        found, rank = [tuple(t.shape) for t in pair], pair[0].numel() // math.prod(window)
        shapes = [(rank, *window), (out, rank, *[1] * (len(window) - 1))]
        if found != shapes or not rank:
            raise ModelError(f"{file}: {path}.lora_A and lora_B have shapes {found}, not {shapes}")
        loaded[path] = lora_beside(layers[path], rank, rank if alpha is None else alpha)
        loaded[path].lora_A.weight.data.copy_(pair[0])
        loaded[path].lora_B.weight.data.copy_(pair[1])
    if tensors:
        raise ModelError(f"{file}: key {next(iter(tensors))} is not a LoRA weight with PEFT's names")
    for key, tensor in fitting.items():
        own[key].data.copy_(tensor)
    for path, layer in loaded.items():
        unet.set_submodule(path, layer)
    return unet


# ---------------------------------------------------------------------------------------------------------
# On and off the disk: the diffusers folder layout, safetensors only (nothing here unpickles)


def load_unet(path, *, variant=None, revision=None, dtype=torch.float32, device="cpu"):
    """The UNet at `path`: a folder with config.json and weights, a pipeline folder, or a hub id with a unet/
    inside. variant: "fp16" reads *.fp16.safetensors. Raises ModelError with what is wrong and what to do."""
    return load_network(UNet, find_folder(path, "unet", variant, revision), variant, dtype, device)


def load_vae(path, *, variant=None, revision=None, dtype=torch.float32, device="cpu"):
    """Same as load_unet, for vae/."""
    return load_network(VAE, find_folder(path, "vae", variant, revision), variant, dtype, device)


def load_image_encoder(path, *, variant=None, revision=None, dtype=torch.float32, device="cpu"):
    """Same as load_unet, for image_encoder/."""
    folder = find_folder(path, "image_encoder", variant, revision)
    return load_network(CLIPVision, folder, variant, dtype, device)


def load_student(path, unet, variant=None):
    """The distilled network at `path`, for the pipeline of `unet`, in its dtype and on its device: a UNet (a
    folder, a hub id, or one file with diffusers' keys), or a LoRA (folder or file), which is merged into
    `unet`. variant: of a folder that has it, as its pipeline may."""
    file, dtype, device = lora_file(path), unet.conv_in.weight.dtype, unet.conv_in.weight.device
    if not file.is_file():
        there = any(Path(path).glob(f"**/*.{variant}*.safetensors"))
        return load_unet(path, variant=variant if there else None, dtype=dtype, device=device)
    if any(".lora" in key for key, _ in read_safetensors([file])):
        return merge_lora(load_lora(unet, file))
    return load_weights(unet, [file], file, dtype, device)


def load_network(cls, folder, variant, dtype, device):
    """The network that config.json describes, built without memory, with the weights beside it."""
    config = read_json(folder / "config.json")
    try:
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        with torch.device("meta"):
            net = cls(**config)
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError, ZeroDivisionError) as error:
        what = f"not a configuration of SVD's {cls.__name__}"
        raise ModelError(f"{folder}/config.json: {what} ({error})") from error
    return load_weights(net, weight_files(folder, variant), folder, dtype, device)


def load_weights(net, files, where, dtype, device):
    """Strict load: each key of the files must be one of the network's, with its shape, and none may be
    missing. The network takes over the tensors, which are converted one by one while they are read, so that
    there is never a second copy of the whole."""
    expected, tensors = net.state_dict(), {}
    for key, tensor in read_safetensors(files):
        if key.endswith("embeddings.position_ids"):                     # 0, 1, 2, .. in older files of CLIP
            continue
        if key not in expected:
            raise ModelError(f"{where}: key {key} is not part of the {type(net).__name__} in config.json")
        if tensor.shape != expected[key].shape:
            found, right = tuple(tensor.shape), tuple(expected[key].shape)
            raise ModelError(f"{where}: {key} has shape {found}, config.json asks for {right}")
        # A copy, since the file may change under the map, in the network's own memory layout.
        tensors[key] = torch.empty_strided(
            tensor.shape, expected[key].stride(), dtype=dtype, device=device).copy_(tensor)
    if missing := [key for key in expected if key not in tensors]:
        more = f", and {len(missing) - 1} more" * (len(missing) > 1)
        raise ModelError(f"{where}: key {missing[0]} is missing{more}")
    net.load_state_dict(tensors, assign=True)
    return net.eval()


def find_folder(path, name, variant, revision):
    """The local folder of one network. A path that is not a folder here is taken for a hub id, fetched (the
    named sub-folder alone, into HF_HOME) and kept; with HF_HUB_OFFLINE=1 only what was kept is used."""
    path, local = str(path), Path(path)
    if local.exists():
        for folder in (local / name, local):
            if (folder / "config.json").is_file():
                return folder
        weights = [file for file in (local, *local.glob("*")) if file.suffix in (".safetensors", *PICKLES)]
        any(False for _ in read_safetensors(weights))               # raises if it knows the layout
        hint = "expected the diffusers layout" + " (for UNet or LoRA weights: --student)" * local.is_file()
        raise ModelError(f"{path}: no {name}/config.json and no config.json in it; {hint}")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        raise ModelError(f"{path}: no such folder (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    stem = f"{name}/*model.{variant}" if variant else f"{name}/*model"
    patterns = [f"{name}/config.json", f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", "LICENSE*"]
    try:
        root = snapshot_download(path, revision=revision, allow_patterns=patterns)
    except Exception as error:                                      # offline, proxy, revision, malformed name
        hints = {
            GatedRepoError: "accept its licence on its hub page, log in with `hf auth login` or set HF_TOKEN",
            RepositoryNotFoundError: "neither a folder here nor a model on the hub that you can see: log in?"}
        other = ("no such folder here, and the hub cannot be reached or does not have it "
                 f"({type(error).__name__}); give a local folder, or go online once")
        raise ModelError(f"{path}: {hints.get(type(error), other)}") from error
    return find_folder(root, name, variant, revision)


def weight_files(folder, variant):
    """The .safetensors files of one network: a single one, or all of its shards."""
    name = r"(?:diffusion_pytorch_)?model(?:\.(\w+))?(?:-\d+-of-(\d+))?\.safetensors"
    found = {}                                                          # (number of shards, variant) -> files
    for file in sorted(folder.glob("*.safetensors")):
        if match := re.fullmatch(name, file.name):
            found.setdefault((int(match[2] or 1), match[1]), []).append(file)
    for count, files in sorted((count, files) for (count, kind), files in found.items() if kind == variant):
        if len(files) < count:
            raise ModelError(f"{folder}: {len(files)} of {count} weight shards are there: fetch all")
        return files
    others = sorted({kind for _, kind in found if kind})
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    raise ModelError(
        f"{folder}: no {'' if variant is None else variant + ' '}.safetensors weights"
        + f"; there are {', '.join(others)} ones: ask for that variant" * bool(others)
        + f"; {', '.join(pickles)} is a pickle, which can run code: convert it" * bool(pickles))


def read_safetensors(files, metadata=None):
    """Yields (key, tensor), mapped from disk; updates `metadata` with that of the files."""
    for file in map(Path, files):
        if file.suffix in PICKLES:
            raise ModelError(f"{file}: a pickle, which can run code when it is opened: get its .safetensors")
        try:
            with safe_open(file, framework="pt") as tensors:
                if metadata is not None:
                    metadata.update(tensors.metadata() or {})
                for key in tensors.keys():
                    if key.startswith(STABILITY):
                        raise ModelError(f"{file}: a single file with the keys of Stability's own code, not "
                                         f"read here; use the diffusers folder instead: {SVD} or {SVD}-xt")
                    yield key, tensors.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: not a readable safetensors file ({error}): fetch it again") from error


def read_json(file):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not a readable JSON file ({error})") from error


def save_unet(net, folder, dtype=None, variant=None):
    """Writes config.json and diffusion_pytorch_model[.variant].safetensors, which diffusers opens with the
    from_pretrained of the class of that name. dtype: convert the weights on the way."""
    if lora_layers(net):
        raise ModelError("the network has LoRA layers: merge_lora it first, or save_lora the update alone")
    tensors = {key: tensor.to(dtype) if dtype else tensor for key, tensor in net.state_dict().items()}
    clip = isinstance(net, CLIPVision)                                  # transformers' names instead
    name = f"{'' if clip else 'diffusion_pytorch_'}model{f'.{variant}' if variant else ''}.safetensors"
    kind = {"dtype": str(next(iter(tensors.values())).dtype)[6:]} if clip else {"_class_name": net.class_name}
    write_safetensors(Path(folder) / name, tensors)
    write_json(Path(folder) / "config.json", {**net.config, **kind})


save_vae = save_image_encoder = save_unet


def save_configs(folder):
    """What has no weights in a pipeline folder: model_index.json, scheduler/, feature_extractor/."""
    shutil.copytree(ASSETS / "pipeline", folder, dirs_exist_ok=True)


@contextmanager
def replacing(file):
    """A temporary name that becomes `file` at the end: whoever stops half-way leaves the earlier one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_safetensors(file, tensors, metadata=None):
    with replacing(file) as part:
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, part,
                  {"format": "pt", **(metadata or {})})


def write_json(file, content):
    with replacing(file) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------
# Out to where other people work


def export(path, student, folder, *, unmerge=False, variant=None, revision=None, dtype="fp32", name=None):
    """Writes the pipeline at `path`, with `student` for its UNet (see load_student), to a folder that
    diffusers opens, and a model card. unmerge: takes that LoRA out instead. dtype: fp32, or fp16 or bf16,
    which diffusers opens with variant="fp16" or "bf16"; name: of the pipeline on its card."""
    source = dict(variant=variant, revision=revision)
    unet, vae, image_encoder = (load(path, **source) for load in (load_unet, load_vae, load_image_encoder))
    unet = merge_lora(load_lora(unet, student, whole=False), scale=-1) if unmerge \
        else load_student(student, unet, variant)
    folder, suffix, dtype = Path(folder), None if dtype == "fp32" else dtype, DTYPES[dtype]
    for net, part in ((unet, "unet"), (vae, "vae"), (image_encoder, "image_encoder")):
        save_unet(net, folder / part, dtype, suffix)
    save_configs(folder)
    for licence in find_folder(path, "unet", **source).parent.glob("LICENSE*"):
        shutil.copy(licence, folder)
    base = SVD + "-xt" * (unet.config["num_frames"] > 14) if Path(path).exists() else path
    card = (ASSETS / "model_card.md").read_text().format(
        name=name or folder.resolve().name, base=base, size="{}, {}".format(*default_size(unet)),
        options=f', variant="{suffix}", torch_dtype={dtype}' * bool(suffix))
    if Path(path).exists() and vae.config["sample_size"] != 768:    # the toy world: nothing of it is SVD's
        card = re.sub(r"(?m)^(base_model|license).*\n", "", card)
    with replacing(folder / "README.md") as part:
        part.write_text(card)


def main():
    parser = argparse.ArgumentParser(prog="model.py", allow_abbrev=False, description="Export for diffusers.")
    parser.error = lambda message: parser.exit(2, f"model.py: {message}\n")
    flag = parser.add_argument
    flag("command", choices=("export", "merge", "unmerge"), help="put it in (merge: a LoRA); take a LoRA out")
    flag("--model", required=True, help="pipeline folder or hub id")
    flag("--student", required=True, help="UNet (folder, hub id, file) or LoRA (folder, file)")
    flag("--output_dir", required=True, help="the folder to write")
    flag("--dtype", choices=DTYPES, default="fp32", help="of the weights written; fp16 as *.fp16.safetensors")
    flag("--variant", help="weights of --model to read, e.g. fp16")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--push_to_hub", metavar="OWNER/NAME", help="then upload the folder there")
    args = parser.parse_args()
    try:
        export(args.model, args.student, args.output_dir, unmerge=args.command == "unmerge",
               variant=args.variant, revision=args.revision, dtype=args.dtype, name=args.push_to_hub)
    except (ModelError, OSError) as problem:
        parser.error(str(problem))
    print(f"wrote {args.output_dir}")
    if args.push_to_hub:
        from huggingface_hub import create_repo, upload_folder
        try:
            create_repo(args.push_to_hub, exist_ok=True)
            upload_folder(repo_id=args.push_to_hub, folder_path=args.output_dir,
                          allow_patterns=["*.json", "*.safetensors", "README.md", "LICENSE*"])
        except Exception as error:                                  # offline, not logged in, name, quota
            parser.error(f"{args.push_to_hub}: not uploaded: {error!r}")


if __name__ == "__main__":
    main()
