"""Training clips by number: the toy world, video files, and shards of encoded videos.

    latents = open_data(args, vae, image_encoder)       # args.data is "toy", VIDEOS or SHARDS
    x0, cond = latents.take(numbers)                    # [b] -> latents b f 4 h w and model.Cond, both fp32

    toy         clips of toy/world.py, encoded once at the start (toy_latents)
    VIDEOS      a folder tree, or a .csv or .jsonl list such as OpenVid-1M's, decoded and encoded in each step
                (open_files -> Clips -> VideoLatents)
    SHARDS      the output of `encode`, read from disk (ShardLatents)

Clip numbers count up over all epochs. The file of a clip, its start time, whether it is mirrored, and its
noise are functions of (seed, number) only. So the position in the data is one integer, on any number of
processes and after any resume. (In the toy world, the noise on the picture also depends on num_clips.)

A list has a row per video. One of its columns has the paths (COLUMNS), and --where uses columns of numbers.
`check` writes such a list: the rows of the good videos with all their columns, and with what it found out:
path, size, fps, seconds, start. These replace columns of the same name.

Videos are decoded in separate processes (support/decode.py). A file that crashes or hangs its decoder is
added to a skip list, and training goes on with another file. A file that the system cannot read, for example
because its disk is not mounted, is replaced without being added to the list.

    $ python data.py check VIDEOS --out good.jsonl              # lists the files that can be decoded
    $ python data.py preview VIDEOS --out sheet.png             # draws the clips that training will get
    $ python data.py encode VIDEOS --model M --out SHARDS       # encodes all clips once; resumes; or torchrun
    $ python data.py encode VIDEOS --model M --dry_run          # says how long that takes and how much space
"""
import csv
import hashlib
import json
import os
import re
import signal
import sys
import threading
from argparse import Namespace
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from subprocess import PIPE, Popen
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from tqdm import tqdm

import model
from support import checkpoint, dryrun, engine, kernels
from support.checkpoint import ModelError, read_json, read_safetensors, write_json, write_safetensors
from support.media import save_sheet
from toy.world import toy_clips

FPS = 7
HELD_OUT = 1_000_000                    # toy worlds of seed + HELD_OUT are for sample sheets and for tuning


# ---- Latents and conditions -----------------------------------------------------------------------------


class Latents(NamedTuple):
    """n encoded clips: everything that a training step needs of them. x0 and image_latents are in bf16."""

    x0: torch.Tensor                # n f 4 h w  scaled to unit variance
    image_embeds: torch.Tensor      # n 1 d
    image_latents: torch.Tensor     # n 4 h w    unscaled; kept once, as it is the same for all frames
    time_ids: torch.Tensor          # n 3

    def take(self, numbers: torch.Tensor):
        """Clips `numbers` [b], modulo n -> x0 [b f 4 h w] and their model.Cond, fp32."""
        x0, embeds, image, ids = (x[numbers.to(x.device) % len(x)].float() for x in self)
        return x0, model.Cond(embeds, repeat(image, "b c h w -> b f c h w", f=x0.shape[1]), ids)


def concatenate(parts):
    """Several Latents -> one, with the clips in the same order."""
    return Latents(*map(torch.cat, zip(*parts)))


@torch.no_grad()
def encode_clips(vae, image_encoder, frames, noise, z, motion_bucket_id, fps=FPS) -> Latents:
    """Encodes clips and their conditions. The condition image is the first frame plus noise of the strength
    that SVD was trained with: exp(-3 + 0.5 z), z ~ N(0, 1).

    frames              b f 3 H W  in [-1, 1]
    noise, z            b 3 H W and b, standard normal
    motion_bucket_id    b          1 (still) to 255 (fast)
    """
    cond = model.encode_condition(vae, image_encoder, frames[:, 0], noise, num_frames=1, fps=fps,
                                  motion_bucket_id=motion_bucket_id, noise_aug_strength=(-3 + 0.5 * z).exp())
    latents = vae.encode(frames.flatten(0, 1)) * vae.config["scaling_factor"]           # (b f) 4 h w
    x0 = rearrange(latents, "(b f) c h w -> b f c h w", f=frames.shape[1])
    return Latents(x0.bfloat16(), cond.image_embeds, cond.image_latents[:, 0].bfloat16(), cond.time_ids)


