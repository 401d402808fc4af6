"""What both training stages need besides the method: processes, flags, weights, CUDA graphs, logs.

    choose_device                       the device that a flag names
    start_world, end_world, leave       torch.distributed under torchrun, or a single process
    average, any_rank                   reductions over all ranks
    fail                                one line on stderr and exit status 2, for every bad input
    LIMITS, number                      the type of each flag: a number between two limits
    command_line, clip_flags            the argument parser of a script; the flags of clips
    training_flags, start_training      the flags of both stages; parses them and starts the processes
    normal, uniforms                    random numbers as functions of (seed, clip number), without any state
    MasterWeights                       fp32 copies of the trainable weights of a network that may be in bf16
    trained_names                       the parameters that --train selects
    use_weights, update_ema             other weights in the same network; exponential moving average
    power_iteration                     the spectral norm of the discriminator, once per step
    finite_step, set_learning_rate      all-reduce, clip and step if all gradients are finite; the schedule
    cuda_graph, cuda_graphs             the GPU work of a function, recorded once and replayed
    Run                                 resumes a run; writes log lines, sample sheets and checkpoints
    publish                             the files for stage 2 and for sampler.py
    waiting                             measures the time that a step waits for data
    Log, peak_memory                    one line per interval, metrics.jsonl, TensorBoard or wandb
"""
import argparse
import errno
import math
import os
import re
import signal
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_flatten, tree_unflatten

import model
from lora import LORA_FILE, load_lora, merge_lora, save_lora
from support import checkpoint
from support.checkpoint import ASSETS, ModelError, write_safetensors

# ---------------------------------------------------------------------------------------------------------
# Processes


# This process: its rank of `size` and its device. restarted: torchrun started the run again after a crash.
World = namedtuple("World", "rank size device restarted", defaults=[False])


def choose_device(name=None):
    """The device with this name, or the fastest one of this computer. A GPU becomes the current one, on which
    kernels, graphs and streams of this process run. Raises ModelError."""
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    found = [own for own in here if not name or name in (own, own.removesuffix(":0"), f"{own}:0")]
    if not found:
        raise ModelError(f"--device {name}: not available here; use {' or '.join(here)}")
    if found[0].startswith("cuda"):
        torch.cuda.set_device(found[0])
    return torch.device(found[0])


def start_world(device=None):
    """The process group that torchrun's environment variables describe, or this process alone -> World.
    Under torchrun each process has a GPU of its own, whose number is LOCAL_RANK. Raises ModelError."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and (device or "cuda").startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"         # at once: choosing GPU 0 first takes memory of it
    device = choose_device(device)
    if device.type == "cuda":
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
            os._exit(status)
        dist.destroy_process_group()


def fail(message, status=2):
    """Ends the program with one line on stderr and exit status `status`. The line is a single write, because
    several processes may fail at the same time."""
    sys.stderr.write(" ".join([f"{Path(sys.argv[0]).name}:", *message.split()]) + "\n")
    leave(status)
    sys.exit(status)


def report_error(memory_hint, kind, error, trace):
    """The sys.excepthook of our scripts. Bad input (ModelError), files that cannot be read or written
    (OSError), a lack of memory and Ctrl-C end the program with one line. Any other error is a fault in the
    code and keeps its traceback. memory_hint: what to try if memory runs out."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE) and not error.filename:
        sys.stdout = None                               # else Python tries again, and fails, at the end
        fail(f"standard output: cannot be written ({error.strerror})")      # files are named, see `writing`
    if isinstance(error, (ModelError, OSError)):
        fail(str(error))
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(
            "DefaultCPUAllocator|bad_alloc", str(error)):
        fail(f"out of memory; {memory_hint}")
    if isinstance(error, KeyboardInterrupt):
        fail("interrupted", status=130)
    sys.__excepthook__(kind, error, trace)


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

