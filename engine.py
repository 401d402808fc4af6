"""What both training stages need that is not the method: processes, randomness, weights, checkpoints, logs.

    start_world, end_world              torch.distributed under torchrun, or one plain process
    all_mean, any_rank                  what the processes tell each other
    fail, refusing                      one line and exit status 2: how every bad input ends
    command_line, training_flags        flags, and those of both stages; start_training reads them
    normal                              noise as a pure function of (seed, clip number): any split, any resume
    Weights                             the weights that train, in fp32, outside of a network that may be bf16
    swapped, update_ema                 one network in three roles, one of them an average
    finite_step                         all-reduce, clip, step; refuses what is not finite
    recorder                            a GPU's work of a step in one launch
    collect, restore                    all that evolves, as named tensors
    save_checkpoint, load_checkpoint    safetensors + JSON, atomic, a torn one is skipped
    resume, rewind                      goes on from the last; what was written after it goes
    publish                             what a run leaves: to stage 2, to the sampler
    Log                                 one line per interval, metrics.jsonl, TensorBoard if it is installed

    $ python engine.py out/stage1/metrics.jsonl plot.png        # draws what was logged
"""
import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import model

# ---------------------------------------------------------------------------------------------------------
# Processes


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device
    restarted: bool = False                                     # by torchrun, after a crash


def start_world(device=None):
    """The process group that torchrun's environment variables describe, or this process alone."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if size > 1:
        # torchrun (torch 2.13) keeps its store over a restart, the addresses of the dead included. So each
        # start has a name of its own; on one node, as several count their restarts apart.
        store = next(dist.rendezvous("env://"))[0]
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(restarts, store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, size, device, any_rank(int(restarts), device))


def average(tensor):
    """The mean over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def all_mean(values):
    """The mean over all ranks of each scalar tensor in a dictionary, in one message -> {name: float}."""
    flat = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, average(flat).tolist()))


