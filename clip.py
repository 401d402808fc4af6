"""The image encoder of SVD: CLIP's vision transformer (arXiv 2103.00020) and its projection.

    CLIPVision      normalised pixels -> one embedding a picture, what the UNet's cross-attention looks at
    clip_pixels     frames -> such pixels

It computes what transformers' CLIPVisionModelWithProjection does, under the same names, so files of one load
into the other and a test holds the two together. To import the other takes longer than to make a toy video.
"""
from functools import partial

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

CLIP_SIZE = 224                                    # the resolution of SVD's image encoder
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)    # openai/clip-vit-base-patch32, preprocessor_config.json
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * (1.702 * x).sigmoid()}


class Layer(nn.Module):
    def __init__(self, c, heads, hidden, activation, norm):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(c, c) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c, hidden), "fc2": nn.Linear(hidden, c)})
        self.layer_norm1, self.layer_norm2 = norm(c), norm(c)

    def forward(self, x):                                                       # b s c
        attn, mlp, h = self.self_attn, self.mlp, self.layer_norm1(x)
        q, k, v = (rearrange(layer(h), "b s (a c) -> b a s c", a=self.heads)
                   for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        x = x + attn.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b a s c -> b s (a c)"))
        return x + mlp.fc2(self.activation(mlp.fc1(self.layer_norm2(x))))


class CLIPVision(nn.Module):
    """config: the keys of image_encoder/config.json; what only training needs is kept and not used."""

    def __init__(self, **config):
        super().__init__()
        self.config, c, patch = config, config["hidden_size"], config["patch_size"]
        norm = partial(nn.LayerNorm, eps=config.get("layer_norm_eps", 1e-5))
        layer = partial(Layer, c, config["num_attention_heads"], config["intermediate_size"],
                        ACTIVATIONS[config.get("hidden_act", "quick_gelu")], norm)
        positions = torch.zeros(1 + (config["image_size"] // patch) ** 2, c)    # 1 + patches, c
        embeddings = nn.ModuleDict({                        # nn.Embedding's start takes seconds to import
            "patch_embedding": nn.Conv2d(3, c, patch, patch, bias=False),
            "position_embedding": nn.ParameterDict({"weight": positions})})
        embeddings.class_embedding = nn.Parameter(torch.zeros(c))
        layers = nn.Sequential(*(layer() for _ in range(config["num_hidden_layers"])))
        self.vision_model = nn.ModuleDict({
            "embeddings": embeddings, "pre_layrnorm": norm(c), "encoder": nn.ModuleDict({"layers": layers}),
            "post_layernorm": norm(c)})
        self.visual_projection = nn.Linear(c, config["projection_dim"], bias=False)

    def forward(self, pixels):
        """pixels [b 3 S S], S = image_size, normalised with CLIP's mean and deviation -> [b d]."""
        net, start = self.vision_model, self.vision_model.embeddings
        patches = rearrange(start.patch_embedding(pixels), "b c h w -> b (h w) c")
        x = torch.cat((start.class_embedding.expand(len(pixels), 1, -1), patches), dim=1)       # b s c
        x = net.encoder.layers(net.pre_layrnorm(x + start.position_embedding.weight))[:, 0]     # b c
        return self.visual_projection(net.post_layernorm(x))


def clip_pixels(images):
    """images [n 3 H W] in [-1, 1] -> the image encoder's input [n 3 224 224].

    SVD's own resize: the whole image squashed to a square, after a Gaussian blur with standard deviation
    (factor - 1) / 2 per axis against aliasing, by bicubic interpolation with aligned corners.
    """
    for _ in range(2):                                                          # along rows, then columns
        std = max((images.shape[3] / CLIP_SIZE - 1) / 2, 0.001)
        taps = int(max(4 * std, 3)) // 2 * 2 + 1
        offset = torch.arange(taps, device=images.device, dtype=images.dtype) - taps // 2
        kernel = torch.softmax(-offset.square() / (2 * std * std), dim=0).repeat(3, 1, 1, 1)    # 3 1 1 taps
        padded = F.pad(images, (taps // 2, taps // 2, 0, 0), mode="reflect")
        images = F.conv2d(padded, kernel, groups=3).transpose(2, 3)             # n 3 W H, then n 3 H W
    images = F.interpolate(images, (CLIP_SIZE, CLIP_SIZE), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(v, device=images.device, dtype=images.dtype).view(3, 1, 1)
                 for v in (CLIP_MEAN, CLIP_STD))
    return ((images + 1) / 2 - mean) / std                                      # n 3 224 224