def toy_latents(vae, image_encoder, seed: int, num_clips: int, num_frames: int = 14, size: int = 128,
                device="cpu", batch_size: int = 64, first: int = 0) -> Latents:
    """Renders and encodes clips `first` to `first + num_clips - 1` of the toy world `seed`."""
    generator, encoded = torch.Generator(device), []
    for numbers in tqdm(torch.arange(first, first + num_clips).split(batch_size), "latents", disable=None):
        clips = toy_clips(seed, numbers, num_frames, size, device)
        generator.manual_seed(seed * 1_000_003 + numbers[0].item())
        z = torch.randn(len(numbers), generator=generator, device=device)                   # b
        noise = torch.randn(len(numbers), 3, size, size, generator=generator, device=device)
        # On a CPU, 4 clips at a time: the activations of 64 clips take 11 GB.
        step = batch_size if torch.device(device).type == "cuda" else 4
        for part in zip(*(x.split(step) for x in (clips.frames, noise, z, clips.motion_bucket_id))):
            encoded.append(encode_clips(vae, image_encoder, *part))
    return concatenate(encoded)


# ---- Video files: folders and lists ---------------------------------------------------------------------

SUFFIXES = tuple(".mp4 .m4v .mov .3gp .3g2 .f4v .mkv .webm .avi .mpg .mpeg .vob .ts .mts .m2ts .flv .wmv "
                 ".asf .gif".split())
# Names of the column of paths, the best one first. OpenVid-1M has `video`, `check` writes `path`.
COLUMNS = ("path", "video", "file", "filename", "video_path")


def open_files(data, where=(), report=False) -> list[str]:
    """The paths of the videos of a folder and its sub-folders, or of a .csv or .jsonl list with a column
    named in COLUMNS. A million paths take about 150 MB of memory.

    where: keeps only rows of a list whose values are within limits: [("motion score", 2, 20), ...]. report:
    prints what is passed over in a folder. Raises ModelError."""
    data = Path(data).absolute()
    is_list = data.suffix in (".csv", ".jsonl") and data.is_file()      # reading a pipe would wait for ever
    if not is_list and (where or not data.is_dir()):
        raise ModelError(f"{data}: no .csv or .jsonl list" + ", nor a folder" * (not where))
    files = [row["path"] for row in read_list(data, where)] if is_list else list(walk(data, report))
    if not files:
        raise ModelError(f"{data}: no videos in it" + ", or none within the limits of --where" * bool(where))
    return files


