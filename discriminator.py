"""The discriminator: small trainable heads on the features of a frozen network.

    load_features           the frozen features of a `kind`; their input is the paper's main idea (Fig. 3):
        latent              latents, mapped to 3 channels and upsampled; no VAE decoder (default)
        subpixel            the same with a sub-pixel convolution (version 2 of the paper, App. D, Fig. 9)
        pixel               frames that the VAE decodes, as in ADD (arXiv 2311.17042)
        unet                noised latents, seen by the encoder of the diffusion UNet, as in SF-V (2406.04324)
    DinoFeatures            frozen DINOv2: kinds latent, subpixel and pixel
    UNetFeatures            frozen UNet encoder: kind unet
    SpatialHead             Conv2d -> ResBlock2d -> Conv2d on each frame (Fig. 4)               (b f) c h w
    TemporalHead            Conv1d -> ResBlock1d -> Conv1d on the history of each place         (b h w) c f
    Discriminator           features with two heads per level: latents [b f c h w] -> logits [b k]
    upsample_normalize      latents -> input of the backbone, one fused kernel (support/upsample.py)

OSV, arXiv 2409.11367, section 4.1, Figs. 3 and 4. A spatial head cannot see motion. A temporal head does not
see how places fit together. In SF-V, spatial heads alone made videos that repeat the first frame.

Letters in shape comments: b clips, f frames, c d channels, h w size of latents and feature maps, H W size of
frames, p patches, k logits, n any batch, y x the two axes of a convolution.
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

from model import load_unet
from solver import precondition
from support.checkpoint import ModelError
from support.engine import uniforms
from support.upsample import upsample_normalize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ---------------------------------------------------------------------------------------------------------
# Heads (Fig. 4)


class Head(nn.Module):
    """conv -> norm -> LeakyReLU -> residual block -> conv to one logit per place: n c y x -> n 1 y x.

    Spectral norm limits the Lipschitz constant of each convolution. GroupNorm uses no batch statistics, so
    the logits of a clip do not depend on the rest of the batch.
    """

    def __init__(self, c, width, kernel):
        super().__init__()
        self.conv_in = self.conv(c, width, (1, 1))
        self.norm_in = nn.GroupNorm(math.gcd(width, 8), width)
        self.conv_res = self.conv(width, width, kernel)
        self.norm_res = nn.GroupNorm(math.gcd(width, 8), width)
        self.conv_out = self.conv(width, 1, kernel)

    @staticmethod
    def conv(c_in, c_out, kernel):
        return spectral_norm(nn.Conv2d(c_in, c_out, kernel, padding=[k // 2 for k in kernel]))

    def forward(self, x):
        x = F.leaky_relu(self.norm_in(self.conv_in(x)), 0.2)
        change = F.leaky_relu(self.norm_res(self.conv_res(x)), 0.2)
        return self.conv_out((x + change) * 0.5 ** 0.5)                 # 1 / sqrt(2) keeps the variance


class SpatialHead(Head):
    """Judges each frame alone: (b f) c h w -> b (f h w)."""

    def __init__(self, c, width):
        super().__init__(c, width, kernel=(3, 3))

    def forward(self, x, num_frames):
        return rearrange(super().forward(x), "(b f) 1 h w -> b (f h w)", f=num_frames)


class TemporalHead(Head):
    """Judges the history of each place alone: (b f) c h w -> b (f h w).

    The paper's Conv1d over f runs as a Conv2d whose kernels are 1 place high and 7 frames wide.
    """

    def __init__(self, c, width):
        super().__init__(c, width, kernel=(1, 7))

    def forward(self, x, num_frames):
        h, w = x.shape[-2:]
        # A transposed view of (b h w) f c is channels-last, the faster memory format for convolutions.
        x = rearrange(x, "(b f) c h w -> (b h w) f c", f=num_frames).mT[:, :, None]         # (b h w) c 1 f
        return rearrange(super().forward(x), "(b h w) 1 1 f -> b (f h w)", h=h, w=w)


# ---------------------------------------------------------------------------------------------------------
# Frozen features (Fig. 3)


def load_dino(path):
    """transformers' Dinov2Model, of any size, from a folder or a hub id such as facebook/dinov2-small. Raises
    ModelError, also for a key that is missing, unexpected or of another shape."""
    from transformers import Dinov2Model, logging
    logging.set_verbosity_error()                   # transformers would print a table before the error
    try:
        dino, report = Dinov2Model.from_pretrained(path, use_safetensors=True, dtype=torch.float32,
                                                   output_loading_info=True, ignore_mismatched_sizes=True)
        wrong = [f"{kind} {min(keys)}" for kind, keys in report.items() if keys]
        if wrong or not isinstance(dino.config.image_size, int):
            raise ValueError(", ".join(wrong) or f"image_size {dino.config.image_size} is not one number")
        return dino
    except Exception as error:                      # also safetensors' own, and those of a configuration
        raise ModelError(f"{path}: cannot be loaded as a DINOv2 model ({error})") from error


class DinoFeatures(nn.Module):
    """Latents -> feature maps of a frozen DINOv2 at five depths.

    backbone        transformers' Dinov2Model
    kind            "latent", "subpixel" or "pixel": see the top of this file
    vae             for "pixel" only: the frozen VAE that decodes latents to frames
    in_channels     of the latents
    resolution      pixels: the backbone's input has about the area of a square of this side, and the video's
                    aspect ratio; each side is a multiple of the patch size (default: 224, or the size that
                    the backbone was made for if that is smaller)
    """

    SUBPIXEL = 4                                    # upscaling of the sub-pixel convolution (v2, App. D)
    LATENTS_AT_ONCE = 2 * 72 * 128                  # latent pixels decoded together: 2 frames of SVD's size

    def __init__(self, backbone, kind="latent", in_channels=4, vae=None, resolution=None):
        super().__init__()
        assert kind in ("latent", "subpixel", "pixel"), f"kind {kind!r}: not latent, subpixel or pixel"
        assert (vae is not None) == (kind == "pixel"), f"kind {kind!r}: only the kind 'pixel' takes a vae"
        self.backbone, self.kind, self.vae = backbone, kind, vae
        config = backbone.config
        self.patch, self.resolution = config.patch_size, resolution or min(config.image_size, 224)
        # The patch embedding and, as in ADD, blocks 2, 5, 8, 11 (from 0) of 12; other depths: same fractions.
        # These are positions in hidden_states: 0 is the patch embedding, i + 1 the output of block i.
        self.levels = [0] + [round(config.num_hidden_layers * (i + 1) / 4) for i in range(4)]
        self.channels = [config.hidden_size] * len(self.levels)
        if kind == "latent":
            self.to_rgb = nn.Conv2d(in_channels, 3, 1)
        elif kind == "subpixel":
            self.to_rgb = nn.Sequential(nn.Conv2d(in_channels, 3 * self.SUBPIXEL ** 2, 3, padding=1),
                                        nn.PixelShuffle(self.SUBPIXEL))

    def size_for(self, height, width):
        """Height and width of latents or frames -> size (H, W) of the backbone's input in pixels."""
        scale = self.resolution / math.sqrt(height * width) / self.patch
        return tuple(max(1, round(side * scale)) * self.patch for side in (height, width))

    def forward(self, latents, cond=None):
        """latents [b f c h w] -> list of maps [(b f) d h w]. cond is not used: DINOv2 sees single frames."""
        num_frames = latents.shape[1]
        x = rearrange(latents, "b f c h w -> (b f) c h w")
        if self.kind == "pixel":
            x = self.decode(x / self.vae.config["scaling_factor"], num_frames)                  # (b f) 3 H W
        else:
            # Kind latent: a 1x1 map commutes with the resize, and is cheaper before it.
            x = self.to_rgb(x)                                  # (b f) 3 h w, or 3 4h 4w for kind subpixel
        # x is taken to be in [-1, 1]. DINOv2 expects ((x + 1) / 2 - mean) / std, written as (x - m) / s:
        mean, std = ([2 * v - 1 for v in IMAGENET_MEAN], [2 * v for v in IMAGENET_STD])
        frames = upsample_normalize(x, self.size_for(*x.shape[2:]), mean, std, self.backbone.dtype)
        tokens = self.backbone(pixel_values=frames, output_hidden_states=True).hidden_states    # (b f) 1+p d
        height = frames.shape[2] // self.patch
        # The CLS token describes the whole frame. It is added to each patch token of that frame.
        return [rearrange(tokens[i][:, 1:] + tokens[i][:, :1], "n (h w) d -> n d h w", h=height)
                for i in self.levels]

    def decode(self, latents, num_frames):
        """Unscaled latents (b f) c h w -> frames (b f) 3 H W.

        A backward pass through a whole clip needs more activations than fit on a GPU. So large frames are
        decoded a few at a time, and again in the backward pass (gradient checkpointing). Real and generated
        clips are cut at the same frames, so the cuts do not tell them apart.
        """
        at_once = max(1, self.LATENTS_AT_ONCE // latents[0, 0].numel())
        if num_frames <= at_once:
            return self.vae.decode(latents, num_frames)
        parts = [part for clip in latents.split(num_frames) for part in clip.split(at_once)]
        decode = partial(checkpoint, self.vae.decode, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([decode(part, len(part)) for part in parts])


class UNetFeatures(nn.Module):
    """Noised latents -> feature maps of the frozen UNet's encoder, one per resolution (SF-V).

    The UNet is trained on noisy latents, so real and generated ones get noise first: ln sigma ~ N(-1, 1). It
    also sees the condition, so the heads can reject a video that does not belong to its image.

    The noise of a clip is a function of its number, so it does not depend on the rest of the batch; a real
    and a generated clip with the same number get the same noise.
    """

    LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.0, 1.0       # SF-V, Table 3: mean -2 does not train, 0 and 1 are worse

    def __init__(self, unet):
        super().__init__()
        self.backbone = unet
        self.channels = [block.resnets[-1].spatial_res_block.conv2.out_channels for block in unet.down_blocks]
        # unet.encode returns the outputs of the first convolution, then of each layer and each downsampler. A
        # level is the output of the last layer of a resolution.
        self.levels, position = [], 0
        for block in unet.down_blocks:
            self.levels.append(position + len(block.resnets))
            position += len(block.resnets) + len(block.downsamplers)

    def forward(self, latents, cond, numbers=None):
        """latents [b f c h w], cond, clip numbers [b] (None: random) -> list of maps [(b f) c h w], one per
        resolution."""
        if numbers is None:
            numbers = torch.randint(2 ** 31, (len(latents),), device=latents.device)
        size = latents[0].numel() + 1                                                           # f c h w + 1
        # Stream 13 of the random numbers is used here only. Box-Muller makes normal numbers of uniform ones:
        # a clip's first one gives its sigma [b 1 1 1 1], the others its noise.
        u, v = uniforms(0, numbers, 13, 2 * size).split(size, dim=1)                            # b size each
        normal = (-2 * (1 - u).log()).sqrt() * (2 * math.pi * v).cos()                          # b size
        sigma = (self.LOG_SIGMA_MEAN + self.LOG_SIGMA_STD * normal[:, :1]).exp().view(-1, 1, 1, 1, 1)
        scalings = precondition(sigma)                                                          # EDM Table 1
        noise = normal[:, 1:].view_as(latents)                                                  # b f c h w
        x = scalings.c_in * (latents + sigma * noise)                                           # b f c h w
        x = torch.cat([x, cond.image_latents.to(x.dtype)], dim=2)                               # b f 2c h w
        outputs, _, _ = self.backbone.encode(x, scalings.c_noise.flatten(), cond.image_embeds, cond.time_ids)
        return [outputs[i] for i in self.levels]


def load_features(kind, path, dino, vae):
    """The features of one `kind` (see the top of this file), with the dtype and device of `vae`.

    path: pipeline folder or hub id. dino: DINOv2 folder or hub id, or None for dinov2/ inside `path`. Raises
    ModelError.
    """
    weight = vae.quant_conv.weight
    if kind == "unet":
        return UNetFeatures(load_unet(path, dtype=weight.dtype, device=weight.device))
    backbone = load_dino(dino or Path(path) / "dinov2").to(weight.device, weight.dtype)
    return DinoFeatures(backbone, kind, vae=vae if kind == "pixel" else None)


# ---------------------------------------------------------------------------------------------------------
# Discriminator


class Discriminator(nn.Module):
    """disc(latents [b f c h w], cond=None, numbers=None) -> logits [b k]; positive means real. k counts the
    places of all heads and levels. numbers [b]: clip numbers, for features that draw noise.

    The heads and the map to 3 channels are trainable. The networks of the features are frozen: they stay in
    eval mode and get no gradients of their own, but gradients pass through them to the latents.

    features: DinoFeatures, UNetFeatures, or a module of your own: `.channels` has the channels of each level,
    and (latents, cond) becomes a list of one map [(b f) c h w] per level. Of its children only those with the
    names `backbone` and `vae` are frozen. All its other parameters train, even after requires_grad_(False).

    heads: the kinds of heads, for ablations. width: most channels inside a head.
    """

    def __init__(self, features, heads=("spatial", "temporal"), width=128):
        super().__init__()
        self.features = features
        kinds = {"spatial": SpatialHead, "temporal": TemporalHead}
        self.heads = nn.ModuleList(
            nn.ModuleDict({name: kinds[name](c, min(c, width)) for name in heads}) for c in features.channels)
        self.frozen = [net for name, net in features.named_children() if name in ("backbone", "vae")]
        self.train().requires_grad_(True)

    def train(self, mode=True):
        """Same as nn.Module.train, but the frozen networks stay in eval mode."""
        super().train(mode)
        for net in self.frozen:
            net.eval()
        return self

    def requires_grad_(self, requires_grad=True):
        """Same as nn.Module.requires_grad_, but the frozen networks stay frozen."""
        super().requires_grad_(requires_grad)
        for net in self.frozen:
            net.requires_grad_(False)
        return self

    def forward(self, latents, cond=None, numbers=None):
        num_frames = latents.shape[1]
        # The noise of UNetFeatures depends on the clip numbers. Other features do not take them.
        noise = () if numbers is None else (numbers,)
        maps = self.features(latents, cond, *noise)                             # (b f) d h w per level
        # The weights of the heads are fp32. Under autocast the heads compute in the dtype of the features. It
        # must not cache converted weights, because they change between the replays of a CUDA graph.
        dtype = maps[0].dtype
        with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            logits = [head(x, num_frames) for x, heads in zip(maps, self.heads) for head in heads.values()]
        return torch.cat([x.float() for x in logits], dim=1)                                          # b k
