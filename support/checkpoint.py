"""Weights on disk: safetensors files, folders in the diffusers layout, shards, the hub, strict loading.

    find_folder, fetch  path or hub id -> local folder of one network; downloads from the hub
    load_network        config.json and weights of a folder -> network
    save_network        network -> folder
    load_weights        safetensors files -> network; every key and shape must match
    read_safetensors    yields (key, tensor); write_safetensors writes {key: tensor}
    read_json, write_json
    replacing           writes a file under a temporary name and renames it at the end

Nothing here unpickles: .bin, .ckpt, .pt and .pth files can run code when they are opened, and are refused.
A missing or broken file raises ModelError, whose message says what is wrong, where, and what to do. A file
that cannot be read now (permissions, too many open files) raises OSError: its content may be intact.
"""
import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SVD = "stabilityai/stable-video-diffusion-img2vid"
# Beginnings of the keys in svd.safetensors, the single file of Stability's own code.
STABILITY_KEYS = ("model.diffusion_model.", "first_stage_model.", "conditioner.", "input_blocks.")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ModelError(ValueError):
    """A file or configuration that cannot be used. The message says what, where and what to do."""


# ---------------------------------------------------------------------------------------------------------
# Networks


def load_network(cls, folder, variant, dtype, device):
    """Builds the network `cls` that folder/config.json describes and loads the weights beside it.

    variant: None, or "fp16" for *.fp16.safetensors. Raises ModelError.
    """
    config = read_json(folder / "config.json")
    try:
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        with torch.device("meta"):                                      # shapes only; no memory is allocated
            net = cls(**config)
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError, ZeroDivisionError) as error:
        what = f"not a configuration of SVD's {cls.__name__}"
        raise ModelError(f"{folder}/config.json: {what} ({error})") from error
    return load_weights(net, weight_files(folder, variant), folder, dtype, device)


def load_weights(net, files, where, dtype, device):
    """Loads safetensors files into `net`, strictly: no key may be missing, unexpected or of another shape.

    Tensors are converted one by one while they are read, and become the parameters without another copy, so
    memory never holds all weights twice. where: the place that error messages name. Raises ModelError.
    """
    expected, tensors = net.state_dict(), {}
    for key, tensor in read_safetensors(files):
        if key.endswith("embeddings.position_ids"):                     # a constant in older CLIP files
            continue
        if key not in expected:
            raise ModelError(f"{where}: key {key} is not part of the {type(net).__name__} in config.json")
        if tensor.shape != expected[key].shape:
            found, right = tuple(tensor.shape), tuple(expected[key].shape)
            raise ModelError(f"{where}: {key} has shape {found}, config.json asks for {right}")
        # A copy in memory: the file behind a memory map may change later.
        tensors[key] = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
    if missing := [key for key in expected if key not in tensors]:
        more = f", and {len(missing) - 1} more" * (len(missing) > 1)
        raise ModelError(f"{where}: key {missing[0]} is missing{more}")
    net.load_state_dict(tensors, assign=True)
    return net.eval()


def save_network(net, folder, dtype=None, variant=None):
    """Writes config.json and the weights of a network to a folder that its class in diffusers or transformers
    opens. dtype: converts the weights. Raises ModelError if there are LoRA layers."""
    tensors = {key: tensor.to(dtype) if dtype else tensor for key, tensor in net.state_dict().items()}
    if any(".lora_" in key for key in tensors):
        raise ModelError("the network has LoRA layers: merge_lora it first, or save_lora the update alone")
    write_safetensors(Path(folder) / ".".join(filter(None, (net.file_stem, variant, "safetensors"))), tensors)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    kind = {"_class_name": net.class_name} if net.class_name else {"dtype": dtype}
    write_json(Path(folder) / "config.json", {**net.config, **kind})


# ---------------------------------------------------------------------------------------------------------
# Folders, shards and the hub