def any_rank(flag, device):
    """True on all ranks if it is on one: what all have to do together is decided together."""
    if not dist.is_initialized():
        return bool(flag)
    flag = torch.tensor(float(bool(flag)), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def end_world(world):
    """The processes leave together: one that goes early takes the connections of the others with it."""
    any_rank(False, world.device)
    leave(0)


def leave(status):
    """Disconnects. gloo (torch 2.13) now and then aborts a process that tidies up its connections, and more
    often one that does not: there the process ends at once."""
    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()


def fail(message):
    """One line on stderr and exit status 2: how every bad input ends. Written in one piece, as several
    processes may have the same to say at the same time."""
    sys.stderr.write(" ".join([f"{Path(sys.argv[0]).name}:", *message.split()]) + "\n")
    leave(2)
    sys.exit(2)


def positive(text):
    """The type of flags that count something."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


@contextmanager
def refusing():
    """What is wrong with the files that are opened inside ends the program like any other bad input."""
    try:
        yield
    except (model.ModelError, OSError) as problem:
        fail(str(problem))


def command_line(description, **settings):
    """A parser of flags: help tells their defaults, and a bad one ends with one line."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings)
    parser.error = fail
    return parser


# What may change when a run goes on; all else of its configuration is that of its checkpoint.
FREE = ("output_dir", "max_train_steps", "device", "log_steps", "validation_steps", "checkpointing_steps",
        "validation_teacher_steps", "checkpoints_total_limit", "resume_from_checkpoint", "workers",
        "cuda_graph")


def training_flags(description, presets):
    """A parser with the flags that both stages have. Those without a default get one from each preset."""
    parser = command_line(description, add_help=False)
    flag, on_off = parser.add_argument, argparse.BooleanOptionalAction
    flag("--preset", choices=presets, default="toy" if torch.cuda.is_available() else "toy_cpu",
         help="a set of defaults for the flags below; flags win over it")
    flag("--model", default=str(model.ASSETS / "toy"), help="the teacher: pipeline folder or hub id")
    flag("--dino", default=None, help="DINOv2 folder or hub id (None: dinov2/ inside --model)")
    flag("--max_train_steps", type=positive, help="steps in all, those before a resume included")
    flag("--batch_size", type=positive, help="clips per step, over all processes")
    flag("--gradient_accumulation_steps", type=positive, default=1,
         help="parts that a process works its share off in")
    flag("--data", default="toy",
         help="toy, a folder or list of videos, or what `python data.py encode` wrote")
    flag("--where", nargs=3, action="append", default=[], metavar=("COLUMN", "MIN", "MAX"),
         help="of a list of videos, only the rows between these limits")
    flag("--num_clips", type=positive, help="clips of the toy world to train on")
    flag("--width", type=positive, help="of the clips (None: what the UNet was made for)")
    flag("--height", type=positive, help="of the clips")
    flag("--fps", type=positive, default=7, help="of the clips of videos")
    flag("--motion_bucket_id", type=positive, help="of all clips of videos (None: measured on each)")
    flag("--flip", action="store_true", help="mirror every second clip of videos")
    flag("--workers", type=positive, default=4, help="processes that decode videos, for each that trains")
    flag("--learning_rate", type=float, help="of the student")
    flag("--lr_d", type=float, help="of the discriminator")
    flag("--warmup_steps", type=int, help="steps until the learning rates are reached")
    flag("--lr_scheduler", choices=("constant", "cosine"), default="constant",
         help="of both from there on; cosine: to 0 at --max_train_steps")
    flag("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    flag("--lora_rank", type=positive, help="rank of the student's update")
    flag("--lora_convs", action=on_off, default=False, help="LoRA on convolutions and projections, too")
    flag("--discriminator", choices=("latent", "subpixel", "pixel", "unet"), default="latent",
         help="what it sees")
    flag("--heads", nargs="+", choices=("spatial", "temporal"), default=["spatial", "temporal"],
         help="its heads")
    flag("--linear_g", action="store_true", help="-D for the generator instead of relu(1 - D)")
    flag("--huber_c", type=float, default=0.001, help="c of the pseudo-Huber distance")
    flag("--gradient_checkpointing", action=on_off, default=False,
         help="compute activations twice, keep none")
    flag("--cuda_graph", action=on_off, default=False, help="record a step and replay it; not with parts")
    flag("--mixed_precision", choices=("bf16", "no"), default="bf16" if torch.cuda.is_available() else "no",
         help="inside the networks")
    flag("--seed", type=int, default=0, help="of everything drawn")
    flag("--device", help="cuda or cpu (None: cuda if it is there)")
    flag("--log_steps", type=positive, help="steps between log lines")
    flag("--validation_steps", type=positive, help="steps between sample sheets")
    flag("--validation_teacher_steps", type=positive, default=25, help="solver steps of the teacher there")
    flag("--checkpointing_steps", type=positive, help="steps between checkpoints")
    flag("--checkpoints_total_limit", type=positive, default=2, help="how many to keep")
    flag("--resume_from_checkpoint", default="latest", help="latest, the path of one, or none to start over")
    return parser


def start_training(parser, presets):
    """The flags that were given, with the defaults of --preset for the others, also in --help; and, now that
    they are known to be good, the processes -> (args, world)."""
    parser.set_defaults(**presets[parser.parse_known_args()[0].preset])
    parser.add_argument("-h", "--help", action="help",
                        help="show this, with the defaults of the --preset given, and exit")
    args = parser.parse_args()
    if not args.data:
        parser.error("--preset paper trains on real clips: give --data, see `python data.py --help`")
    world = start_world(args.device)
    if args.batch_size % (world.size * args.gradient_accumulation_steps):
        parser.error(f"--batch_size {args.batch_size} does not divide by {world.size} processes times "
                     f"{args.gradient_accumulation_steps} parts")
    return args, world


def stop_signal():
    """A list that is empty until SIGTERM asks to stop: the loop finishes its step, saves and exits with
    status 0."""
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    return asked


# ---------------------------------------------------------------------------------------------------------
# Randomness


def normal(seed, numbers, stream, shape, device):
    """Standard normal noise [b *shape], a clip at a time from (seed, stream, number of the clip). A batch is
    the same on one process or eight, and a resumed run needs no state of a random generator."""
    generator = torch.Generator(device)
    noise = []
    for number in numbers.tolist():
        generator.manual_seed(((seed * 31 + stream) * 1_000_000_007 + number) % 2 ** 63)
        noise.append(torch.randn(shape, generator=generator, device=device))
    return torch.stack(noise)


# ---------------------------------------------------------------------------------------------------------
# Weights


class Weights:
    """The trainable parameters of a network, by name, in fp32. All others freeze.

    The network itself may compute in bf16, where an update of 1e-5 would be rounded away. So the optimiser
    moves fp32 masters, and `push` copies them into the network; `pull` brings its gradients back.
    """

    def __init__(self, net, names):
        parameters = dict(net.requires_grad_(False).named_parameters())
        self.copies = {name: parameters[name].requires_grad_() for name in names}
        self.masters = {
            name: torch.nn.Parameter(p.detach().float().clone()) for name, p in self.copies.items()}

    @torch.no_grad()
    def pull(self):
        copies, masters = list(self.copies.values()), list(self.masters.values())
        grads = [torch.zeros_like(copy) if copy.grad is None else copy.grad for copy in copies]
        wide = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(wide, grads)                       # all at once: there are hundreds
        for copy, master, grad in zip(copies, masters, wide):
            copy.grad, master.grad = None, grad

    @torch.no_grad()
    def push(self):
        torch._foreach_copy_(list(self.copies.values()), list(self.masters.values()))

    def tensors(self):
        return {name: p.detach() for name, p in self.masters.items()}


@contextmanager
def swapped(copies, tensors):
    """Lends a network other weights: teacher, student and EMA share all that does not train, so each of them
    is the one network in memory with its own few tensors put in. Nothing is copied. Not under autograd."""
    own = {name: p.data for name, p in copies.items()}
    try:
        for name, p in copies.items():
            p.data = tensors[name]
        yield
    finally:
        for name, p in copies.items():
            p.data = own[name]


@torch.no_grad()
def update_ema(ema, weights, decay):
    """ema <- decay ema + (1 - decay) weights, in place; both {name: tensor}, fp32."""
    torch._foreach_lerp_(list(ema.values()), [weights[name] for name in ema], 1 - decay)


def finite_step(optimizer, parameters, max_norm):
    """Averages the gradients over all ranks, clips them to `max_norm`, and steps, unless one is not finite:
    then every rank leaves its weights alone. Returns (norm, stepped). Gradients are gone afterwards.

    One flat message instead of DistributedDataParallel: what trains is small, and a network that plays three
    roles in a step has no single forward for DDP's hooks to wait for.
    """
    parameters = list(parameters)
    flat = average(torch.cat([p.grad.flatten() for p in parameters]))
    norm = flat.norm()
    stepped = bool(norm.isfinite())                 # the one place where a step waits for the device
    if stepped:
        flat *= (max_norm / (norm + 1e-6)).clamp(max=1)
        grads = flat.split([p.numel() for p in parameters])
        torch._foreach_copy_([p.grad for p in parameters], [g.view_as(p) for g, p in zip(grads, parameters)])
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, stepped


def schedule(optimizer, lr, step, warmup_steps, decay_steps=None):
    """Sets the learning rate, a pure function of the step: linear warm-up, then constant, or half a cosine
    that reaches 0 at `decay_steps`."""
    factor = min(1.0, (step + 1) / max(1, warmup_steps))
    if decay_steps:
        factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / decay_steps)))
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def pack(optimizer, prefix):
    """Adam's moments as named tensors."""
    return {f"{prefix}.{i}.{key}": value for i, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()}


