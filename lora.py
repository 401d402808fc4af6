"""LoRA: a low-rank update beside frozen layers (Hu et al., arXiv 2106.09685).

    add_lora        freezes a network and puts a trainable update beside some of its layers
    without_lora    switches the updates off inside a with statement: the network as it was before
    merge_lora      adds the updates to the weights of their layers
    save_lora       writes the updates alone, with PEFT's key names
    load_lora       reads such a file, one of diffusers or one of PEFT
    load_student    reads a distilled UNet, or reads a LoRA and merges it

A layer with weight W, bias b and an update of rank r computes W x + b + (alpha / r) B A x. A has r rows, B
has r columns and starts at zero. For a convolution, A has its kernel size and B is a 1x1 convolution.
"""
import json
import math
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import load_unet
from support import checkpoint
from support.checkpoint import ModelError, load_weights, read_json, read_safetensors, write_safetensors

# A regular expression for the ends of layer paths. attn2.to_q and to_k are left out: they have no influence
# in SVD, see model.ContextAttention.
LORA_TARGETS = r"attn1\.to_[qkv]|attn2\.to_v|attn[12]\.to_out\.0|ff(_in)?\.net\.(0\.proj|2)"
# The longer list of LCM-LoRA and PCM: also the convolutions of all blocks, the layers into and out of
# transformers, and the layers that pass the noise level to the residual blocks.
LORA_CONVS = LORA_TARGETS + r"|proj_(in|out)|conv(1|2|_shortcut)|time_emb_proj|(down|up)samplers\.0\.conv"
LORA_FILE = "pytorch_lora_weights.safetensors"                                  # diffusers' file name
PEFT_FILE = "adapter_model.safetensors"                                         # PEFT's, beside a config
LARGEST = 65_536                                    # rank or alpha that is accepted from a file

# ---------------------------------------------------------------------------------------------------------
# Layers


class LoRA:
    """Base class of LoRALinear and the LoRA convolutions. Its parameters are those of the layer that it
    replaces, not copies, and A and B. These two are created in fp32, whatever the dtype of the layer.

    plain: [the layer without update], for merge_lora. active: whether the update is added.
    """

    def __init__(self, layer, rank, alpha):
        # Takes over all attributes of the layer: its sizes, and its dictionary of parameters, which both
        # share from now on. Not the dictionary of sub-modules, because A and B belong to this object only.
        nn.Module.__init__(self)                    # nn.Linear.__init__ would allocate a second weight
        self.__dict__ |= {key: value for key, value in vars(layer).items() if key != "_modules"}
        self.plain = [layer]                        # in a list: not registered as a sub-module
        self.rank, self.alpha, self.active = rank, alpha, True
        self.lora_A, self.lora_B = self.make_pair(rank, dict(bias=False, device=layer.weight.device))
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)          # so the network starts unchanged

    def update(self):
        """The update (alpha / rank) B A, in the shape of the weight."""
        product = self.lora_B.weight.flatten(1) @ self.lora_A.weight.flatten(1)     # c_out (c_in kernel)
        return product.view_as(self.weight) * (self.alpha / self.rank)


class LoRALinear(LoRA, nn.Linear):
    """A linear layer with an update."""

    def make_pair(self, rank, options):
        return nn.Linear(self.in_features, rank, **options), nn.Linear(rank, self.out_features, **options)

    def forward(self, x):
        out = super().forward(x)
        if not self.active:
            return out
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        low = F.linear(x, A).flatten(0, -2)                                     # n rank
        # addmm: out + (alpha / rank) low B^T in one kernel
        return torch.addmm(out.flatten(0, -2), low, B.T, alpha=self.alpha / self.rank).view_as(out)


class LoRAConv(LoRA):
    """Base class of the two convolutions with an update."""

    def make_pair(self, rank, options):
        kind, window = type(self.plain[0]), (self.kernel_size, self.stride, self.padding)
        return kind(self.in_channels, rank, *window, **options), kind(rank, self.out_channels, 1, **options)

    def forward(self, x):
        out = super().forward(x)
        if not self.active:
            return out
        A, B = (layer.weight.to(x.dtype) for layer in (self.lora_A, self.lora_B))
        low = self.lora_A._conv_forward(x, A, None)                             # n rank ..
        return torch.add(out, self.lora_B._conv_forward(low, B, None), alpha=self.alpha / self.rank)


class LoRAConv2d(LoRAConv, nn.Conv2d):
    """A convolution of single frames with an update."""


