"""Where clips come from: a toy world, and real videos.

The toy world: procedural clips, 14 frames of 128x128 at 7 fps, in which everything of the paper can be run in
minutes. One or two textured shapes on a textured background move, roll and bounce off the borders. Their
speed is the clip's motion bucket. **The first frame does not tell where they go**, so one image has many
futures: a one-step teacher answers with their blurred mean, 25 steps with one sharp future. Closing that gap
is what the paper is about.

    toy_clips(seed, indices)  ->  ToyClips: frames, motion buckets, what is in the scene, where the shapes are
    toy_latents(...)          ->  Latents: the same clips encoded once, as training takes them
    contact_sheet(frames)     ->  one picture, a row of frames per clip; save_sheet writes it

A clip is a pure function of (seed, index): no state, the same on every device and in any split into batches.
To look at the first eight clips:

    python -c "import data, PIL.Image; sheet = data.contact_sheet(data.toy_clips(0, range(8)).frames); \\
        PIL.Image.fromarray(sheet.numpy()).save('toy.png')"

Real videos: a folder tree, a .csv or .jsonl list, or OpenVid-1M as it is downloaded. They are decoded by
processes that may die: a bad file costs that file.

    python data.py check VIDEOS --out good.jsonl            # a list of the good ones
    python data.py preview VIDEOS --out sheet.png           # what a trainer will see
    python data.py encode VIDEOS --model M --out SHARDS     # latents, once; resumes; also under torchrun

    latents = open_data("toy" or VIDEOS or SHARDS, vae, image_encoder, seed, num_frames, width, height, ...)
    x0, cond = latents.take(numbers)                        # [b] -> b f 4 h w and model.Cond, fp32

Numbers count on through all epochs. Which file clip `number` is, from where, mirrored or not and with which
noise is a function of (seed, number): the position in the data is one integer, on any number of processes.
"""
import csv
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import engine
import model

# ---- The toy world --------------------------------------------------------------------------------------

# The world is 128 units wide whatever the picture's size. A kind is (corners, notch, size, pair): the outline
# runs straight from an outer corner at radius 1 to an inner one at radius `notch`, half a turn / corners
# further on, and so forth. Regular polygons are stars whose inner corners lie on the chord; a disc has many
# sides. Each kind has a pair of colours of its own, so that a small network, trained for minutes, can know
# from a patch of colour what it belongs to, and no two shapes of a clip are of a kind: with every kind in
# every colour, a star would become a blob on its way.
WORLD = 128.0
KINDS = {"disc": (32, 1.0, 0.95, 3), "square": (4, math.cos(math.pi / 4), 1.15, 1),
         "triangle": (3, math.cos(math.pi / 3), 1.25, 0), "star": (5, 0.5, 1.3, 2)}
COLOURS = ((0.93, 0.26, 0.27), (0.98, 0.53, 0.16), (0.98, 0.80, 0.22), (0.42, 0.75, 0.31),
           (0.10, 0.68, 0.66), (0.22, 0.50, 0.93), (0.54, 0.33, 0.85), (0.93, 0.38, 0.66))
DARK, LIGHT = (0.07, 0.08, 0.15), (1.00, 0.97, 0.90)         # a background is its hue, mixed with one of them
MAX_SHAPES, LAYOUTS, CELLS, HEADINGS, SPEEDS = 2, 8, 4, 8, 8
ROLL = 80.0                                         # units to the right that turn a shape by one radian
FPS = 7
CHUNK = 2**24                                       # pixels rendered at a time: bounds the temporaries
HELD_OUT = 1_000_000                                # added to a seed: a world that nothing was trained on

NUM_STATIC = len(COLOURS) + len(KINDS) * CELLS * CELLS + len(COLOURS)
NUM_ATTRIBUTES = NUM_STATIC + len(KINDS) * HEADINGS + SPEEDS


class ToyClips(NamedTuple):
    frames: Tensor                  # b f c h w, [-1, 1]
    motion_bucket_id: Tensor  # b        , 1 to 255; the speed is bucket / 127 * 4 pixels per frame at 128x128
    attributes: Tensor         # b k      , 0 or 1: first the NUM_STATIC that frame 0 shows, then the motion's
    centres: Tensor                 # b f n 2  , (x, y) in pixels
    present: Tensor                 # b n      , bool: is there an n-th shape?
    kind_map: Tensor                # b f h w  , int8: 0 is background, else 1 + the kind that is on top there


