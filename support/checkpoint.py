"""Weights on disk: safetensors files, folders in the diffusers layout, shards, the hub, strict loading.

    find_folder, fetch  path or hub id -> local folder of one network; downloads from the hub
    load_network        config.json and weights of a folder -> network
    save_network        network -> folder
    load_weights        safetensors files -> network; every key and shape must match
    read_safetensors    yields (key, tensor); write_safetensors writes {key: tensor}
    read_json           a JSON object, with the types of its keys checked; read_lines: one per line
    replacing           writes a file under a temporary name and renames it at the end
    writing             names the file in an error; replacing and check_writable use it
    check_writable, refuse_overwriting, require_file, clear_parts       for the start of a script
    collect, restore    the state of a run as named tensors, and back
    save_checkpoint, load_checkpoint    safetensors and JSON, written atomically; incomplete ones are skipped
    load_stage1         student and discriminator of stage 1, from which stage 2 starts
    rewind, lock        removes what was written after a checkpoint; one run per folder

Nothing here unpickles: .bin, .ckpt, .pt and .pth files can run code when they are opened, and are refused.
A missing or broken file raises ModelError, whose message says what is wrong, where, and what to do. A file
that cannot be read now (permissions, too many open files) raises OSError: its content may be intact.
"""
import inspect
import json
import os
import platform
import re
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

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

# UNet's settings of which a configuration has one number, or a list with a number per level.
PER_LEVEL = ("layers_per_block", "transformer_layers_per_block", "num_attention_heads", "cross_attention_dim")
# The settings that ImageEncoder reads, which its signature does not name.
CLIP = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
            image_size=224, patch_size=14, projection_dim=1024, layer_norm_eps=1e-5, hidden_act="gelu")


def is_like(value, default, highest):
    """Whether a value has the type of `default`. A number is also positive and not above `highest`."""
    if isinstance(default, (str, bool)):
        return type(value) is type(default)
    return type(value) in (int, type(default)) and 0 < value <= highest


def check_config(cls, config):
    """Raises ModelError if a value of a config.json has another type than its default in the signature of
    `cls`, is a list of more than 8, or a number that no network has. `cls` refuses unknown keys and most
    values that do not fit each other."""
    parameters = inspect.signature(cls).parameters
    defaults = CLIP | {key: 0 if p.default is p.empty else p.default for key, p in parameters.items()}
    for key in [key for key in config if key in defaults]:
        value, default = config[key], defaults[key]
        values = value if isinstance(value, list) else [value]
        element = default[0] if isinstance(default, tuple) else default
        highest = 64 if "layers" in key else 65_536
        same_form = isinstance(value, list) == isinstance(default, tuple) or key in PER_LEVEL
        if not (same_form and 0 < len(values) <= 8 and all(is_like(v, element, highest) for v in values)):
            raise ModelError(f"{key} is {value!r:.60}, not a setting like {default!r:.60}")
    full = defaults | config
    if "config" in parameters and full["hidden_size"] % full["num_attention_heads"]:
        raise ModelError(f"num_attention_heads {full['num_attention_heads']} do not divide hidden_size")
    time_ids, dim = "projection_class_embeddings_input_dim", "addition_time_embed_dim"
    if dim in parameters and full[time_ids] != 3 * full[dim]:
        raise ModelError(f"{time_ids} is {full[time_ids]}, not 3 times {dim} {full[dim]}")


def load_network(cls, folder, variant, dtype, device):
    """Builds the network `cls` that folder/config.json describes and loads the weights beside it.

    variant: None, or "fp16" for *.fp16.safetensors. Raises ModelError.
    """
    config = {key: value for key, value in read_json(folder / "config.json").items() if key[:1] != "_"}
    try:
        check_config(cls, config)
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
        if not tensor.is_floating_point():
            raise ModelError(f"{where}: {key} is {tensor.dtype}: weights must be floating-point numbers")
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


def check_fit(unet, vae, image_encoder):
    """Raises ModelError for networks of different models, which cannot work together."""
    takes = [unet.config[size] for size in ("cross_attention_dim", "in_channels", "out_channels")]
    found = [image_encoder.config["projection_dim"], 2 * (c := vae.config["latent_channels"]), c]
    if takes != found:
        raise ModelError(f"the UNet has image embeddings, input and output channels of {takes}, the other "
                         f"networks need {found}: are all of them from one model?")


# ---------------------------------------------------------------------------------------------------------
# Folders, shards and the hub


