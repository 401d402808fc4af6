"""The networks of Stable Video Diffusion (SVD), in plain PyTorch.

    UNet            denoises the latents of a clip, or generates them in one step      unet/
    VAE             encodes frames one by one, decodes the frames of a clip together   vae/
    ImageEncoder    CLIP's vision transformer: a picture becomes one embedding         image_encoder/
    Cond            the conditions of a clip; made by encode_condition
    load_*, save_*  read and write the sub-folders on the right, in the diffusers layout

SVD extends an image model to video. Each layer that sees a single frame is followed by a layer that sees
the history of a single pixel, and a learned weight mixes the two results (TimeMixer). Between layers the
frames are part of the batch, (b f) c h w; temporal layers regroup them.

This file is the specification: it is written to be read. support/kernels.py has faster versions of the same
layers with the same parameters, and `fast(net)` swaps them in. Attribute names are those of the published
checkpoint, so loading is a strict load_state_dict without any renaming.

Letters in shape comments: b clips, f frames, c d channels, h w latent size, H W frame size, n any batch, a
attention heads, s tokens (the h w pixels of a feature map; in the image encoder the patches and one more).

Blattmann et al., "Stable Video Diffusion" (arXiv 2311.15127) describes the networks. The parameterisation
of the UNet's output (EDM with v-prediction) is in solver.py.
"""
import math
import shutil
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.checkpoint import ASSETS, ModelError, find_folder, load_network, save_network

NORM_GROUPS = 32                                                                # in every GroupNorm of SVD

# ---------------------------------------------------------------------------------------------------------
# Layers shared by UNet and VAE


