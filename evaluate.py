"""Measures generated videos: Frechet Video Distance (FVD), sharpness, diversity, fidelity, motion and shapes.

    $ python evaluate.py fvd --student out/stage2/merged --sampler tts --report fvd.json
    $ python evaluate.py fvd --model SVD --data VIDEOS --detector i3d --sampler 25      # real clips, I3D
    $ python evaluate.py sensitivity --report sensitivity.json          # which figure sees which damage

    load_detector       an I3D TorchScript file, or the folder of a VideoClassifier
    video_features      clips -> the detector's logits, which the distance compares
    frechet_distance    distance of the Gaussians fitted to two sets of features
    bootstrap           the figures of resampled clips; half_width: an error bar from them
    share_interval      the error bar of a share
    open_reference      the real clips, and the conditions that every sampler starts from
    measure             generated clips -> all figures; summary: values of single clips -> figures
    parse_sampler       "25", "tts", "1 cfg 1.5": a sampler by its name
    Report              rows of one protocol: `fvd` has one row, tools/tables.py has the paper's tables
    read_report         the file of a report -> its content
    sensitivity         damaged clips -> which figure sees which damage

FVD (Unterthiner et al., arXiv 1812.01717) is the Frechet distance between real and generated clips in the
space of the 400 logits of an I3D network trained on Kinetics. In the toy world a VideoClassifier takes I3D's
place, and the distance is called toy-FVD. Distances are comparable only for the same detector and the same
number of clips, so every report contains its protocol.
"""
import hashlib
import json
import math
import re
import statistics
import sys
import time
from collections import defaultdict
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

import data
import model
import sampler
from lora import load_student
from solver import NUM_SIGMAS, karras_sigmas, strided
from support import checkpoint, engine
from support.checkpoint import ModelError, load_network, write_json
from support.kernels import fast
from support.media import save_sheet, to_bytes
from toy.detector import VideoClassifier
from toy.shapes import DAMAGES, DEFECTS, damages, inspect
from toy.world import WORLD, Scene, paths, scene, toy_clips

ROOT = Path(__file__).resolve().parent
# Clips of the toy worlds of seed + UNSEEN serve only for evaluation: those of seed + data.HELD_OUT are also
# on sample sheets, and settings were chosen by them.
UNSEEN = 2 * data.HELD_OUT
SHOWN = 3                                                       # clips per row in a report's picture

# ---------------------------------------------------------------------------------------------------------
# Detector


def load_detector(path, device="cpu"):
    """The detector at a path: a folder written by save_network, or a TorchScript file of I3D. "i3d" fetches
    the file from the hub. A TorchScript file can run code: load only files from a source you trust. Raises
    ModelError, also for a network that does not take two short clips or does not return features [2 k]."""
    try:
        if path == "i3d":
            from huggingface_hub import hf_hub_download
            path = hf_hub_download("flateon/FVD-I3D-torchscript", "i3d_torchscript.pt")     # StyleGAN-V's
        if Path(path).is_dir():
            detector = load_network(VideoClassifier, Path(path), None, torch.float32, device)
        else:
            checkpoint.require_file(Path(path))
            detector = torch.jit.load(str(path), map_location=device).eval()
        features = video_features(detector, torch.zeros(2, 16, 3, 32, 32, device=device))
        if features.ndim != 2 or len(features) != 2 or not features.isfinite().all():
            raise ValueError(f"from two clips it makes {tuple(features.shape)}, not finite features [2 k]")
        return detector
    except (AttributeError, OSError, RuntimeError, ValueError) as error:        # of hub, file or first call
        raise ModelError(f"{path}: cannot be loaded as a detector ({error}); give another one") from error


