"""What both training stages need besides the method: processes, flags, weights, checkpoints, logs.

    start_world, end_world, leave       torch.distributed under torchrun, or a single process
    average, any_rank                   reductions over all ranks
    fail, exit_on_error                 one line on stderr and exit status 2, for every bad input
    number, positive                    argparse types of numbers with limits
    command_line, clip_flags            the argument parser of a script; the flags of clips
    training_flags, start_training      the flags of both stages; parses them and starts the processes
    normal, uniforms                    random numbers as functions of (seed, clip number), without any state
    MasterWeights                       fp32 copies of the trainable weights of a network that may be in bf16
    use_weights, update_ema             other weights in the same network; exponential moving average
    finite_step, set_learning_rate      all-reduce, clip and step if all gradients are finite; the schedule
    cuda_graph                          the GPU work of a function, recorded once and replayed
    collect, restore                    the state of a run as named tensors, and back
    save_checkpoint, load_checkpoint    safetensors and JSON, written atomically; incomplete ones are skipped
    rewind                              removes what was written after a checkpoint
    Run                                 resumes a run; writes log lines, sample sheets and checkpoints
    publish                             the files for stage 2 and for sampler.py
    Log, peak_memory                    one line per interval, metrics.jsonl, and TensorBoard if installed
"""
import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist

import model
from lora import load_lora, merge_lora, save_lora
from support import checkpoint
from support.checkpoint import ASSETS, ModelError, read_json, read_safetensors, write_json, write_safetensors

# ---------------------------------------------------------------------------------------------------------
# Processes


# One process of `size`. restarted: torchrun started the run again after a crash.
World = namedtuple("World", "rank size device restarted", defaults=[False])


def start_world(device=None):
    """The process group that torchrun's environment variables describe, or this process alone -> World."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if size > 1:
        # torchrun (torch 2.13) keeps its key-value store over a restart, with the addresses of the dead
        # processes in it. A prefix per restart hides them. Only on one node: several nodes count restarts
        # separately, so their prefixes would differ.
        store = next(dist.rendezvous("env://"))[0]
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(restarts, store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=size)
    return World(rank, size, device, any_rank(int(restarts), device))


def average(tensor):
    """The mean over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def any_rank(flag, device):
    """True on all ranks if `flag` is true on one of them. Also a barrier: all ranks wait for the last."""
    if not dist.is_initialized():
        return bool(flag)
    return average(torch.tensor(float(bool(flag)), device=device)).item() > 0


def end_world(world):
    """Disconnects all ranks together: one that left early would break the connections of the others."""
    any_rank(False, world.device)
    leave(0)


def leave(status):
    """Disconnects this process; with gloo it ends here, with exit status `status`. gloo (torch 2.13)
    sometimes aborts in destroy_process_group, and more often when that is not called, hence os._exit."""
    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            sys.stdout.flush()                                  # stderr is not buffered beyond a line
            os._exit(status)
        dist.destroy_process_group()


def fail(message):
    """Ends the program with one line on stderr and exit status 2. The line is a single write, because
    several processes may fail at the same time."""
    sys.stderr.write(" ".join([f"{Path(sys.argv[0]).name}:", *message.split()]) + "\n")
    leave(2)
    sys.exit(2)


@contextmanager
def exit_on_error(hint="", memory_hint="try smaller sizes or batches"):
    """Ends the program without a traceback. A ModelError or OSError inside prints its message and the hint, a
    lack of GPU memory prints the memory_hint; the exit status is 2, and 130 after Ctrl-C."""
    try:
        yield
    except (ModelError, OSError) as problem:
        fail(f"{problem}{hint}")
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory; {memory_hint}")
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------
# Flags


def number(low, high):
    """The argparse type of a number from low to high: an int if the limits are ints."""
    kind = type(low)

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    parse.__name__ = kind.__name__                  # argparse prints it: "invalid int value"
    return parse


positive = number(1, 10 ** 9)                       # the type of a flag that counts something


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, unless there is none, and calls ints N and other numbers X."""

    def _get_help_string(self, action):
        has_default = str(action.default) not in ("None", "False", "[]")
        return super()._get_help_string(action) if has_default else action.help

    def _get_default_metavar_for_optional(self, action):
        return {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", ""), action.dest.upper())


def command_line(description, **settings):
    """An argument parser that shows defaults in --help and reports an error in one line, with `fail`."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, **settings)
    parser.formatter_class = partial(HelpFormatter, max_help_position=30, width=110)
    parser.error = fail
    return parser