def sinusoid(x, dim):
    """Sinusoidal embedding of x [n] -> [n dim], dim even: dim/2 cosines, then the sines of the same angles.
    Their periods grow geometrically from 2 pi to almost 2 pi 10^4 (Vaswani et al., arXiv 1706.03762)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x.float()[:, None] * frequencies                                   # n dim/2
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                      # n dim


class MLP(nn.Module):
    """Two linear layers that embed the noise level, the time ids or the frame number: n c_in -> n c_out."""

    def __init__(self, c_in, c_hidden, c_out):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_hidden)
        self.linear_2 = nn.Linear(c_hidden, c_out)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """Residual block on single frames, (b f) c h w: norm, SiLU and 3x3 convolution, twice.

    In the UNet, the embedding `emb` [b d] of noise level and time ids shifts the channels between the two
    convolutions. The VAE has no such embedding (c_emb and emb are None).
    """

    # staticmethod: from Python 3.14 on, a partial alone would be bound like a method.
    conv = staticmethod(partial(nn.Conv2d, kernel_size=3, padding=1))

    def __init__(self, c_in, c_out, c_emb=None, eps=1e-6):
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, c_in, eps)
        self.conv1 = self.conv(c_in, c_out)
        if c_emb:
            self.time_emb_proj = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, c_out, eps)
        self.conv2 = self.conv(c_out, c_out)
        self.conv_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb=None):                                             # (b f) c h w,  b d
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            # n is b f here, and each clip's shift serves its f frames. In TemporalResBlock n is b.
            shift = self.time_emb_proj(F.silu(emb)).repeat_interleave(len(h) // len(emb), dim=0)        # n c
            h = h + shift.view(*shift.shape, *[1] * (h.ndim - 2))               # n c 1 1, in 3-D n c 1 1 1
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class TemporalResBlock(ResBlock):
    """ResBlock along time, b c f h w: each convolution spans 3 frames, each norm all frames of a clip."""

    conv = staticmethod(partial(nn.Conv3d, kernel_size=(3, 1, 1), padding=(1, 0, 0)))


class TimeMixer(nn.Module):
    """Weighted mean of a spatial and a temporal result. The weight is learned: sigmoid(mix_factor).

    In the UNet, sigmoid(mix_factor) is the weight of the spatial result. In the VAE it is the weight of the
    temporal result instead: stores_temporal is True.
    """

    def __init__(self, mix_factor=0.5, stores_temporal=False):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([float(mix_factor)]))
        self.stores_temporal = stores_temporal

    def temporal_weight(self, dtype):                                           # 1
        weight = self.mix_factor.sigmoid().to(dtype)
        return weight if self.stores_temporal else 1 - weight

    def forward(self, spatial, temporal):
        return torch.lerp(spatial, temporal, self.temporal_weight(spatial.dtype))


class SpatioTemporalResBlock(nn.Module):
    """A ResBlock on frames, then a TemporalResBlock on its output; TimeMixer mixes both outputs. The VAE has
    another eps in the temporal block, and another mixer."""

    def __init__(self, c_in, c_out, c_emb=None, eps=1e-6, temporal_eps=None, mixer=TimeMixer):
        super().__init__()
        self.spatial_res_block = ResBlock(c_in, c_out, c_emb, eps)
        self.temporal_res_block = TemporalResBlock(c_out, c_out, c_emb, temporal_eps or eps)
        self.time_mixer = mixer()

    def forward(self, x, num_frames, emb=None):                                 # (b f) c h w
        spatial = self.spatial_res_block(x, emb)
        temporal = rearrange(spatial, "(b f) c h w -> b c f h w", f=num_frames)
        temporal = self.temporal_res_block(temporal, emb)                       # b c f h w
        return self.time_mixer(spatial, rearrange(temporal, "b c f h w -> (b f) c h w"))


class Attention(nn.Module):
    """Multi-head self-attention among the pixels of each frame, x [b f s c]. Sub-classes have other patterns
    or other inputs."""

    split_heads = "b f s (a c) -> (b f) a s c"      # the last two axes are those of attention
    join_heads = "(b f) a s c -> b f s (a c)"

    def __init__(self, c, c_context=None, num_heads=1, bias=False):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(c, c, bias=bias)
        self.to_k = nn.Linear(c_context or c, c, bias=bias)
        self.to_v = nn.Linear(c_context or c, c, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        q, k, v = (rearrange(layer(x), self.split_heads, a=self.num_heads)
                   for layer in (self.to_q, self.to_k, self.to_v))              # (b f) a s c each
        out = F.scaled_dot_product_attention(q, k, v)                           # (b f) a s c
        return self.to_out[0](rearrange(out, self.join_heads, b=len(x)))        # b f s c


class TemporalAttention(Attention):
    """Multi-head self-attention among the frames of each pixel, x [b f s c]."""

    split_heads = "b f s (a c) -> (b s) a f c"
    join_heads = "(b s) a f c -> b f s (a c)"


class Downsample(nn.Module):
    """3x3 convolution with stride 2. The UNet pads by 1 all around, the VAE at bottom and right only."""

    def __init__(self, c, padding):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=padding)

    def forward(self, x):                                                       # n c h w -> n c h/2 w/2
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))                                          # left, right, top, bottom
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):                                                       # n c h w -> n c 2h 2w
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# ---------------------------------------------------------------------------------------------------------
# UNet


class ContextAttention(Attention):
    """Cross-attention to the image embedding, which is a single token.

    The softmax over one key is 1 for every query. So attention returns exactly to_out(to_v(context)),
    whatever the query is: one row per clip instead of one per pixel. to_q, to_k and the norm before them
    (norm2 of the transformer blocks) have no influence and no gradient. They stay because the checkpoint
    holds them.
    """

    def forward(self, context):                                                 # b 1 d
        return self.to_out[0](self.to_v(context))                               # b 1 c


class GEGLU(nn.Module):
    """Gated linear layer: half of its output times GELU of the other half (Shazeer, arXiv 2002.05202)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Feed-forward network c -> 4 c -> c with GEGLU, x [b f s c]."""

    def __init__(self, c):
        super().__init__()
        # The identity stands where SVD had dropout, so that the last layer keeps its key net.2.
        self.net = nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c))

    def forward(self, x):
        return self.net(x)


class SpatialTransformerBlock(nn.Module):
    """Attention among the pixels of each frame, attention to the image embedding, feed-forward."""

    attention = Attention

    def __init__(self, c, num_heads, c_context):
        super().__init__()
        self.norm1 = nn.LayerNorm(c)
        self.attn1 = self.attention(c, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(c)
        self.attn2 = ContextAttention(c, c_context)
        self.norm3 = nn.LayerNorm(c)
        self.ff = FeedForward(c)

    def forward(self, x, context):                                              # b f s c,  b 1 d
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(context)[:, :, None]                                 # b 1 1 c for all pixels
        return x + self.ff(self.norm3(x))


class TemporalTransformerBlock(SpatialTransformerBlock):
    """SpatialTransformerBlock along time, with one more feed-forward in front."""

    attention = TemporalAttention

    def __init__(self, c, num_heads, c_context):
        super().__init__(c, num_heads, c_context)
        self.norm_in = nn.LayerNorm(c)
        self.ff_in = FeedForward(c)

    def forward(self, x, context):                                              # b f s c,  b 1 d
        return super().forward(x + self.ff_in(self.norm_in(x)), context)


class SpatioTemporalTransformer(nn.Module):
    """Pairs of a spatial and a temporal transformer block. TimeMixer mixes the outputs of each pair, and one
    residual connection spans all pairs. The temporal blocks also get an embedding of the frame's number."""

    def __init__(self, c, num_heads, num_layers, c_context):
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, c, 1e-6)
        self.proj_in = nn.Linear(c, c)
        self.transformer_blocks = nn.ModuleList(
            SpatialTransformerBlock(c, num_heads, c_context) for _ in range(num_layers))
        self.temporal_transformer_blocks = nn.ModuleList(
            TemporalTransformerBlock(c, num_heads, c_context) for _ in range(num_layers))
        self.time_pos_embed = MLP(c, 4 * c, c)
        self.time_mixer = TimeMixer()
        self.proj_out = nn.Linear(c, c)

    def forward(self, x, num_frames, context):                                  # (b f) c h w,  b 1 d
        residual, height = x, x.shape[2]
        position = sinusoid(torch.arange(num_frames, device=x.device), x.shape[1]).to(x.dtype)  # f c
        position = self.time_pos_embed(position)[:, None]                       # f 1 c
        x = self.proj_in(rearrange(self.norm(x), "(b f) c h w -> b f (h w) c", f=num_frames))       # b f s c
        for spatial_block, temporal_block in zip(self.transformer_blocks, self.temporal_transformer_blocks):
            x = spatial_block(x, context)
            x = self.time_mixer(x, temporal_block(x + position, context))
        return residual + rearrange(self.proj_out(x), "b f (h w) c -> (b f) c h w", h=height)