def fingerprint(net):
    """The first 16 hexadecimal digits of the SHA-256 of a network's weights in fp32."""
    digest = hashlib.sha256()
    for w in net.state_dict().values():
        digest.update(w.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def video_features(detector, frames: Tensor, batch_size: int = 64) -> Tensor:
    """Clips [b f 3 H W], uint8 or in [-1, 1] -> features [b k]. The detector sees 8-bit pixels, as a viewer
    does."""
    # A TorchScript detector may have no parameters. It then runs where the frames are.
    device, features = next(detector.parameters(), frames).device, []
    for clips in frames.split(batch_size):
        pixels = rearrange(to_bytes(clips).to(device).float(), "b f c h w -> b c f h w")
        features.append(detector(pixels, rescale=True, resize=True, return_features=True).float())
    return torch.cat(features)


# ---------------------------------------------------------------------------------------------------------
# Frechet distance


def frechet_distance(features_real: Tensor, features_fake: Tensor) -> float:
    """Squared 2-Wasserstein distance between the Gaussians fitted to two sets of features, [n d] each:

        |mu_r - mu_f|^2 + tr(S_r) + tr(S_f) - 2 tr((S_r^1/2 S_f S_r^1/2)^1/2)

    The matrix under the last root is symmetric and has the eigenvalues of S_r S_f. So two symmetric
    eigendecompositions in float64 are enough, even if a covariance is singular (fewer clips than features).
    The estimate is biased upwards for small n: compare only distances of equal n.
    """
    device = "cpu" if features_real.device.type == "mps" else features_real.device      # MPS has no float64
    real, fake = (x.detach().to(device).double() for x in (features_real, features_fake))           # n d
    cov_real, cov_fake = (torch.atleast_2d(torch.cov(x.T, correction=1)) for x in (real, fake))     # d d
    values, vectors = torch.linalg.eigh(cov_real)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                                         # d d
    overlap = torch.linalg.eigvalsh(root @ cov_fake @ root).clamp(min=0).sqrt().sum()
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    return float(shift + cov_real.trace() + cov_fake.trace() - 2 * overlap)


def bootstrap(figures, values, rounds: int = 40, seed: int = 0):
    """The figures of `rounds` resamplings of the clips -> {name: list of numbers}.

    figures(values) -> {name: number}; values: {name: one row per clip}. Row i of each belongs to the same
    first frame, so all are resampled with the same indices, modulo the length of a shorter one. The indices
    depend only on the seed and the number of clips, so the draws of two samplers are paired. The mean over
    the resamplings is not used: repeated clips make a distance larger than it is.
    """
    generator, n = torch.Generator().manual_seed(seed), max(map(len, values.values()))
    draws = torch.randint(n, (rounds, n), generator=generator)
    found = [figures({name: x[i % len(x)] for name, x in values.items()}) for i in draws]
    return {name: [row[name] for row in found] for name in found[0]}


def half_width(draws):
    """Half the width of the 95 % interval of a figure: 1.96 standard deviations of its draws by `bootstrap`.
    Draws that are not finite are left out; 0 if fewer than two remain."""
    finite = [x for x in draws if math.isfinite(x)]
    return 1.96 * statistics.stdev(finite) if len(finite) > 1 else 0.0


def share_interval(share, n):
    """Half the width of the 95 % interval (Wilson's) of a share of n clips. It is above 0 for 0 of n, too."""
    z = 1.96
    return z / (1 + z ** 2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)


# ---------------------------------------------------------------------------------------------------------
# Reference clips


class Reference(NamedTuple):
    """Held-out real clips: their values for the comparison, and the conditions for the samplers."""

    ends: Tensor                # n 2 3 H W  uint8, on the CPU: first and last frame
    shown: Tensor               # SHOWN f 3 H W  uint8, on the CPU: the first clips
    cond: model.Cond            # of the first frames, on the CPU
    features: Tensor            # n k
    moved: Tensor | None = None         # n      toy world: units per frame that the shapes move
    scene: Scene | None = None          # n ..   toy world: what the first frames show

    def scenes(self, numbers, device):
        """The Scene of the clips `numbers` [b], on the device."""
        return Scene(*(x[numbers.to(x.device)].to(device) for x in self.scene))


@torch.no_grad()
def open_reference(args, vae, image_encoder, detector, num_frames, width, height, device):
    """Reads --num_clips clips of --data and encodes their first frames -> Reference. Raises ModelError."""
    kept, conds, world_seed = defaultdict(list), [], args.seed + UNSEEN
    start = scene(world_seed, torch.arange(args.num_clips, device=device)) if args.data == "toy" else None
    if args.data != "toy":
        videos = data.Clips(data.open_files(args.data), args.seed, num_frames, width, height)
    for numbers in torch.arange(args.num_clips).split(args.batch_size):
        if args.data == "toy":
            clips = toy_clips(world_seed, numbers, num_frames, height, device)
            frames, bucket = clips.frames, clips.motion_bucket_id                           # b f 3 H W
            steps = clips.centres.diff(dim=1).norm(dim=-1).mean(dim=1) * WORLD / height     # b n
            kept["moved"].append((steps * clips.present).sum(1) / clips.present.sum(1))
        else:
            pixels = rearrange(videos.take(numbers), "b f h w c -> b f c h w").to(device)
            frames, bucket = pixels.float() / 127.5 - 1, 127                                # b f 3 H W
        # No sampler starts from these seeds: those of generate_clips are below 2 ** 60.
        generators = [torch.Generator().manual_seed(2 ** 62 + i) for i in numbers.tolist()]
        noise = sampler.draw_noise(frames[:, 0].shape, generators, device)                  # b 3 H W
        cond = model.encode_condition(vae, image_encoder, frames[:, 0], noise, num_frames=num_frames,
                                      fps=data.FPS, motion_bucket_id=bucket, noise_aug_strength=0.02)
        conds.append([x.float().cpu() for x in cond])
        kept["ends"].append(to_bytes(frames[:, [0, -1]]).cpu())
        kept["shown"].append(to_bytes(frames[numbers < SHOWN]).cpu())
        kept["features"].append(video_features(detector, frames))
    n, k = args.num_clips, kept["features"][0].shape[1]
    if n <= k:
        print(f"{n} clips are too few for {k} features: the distances are too large", file=sys.stderr)
    cond = model.Cond(*map(torch.cat, zip(*conds)))
    return Reference(cond=cond, scene=start, **{name: torch.cat(parts) for name, parts in kept.items()})


# ---------------------------------------------------------------------------------------------------------
# Samplers and figures


def parse_sampler(name, is_teacher, guidance):
    """A sampler's name -> (steps, network evaluations, draw(net, cond, generator=..) -> x0 [b f 4 h w]).

    "8" is 8 steps: of the guided solver for a teacher, of consistency sampling for a student. Both use 8 of
    the NUM_SIGMAS noise levels of training; "8 karras" uses a grid of 8 levels, as sampler.py does for a
    teacher. "tts", "tts printed" and "tts v1" are the readouts of the Time Travel Sampler. "8 cfg W" is 8
    steps of a student with guidance W. guidance: of the teacher, on the first and last frame.
    """
    word, *rest = name.split()
    steps = 1 if word == "tts" else int(word)
    grid = karras_sigmas(steps if rest == ["karras"] else NUM_SIGMAS)
    sigmas = strided(grid, 2 if word == "tts" else steps)
    if is_teacher or rest[:1] == ["cfg"]:
        w = guidance if is_teacher else float(rest[1])
        return steps, 2 * steps, partial(sampler.sample_teacher, sigmas=sigmas, guidance=w)
    if word == "tts":
        readout = rest[0] if rest else "look_ahead"
        return 1, 2, partial(sampler.time_travel, sigma_t=sigmas[0], sigma_s=sigmas[1], readout=readout)
    return steps, steps, partial(sampler.sample, sigmas=sigmas)


@torch.no_grad()
def generate_clips(draw, net, vae, reference, numbers, seed):
    """Generated clips for the reference clips `numbers` [b] -> frames uint8 [b f 3 H W], and the seconds
    without decoding. draw(net, cond, generator=..) -> x0 [b f 4 h w]. Raises ModelError if the networks
    return NaN or infinity, which uint8 frames would hide."""
    device = next(vae.parameters()).device
    cond = model.Cond(*(x[numbers].to(device) for x in reference.cond))
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in numbers.tolist()]
    began = time.perf_counter()
    x0 = draw(net, cond, generator=generators)
    torch.get_device_module(device).synchronize()
    seconds = time.perf_counter() - began
    frames = sampler.decode(vae, x0)
    if not frames.isfinite().all():
        raise ModelError("NaN or infinity in the videos: damaged weights, or a training that diverged")
    return to_bytes(frames), seconds