def unpack(optimizer, prefix, tensors):
    state = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            i, name = key[len(prefix) + 1:].split(".")
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def collect(groups, optimizers):
    """All that evolves as named tensors. groups {prefix: {name: tensor}}, optimizers {prefix: Adam}."""
    tensors = {f"{prefix}.{name}": tensor.detach()
               for prefix, group in groups.items() for name, tensor in group.items()}
    for prefix, optimizer in optimizers.items():
        tensors |= pack(optimizer, prefix)
    return tensors


@torch.no_grad()
def restore(groups, optimizers, tensors):
    for prefix, group in groups.items():
        for name, target in group.items():
            target.copy_(tensors[f"{prefix}.{name}"])
    for prefix, optimizer in optimizers.items():
        unpack(optimizer, prefix, tensors)


# ---------------------------------------------------------------------------------------------------------
# Launches


def recorder(on):
    """-> record(function, parameters=()), which gives the function back, unless `on`. Then, on a GPU, what it
    does there is recorded on its fourth call, as a CUDA graph, and from there on replayed: one launch where
    there were thousands. A GPU is done with the layers of a small network before a processor has asked for
    the next.

    Such a function takes tensors, of the same shapes at each call, or None, and returns tensors that its next
    call overwrites. `parameters` have no gradients before a call; those that it leaves are theirs after it.
    Whatever else it does in Python happens four times. Those of one recorder share memory, so they are always
    called in the same order; a tensor with a history, from one to the next, is the same tensor each time.
    """
    if not on:
        return lambda function, parameters=(): function
    stream = torch.cuda.Stream()                                # nothing is recorded on the default stream
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_stream(stream)
    pool = torch.cuda.graph_pool_handle()

    def record(function, parameters=()):
        graph, parameters, calls = torch.cuda.CUDAGraph(), list(parameters), 0
        inputs, outputs, grads = [], None, []

        def run(*tensors):
            nonlocal inputs, outputs, grads, calls
            calls += 1
            if calls < 4:                                       # kernels get compiled, algorithms chosen
                return function(*tensors)
            if calls == 4:
                inputs = [t if t is None or t.requires_grad else t.clone() for t in tensors]
                with torch.cuda.graph(graph, pool, torch.cuda.current_stream(), "thread_local"):
                    outputs = function(*inputs)
                grads = [p.grad for p in parameters]
            else:                                   # not while recording: a history would see a change
                for own, given in zip(inputs, tensors):
                    if own is not given:
                        own.copy_(given)
            graph.replay()
            for p, grad in zip(parameters, grads):
                p.grad = grad
            return outputs
        return run
    return record