class UNetBlock(nn.Module):
    """One resolution of the UNet: layers of one residual block and, where attention is used, one transformer.

    down() appends the output of each layer to `skips`. up() removes the last entry of `skips` for each layer
    and concatenates it to the layer's input. With `checkpointing` a layer keeps only its input for the
    backward pass and computes the rest again: same gradients, a third more time, a fraction of the memory.
    """

    checkpointing = False

    def __init__(self, channels_in, c, c_emb, transformers=(), down=False, up=False, eps=1e-6):
        """channels_in: input channels of each residual block. transformers: arguments of each
        SpatioTemporalTransformer, or none. down, up: whether the block ends in a resize by 2."""
        super().__init__()
        self.resnets = nn.ModuleList(SpatioTemporalResBlock(c_in, c, c_emb, eps) for c_in in channels_in)
        self.attentions = nn.ModuleList(SpatioTemporalTransformer(c, *sizes) for sizes in transformers)
        self.downsamplers = nn.ModuleList([Downsample(c, padding=1)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c)] if up else [])

    def layer(self, i, x, num_frames, emb, context):                    # (b f) c h w,  number,  b d,  b 1 d
        x = self.resnets[i](x, num_frames, emb)
        return self.attentions[i](x, num_frames, context) if i < len(self.attentions) else x

    def run_layer(self, i, x, *rest):                                   # rest: num_frames, emb, context
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self.layer(i, x, *rest)
        # Reentrant checkpointing has less overhead than non-reentrant, and a CUDA graph can record it. It
        # passes gradients on only if one of its inputs requires them.
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        return checkpoint(self.layer, i, x, *rest, use_reentrant=True, preserve_rng_state=False)

    def down(self, x, skips, *rest):
        for i in range(len(self.resnets)):
            x = self.run_layer(i, x, *rest)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x

    def up(self, x, skips, *rest):
        for i in range(len(self.resnets)):
            x = self.run_layer(i, torch.cat([x, skips.pop()], dim=1), *rest)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


