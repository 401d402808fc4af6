"""Faster versions of the layers in model.py, and fast(net), which puts them into a network.

| layer                            | what is fused                                         | plain | fast |
|----------------------------------|-------------------------------------------------------|------:|-----:|
| nn.GroupNorm                     | statistics and normalisation, channels-last           |  0.20 | 0.11 |
| nn.LayerNorm                     | the whole norm: each row is read once                 |  0.20 | 0.07 |
| GEGLU                            | GELU and product                                      |  1.27 | 0.68 |
| TemporalAttention                | attention among the frames, without rearranging       |  0.98 | 0.32 |
| SpatialTransformerBlock          | addition of the results of both attentions            |  5.54 | 4.70 |
| TemporalTransformerBlock         | the same                                              |  4.77 | 2.51 |
| ResBlock                         | norm, shift and SiLU; bias and residual addition      |  1.91 | 1.03 |
| SpatioTemporalResBlock           | the same; mixing; temporal convolution as a 2-D one   |  5.61 | 1.68 |
| VAE: ResBlock, 5 frames          | as above                                              | 14.30 | 4.29 |
| VAE: SpatioTemporalResBlock      | as above                                              | 119.1 | 20.3 |
| VAE: Downsample, 5 frames        | padding and convolution                               |  2.63 | 0.66 |
| VAE: Upsample                    | doubling and convolution                              | 31.73 | 9.08 |

Milliseconds of one forward pass in bf16 on an H200, 14 frames at the finest level: 320 channels of 72x128 in
the UNet; in the VAE 128 channels of 576x1024, for Upsample 256 of 288x512 (results/layers.json, `python
tests/kernel_speed.py layers`).

Nothing here changes the method. Each class below computes what its parent in model.py computes, with the same
parameters under the same names, in fewer passes over memory. On tensors that the kernels cannot take (on a
CPU, in fp64, under torch.compile, see fused.has_kernels) it calls the parent's own forward; FastTemporalConv
and FoldedUpsample compute theirs in another order there too. So a reader who wants to know the method can
close this file, and a reader who changes a layer in model.py tries it first with --plain, which leaves fast()
out.

Two ideas explain most of it. PyTorch adds the bias of a convolution in a separate pass over its output; here
the convolution runs without its bias, and the next fused kernel adds it. And with channels last in memory a
norm over single frames and a norm over whole clips are the same operation, and a temporal convolution is a
2-D convolution over frames and pixels, so nothing is copied between spatial and temporal layers.
"""
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

import model
from support import fused
from support.fused import add_tokens, has_kernels, residual

PIXELS_AT_ONCE = 2 ** 21            # output pixels of the frames that the VAE's decoder upsamples together

# ---------------------------------------------------------------------------------------------------------
# Functions


def fast(net):
    """Gives each layer of a network its faster class, in place, and returns the network.

    Parameters, buffers, keys and LoRA layers stay as they are. With a GPU the weights of convolutions are put
    channels-last in memory; outputs of convolutions follow them.
    """
    for layer in net.modules():
        layer.__class__ = FAST.get(type(layer), type(layer))
        if isinstance(layer, model.Decoder):
            for block in layer.up_blocks:
                for upsample in block.upsamplers:
                    upsample.__class__ = FoldedUpsample
    if torch.cuda.is_available():
        for weight in net.parameters():
            if weight.ndim > 3:
                weight.data = weight.data.movedim(1, -1).contiguous().movedim(-1, 1)
    return net


def without_bias(conv, x):
    """The convolution without its bias, LoRA included. x [n c h w], or [b c f s] for a temporal one."""
    window = conv.stride[:2], conv.padding[:2]
    as_2d = lambda layer: (layer.weight[..., 0] if layer.weight.ndim == 5 else layer.weight).to(x.dtype)
    out = F.conv2d(x, as_2d(conv), None, *window)
    if getattr(conv, "active", False):                                          # a layer of lora.py
        update = F.conv2d(F.conv2d(x, as_2d(conv.lora_A), None, *window), as_2d(conv.lora_B))
        out = torch.add(out, update, alpha=conv.alpha / conv.rank)
    return out