class LoRAConv3d(LoRAConv, nn.Conv3d):
    """A temporal convolution with an update."""


LORA_LAYERS = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d, nn.Conv3d: LoRAConv3d}

# ---------------------------------------------------------------------------------------------------------
# Networks


def add_lora(unet, rank, alpha=None, targets=LORA_TARGETS):
    """Freezes the network and puts an update of `rank` beside each linear layer and convolution whose path
    ends in `targets`, a regular expression. alpha defaults to the rank, so that the update has scale 1.
    Returns the network. Raises ModelError if no layer matches or there are updates already."""
    assert rank > 0, f"rank {rank}: not positive"
    if lora_layers(unet):
        raise ModelError("the network has LoRA layers already: merge_lora them first")
    unet.requires_grad_(False)
    layers = {path: layer for path, layer in unet.named_modules()
              if lora_class(layer) and re.search(rf"(^|\.)({targets})$", path)}
    if not layers:
        raise ModelError(f"no layer's name ends in {targets!r}: nothing to add LoRA to")
    for path, layer in layers.items():
        unet.set_submodule(path, with_lora(layer, rank, rank if alpha is None else alpha))
    return unet


def lora_class(layer):
    """The class that adds an update to this layer, or None if no class fits or it has an update already."""
    kinds = [kind for kind in LORA_LAYERS if isinstance(layer, kind)]   # fast layers are sub-classes
    return LORA_LAYERS[kinds[0]] if kinds and not isinstance(layer, LoRA) else None


def with_lora(layer, rank, alpha):
    """A new layer with the parameters of `layer` and an update, to replace it in the network."""
    return lora_class(layer)(layer, rank, alpha)


def lora_layers(unet):
    """{path: layer} of the layers with an update."""
    return {path: layer for path, layer in unet.named_modules() if isinstance(layer, LoRA)}


@contextmanager
def without_lora(unet):
    """Switches all updates off inside a with statement."""
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
    """Adds every update to the weight of its layer, in place: same outputs at no extra cost. To undo this, up
    to rounding, load_lora the update again and merge it with scale=-1. Returns the network."""
    for path, layer in lora_layers(unet).items():
        plain, merged = layer.plain[0], layer.weight.float() + scale * layer.update()
        plain.weight = nn.Parameter(merged.to(layer.weight.dtype))
        unet.set_submodule(path, plain)
    return unet


# ---------------------------------------------------------------------------------------------------------
# Files. Keys are unet.<path>.lora_A.weight and unet.<path>.lora_B.weight. Rank and alpha are in the file's
# metadata; a file without alpha means alpha = rank.


def save_lora(unet, folder):
    """Writes the updates alone to folder/pytorch_lora_weights.safetensors. Raises ModelError."""
    layers = lora_layers(unet)
    if not layers:
        raise ModelError("the network has no LoRA layers to save: call add_lora first")
    tensors = {f"unet.{path}.lora_{m}.weight": getattr(layer, f"lora_{m}").weight
               for path, layer in layers.items() for m in "AB"}
    (rank, alpha), *others = sorted({(layer.rank, layer.alpha) for layer in layers.values()})
    if others:
        raise ModelError(f"layers of different (rank, alpha) {[(rank, alpha), *others]} do not fit one file")
    settings = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": sorted(layers)}
    write_safetensors(Path(folder) / LORA_FILE, tensors, {"lora_adapter_metadata": json.dumps(settings)})


def lora_file(path):
    """The file of a LoRA: `path` itself, or, in a folder, the file with the name of diffusers or of PEFT."""
    if not Path(path).is_dir():
        return Path(path)
    peft = Path(path) / PEFT_FILE
    return peft if peft.is_file() and not (Path(path) / LORA_FILE).is_file() else Path(path) / LORA_FILE