def measure(generate, detector, reference, seed=0, batch_size=32):
    """Generates a clip for each reference clip -> (the first of them [SHOWN f 3 H W], uint8 on the CPU,
    and a dict of figures).

    generate(numbers [b], seed) -> frames uint8 [b f 3 H W], seconds.

    fvd, interval       Frechet distance to the real clips, and half the width of its 95 % interval
    fvd_draws           the distances of `bootstrap`, for the difference of two rows of the same clips
    seconds             per clip, from noise to latents; the time of the decoder is the same for all samplers
    sharpness           of the last frame: mean absolute difference of pixels side by side, relative to real
    diversity           mean absolute difference of two seeds, pixels in [-1, 1], for the batches of clips
                        that begin in the first quarter
    first_psnr          dB between the first frame and the input picture
    motion, follows     toy world: how far shapes move per frame, relative to real clips, and the
                        correlation of that with the motion bucket that was requested
    bad, bad_interval   toy world: share of clips with a defect of shape, see toy/shapes.py, and half the
                        width of its 95 % interval
    parts, size, kind,  toy world: share of clips with this defect; astray, a defect of motion, is not
    colour, astray      counted as bad
    bad_clips           toy world: which clips are bad, as a hexadecimal number; clip i is bit i
    intervals           of the figures above that have none beside them

    Frames are reduced to these figures batch by batch: 1,000 clips of SVD's size would take 25 GB.
    """
    kept, shown, seconds, n = defaultdict(list), [], 0.0, len(reference.ends)
    edges = lambda x: x.float().diff(dim=-1).abs().mean((1, 2, 3))                          # b 3 H W -> b
    for numbers in torch.arange(n).split(batch_size):
        frames, spent = generate(numbers, seed)
        seconds += spent
        first, last = reference.ends[numbers].to(frames.device).unbind(1)                   # b 3 H W each
        found = {"features": video_features(detector, frames), "real_features": reference.features[numbers],
                 "edges": edges(frames[:, -1]), "real_edges": edges(last),
                 "first_error": (frames[:, 0].float() - first.float()).square().mean((1, 2, 3))}
        if numbers[0] < n / 4:
            again, _ = generate(numbers, seed + 1)
            found["diversity"] = (frames.float() - again.float()).abs().mean((1, 2, 3, 4)) / 127.5
        if reference.scene is not None:                                                     # toy world
            bucket = reference.cond.time_ids[numbers, 1].to(frames.device)                  # b
            shapes = inspect(frames, reference.scenes(numbers, frames.device), bucket)
            shapes["bad"] = torch.stack([shapes[name] for name in DEFECTS]).any(0)
            found |= {name: x.float() for name, x in shapes.items()}
            found |= {"bucket": bucket, "real_moved": reference.moved[numbers]}
        for name, x in found.items():
            kept[name].append(x)
        shown.append(frames[numbers < SHOWN].cpu())
    values = {name: torch.cat(parts) for name, parts in kept.items()}                       # n .. each
    figures, draws = summary(values), bootstrap(summary, values)
    half = {name: half_width(x) for name, x in draws.items()}
    if "bad" in values:
        half |= {name: share_interval(figures[name], n) for name in ("bad", *DEFECTS, "astray")}
        bad = sum(1 << i for i in values["bad"].nonzero()[:, 0].tolist())
        figures |= {"bad_interval": half.pop("bad"), "bad_clips": f"{bad:x}"}
    figures |= {"interval": half.pop("fvd"), "fvd_draws": [round(x, 3) for x in draws["fvd"]],
                "seconds": seconds / n, "intervals": half}
    return torch.cat(shown), figures