# ---------------------------------------------------------------------------------------------------------
# Checkpoints


CHECKPOINTS = "checkpoint-" + 7 * "[0-9]"


def flush(path):
    """What the system holds back of a file, or of a folder's names, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_checkpoint(folder, step, tensors, config, keep):
    """Writes checkpoint-STEP whole or not at all: into a temporary folder, flushed to disk, then renamed.
    Older ones go, but for the last `keep`, once the new name is on the disk too."""
    part, final = folder / f".checkpoint-{step}.part", folder / f"checkpoint-{step:07d}"
    shutil.rmtree(part, ignore_errors=True)
    model.write_safetensors(part / "state.safetensors", tensors)
    model.write_json(part / "state.json", {"step": step, "config": config, "tensors": len(tensors)})
    for path in (part / "state.safetensors", part / "state.json", part):
        flush(path)
    os.replace(part, final)
    flush(folder)
    for old in sorted(folder.glob(CHECKPOINTS))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder, which, config, restarted=False):
    """(step, tensors) of the newest whole checkpoint in `folder` (`which` = "latest"), or of the one at path
    `which`; None if there is none, or if `which` = "none". Raises ModelError if it was made with another
    configuration. A run that torchrun restarted after a crash goes on from what it saved itself, wherever
    it was told to begin."""
    candidates = sorted(folder.glob(CHECKPOINTS), reverse=True) if which == "latest" or restarted else []
    if which not in ("latest", "none"):
        candidates.append(Path(which))
    for path in candidates:
        try:
            state = model.read_json(path / "state.json")
            tensors = dict(model.read_safetensors([path / "state.safetensors"]))
            if len(tensors) != state["tensors"]:
                raise model.ModelError(f"{path}: {len(tensors)} of {state['tensors']} tensors")
        except (model.ModelError, KeyError, TypeError) as error:
            if path == Path(which):
                raise model.ModelError(f"{path}: not a whole checkpoint ({error})") from error
            print(f"warning: {path} is torn and skipped ({error})", file=sys.stderr)
            continue
        differ = [f"{key} was {state['config'].get(key)}, is {value}" for key, value in config.items()
                  if state["config"].get(key) != value]
        if differ:
            raise model.ModelError(f"{path} belongs to a run with other settings: {'; '.join(differ)}. "
                                   "Repeat them, or choose another --output_dir")
        return state["step"], {key: tensor.clone() for key, tensor in tensors.items()}
    return None


def resume(args, world, groups, optimizers):
    """Goes on where the run in --output_dir stopped, or from the checkpoint that was asked for: puts in what
    evolves, see collect -> (its step or 0, the configuration that the next checkpoints belong to)."""
    config = {key: value for key, value in vars(args).items() if key not in FREE} | {"world_size": world.size}
    with refusing():
        found = load_checkpoint(args.output_dir, args.resume_from_checkpoint, config, world.restarted)
    step, tensors = found or (0, None)
    if found:
        restore(groups, optimizers, tensors)
    if world.rank == 0:
        rewind(args.output_dir, step)
    return step, config


def publish(folder, net, weights, judge, lora):
    """What stage 2 and the sampler take: the weights that trained, the discriminator's tensors, and the whole
    UNet; of one that trained by LoRA alone that update, too, for diffusers and PEFT."""
    model.write_safetensors(folder / "student.safetensors", weights.tensors())
    model.write_safetensors(folder / "disc.safetensors", judge)
    if lora:
        model.save_lora(net, folder)
    model.save_unet(model.merge_lora(net), folder / "merged", torch.float16)
    print(f"wrote {folder}/merged: python sampler.py --image assets/input.png --student {folder}/merged")


def rewind(folder, step):
    """Removes what an earlier run wrote after `step`: no `latest` shall find its checkpoints, and the steps
    done again are told once in metrics.jsonl. Half-written checkpoints go too."""
    newer = [path for path in folder.glob(CHECKPOINTS) if path.name > f"checkpoint-{step:07d}"]
    for path in [*newer, *folder.glob(".checkpoint-*.part")]:
        shutil.rmtree(path)
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        whole = metrics.read_text().rpartition("\n")[0].splitlines()       # the last may be torn
        metrics.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))


# ---------------------------------------------------------------------------------------------------------
# Logs


class Log:
    """One line per interval on the terminal, the same as JSON in metrics.jsonl: means over its steps and over
    all ranks, and how fast they were. Rank 0 writes."""

    def __init__(self, folder, world, step, batch_size):
        self.world, self.file, self.board = world, folder / "metrics.jsonl", None
        self.clock, self.step, self.batch_size, self.totals = time.perf_counter(), step, batch_size, {}
        if world.rank:
            return
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, weight=1, **values):
        """Scalar tensors of a step, or of a part of it that counts `weight`."""
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value * weight

    def write(self, step, **more):
        values = all_mean({name: total / (step - self.step) for name, total in self.totals.items()})
        seconds = (time.perf_counter() - self.clock) / (step - self.step)
        self.clock, self.step, self.totals = time.perf_counter(), step, {}
        if self.world.rank:
            return
        values |= {"s_per_step": seconds, "clips_per_s": self.batch_size / seconds, **more}
        values["memory_gb"] = peak_memory(self.world.device)
        print(f"step {step:6d}", *(f" {name} {value:.4g}" for name, value in values.items()), flush=True)
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        if self.board:
            self.board.flush()


def peak_memory(device):
    """Peak memory in GB: of the GPU, or of this process (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:                                                 # not a Unix
        return 0.0
    kilo = 1 if sys.platform == "darwin" else 1024                      # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9


LINE_COLOURS = "royalblue", "seagreen", "darkorange", "crimson", "purple"


def draw_chart(image, box, title, lines):
    """Lines through points (x, y, label), each in a colour of its own, as large as the box allows: its left,
    top, right and bottom in a PIL image. The title is above it. A point with a label is a dot; where labels
    would meet, one goes up."""
    from PIL import ImageDraw
    draw, (left, top, right, bottom) = ImageDraw.Draw(image), box
    xs, ys = ([point[i] for points in lines for point in points] for i in (0, 1))
    across, up = (right - left) / (max(xs) - min(xs) or 1), (bottom - top) / (max(ys) - min(ys) or 1)
    draw.rectangle(box, outline="lightgrey")
    draw.text((left, top - 18), title, "black")
    taken = []
    for points, colour in zip(lines, LINE_COLOURS):
        places = [(left + across * (x - min(xs)), bottom - up * (y - min(ys))) for x, y, _ in points]
        draw.line(places if len(places) > 1 else places * 2, colour, 2)
        for (x, y), (_, _, label) in zip(places, points):
            if label:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
                x, y = x + 5, y + 2
                while any(abs(x - other_x) < 120 and abs(y - other_y) < 12 for other_x, other_y in taken):
                    y -= 4
                draw.text((x, y), label, colour)
                taken.append((x, y))


def plot(metrics, out, width=360, height=200, columns=3):
    """Draws each number of a metrics.jsonl against the step, a panel each, into a PNG."""
    from PIL import Image
    rows = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    names = [name for name in rows[0] if name != "step"]
    sheet = Image.new("RGB", (columns * width, math.ceil(len(names) / columns) * height), "white")
    for n, name in enumerate(names):
        points = [(row["step"], row[name], "") for row in rows if math.isfinite(row.get(name, math.nan))]
        if points:
            steps, values, _ = zip(*points)
            title = f"{name}  {min(values):.4g} to {max(values):.4g}, steps {steps[0]} to {steps[-1]}"
            left, top = n % columns * width + 12, n // columns * height + 24
            draw_chart(sheet, (left, top, left + width - 24, top + height - 40), title, [points])
    sheet.save(out)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        fail("usage: python engine.py METRICS.jsonl OUT.png")
    plot(*sys.argv[1:])