def find_folder(path, name, variant, revision):
    """The local folder of network `name` ("unet", "vae", "image_encoder") of a pipeline.

    path: the network's folder, its pipeline's folder, or a hub id of either. From the hub only this network
    is fetched, into the cache in HF_HOME; with HF_HUB_OFFLINE=1 only the cache is used. Raises ModelError.
    """
    path, local = str(path), Path(path)
    if local.exists():
        for folder in (local / name, local):
            if (folder / "config.json").is_file():
                return folder
        # Reading the files raises a ModelError of its own for pickles and for Stability's layout.
        weights = [file for file in (local, *local.glob("*")) if file.suffix in (".safetensors", *PICKLES)]
        for _ in read_safetensors(weights):
            pass
        hint = "expected the diffusers layout" + " (for UNet or LoRA weights: --student)" * local.is_file()
        raise ModelError(f"{path}: no {name}/config.json and no config.json in it; {hint}")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        raise ModelError(f"{path}: no such folder (a hub id has the form owner/name)")
    return find_folder(fetch(path, name, variant, revision), name, variant, revision)


def fetch(hub_id, name, variant, revision):
    """Downloads one network of a hub repository, unless it is cached -> local folder of the repository. The
    network is the sub-folder `name`, or the root of a repository that holds no other network."""
    from huggingface_hub import errors, snapshot_download
    # Names in full at the root, because * also matches slashes and would fetch the other networks.
    stems = f"{name}/*model", "diffusion_pytorch_model", "model"
    ends = [f".{variant}{end}" if variant else end for end in (".safetensors", "-*-of-*.safetensors")]
    patterns = [f"{name}/config.json", "config.json", "LICENSE*", *(s + end for s in stems for end in ends)]
    try:
        return snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
    except Exception as error:                                  # also offline, proxy, bad revision or name
        hints = {errors.GatedRepoError: "accept its licence on the hub, then `hf auth login` or set HF_TOKEN",
                 errors.RepositoryNotFoundError: "neither a folder here nor a model that you may see: log in"}
        other = ("no such folder here, and the hub cannot be reached or does not have it "
                 f"({type(error).__name__}); give a local folder, or go online once")
        raise ModelError(f"{hub_id}: {hints.get(type(error), other)}") from error


def weight_files(folder, variant):
    """The .safetensors files of one network: a single file, or all shards. Raises ModelError."""
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
    raise ModelError(f"{folder}: no {'' if variant is None else variant + ' '}.safetensors weights"
                     + f"; there are {', '.join(others)} ones: ask for that variant" * bool(others)
                     + f"; {', '.join(pickles)} is a pickle, which can run code: convert it" * bool(pickles))


# ---------------------------------------------------------------------------------------------------------
# Files


def read_safetensors(files, metadata=None):
    """Yields every (key, tensor) of the files, memory-mapped. metadata: a dictionary to which the files'
    metadata is added. Raises ModelError for a missing or broken file, OSError for one that cannot be read."""
    for file in map(Path, files):
        if file.suffix in PICKLES:
            raise ModelError(f"{file}: a pickle, which can run code when it is opened: get its .safetensors")
        try:
            file.open("rb").close()                 # safe_open calls every file that it cannot open missing
            with safe_open(file, framework="pt") as tensors:
                if metadata is not None:
                    metadata.update(tensors.metadata() or {})
                for key in tensors.keys():
                    if key.startswith(STABILITY_KEYS):
                        raise ModelError(f"{file}: a single file with the keys of Stability's own code, not "
                                         f"read here; use the diffusers folder instead: {SVD} or {SVD}-xt")
                    yield key, tensors.get_tensor(key)
        except (FileNotFoundError, SafetensorError) as error:
            raise ModelError(f"{file}: not a readable safetensors file ({error}): fetch it again") from error


def read_json(file):
    """The content of a JSON file. Raises ModelError for a missing or broken file, OSError as above."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise ModelError(f"{file}: not a readable JSON file ({error})") from error


@contextmanager
def replacing(file):
    """Yields a temporary path, and renames it to `file` at the end. If writing stops half-way, an earlier
    `file` is unchanged. Missing parent folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_safetensors(file, tensors, metadata=None):
    """Writes {key: tensor} and {name: text} metadata to a safetensors file, whole or not at all."""
    with replacing(file) as part:
        part.touch()                                # its mode follows the umask; save_file's own is 0600
        mode = part.stat().st_mode
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, part,
                  {"format": "pt", **(metadata or {})})
        part.chmod(mode)


def write_json(file, content):
    """Writes JSON, whole or not at all."""
    with replacing(file) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")
