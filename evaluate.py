"""How good are the videos? Frechet Video Distance, what else tells, and the paper's tables as commands.

    VideoClassifier       the toy world's stand-in for I3D: a small 3-D convolutional network, called like it
    load_detector         an I3D TorchScript file, or the folder of a VideoClassifier
    video_features        clips -> the detector's logits, which the distance compares
    frechet_distance      between Gaussians fitted to two sets of features
    interval              what chance makes of it, by bootstrap
    measure               one way of sampling -> all its figures

    $ python evaluate.py fvd --student out/stage2/merged --sampler tts      # one way of sampling, any --data
    $ python evaluate.py student --report results/student.json  # the one in assets/, beside its teacher
    $ python evaluate.py table1 --report results/table1.json
    $ python evaluate.py table2 --rows a b --report results/table2.json
    $ python results/readme.py                              # the README's tables and plot, from results/

FVD (Unterthiner et al., arXiv 1812.01717) is the Frechet distance between real and generated clips in the
space of the 400 logits of an I3D network trained on Kinetics. The toy world has its own classifier, which
train_toy.py trains on what a scene shows and how it moves; that distance is called toy-FVD. Distances by
different detectors, or of other numbers of clips, do not compare, so each comes with its protocol.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import data
import engine
import model
import sampler
import solver

# ---- The detector ---------------------------------------------------------------------------------------


I3D = "flateon/FVD-I3D-torchscript", "i3d_torchscript.pt"           # a copy of StyleGAN-V's file on the hub


class VideoClassifier(nn.Module):
    """Multi-label classifier of clips: 3x3x3 convolutions that halve space four times and time twice."""

    def __init__(self, num_classes: int, channels=(32, 64, 96, 128), size: int = 128):
        super().__init__()
        self.config = {"num_classes": num_classes, "channels": list(channels), "size": size}
        c1, c2, c3, c4 = channels
        conv = lambda c_in, c, stride, kernel=(3, 3, 3): nn.Sequential(
            nn.Conv3d(c_in, c, kernel, stride, padding=[k // 2 for k in kernel], bias=False),
            nn.GroupNorm(8, c), nn.SiLU())
        self.stem = conv(3, c1, (1, 2, 2), (3, 5, 5))
        self.stages = nn.Sequential(conv(c1, c2, (1, 2, 2)), conv(c2, c3, (2, 2, 2)), conv(c3, c4, (2, 2, 2)))
        self.mix = conv(c4, c4 // 2, 1)
        self.head = nn.Linear(c4 // 2 * 4 * 4, num_classes)     # a coarse map, not its mean: where counts too

    def forward(self, x: Tensor, rescale=True, resize=True, return_features=True) -> Tensor:
        """x [b 3 f H W] -> logits [b k], or probabilities if not return_features. Called like I3D's script.

        rescale: x is in [0, 255], not in [-1, 1]. resize: bring frames to the size that was trained at.
        """
        if rescale:
            x = x / 127.5 - 1
        if resize and x.shape[-2:] != (self.config["size"], self.config["size"]):
            num_frames, size = x.shape[2], (self.config["size"],) * 2
            x = F.interpolate(rearrange(x, "b c f h w -> (b f) c h w"), size, mode="bilinear", antialias=True)
            x = rearrange(x, "(b f) c h w -> b c f h w", f=num_frames)
        x = x.to(self.head.weight.dtype)
        x = self.mix(self.stages(self.stem(x))).mean(dim=2)                                 # b c h w
        logits = self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))                          # b k
        return logits if return_features else logits.sigmoid()


def save_detector(detector: VideoClassifier, folder, dtype=None):
    tensors = {key: tensor.to(dtype) if dtype else tensor for key, tensor in detector.state_dict().items()}
    model.write_safetensors(Path(folder) / "model.safetensors", tensors)
    model.write_json(Path(folder) / "config.json", {"_class_name": "VideoClassifier", **detector.config})


def load_detector(path, device="cpu"):
    """I3D as a TorchScript file (StyleGAN-V's i3d_torchscript.pt; "i3d" fetches it from the hub), or a folder
    that save_detector wrote. Raises ModelError. A TorchScript file is a program: take it from where you
    trust it."""
    try:
        if path == "i3d":
            from huggingface_hub import hf_hub_download
            path = hf_hub_download(*I3D)
        if not Path(path).is_dir():
            return torch.jit.load(os.fspath(path), map_location=device).eval()
        return model.load_network(VideoClassifier, Path(path), None, torch.float32, device)
    except (OSError, RuntimeError, ValueError) as error:                            # of hub, file or contents
        raise model.ModelError(f"{path}: cannot be loaded as a detector ({error})") from error


def fingerprint(net):
    """16 hexadecimal digits of the SHA-256 of a network's weights, in fp32."""
    weights = b"".join(w.detach().float().cpu().numpy().tobytes() for w in net.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


@torch.no_grad()
def video_features(detector, frames: Tensor, batch_size: int = 64) -> Tensor:
    """Clips [b f 3 H W], uint8 or in [-1, 1] -> features [b k], of the 8-bit pixels that a viewer sees."""
    device, features = next(detector.parameters(), frames).device, []
    for part in frames.split(batch_size):
        pixels = rearrange(to_bytes(part).to(device).float(), "b f c h w -> b c f h w")
        features.append(detector(pixels, rescale=True, resize=True, return_features=True).float())
    return torch.cat(features)


def to_bytes(frames):
    """Frames in [-1, 1], or bytes already -> uint8."""
    if frames.dtype == torch.uint8:
        return frames
    return (frames.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()


# ---- The distance ---------------------------------------------------------------------------------------


def frechet_distance(features_real: Tensor, features_fake: Tensor) -> float:
    """Squared 2-Wasserstein distance between the Gaussians fitted to two sets of features, [n d] each:

        |mu_r - mu_f|^2 + tr(S_r) + tr(S_f) - 2 tr((S_r^1/2 S_f S_r^1/2)^1/2)

    The matrix in the last root is symmetric and has the eigenvalues of S_r S_f, so two symmetric
    eigendecompositions in float64 do, also for singular covariances (fewer clips than features). The estimate
    is biased upwards for few clips: compare only distances of equal n.
    """
    device = "cpu" if features_real.device.type == "mps" else features_real.device          # no float64 there
    real, fake = (x.detach().to(device).double() for x in (features_real, features_fake))           # n d
    cov_real, cov_fake = (torch.atleast_2d(torch.cov(x.T, correction=1)) for x in (real, fake))     # d d
    values, vectors = torch.linalg.eigh(cov_real)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                                         # d d
    overlap = torch.linalg.eigvalsh(root @ cov_fake @ root).clamp(min=0).sqrt().sum()
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    return float(shift + cov_real.trace() + cov_fake.trace() - 2 * overlap)


@torch.no_grad()
def interval(features_real: Tensor, features_fake: Tensor, rounds: int = 40, seed: int = 0) -> float:
    """Half the width of a 95 % interval around the distance: 1.96 standard deviations over sets of pictures
    drawn anew, with replacement. Row i of both [n d] is of picture i, and they are drawn together: which
    pictures a set happens to have moves both sides alike. Their mean is no estimate: sets with repetitions
    are farther apart."""
    generator, n = torch.Generator().manual_seed(seed), len(features_real)
    draws = (torch.randint(n, (n,), generator=generator) for _ in range(rounds))
    return 1.96 * torch.tensor([frechet_distance(features_real[i], features_fake[i])
                                for i in draws]).std().item()


# ---- One way of sampling, and all its figures -----------------------------------------------------------


class Reference(NamedTuple):
    """Real clips that nothing was trained on: what is compared of them, and what each sampler is given."""

    ends: Tensor                # n 2 3 H W  uint8, on the CPU: first and last frame
    shown: list                 # of f 3 H W, the same: the first clips, to look at
    cond: model.Cond            # of their first frames, on the CPU
    features: Tensor            # n k
    colours: Tensor | None      # n p        toy world: which of data.COLOURS the shapes have
    moved: Tensor | None        # n          toy world: pixels per frame that they move


SHOWN = 3                                               # clips in a picture


@torch.no_grad()
def open_reference(args, vae, image_encoder, detector, num_frames, width, height, device):
    conds, kept, shown = [], [], []
    if args.data != "toy":
        clips = data.Clips(data.open_files(args.data), args.seed, num_frames, width, height)
    for part in torch.arange(args.num_clips).split(args.batch_size):
        colours = None
        if args.data == "toy":
            batch = data.toy_clips(args.seed + data.HELD_OUT, part, num_frames, height, device)
            pixels, bucket = batch.frames, batch.motion_bucket_id
            colours = batch.attributes[:, :len(data.COLOURS)].bool()                                # b p
        else:
            pixels = rearrange(clips.take(part), "b f h w c -> b f c h w").to(device).float() / 127.5 - 1
            bucket = torch.full((len(part),), 127, device=device)
        generators = [torch.Generator().manual_seed(i) for i in part.tolist()]
        noise = sampler.draw_noise(pixels[:, 0].shape, generators, device)                          # b 3 H W
        cond = model.encode_condition(vae, image_encoder, pixels[:, 0], noise, num_frames=num_frames,
                                      fps=data.FPS, motion_bucket_id=bucket, noise_aug_strength=0.02)
        conds.append([x.float().cpu() for x in cond])
        frames = to_bytes(pixels)
        moved = None if colours is None else displacement(frames, colours)
        kept.append((frames[:, [0, -1]].cpu(), video_features(detector, frames), colours, moved))
        shown += frames[:SHOWN - len(shown)].cpu()
    ends, features, colours, moved = (None if part[0] is None else torch.cat(part) for part in zip(*kept))
    return Reference(ends, shown, model.Cond(*map(torch.cat, zip(*conds))), features, colours, moved)


def by_sampler(draw, vae, reference, device):
    """draw(cond, generators) -> x0 [b f 4 h w] as something to `measure`."""
    @torch.no_grad()
    def generate(numbers, seed):
        cond = model.Cond(*(x[numbers].to(device) for x in reference.cond))
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in numbers.tolist()]
        began = time.perf_counter()
        x0 = draw(cond, generators)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return sampler.decode(vae, x0), time.perf_counter() - began
    return generate


def measure(generate, detector, reference, seed=0, batch_size=32):
    """generate(numbers [b], seed) -> frames [b f 3 H W] for the reference's clips of these numbers, seconds.
    Returns the first SHOWN of them, uint8 on the CPU, and

    fvd, interval       Frechet distance to the real clips, and half a 95 % interval
    seconds             per clip, from noise to latents (the decoder is the same for all)
    sharpness           of the last frame: mean absolute difference of neighbours, over that of the real ones
    diversity           mean absolute difference of two seeds in [-1, 1], first quarter of the clips
    first_psnr          dB between the first frame and the picture that was given
    motion, follows     toy world: pixels per frame that shapes move, over the real ones', and its correlation
                        with the motion bucket that was asked for

    Of a clip no more than these is kept: a thousand of SVD's size would fill 25 GB.
    """
    features, figures, shown, seconds, n = [], defaultdict(list), [], 0.0, len(reference.ends)
    edges = lambda x: x.float().diff(dim=-1).abs().mean((1, 2, 3))                          # b 3 H W -> b
    for numbers in torch.arange(n).split(batch_size):
        frames, spent = generate(numbers, seed)
        frames, seconds = to_bytes(frames), seconds + spent
        first, last = reference.ends[numbers].to(frames.device).unbind(1)                   # b 3 H W each
        features.append(video_features(detector, frames))
        figures["edges"].append(edges(frames[:, -1]))
        figures["real_edges"].append(edges(last))
        figures["first_error"].append((frames[:, 0].float() - first.float()).square().mean((1, 2, 3)))
        if numbers[0] < n / 4:
            again = to_bytes(generate(numbers, seed + 1)[0])
            figures["diversity"].append((frames.float() - again.float()).abs().mean((1, 2, 3, 4)) / 127.5)
        if reference.colours is not None:
            figures["moved"].append(displacement(frames, reference.colours[numbers]))
        shown += frames[:SHOWN - len(shown)].cpu()
    features, mean = torch.cat(features), {name: torch.cat(x).mean() for name, x in figures.items()}
    result = {"fvd": frechet_distance(reference.features, features),
              "interval": interval(reference.features, features), "seconds": seconds / n,
              "sharpness": mean["edges"] / mean["real_edges"], "diversity": mean["diversity"],
              "first_psnr": 10 * (255 ** 2 / mean["first_error"]).log10()}
    if reference.colours is not None:
        both = torch.stack((torch.cat(figures["moved"]).cpu(), reference.cond.time_ids[:, 1]))
        result |= {"motion": mean["moved"] / reference.moved.mean(), "follows": torch.corrcoef(both)[0, 1]}
    return shown, {name: float(value) for name, value in result.items()}


def displacement(frames, colours, sharpness=60.0):
    """Clips uint8 [n f 3 H W], colours that their shapes have [n p] -> pixels per frame that shapes move [n].

    A shape is where the picture has its hue: a pixel counts by how close its direction in colour space is to
    the shape's, and by the fourth power of how far from grey it is, since backgrounds are paler. The shape's
    centre is the mean place.
    """
    palette = torch.tensor(data.COLOURS, device=frames.device)                                      # p 3
    palette = F.normalize(palette - palette.mean(dim=1, keepdim=True), dim=1)
    y, x = (torch.arange(side, device=frames.device).float() for side in frames.shape[-2:])
    moved = []
    for clip, shown in zip(frames, colours):                                    # one by one: little memory
        rgb = clip.float() - clip.float().mean(dim=1, keepdim=True)                                 # f 3 H W
        along = torch.einsum("fchw,pc->pfhw", rgb, palette[shown])
        cosine = along / rgb.norm(dim=1).clamp(min=1)
        share = (along.clamp(min=0) / 64) ** 4 * (sharpness * (cosine - 1)).exp()
        total = share.sum((2, 3)).clamp(min=1e-6)                                                   # p f
        centre = torch.stack((share.sum(2) @ x / total, share.sum(3) @ y / total), dim=-1)          # p f 2
        moved.append(centre.diff(dim=1).norm(dim=-1).mean())
    return torch.stack(moved)


# ---- The paper's tables ---------------------------------------------------------------------------------

# How each student is made: flags of train_stage1.py, flags of train_stage2.py, None for a stage left out.
# All begin with BUDGET. Who has one stage alone, or a cheaper step, takes as many as fill the same time: one
# of 32 clips takes 80 ms in stage 1, 131 in stage 2, with m = 1 111, AnimateLCM's 43, SF-V's 48 (one H100).
BUDGET = " --batch_size 32 --num_clips 6000 --warmup_steps 25 --log_steps 50 --checkpointing_steps 100" \
    " --validation_steps 10000 --validation_teacher_steps 1"
RUNS = {
    "osv": ("", ""),
    "stage 1 alone": ("--max_train_steps 610", None),
    "stage 2 alone": (None, "--max_train_steps 370"),
    "m = 1": ("", "--num_solver_steps 1 --max_train_steps 295"),
    "no adversarial loss": ("--adv_weight 0", "--adv_weight 0"),
    "theta^- for real": ("", "--real ema"),
    "guided teacher": ("", "--guidance 1 1.5 2 2.5"),
    "all weights train": ("--train all", "--train all"),
    "sub-pixel": ("--discriminator subpixel", "--discriminator subpixel"),
    "pixel (VAE decoder)": ("--discriminator pixel", "--discriminator pixel"),
    "unet": ("--discriminator unet", "--discriminator unet"),
    "stage 1 at half size": ("--width 64 --height 64", ""),
    "stage 2 at half size": ("", "--width 64 --height 64"),
    "AnimateLCM": (None, "--adv_weight 0 --num_solver_steps 1 --train all --max_train_steps 1130"),
    "SF-V": ("--discriminator unet --train all --max_train_steps 1010", None),
}

# What is compared: (run, or teacher or real, sampler, the paper's FVD). Samplers: see `how`. Other futures of
# the same pictures are as near as one can come: the distance between two sets of clips is never 0.
FLOOR = ("real", "other futures", None)
TEACHER = [FLOOR, ("teacher", "25", 156.94), ("teacher", "8", 229.94), ("teacher", "4", None),
           ("teacher", "2", 1015.25), ("teacher", "1", 1177.34)]
SHIPPED = [
    *TEACHER, ("shipped", "1", 335.36), ("shipped", "tts", 171.15), ("shipped", "2", 181.95),
    ("shipped", "tts printed", None), ("shipped", "tts v1", None)]
TABLE1 = [
    *TEACHER, ("AnimateLCM", "8", 184.79), ("AnimateLCM", "4", 405.80), ("AnimateLCM", "2", 575.33),
    ("AnimateLCM", "1", 997.94), ("SF-V", "1", 425.68), ("osv", "1", 335.36), ("osv", "tts", 171.15),
    ("osv", "2", 181.95)]
TABLE2 = {
    "a": [("m = 1", "tts", 332.25), ("osv", "tts", 171.15)],
    "b": [("stage 2 alone", "tts", 221.75), ("osv", "tts", 171.15)],
    "c": [("stage 1 alone", "2", 298.35), ("stage 1 alone", "tts", 234.13), ("osv", "tts", 171.15)],
    "d": [("no adversarial loss", "tts", 405.41), ("osv", "tts", 171.15), ("no adversarial loss", "1", None),
          ("osv", "1", None)],
    "e": [("pixel (VAE decoder)", "tts", 232.25), ("unet", "tts", None), ("sub-pixel", "tts", None),
          ("osv", "tts", 171.15)],
    "f": [("osv", "1 cfg 3.0", 531.23), ("osv", "1 cfg 1.5", 426.71), ("osv", "1", 335.36)],
    "g": [("stage 1 at half size", "1", 455.35), ("osv", "1", 388.86)],
    "h": [("stage 2 at half size", "tts", 171.15), ("osv", "tts", 181.95)],
    "ours": [(run, name, None) for name in ("1", "tts")
             for run in ("theta^- for real", "guided teacher", "all weights train", "osv")],
    "tts": [("osv", name, None) for name in ("1", "2", "tts", "tts printed", "tts v1")],
}
PICTURED = "teacher 25", "teacher 1", "osv 1", "osv tts", "shipped 1", "shipped tts"


def how(name, teacher, guidance):
    """A sampler's name -> (steps, network evaluations, draw(net, cond, generators) -> x0): "8" steps, of the
    guided solver for a teacher and of consistency sampling for a student; "tts", "tts printed", "tts v1";
    "1 cfg W", one step of a student with guidance W."""
    word, *rest = name.split()
    steps = 1 if word == "tts" else int(word)
    sigmas = solver.strided(solver.karras_sigmas(solver.NUM_SIGMAS), 2 if word == "tts" else steps)
    if teacher or rest[:1] == ["cfg"]:
        w = guidance if teacher else float(rest[1])
        return steps, 2 * steps, lambda net, cond, generators: sampler.sample_teacher(
            net, cond, sigmas, generators, w)
    if word == "tts":
        readout = rest[0] if rest else "look_ahead"
        return 1, 2, lambda net, cond, generators: sampler.time_travel(
            net, cond, sigmas[0], sigmas[1], generators, readout)
    return steps, steps, lambda net, cond, generators: sampler.sample(net, cond, sigmas, generators)


BUSY = defaultdict(threading.Lock)                      # folders in which one of several threads has a run


def trained(run, seed, args):
    """Trains what a run needs, unless it is there -> (the folder with its UNet, seconds of training, which
    nobody knows if several runs share the GPU)."""
    seconds, before = 0.0, "none"
    for stage, (budget, flags) in enumerate(zip((args.stage1, args.stage2), RUNS[run]), start=1):
        if flags is None:
            continue
        words = [f"train_stage{stage}.py", "--model", args.model, "--seed", str(seed), *budget.split(),
                 *flags.split(), *(["--stage1", before] if stage == 2 else [])]    # the last of a flag counts
        # Named by the command: runs that begin with the same stage 1 share it.
        folder = args.work / hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]
        with BUSY[folder]:
            if not (folder / "merged" / "config.json").exists():
                words += ["--output_dir", os.fspath(folder)]
                print(*words, flush=True)
                if subprocess.run([sys.executable, *words], cwd=Path(__file__).parent).returncode:
                    raise model.ModelError(f"{run}: training failed, see above")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        # Of the steps alone: the first interval has the compilation of kernels in it, too.
        seconds += sorted(row["s_per_step"] for row in rows)[len(rows) // 2] * rows[-1]["step"]
        before = os.fspath(folder)
    return folder / "merged", seconds if args.jobs == 1 else None


def finished(protocol, args):
    """The rows that --report already has, if --resume asks for them. Raises ModelError if they were made by
    another protocol."""
    if not (args.resume and args.report and args.report.exists()):
        return []
    earlier = model.read_json(args.report)
    if not {"protocol", "rows"} <= earlier.keys():
        raise model.ModelError(f"{args.report}: no report of a table; choose another --report")
    differ = [f"{key} was {earlier['protocol'].get(key)}, is {value}" for key, value in protocol.items()
              if earlier["protocol"].get(key) != value]
    if differ:
        raise model.ModelError(f"{args.report} has another protocol: {'; '.join(differ)}. Leave out "
                               "--resume, or choose another --report")
    return earlier["rows"]


def compare(rows, args):
    """Each row of a table, for each training seed -> JSON, with the protocol, and beside it a picture of the
    first clips: real, then the rows."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae, image_encoder, teacher = (load(args.model, dtype=dtype, device=device) for load in (
        model.load_vae, model.load_image_encoder, model.load_unet))
    path = args.detector or os.path.join(args.model, "i3d")
    detector = load_detector(path, device)
    num_frames = teacher.config["num_frames"]
    width, height = (side or default for side, default in zip(
        (args.width, args.height), model.default_size(teacher)))
    reference = open_reference(args, vae, image_encoder, detector, num_frames, width, height, device)
    protocol = {"detector": Path(path).name, "detector_sha256": fingerprint(detector),
                "data": args.data, "clips": args.num_clips, "frames": num_frames, "fps": 7,
                "size": [width, height], "seed": args.seed, "guidance": args.guidance}
    if args.what in ("table1", "table2"):
        protocol |= {"stage1": args.stage1, "stage2": args.stage2}
    print("protocol:", json.dumps(protocol))
    if len(reference.features) <= reference.features.shape[1]:
        print(f"evaluate.py: {len(reference.features)} clips are too few for {reference.features.shape[1]} "
              "features: distances will be far too large", file=sys.stderr)
    world = args.seed + data.HELD_OUT

    def other_futures(numbers, seed):
        clips = data.toy_clips(world, numbers, num_frames, height, device, motion_seed=world + 1 + seed)
        return clips.frames, 0

    results, shown = finished(protocol, args), [reference.shown]                        # of lists of f 3 H W
    there = {(row["run"], row["sampler"], row["seed"]) for row in results}
    wanted = {}                                         # some stand in several rows, and are measured once
    for run, name, paper in rows:
        for seed in args.seeds if run in RUNS else args.seeds[:1]:
            wanted.setdefault((run, name, seed), paper)
    rows = [(*key, paper) for key, paper in wanted.items()
            if key not in there and (args.data == "toy" or key[0] != "real")]
    pool = ThreadPoolExecutor(args.jobs)                # trains what comes next while a row is measured
    students = {key: pool.submit(trained, *key, args)
                for key in dict.fromkeys((run, seed) for run, _, seed, _ in rows if run in RUNS)}
    try:
        for run, name, seed, paper in rows:
            net, steps, nfe, generate, seconds = teacher, 0, 0, other_futures, None
            if run not in ("teacher", "real"):
                student = sampler.STUDENT if run == "shipped" else run              # or a path, of `fvd`
                if run in RUNS:
                    student, seconds = students[run, seed].result()
                net = model.load_student(student, model.load_unet(args.model, dtype=dtype, device=device))
            if run != "real":
                steps, nfe, draw = how(name, run == "teacher", tuple(args.guidance))
                generate = by_sampler(partial(draw, net), vae, reference, device)
            began = time.perf_counter()
            frames, figures = measure(generate, detector, reference, args.seed, args.batch_size)
            results.append({"run": run, "sampler": name, "seed": seed, "steps": steps, "nfe": nfe,
                            "paper": paper, "training_seconds": seconds, **figures})
            print(f"{run:24}{name:15}seed {seed}  NFE {nfe:3}  FVD {figures['fvd']:8.2f} +- "
                  f"{figures['interval']:.2f}  sharpness {figures['sharpness']:.2f}  diversity "
                  f"{figures['diversity']:.3f}  measured in {time.perf_counter() - began:.0f} s", flush=True)
            if seed == args.seeds[0] and (args.what in ("fvd", "table2") or f"{run} {name}" in PICTURED):
                shown.append(frames)
            if args.report:                                 # what is done is on the disk
                model.write_json(args.report, {**record(args), "protocol": protocol, "rows": results})
                sheet = torch.stack([clip for clips in zip(*shown) for clip in clips]).float() / 127.5 - 1
                data.save_sheet(sheet, args.report.with_suffix(".jpg"), shrink=2)
    finally:
        pool.shutdown(cancel_futures=True)
    return {"protocol": protocol, "rows": results}


def record(args):
    here = os.fspath(Path(__file__).parent) + os.sep                # whose disk it was is nobody's business
    settings = json.dumps(vars(args), default=str).replace(here, "")
    return {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
            "torch": torch.__version__, "settings": json.loads(settings)}


def parse_args(argv=None):
    parser = engine.command_line("Measure quality.")
    flag = parser.add_argument
    flag("what", choices=["fvd", "student", "table1", "table2"], help="see the top of this file")
    flag("--model", default=os.fspath(sampler.TOY), help="pipeline folder or hub id: the teacher")
    flag("--seed", type=int, default=0, help="of clips and noise")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    flag("--report", type=Path, help="JSON file to write")
    group = parser.add_argument_group("fvd and tables").add_argument
    group("--data", default="toy", help="toy, or real clips: a folder or list of videos, see data.py")
    group("--num_clips", type=int, default=2048, help="real clips, and as many generated ones per row")
    group("--width", type=int, help="of the clips (None: what the UNet is configured for)")
    group("--height", type=int, help="of the clips")
    group("--batch_size", type=int, default=128 if torch.cuda.is_available() else 16,
          help="clips generated at a time")
    group("--detector", help="i3d, a TorchScript file or a folder (None: i3d/ inside --model)")
    group("--guidance", type=float, nargs=2, default=[1.0, 3.0], help="of the teacher, first and last frame")
    group("--student", help="fvd: the student to measure (None: the teacher)")
    group("--sampler", default="1", help='fvd: how it samples: "25", "1", "tts", "1 cfg 1.5", ..')
    group("--rows", nargs="+", choices=TABLE2, default=list(TABLE2), help="table2: which of its rows")
    group("--seeds", type=int, nargs="+", default=[0, 1], help="tables: training seeds")
    group("--resume", action="store_true", help="keep the rows that --report already has")
    group("--work", type=Path, default="out/tables", help="tables: where students are trained, and kept")
    group("--stage1", default="--max_train_steps 200" + BUDGET, help="tables: flags for each train_stage1.py")
    group("--stage2", default="--max_train_steps 250" + BUDGET, help="tables: the same for train_stage2.py")
    group("--jobs", type=engine.positive, default=1,
          help="tables: trainings at a time; with one, it is known how long each takes")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"tts( printed| v1)?|[1-9]\d?( cfg \d+(\.\d+)?)?", args.sampler):
        parser.error(f'--sampler "{args.sampler}": neither 1 to 99 steps, "tts", "tts printed", "tts v1" '
                     'nor "1 cfg 1.5"')
    return args


def main():
    args = parse_args()
    rows = {"fvd": [(args.student or "teacher", args.sampler, None)], "student": SHIPPED, "table1": TABLE1,
            "table2": [FLOOR, *(row for name in args.rows for row in TABLE2[name])]}
    with engine.refusing():
        result = compare(rows[args.what], args)
    if args.report:
        model.write_json(args.report, {**record(args), **result})


if __name__ == "__main__":
    main()