# {kind of block in config.json: whether its layers have transformers}
BLOCK_HAS_ATTENTION = {"CrossAttnDownBlockSpatioTemporal": True, "DownBlockSpatioTemporal": False,
                       "CrossAttnUpBlockSpatioTemporal": True, "UpBlockSpatioTemporal": False}


class UNet(nn.Module):
    """SVD's spatio-temporal UNet. Keyword arguments are the keys of unet/config.json; the defaults are those
    of SVD (1,524,623,082 parameters). A setting per resolution may also be one number for all of them."""

    class_name, file_stem = "UNetSpatioTemporalConditionModel", "diffusion_pytorch_model"   # in diffusers

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
        per_level = [[v] * depth if isinstance(v, int) else list(v) for v in (
            layers_per_block, transformer_layers_per_block, num_attention_heads, cross_attention_dim)]
        layers, transformer_layers, heads, c_context = per_level
        if any(len(setting) != depth for setting in (*per_level, down_block_types, up_block_types)):
            raise ModelError(f"block_out_channels has {depth} levels, another setting has more or fewer")
        if any(c % a for c, a in zip(channels, heads)):
            raise ModelError(f"num_attention_heads {heads} do not divide block_out_channels {channels}")
        c_first, c_emb = channels[0], 4 * channels[0]
        transformers = list(zip(heads, transformer_layers, c_context))  # see UNetBlock; one per level

        self.conv_in = nn.Conv2d(in_channels, c_first, 3, padding=1)
        self.time_embedding = MLP(c_first, c_emb, c_emb)
        self.add_embedding = MLP(projection_class_embeddings_input_dim, c_emb, c_emb)

        # The way down keeps the outputs of conv_in, of every layer and of every downsampler: c_skips has
        # their channels. The way up has one layer per kept output, in reverse order: each resolution has one
        # layer more there. c: channels of the last output so far. The values of eps are those of diffusers.
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        c, c_skips = c_first, [c_first]
        for i, kind in enumerate(down_block_types):
            channels_in = [c] + [channels[i]] * (layers[i] - 1)
            attentions = [transformers[i]] * layers[i] if BLOCK_HAS_ATTENTION[kind] else []
            self.down_blocks.append(UNetBlock(channels_in, channels[i], c_emb, attentions, down=i < depth - 1,
                                              eps=1e-6 if attentions else 1e-5))
            c = channels[i]
            c_skips += [c] * (layers[i] + (i < depth - 1))
        self.mid_block = UNetBlock([c, c], c, c_emb, transformers[-1:], eps=1e-5)
        for i, kind in zip(reversed(range(depth)), up_block_types):
            channels_in = []
            for _ in range(layers[i] + 1):
                channels_in.append(c + c_skips.pop())
                c = channels[i]
            attentions = [transformers[i]] * len(channels_in) if BLOCK_HAS_ATTENTION[kind] else []
            self.up_blocks.append(UNetBlock(channels_in, c, c_emb, attentions, up=i > 0))

        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, c, 1e-5)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def set_checkpointing(self, on=True):
        """Switches gradient checkpointing on or off, see UNetBlock."""
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            block.checkpointing = on

    def forward(self, x, c_noise, image_embeds, time_ids):
        """Raw output F_x of the network.

        x             b f 8 h w   channels: c_in-scaled noisy latent, condition latent; h, w multiples of 8
        c_noise       b           0.25 ln(sigma)
        image_embeds  b 1 d       CLIP embedding of the first frame
        time_ids      b 3         (fps - 1, motion bucket, noise augmentation)
        returns       b f 4 h w   in the dtype of x, whatever the network computes in
        """
        dtype_in, num_frames = x.dtype, x.shape[1]
        skips, emb, context = self.encode(x, c_noise, image_embeds, time_ids)
        x = self.mid_block.down(skips[-1], [], num_frames, emb, context)        # its skips are not used
        for block in self.up_blocks:
            x = block.up(x, skips, num_frames, emb, context)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))                        # (b f) 4 h w
        return rearrange(x, "(b f) c h w -> b f c h w", f=num_frames).to(dtype_in)

    def encode(self, x, c_noise, image_embeds, time_ids):
        """Runs the way down -> the list of its outputs (b f) c h w for the skip connections, the embedding
        emb [b d] of noise level and time ids, and the context [b 1 d]."""
        num_clips, num_frames, _, height, width = x.shape
        stride = 2 ** (len(self.down_blocks) - 1)
        assert height % stride == width % stride == 0, f"latents {height}x{width}: not a multiple of {stride}"
        assert image_embeds.shape[:2] == (num_clips, 1), f"image_embeds {[*image_embeds.shape]}: not [b 1 d]"
        dtype = self.conv_in.weight.dtype
        x, context = rearrange(x, "b f c h w -> (b f) c h w").to(dtype), image_embeds.to(dtype)

        noise_level = sinusoid(c_noise, self.time_embedding.linear_1.in_features).to(dtype)          # b c
        ids = sinusoid(rearrange(time_ids, "b n -> (b n)"), self.config["addition_time_embed_dim"])  # (b n) c
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
        self.group_norm = nn.GroupNorm(NORM_GROUPS, c, 1e-6)

    def forward(self, x):                                                       # n c h w
        h = super().forward(rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c"))                # n 1 s c
        return x + rearrange(h, "n 1 (h w) c -> n c h w", h=x.shape[2])


class VAEBlock(nn.Module):
    """One resolution of the encoder or decoder: residual blocks, then a resize except at the last resolution.

    down, up: a list with the layer that resizes, or none. Only the decoder's residual blocks take num_frames,
    so forward is given this number or nothing.
    """

    def __init__(self, resnets, down=(), up=()):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers, self.upsamplers = nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x, *num_frames):                                          # n c h w
        for resnet in self.resnets:
            x = resnet(x, *num_frames)
        for resize in (*self.downsamplers, *self.upsamplers):
            x = resize(x)
        return x