def norm_silu(norm, x, shift=None):
    """SiLU of the group norm of x + shift; x [n c h w] channels-last, shift [n c]."""
    return fused.GroupNorm.run(x, norm.weight, norm.bias, norm.num_groups, norm.eps, True, shift)


# ---------------------------------------------------------------------------------------------------------
# Norms, gates, attention


class FastGroupNorm(nn.GroupNorm):
    """Group norm by our kernels: PyTorch's are slow on channels-last tensors."""

    def forward(self, x):
        if x.ndim != 4 or not has_kernels(x, channels_last=True):
            # On a CPU, PyTorch's group norm of channels-last tensors loses digits if the mean is large.
            return super().forward(x.contiguous())
        return fused.GroupNorm.run(x, self.weight, self.bias, self.num_groups, self.eps, False)


class FastLayerNorm(nn.LayerNorm):
    """Layer norm by one kernel that reads each row once."""

    def forward(self, x):
        if not has_kernels(x):
            return super().forward(x)
        return fused.LayerNorm.run(x, self.weight, self.bias, self.eps)


class FastGEGLU(model.GEGLU):
    """GELU and product in one pass."""

    def forward(self, x):
        return fused.GEGLU.run(self.proj(x)) if has_kernels(x) else super().forward(x)


class FastTemporalAttention(model.TemporalAttention):
    """Attention among the frames of each pixel, read in place, without rearranging the tokens."""

    def forward(self, x):
        takes = x.shape[1] <= fused.MAX_FRAMES and x.shape[3] // self.num_heads in fused.HEAD_WIDTHS
        if not (takes and has_kernels(x)):
            return super().forward(x)
        out = fused.FrameAttention.run(self.to_q(x), self.to_k(x), self.to_v(x), self.num_heads)
        return self.to_out[0](out)


class FastSpatialTransformerBlock(model.SpatialTransformerBlock):
    """The results of both attentions are added in one pass."""

    def forward(self, x, context):                                              # b f s c,  b 1 d
        if not has_kernels(x):
            return super().forward(x, context)
        x = add_tokens(x, self.attn1(self.norm1(x)), self.attn2(context)[:, 0])
        return x + self.ff(self.norm3(x))


class FastTemporalTransformerBlock(model.TemporalTransformerBlock):
    """The results of both temporal attentions are added in one pass."""

    def forward(self, x, context):                                              # b f s c,  b 1 d
        if not has_kernels(x):
            return super().forward(x, context)
        return FastSpatialTransformerBlock.forward(self, x + self.ff_in(self.norm_in(x)), context)


# ---------------------------------------------------------------------------------------------------------
# Convolutions


class FastTemporalConv(nn.Conv3d):
    """A (3, 1, 1) convolution as a 2-D one over frames and pixels: two to four times as fast on a CPU."""

    def _conv_forward(self, x, weight, bias):                                   # b c f h w
        out = F.conv2d(x.flatten(3), weight[..., 0], bias, padding=self.padding[:2])        # b c f s
        return out.unflatten(3, x.shape[3:])