def uniforms(seed: int, indices: Tensor, stream: int, n: int) -> Tensor:
    """Stateless randomness, [b n] in [0, 1): a hash of (seed, stream, index, column), in wrapping int64."""
    def mix(x):                                                  # SplitMix64's finaliser (Steele et al. 2014)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor     # >> copies the sign bit: mask it away
        return x ^ (x >> 31 & (1 << 33) - 1)
    x = mix(mix(torch.full_like(indices, seed) + 1) + stream + 1)       # b
    x = mix(x ^ mix(indices + 0x632BE59BD9B4E019))                      # b
    x = mix(x[:, None] + mix(torch.arange(1, n + 1, device=indices.device)))            # b n
    return (x >> 40 & (1 << 24) - 1).float() / 2**24                   # 24 bits are exact in fp32, so never 1


@cache
def constants(device):
    """The tables above as tensors, made once per device: each copy to a GPU waits until it has finished."""
    return *torch.tensor(list(KINDS.values()), device=device).T, *(
        torch.tensor(table, device=device) for table in (COLOURS, DARK, LIGHT))


@torch.no_grad()
def toy_clips(seed: int, indices: Tensor, num_frames: int = 14, size: int = 128, device="cpu",
              motion_seed: int | None = None) -> ToyClips:
    """Clips `indices` [b] of the world `seed`. Another motion_seed: other futures of the same first
    frames, as fast."""
    indices = torch.as_tensor(indices, dtype=torch.int64, device=device)                # b
    chunk = max(1, CHUNK // (num_frames * size * size))
    if len(indices) > chunk:
        parts = (toy_clips(seed, i, num_frames, size, device, motion_seed) for i in indices.split(chunk))
        return ToyClips(*map(torch.cat, zip(*parts)))

    # ---- the scene: named columns of one table of random numbers
    n, k = MAX_SHAPES, len(KINDS)
    static = uniforms(seed, indices, 0, 7 + k + 7 * n + 2 * n * LAYOUTS)                # b u
    count, backdrop, tone, waves, kind, colour, radius, angle, check, period, phase, place = static.split(
        [1, 1, 1, 4, k, n, n, n, n, n, 2 * n, 2 * n * LAYOUTS], dim=1)
    # Everything that the first frame must not show comes from a second stream.
    bucket, heading = uniforms(seed, indices, 1, 1 + n).split([1, n], dim=1)            # b 1, b n
    if motion_seed is not None:
        heading = uniforms(motion_seed, indices, 1, n)                                  # b n

    corners, notch, scale, pair, palette, dark, light = constants(device)               # k each, p c, c, c
    present = torch.arange(n, device=device) < 1 + (count * n).long()                   # b n
    kind, backdrop = kind.argsort(dim=1)[:, :n], (backdrop * len(COLOURS)).long()       # b n, b 1
    colour = 2 * pair[kind].long() + (colour * 2).long()                                # b n
    colour = torch.where(colour == backdrop, colour ^ 1, colour)            # b n, never the background's
    radius = (15 + 8 * radius) * scale[kind]                                            # b n
    bucket = 1 + (bucket * 255).long()                                                  # b 1
    speed = bucket / 127                                                                # b 1

    # Of a few random layouts, the one whose shapes are farthest apart: frame 0 should show them all.
    margin = radius[:, None, :, None]                                                   # b 1 n 1
    place = margin + rearrange(place, "b (l n xy) -> b l n xy", n=n, xy=2) * (WORLD - 2 * margin)
    pairs = present[:, :, None] & present[:, None] & ~torch.eye(n, dtype=torch.bool, device=device)    # b n n
    gaps = (place[:, :, :, None] - place[:, :, None]).norm(dim=-1)                      # b l n n
    best = gaps.masked_fill(~pairs[:, None], WORLD).amin((2, 3)).argmax(1)              # b
    place = place[torch.arange(len(place), device=device), best]                # b n 2

    # Straight motion folded back at the borders, a triangle wave: a position needs no history.
    time = torch.arange(num_frames, device=device)[:, None]                             # f 1
    heading = heading * 2 * math.pi                                                     # b n
    step = 4 * speed[..., None] * torch.stack((heading.cos(), heading.sin()), dim=-1)   # b n 2
    path = place[:, None] + step[:, None] * time[..., None] - margin                    # b f n 2
    span = WORLD - 2 * margin
    centres = margin + span - (path.remainder(2 * span) - span).abs()                   # b f n 2
    # They roll: which way up a shape is follows from where it is, whatever way it came there.
    angle = angle[:, None] * 2 * math.pi + (centres - place[:, None])[..., 0] / ROLL    # b f n, radians

    # ---- what a label says: colours, kinds with their cell and heading; the background's colour; the speed
    kinds = F.one_hot(kind, k) * present[..., None]                                     # b n k
    bins = lambda x, num: F.one_hot((x * num).long().clamp(0, num - 1), num)
    with_kind = lambda x: (kinds[..., None] * x[:, :, None]).amax(dim=1).flatten(1)     # b n v -> b (k v)
    cell = bins(place / WORLD, CELLS)                                                   # b n 2 v
    cell = rearrange(cell[:, :, 1, :, None] * cell[:, :, 0, None], "b n y x -> b n (y x)")
    attributes = torch.cat((
        (F.one_hot(colour, len(COLOURS)) * present[..., None]).amax(dim=1), with_kind(cell),
        F.one_hot(backdrop[:, 0], len(COLOURS)),
        with_kind(bins(heading / (2 * math.pi), HEADINGS)),
        bins((bucket[:, 0] - 1) / 255, SPEEDS)), dim=1).float()                         # b a

    # ---- the background: two soft waves between a darker and a lighter partner of its hue
    pixel = (torch.arange(size, device=device) + 0.5) * (WORLD / size)                  # w
    y, x = pixel[:, None], pixel[None]                                                  # h 1, 1 w
    per_pixel = lambda v: v[..., None, None]                                            # .. -> .. 1 1
    tilt = 2 * math.pi * waves[:, 0]                                                    # b
    along = per_pixel(tilt.cos()) * x + per_pixel(tilt.sin()) * y                       # b h w
    across = per_pixel(tilt.cos()) * y - per_pixel(tilt.sin()) * x                      # b h w
    wavelength = per_pixel(50 + 50 * waves[:, 1])
    ripple = 0.5 + 0.25 * ((along / wavelength + per_pixel(waves[:, 2])) * 2 * math.pi).sin() \
                 + 0.25 * ((across / wavelength * 0.7 + per_pixel(waves[:, 3])) * 2 * math.pi).sin()   # b h w
    hue = palette[backdrop[:, 0]]                                                       # b c
    ground = torch.where(tone < 0.6, dark, light)                                       # b c
    background = per_pixel(ground) + per_pixel(hue - ground) * (0.12 + 0.3 * ripple[:, None])       # b c h w
    image = background[:, None].repeat(1, num_frames, 1, 1, 1)                          # b f c h w
    kind_map = torch.zeros(len(indices), num_frames, size, size, dtype=torch.int8, device=device)    # b f h w

    # ---- the shapes, later ones in front
    for i in range(n):
        of_clip = lambda v: v[:, None, None, None]                                      # b -> b 1 1 1
        dx, dy = x - per_pixel(centres[:, :, i, 0]), y - per_pixel(centres[:, :, i, 1])     # b f 1 w, b f h 1
        cos, sin = per_pixel(angle[:, :, i].cos()), per_pixel(angle[:, :, i].sin())     # b f 1 1
        u, v = cos * dx + sin * dy, cos * dy - sin * dx                       # b f h w, the shape's own frame

        # Signed distance: fold the plane into the wedge between an outer corner and an inner one; there the
        # outline is one straight line. Exact but outside of corners, where only the soft shadow sees it.
        half, r, inner = math.pi / corners[kind[:, i]], radius[:, i], notch[kind[:, i]]             # b each
        normal_x, normal_y = inner * half.sin(), 1 - inner * half.cos()                             # b each
        length = torch.hypot(normal_x, normal_y)
        fold = (torch.atan2(v, u) + of_clip(half)).remainder(of_clip(2 * half)) - of_clip(half)     # b f h w
        rho = torch.hypot(u, v)
        distance = (rho * fold.cos() - of_clip(r)) * of_clip(normal_x / length) \
            + rho * fold.abs().sin() * of_clip(normal_y / length)                                   # b f h w

        # Soft stripes or checks of a light and a dark partner, a darker rim, and a soft shadow all around.
        tau = 2 * math.pi / (20 + 10 * of_clip(period[:, i]))
        shift = 2 * math.pi * phase[:, 2 * i:2 * i + 2]                                             # b 2
        stripes, crossing = (u * tau + of_clip(shift[:, 0])).sin(), (v * tau + of_clip(shift[:, 1])).sin()
        shade = 0.5 + 0.5 * (2 * torch.where(of_clip(check[:, i]) < 0.5, stripes, stripes * crossing)).tanh()
        shade = (0.66 + 0.34 * shade) * (1 - 0.3 * (distance / 4).clamp(-1, 0).add(1))             # b f h w
        paint = per_pixel(palette[colour[:, i]][:, None]) * shade[:, :, None]                      # b f c h w
        shown = of_clip(present[:, i])
        cover = (0.5 - distance * (size / WORLD)).clamp(0, 1) * shown                               # b f h w
        shadow = 1 - 0.35 * (-distance.clamp(min=0) / 2.5).exp() * shown                             # b f h w
        image = (image * shadow[:, :, None]).lerp(paint, cover[:, :, None])                        # b f c h w
        kind_map = torch.where(cover > 0.5, (1 + of_clip(kind[:, i])).to(torch.int8), kind_map)
    return ToyClips(image * 2 - 1, bucket[:, 0], attributes, centres * (size / WORLD), present, kind_map)


class Latents(NamedTuple):
    """Encoded clips. What every training step would compute anew is computed once and kept, in bf16."""

    x0: Tensor                      # n f 4 h w  scaled: unit variance
    image_embeds: Tensor            # n 1 d
    image_latents: Tensor           # n 4 h w    unscaled; the same on each frame, so kept once
    time_ids: Tensor                # n 3

    def take(self, index: Tensor):
        """Clips number `index` [b], counted round and round -> x0 [b f 4 h w] and their model.Cond, fp32."""
        x0, embeds, image, ids = (x[index.to(x.device) % len(x)].float() for x in self)
        return x0, model.Cond(embeds, repeat(image, "b c h w -> b f c h w", f=x0.shape[1]), ids)


@torch.no_grad()
def encode_clips(vae, image_encoder, frames, noise, strength, motion_bucket_id, fps=FPS):
    """Clips [b f 3 H W] in [-1, 1], standard normal noise [b 3 H W], its strength [b] in the condition image
    (which is the first frame), motion bucket [b] -> Latents."""
    image, num_frames = frames[:, 0], frames.shape[1]                                   # b 3 H W
    noisy = image + strength[:, None, None, None] * noise                               # b 3 H W
    pixels = torch.cat((frames.flatten(0, 1), noisy))                                   # (b f + b) 3 H W
    latents, image_latents = vae.encode(pixels).tensor_split([-len(noisy)])
    latents = rearrange(latents * vae.config["scaling_factor"], "(b f) c h w -> b f c h w", f=num_frames)
    ids = torch.stack((torch.full_like(strength, fps - 1), motion_bucket_id, strength), dim=1)      # b 3
    return Latents(latents.bfloat16(), model.embed_image(image_encoder, image), image_latents.bfloat16(), ids)


def toy_latents(vae, image_encoder, seed: int, num_clips: int, num_frames: int = 14, size: int = 128,
                device="cpu", batch_size: int = 64, first: int = 0) -> Latents:
    """Render and encode clips `first`, `first` + 1, .. of the world `seed`. The noise on the condition image
    has the strength SVD was trained with, ln N(-3, 0.5^2), drawn once per clip."""
    generator, cache = torch.Generator(device), []
    for start in tqdm(range(first, first + num_clips, batch_size), "latents", disable=None):
        numbers = torch.arange(start, min(start + batch_size, first + num_clips))
        batch = toy_clips(seed, numbers, num_frames, size, device)
        generator.manual_seed(seed * 1_000_003 + start)
        strength = (-3 + 0.5 * torch.randn(len(numbers), generator=generator, device=device)).exp()    # b
        noise = torch.randn(len(numbers), 3, size, size, generator=generator, device=device)
        # The activations of 64 clips would take 11 GB, which a laptop does not have.
        step = batch_size if torch.device(device).type == "cuda" else 4
        parts = zip(*(x.split(step) for x in (batch.frames, noise, strength, batch.motion_bucket_id)))
        cache += [encode_clips(vae, image_encoder, *part) for part in parts]
    return Latents(*map(torch.cat, zip(*cache)))


def contact_sheet(frames: Tensor, gap: int = 2) -> Tensor:
    """Clips [n f 3 h w] in [-1, 1] -> one uint8 picture [H W 3]: a row per clip, frames left to right."""
    frames = F.pad(frames.detach().float().cpu().clamp(-1, 1), (gap, 0, gap, 0), value=1.0)        # n f c h w
    sheet = F.pad(rearrange(frames, "n f c h w -> c (n h) (f w)"), (0, gap, 0, gap), value=1.0)     # c H W
    return rearrange((sheet * 127.5 + 127.5).round().byte(), "c h w -> h w c")


def save_sheet(clips, file, shrink=1):
    """contact_sheet as a picture, .jpg or else .png. The file appears whole or not at all."""
    from PIL import Image
    with model.replacing(file) as part:
        sheet = Image.fromarray(contact_sheet(clips).numpy()).reduce(shrink)
        sheet.save(part, "JPEG" if file.suffix == ".jpg" else "PNG", quality=90)


# ---- Videos: which files --------------------------------------------------------------------------------

SUFFIXES = tuple(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .flv .wmv .3gp .gif".split())
COLUMNS = ("path", "video", "file", "filename", "video_path")           # OpenVid-1M's is `video`


class DataError(model.ModelError):
    """Data that cannot be used. The message says what, where and what to do."""


class Files:
    """The paths of any number of videos: on disk in a file without a name, in memory 8 bytes each."""

    def __init__(self, paths):
        self.file, self.ends = tempfile.TemporaryFile(), array("q", [0])
        for path in paths:
            self.ends.append(self.ends[-1] + self.file.write(os.fsencode(path)))
        self.file.flush()

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        begin, end = self.ends[i:i + 2]
        return os.fsdecode(os.pread(self.file.fileno(), end - begin, begin))


def open_files(data, where=()):
    """The videos of a folder, searched in depth, or of a .csv or .jsonl list that has one of COLUMNS. where:
    keeps the rows in which a column is between limits, [("motion score", 2, 20), ..]. Raises DataError."""
    data = Path(data).absolute()
    is_list = data.suffix in (".csv", ".jsonl")
    if not is_list and (where or not data.is_dir()):
        raise DataError(f"{data}: not a .csv or .jsonl list" + ", nor a folder" * (not where))
    files = Files(read_list(data, where) if is_list else walk(data))
    if not len(files):
        raise DataError(f"{data}: no videos in it" + ", or none within the limits" * bool(where))
    return files


def walk(root):
    """The videos below a folder, in the order of their names. Links to folders are not followed."""
    for folder, folders, names in os.walk(root):
        folders.sort()                                                  # in place: where os.walk goes next
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(folder, name)


def read_list(data, where):
    """The videos of a list. Paths are relative to its folder, or to the folder in it that is named as the
    column: OpenVid-1M's video/. A field that is empty or missing is not within any limits."""
    column = None
    with open(data, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file) if data.suffix == ".csv" else map(json.loads, filter(str.strip, file))
        try:
            limits = [(name, float(low), float(high)) for name, low, high in where]
            for row in rows:
                if column is None:                                      # the first row tells the columns
                    column = next((name for name in COLUMNS if name in row), COLUMNS[0])
                    if missing := {column, *(name for name, _, _ in limits)} - set(row):
                        raise DataError(f"no column {min(missing)}, only {', '.join(row)}")
                    root = next(filter(Path.is_dir, (data.parent / column, data.parent)))
                with suppress(TypeError, KeyError, ValueError):
                    if all(low <= float(row[name]) <= high for name, low, high in limits):
                        yield os.path.join(root, row[column])
        except (csv.Error, ValueError, TypeError) as error:
            raise DataError(f"{data}: cannot be read: {error}") from error


@lru_cache(4)                                       # this epoch and the next, of training and validation
def shuffled(seed, epoch, n):
    """The order of n clips in an epoch: a function of these three numbers and of nothing else."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


# ---- Videos: clips by number, decoded by decode.py --------------------------------------------------------

DECODER = [sys.executable, str(Path(__file__).with_name("decode.py"))]
TRIES = 1000                                        # bad files in a row until it is hopeless


class Clips:
    """Clips of videos by number, decoded ahead by `workers` processes.

    Clip `number` is of file `number % n` in the shuffle of epoch `number // n`: each file once per epoch. If
    it is bad, the next good one takes its place, and its path and reason go into `skip_list` (JSONL). What
    that list names at the start is not tried again. A process that takes `share` numbers in a row out of
    each `batch_size` gets the right ones decoded ahead.
    """

    def __init__(self, files, seed, num_frames, width, height, *, fps=FPS, flip=False, workers=4, share=1,
                 batch_size=1, skip_list=None):
        self.files, self.seed, self.flip, self.share, self.batch_size = files, seed, flip, share, batch_size
        self.shape = dict(num_frames=num_frames, width=width, height=height, fps=fps)
        self.ahead, self.pending, self.local = 2 * workers, {}, threading.local()
        self.threads = ThreadPoolExecutor(workers)                      # each has a decoding process
        self.skip_list, self.bad = skip_list and Path(skip_list), {}
        if skip_list and self.skip_list.exists():
            with open(self.skip_list) as file:
                self.bad = {facts["path"]: facts for facts in map(json.loads, file)}

    def read(self, path, start):
        """decode.read_clip in this thread's process -> (frames, facts), or for a bad file, which is noted,
        (None, path and reason). If the process dies, the file gets a second one, as it may not be to blame,
        and a third for its beginning."""
        if path in self.bad:
            return None, self.bad[path]
        for begin in (start, start, 0.0):
            if (process := getattr(self.local, "process", None)) is None:
                process = self.local.process = subprocess.Popen(
                    DECODER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            with suppress(OSError, ValueError):                         # the process is gone
                request = {"path": path, "start": begin, **self.shape}
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                facts = json.loads(process.stdout.readline())
                if "reason" in facts:
                    break
                shape = *(self.shape[name] for name in ("num_frames", "height", "width")), 3
                frames = torch.empty(shape, dtype=torch.uint8)
                if process.stdout.readinto(frames.numpy()) == frames.numel():
                    return frames, facts
            self.local.process = None
            if (status := process.wait()) >= 0:
                raise DataError(f"videos cannot be decoded, is PyAV installed? `{' '.join(DECODER)}` ended")
            late = " (it took too long)" * (status == -signal.SIGALRM)
            facts = {"path": path, "reason": f"its decoder died of {signal.Signals(-status).name}{late}"}
        if self.bad.setdefault(path, facts) is facts and self.skip_list:        # by one thread if two had it
            with open(self.skip_list, "a") as file:
                file.write(json.dumps(facts) + "\n")
        return None, self.bad[path]

    def clip(self, number):
        """Clip `number` -> (frames uint8 [f H W 3], facts). Raises DataError if no file is good."""
        n = len(self.files)
        epoch, position = divmod(number, n)
        start, mirror = uniforms(self.seed, torch.tensor([number]), 21, 2)[0].tolist()
        for i in range(tries := min(TRIES, n)):
            path = self.files[shuffled(self.seed, epoch, n)[(position + i) % n]]
            frames, facts = self.read(path, start)
            if frames is not None:
                return frames.flip(2) if self.flip and mirror < 0.5 else frames, facts
        raise DataError(f"none of {tries} videos is good. {path}: {facts['reason']}. `python data.py check` "
                        "makes a list of the good ones and says what is wrong with the others")

    def take(self, numbers):
        """Clips `numbers` -> frames uint8 [b f H W 3], while those that come next are being decoded."""
        wanted = numbers.tolist()
        number, soon = wanted[-1], []
        for _ in range(self.ahead):
            number += 1 if (number + 1) % self.share else 1 + self.batch_size - self.share
            soon.append(number)
        for number in wanted + soon:
            if number not in self.pending:
                self.pending[number] = self.threads.submit(self.clip, number)
        frames = torch.stack([self.pending[number].result()[0] for number in wanted])
        for number in self.pending.keys() - set(soon):
            self.pending.pop(number).cancel()
        return frames


# ---- Videos: latents, made when asked for, or once and for all ------------------------------------------

MOTION_SCALE = 0.1                  # change per frame, in [-1, 1], at which the motion bucket is 162 of 255


class VideoLatents:
    """Clips encoded when they are asked for: no disk, but the VAE's time in every step."""

    def __init__(self, clips, vae, image_encoder, motion_bucket_id=None):
        self.clips, self.nets, self.motion_bucket_id = clips, (vae, image_encoder), motion_bucket_id

    def take(self, numbers):
        """Clips `numbers` [b] -> x0 [b f 4 h w] and their model.Cond, fp32."""
        return self.encode(numbers).take(torch.arange(len(numbers)))

    def encode(self, numbers):
        """Clips `numbers` [b] -> Latents, one by one, so that a clip is the same in any batch. The noise on
        the condition image has the strength SVD was trained with, ln N(-3, 0.5^2). The motion bucket, unless
        fixed, is 1 + 254 (1 - exp(-change / MOTION_SCALE)): the mean absolute change from frame to frame."""
        rows, device = [], next(self.nets[0].parameters()).device
        for number, frames in zip(numbers.split(1), self.clips.take(numbers)):
            frames = rearrange(frames.to(device), "f h w c -> 1 f c h w").float() / 127.5 - 1
            noise = engine.normal(self.clips.seed, number, 22, frames.shape[2:], device)            # 1 3 H W
            strength = (-3 + 0.5 * engine.normal(self.clips.seed, number, 23, (), device)).exp()    # 1
            change = frames.diff(dim=1).abs().mean((1, 2, 3, 4))                                    # 1
            bucket = (255 - 254 * (-change / MOTION_SCALE).exp()).round()
            if self.motion_bucket_id:
                bucket = torch.full_like(bucket, self.motion_bucket_id)
            rows.append(encode_clips(*self.nets, frames, noise, strength, bucket, self.clips.shape["fps"]))
        return Latents(*map(torch.cat, zip(*rows)))


class ShardLatents:
    """What `encode` wrote, mapped into memory: a step reads its own clips and no others."""

    def __init__(self, folder, seed, device):
        self.seed, self.device, self.index = seed, device, dict(model.read_json(folder / "index.json"))
        if self.index.pop("sha256", "") != digest(json.dumps(self.index).encode()):
            raise DataError(f"{folder}/index.json: its checksum is wrong: run the same `encode` again")
        shards = (model.read_safetensors([folder / name]) for name in self.index["shards"])
        self.shards = [Latents(**dict(tensors)) for tensors in shards]

    def take(self, numbers):
        """Clips `numbers` [b], each once per epoch, shuffled -> x0 [b f 4 h w] and their model.Cond, fp32."""
        rows, n, size = [], self.index["num_clips"], self.index["shard_size"]
        for epoch, position in (divmod(number, n) for number in numbers.tolist()):
            i, row = divmod(shuffled(self.seed, epoch, n)[position].item(), size)
            rows.append([x[row:row + 1].to(self.device) for x in self.shards[i]])
        return Latents(*map(torch.cat, zip(*rows))).take(torch.arange(len(rows)))


def open_data(data, vae, image_encoder, seed, num_frames, width, height, *, num_clips=None, where=(),
              motion_bucket_id=None, **options):
    """What a trainer's --data names: "toy" (num_clips of it), a folder of shards, or videos (`where` as for
    open_files, options as for Clips). The result has .take(numbers [b]) -> (x0 [b f 4 h w], model.Cond), fp32
    on the device of `vae`. Raises DataError."""
    device = next(vae.parameters()).device
    if data == "toy":
        if width != height:
            raise DataError(f"the toy world is square, not {width}x{height}: give other --data")
        return toy_latents(vae, image_encoder, seed, num_clips, num_frames, height, device)
    if not (Path(data) / "index.json").is_file():
        clips = Clips(open_files(data, where), seed, num_frames, width, height, **options)
        return VideoLatents(clips, vae, image_encoder, motion_bucket_id)
    latents = ShardLatents(Path(data), seed, device)
    shape = [latents.index[name] for name in ("num_frames", "width", "height")]
    if shape != [num_frames, width, height]:
        raise DataError(f"{data}: frames, width, height are {shape}, not {[num_frames, width, height]}")
    return latents


def open_training_data(args, vae, image_encoder, unet, share, rank):
    """What a trainer's flags ask for, for a process that takes `share` clips of each batch -> what open_data
    returns, and (x0, cond) of four clips to watch: of the toy world that nothing trains on, or other moments
    of the videos."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    width, height = (side or 8 * unet.config["sample_size"] for side in (args.width, args.height))
    how = dict(num_frames=unet.config["num_frames"], width=width, height=height, where=args.where,
               motion_bucket_id=args.motion_bucket_id, fps=args.fps, flip=args.flip, workers=args.workers,
               share=share, batch_size=args.batch_size)
    latents = open_data(args.data, vae, image_encoder, args.seed, num_clips=args.num_clips,
                        skip_list=args.output_dir / f"skipped-{rank}.jsonl", **how)
    shown = open_data(args.data, vae, image_encoder, args.seed + HELD_OUT, num_clips=4, **how)
    return latents, shown.take(torch.arange(4))


# ---- Commands -------------------------------------------------------------------------------------------


digest = lambda content: hashlib.sha256(content).hexdigest()


def open_clips(args, **options):
    return Clips(open_files(args.data, args.where), args.seed, args.num_frames, args.width, args.height,
                 fps=args.fps, flip=args.flip, workers=args.workers, **options)


def check(args, out):
    """sorts videos into a list of the good ones, and one of the others with reasons; verifies shards"""
    if (Path(args.data) / "index.json").is_file():
        shards = ShardLatents(Path(args.data), args.seed, "cpu").index["shards"]
        for name in tqdm(shards, "check", disable=None):
            if digest((Path(args.data) / name).read_bytes()) != shards[name]:
                raise DataError(f"{args.data}/{name}: damaged: delete it and run the same `encode` again")
        return print(f"{args.data}: {len(shards)} shards are as they were written")
    bad = out.with_suffix(".bad.jsonl")
    clips, good = open_clips(args), 0
    bad.unlink(missing_ok=True)                                         # what was bad once is tried again
    clips.skip_list = bad
    n, step = len(clips.files), 64 * args.workers                       # a million tasks at once need memory
    look = lambda i: clips.read(clips.files[i], 0.0)[1]
    found = (facts for i in range(0, n, step) for facts in clips.threads.map(look, range(n)[i:i + step]))
    with open(out, "w") as file:
        for facts in tqdm(found, "check", n, disable=None):
            if "reason" not in facts:
                good += file.write(json.dumps(facts) + "\n") > 0
    print(f"{good} videos are good: {out}; {n - good} are not: {bad}")


def preview(args, out):
    """draws the first clips as a trainer will see them, a row for each"""
    frames, facts = zip(*map(open_clips(args).clip, range(args.num_clips or 8)))
    frames = rearrange(torch.stack(frames), "n f h w c -> n f c h w") / 127.5 - 1
    save_sheet(frames, out)
    print(*map(json.dumps, facts), f"wrote {out}", sep="\n")


def encode(args, out):
    """writes the latents and conditions of all clips into shards, which a trainer's --data takes; resumes"""
    world, size = engine.start_world(), args.shard_size
    skip_list = out / f"bad-{world.rank}.jsonl"
    clips = open_clips(args, share=size, batch_size=size * world.size, skip_list=skip_list)
    count = args.num_clips or len(clips.files)
    settings = {key: value for key, value in vars(args).items() if key not in ("command", "out", "workers")}
    settings |= {"num_clips": count, "num_videos": len(clips.files)}
    if (out / "settings.json").exists() and model.read_json(out / "settings.json") != settings:
        raise DataError(f"{out} was begun with the settings in {out}/settings.json, which are not today's")
    how = dict(dtype=torch.bfloat16 if world.device.type == "cuda" else torch.float32, device=world.device)
    nets = model.load_vae(args.model, **how), model.load_image_encoder(args.model, **how)
    source = VideoLatents(clips, *nets, args.motion_bucket_id)
    out.mkdir(parents=True, exist_ok=True)                              # now that nothing is wrong
    if world.rank == 0:
        model.write_json(out / "settings.json", settings)
    shards = [out / f"shard-{i:06d}.safetensors" for i in range(math.ceil(count / size))]
    sums = [shard.with_suffix(".sha256") for shard in shards]           # written last: then the shard is done
    for i in tqdm(range(world.rank, len(shards), world.size), f"process {world.rank}", disable=None):
        if not (sums[i].exists() and shards[i].exists()):
            numbers = torch.arange(i * size, min((i + 1) * size, count)).split(1)
            latents = Latents(*map(torch.cat, zip(*map(source.encode, numbers))))
            model.write_safetensors(shards[i], latents._asdict())
            sums[i].write_text(digest(shards[i].read_bytes()))
    if all(file.exists() for file in shards + sums):                    # whoever comes last; if two do, both
        index = settings | {"shards": {shard.name: file.read_text() for shard, file in zip(shards, sums)}}
        own = out / f"index-{world.rank}.json"
        model.write_json(own, index | {"sha256": digest(json.dumps(index).encode())})
        os.replace(own, out / "index.json")
        print(f"wrote {out}: {count} clips, {sum(shard.stat().st_size for shard in shards) / 1e9:.3g} GB")


def main():
    commands = {"check": (check, "good.jsonl"), "preview": (preview, "sheet.png"),
                "encode": (encode, "shards")}
    parser = engine.command_line("Videos for training.")
    flag = parser.add_argument
    flag("command", choices=commands, help="; ".join(f"{k} {commands[k][0].__doc__}" for k in commands))
    flag("data", help="a folder of videos, or a .csv or .jsonl list of paths; check: shards, too")
    flag("--out", type=Path, help="what is written (None: good.jsonl, sheet.png, shards)")
    flag("--where", nargs=3, action="append", default=[], metavar=("COLUMN", "MIN", "MAX"),
         help="of a list, only the rows between these limits; inf is none")
    flag("--num_frames", type=int, default=14, help="frames of a clip")
    flag("--width", type=int, default=576, help="of a clip; videos are resized to cover it, and cut")
    flag("--height", type=int, default=320, help="of a clip")
    flag("--fps", type=int, default=FPS, help="frames per second of a clip")
    flag("--flip", action="store_true", help="mirror every second clip")
    flag("--seed", type=int, default=0, help="of order, start times and noise")
    flag("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    flag("--num_clips", type=int, help="how many (None: preview 8, encode one per video)")
    flag("--model", default="assets/toy", help="encode: pipeline folder or hub id")
    flag("--motion_bucket_id", type=int, help="encode: 1 to 255 (None: measured, from the change of pixels)")
    flag("--shard_size", type=int, default=256, help="encode: clips per file")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if type(value) is int and (value < 1 and name != "seed" or value % 8 and name in ("width", "height")):
            parser.error(f"--{name} {value}: must be positive, and sizes multiples of 8")
    function, out = commands[args.command]
    with engine.refusing():
        function(args, args.out or Path(out))


if __name__ == "__main__":
    main()