class VAEMiddle(nn.Module):
    """The lowest resolution: attention between two residual blocks.

    The decoder has layers_per_block residual blocks here: two in SVD, one in the toy world. As in diffusers,
    a third block would not be used, and with a single one the attention is not used.
    """

    def __init__(self, resnets, attention):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList([attention])

    def forward(self, x, *num_frames):                                          # n c h w
        x = self.resnets[0](x, *num_frames)
        for attention, resnet in zip(self.attentions, self.resnets[1:]):
            x = resnet(attention(x), *num_frames)
        return x


class Encoder(nn.Module):
    """Encodes each frame alone: n 3 H W -> n 2*latent h w, the latent's mean and log-variance.

    channels: of each resolution, from the highest to the lowest.
    """

    def __init__(self, c_in, c_latent, channels, num_layers):
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (c, c_out) in enumerate(zip([channels[0], *channels], channels), 1):     # channels in and out
            resnets = [ResBlock(c_out if j else c, c_out) for j in range(num_layers)]
            down = [Downsample(c_out, padding=0)] if i < len(channels) else []
            self.down_blocks.append(VAEBlock(resnets, down=down))
        c = channels[-1]
        self.mid_block = VAEMiddle([ResBlock(c, c), ResBlock(c, c)], ImageAttention(c))
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, c, 1e-6)
        self.conv_out = nn.Conv2d(c, 2 * c_latent, 3, padding=1)

    def forward(self, x):                                                       # n 3 H W
        x = self.conv_in(x)                                                     # n c H W
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)                                                        # at the end n c h w
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Decodes all frames of a clip together, so that they do not flicker: (b f) latent h w -> (b f) 3 H W."""

    def __init__(self, c_image, c_latent, channels, num_layers):
        super().__init__()
        mixer = partial(TimeMixer, mix_factor=0.0, stores_temporal=True)
        resnet = partial(SpatioTemporalResBlock, temporal_eps=1e-5, mixer=mixer)
        channels = channels[::-1]                                               # lowest resolution first
        c = channels[0]
        self.conv_in = nn.Conv2d(c_latent, c, 3, padding=1)
        self.mid_block = VAEMiddle([resnet(c, c) for _ in range(num_layers)], ImageAttention(c))
        self.up_blocks = nn.ModuleList()
        for i, (c, c_out) in enumerate(zip([channels[0], *channels], channels), 1):
            resnets = [resnet(c_out if j else c, c_out) for j in range(num_layers + 1)]
            self.up_blocks.append(VAEBlock(resnets, up=[Upsample(c_out)] if i < len(channels) else []))
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, channels[-1], 1e-6)
        self.conv_out = nn.Conv2d(channels[-1], c_image, 3, padding=1)
        self.time_conv_out = nn.Conv3d(c_image, c_image, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x, num_frames):                                           # (b f) latent h w
        x = self.conv_in(x)                                                     # (b f) c h w
        for block in (self.mid_block, *self.up_blocks):
            x = block(x, num_frames)                                            # at the end (b f) c H W
        x = self.conv_out(F.silu(self.conv_norm_out(x)))                        # (b f) 3 H W
        x = self.time_conv_out(rearrange(x, "(b f) c h w -> b c f h w", f=num_frames))      # b 3 f H W
        return rearrange(x, "b c f h w -> (b f) c h w")


class VAE(nn.Module):
    """SVD's autoencoder. Keyword arguments are the keys of vae/config.json; the defaults are those of SVD.
    The last two and the names of the blocks are only kept for the file.

    Latents here are unscaled. Diffusion works on latents * config["scaling_factor"], which have unit
    variance. The condition latent enters the UNet unscaled.
    """

    class_name, file_stem = "AutoencoderKLTemporalDecoder", "diffusion_pytorch_model"       # in diffusers

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

    def moments(self, frames):
        """frames [n 3 H W] in [-1, 1] -> mean and log-variance [n 4 h w] of the Gaussian posterior."""
        stride = 2 ** (len(self.encoder.down_blocks) - 1)
        assert frames.shape[2] % stride == 0 and frames.shape[3] % stride == 0, \
            f"frame size {frames.shape[2]}x{frames.shape[3]}: not a multiple of {stride}"
        moments = self.quant_conv(self.encoder(frames.to(self.quant_conv.weight.dtype)))
        mean, logvar = moments.to(frames.dtype).chunk(2, dim=1)                 # n 4 h w each
        return mean, logvar.clamp(-30, 20)

    def encode(self, frames):
        """frames [n 3 H W] in [-1, 1] -> latents [n 4 h w], unscaled: the mode of the posterior, which is its
        mean. Only some frames are encoded at a time, so that memory does not grow with their number."""
        # Five frames of 1024x576 at a time:
        return torch.cat([self.moments(part)[0] for part in frames.split(1 + 8_000_000 // frames[0].numel())])

    def decode(self, latents, num_frames):
        """latents [n 4 h w] unscaled, n a multiple of num_frames -> frames [n 3 H W], about in [-1, 1]."""
        assert len(latents) % num_frames == 0, f"{len(latents)} latents: not whole clips of {num_frames}"
        return self.decoder(latents.to(self.quant_conv.weight.dtype), num_frames).to(latents.dtype)


# ---------------------------------------------------------------------------------------------------------
# Image encoder: CLIP (Radford et al., arXiv 2103.00020)

CLIP_SIZE = 224                                    # the resolution of SVD's image encoder
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)    # openai/clip-vit-base-patch32, preprocessor_config.json
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * (1.702 * x).sigmoid()}


class CLIPLayer(nn.Module):
    """One layer of the vision transformer: self-attention, then an MLP, each with a norm in front."""

    def __init__(self, c, num_heads, hidden, activation, norm):
        super().__init__()
        self.num_heads, self.activation = num_heads, activation
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(c, c) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c, hidden), "fc2": nn.Linear(hidden, c)})
        self.layer_norm1, self.layer_norm2 = norm(c), norm(c)

    def forward(self, x):                                                       # b s c
        h = self.layer_norm1(x)
        q, k, v = (rearrange(self.self_attn[f"{name}_proj"](h), "b s (a c) -> b a s c", a=self.num_heads)
                   for name in "qkv")                                           # b a s c each
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b a s c -> b s (a c)")              # b s c
        x = x + self.self_attn.out_proj(h)
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class ImageEncoder(nn.Module):
    """CLIP's vision transformer with its projection. The same network as transformers'
    CLIPVisionModelWithProjection, with the same parameter names, but without an import that takes seconds.

    config: the keys of image_encoder/config.json; keys that only training needs are stored but not used. The
    checkpoint's names include a typing error, pre_layrnorm.
    """

    class_name, file_stem = None, "model"                                       # in transformers

    def __init__(self, **config):
        super().__init__()
        self.config, c, patch = config, config["hidden_size"], config["patch_size"]
        norm = partial(nn.LayerNorm, eps=config.get("layer_norm_eps", 1e-5))
        layer = partial(CLIPLayer, c, config["num_attention_heads"], config["intermediate_size"],
                        ACTIVATIONS[config.get("hidden_act", "quick_gelu")], norm)
        positions = torch.zeros(1 + (config["image_size"] // patch) ** 2, c)    # 1 + patches, c
        embeddings = nn.ModuleDict({"patch_embedding": nn.Conv2d(3, c, patch, patch, bias=False),
                                    "position_embedding": nn.ParameterDict({"weight": positions})})
        embeddings.class_embedding = nn.Parameter(torch.zeros(c))
        layers = nn.Sequential(*(layer() for _ in range(config["num_hidden_layers"])))
        encoder = nn.ModuleDict({"layers": layers})
        self.vision_model = nn.ModuleDict({"embeddings": embeddings, "pre_layrnorm": norm(c),
                                           "encoder": encoder, "post_layernorm": norm(c)})
        self.visual_projection = nn.Linear(c, config["projection_dim"], bias=False)

    def forward(self, pixels):
        """pixels [b 3 S S], S = image_size, normalised with CLIP_MEAN and CLIP_STD -> [b d]."""
        net, embeddings = self.vision_model, self.vision_model.embeddings
        patches = rearrange(embeddings.patch_embedding(pixels), "b c h w -> b (h w) c")             # b s-1 c
        x = torch.cat((embeddings.class_embedding.expand(len(pixels), 1, -1), patches), dim=1)      # b s c
        x = net.encoder.layers(net.pre_layrnorm(x + embeddings.position_embedding.weight))
        return self.visual_projection(net.post_layernorm(x[:, 0]))              # b d


def clip_pixels(images):
    """images [n 3 H W] in [-1, 1] -> the image encoder's input [n 3 224 224].

    SVD's own resize: the whole image is squashed to a square by bicubic interpolation with aligned corners.
    Before it, a Gaussian blur of standard deviation (size / 224 - 1) / 2 along each axis prevents aliasing.
    """
    for _ in range(2):                                                          # along rows, then columns
        std = max((images.shape[3] / CLIP_SIZE - 1) / 2, 0.001)
        taps = int(max(4 * std, 3)) // 2 * 2 + 1                                # odd: 2 std to each side
        offset = torch.arange(taps, device=images.device, dtype=images.dtype) - taps // 2
        # The softmax of -x^2 / (2 std^2) is a Gaussian whose sum is 1.
        kernel = torch.softmax(-offset.square() / (2 * std * std), dim=0).repeat(3, 1, 1, 1)    # 3 1 1 taps
        padded = F.pad(images, (taps // 2, taps // 2, 0, 0), mode="reflect")
        images = F.conv2d(padded, kernel, groups=3).transpose(2, 3)             # n 3 W H, then n 3 H W
    images = F.interpolate(images, (CLIP_SIZE, CLIP_SIZE), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(v, device=images.device, dtype=images.dtype).view(3, 1, 1)
                 for v in (CLIP_MEAN, CLIP_STD))
    return ((images + 1) / 2 - mean) / std                                      # n 3 224 224


# ---------------------------------------------------------------------------------------------------------
# Conditions of a clip


class Cond(NamedTuple):
    """The conditions of a clip: what the UNet gets besides the noisy latent."""

    image_embeds: torch.Tensor      # b 1 d      CLIP embedding of the clean image
    image_latents: torch.Tensor     # b f 4 h w  latent of the noise-augmented image, unscaled, for each frame
    time_ids: torch.Tensor          # b 3        fps - 1, motion bucket, noise augmentation


def default_size(unet):
    """(width, height) in pixels that a UNet was trained for. SVD's config says 768 square, but SVD was
    trained at 1024x576."""
    return (1024, 576) if unet.config["sample_size"] == 96 else (8 * unet.config["sample_size"],) * 2


def pixel_stride(unet):
    """The pixels per element of the UNet's smallest map: sizes of videos are multiples of this number."""
    return 8 * 2 ** (len(unet.config["block_out_channels"]) - 1)


