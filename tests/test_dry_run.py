"""support/dryrun.py: what is measured before a run, and what it refuses. The trainers' own dry runs are in
tests/test_training.py, with their networks."""
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from test_video import at_rate, run, write

import data
from support import dryrun, engine
from support.checkpoint import ModelError

GB = 10 ** 9


def disk(patch, free):
    patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(2):
        write(folder / f"{i}.mp4", at_rate(24))
    return folder


# ---- Parts ----------------------------------------------------------------------------------------------


def test_space_is_that_of_the_nearest_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=GB))
    assert dryrun.require_space(tmp_path / "not" / "there", GB) == GB and asked == [tmp_path]
    with pytest.raises(ModelError, match="1 GB are free on this disk, 3 are needed"):
        dryrun.require_space(tmp_path, 3 * GB)


class Slow:
    """Data that takes 5 ms for a clip."""

    def take(self, numbers):
        with engine.waiting():
            time.sleep(0.005 * len(numbers))


def fake_run(folder, **changes):
    """What DryRun reads of an engine.Run, with one parameter of 4,000 bytes."""
    theta = torch.nn.Parameter(torch.zeros(1000))
    args = dict(output_dir=folder, max_train_steps=100, cuda_graph=False, batch_size=4, validation_steps=50,
                checkpointing_steps=10, checkpoints_total_limit=2)
    return SimpleNamespace(
        args=SimpleNamespace(**args | changes), world=engine.World(0, 1, torch.device("cpu")), step=0,
        stop=[], log=None, groups={"theta": {"a": theta}, "psi": {}}, config={}, num_parameters=1000,
        optimizers={"opt": torch.optim.Adam([theta])},
        save_sheet=lambda folder, step: (folder / f"sample-{step}.png").write_bytes(bytes(7000)))


def steps(run, latents, seconds=0.001, finite=True):
    """The trainer's loop."""
    while run.step < run.run.args.max_train_steps and not run.stopped:
        time.sleep(seconds)
        if latents:
            latents.take(torch.arange(4))
        run.after_step(finite, grad_norm=0)
    return run


def lines(capsys):
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}


@pytest.mark.parametrize("seconds, limit", [(0.001, "data"), (0.06, "CPU")])
def test_the_summary_says_what_limits_the_run(tmp_path, capsys, seconds, limit):
    """Waiting for data and computing are told apart, whichever is longer. A slow computer may add to both."""
    run = steps(dryrun.DryRun(fake_run(tmp_path), Slow()), Slow(), seconds)
    said = lines(capsys)
    assert list(said) == ["data", "step", "disk", "run"] and run.step == 3
    assert said["run"].endswith(f"limited by {limit}") and "100 steps in 0:00:" in said["run"]
    assert said["data"].startswith("data    20 clips read, ")
    assert list(tmp_path.iterdir()) == []                               # checkpoint and sheet are gone


def test_space_for_the_whole_run_is_needed(tmp_path, capsys, monkeypatch):
    """Three checkpoints, two sheets and the last weights, less what is there."""
    steps(dryrun.DryRun(fake_run(tmp_path), Slow()), None)
    assert "of 4e-06 GB" in lines(capsys)["disk"]
    needed = 3 * 4000 + 2 * 7000 + 2 * 1000 + 4000
    disk(monkeypatch, needed)
    steps(dryrun.DryRun(fake_run(tmp_path), Slow()), None)
    disk(monkeypatch, needed - 1)
    with pytest.raises(ModelError, match="make room, or choose another folder"):
        steps(dryrun.DryRun(fake_run(tmp_path), Slow()), None)
    (tmp_path / "sample-000050.png").write_bytes(b"!")
    steps(dryrun.DryRun(fake_run(tmp_path), Slow()), None)
    assert [path.name for path in tmp_path.iterdir()] == ["sample-000050.png"]
    disk(monkeypatch, 3999)                                             # less than a checkpoint
    with pytest.raises(ModelError, match="4e-06 are needed"):
        steps(dryrun.DryRun(fake_run(tmp_path), Slow()), None)


def test_what_cannot_work_is_refused(tmp_path):
    done = fake_run(tmp_path)
    done.step = 100
    with pytest.raises(ModelError, match="has all 100 steps: give more --max_train_steps"):
        dryrun.DryRun(done, Slow())
    with pytest.raises(ModelError, match="gradients are not finite"):
        steps(dryrun.DryRun(fake_run(tmp_path), Slow()), None, finite=False)


def test_a_run_that_is_nearly_done_is_measured_too(tmp_path, capsys):
    """The loop goes on to the step that is timed, and stays below the number that ends in publishing."""
    run = steps(dryrun.DryRun(fake_run(tmp_path, max_train_steps=1), Slow()), None)
    assert "1 steps in" in lines(capsys)["run"] and run.step == 3 < run.run.args.max_train_steps


def test_only_the_reading_is_timed(monkeypatch):
    """Not the clips that are still decoded ahead, the start of decoders, or files that were just read."""
    clips, begun = data.Clips(["a.mp4"], 0, 1, 8, 8, workers=3), []

    def clip(number):
        time.sleep(0.2 if len(begun) < 10 else 0.002 if number in begun else 0.02)
        begun.append(number)
        return torch.zeros(1, 8, 8, 3, dtype=torch.uint8), {}

    monkeypatch.setattr(clips, "clip", clip)
    clips.take(torch.arange(10 ** 6, 10 ** 6 + 4))                      # as for a sample sheet
    rate, said = dryrun.reading_rate(SimpleNamespace(clips=clips))
    assert 75 < rate <= 150 and said.startswith("24 clips read, ")      # 3 decoders with 20 ms a clip: 150


# ---- data.py encode -------------------------------------------------------------------------------------


def encode(monkeypatch, pipeline_folder, videos, out, *more):
    run(monkeypatch, "encode", videos, "--out", out, "--model", pipeline_folder, "--num_frames", 3, "--width",
        64, "--height", 64, "--workers", 1, "--dry_run", *more)


def test_encode(tmp_path, videos, pipeline_folder, monkeypatch, capsys):
    (videos / "bad.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    encode(monkeypatch, pipeline_folder, videos, out, "--num_clips", 1000, "--motion_bucket_id", 7)
    said = lines(capsys)
    assert "; bad videos: 1, " in said["data"] and "bad.mp4: " in said["data"] and not out.exists()
    # 3 frames and one condition latent of 4 x 8 x 8 in bf16, 24 numbers of the embedding and 3 ids in fp32.
    assert f"{1000 * (4 * 4 * 64 * 2 + 4 * 27) / 1e9:.3g} GB for 1000 clips" in said["disk"]
    assert "limited by" in said["run"]
    disk(monkeypatch, 10)
    with pytest.raises(SystemExit) as stop:
        encode(monkeypatch, pipeline_folder, videos, out)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"{tmp_path}: 1e-08 GB are free" in said and not out.exists()


def test_other_commands_have_no_dry_run(tmp_path, videos, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "check", videos, "--out", tmp_path / "good.jsonl", "--dry_run")
    assert stop.value.code == 2 and "--dry_run is for encode" in capsys.readouterr().err


def test_encode_without_a_good_video(tmp_path, videos, pipeline_folder, monkeypatch, capsys):
    for file in videos.iterdir():
        file.write_bytes(b"no video")
    with pytest.raises(SystemExit) as stop:
        encode(monkeypatch, pipeline_folder, videos, tmp_path / "out")
    assert stop.value.code == 2 and "none of 2 videos is good" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
