"""--dry_run: what a run will need, measured in a few steps before it takes a night.

    DryRun              takes the place of engine.Run in a trainer: a few steps, then a summary
    encode              the same for `data.py encode`
    reading_rate        how many clips a second the data gives
    require_space       the free bytes on a disk; an error if they are too few

The scripts open everything as usual, so all that they check at the start is checked: weights, sizes, videos,
the checkpoint to resume from. Measured here is the rest: reading, a step, memory and the disk. Bad videos are
listed as in a run. Every other file is deleted again, and earlier output stays as it was.
"""
import shutil
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from support import engine
from support.checkpoint import ModelError, collect, save_checkpoint

NUM_CLIPS = 20                      # clips to read, at least
TIMED = 2                           # steps to time, after those that compile kernels and record graphs


def reading_rate(latents):
    """Reads clips of the training data -> clips a second, and a sentence about it. Of videos, this is
    decoding alone. Raises ModelError if no video is good."""
    clips, n = getattr(latents, "clips", None), NUM_CLIPS
    source = clips or latents
    source.take(torch.arange(1))                # starts the decoders, which also decode the next clips
    if clips:
        for clip in clips.pending.values():
            clip.wait()
        n += -n % clips.num_ahead               # the same number of clips for each decoder
    start = time.perf_counter()
    source.take(1000 + torch.arange(n))         # none of those before, which the system may hold in memory
    rate, bad = n / (time.perf_counter() - start), list(clips.bad.values()) if clips else []
    return rate, f"{n} clips read, {rate:.3g} a second in each process" + (
        f"; bad videos: {len(bad)}, {bad[0]['path']}: {bad[0]['reason']}" if bad else "")


def require_space(folder, needed):
    """The free bytes on the disk of `folder`. Raises ModelError if they are fewer than `needed`."""
    folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(f"{folder}: {free / 1e9:.3g} GB are free on this disk, {needed / 1e9:.3g} are "
                         "needed: make room, or choose another folder")
    return free


def device_name(world):
    """GPU, CPU or MPS."""
    return world.device.type.replace("cuda", "gpu").upper()


def say(**lines):
    """Prints a line for each topic."""
    print(*(f"{topic:7s} {line}" for topic, line in lines.items()), sep="\n")


class DryRun:
    """Has the step, log and after_step of the engine.Run that it replaces, so that the trainer's loop runs as
    it is, and ends that loop after a few steps. latents: the training data. Raises ModelError if the run
    cannot work."""

    def __init__(self, run, latents):
        self.run, self.log, self.step, self.stopped = run, run.log, run.step, False
        self.num_steps = run.args.max_train_steps - run.step
        if self.num_steps <= 0:
            raise ModelError(f"{run.args.output_dir} has all {run.step} steps: give more --max_train_steps")
        self.rate, self.data = reading_rate(latents)
        # engine.cuda_graph records call 4.
        self.untimed = 4 if run.args.cuda_graph and run.world.device.type == "cuda" else 1
        run.args.max_train_steps += self.untimed + TIMED            # the loop must not end before this does

    def after_step(self, finite, **norms):
        self.step += 1
        # `now` stands still while this process waits for data.
        done, now = self.step - self.run.step - self.untimed, time.perf_counter() - engine.WAITED[0]
        if done == 0:
            self.start = now
        self.stopped = done == TIMED or bool(self.run.stop)
        if done == TIMED and not finite:
            raise ModelError("gradients are not finite; try --mixed_precision no")
        if done == TIMED and self.run.world.rank == 0:
            self.report((now - self.start) / TIMED)

    def report(self, own):
        """Writes a checkpoint and a sheet, deletes them, and prints the summary. own: seconds of a step
        without those that it waited for data."""
        run, args, world = self.run, self.run.args, self.run.world
        state = collect(run.groups, run.optimizers)
        size = sum(tensor.nbytes for tensor in state.values())      # of a checkpoint
        require_space(args.output_dir, size)
        with TemporaryDirectory(prefix=".dry_run", suffix=".part", dir=args.output_dir) as name:
            folder, start = Path(name), time.perf_counter()
            save_checkpoint(folder, 0, state, run.config, 1)
            saving, start = time.perf_counter() - start, time.perf_counter()
            run.save_sheet(folder, 0)
            drawing = time.perf_counter() - start
            sheet = sum(file.stat().st_size for file in folder.glob("sample-*"))
        there = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file())
        saves, sheets = (self.num_steps // n for n in (args.checkpointing_steps, args.validation_steps))
        # One checkpoint more while it is written; the last weights in fp32 and, as merged/, in fp16.
        needed = (args.checkpoints_total_limit + 1) * size + sheets * sheet + 2 * run.num_parameters + sum(
            p.nbytes for name in ("theta", "psi") for p in run.groups[name].values())
        free = require_space(args.output_dir, needed - there)
        reading, kind = args.batch_size / world.size / self.rate, device_name(world)
        total = {"data": max(0, reading - own) * self.num_steps, kind: own * self.num_steps,
                 "disk": saving * saves, "samples": drawing * sheets}
        say(data=f"{self.data}; {args.batch_size / world.size / own:.3g} are needed",
            step=f"{own:.3g} s on {kind}, {total['data'] / self.num_steps:.3g} s of waiting for data; "
                 f"peak memory {engine.peak_memory(world.device):.3g} GB",
            disk=f"{needed / 1e9:.3g} GB for checkpoints of {size / 1e9:.3g} GB, samples and weights; "
                 f"{free / 1e9:.3g} GB free",
            run=f"{self.num_steps} steps in {timedelta(seconds=round(sum(total.values())))}, limited by "
                f"{max(total, key=total.get)}")


def encode(source, out, num_clips, world):
    """Measures `data.py encode`: reading, the VAE, and the space that `num_clips` clips take in the folder
    `out`. source: data.VideoLatents. Raises ModelError if the disk is too small."""
    rate, read = reading_rate(source)
    source.encode(torch.arange(1))                                  # compiles kernels
    start = time.perf_counter() - engine.WAITED[0]                  # as above, without waiting for data
    encoded = [tensor.cpu() for tensor in source.encode(torch.arange(1, 4))]            # waits for the GPU
    own = (time.perf_counter() - engine.WAITED[0] - start) / 3
    needed, kind = num_clips * sum(tensor.nbytes for tensor in encoded) / 3, device_name(world)
    free = require_space(out, needed)
    if world.rank == 0:
        say(data=f"{read}; {1 / own:.3g} are needed",
            step=f"{own:.3g} s for a clip on {kind}; peak memory {engine.peak_memory(world.device):.3g} GB",
            disk=f"{needed / 1e9:.3g} GB for {num_clips} clips; {free / 1e9:.3g} GB free",
            run=f"{timedelta(seconds=round(num_clips * max(own, 1 / rate) / world.size))}, limited by "
                f"{'data' if own * rate < 1 else kind}")