def find_folder(path, name, variant, revision):
    """The local folder of network `name` ("unet", "vae", "image_encoder") of a pipeline.

    path: the network's folder, its pipeline's folder, or a hub id of either; for "unet" also the output
    folder of a training. From the hub only this network is fetched, into the cache in HF_HOME; with
    HF_HUB_OFFLINE=1 only the cache is used. Raises ModelError.
    """
    path, local = str(path), Path(path)
    if local.exists():
        merged = [local / "merged"] * (name == "unet")                  # the UNet of a training
        for folder in (local / name, local, *merged):
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
    found = {}                                                          # variant -> number of shards -> files
    for file in sorted(folder.glob("*.safetensors")):
        if match := re.fullmatch(name, file.name):
            found.setdefault(match[1], {}).setdefault(int(match[2] or 1), []).append(file)
    if variant in found:
        count, files = min(found[variant].items())
        if len(files) < count:
            raise ModelError(f"{folder}: {len(files)} of {count} weight shards are there: fetch all")
        return files
    kinds = sorted(f"variant {kind}" if kind else "no variant" for kind in found)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    raise ModelError(f"{folder}: no {'' if variant is None else variant + ' '}.safetensors weights"
                     + f"; there are weights with {' and with '.join(kinds)}: ask for these" * bool(kinds)
                     + f"; {', '.join(pickles)} is a pickle, which can run code: convert it" * bool(pickles))


# ---------------------------------------------------------------------------------------------------------
# Files


def read_safetensors(files, metadata=None):
    """Yields every (key, tensor) of the files, memory-mapped. metadata: a dictionary to which the files'
    metadata is added. Raises ModelError for a missing or broken file, OSError for one that cannot be read."""
    for file in map(Path, files):
        if file.suffix in PICKLES:
            raise ModelError(f"{file}: a pickle, which can run code when it is opened: get its .safetensors")
        require_file(file)
        try:
            file.open("rb").close()                 # safe_open would call a file without permission missing
            with safe_open(file, framework="pt") as tensors:
                if metadata is not None:
                    metadata.update(tensors.metadata() or {})
                for key in tensors.keys():
                    if key.startswith(STABILITY_KEYS):
                        raise ModelError(f"{file}: a single file with the keys of Stability's own code, not "
                                         f"read here; use the diffusers folder instead: {SVD} or {SVD}-xt")
                    yield key, tensors.get_tensor(key)
        except (FileNotFoundError, SafetensorError) as error:
            raise ModelError(f"{file}: not a readable safetensors file ({error}): replace it") from error