def walk(root, report):
    """Yields the videos below a folder in alphabetical order, without the sample sheets of training runs.
    Links to folders are not followed. report: prints at the end how many files are passed over. Raises
    OSError if `root` cannot be read. A sub-folder that cannot be read is left out with a warning."""
    others = []
    os.scandir(root).close()                            # raises OSError; os.walk would yield nothing
    for folder, folders, names in os.walk(root, onerror=lambda error: print(
            f"warning: {error.filename!r}: {error.strerror}: left out", file=sys.stderr)):
        folders.sort()                                  # in place: os.walk visits them in this order
        others += ["(linked folder)" for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(names):
            # A run writes sample-000100.mp4 beside metrics.jsonl.
            ours = "metrics.jsonl" in names and re.fullmatch(r"sample-\d+\.mp4", name)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and not ours:
                yield os.path.join(folder, name)
            else:
                others.append("(hidden)" if name[0] == "." else Path(name).suffix.lower() or "(no suffix)")
    if report and others:
        print(f"passed over {len(others)} files: {' '.join(sorted(set(others))[:30])}")


def read_list(data, where):
    """Yields the rows of a list, {column: value}, with the absolute path of the video as `path`. In the list,
    paths are relative to its folder, or to a folder beside it that has the column's name, as OpenVid-1M's
    video/. A missing or empty value is outside all limits. Raises ModelError."""
    column = None
    try:
        limits = [(name, float(low), float(high)) for name, low, high in where]
    except ValueError as error:
        raise ModelError(f"--where: {error}: MIN and MAX are numbers; inf is no limit") from error
    with open(data, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file) if data.suffix == ".csv" else map(json.loads, filter(str.strip, file))
        try:
            for row in rows:
                if column is None:                      # the first row has the names of all columns
                    column = next((name for name in COLUMNS if name in row), COLUMNS[0])
                    if lacks := {column, *(name for name, _, _ in limits)} - set(row):
                        names = ", ".join(filter(None, row))
                        raise ModelError(f"no column {min(lacks)}, only {names}: fix it or --where")
                    root = data.parent / column if (data.parent / column).is_dir() else data.parent
                with suppress(TypeError, KeyError, ValueError, OverflowError):      # such rows are left out
                    if row[column] and all(low <= float(row[name]) <= high for name, low, high in limits):
                        yield row | {"path": os.path.join(root, row[column])}
        except (csv.Error, ValueError, TypeError, RecursionError) as error:
            raise ModelError(f"{data}: cannot be read: {error}") from error


@lru_cache(4)                                   # this epoch and the next, of training and of validation
def shuffled(seed, epoch, n):
    """The order of n clips in an epoch, a permutation [n] that depends on these three numbers only."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


# ---- Clips of videos ------------------------------------------------------------------------------------

DECODER = [sys.executable, str(Path(__file__).parent / "support" / "decode.py")]
TRIES = 1000                                    # consecutive bad files after which a clip is given up


class Clips:
    """Clips of videos by number, decoded ahead of time by `workers` processes.

    Clip `number` comes from file `number % n` of the shuffled epoch `number // n`, so each file is used once
    per epoch. A bad file is replaced by a good one, which differs between the clips; its path and the reason
    go into `skip_list` (JSONL). Files that are in that list at the start are not opened. A file that the
    system cannot read is replaced too, but is not listed and is tried again for later clips.

    A training process reads `clips_per_rank` consecutive numbers out of every `batch_size`; these two numbers
    tell which clips to decode ahead.
    """

    def __init__(self, files, seed, num_frames, width, height, *, fps=FPS, flip=False, workers=4,
                 clips_per_rank=1, batch_size=1, skip_list=None):
        self.files, self.seed, self.flip, self.skip_list = files, seed, flip, skip_list
        self.clips_per_rank, self.batch_size = clips_per_rank, batch_size
        # For decode.read_clip.
        self.shape = {"num_frames": num_frames, "width": width, "height": height, "fps": fps}
        self.num_ahead, self.pending = 2 * workers, {}                  # pending: {number: future clip}
        self.warned = False                                             # of a file that cannot be read now
        # One decoder per thread. These are daemon threads: Ctrl-C does not wait for a decoder that hangs.
        self.threads, self.local = ThreadPool(workers), threading.local()
        rows = checkpoint.read_lines(skip_list, path=str, reason=str) if skip_list else []
        self.bad = {row["path"]: row for row in rows}                   # {path: facts}

    def ask_decoder(self, path, start):
        """Runs decode.read_clip in this thread's process -> (frames uint8 [f H W 3], facts). start: 0 to 1,
        where the clip lies between the first and the last possible one of the file. facts: path, size, fps,
        seconds and start of the clip; or path and "reason", and then the frames are not valid. Raises
        ChildProcessError if the process dies, ModelError if it cannot run at all."""
        process = self.local.process = getattr(self.local, "process", None) or Popen(
            DECODER, stdin=PIPE, stdout=PIPE, start_new_session=True)
        sides = [self.shape[name] for name in ("num_frames", "height", "width")]
        frames = torch.empty(*sides, 3, dtype=torch.uint8)
        with suppress(OSError, ValueError):             # a broken pipe or half an answer: the process died
            process.stdin.write(json.dumps({"path": path, "start": start, **self.shape}).encode() + b"\n")
            process.stdin.flush()
            facts = json.loads(process.stdout.readline())
            if "reason" in facts or process.stdout.readinto(frames.numpy()) == frames.numel():
                return frames, facts
        self.local.process, status = None, process.wait()
        if status >= 0:
            raise ModelError(f"videos cannot be decoded, is PyAV installed? `{' '.join(DECODER)}` ended")
        late = " (it took too long)" * (status == -signal.SIGALRM)
        raise ChildProcessError(f"its decoder died of {signal.Signals(-status).name}{late}")

    def read(self, path, start=0.0):
        """Reads a clip of one file, see ask_decoder -> (frames uint8 [f H W 3], facts), or (None, facts with
        a "reason") if the file is bad. A bad file is added to the skip list."""
        if path in self.bad:
            return None, self.bad[path]
        # If the decoder dies, the cause may not be the file: try again, then try the file's beginning.
        for begin in (start, start, 0.0):
            try:
                frames, facts = self.ask_decoder(path, begin)
                break
            except ChildProcessError as error:
                frames, facts = None, {"path": path, "reason": str(error)}
        if "temporary" in facts:                        # the system could not read the file
            if not self.warned:                         # one line, even if a whole disk is missing
                self.warned = True
                print(f"warning: {path!r}: {facts['reason']}: replaced, tried again later", file=sys.stderr)
        # setdefault: when two threads read the same bad file, one of them adds it to the list.
        elif "reason" in facts and self.bad.setdefault(path, facts) is facts and self.skip_list:
            with checkpoint.writing(self.skip_list), open(self.skip_list, "a") as file:
                file.write(json.dumps(facts) + "\n")
        return frames, facts

    def clip(self, number):
        """Clip `number` -> (frames uint8 [f H W 3], facts). Raises ModelError if no file is good."""
        n, tries = len(self.files), min(TRIES, len(self.files))
        epoch, position = divmod(number, n)
        start, mirror, skip = engine.uniforms(self.seed, torch.tensor([number]), 21, 3)[0].tolist()
        for i in range(tries):
            # The first try is the clip's own file. The others, 1 to n - 1 places further, begin at a random
            # place, so that bad files that follow each other are replaced by different ones.
            further = 1 + (int(skip * n) + i) % (n - 1) if i > 0 else 0
            path = self.files[shuffled(self.seed, epoch, n)[(position + further) % n]]
            frames, facts = self.read(path, start)
            if "reason" not in facts:
                return frames.flip(2) if self.flip and mirror < 0.5 else frames, facts
        listed = f"; delete {self.skip_list} to try those in it again" if self.skip_list and self.bad else ""
        raise ModelError(f"none of {tries} videos is good. {path}: {facts['reason']}. `python data.py check` "
                         f"lists the good ones, and the reason for each of the others{listed}")

    def take(self, numbers):
        """Clips `numbers` [b] -> frames uint8 [b f H W 3]. Starts to decode the clips that come next."""
        wanted, ahead = numbers.tolist(), []
        number = wanted[-1]
        for _ in range(self.num_ahead):
            at_end = (number + 1) % self.clips_per_rank == 0        # of this process's part of the batch
            number += 1 + self.batch_size - self.clips_per_rank if at_end else 1
            ahead.append(number)
        for number in wanted + ahead:
            if number not in self.pending:
                self.pending[number] = self.threads.apply_async(self.clip, [number])
        with engine.waiting():
            frames = torch.stack([self.pending[number].get()[0] for number in wanted])
        self.pending = {number: self.pending[number] for number in ahead}
        return frames


# ---- Latents of videos ----------------------------------------------------------------------------------

MOTION_SCALE = 0.1                  # change per frame, of pixels in [-1, 1], that has motion bucket 162


class VideoLatents:
    """Clips of videos, encoded in every step: this needs no disk space, but time for the VAE.

    motion_bucket_id: of all clips (default: measured, see encode).
    """

    def __init__(self, clips, vae, image_encoder, motion_bucket_id=None):
        self.clips, self.nets, self.motion_bucket_id = clips, (vae, image_encoder), motion_bucket_id

    def take(self, numbers):
        """Clips `numbers` [b] -> x0 [b f 4 h w] and their model.Cond, fp32."""
        return self.encode(numbers).take(torch.arange(len(numbers)))

    def encode(self, numbers):
        """Clips `numbers` [b] -> Latents. Encodes one clip at a time, so that a clip's latents do not depend
        on its batch. Unless fixed, the motion bucket is 1 + 254 (1 - exp(-change / MOTION_SCALE)), where
        change is the mean absolute difference between consecutive frames in [-1, 1]."""
        encoded, device = [], next(self.nets[0].parameters()).device
        seed, fps = self.clips.seed, self.clips.shape["fps"]
        for number, frames in zip(numbers.split(1), self.clips.take(numbers)):
            # Contiguous: on a CPU, the group norm of channels-last tensors is less accurate.
            frames = rearrange(frames.to(device), "f h w c -> 1 f c h w").float().contiguous() / 127.5 - 1
            noise = engine.normal(seed, number, 22, frames.shape[2:], device)                       # 1 3 H W
            z = engine.normal(seed, number, 23, (), device)                                         # 1
            change = frames.diff(dim=1).abs().mean((1, 2, 3, 4))                                    # 1
            bucket = self.motion_bucket_id or (255 - 254 * (-change / MOTION_SCALE).exp()).round()
            encoded.append(encode_clips(*self.nets, frames, noise, z, bucket, fps))
        return concatenate(encoded)


class ShardLatents:
    """The output of `encode`, mapped into memory: a step reads only its own clips from disk."""

    def __init__(self, folder, seed, device):
        index = read_json(folder / "index.json", sha256=str, shards=dict, num_clips=int, shard_size=int,
                          num_frames=int, width=int, height=int)
        checksum, n, size = index.pop("sha256"), index["num_clips"], index["shard_size"]
        if checksum != digest(json.dumps(index).encode()) or not 0 < n <= size * len(index["shards"]):
            raise ModelError(f"{folder}/index.json: wrong checksum or counts: run the same `encode` again")
        self.seed, self.device, self.index, self.shards = seed, device, index, []
        f, h, w = index["num_frames"], index["height"] // 8, index["width"] // 8
        for i, name in enumerate(index["shards"]):
            tensors = dict(read_safetensors([folder / name]))           # reads the header, maps the rest
            found = {key: [*x.shape] for key, x in tensors.items()}
            b, d = min(size, n - i * size), found.get("image_embeds", [])[-1:]
            # [*d], the size of the embeddings, may be any: open_training_data compares it with the UNet's.
            wanted = dict(zip(Latents._fields, ([b, f, 4, h, w], [b, 1, *d], [b, 4, h, w], [b, 3])))
            if found != wanted:
                raise ModelError(f"{folder}/{name}: has {found}, not {wanted}: delete it, encode again")
            self.shards.append(Latents(**tensors))

    def take(self, numbers):
        """Clips `numbers` [b], shuffled, each once per epoch -> x0 [b f 4 h w] and model.Cond, fp32."""
        rows, n, names = [], self.index["num_clips"], [*self.index["shards"]]
        for epoch, position in (divmod(number, n) for number in numbers.tolist()):
            shard, row = divmod(shuffled(self.seed, epoch, n)[position].item(), self.index["shard_size"])
            clip = [x[row:row + 1] for x in self.shards[shard]]         # on the CPU: no wait for the GPU
            with engine.waiting():                                      # here the disk is read
                if not all(x.isfinite().all() for x in clip):
                    raise ModelError(f"{names[shard]}: NaN or infinity in clip {row} of it: encode it again")
            rows.append([x.to(self.device) for x in clip])
        return concatenate(rows).take(torch.arange(len(rows)))


def digest(content):
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


# ---- Opening data ---------------------------------------------------------------------------------------

# {flag of clips: default} for the flags whose values are fixed in shards and in the toy world.
FIXED = dict.fromkeys("num_frames width height flip motion_bucket_id where".split()) | {"fps": FPS}


def open_clips(args, report=False, **options):
    """The videos that the flags `args` name -> Clips. report: prints what is passed over in a folder.
    options: further arguments of Clips. Raises ModelError."""
    return Clips(open_files(args.data, args.where, report), args.seed, args.num_frames, args.width,
                 args.height, fps=args.fps, flip=args.flip, workers=args.workers, **options)


def open_data(args, vae, image_encoder, **options):
    """The data that the flags `args` name: args.num_clips clips of the toy world, shards, or videos, with
    `options` for Clips. It has .take(numbers [b]) -> (x0 [b f 4 h w], model.Cond), fp32, on the device of
    `vae`. Raises ModelError."""
    num_frames, size, device = args.num_frames, args.height, next(vae.parameters()).device
    if args.data == "toy":
        refuse_idle_flags(args, {"num_frames": num_frames, "width": size, "height": size})
        return toy_latents(vae, image_encoder, args.seed, args.num_clips, num_frames, size, device)
    if not (Path(args.data) / "index.json").is_file():
        return VideoLatents(open_clips(args, **options), vae, image_encoder, args.motion_bucket_id)
    latents = ShardLatents(Path(args.data), args.seed, device)
    refuse_idle_flags(args, latents.index)
    return latents


def refuse_idle_flags(args, made):
    """Raises ModelError for flags in FIXED that would have no effect: their values are neither the defaults
    nor those in `made`, the settings that --data was made with."""
    given, own = ({flag: x.get(flag) or FIXED[flag] for flag in FIXED} for x in (vars(args), made))
    if wrong := [f"{flag} {own[flag] or 'not set'}, not {given[flag]}" for flag in FIXED
                 if given[flag] not in (FIXED[flag], own[flag])]:
        raise ModelError(f"--data {args.data} has {'; '.join(wrong)}: give other flags or other --data")


def open_training_data(args, vae, image_encoder, unet, clips_per_rank, rank):
    """The data that a trainer's flags name, for a process that trains on `clips_per_rank` clips of each
    batch -> the result of open_data, and (x0, cond) of four validation clips. Those of the toy world are
    unseen. Those of videos are the same videos at other times, and those of shards are clips that the run
    trains on: nothing is held out. With --overfit N, the run trains on the first N clips, encoded once, and
    shows four of them."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    default_width, default_height = model.default_size(unet)
    width, height = args.width or default_width, args.height or default_height
    if width % (stride := model.pixel_stride(unet)) or height % stride:
        raise ModelError(f"--width {width} --height {height}: must be multiples of {stride} for this model")
    flags = vars(args) | {"num_frames": unet.config["num_frames"], "width": width, "height": height}
    latents = open_data(Namespace(**flags), vae, image_encoder, clips_per_rank=clips_per_rank,
                        batch_size=args.batch_size, skip_list=args.output_dir / f"skipped-{rank}.jsonl")
    flags |= {"seed": args.seed + HELD_OUT, "num_clips": 4}
    other = open_data(Namespace(**flags), vae, image_encoder) if args.data == "toy" else latents
    # Numbers that training does not reach. 720,720 is a multiple of 1 to 16: four clips of few videos belong
    # to one epoch, so they differ.
    x0, cond = other.take(10 ** 6 * 720_720 + torch.arange(4))                      # b f 4 h w
    if n := flags.get("overfit"):
        x0, cond = latents.take(torch.arange(n))
        latents = Latents(x0, cond.image_embeds, cond.image_latents[:, 0], cond.time_ids)
        x0, cond = latents.take(torch.arange(4))                                    # modulo n
    found = [cond.image_embeds.shape[-1], 2 * x0.shape[2]]
    takes = [unet.config["cross_attention_dim"], unet.config["in_channels"]]
    if found != takes:
        raise ModelError(f"--data has embeddings and channels {found}, the UNet takes {takes}: encode again")
    return latents, (x0, cond)


# ---- Commands. Their docstrings are their help texts ----------------------------------------------------


def check(args, out):
    """decodes a clip of each video, lists the good videos, and the bad ones with reasons; verifies shards"""
    if (Path(args.data) / "index.json").is_file():
        shards = ShardLatents(Path(args.data), args.seed, "cpu").index["shards"]
        for name in tqdm(shards, "check", disable=None):
            if digest((Path(args.data) / name).read_bytes()) != shards[name]:
                raise ModelError(f"{args.data}/{name}: damaged: delete it and run the same `encode` again")
        return print(f"{args.data}: all {len(shards)} shards have the right checksums")
    bad = out.parent / f"{out.stem}.bad.jsonl"
    checkpoint.check_writable(out, bad)
    checkpoint.refuse_overwriting([out, bad], [args.data])
    clips = open_clips(args, report=True)
    good, n, step = 0, len(clips.files), 64 * args.workers
    videos = ({"path": path} for path in clips.files)
    if Path(args.data).is_file():                       # a list is read again, for its other columns
        videos = read_list(Path(args.data).absolute(), args.where)
    with (checkpoint.replacing(out) as good_part, checkpoint.replacing(bad) as bad_part,
          open(good_part, "w") as good_list, open(bad_part, "w") as bad_list,
          tqdm(total=n, desc="check", disable=None) as bar):
        while rows := [*islice(videos, step)]:          # in steps: a queue of a million tasks needs memory
            for row, (_, facts) in zip(rows, clips.threads.imap(clips.read, [row["path"] for row in rows])):
                # A list of bad videos that is checked again loses its old reasons.
                row = {name: row[name] for name in row if name not in (None, "reason", "temporary")}
                (bad_list if "reason" in facts else good_list).write(checkpoint.to_json(row | facts))
                good += "reason" not in facts
                bar.update()
        if not good:                                    # inside `with`: earlier lists remain
            raise ModelError(f"{args.data}: none of {n} videos is good. {facts['path']}: {facts['reason']}")
    print(f"{good} videos are good: {out}; {n - good} are not: {bad}")


def preview(args, out):
    """draws the first clips as a trainer gets them, one per row"""
    checkpoint.check_writable(out)
    frames, facts = zip(*map(open_clips(args, report=True).clip, range(args.num_clips or 8)))
    save_sheet(rearrange(torch.stack(frames), "n f h w c -> n f c h w"), out)
    print(*map(json.dumps, facts), f"wrote {out}", sep="\n")


def encode(args, out):
    """writes latents and conditions of all clips into shards, which a trainer's --data reads; resumes"""
    world, size = engine.start_world(), args.shard_size
    clips = open_clips(args, report=world.rank == 0, clips_per_rank=size, batch_size=size * world.size,
                       skip_list=None if args.dry_run else out / f"bad-{world.rank}.jsonl")
    count, may_change = args.num_clips or len(clips.files), ("command", "out", "workers", "dry_run")
    settings = {key: value for key, value in vars(args).items() if key not in may_change}
    # The names of the videos, without their folder, which may move.
    settings |= {"num_clips": count, "videos": digest(repr([*map(os.path.basename, clips.files)]).encode())}
    if (out / "settings.json").exists() and read_json(out / "settings.json") != settings:
        raise ModelError(f"{out} was started with other settings, see {out}/settings.json: use another --out")
    how = {"dtype": torch.bfloat16 if world.device.type == "cuda" else torch.float32, "device": world.device}
    nets = kernels.fast(model.load_vae(args.model, **how)), model.load_image_encoder(args.model, **how)
    source = VideoLatents(clips, *nets, args.motion_bucket_id)
    if args.dry_run:
        return dryrun.encode(source, out, max(0, count - size * len([*out.glob("*.sha256")])), world)
    if world.rank == 0:
        checkpoint.refuse_overwriting([out], [args.data])
        checkpoint.lock(out)                            # only now: bad input leaves no folder behind
        write_json(out / "settings.json", settings)
    engine.any_rank(False, world.device)                # nobody writes before the folder is cleared
    parts = torch.arange(count).split(size)
    shards = [out / f"shard-{i:06d}.safetensors" for i in range(len(parts))]
    sums = [shard.with_suffix(".sha256") for shard in shards]           # written last: marks a finished shard
    for i in tqdm(range(world.rank, len(parts), world.size), f"process {world.rank}", disable=None):
        # A killed writer may have left a checksum that is empty or filled with zeros.
        if not (shards[i].exists() and sums[i].exists() and len(sums[i].read_bytes().strip(b"\0")) == 64):
            write_safetensors(shards[i], concatenate(map(source.encode, parts[i].split(1)))._asdict())
            with checkpoint.replacing(sums[i]) as part:
                part.write_text(digest(shards[i].read_bytes()))
    # The process that finishes the last shard writes the index. If two finish together, both write the same.
    if all(file.exists() for file in shards + sums):
        index = settings | {"shards": {shard.name: file.read_text() for shard, file in zip(shards, sums)}}
        write_json(out / "index.json", index | {"sha256": digest(json.dumps(index).encode())})
        print(f"wrote {out}: {count} clips, {sum(shard.stat().st_size for shard in shards) / 1e9:.3g} GB")


def main():
    modes = {"check": (check, "good.jsonl"), "preview": (preview, "sheet.png"), "encode": (encode, "shards")}
    parser = engine.command_line("Prepare videos for training.")
    flag = parser.add_argument
    flag("command", choices=modes, help="; ".join(f"{mode} {modes[mode][0].__doc__}" for mode in modes))
    flag("data", help="a folder of videos, or a .csv or .jsonl list of paths; for check, shards as well")
    flag("--out", type=Path, help="output (default: good.jsonl, sheet.png or shards)")
    engine.clip_flags(flag)
    parser.set_defaults(width=576, height=320, workers=os.cpu_count())
    flag("--num_frames", type=engine.number(2, 1000), default=14, help="frames per clip")
    flag("--num_clips", help="number of clips (default: preview 8, encode one per video)")
    flag("--model", default=str(checkpoint.ASSETS / "toy"), help="encode: pipeline folder or hub id")
    flag("--shard_size", default=256, help="encode: clips per shard")
    flag("--dry_run", action="store_true", help="encode: measure time and disk space on some clips, no files")
    args = parser.parse_args()
    if args.width % 8 or args.height % 8:
        parser.error(f"--width {args.width} --height {args.height}: sizes must be multiples of 8")
    if args.dry_run and args.command != "encode":
        parser.error("--dry_run is for encode: leave it out")
    function, out = modes[args.command]
    out = args.out or Path(out)
    if out.suffix not in {"check": [".jsonl"], "preview": [".png", ".jpg"]}.get(args.command, [out.suffix]):
        parser.error(f"--out {out}: check writes a .jsonl list, preview a .png or .jpg picture")
    function(args, out)


if __name__ == "__main__":
    main()