def summary(values):
    """Values of single clips, {name: one row per clip} as `measure` collects them -> {figure: number}."""
    mean = {name: x.mean() for name, x in values.items()}
    figures = {"fvd": frechet_distance(values["real_features"], values["features"]),
               "sharpness": mean["edges"] / mean["real_edges"], "diversity": mean["diversity"],
               "first_psnr": 10 * (255 ** 2 / mean["first_error"]).log10()}
    if "bad" in values:
        both = torch.stack((values["moved"], values["bucket"]))                             # 2 n
        figures |= {"motion": mean["moved"] / mean["real_moved"], "follows": torch.corrcoef(both)[0, 1],
                    **{name: mean[name] for name in ("bad", *DEFECTS, "astray")}}
    return {name: float(value) for name, value in figures.items()}


# ---------------------------------------------------------------------------------------------------------
# Reports


def read_report(file, **figures):
    """The content of the report at the Path `file`. figures: the type of each figure that a row must have.
    Raises ModelError."""
    report = checkpoint.read_json(file, command=str, date=str, device=str, protocol=dict, rows=list)
    for row in report["rows"]:
        if wrong := checkpoint.misfit(row, {"run": str, "sampler": str, "seed": int, **figures}):
            raise ModelError(f"{file}: not the rows of a report ({wrong})")
    return report