def require_file(path):
    """Raises ModelError for a path that exists and is no file: reading a named pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: a folder, pipe or device, not a file")


def misfit(content, types):
    """What is wrong with the content of a JSON file that should be an object with the keys of `types`, {key:
    type}; None if nothing is."""
    if not isinstance(content, dict):
        return "it is not a JSON object"
    for key, kind in types.items():
        if type(content.get(key)) is not kind:
            return f"{key} is {content.get(key)!r:.40}, not of type {kind.__name__}"
    return None


def to_json(content, indent=None):
    """Content as JSON. It has no infinity and no NaN: infinity becomes 1e999, which is read as infinity, and
    NaN becomes null."""
    new = {"Infinity": "1e999", "NaN": "null"}          # not inside a string, which the pattern takes whole
    text = json.dumps(content, indent=indent)
    return re.sub(r'"(?:\\.|[^"\\])*"|Infinity|NaN', lambda found: new.get(found[0], found[0]), text) + "\n"


def read_json(file, **types):
    """The object in a JSON file, as a dictionary. types: the type of each key that must be there. Raises
    ModelError for a missing or broken file or another type, OSError for one that cannot be read."""
    require_file(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not a readable JSON file ({error}): replace it") from error
    if wrong := misfit(content, types):
        raise ModelError(f"{file}: {wrong}")
    return content


def read_lines(file, **types):
    """The objects in a file of JSON lines, as dictionaries; none if there is no such file. Lines that are
    damaged or lack a key of `types` are left out, and counted on stderr."""
    require_file(file)
    rows, lines = [], file.read_bytes().splitlines() if file.exists() else []
    for line in lines:
        with suppress(ValueError, RecursionError):
            rows += [row for row in [json.loads(line)] if not misfit(row, types)]
    if len(rows) < len(lines):
        print(f"warning: {file}: {len(lines) - len(rows)} damaged lines are left out", file=sys.stderr)
    return rows


def flush(path):
    """Waits until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def writing(file):
    """Inside a with statement, an error of the system becomes an OSError that names `file`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = error.__cause__ or error                # of a file inside of a folder
        raise OSError(f"{file}: cannot be written ({getattr(cause, 'strerror', None) or cause})") from cause


@contextmanager
def replacing(file):
    """Yields a temporary path; at the end, flushes it to the disk and renames it to `file`, which may be a
    folder. If writing stops half-way, an earlier `file` is unchanged. Missing parent folders are made. An
    error is an OSError that names `file`.

    The temporary name is random, so two processes can write one file. It has only the beginning of the file's
    name, because no name may be longer than 255 bytes. A killed process leaves a hidden file behind. The next
    training, encoding or export in this folder deletes it, see clear_parts."""
    part = file.with_name(f".{file.name[:32]}.{os.urandom(4).hex()}.part")
    with writing(file):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise OSError("it is a device or a pipe")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            yield part
            flush(part)
            part.replace(file)
        finally:
            with suppress(OSError):
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def check_writable(*paths):
    """Raises OSError if one of the files `paths` could not be written. For the start of a script, so that
    hours of work are not lost at its end. A path that is None is ignored."""
    for path in filter(None, paths):
        with writing(path):
            if path.exists() and not path.is_file():
                raise OSError("it is a folder" if path.is_dir() else "it is a device or a pipe")
            path.parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=path.parent).close()


def refuse_overwriting(outputs, inputs):
    """Raises ModelError if a file to write is also a file to read, under whatever name, or if two files to
    write are the same. A folder stands for itself and the weights in it. None is ignored."""
    real = lambda path: os.stat(path)[:3] if os.path.exists(path) else os.path.realpath(path)
    taken = {real(file): file for path in map(Path, filter(None, inputs))
             for file in (path, *path.glob("*.safetensors"))}
    for path in filter(None, outputs):
        if real(path) in taken:
            raise ModelError(f"{path}: would overwrite {taken[real(path)]}; choose another name")
        taken[real(path)] = path


def clear_parts(folder):
    """Deletes what killed processes left in a folder: temporary files of `replacing` and of safetensors."""
    for part in [*folder.glob(".*.part"), *folder.glob(".tmp" + 6 * "?")]:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def write_safetensors(file, tensors, metadata=None):
    """Writes {key: tensor} and {name: text} metadata to a safetensors file, whole or not at all. Raises
    ModelError for NaN or infinity, OSError if the file cannot be written."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"{file}: not written, because {key} has NaN or infinity")
    with replacing(file) as part:
        part.touch()                                # its mode follows the umask; save_file's own is 0600
        mode = part.stat().st_mode
        # One metadata key at most: safetensors writes several in random order, so bytes would differ.
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, part,
                  metadata or {"format": "pt"})
        part.chmod(mode)


def write_json(file, content):
    """Writes JSON, whole or not at all."""
    with replacing(file) as part:
        part.write_text(to_json(content, indent=2))


# ---------------------------------------------------------------------------------------------------------
# Checkpoints of a training run

CHECKPOINTS = "checkpoint-" + 7 * "[0-9]"


def collect(groups, optimizers):
    """The state of a run as named tensors. groups {prefix: {name: tensor}}, optimizers {prefix: Adam}: the
    two moments and the step count of parameter number i are PREFIX.i.exp_avg, .exp_avg_sq and .step."""
    named = {f"{prefix}.{name}": p.detach() for prefix, group in groups.items() for name, p in group.items()}
    for prefix, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            named |= {f"{prefix}.{i}.{name}": value for name, value in state.items()}
    return named