def unconditional(cond):
    """The conditions without the image: zero embedding and zero latents, as in SVD's training dropout."""
    return cond._replace(image_embeds=torch.zeros_like(cond.image_embeds),
                         image_latents=torch.zeros_like(cond.image_latents))


def embed_image(image_encoder, images):
    """images [n 3 H W] in [-1, 1] -> CLIP embedding [n 1 d]."""
    pixels = clip_pixels(images).to(image_encoder.visual_projection.weight.dtype)
    return image_encoder(pixels)[:, None].to(images.dtype)                      # n 1 d


def encode_condition(vae, image_encoder, images, noise, *, num_frames, fps, motion_bucket_id,
                     noise_aug_strength):
    """The conditions Cond of clips that start with `images`.

    images, noise       b 3 H W   pixels in [-1, 1]; standard normal, added with std `noise_aug_strength`
    fps                 frames per second; SVD was trained on the number fps - 1
    motion_bucket_id    1 (still) to 255 (fast)
    The last three are numbers or tensors [b].
    """
    fps_id, bucket, strength = (
        torch.as_tensor(v, dtype=torch.float32, device=images.device).expand(len(images))
        for v in (fps - 1, motion_bucket_id, noise_aug_strength))               # b each
    latents = vae.encode(images + strength[:, None, None, None] * noise)        # b 4 h w, unscaled
    return Cond(embed_image(image_encoder, images), repeat(latents, "b c h w -> b f c h w", f=num_frames),
                torch.stack((fps_id, bucket, strength), dim=1))


# ---------------------------------------------------------------------------------------------------------
# Files


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
    return load_network(ImageEncoder, folder, variant, dtype, device)


save_unet = save_vae = save_image_encoder = save_network


def save_configs(folder):
    """Writes the files of a pipeline folder that hold no weights: model_index.json, scheduler/,
    feature_extractor/."""
    shutil.copytree(ASSETS / "pipeline", folder, dirs_exist_ok=True)