# Flags that may change when a run resumes. All others must equal those of the checkpoint.
FREE = ("output_dir max_train_steps device log_steps validation_steps checkpointing_steps workers cuda_graph "
        "plain validation_teacher_steps checkpoints_total_limit resume_from_checkpoint").split()


def clip_flags(flag):
    """Adds the flags of clips, which the trainers and data.py share. flag: add_argument of a parser."""
    flag("--where", nargs=3, action="append", default=[], metavar=("COLUMN", "MIN", "MAX"),
         help="keep only rows of a list of videos between these limits; inf is no limit")
    flag("--width", type=positive, help="width of clips in pixels; the trainers' default is the UNet's")
    flag("--height", type=positive, help="height of clips; videos are resized to cover both and cropped")
    flag("--fps", type=positive, default=7, help="frames per second of clips of videos")
    flag("--motion_bucket_id", type=positive, help="1 to 255, for all clips of videos (default: measured)")
    flag("--flip", action="store_true", help="mirror half of the clips of videos, at random")
    flag("--workers", type=positive, default=4, help="processes that decode videos, per training process")
    flag("--seed", type=int, default=0, help="seed of weights, data order, start times and noise")


def training_flags(description, presets):
    """A parser with the flags of both stages. Steps, batch size and rates have defaults in the presets."""
    parser = command_line(description, usage="%(prog)s [--preset PRESET] [options]", add_help=False)
    flag, on_off, cuda = parser.add_argument, argparse.BooleanOptionalAction, torch.cuda.is_available()
    flag("--preset", choices=presets, default="toy" if cuda else "toy_cpu", help="defaults of other flags")
    flag("--model", default=str(ASSETS / "toy"), help="the teacher: a pipeline folder or hub id")
    flag("--dino", help="DINOv2 folder or hub id (default: dinov2/ inside --model)")
    flag("--max_train_steps", type=positive, help="total number of steps, including those before a resume")
    flag("--batch_size", type=positive, help="clips per step, over all processes")
    flag("--gradient_accumulation_steps", type=positive, default=1, help="micro-batches per step and process")
    flag("--data", default="toy", help="toy, a folder or list of videos, or shards of `data.py encode`")
    clip_flags(flag)
    flag("--num_clips", type=positive, help="toy clips to train on")
    flag("--learning_rate", type=float, help="learning rate of the student")
    flag("--lr_d", type=float, help="learning rate of the discriminator")
    flag("--warmup_steps", type=int, help="steps of linear warm-up of both learning rates")
    flag("--lr_scheduler", choices=("constant", "cosine"), default="constant", help="after the warm-up")
    flag("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    flag("--lora_rank", type=positive, help="rank of the student's LoRA")
    flag("--lora_convs", action=on_off, default=False, help="LoRA on convolutions and projections too")
    flag("--discriminator", choices=("latent", "subpixel", "pixel", "unet"), default="latent",
         help="the frozen features of the discriminator, see discriminator.py")
    kinds = ["spatial", "temporal"]
    flag("--heads", nargs="+", choices=kinds, default=kinds, help="kinds of the discriminator's heads")
    flag("--linear_g", action="store_true", help="the student's adversarial loss is -D, not relu(1 - D)")
    flag("--huber_c", type=float, default=0.001, help="c of the pseudo-Huber distance")
    flag("--gradient_checkpointing", action=on_off, default=False, help="recompute activations, save memory")
    flag("--cuda_graph", action=on_off, default=False, help="record and replay steps; not with accumulation")
    flag("--plain", action="store_true", help="use the layers of model.py, without support/kernels.py")
    flag("--mixed_precision", choices=("bf16", "no"), default="bf16" if cuda else "no", help="no means fp32")
    flag("--device", help="cuda or cpu (default: cuda if available)")
    flag("--log_steps", type=positive, help="steps between log lines")
    flag("--validation_steps", type=positive, help="steps between sample sheets")
    flag("--validation_teacher_steps", type=positive, default=25, help="teacher's solver steps on the sheets")
    flag("--checkpointing_steps", type=positive, help="steps between checkpoints")
    flag("--checkpoints_total_limit", type=positive, default=2, help="number of checkpoints to keep")
    flag("--resume_from_checkpoint", default="latest", help="latest, the path of one, or none to start over")
    return parser


def start_training(parser, presets):
    """Parses the flags, with the defaults of the --preset given, and starts the processes -> (args, world,
    stop). stop is a list that is empty until SIGTERM arrives: then Run saves after the current step."""
    parser.set_defaults(**presets[parser.parse_known_args()[0].preset])
    # --help is added only now: argparse would otherwise answer it before the preset's defaults are known.
    parser.add_argument("-h", "--help", action="help", help="show the flags with the defaults of --preset")
    args = parser.parse_args()
    if not args.data:
        parser.error("--preset paper trains on real clips: give --data, see `python data.py --help`")
    world = start_world(args.device)
    if args.batch_size % (world.size * args.gradient_accumulation_steps):
        parser.error(f"--batch_size {args.batch_size} must be a multiple of {world.size} processes times "
                     f"{args.gradient_accumulation_steps} gradient accumulation steps")
    stop = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    return args, world, stop


# ---------------------------------------------------------------------------------------------------------
# Random numbers


def normal(seed, numbers, stream, shape, device):
    """Standard normal noise [b *shape] for clips `numbers` [b]. Each clip's noise is a function of (seed,
    stream, number), so a batch is the same on any number of processes, and a resumed run needs no generator
    state. Different streams are independent."""
    generator = torch.Generator(device)
    seeds = [((seed * 31 + stream) * 1_000_000_007 + number) % 2 ** 63 for number in numbers.tolist()]
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(s), device=device) for s in seeds])