# The types of the numbers among the flags of all scripts: from a lowest to a highest value.
LIMITS = {flag: number(low, high) for low, high, flags in (
    (1, 10 ** 9, "max_train_steps checkpointing_steps validation_steps log_steps checkpoints_total_limit"),
    (1, 10 ** 9, "num_clips shard_size log_every checkpoint_every overfit batch_size"),
    (0, 10 ** 9, "warmup_steps warmup"),
    (1, 4096, "lora_rank vae_channels unet_channels"),
    (1, 1000, "num_frames num_videos steps decode_chunk_size validation_teacher_steps"),
    (1, 1000, "workers gpus repeats num_solver_steps gradient_accumulation_steps"),
    (16, 8192, "width height size"),
    (1, 120, "fps"),
    (1, 255, "motion_bucket_id"),
    (0, 2 ** 40, "seed seeds"),                     # derived seeds, about 10^6 times as large, fit 64 bits
    (0.0, 1.0, "learning_rate lr_d ema_decay"),
    (0.0, 10.0, "noise_aug_strength weight_exponent"),
    (0.0, 100.0, "guidance min_guidance_scale max_guidance_scale adv_weight"),
    (1e-8, 1e8, "huber_c max_grad_norm"),
) for flag in flags.split()}


class Parser(argparse.ArgumentParser):
    """Gives each flag in LIMITS its type. An error is one line."""

    def parse_known_args(self, args=None, namespace=None):
        for action in self._actions:
            action.type = action.type or LIMITS.get(action.dest)
        found, unknown = super().parse_known_args(args, namespace)
        if empty := [name for name, value in vars(found).items() if value == ""]:
            fail(f"--{empty[0]} is empty: leave it out, or give a value")
        return found, unknown

    error = staticmethod(fail)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, unless there is none, and calls ints N and other numbers X."""

    def _get_help_string(self, action):
        has_default = str(action.default) not in ("None", "False", "[]")
        return super()._get_help_string(action) if has_default else action.help

    def _get_default_metavar_for_optional(self, action):
        return {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", ""), action.dest.upper())


def command_line(description, memory_hint="try smaller sizes or batches", **settings):
    """The parser of a script's flags, which shows defaults in --help. From here on the errors of bad input
    end the script with one line, see report_error."""
    sys.excepthook = partial(report_error, memory_hint)
    sys.stderr = sys.stderr or open(os.devnull, "w")        # None if it is closed: progress bars write there
    if sys.stdout:
        # Names of files may have bytes that are not UTF-8. A full disk is noticed at the line that meets it,
        # and not at the end, where Python reports it in its own way. os._exit in `leave` loses no line.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    formatter = partial(HelpFormatter, max_help_position=30, width=110)
    return Parser(description=description, formatter_class=formatter, allow_abbrev=False, **settings)


# Flags that may change when a run resumes. All others must equal those of the checkpoint.
FREE = ("output_dir max_train_steps device log_steps validation_steps checkpointing_steps workers cuda_graph "
        "plain validation_teacher_steps checkpoints_total_limit resume_from_checkpoint keep_activations "
        "deterministic report_to dry_run").split()


def clip_flags(flag):
    """Adds the flags of clips, which the trainers and data.py share. flag: add_argument of a parser."""
    flag("--where", nargs=3, action="append", default=[], metavar=("COLUMN", "MIN", "MAX"),
         help="keep only rows of a list of videos between these limits; inf is no limit")
    flag("--width", help="width of clips in pixels; the trainers' default is the UNet's")
    flag("--height", help="height of clips; videos are resized to cover both and cropped")
    flag("--fps", default=7, help="frames per second of clips of videos")
    flag("--motion_bucket_id", help="1 to 255, for all clips of videos (default: measured)")
    flag("--flip", action="store_true", help="mirror half of the clips of videos, at random")
    flag("--workers", default=4, help="processes that decode videos, per training process")
    flag("--seed", default=0, help="seed of weights, data order, start times and noise")


def training_flags(description, presets):
    """A parser with the flags of both stages. Steps, batch size and rates have defaults in the presets."""
    parser = command_line(description, usage="%(prog)s [--preset PRESET] [options]", add_help=False)
    flag, on_off, cuda = parser.add_argument, argparse.BooleanOptionalAction, torch.cuda.is_available()
    flag("--preset", choices=presets, default="toy" if cuda else "toy_cpu", help="defaults of other flags")
    flag("--model", default=str(ASSETS / "toy"), help="the teacher: a pipeline folder or hub id")
    flag("--dino", help="DINOv2 folder or hub id (default: dinov2/ inside --model)")
    flag("--max_train_steps", help="total number of steps, including those before a resume")
    flag("--batch_size", help="clips per step, over all processes")
    flag("--gradient_accumulation_steps", default=1, help="micro-batches per step and process")
    flag("--keep_activations", action=on_off, default=False, help="with accumulation: run the student once, "
         "not twice, per micro-batch; the activations of all micro-batches stay in memory until the G step")
    flag("--data", default="toy", help="toy, a folder or list of videos, or shards of `data.py encode`")
    clip_flags(flag)
    flag("--num_clips", help="toy clips to train on")
    flag("--overfit", metavar="N", help="train on the first N clips only, as a test; sheets show four")
    flag("--learning_rate", help="learning rate of the student")
    flag("--lr_d", help="learning rate of the discriminator")
    flag("--warmup_steps", help="steps of linear warm-up of both learning rates")
    flag("--lr_scheduler", choices=("constant", "cosine"), default="constant", help="besides the warm-up")
    flag("--max_grad_norm", default=1.0, help="gradients are clipped to this norm")
    flag("--lora_rank", help="rank of the student's LoRA")
    flag("--lora_convs", action=on_off, default=False, help="LoRA on convolutions and projections too")
    flag("--discriminator", choices=("latent", "subpixel", "pixel", "unet"), default="latent",
         help="the frozen features of the discriminator, see discriminator.py")
    kinds = ["spatial", "temporal"]
    flag("--heads", nargs="+", choices=kinds, default=kinds, help="kinds of the discriminator's heads")
    flag("--linear_g", action="store_true", help="the student's adversarial loss is -D, not relu(1 - D)")
    flag("--huber_c", default=0.001, help="c of the pseudo-Huber distance")
    flag("--gradient_checkpointing", action=on_off, default=False, help="recompute activations, save memory")
    flag("--cuda_graph", action=on_off, default=False, help="record the steps on a GPU and replay them")
    flag("--deterministic", action="store_true", help="make a GPU repeat a training bit for bit, more slowly")
    flag("--plain", action="store_true", help="use the layers of model.py, without support/kernels.py")
    flag("--mixed_precision", choices=("bf16", "no"), default="bf16" if cuda else "no", help="no means fp32")
    flag("--device", help="cuda, mps or cpu (default: the first of these that is available)")
    flag("--log_steps", help="steps between log lines")
    flag("--validation_steps", help="steps between sample sheets")
    flag("--validation_teacher_steps", default=25, help="teacher's solver steps on the sheets, with guidance")
    flag("--checkpointing_steps", help="steps between checkpoints")
    flag("--checkpoints_total_limit", default=2, help="number of checkpoints to keep")
    flag("--resume_from_checkpoint", default="latest", help="latest, the path of one, or none to start over")
    flag("--report_to", choices=("tensorboard", "wandb", "none"), default="tensorboard", help="where to "
         "send the log, besides metrics.jsonl; tensorboard: if it is installed")
    flag("--dry_run", action="store_true", help="measure data, a step, memory and disk; print how long the "
         "run will take; keep nothing but a list of bad videos")
    return parser


def start_training(parser, presets):
    """Parses the flags, with the defaults of the --preset given, and starts the processes: args, World."""
    parser.set_defaults(**presets[parser.parse_known_args()[0].preset])
    # --help is added only now: argparse would otherwise answer it before the preset's defaults are known.
    parser.add_argument("-h", "--help", action="help", help="show the flags with the defaults of --preset")
    args = parser.parse_args()
    if not args.data:
        parser.error(f"--preset {args.preset} trains on real clips: give --data, see `python data.py --help`")
    args.num_clips = args.overfit or args.num_clips                     # of the toy world
    if args.dry_run:
        args.report_to, args.validation_teacher_steps = "none", 1
    if args.deterministic:
        # cuBLAS reads this at the first use of a GPU. With another setting it may sum in another order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)            # with warn_only=True attention would not repeat
    world = start_world(args.device)
    if args.batch_size % (world.size * args.gradient_accumulation_steps):
        parser.error(f"--batch_size {args.batch_size} must be a multiple of {world.size} processes times "
                     f"{args.gradient_accumulation_steps} gradient accumulation steps")
    if world.rank == 0:                             # before hours of work, not after them
        checkpoint.refuse_overwriting([args.output_dir], [args.model, args.dino, args.data])
        checkpoint.check_writable(args.output_dir / "metrics.jsonl")
        checkpoint.lock(args.output_dir)
    return args, world


# ---------------------------------------------------------------------------------------------------------
# Random numbers


def normal(seed, numbers, stream, shape, device):
    """Standard normal noise [b *shape] for clips `numbers` [b]. Each clip's noise is a function of (seed,
    stream, number), so a batch is the same on any number of processes, and a resumed run needs no generator
    state. Different streams are independent."""
    generator = torch.Generator(device)
    seeds = [((seed * 31 + stream) * 1_000_000_007 + number) % 2 ** 63 for number in numbers.tolist()]
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(s), device=device) for s in seeds])


def uniforms(seed: int, numbers: torch.Tensor, stream: int, n: int) -> torch.Tensor:
    """Uniform numbers [b n] in [0, 1): a hash of (seed, stream, number, column), in wrapping int64."""
    def mix(x):                                                  # SplitMix64's finaliser (Steele et al. 2014)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor     # >> copies the sign bit: mask it away
        return x ^ (x >> 31 & (1 << 33) - 1)
    x = mix(mix(torch.full_like(numbers, seed) + 1) + stream + 1)       # b
    x = mix(x ^ mix(numbers + 0x632BE59BD9B4E019))                      # b
    x = mix(x[:, None] + mix(torch.arange(1, n + 1, device=numbers.device)))            # b n
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
        """Moves the network's gradients to the masters and adds them to those that are there, in fp32. Call
        it after each micro-batch: a sum in bf16 loses small gradients. A foreach call copies all at once."""
        net_weights, masters = list(self.net_weights.values()), list(self.masters.values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net_weights]
        grads_fp32 = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(grads_fp32, grads)
        if masters[0].grad is not None:
            torch._foreach_add_(grads_fp32, [master.grad for master in masters])
        for p, master, grad in zip(net_weights, masters, grads_fp32):
            p.grad, master.grad = None, grad

    @torch.no_grad()
    def copy_to_net(self):
        torch._foreach_copy_(list(self.net_weights.values()), list(self.masters.values()))

    def tensors(self):
        return {name: p.detach() for name, p in self.masters.items()}


def trained_names(net, train):
    """Names of the UNet's parameters that --train selects: LoRA, temporal transformer blocks, or all."""
    def trains(name):
        if ".lora_" in name:
            return "lora" in train
        return train == "all" or "temporal" in train and ".temporal_transformer_blocks." in name
    return [name for name, _ in net.named_parameters() if trains(name)]