class FastResBlock(model.ResBlock):
    """Norms with SiLU and shift, and residual addition with both biases, are one kernel each."""

    def branch(self, x, emb=None):
        """The residual branch without the bias of conv2; x [n c h w] or, along time, [b c f s]."""
        shift = self.conv1.bias[None]                                           # 1 c
        if emb is not None:
            shift = shift + self.time_emb_proj(F.silu(emb))                     # b c
        h = without_bias(self.conv1, norm_silu(self.norm1, x))
        shift = repeat(shift, "b c -> (b f) c", f=len(h) // len(shift))
        h = norm_silu(self.norm2, h, shift)                                     # the first h is freed here
        return without_bias(self.conv2, h)

    def forward(self, x, emb=None):
        if not has_kernels(x, channels_last=True):
            return super().forward(x, emb)
        h, bias = self.branch(x, emb), self.conv2.bias
        if not isinstance(self.conv_shortcut, nn.Identity):
            x, bias = without_bias(self.conv_shortcut, x), bias + self.conv_shortcut.bias
        return residual(x, h, bias)


class FastSpatioTemporalResBlock(model.SpatioTemporalResBlock):
    """The mixture of x and x + branch is x + weight * branch, which one kernel computes."""

    def forward(self, x, num_frames, emb=None):
        if not has_kernels(x, channels_last=True):
            return super().forward(x, num_frames, emb)
        return self.over_time(self.spatial_res_block(x, emb), num_frames, emb)

    def over_time(self, x, num_frames, emb=None):
        height, temporal = x.shape[2], self.temporal_res_block
        x = rearrange(x, "(b f) c h w -> b c f (h w)", f=num_frames)            # a view: channels are last
        weight = self.time_mixer.temporal_weight(x.dtype)
        x = residual(x, FastResBlock.branch(temporal, x, emb), temporal.conv2.bias, weight)   # b c f s
        return rearrange(x, "b c f (h w) -> (b f) c h w", h=height)


class FastDownsample(model.Downsample):
    """The VAE's downsampling without a padded copy of x."""

    def forward(self, x):                                                       # n c h w -> n c h/2 w/2
        if self.conv.padding != (0, 0) or not has_kernels(x, channels_last=True):
            return super().forward(x)
        # Padding by 2 on all sides gives the same output after one more row and column, which are dropped.
        return self.conv.bias[:, None, None] + F.conv2d(x, self.conv.weight, stride=2, padding=2)[..., 1:, 1:]


class FoldedUpsample(model.Upsample):
    """Doubling and convolution as one transposed convolution, in a third of the time; for the VAE, also on a
    CPU. Several of the nine taps fall on the same input pixel: their weights are added up beforehand, so at
    most four are left. Not for layers with LoRA: only conv.weight is used."""

    def forward(self, x):                                                       # n c h w -> n c 2h 2w
        if not has_kernels(x, channels_last=True):
            return F.conv_transpose2d(x, self.folded(), self.conv.bias, stride=2, padding=1)
        weight = self.folded().contiguous(memory_format=torch.channels_last)
        return residual(None, F.conv_transpose2d(x, weight, stride=2, padding=1), self.conv.bias)

    def folded(self):
        """The 4x4 weight of the transposed convolution: the 3x3 weight, flipped, with each number spread over
        2x2 places, as doubling spreads each pixel of x."""
        weight = self.conv.weight.flip(2, 3).transpose(0, 1)                    # c_in c_out 3 3
        weight = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)           # c_in c_out 4 4
        return weight.contiguous()


# ---------------------------------------------------------------------------------------------------------
# VAE


class FastDecoder(model.Decoder):
    """The same layers, with less memory. The output of an upsampler is the largest tensor of its resolution,
    and the spatial block after it halves the channels. Without gradients, only a few frames at a time pass
    through these two layers."""

    def forward(self, x, num_frames):                                           # (b f) c h w
        if not has_kernels(x):
            return super().forward(x, num_frames)
        x, upsample = self.mid_block(self.conv_in(x), num_frames), None
        for block in self.up_blocks:
            for resnet in block.resnets:
                x = self.upsampled(resnet.spatial_res_block, upsample, x)
                x, upsample = resnet.over_time(x, num_frames), None
            upsample = block.upsamplers[0] if block.upsamplers else None
        x = self.conv_out(norm_silu(self.conv_norm_out, x))                     # (b f) 3 H W
        height = x.shape[2]
        x = rearrange(x, "(b f) c h w -> b c f (h w)", f=num_frames)
        x = without_bias(self.time_conv_out, x) + self.time_conv_out.bias[:, None, None]    # b 3 f s
        return rearrange(x, "b c f (h w) -> (b f) c h w", h=height)

    def upsampled(self, spatial_block, upsample, x):
        if upsample is None:
            return spatial_block(x)
        frames = max(1, PIXELS_AT_ONCE // (4 * x[0, 0].numel()))
        parts = x.split(len(x) if torch.is_grad_enabled() else frames)
        return torch.cat([spatial_block(upsample(part)) for part in parts])


FAST = {fast_class.__base__: fast_class for fast_class in (
    FastGroupNorm, FastLayerNorm, FastGEGLU, FastTemporalAttention, FastSpatialTransformerBlock,
    FastTemporalTransformerBlock, FastTemporalConv, FastResBlock, FastSpatioTemporalResBlock,
    FastDownsample, FastDecoder)}