def restore(groups, optimizers, tensors):
    """Copies what `collect` returned into groups and optimizers of the same structure. Raises ModelError, and
    copies nothing, if a name is missing or unexpected, or a shape differs."""
    for prefix, optimizer in optimizers.items():
        # Zeros are how Adam starts by itself. Each moment has its parameter's memory format, for fused Adam.
        new = {i: dict(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
               for i, p in enumerate(optimizer.param_groups[0]["params"]) if f"{prefix}.{i}.step" in tensors}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": new})
    targets = collect(groups, optimizers)
    own, found = ({key: tensor.shape for key, tensor in named.items()} for named in (targets, tensors))
    if wrong := [key for key in own | found if own.get(key) != found.get(key)]:
        raise ModelError(f"{wrong[0]} is missing, unexpected or of another shape")
    for key, target in targets.items():
        target.copy_(tensors[key])


def save_checkpoint(folder, step, tensors, config, keep):
    """Writes checkpoint-STEP completely or not at all, and deletes all but the last `keep` checkpoints."""
    with replacing(folder / f"checkpoint-{step:07d}") as part:
        write_safetensors(part / "state.safetensors", tensors)
        write_json(part / "state.json", {"step": step, "config": config})
    flush(folder)
    for old in sorted(folder.glob(CHECKPOINTS))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def changes(was, now):
    """What differs in the settings `now` from those of an earlier run, in words; empty if nothing does."""
    return "; ".join(f"{key} was {was.get(key)}, is {value}" for key, value in now.items()
                     if was.get(key) != value)


def load_checkpoint(folder, which, config, restore=lambda tensors: None, restarted=False):
    """The step of the newest complete checkpoint in `folder` (which = "latest"), or of the one at path
    `which`; 0 if there is none, or if which = "none".

    restore(tensors) takes its tensors, or raises ModelError if they do not fit; such a checkpoint, and one
    with a damaged file, is incomplete: "latest" skips it with a warning. restarted: torchrun restarted the
    run after a crash, and it continues from its own newest checkpoint, whatever `which` says. Raises
    ModelError if all checkpoints, or that at path `which`, are incomplete, or one has another configuration.
    Raises OSError if a file cannot be read: its checkpoint may be intact, and a run that skipped it would
    delete it."""
    search = (which == "latest" or restarted) and folder.exists()
    # Not glob, which finds nothing in a folder that it may not read.
    candidates = sorted((p for p in folder.iterdir() if p.match(CHECKPOINTS)), reverse=True) if search else []
    candidates += [] if which in ("latest", "none") else [Path(which)]
    for path in candidates:
        try:
            state = read_json(path / "state.json", step=int, config=dict)
            if not (differ := changes(state["config"], config)):
                if path.match(CHECKPOINTS) and path.name != f"checkpoint-{state['step']:07d}":
                    raise ModelError(f"{path}: its step is {state['step']}")
                restore(dict(read_safetensors([path / "state.safetensors"])))
                return state["step"]
        except ModelError as error:
            if path == Path(which):
                raise ModelError(f"{path}: not a complete checkpoint ({error}): name another") from error
            print(f"warning: {path} is incomplete and skipped ({error})", file=sys.stderr)
        else:
            raise ModelError(f"{path} belongs to a run with other settings: {differ}. "
                             "Repeat them, or choose another --output_dir")
    if candidates:                              # a run from step 0 would delete them
        raise ModelError(f"{folder}: none of its checkpoints can be used; delete them to start over")
    return 0


def load_stage1(folder, groups):
    """Copies the tensors of folder/STEM.safetensors into groups[STEM] {name: tensor}, which may have more.
    Raises ModelError if a file is missing, or a tensor does not fit."""
    for stem, group in groups.items():
        file = folder / f"{stem}.safetensors"
        tensors = dict(read_safetensors([file])) if file.is_file() else {}
        if not tensors:
            raise ModelError(f"{file}: missing or empty; run train_stage1.py first, or give --stage1 none")
        for name, tensor in tensors.items():
            if name not in group or group[name].shape != tensor.shape:
                raise ModelError(f"{file}: {name} does not fit; --lora_rank, --lora_convs, --discriminator "
                                 "and --heads must be those of stage 1, and --train must include its --train")
            group[name].data.copy_(tensor)


def rewind(folder, step):
    """Removes what an earlier run wrote after `step`: later checkpoints, which "latest" would find, partial
    files in merged/, and the lines of metrics.jsonl for steps that are computed again."""
    for path in folder.glob(CHECKPOINTS):
        if path.name > f"checkpoint-{step:07d}":
            shutil.rmtree(path)
    clear_parts(folder / "merged")
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        with replacing(metrics) as part:
            rows = read_lines(metrics, step=int)
            part.write_text("".join(to_json(row) for row in rows if row["step"] <= step))


LOCKS = []                                          # open files: the system unlocks a file when it closes


def lock(folder):
    """Locks `folder` for this process until it ends, and clears it of the partial files of earlier processes.
    The system also removes the lock of a killed process. A missing folder is made. Raises ModelError if
    another process has the lock, and names that process."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    with suppress(ImportError):                                         # Windows has no fcntl module
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ModelError(f"{folder}: {file.read()} works in it; stop that, or choose another") from error
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    LOCKS.append(file)
    clear_parts(folder)