def uniforms(seed: int, indices: torch.Tensor, stream: int, n: int) -> torch.Tensor:
    """Uniform numbers [b n] in [0, 1): a hash of (seed, stream, index, column), in wrapping int64."""
    def mix(x):                                                  # SplitMix64's finaliser (Steele et al. 2014)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor     # >> copies the sign bit: mask it away
        return x ^ (x >> 31 & (1 << 33) - 1)
    x = mix(mix(torch.full_like(indices, seed) + 1) + stream + 1)       # b
    x = mix(x ^ mix(indices + 0x632BE59BD9B4E019))                      # b
    x = mix(x[:, None] + mix(torch.arange(1, n + 1, device=indices.device)))            # b n
    return (x >> 40 & (1 << 24) - 1).float() / 2**24                   # 24 bits are exact in fp32, so never 1


# ---------------------------------------------------------------------------------------------------------
# Trainable weights


class MasterWeights:
    """The named parameters of a network as trainable fp32 master weights. All its other parameters freeze.

    The network may compute in bf16, where an update of 1e-5 would be rounded away. So the optimiser updates
    the fp32 masters. net_weights {name: parameter of the network}, masters {name: fp32 parameter}.
    """

    def __init__(self, net, names):
        parameters = dict(net.requires_grad_(False).named_parameters())
        weights = self.net_weights = {name: parameters[name].requires_grad_() for name in names}
        self.masters = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in weights.items()}

    @torch.no_grad()
    def grads_to_masters(self):
        """Moves the network's gradients to the masters, in fp32. One foreach call makes all copies."""
        net_weights, masters = list(self.net_weights.values()), list(self.masters.values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net_weights]
        grads_fp32 = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(grads_fp32, grads)
        for p, master, grad in zip(net_weights, masters, grads_fp32):
            p.grad, master.grad = None, grad

    @torch.no_grad()
    def copy_to_net(self):
        torch._foreach_copy_(list(self.net_weights.values()), list(self.masters.values()))

    def tensors(self):
        return {name: p.detach() for name, p in self.masters.items()}


@contextmanager
def use_weights(net_weights, tensors):
    """Runs a network with other weights: inside, each parameter in `net_weights` has the data of the tensor
    with its name. Nothing is copied, so student, teacher and EMA are one network in memory. Not for autograd:
    a backward pass would see the student's weights again."""
    own = {name: p.data for name, p in net_weights.items()}
    try:
        for name, p in net_weights.items():
            p.data = tensors[name]
        yield
    finally:
        for name, p in net_weights.items():
            p.data = own[name]


@torch.no_grad()
def update_ema(ema, weights, decay):
    """ema <- decay ema + (1 - decay) weights, in place; both {name: fp32 tensor}. OSV section 4.2."""
    torch._foreach_lerp_(list(ema.values()), [weights[name] for name in ema], 1 - decay)