@contextmanager
def use_weights(net_weights, tensors):
    """Runs a network with other weights: inside, `tensors` replace the data of the parameters of the same
    names in `net_weights`. Nothing is copied, so student, teacher and EMA are one network in memory. Not for
    autograd: a backward pass would see the student's weights again."""
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


@torch.no_grad()
def power_iteration(disc):
    """Does one power iteration of each spectral norm in the discriminator, and leaves it in eval mode, where
    there are none. So a training step has exactly one, with any number of micro-batches."""
    disc.train()
    for weight in disc.modules():
        if isinstance(weight, ParametrizationList):
            weight()                            # in train mode, computing the weight includes an iteration
    disc.eval()


def finite_step(optimizer, parameters, max_norm):
    """Averages the gradients over all ranks, clips them to `max_norm`, and steps -> (norm, stepped).

    Each parameter must have a gradient. If one is not finite, no rank changes its weights and stepped is
    False. All gradients are None afterwards. One flat all-reduce replaces DistributedDataParallel: the
    trainable weights are few, and a network that acts as student, teacher and EMA has no single forward pass
    for DDP's hooks.
    """
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
    """Sets the learning rate of a step: linear warm-up, then constant. With `decay_steps` this is multiplied
    by half a cosine, which is 1 at step 0 and 0 at step `decay_steps`."""
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
    thousands: Python side effects stop after call 4, and a Python number that `function` uses keeps the value
    it had then. For small networks, launch overhead limits the speed.

    function takes tensors of fixed shapes, None, or named tuples of these, and returns tensors that its next
    call overwrites. parameters: a call sets their gradients if .grad is None before it, and adds to them
    otherwise.

    Three rules. Of several graphs with the same parameters, the same one comes first in each step. All graphs
    are called in the same order in each step, because they share memory. A tensor with gradient history that
    one graph hands to another is the same tensor in each call, so each micro-batch needs its own two graphs.
    """
    stream, pool, _ = graph_memory()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_stream(stream)                               # the default stream cannot be recorded
    graph, parameters, calls = torch.cuda.CUDAGraph(), list(parameters), 0
    buffers = inputs = outputs = None

    def run(*arguments):
        nonlocal buffers, inputs, outputs, calls
        calls += 1
        if parameters and parameters[0].grad is None:           # in the first micro-batch of a step
            # A CUDA graph writes to fixed addresses, so each step uses the same gradients, from zero on.
            buffers = buffers or [torch.empty_like(p) for p in parameters]
            torch._foreach_zero_(buffers)
            for p, buffer in zip(parameters, buffers):
                p.grad = buffer
        if calls < 4:                           # the first calls compile kernels and choose algorithms
            return function(*arguments)
        tensors, structure = tree_flatten(arguments)            # of nested tuples; None counts as a tensor
        if calls == 4:
            inputs = [t if t is None or t.requires_grad else t.clone() for t in tensors]
            with torch.cuda.graph(graph, pool, stream, "thread_local"):
                outputs = function(*tree_unflatten(inputs, structure))
        else:           # not at call 4, where autograd would report that a saved input has changed in place
            for own, given in zip(inputs, tensors):
                if own is not given:
                    own.copy_(given)
        graph.replay()
        return outputs
    return run


def cuda_graphs(function, parameters, count, shared):
    """`count` functions like cuda_graph(function, parameters), one for each micro-batch of a step. shared:
    all are the same graph, which then must not return activations that are still needed in its next call."""
    return [cuda_graph(function, parameters)] * count if shared else \
        [cuda_graph(function, parameters) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------
# A run


class Run:
    """Counts the steps of a run; logs, draws and saves after them. A new Run continues from the checkpoint
    that --resume_from_checkpoint names.

    groups, optimizers: the state of the run, see checkpoint.collect; all else is a function of the step.
    save_sheet(folder, step) draws a sample sheet and returns the PSNR of one step, which the log has with
    --overfit; only rank 0 calls it. After SIGTERM the step in progress is finished and saved, and then
    `stopped` is True. Before there is a Run, SIGTERM ends the process at once: there is nothing to save.
    """

    def __init__(self, args, world, groups, optimizers, save_sheet):
        self.args, self.world, self.save_sheet, self.stop = args, world, save_sheet, []
        self.stopped, self.bad_steps, self.skipped, self.measured = False, 0, torch.zeros(()), {}
        self.groups, self.optimizers = groups | {"count": {"skipped": self.skipped}}, optimizers
        self.config = {k: v for k, v in vars(args).items() if k not in FREE} | {"world_size": world.size}
        self.step = checkpoint.load_checkpoint(
            args.output_dir, args.resume_from_checkpoint, self.config,
            partial(checkpoint.restore, self.groups, optimizers), world.restarted)
        if self.step > args.max_train_steps:
            fail(f"{args.output_dir} has {self.step} steps: give more --max_train_steps")
        # All ranks draw the initial weights from the same seed. The average of equal numbers is that number.
        size = torch.stack([p.detach().norm() for group in groups.values() for p in group.values()]).sum()
        if any_rank((average(size.clone()) - size).abs() > 1e-6 * size, world.device):
            fail("the ranks drew different initial weights: use the same torch and devices on all nodes")
        self.log = Log(args, world, self.step)
        if world.rank == 0 and not args.dry_run:
            checkpoint.rewind(args.output_dir, self.step)               # last, when nothing can fail any more
        signal.signal(signal.SIGTERM, lambda number, frame: self.stop.append(number))

    def announce(self, net, masters, psi):
        """Prints how many parameters train, and the first step. psi: the parameters of the discriminator."""
        count = lambda tensors: sum(tensor.numel() for tensor in tensors)
        self.num_parameters = count(net.parameters())
        if self.world.rank == 0:
            print(f"{count(masters.values()):,d} of {self.num_parameters:,d} parameters train, "
                  f"{count(psi.values()):,d} in the discriminator; from step {self.step}")

    def after_step(self, finite, **norms):
        """Counts the step, then logs, draws and saves what is due. finite: whether all gradients were finite;
        after 5 steps in a row with one that was not, the program ends. norms: scalar tensors to log."""
        args, rank = self.args, self.world.rank
        self.step += 1
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.skipped += not finite
        if self.bad_steps == 5:
            fail(f"gradients were not finite for 5 steps, until step {self.step}; start over "
                 "(--resume_from_checkpoint none) with a lower --learning_rate, or with --mixed_precision no")
        self.log.add(**norms)
        if rank == 0 and self.step % args.validation_steps == 0:
            psnr = self.save_sheet(args.output_dir, self.step)
            self.measured = {"psnr": psnr} if args.overfit else {}
        if self.step % args.log_steps == 0:
            self.log.write(self.step, skipped=int(self.skipped), **self.measured)
            self.measured = {}
        self.stopped = any_rank(self.stop, self.world.device)
        if self.stopped or self.step % args.checkpointing_steps == 0 or self.step == args.max_train_steps:
            if rank == 0:
                tensors, keep = checkpoint.collect(self.groups, self.optimizers), args.checkpoints_total_limit
                checkpoint.save_checkpoint(args.output_dir, self.step, tensors, self.config, keep)
            any_rank(False, self.world.device)                  # the other ranks wait until it is written
        if self.stopped and self.step < args.max_train_steps and rank == 0:
            print(f"stopped by SIGTERM after step {self.step}; run the same command again to continue")


def publish(folder, path, theta, disc_tensors, lora):
    """Writes what stage 2 and sampler.py read: trained weights (student.safetensors), the discriminator's
    (disc.safetensors), the whole UNet (merged/) and, if only LoRA trained, the LoRA for other tools. The
    masters are merged in fp32 into the UNet at `path`: in bf16 the sum would lose most of a small update."""
    write_safetensors(folder / "student.safetensors", theta.tensors())
    write_safetensors(folder / "disc.safetensors", disc_tensors)
    (folder / LORA_FILE).unlink(missing_ok=True)            # of an earlier run with other --train
    unet = load_lora(model.load_unet(path), folder / "student.safetensors")
    if lora:
        save_lora(unet, folder)
    model.save_unet(merge_lora(unet), folder / "merged", torch.float16)
    print(f"wrote {folder}/merged: python sampler.py --image assets/input.png --model {path} "
          f"--student {folder}/merged")


WAITED = [0.0]              # seconds that this process has spent inside `waiting`


@contextmanager
def waiting():
    """Counts the time inside a with statement as waiting for data, which the log shows as data_wait."""
    start = time.perf_counter()
    yield
    WAITED[0] += time.perf_counter() - start


class Log:
    """Writes one line per interval to the terminal, and as JSON to metrics.jsonl: means over the interval and
    all ranks, speed, memory and the time left. data_wait is the share of the time that steps waited for data.
    logits_gap is logits_real - logits_fake: near 0 the discriminator cannot tell them apart. Only rank 0
    writes. --report_to sends the same numbers to TensorBoard or wandb."""

    def __init__(self, args, world, step):
        self.args, self.world, self.step, self.first, self.report = args, world, step, step, None
        self.totals = {}                                                # {name: (sum, number of values)}
        self.start = self.clock = time.perf_counter()                   # of the process and of the interval
        self.waited = WAITED[0]
        if world.rank == 0 and args.report_to == "tensorboard":
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                board = SummaryWriter(str(args.output_dir / "tensorboard"), purge_step=step + 1)
                self.report = lambda values, step: (
                    [board.add_scalar(*value, step) for value in values.items()], board.flush())
        elif world.rank == 0 and args.report_to == "wandb":
            folder = str(args.output_dir)
            try:
                import wandb
                self.report = wandb.init(project="osv", group=folder, dir=folder, config=vars(args)).log
            except Exception as error:                          # not installed, not logged in, offline
                raise ModelError(f"--report_to wandb: {error}; run `pip install wandb` and `wandb login`, "
                                 "or leave the flag out") from error

    def add(self, **values):
        """Sums up scalar tensors of a step or micro-batch, at once, because a CUDA graph overwrites them."""
        for name, value in values.items():
            total, count = self.totals.get(name, (0, 0))
            self.totals[name] = total + value, count + 1

    def write(self, step, **more):
        """Writes the line of an interval and begins the next. more: numbers that are not averaged."""
        now, num_steps = time.perf_counter(), step - self.step
        share = (WAITED[0] - self.waited) / (now - self.clock)
        self.add(data_wait=torch.tensor(share, device=self.world.device))
        means = torch.stack([(total / count).float() for total, count in self.totals.values()])
        values = dict(zip(self.totals, average(means).tolist()))                # over all ranks
        seconds = (now - self.clock) / num_steps
        self.clock, self.waited, self.step, self.totals = now, WAITED[0], step, {}
        if self.world.rank:
            return
        if "loss_d" in values:
            values["logits_gap"] = values["logits_real"] - values["logits_fake"]
        values |= {"s_per_step": seconds, "clips_per_s": self.args.batch_size / seconds, **more,
                   "memory_gb": peak_memory(self.world.device)}
        # From the mean of all steps of this process: sample sheets and checkpoints count.
        left = (now - self.start) / (step - self.first) * (self.args.max_train_steps - step)
        with suppress(OSError):                     # a closed pipe or a full disk does not end the training
            print(f"step {step:6d}", *(f" {name} {value:.4g}" for name, value in values.items()),
                  f" left {timedelta(seconds=round(left))}")
        values["seconds_left"] = left
        metrics = self.args.output_dir / "metrics.jsonl"
        with checkpoint.writing(metrics), open(metrics, "a") as file:
            file.write(checkpoint.to_json({"step": step, **values}))
            if self.report:
                self.report(values, step=step)


def peak_memory(device):
    """Peak memory in GB: of the GPU, or of this process (0 where the system does not report it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(ImportError):                                         # Windows has no resource module
        import resource
        unit = 1 if sys.platform == "darwin" else 1024                  # bytes in a unit of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return 0.0