class Report:
    """Rows measured by one protocol: printed, and written to --report as JSON, beside a picture of the first
    clips of each row, real clips first. With --resume the picture shows only the rows measured since; if
    there are none, the earlier picture stays.

    rows: {(run, sampler, training seed): figures}. run: "teacher", the path of a student, or a name in
    tools/tables.py. args: the flags of report_flags. protocol: further entries. Raises ModelError, or OSError
    if --report cannot be written.
    """

    def __init__(self, args, **protocol):
        self.args, self.device = args, engine.choose_device(args.device)
        detector = args.detector or Path(args.model) / "i3d"
        outputs = [args.report, args.report.parent / f"{args.report.stem}.jpg"] if args.report else []
        checkpoint.refuse_overwriting(outputs, [args.data, args.model, detector, vars(args).get("student")])
        checkpoint.check_writable(*outputs)
        self.detector = load_detector(detector, self.device)
        self.teacher, self.vae = self.load(model.load_unet), self.load(model.load_vae)
        width, height = sampler.choose_size(args, self.teacher)
        if args.data == "toy" and width != height:
            raise ModelError(f"the toy world is square, not {width}x{height}: give other --data")
        self.shape = self.teacher.config["num_frames"], width, height
        self.protocol = {"detector": Path(detector).name, "detector_sha256": fingerprint(self.detector),
                         "data": args.data, "clips": args.num_clips, "frames": self.shape[0], "fps": data.FPS,
                         "size": [*self.shape[1:]], "seed": args.seed,
                         "world": args.seed + UNSEEN if args.data == "toy" else None,
                         "guidance": args.guidance, **protocol}
        print("protocol:", json.dumps(self.protocol))
        self.rows = self.earlier_rows() if args.resume and args.report and args.report.exists() else {}
        self.shown = []                                                         # SHOWN f 3 H W each

    @cached_property
    def reference(self):
        """The Reference. Measuring it takes minutes. So it waits for the first row, and a missing student is
        found before."""
        return open_reference(self.args, self.vae, self.load(model.load_image_encoder), self.detector,
                              *self.shape, self.device)

    def load(self, loader, student=None):
        """A network of --model in the dtype of the device. student: loads these weights. --plain: keeps the
        layers of model.py."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        net = loader(self.args.model, dtype=torch.float32 if student else dtype, device=self.device)
        net = load_student(student, net).to(dtype) if student else net          # merges a LoRA in fp32
        return net if self.args.plain else fast(net)

    def earlier_rows(self):
        """{(run, sampler, seed): row} of --report. Raises ModelError if its protocol differs."""
        earlier = read_report(self.args.report, fvd=float, interval=float, intervals=dict)
        if differ := checkpoint.changes(earlier["protocol"], self.protocol):
            raise ModelError(f"{self.args.report} has another protocol: {differ}. "
                             "Leave out --resume, or choose another --report")
        print(f"rows in {self.args.report}, which new pictures do not show:",
              *("{run} {sampler} {seed};".format(**row) for row in earlier["rows"]))
        return {(row["run"], row["sampler"], row["seed"]): row for row in earlier["rows"]}

    def sampler(self, name, student=None):
        """(steps, network evaluations, generate(numbers, seed)) of a student, or of the teacher if None."""
        steps, nfe, draw = parse_sampler(name, student is None, tuple(self.args.guidance))
        net = self.load(model.load_unet, student) if student else self.teacher
        return steps, nfe, partial(generate_clips, draw, net, self.vae, self.reference)

    def add(self, run, name, seed, steps, nfe, generate, pictured=True, **more):
        """Measures the row (run, name, seed) and writes the report: an interruption loses at most one row.
        more: further entries of the row."""
        clips, values = measure(generate, self.detector, self.reference, self.args.seed, self.args.batch_size)
        row = {"run": run, "sampler": name, "seed": seed, "steps": steps, "nfe": nfe}
        self.rows[run, name, seed] = row | values | more
        shown = "  ".join(f"{figure} {x:.3g}" for figure, x in values.items() if isinstance(x, float))
        print(f"{run:23} {name:14} seed {seed}  NFE {nfe:3}  {shown}", flush=True)
        if pictured:
            self.shown.append(clips)
        self.write()

    def write(self):
        """Writes the rows to --report, and their picture beside it."""
        if file := self.args.report:
            write_json(file, record(self.args) | {"protocol": self.protocol, "rows": [*self.rows.values()]})
            if self.shown or not self.args.resume:
                # (clip row) f 3 H W: one clip of all rows, then the next clip. At half size.
                clips = torch.stack([self.reference.shown, *self.shown], 1).flatten(0, 1)
                save_sheet(clips, file.with_suffix(".jpg"), shrink=2)


def record(args):
    """How a report was made: command, date, device, torch version and flags. Paths in the repository become
    relative."""
    settings = json.dumps(vars(args), default=str).replace(f"{ROOT}/", "")
    module = sys.modules["__main__"].__spec__                       # None for `python FILE`
    program = f"-m {module.name}" if module else sys.argv[0]
    return {"command": " ".join(["python", program, *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if "cuda" in str(args.device) else str(args.device),
            "torch": torch.__version__, "settings": json.loads(settings)}


# ---------------------------------------------------------------------------------------------------------
# Sensitivity

def sensitivity(args):
    """Measures real clips, a tenth of them damaged in each of the ways DAMAGES, and prints by how much each
    figure moves, in units of its interval. All clips are other futures of the reference's first frames. The
    damaged ones have two shapes. Raises ModelError."""
    if args.data != "toy" or args.student:
        raise ModelError("sensitivity damages real clips of the toy world: leave out --data and --student")
    report = Report(args)
    (f, size, _), seed, device = report.shape, args.seed + UNSEEN, report.device
    damaged = report.reference.scene.present.all(1).nonzero()[:max(1, args.num_clips // 10), 0].cpu()

    def generate(numbers, future, name):
        motion_seed = seed + 1 + 2 * future
        frames = toy_clips(seed, numbers, f, size, device, motion_seed=motion_seed).frames
        chosen = torch.isin(numbers, damaged)                                               # b
        if name in DAMAGES and chosen.any():
            start, indices = report.reference.scenes(numbers[chosen], device), numbers[chosen].to(device)
            motion, other = (paths(start, seed, indices, f, motion_seed + i) for i in (0, 1))
            frames[chosen.to(device)] = damages(start, motion, other, size)[name]
        return to_bytes(frames), 0.0

    for name in ("undamaged", *DAMAGES):
        if ("real", name, 0) not in report.rows:
            report.add("real", name, 0, 0, 0, partial(generate, name=name))
    before, *rows = (report.rows["real", name, 0] for name in ("undamaged", *DAMAGES))
    half = {"fvd": before["interval"], "bad": before["bad_interval"], **before["intervals"]}
    print("moved by, in units of the interval:")
    for row in rows:
        row["moved_by"] = {name: (row[name] - before[name]) / half[name] for name in half if half[name]}
        print(f"{row['sampler']:12}", *(f"{name} {x:+.1f}" for name, x in row["moved_by"].items()))
    report.write()


def report_flags(parser):
    """Adds the flags of a Report."""
    flag, cuda = parser.add_argument, torch.cuda.is_available()
    flag("--model", default=str(sampler.TOY), help="the teacher: pipeline folder or hub id")
    flag("--seed", default=0, help="of clips and noise")
    flag("--device", default="cuda" if cuda else "cpu", help="cuda, cuda:1, mps or cpu")
    flag("--plain", action="store_true", help="use the layers of model.py, without support/kernels.py")
    flag("--report", type=Path, help="JSON file to write")
    flag("--resume", action="store_true", help="keep the rows that --report already has")
    flag("--data", default="toy", help="real clips: toy, or a folder or list of videos, see data.py")
    flag("--num_clips", type=engine.number(2, 10 ** 9), default=2048, help="real clips, and clips per row")
    flag("--width", help="of the clips (None: the UNet's configuration)")
    flag("--height", help="of the clips (None: the UNet's configuration)")
    flag("--batch_size", default=128 if cuda else 16, help="clips generated at a time")
    flag("--detector", help="i3d, a TorchScript file or a folder (None: i3d/ inside --model)")
    flag("--guidance", nargs=2, default=[1.0, 3.0], help="of the teacher, first and last frame")


def parse_args(argv=None):
    parser = engine.command_line("Measure the quality of generated videos.")
    parser.add_argument("what", choices=["fvd", "sensitivity"], help="figures of a sampler or of damage")
    report_flags(parser)
    parser.add_argument("--student", help="the student to measure (None: the teacher)")
    parser.add_argument("--sampler", default="1", help='how it samples: "25", "1", "tts", "1 cfg 1.5", ..')
    args = parser.parse_args(argv)
    samplers = r"tts( printed| v1)?|[1-9]\d?( cfg \d\d?(\.\d+)?)?" if args.student else r"[1-9]\d?( karras)?"
    if not re.fullmatch(samplers, args.sampler):
        parser.error(f"--sampler {args.sampler}: write 8 or 8 karras; for a --student 8, 8 cfg 1.5 or tts")
    return args


def main():
    args = parse_args()
    if args.what == "sensitivity":
        return sensitivity(args)
    report = Report(args)
    # With --resume it replaces an earlier row of this name: the weights in the folder may have changed.
    report.add(args.student or "teacher", args.sampler, 0, *report.sampler(args.sampler, args.student))


if __name__ == "__main__":
    main()
