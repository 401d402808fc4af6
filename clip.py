"""The image encoder of SVD: CLIP's vision transformer (arXiv 2103.00020) and its projection.

    CLIPVision      normalised pixels -> one embedding a picture, what the UNet's cross-attention looks at

It computes what transformers' CLIPVisionModelWithProjection does, under the same names, so files of one load
into the other and a test holds the two together. To import the other takes longer than to make a toy video.
"""
from functools import partial

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

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