def read_lora(file):
    """The tensors of a LoRA file {key: tensor}, keys relative to the UNet, and its alpha, or None if the file
    has none. Raises ModelError for scales that alpha / rank does not describe."""
    metadata, where = {}, f"{file}: its lora_adapter_metadata"
    tensors = {re.sub(r"^(unet|base_model\.model)\.", "", key): tensor
               for key, tensor in read_safetensors([file], metadata)}   # which also fills metadata
    if not tensors:
        raise ModelError(f"{file}: no LoRA weights in it: give another file")
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        settings = {key.removeprefix("unet."): value for key, value in settings.items()}
    except (AttributeError, ValueError, RecursionError) as error:
        raise ModelError(f"{where} cannot be read ({error}): export the LoRA again") from error
    if file.name == PEFT_FILE:                          # PEFT has its settings in a file beside the weights
        where = file.with_name("adapter_config.json")
        settings = read_json(where)
    alpha = settings.get("lora_alpha")
    if alpha is not None and not (type(alpha) in (int, float) and abs(alpha) <= LARGEST):
        raise ModelError(f"{where}: lora_alpha is {alpha!r:.40}, not a number up to {LARGEST}: correct it")
    if used := [setting for setting in ("use_rslora", "use_dora", "alpha_pattern") if settings.get(setting)]:
        raise ModelError(f"{where}: made with {used[0]}, which is not supported: give a merged UNet instead")
    return tensors, alpha


def load_lora(unet, path, whole=True):
    """Puts the updates saved at `path`, a folder or a .safetensors file, beside the layers of a network.

    whole: the file may also hold whole weights, such as the temporal blocks that stage 2 trains; they replace
    those of the network. Returns the network. Raises ModelError for a key or shape that does not fit; the
    network is unchanged then.
    """
    file = lora_file(path)
    tensors, alpha = read_lora(file)
    layers = {name: layer for name, layer in unet.named_modules() if lora_class(layer)}
    weights, loaded, hint = dict(unet.named_parameters()), {}, "does it belong to another --model?"
    # First all tensors are checked: whole weights, then pairs of A and B, which become new layers.
    replaced = {key: tensors.pop(key) for key in weights
                if whole and key in tensors and tensors[key].shape == weights[key].shape}
    for name in sorted({key.rsplit(".lora_", 1)[0] for key in tensors}):
        pair = [tensors.pop(f"{name}.lora_{m}.weight", None) for m in "AB"]
        if name not in layers or None in pair:
            raise ModelError(f"{file}: {name}.lora_* does not fit a layer of this network: {hint}")
        c_out, *in_shape = layers[name].weight.shape            # in_shape: c_in, then the kernel's size
        found, rank = [tuple(tensor.shape) for tensor in pair], pair[0].numel() // math.prod(in_shape)
        shapes = [(rank, *in_shape), (c_out, rank, *[1] * (len(in_shape) - 1))]
        if found != shapes or not 0 < rank <= LARGEST:
            raise ModelError(f"{file}: {name}.lora_A and lora_B have shapes {found}, not {shapes}: {hint}")
        loaded[name] = with_lora(layers[name], rank, rank if alpha is None else alpha)
        loaded[name].lora_A.weight.data.copy_(pair[0])
        loaded[name].lora_B.weight.data.copy_(pair[1])
    if tensors:
        raise ModelError(f"{file}: key {next(iter(tensors))} is not a LoRA weight with PEFT's names: {hint}")
    # The network changes only now, when nothing can fail any more.
    for key, tensor in replaced.items():
        weights[key].data.copy_(tensor)
    for name, layer in loaded.items():
        unet.set_submodule(name, layer)
    return unet


def load_student(path, unet, variant=None):
    """The distilled UNet at `path`, in the dtype and on the device of `unet`, the UNet of its teacher.

    path: a UNet (folder, hub id, or a file with diffusers' keys), or a LoRA (folder or file), which is merged
    into `unet`. Give `unet` in fp32, and convert the result: a merge in bf16 loses small updates. variant:
    weights to read, if the UNet at `path` has such files. Raises ModelError, also for a UNet that takes other
    inputs than its teacher.
    """
    file, dtype, device = lora_file(path), unet.conv_in.weight.dtype, unet.conv_in.weight.device
    if not file.is_file():                                              # a folder of a UNet, or a hub id
        found = any(checkpoint.find_folder(path, "unet", variant, None).glob(f"*.{variant}*.safetensors"))
        student = load_unet(path, variant=variant if found else None, dtype=dtype, device=device)
        for key in ("in_channels", "cross_attention_dim", "addition_time_embed_dim"):
            if student.config[key] != unet.config[key]:
                raise ModelError(f"{path}: its {key} is {student.config[key]}, that of --model is "
                                 f"{unet.config[key]}: does it belong to another --model?")
        return student
    if any(".lora" in key for key, _ in read_safetensors([file])):
        return merge_lora(load_lora(unet, file))
    # A single file with all weights of a UNet, whose configuration is that of the teacher.
    return load_weights(unet, [file], file, dtype, device)