def finite_step(optimizer, parameters, max_norm):
    """Averages the gradients over all ranks, clips them to `max_norm`, and steps -> (norm, stepped).

    If a gradient is not finite, no rank changes its weights and stepped is False. All gradients are None
    afterwards. One flat all-reduce replaces DistributedDataParallel: the trainable weights are few, and a
    network that acts as student, teacher and EMA has no single forward pass for DDP's hooks.
    """
    parameters = list(parameters)
    flat = average(torch.cat([p.grad.flatten() for p in parameters]))
    norm = flat.norm()
    stepped = bool(norm.isfinite())                 # here the CPU waits for the GPU
    if stepped:
        flat *= (max_norm / (norm + 1e-6)).clamp(max=1)
        grads = flat.split([p.numel() for p in parameters])
        torch._foreach_copy_([p.grad for p in parameters], [g.view_as(p) for g, p in zip(grads, parameters)])
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, stepped


def set_learning_rate(optimizer, lr, step, warmup_steps, decay_steps=None):
    """Sets the learning rate of a step: linear warm-up, then constant, or with `decay_steps` half a cosine
    that reaches 0 there."""
    factor = min(1.0, (step + 1) / max(1, warmup_steps))
    if decay_steps:
        factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / decay_steps)))
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


# ---------------------------------------------------------------------------------------------------------
# CUDA graphs


@cache
def graph_memory():
    """The side stream and the memory pool of all CUDA graphs of this process. A pool cannot be used again
    after its last graph is gone, so a first, tiny graph stays alive with it."""
    stream, pool, first = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first, pool, stream, "thread_local"):
        torch.zeros(1, device="cuda")
    return stream, pool, first


def cuda_graph(function, parameters=()):
    """A function that does the GPU work of `function` as one CUDA graph.

    Calls 1 to 3 run normally, call 4 is recorded, later calls only replay the GPU work, one launch instead of
    thousands: Python side effects stop after call 4. For small networks, launch overhead limits the speed.

    function takes tensors (the same shapes in each call) or None, and returns tensors that its next call
    overwrites. parameters get gradients in it: their .grad is None before each call and set after it. All
    graphs of a process share one memory pool, so they must be called in the same order in each step. A tensor
    with gradient history, which one graph returns and another takes, must be the same tensor in each call.
    """
    stream, pool, _ = graph_memory()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_stream(stream)                               # the default stream cannot be recorded
    graph, parameters, calls = torch.cuda.CUDAGraph(), list(parameters), 0
    inputs, outputs, grads = [], None, []

    def run(*tensors):
        nonlocal inputs, outputs, grads, calls
        calls += 1
        if calls < 4:                           # the first calls compile kernels and choose algorithms
            return function(*tensors)
        if calls == 4:
            inputs = [t if t is None or t.requires_grad else t.clone() for t in tensors]
            with torch.cuda.graph(graph, pool, stream, "thread_local"):
                outputs = function(*inputs)
            grads = [p.grad for p in parameters]
        else:           # not at call 4, where autograd would report that a saved input has changed in place
            for own, given in zip(inputs, tensors):
                if own is not given:
                    own.copy_(given)
        graph.replay()
        for p, grad in zip(parameters, grads):
            p.grad = grad
        return outputs
    return run


# ---------------------------------------------------------------------------------------------------------
# Checkpoints

CHECKPOINTS = "checkpoint-" + 7 * "[0-9]"


def collect(groups, optimizers):
    """The state of a run as named tensors. groups {prefix: {name: tensor}}, optimizers {prefix: Adam}: the
    two moments and the step count of parameter number i are PREFIX.i.exp_avg, .exp_avg_sq and .step."""
    named = {f"{prefix}.{name}": p.detach() for prefix, group in groups.items() for name, p in group.items()}
    for prefix, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            named |= {f"{prefix}.{i}.{name}": value for name, value in state.items()}
    return named


@torch.no_grad()
def restore(groups, optimizers, tensors):
    """Copies what `collect` returned into groups and optimizers of the same structure."""
    for prefix, group in groups.items():
        for name, target in group.items():
            target.copy_(tensors[f"{prefix}.{name}"])
    for prefix, optimizer in optimizers.items():
        parameters, state = optimizer.param_groups[0]["params"], {}
        for key in [key for key in tensors if key.startswith(f"{prefix}.")]:
            i, name = key.removeprefix(f"{prefix}.").split(".")
            value, p = tensors[key], parameters[int(i)]
            # Files hold contiguous tensors, but fused Adam needs moments in the parameter's memory format.
            value = value if name == "step" else torch.empty_like(p).copy_(value)
            state.setdefault(int(i), {})[name] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def flush(path):
    """Waits until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_checkpoint(folder, step, tensors, config, keep):
    """Writes checkpoint-STEP completely or not at all: into a temporary folder, flushed to disk, then
    renamed. Afterwards all but the last `keep` checkpoints are deleted."""
    part, final = folder / f".checkpoint-{step}.part", folder / f"checkpoint-{step:07d}"
    shutil.rmtree(part, ignore_errors=True)
    write_safetensors(part / "state.safetensors", tensors)
    write_json(part / "state.json", {"step": step, "config": config, "tensors": len(tensors)})
    for path in (part / "state.safetensors", part / "state.json", part):
        flush(path)
    os.replace(part, final)
    flush(folder)
    for old in sorted(folder.glob(CHECKPOINTS))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder, which, config, restarted=False):
    """(step, tensors) of the newest complete checkpoint in `folder` (which = "latest"), or of the one at path
    `which`; (0, {}) if there is none, or if which = "none". restarted: torchrun restarted the run after a
    crash, and it continues from its own newest checkpoint, whatever `which` says. Raises ModelError if the
    checkpoint at path `which` is incomplete, or if one was made with another configuration. Raises OSError if
    a file cannot be read: its checkpoint may be intact, and a run that skipped it would delete it."""
    search = (which == "latest" or restarted) and folder.exists()
    # Not glob, which finds nothing in a folder that it may not read.
    candidates = sorted((p for p in folder.iterdir() if p.match(CHECKPOINTS)), reverse=True) if search else []
    candidates += [] if which in ("latest", "none") else [Path(which)]
    for path in candidates:
        try:
            state = read_json(path / "state.json")
            tensors = dict(read_safetensors([path / "state.safetensors"]))
            if len(tensors) != state["tensors"]:
                raise ModelError(f"{path}: {len(tensors)} of {state['tensors']} tensors")
        except (ModelError, KeyError, TypeError) as error:
            if path == Path(which):
                raise ModelError(f"{path}: not a complete checkpoint ({error})") from error
            print(f"warning: {path} is incomplete and skipped ({error})", file=sys.stderr)
            continue
        differ = [f"{key} was {state['config'].get(key)}, is {value}" for key, value in config.items()
                  if state["config"].get(key) != value]
        if differ:
            raise ModelError(f"{path} belongs to a run with other settings: {'; '.join(differ)}. "
                             "Repeat them, or choose another --output_dir")
        return state["step"], {key: tensor.clone() for key, tensor in tensors.items()}
    return 0, {}


def rewind(folder, step):
    """Removes what an earlier run wrote after `step`: later checkpoints, which "latest" would find, partial
    checkpoints, and the lines of metrics.jsonl for steps that are computed again."""
    newer = [path for path in folder.glob(CHECKPOINTS) if path.name > f"checkpoint-{step:07d}"]
    for path in [*newer, *folder.glob(".checkpoint-*.part")]:
        shutil.rmtree(path)
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        complete = metrics.read_text().rpartition("\n")[0].splitlines()     # the last line may be cut off
        with checkpoint.replacing(metrics) as part:
            part.write_text("".join(line + "\n" for line in complete if json.loads(line)["step"] <= step))


def publish(folder, path, theta, disc_tensors, lora):
    """Writes what stage 2 and sampler.py read: trained weights (student.safetensors), the discriminator's
    (disc.safetensors), the whole UNet (merged/) and, if only LoRA trained, the LoRA for other tools. The
    masters are merged in fp32 into the UNet at `path`: in bf16 the sum would lose most of a small update."""
    write_safetensors(folder / "student.safetensors", theta.tensors())
    write_safetensors(folder / "disc.safetensors", disc_tensors)
    unet = load_lora(model.load_unet(path), folder / "student.safetensors")
    if lora:
        save_lora(unet, folder)
    model.save_unet(merge_lora(unet), folder / "merged", torch.float16)
    print(f"wrote {folder}/merged: python sampler.py --image assets/input.png --student {folder}/merged")


# ---------------------------------------------------------------------------------------------------------
# A run


class Run:
    """Counts the steps of a run; logs, draws and saves after them. A new Run continues from the checkpoint
    that --resume_from_checkpoint names.

    groups, optimizers: the state of the run, see `collect`; all else is a function of the step. stop: from
    start_training. save_sheet(step) draws a sample sheet; only rank 0 calls it. `stopped` becomes True
    after SIGTERM, when the checkpoint is written.
    """

    def __init__(self, args, world, stop, groups, optimizers, save_sheet):
        self.args, self.world, self.stop, self.save_sheet = args, world, stop, save_sheet
        self.stopped, self.bad_steps, self.skipped = False, 0, torch.zeros(())
        self.groups, self.optimizers = groups | {"count": {"skipped": self.skipped}}, optimizers
        self.config = {k: v for k, v in vars(args).items() if k not in FREE} | {"world_size": world.size}
        with exit_on_error():
            self.step, tensors = load_checkpoint(
                args.output_dir, args.resume_from_checkpoint, self.config, world.restarted)
        if tensors:
            restore(self.groups, optimizers, tensors)
        if world.rank == 0:
            rewind(args.output_dir, self.step)
        self.log = Log(args.output_dir, world, self.step, args.batch_size)

    def announce(self, net, masters, psi):
        """Prints how many parameters train, and the first step. psi: the parameters of the discriminator."""
        count = lambda tensors: sum(tensor.numel() for tensor in tensors)
        if self.world.rank == 0:
            print(f"{count(masters.values()):,d} of {count(net.parameters()):,d} parameters train, "
                  f"{count(psi.values()):,d} in the discriminator; from step {self.step}")

    def after_step(self, finite, **norms):
        """Counts the step, then logs, draws and saves what is due. finite: whether all gradients were finite;
        after 5 steps in a row with one that was not, the program ends. norms: scalar tensors to log."""
        args, rank = self.args, self.world.rank
        self.step += 1
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.skipped += not finite
        if self.bad_steps == 5:
            fail(f"gradients were not finite for 5 steps, until step {self.step}; start over (--resume_from_"
                 "checkpoint none) with a lower --learning_rate, or with --mixed_precision no")
        self.log.add(**norms)
        if self.step % args.log_steps == 0:
            self.log.write(self.step, skipped=int(self.skipped))
        if rank == 0 and self.step % args.validation_steps == 0:
            self.save_sheet(self.step)
        self.stopped = any_rank(self.stop, self.world.device)
        if self.stopped or self.step % args.checkpointing_steps == 0 or self.step == args.max_train_steps:
            if rank == 0:
                tensors, keep = collect(self.groups, self.optimizers), args.checkpoints_total_limit
                save_checkpoint(args.output_dir, self.step, tensors, self.config, keep)
            any_rank(False, self.world.device)                  # the other ranks wait until it is written
        if self.stopped and self.step < args.max_train_steps and rank == 0:
            print(f"stopped by SIGTERM after step {self.step}; run the same command again to continue")


class Log:
    """Writes one line per interval to the terminal, and as JSON to metrics.jsonl: means over the interval and
    all ranks, speed and memory. Only rank 0 writes."""

    def __init__(self, folder, world, step, batch_size):
        self.world, self.file, self.board = world, folder / "metrics.jsonl", None
        self.batch_size, self.step, self.clock = batch_size, step, time.perf_counter()
        self.totals = {}                                                # {name: (sum, number of values)}
        if world.rank == 0:
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, **values):
        """Sums up scalar tensors of a step or micro-batch, at once, because a CUDA graph overwrites them."""
        for name, value in values.items():
            total, count = self.totals.get(name, (0, 0))
            self.totals[name] = total + value, count + 1

    def write(self, step, **more):
        """Writes the line of an interval and begins the next. more: numbers that are not averaged."""
        means = torch.stack([(total / count).float() for total, count in self.totals.values()])
        values = dict(zip(self.totals, average(means).tolist()))                # over all ranks
        seconds = (time.perf_counter() - self.clock) / (step - self.step)
        self.clock, self.step, self.totals = time.perf_counter(), step, {}
        if self.world.rank:
            return
        values |= {"s_per_step": seconds, "clips_per_s": self.batch_size / seconds, **more}
        values["memory_gb"] = peak_memory(self.world.device)
        print(f"step {step:6d}", *(f" {name} {value:.4g}" for name, value in values.items()), flush=True)
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def peak_memory(device):
    """Peak memory in GB: of the GPU, or of this process (0 where the system does not report it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(ImportError):                                         # Windows has no resource module
        import resource
        unit = 1 if sys.platform == "darwin" else 1024                  # bytes in a unit of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return 0.0
