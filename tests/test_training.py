"""Both training stages, run as commands on random networks of 32x32 pixels and 3 frames; support/engine.py.

Each run is forked from a server that has imported torch and transformers once, which takes seconds, and
executes the script itself. The run under torchrun is a real command line.
"""
import ast
import copy
import gc
import inspect
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import av
import pytest
import torch
from conftest import ROOT, randomize, small_image_encoder, unet_config, vae_config
from forked import excepthook
from PIL import Image
from safetensors.torch import load_file
from torch.utils import checkpoint as torch_checkpoint

import data
import lora
import model
import sampler
import solver
from support import checkpoint, engine, media

FLAGS = ("--preset toy_cpu --num_clips 8 --batch_size 2 --max_train_steps 10 --checkpointing_steps 5 "
         "--validation_steps 5 --validation_teacher_steps 2 --log_steps 1 --lora_rank 4 --warmup_steps 2 "
         "--lr_d 2e-4 --device cpu --mixed_precision no")
SIX = "--max_train_steps 6 --checkpointing_steps 3 --validation_steps 100"
LOSSES = ["loss_d", "loss_huber", "loss_adv"]
MACHINE = {"s_per_step", "clips_per_s", "memory_gb", "data_wait", "seconds_left"}   # differ from run to run
BOTH = pytest.mark.parametrize("stage", [1, 2])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---------------------------------------------------------------------------------------------------------
# Running


class Run(NamedTuple):
    processes: list
    folder: Path
    said: list                  # a path for each process, with suffix .out for its stdout and .err for stderr

    def wait(self):
        for process in self.processes:
            process.join(120)
        return self

    @property
    def status(self):
        """The exit status of all processes; the set of them if they differ, which no test expects."""
        codes = {process.exitcode for process in self.processes}
        return codes.pop() if len(codes) == 1 else codes

    @property
    def stdout(self):
        return "".join(said.with_suffix(".out").read_text() for said in self.said)

    @property
    def stderr(self):
        return "".join(said.with_suffix(".err").read_text() for said in self.said)


def script(name, argv, said, environment, before):
    """What `python name argv` does, in the forked process."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        with open(said.with_suffix(suffix), "w") as file:
            os.dup2(file.fileno(), number)
    gc.freeze()                                                 # a collection would copy the shared pages
    os.environ.update(environment)
    sys.argv = [name, *argv]
    before()
    with excepthook():
        runpy.run_path(str(ROOT / name), run_name="__main__")


# Values of `before`. In each step the script calls engine.finite_step twice: for the discriminator, "D", and
# for the student, "G".


def nothing():
    pass


def watch(see):
    """Calls see(number of the step, "D" or "G", the script's variables) before each call of finite_step."""
    finite_step, calls = engine.finite_step, iter(range(10 ** 6))

    def watched(*args):
        call = next(calls)
        see(1 + call // 2, "DG"[call % 2], sys._getframe(1).f_globals)
        return finite_step(*args)

    engine.finite_step = watched


def die_in(step):
    def see(now, turn, script):
        if (now, turn) == (step, "G"):
            os.kill(os.getpid(), signal.SIGKILL)
    watch(see)


def spoil(step):
    """Makes one gradient of the student NaN, in one step (None: in all)."""
    def see(now, turn, script):
        if turn == "G" and step in (now, None):
            next(iter(script["theta"].masters.values())).grad[0] = float("nan")
    watch(see)


def blow_up(step):
    """Makes one weight of the student infinite, in one step."""
    def see(now, turn, script):
        if (now, turn) == (step, "G"):
            next(iter(script["theta"].masters.values())).data[0] = float("inf")
    watch(see)


def seed_by_rank():
    seed = torch.manual_seed
    torch.manual_seed = lambda number: seed(number + int(os.environ["RANK"]))


@contextmanager
def no_free_handle():
    """Inside, opening a file fails with "Too many open files"."""
    import resource
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def open_no_more():
    """Leaves no free file handle while the run reads its checkpoints."""
    load = checkpoint.load_checkpoint

    def load_without_handles(*args):
        with no_free_handle():
            return load(*args)

    checkpoint.load_checkpoint = load_without_handles


def check_routes():
    """Asserts which weights have gradients in the D step and in the G step."""
    def see(now, turn, script):
        net, disc, theta, psi = (script[name] for name in ("net", "disc", "theta", "psi"))
        assert all(p.grad is None for p in net.parameters())    # the G step has moved them to the masters
        assert all(p.grad is None for name, p in disc.named_parameters() if name not in psi)
        for group, own in ((psi, "D"), (theta.masters, "G")):
            # Some gradients are zero: of lora_A while lora_B is, of a bias before a GroupNorm. Most are not.
            alive = sum(p.grad is not None and bool(p.grad.any()) for p in group.values())
            assert alive > 0.4 * len(group) if turn == own else all(p.grad is None for p in group.values())
        frozen = [*script.get("ema", {}).values(), *script.get("teacher_weights", {}).values()]
        assert not any(t.requires_grad or t.grad is not None for t in frozen)
        assert not any(p.requires_grad for name, p in net.named_parameters() if name not in theta.net_weights)
        print("seen", now, turn)
    watch(see)


@pytest.fixture(scope="module")
def server():
    """The server of forks. It imports while the teacher is being made."""
    from multiprocessing import forkserver
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sampler", "discriminator", "transformers.models.clip.modeling_clip",
                                    "transformers.models.dinov2.modeling_dinov2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))                   # for the preloaded modules
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def teacher(server, tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    model.save_unet(randomize(model.UNet(**unet_config((32, 32), num_frames=3, sample_size=4))),
                    folder / "unet")
    model.save_vae(randomize(model.VAE(**vae_config((32, 32, 32, 32)))), folder / "vae")
    small_image_encoder().save_pretrained(folder / "image_encoder")
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2,
                             image_size=28, patch_size=14)).save_pretrained(folder / "dinov2")
    model.save_configs(folder)
    return folder


@pytest.fixture(scope="module")
def train(server, teacher, tmp_path_factory):
    """train(stage, flags, folder) starts a run without waiting for it -> Run."""
    started = []

    def start(stage, flags="", folder=None, processes=1, before=nothing):
        folder = folder or tmp_path_factory.mktemp("run")
        run = Run([], folder, [tmp_path_factory.mktemp("said") / "run" for _ in range(processes)])
        argv = ["--model", str(teacher), "--output_dir", str(folder), *FLAGS.split(), *flags.split()]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank, said in enumerate(run.said):
            world = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            world = {key: str(value) for key, value in world.items()}
            run.processes.append(server.Process(
                target=script, args=(f"train_stage{stage}.py", argv, said, world, before)))
            run.processes[-1].start()
        started.extend(run.processes)
        return run

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """{stage: output folder} of uninterrupted runs of ten steps."""
    folders = {}
    for stage in (1, 2):
        run = train(stage, stage1_of(folders, stage)).wait()
        assert run.status == 0, run.stderr
        folders[stage] = run.folder
    return folders


@pytest.fixture(scope="module")
def two(train, whole):
    """{stage: output folder} of uninterrupted runs of six steps on two processes."""
    folders = {}
    for stage in (1, 2):
        run = train(stage, f"{stage1_of(whole, stage)} {SIX}", processes=2).wait()
        assert run.status == 0, run.stderr
        folders[stage] = run.folder
    return folders


def stage1_of(whole, stage):
    return f"--stage1 {whole[1]}" if stage == 2 else ""


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def repeatable(folder):
    return [{key: value for key, value in row.items() if key not in MACHINE} for row in metrics(folder)]


def checkpoints(folder):
    return [int(path.name.removeprefix("checkpoint-")) for path in sorted(folder.glob("checkpoint-*"))]


def state(folder, step):
    return load_file(folder / f"checkpoint-{step:07d}" / "state.safetensors")


def part_of(tensors, prefix):
    return {key: tensor for key, tensor in tensors.items() if key.startswith(f"{prefix}.")}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_run(a, b):
    """Metrics, last checkpoint and final weights are equal, bit for bit."""
    assert repeatable(a) == repeatable(b)
    last = checkpoints(b)[-1]
    assert checkpoints(a)[-1] == last and equal(state(a, last), state(b, last))
    for file in ("student.safetensors", "disc.safetensors"):
        assert equal(load_file(a / file), load_file(b / file)), file


def assert_refused(run, *words):
    """Exit status 2 and one line on stderr that has these words."""
    lines = run.stderr.splitlines()
    assert run.status == 2 and len(lines) == 1, run.stderr
    assert all(word in lines[0] for word in words), lines[0]


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------
# Output files


@BOTH
def test_metrics_have_one_row_per_step(whole, stage):
    rows = metrics(whole[stage])
    assert [row["step"] for row in rows] == list(range(1, 11))
    for row in rows:
        assert list(row) == ["step", "loss_d", "logits_real", "logits_fake", "loss_huber", "loss_adv",
                             "grad_norm", "grad_norm_d", "data_wait", "logits_gap", "s_per_step",
                             "clips_per_s", "skipped", "memory_gb", "seconds_left"]
        assert torch.tensor(list(row.values()), dtype=torch.float64).isfinite().all() and not row["skipped"]
        assert row["logits_gap"] == row["logits_real"] - row["logits_fake"] and row["data_wait"] == 0
        assert (row["seconds_left"] > 0) == (row["step"] < 10)


def sheet(folder, step, rows):
    """The pixels of `rows` of a sample sheet: four rows each for real, teacher, one step, Time Travel."""
    with Image.open(folder / f"sample-{step:06d}.png") as picture:
        assert picture.size == (3 * 34 + 2, 16 * 34 + 2)            # 4 rows of 4 clips, 3 frames each
        return picture.crop((0, rows.start * 34, picture.width, rows.stop * 34)).tobytes()


@BOTH
def test_samples_are_written(whole, stage):
    folder = whole[stage]
    assert sorted(path.name for path in folder.glob("sample-*")) == [
        f"sample-{step:06d}.{kind}" for step in (5, 10) for kind in ("mp4", "png")]
    assert sheet(folder, 5, range(0, 8)) == sheet(folder, 10, range(0, 8))
    assert len({sheet(folder, step, range(row, row + 4)) for step in (5, 10) for row in (0, 4, 8, 12)}) == 6
    with av.open(folder / "sample-000010.mp4") as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [frame.shape for frame in frames] == [(4 * 32, 4 * 32, 3)] * 3


@BOTH
def test_masters_are_merged_in_fp32(train, whole, teacher, stage):
    """In a bf16 run, too, merged/ is the teacher with the fp32 masters, rounded to fp16 once. Frozen weights
    keep their bits, and the LoRA file holds the masters."""
    flags = "--mixed_precision bf16 --max_train_steps 2 --learning_rate 1e-2"
    run = train(stage, flags + f" --stage1 {whole[1]}" * (stage == 2)).wait()
    assert run.status == 0, run.stderr
    masters = load_file(run.folder / "student.safetensors")
    merged = model.load_unet(run.folder / "merged").state_dict()
    updated = 0
    for key, weight in model.load_unet(teacher).state_dict().items():
        path, weight = key.removesuffix(".weight"), masters.get(key, weight)
        if f"{path}.lora_A.weight" in masters:
            update = masters[f"{path}.lora_B.weight"] @ masters[f"{path}.lora_A.weight"]
            torch.testing.assert_close(merged[key], weight + update, rtol=2 ** -10, atol=1e-7)
            updated += update.any().item()
        else:
            assert torch.equal(merged[key], weight.half().float()), key
    assert updated > 10
    if stage == 1:
        saved = load_file(run.folder / lora.LORA_FILE)
        assert all(torch.equal(saved[f"unet.{name}"], tensor) for name, tensor in masters.items())


@BOTH
def test_teacher_is_shown_beside_the_student(whole, teacher, stage):
    """The teacher's rows come from the teacher, not from the network that trains, with the student's pictures
    and noise."""
    vae, unet = model.load_vae(teacher), model.load_unet(teacher)
    held_out = data.toy_latents(vae, model.load_image_encoder(teacher), data.HELD_OUT, 4, 3, 32)
    x0, cond = held_out.take(torch.arange(4))
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    x0_teacher = sampler.sample_teacher(unet, cond, solver.karras_sigmas(2), generators, (1.0, 3.0))
    with torch.no_grad():
        expected = media.contact_sheet(sampler.decode(vae, torch.cat((x0, x0_teacher)))).numpy()
    difference = torch.frombuffer(bytearray(sheet(whole[stage], 10, range(0, 8))), dtype=torch.uint8).int() \
        - torch.frombuffer(bytearray(expected[:8 * 34].tobytes()), dtype=torch.uint8).int()
    assert difference.abs().max() <= 1                              # rounding to 8 bits


@BOTH
def test_merged_is_the_teacher_plus_the_trained_weights(whole, teacher, stage):
    merged = sampler.load_student(whole[stage] / "merged", model.load_unet(teacher)).state_dict()
    assert not [key for key in merged if "lora" in key]
    student = lora.add_lora(model.load_unet(teacher), 4)
    unknown = student.load_state_dict(load_file(whole[stage] / "student.safetensors"), strict=False)
    assert not unknown.unexpected_keys
    student = lora.merge_lora(student).state_dict()
    assert equal(merged, {key: tensor.half().float() for key, tensor in student.items()})

    # student.safetensors, a fraction of the size, gives the same network.
    alone = lora.load_student(whole[stage] / "student.safetensors", model.load_unet(teacher)).state_dict()
    assert equal(alone, student)

    base = {key: tensor.half().float() for key, tensor in model.load_unet(teacher).state_dict().items()}
    moved = {key for key in base if not torch.equal(base[key], merged[key])}
    trained = {key for key in base if re.search(rf"\.({lora.LORA_TARGETS})\.weight$", key)
               or stage == 2 and ".temporal_transformer_blocks." in key}
    assert moved <= trained
    # Not all of them: an update of 1e-4 to a weight near 1 is rounded away in the fp16 file.
    assert len(moved) > 0.8 * len(trained)


@BOTH
def test_student_and_discriminator_both_move(whole, stage):
    before, after = state(whole[stage], 5), state(whole[stage], 10)
    for prefix in ("theta", "psi", "buffer") + ("ema",) * (stage == 2):
        a, b = part_of(before, prefix), part_of(after, prefix)
        assert a.keys() == b.keys() and len(a) > 10
        # Not all of them: a bias before a GroupNorm with one channel per group has no gradient.
        assert sum(not torch.equal(a[key], b[key]) for key in a) > 0.8 * len(a), prefix


@BOTH
def test_checkpoint_names(whole, stage):
    """These names are the file format: runs of earlier versions resume."""
    tensors = state(whole[stage], 10)
    assert {name.split(".")[0] for name in tensors} == \
        {"theta", "psi", "buffer", "count", "opt", "opt_d"} | ({"ema"} if stage == 2 else set())
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for name in (f"theta.{path}.lora_A.weight", "psi.features.to_rgb.weight", "count.skipped", "opt.0.step",
                 "psi.heads.0.spatial.conv_in.parametrizations.weight.original", "opt_d.0.exp_avg_sq",
                 "buffer.0.spatial.conv_in.parametrizations.weight.0._u",
                 *[f"ema.{path}.lora_B.weight"] * (stage == 2)):
        assert name in tensors, name
    facts = json.loads((whole[stage] / "checkpoint-0000010" / "state.json").read_text())
    assert list(facts) == ["step", "config"] and facts["step"] == 10
    assert facts["config"]["world_size"] == 1 and not set(facts["config"]) & set(engine.FREE)


# To renew: print [round(row[name], 4) for row in rows] in the test below.
GOLDEN = {
    1: {"loss_d": [1.9709, 1.9738, 1.8919, 1.9271, 1.7766, 1.7184, 1.9903, 1.8921, 1.7495, 1.7681],
        "loss_huber": [0.347, 0.1977, 0.4412, 0.2015, 0.4136, 0.4089, 0.054, 0.2009, 0.2709, 0.2141],
        "loss_adv": [1.0419, 1.0165, 1.082, 0.9871, 1.1374, 1.1641, 0.8452, 0.9162, 1.0407, 0.9871]},
    2: {"loss_d": [2.0081, 2.0015, 1.9851, 2.0003, 1.9872, 1.9995, 2.0014, 2.0005, 2.0029, 2.0007],
        "loss_huber": [0.0351, 0.0019, 0.1055, 0.0108, 0.0504, 0.0116, 0.0139, 0.0563, 0.0234, 0.005],
        "loss_adv": [1.0867, 0.9577, 1.2089, 0.9717, 1.2565, 1.2663, 0.7896, 0.9481, 1.1016, 1.0528]},
}


@BOTH
def test_golden_losses(whole, stage):
    """Losses of this code, as a guard against unintended changes. An intended change renews them. Tolerance
    1e-2: other CPUs round differently, and ten steps amplify the difference."""
    rows = metrics(whole[stage])
    for name in LOSSES:
        assert [row[name] for row in rows] == pytest.approx(GOLDEN[stage][name], rel=1e-2, abs=1e-4), name


# ---------------------------------------------------------------------------------------------------------
# Interrupted runs


@pytest.mark.parametrize("stage, processes", [(1, 1), (2, 2)])
def test_killed_run_resumes_bit_for_bit(train, whole, two, stage, processes):
    uninterrupted, saved, flags = (whole, 5, "") if processes == 1 else (two, 3, SIX)
    flags = f"{stage1_of(whole, stage)} {flags}"
    run = train(stage, flags, processes=processes, before=partial(die_in, saved + 3)).wait()
    assert run.status == -signal.SIGKILL, run.stderr
    assert len(metrics(run.folder)) == saved + 2 and checkpoints(run.folder) == [saved]
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss')                             # a line cut off by the kill
    (run.folder / ".checkpoint-9.part").mkdir()                     # a checkpoint cut off by it
    again = train(stage, flags, run.folder, processes).wait()
    assert again.status == 0 and f"from step {saved}" in again.stdout, again.stderr
    assert_same_run(again.folder, uninterrupted[stage])
    assert not list(run.folder.glob(".checkpoint*"))


def test_sigterm_saves_and_exits_with_status_0(train, whole):
    run = train(1, "--max_train_steps 1000")
    wait_for(run.folder / "metrics.jsonl")
    run.processes[0].terminate()
    assert run.wait().status == 0, run.stderr
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", run.stdout)[1])
    assert checkpoints(run.folder)[-1] == step < 1000 and not (run.folder / "merged").exists()
    again = train(1, f"--max_train_steps {step + 1}", run.folder).wait()
    assert again.status == 0 and f"from step {step}" in again.stdout, again.stderr
    assert [row["step"] for row in metrics(run.folder)] == list(range(1, step + 2))
    assert repeatable(run.folder)[:10] == repeatable(whole[1])[:step + 1]


def test_sigterm_before_the_first_step_ends_at_once(train):
    """The clips here would be encoded for hours, and there is nothing to save."""
    run = train(1, "--num_clips 1000000")
    wait_for(run.folder / ".lock")
    run.processes[0].terminate()
    assert run.wait().status == -signal.SIGTERM and not checkpoints(run.folder), run.stderr


def test_sigterm_to_one_of_two_stops_both(train):
    run = train(2, "--stage1 none --max_train_steps 1000", processes=2)
    wait_for(run.folder / "metrics.jsonl")
    run.processes[1].terminate()
    assert run.wait().status == 0, run.stderr
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", run.stdout)[1])
    assert checkpoints(run.folder)[-1] == step < 1000


def test_incomplete_checkpoint_is_skipped(train, whole, teacher, tmp_path):
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / "checkpoint-0000010" / "state.safetensors", 5000)
    run = train(1, folder=tmp_path).wait()
    assert run.status == 0 and "from step 5" in run.stdout
    assert "checkpoint-0000010 is incomplete and skipped" in run.stderr
    assert f"input.png --model {teacher} --student {tmp_path}/merged\n" in run.stdout      # the next command
    assert_same_run(tmp_path, whole[1])
    for changes, said in (("--max_train_steps 7", f"{tmp_path} has 10 steps: give more --max_train_steps"),
                          ("--resume_from_checkpoint none --report_to wandb", "run `pip install wandb`")):
        run = train(1, changes, folder=tmp_path).wait()
        assert run.status == 2 and said in run.stderr
        assert_same_run(tmp_path, whole[1])                     # nothing was deleted


def test_a_run_with_other_weights_leaves_no_lora_behind(train, whole, tmp_path):
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
    run = train(1, "--train all --resume_from_checkpoint none --max_train_steps 1", folder=tmp_path).wait()
    assert run.status == 0, run.stderr
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_checkpoints_that_cannot_be_read_now_are_kept(train, whole, tmp_path):
    """Too many open files: the run is refused. The same command continues from the last step later."""
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    files = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*")
                     if path.is_file() and path.name != ".lock"}
    before = files()
    run = train(1, folder=tmp_path, before=open_no_more).wait()
    assert_refused(run, "Too many open files", str(tmp_path))
    assert files() == before
    run = train(1, folder=tmp_path).wait()
    assert run.status == 0 and "from step 10" in run.stdout, run.stderr


def test_other_settings_are_refused(train, whole):
    run = train(1, "--learning_rate 0.5", whole[1]).wait()
    assert_refused(run, "learning_rate was 0.0002, is 0.5")
    assert checkpoints(whole[1]) == [5, 10]


@BOTH
def test_dry_run(train, whole, tmp_path, stage):
    """It opens all that a run opens, from the last checkpoint on, measures, and leaves nothing behind."""
    shutil.copytree(whole[stage], tmp_path, dirs_exist_ok=True)
    files = lambda: {path: path.is_file() and path.name != ".lock" and path.read_bytes()
                     for path in tmp_path.rglob("*")}
    before = files()
    flags = f"{stage1_of(whole, stage)} --dry_run --max_train_steps"
    run = train(stage, f"{flags} 1000", tmp_path).wait()
    assert run.status == 0 and "from step 10" in run.stdout, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()[1:]] == ["data", "step", "disk", "run"]
    assert "990 steps in " in run.stdout and files() == before
    if stage == 1:
        assert_refused(train(1, f"{flags} 10", tmp_path).wait(), "has all 10 steps")
        run = train(1, f"{flags} 1000 --learning_rate 0.5", tmp_path).wait()
        assert_refused(run, "learning_rate was 0.0002, is 0.5")
        assert files() == before


@pytest.mark.parametrize("start", [0, 5])
def test_starting_over_or_further_back(train, whole, tmp_path, start):
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    where = tmp_path / "checkpoint-0000005" if start else "none"
    run = train(1, f"--max_train_steps {start + 2} --resume_from_checkpoint {where}", tmp_path).wait()
    assert run.status == 0 and f"from step {start}" in run.stdout, run.stderr
    assert repeatable(tmp_path) == repeatable(whole[1])[:start + 2]
    # A later resume must not find the checkpoints of the old run.
    assert checkpoints(tmp_path) == ([5, 7] if start else [2])


@BOTH
def test_a_step_that_is_not_finite_is_skipped_and_counted(train, whole, stage):
    """The student, its optimiser and theta^- stay; the discriminator, whose gradients were finite, moves."""
    run = train(stage, f"{stage1_of(whole, stage)} --max_train_steps 4 --checkpointing_steps 1 "
                "--checkpoints_total_limit 9 --validation_steps 100", before=partial(spoil, 3)).wait()
    assert run.status == 0, run.stderr
    assert [row["skipped"] for row in metrics(run.folder)] == [0, 0, 1, 1]
    still = ("theta", "opt") if stage == 1 else ("theta", "opt", "ema")
    two, three, four = (state(run.folder, step) for step in (2, 3, 4))
    for prefix in (*still, "psi"):
        assert part_of(two, prefix), prefix
        assert equal(part_of(two, prefix), part_of(three, prefix)) == (prefix in still), prefix
        assert not equal(part_of(three, prefix), part_of(four, prefix)), prefix


def test_gradients_that_stay_non_finite_end_the_run(train):
    run = train(1, "--checkpointing_steps 1", before=partial(spoil, None)).wait()
    assert_refused(run, "not finite for 5 steps, until step 5", "start over")
    assert [row["skipped"] for row in metrics(run.folder)] == [1, 2, 3, 4]
    tensors = {}
    step = checkpoint.load_checkpoint(run.folder, "latest", {}, restore=tensors.update)
    assert step == 4 and all(tensor.isfinite().all() for tensor in tensors.values())
    assert not any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)      # never updated


# ---------------------------------------------------------------------------------------------------------
# Several processes, micro-batches, plain networks


def assert_same_losses(folder, whole, rel=1e-5):
    """abs=1e-6: loss_huber may be small, but it compares values near 1, which have errors of 1e-7."""
    for row, other in zip(metrics(folder)[:3], metrics(whole)[:3], strict=True):
        for name in LOSSES:
            assert row[name] == pytest.approx(other[name], rel=rel, abs=1e-6), (row["step"], name)


@BOTH
def test_two_processes(whole, two, stage):
    assert_same_losses(two[stage], whole[stage])


def test_other_world_size_is_refused(train, two):
    assert_refused(train(1, SIX, two[1]).wait(), "world_size was 2, is 1")


def test_torchrun_starts_a_killed_run_again(python, teacher, two, tmp_path):
    """The restarted run resumes even with --resume_from_checkpoint none, which holds for the first start."""
    (tmp_path / "mortal.py").write_text(f"""
import os, runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_training
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    test_training.die_in(6)
runpy.run_path("train_stage1.py", run_name="__main__")
""")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max_restarts=1", str(tmp_path / "mortal.py"), "--model", str(teacher),
               "--output_dir", str(out), *FLAGS.split(), *SIX.split(), "--resume_from_checkpoint", "none"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHON_EXEC": str(python)}, text=True,
                         capture_output=True)                   # its children are forks, too
    assert run.returncode == 0, run.stderr
    assert re.findall(r"from step (\d)", run.stdout) == ["0", "3"], run.stdout
    assert_same_run(out, two[1])


@pytest.mark.parametrize("stage, flags", [(1, "--keep_activations --gradient_checkpointing"), (2, "")])
def test_gradient_accumulation(train, whole, stage, flags):
    """With the activations of all micro-batches kept until the G step, and with a second forward pass."""
    flags += f" {stage1_of(whole, stage)} --max_train_steps 3 --gradient_accumulation_steps 2"
    run = train(stage, flags, before=check_routes).wait()
    assert run.status == 0, run.stderr
    assert_same_losses(run.folder, whole[stage])


def test_the_unet_discriminator_gives_the_same_losses_in_any_batch_split(train):
    """Its noise belongs to the clip, not to the process or the micro-batch."""
    flags = "--discriminator unet --batch_size 4 --max_train_steps 2 --validation_steps 9"
    runs = [train(1, f"{flags} --gradient_accumulation_steps {parts}") for parts in (1, 4)]
    whole, split = [metrics(run.wait().folder) for run in runs]
    for a, b in zip(whole, split, strict=True):
        assert [a[name] for name in LOSSES] == pytest.approx([b[name] for name in LOSSES], rel=1e-4)


def full_fp32():
    """Turns TF32 off. With TF32, trainings with and without CUDA graphs had losses up to 2.2 % apart (LOG.md,
    "The whole way again")."""
    torch.set_float32_matmul_precision = lambda precision: None
    torch.backends.cudnn.allow_tf32 = False


@needs_gpu
@pytest.mark.parametrize("kind", ["latent", "subpixel", "pixel", "unet"])
@BOTH
def test_recorded_trainings_have_the_same_losses(train, stage, kind):
    """Whole trainings, two micro-batches a step. Calls 1 to 3 of a function run as they are, call 4 is
    recorded, later ones are replayed: from step 3 on, with --keep_activations from step 5 on."""
    flags = f"{SIX} --device cuda --deterministic --discriminator {kind} --gradient_accumulation_steps 2"
    flags += " --stage1 none" * (stage == 2)
    recorded = ("--cuda_graph", "--cuda_graph --keep_activations",
                "--cuda_graph --keep_activations --gradient_checkpointing")
    plain, *runs = [train(stage, f"{flags} {more}", before=full_fp32) for more in ("", *recorded)]
    expected = [[row[name] for name in LOSSES] for row in metrics(plain.wait().folder)]
    apart = {}
    for more, run in zip(recorded, runs):
        assert run.wait().status == 0, run.stderr
        losses = [[row[name] for name in LOSSES] for row in metrics(run.folder)]
        apart[more] = [[abs(x / y - 1) for x, y in zip(*rows)] for rows in zip(losses, expected, strict=True)]
    assert all(x < 1e-2 for rows in apart.values() for row in rows for x in row), apart     # false for NaN
    assert len(expected) == 6 and len({loss for row in expected for loss in row}) == 18


@needs_gpu
@pytest.mark.parametrize("more", ["", "--cuda_graph"])
@BOTH
def test_deterministic_trainings_repeat_and_resume_bit_for_bit(train, stage, more):
    flags = f"{SIX} --device cuda --mixed_precision bf16 --deterministic {more}"
    flags += " --stage1 none" * (stage == 2)
    whole, again, first = [train(stage, f"{flags} {steps}") for steps in ("", "", "--max_train_steps 3")]
    assert first.wait().status == 0, first.stderr
    resumed = train(stage, flags, first.folder)
    runs = [[[row[name] for name in LOSSES] for row in metrics(run.wait().folder)]
            for run in (whole, again, resumed)]
    assert len(runs[0]) == 6 and runs[0] == runs[1] == runs[2]


def tell_deterministic():
    torch.use_deterministic_algorithms = lambda *args, **kwargs: print(
        "deterministic", args, kwargs, os.environ["CUBLAS_WORKSPACE_CONFIG"])


@pytest.mark.parametrize("flag", [True, False])
def test_deterministic_asks_torch(train, flag):
    run = train(1, "--max_train_steps 1" + " --deterministic" * flag, before=tell_deterministic).wait()
    assert run.status == 0 and ("deterministic (True,) {} :4096:8" in run.stdout) == flag, run.stderr


def test_plain_networks_compute_the_same(train, whole, tmp_path):
    """--plain may change on resume."""
    run = train(2, f"{stage1_of(whole, 2)} --plain --max_train_steps 3", tmp_path).wait()
    assert run.status == 0, run.stderr
    assert_same_losses(tmp_path, whole[2])
    again = train(2, f"{stage1_of(whole, 2)} --max_train_steps 4", tmp_path).wait()
    assert again.status == 0 and "from step 3" in again.stdout, again.stderr


@BOTH
def test_gradients_go_where_they_should(train, whole, stage):
    run = train(stage, f"{stage1_of(whole, stage)} --max_train_steps 2", before=check_routes).wait()
    assert run.status == 0, run.stderr
    assert re.findall(r"seen (.*)", run.stdout) == ["1 D", "1 G", "2 D", "2 G"]


# ---------------------------------------------------------------------------------------------------------
# Ablations and the command line


def test_consistency_distillation_alone(train):
    """AnimateLCM's settings: no discriminator, one Euler step. ema <- 0.95 ema + 0.05 theta holds exactly."""
    run = train(2, "--stage1 none --adv_weight 0 --num_solver_steps 1 --train all --max_train_steps 2 "
                   "--checkpointing_steps 1").wait()
    assert run.status == 0, run.stderr
    assert "loss_d" not in metrics(run.folder)[0]
    before, after = state(run.folder, 1), state(run.folder, 2)
    assert equal(part_of(before, "psi"), part_of(after, "psi")) and not part_of(after, "opt_d")
    theta, ema = part_of(after, "theta"), part_of(after, "ema")
    assert len(theta) == len(ema) and not equal(part_of(before, "theta"), theta)
    for key, tensor in ema.items():
        expected = before[key].lerp(theta["theta" + key.removeprefix("ema")], 1 - 0.95)
        assert torch.equal(tensor, expected), key


@pytest.mark.parametrize("flags", ["--discriminator unet --train all", "--discriminator pixel",
                                   "--discriminator subpixel --heads temporal"])
def test_other_discriminators_train(train, flags):
    run = train(1, f"{flags} --max_train_steps 2 --checkpointing_steps 1").wait()
    assert run.status == 0, run.stderr
    before, after = (part_of(state(run.folder, step), "psi") for step in (1, 2))
    assert {name for name in ("spatial", "temporal") if f".{name}." in " ".join(after)} == \
        ({"temporal"} if "--heads" in flags else {"spatial", "temporal"})
    assert sum(not torch.equal(before[key], after[key]) for key in after) > 0.8 * len(after)


def test_overfit(train):
    """One step reproduces a clip better and better. The sheet shows that clip, four times."""
    run = train(1, "--overfit 1 --batch_size 4 --adv_weight 0 --train all --learning_rate 2e-3 "
                "--max_train_steps 24 --validation_steps 12").wait()
    assert run.status == 0, run.stderr
    psnr = [row["psnr"] for row in metrics(run.folder) if "psnr" in row]
    assert len(psnr) == 2 and psnr[1] > psnr[0] + 1, psnr
    assert len({sheet(run.folder, 24, range(row, row + 1)) for row in range(4)}) == 1
    assert len({row["loss_huber"] for row in metrics(run.folder)}) == 24            # new noise in each step


def test_training_on_a_folder_of_videos(train, tmp_path):
    """A bad file is listed once and skipped. If all files are bad, the run ends with one line."""
    from test_video import at_rate, write
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"not a video")
    assert_refused(train(1, f"--data {tmp_path / 'videos'}").wait(), "none of 1 videos is good", "bad.mp4")
    for i in range(2):
        write(tmp_path / "videos" / f"{i}.mp4", at_rate(24))
    run = train(1, f"--data {tmp_path / 'videos'} --max_train_steps 3").wait()
    assert run.status == 0, run.stderr
    assert len(metrics(run.folder)) == 3 and (run.folder / "merged").exists()
    skipped = [json.loads(line) for line in (run.folder / "skipped-0.jsonl").read_text().splitlines()]
    assert [Path(row["path"]).name for row in skipped] == ["bad.mp4"]
    assert_refused(train(1, "--data nowhere").wait(), "nowhere", "list")
    assert_refused(train(1, "--preset paper").wait(), "--data")


def test_stage_2_continues_from_stage_2_at_another_size(train, whole):
    """The paper trains the second half of stage 2 at a higher resolution."""
    run = train(2, f"--stage1 {whole[2]} --width 64 --height 64 --max_train_steps 1").wait()
    assert run.status == 0, run.stderr
    before, after = (load_file(folder / "student.safetensors") for folder in (whole[2], run.folder))
    moved = max((after[name] - before[name]).abs().max() for name in before)
    assert before.keys() == after.keys() and 0 < moved < 1e-3                  # one step of Adam, warming up


def test_stage_1_that_does_not_fit(train, whole, tmp_path):
    run = train(2, f"--stage1 {whole[1]} --lora_rank 8").wait()
    assert_refused(run, "student.safetensors", "does not fit", "--lora_rank")
    load = lambda: checkpoint.load_stage1(tmp_path, {"student": {"a": torch.ones(2), "b": torch.ones(1)}})
    for tensors, reason in ((None, "missing or empty.*--stage1 none"), ({}, "missing or empty"),
                            ({"c": torch.zeros(2)}, "c does not fit"), ({"a": torch.zeros(3)}, "a does not")):
        if tensors is not None:
            checkpoint.write_safetensors(tmp_path / "student.safetensors", tensors)
        with pytest.raises(checkpoint.ModelError, match=f"student.safetensors: {reason}"):
            load()


@BOTH
def test_command_line(train, stage):
    assert_refused(train(stage, "--no_such_flag 1").wait(), f"train_stage{stage}.py", "--no_such_flag")
    assert_refused(train(stage, "--batch_size 3 --gradient_accumulation_steps 2").wait(), "--batch_size 3")
    assert_refused(train(stage, "--stage1 none --dino nowhere" if stage == 2 else "--dino nowhere").wait(),
                   "nowhere", "DINOv2")


def test_ranks_that_draw_different_weights_are_refused(train):
    run = train(1, "--max_train_steps 1", processes=2, before=seed_by_rank).wait()
    assert run.status == 2 and run.stderr.count("the ranks drew different initial weights") == 2, run.stderr


def test_a_folder_belongs_to_one_run(train, whole, teacher, tmp_path):
    assert_refused(train(1, folder=teacher).wait(), f"{teacher}: would overwrite")
    assert_refused(train(2, f"--stage1 {whole[1]}", folder=whole[1]).wait(), f"{whole[1]}: would overwrite")
    checkpoint.lock(tmp_path)                                                   # as another run would
    try:
        run = train(1, folder=tmp_path).wait()
        assert_refused(run, f"{tmp_path}: process {os.getpid()} on ", "works in it")
    finally:
        checkpoint.LOCKS.pop().close()


def test_a_folder_that_cannot_be_written_is_refused_at_once(train, tmp_path):
    (tmp_path / "file").write_text("old")
    run = train(1, folder=tmp_path / "file" / "out").wait()
    assert_refused(run, str(tmp_path / "file"), "cannot be written")


def test_weights_that_are_not_finite_are_not_saved(train):
    """An infinite weight leaves gradients of 0 behind: no step is skipped, so saving has to notice."""
    run = train(1, "--max_train_steps 3", before=partial(blow_up, 3)).wait()
    assert_refused(run, "state.safetensors: not written, because theta.", "has NaN or infinity")


@BOTH
def test_help_shows_the_defaults_of_the_preset(train, stage):
    said = {preset: " ".join(train(stage, f"--preset {preset} --help").wait().stdout.split())
            for preset in ("toy_cpu", "toy")}
    for preset, clips, steps in (("toy_cpu", 64, 8), ("toy", 60000 - 20000 * stage, 25)):
        assert f"to train on (default: {clips})" in said[preset], said[preset]
        assert f"on the sheets, with guidance (default: {steps})" in said[preset]


@BOTH
def test_every_flag_is_read_and_explained(stage):
    """Flags of both stages are defined in support/engine.py. Some are read by functions that the script
    calls."""
    source, shared = ((ROOT / name).read_text() for name in (f"train_stage{stage}.py", "support/engine.py"))
    own, both = ([node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
                  and isinstance(node.func, ast.Name) and node.func.id == "flag"]
                 for text in (source, shared))
    for part in (data, engine.start_training, engine.Run):
        assert part.__name__ in source
        source += inspect.getsource(part)
    assert len(own) >= 3 and len(both) > 35
    for call in own + both:
        name = call.args[-1].value.removeprefix("--")
        help = [keyword.value.value for keyword in call.keywords if keyword.arg == "help"]
        assert help and len(help[0]) > 5, name
        assert re.search(rf"(args|parse_known_args\(\)\[0\])\.{name}\b", source), name


# ---------------------------------------------------------------------------------------------------------
# support/engine.py


def log(folder, **changes):
    """A log of steps 2 and 4 of 10, two clips each."""
    args = SimpleNamespace(output_dir=folder, report_to="none", max_train_steps=10, batch_size=2)
    vars(args).update(changes)
    log = engine.Log(args, engine.World(0, 1, torch.device("cpu")), 0)
    for step in (2, 4):
        for real in (1.0, 2.0):
            with engine.waiting():
                time.sleep(0.01)
            log.add(loss_d=torch.tensor(0.5), logits_real=torch.tensor(real), logits_fake=torch.tensor(-1.0))
        log.write(step, skipped=0)
    return metrics(folder)


def test_log_lines(tmp_path, capsys):
    rows = log(tmp_path)
    said = capsys.readouterr().out.splitlines()
    seconds = [2 * row["s_per_step"] for row in rows]
    assert [row["seconds_left"] for row in rows] == pytest.approx([4 * seconds[0], 1.5 * sum(seconds)])
    for row, line in zip(rows, said, strict=True):
        assert row["logits_gap"] == 2.5 and 0.5 < row["data_wait"] <= 1
        assert "logits_gap 2.5" in line and re.search(r" data_wait [01]\S* .* left 0:00:0\d$", line)


def test_a_closed_terminal_does_not_end_the_training(tmp_path, monkeypatch):
    closed = SimpleNamespace(write=lambda text: 1, flush=lambda: os.write(-1, b""))
    monkeypatch.setattr(sys, "stdout", closed)
    assert len(log(tmp_path)) == 2


def test_report_to_wandb(tmp_path, monkeypatch):
    """wandb is imported only when asked for. It gets the numbers of metrics.jsonl."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    log(tmp_path / ".")
    with pytest.raises(checkpoint.ModelError, match="--report_to wandb: .*wandb.*; run `pip install wandb`"):
        log(tmp_path, report_to="wandb")
    told, settings = [], {}
    (tmp_path / "metrics.jsonl").unlink()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: settings.update(how) or (
        SimpleNamespace(log=lambda values, step: told.append({"step": step, **values})))))
    assert log(tmp_path, report_to="wandb") == told and len(told) == 2
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **how: 1 / 0)              # as without a login
    with pytest.raises(checkpoint.ModelError, match="division by zero; run .* `wandb login`"):
        log(tmp_path, report_to="wandb")
    assert settings["dir"] == str(tmp_path) and settings["config"]["max_train_steps"] == 10


@pytest.mark.parametrize("error, status, line", [
    (checkpoint.ModelError("no such\nfile"), 2, "no such file"),
    (PermissionError(13, "Permission denied", "a.png"), 2, "[Errno 13] Permission denied: 'a.png'"),
    (OSError(28, "No space left on device", "a.png"), 2, "[Errno 28] No space left on device: 'a.png'"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory; buy more"),
    (MemoryError(), 2, "out of memory; buy more"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_errors_of_input_end_in_one_line(capsys, error, status, line):
    with pytest.raises(SystemExit) as stop:
        engine.report_error("buy more", type(error), error, None)
    said = capsys.readouterr().err
    assert stop.value.code == status and said.endswith(f": {line}\n") and said.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_full_stdout_is_one_line_with_its_name(options):
    code = "from support import engine; engine.command_line('x'); print('a line'); print('another')"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, env=clean, stdout=full,
                             stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (
        2, "-c: standard output: cannot be written (No space left on device)\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_a_full_disk_names_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="/metrics.jsonl: cannot be written .No space left on device"):
        log(tmp_path)


def test_no_memory_on_a_cpu_is_one_line(capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2 ** 55)
    with pytest.raises(SystemExit):
        engine.report_error("buy more", caught.type, caught.value, None)
    assert capsys.readouterr().err.endswith(": out of memory; buy more\n")


def test_errors_of_the_code_keep_their_traceback(capsys):
    try:
        torch.zeros(2) @ torch.zeros(3)
    except RuntimeError as error:
        engine.report_error("buy more", type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "torch.zeros(2) @ torch.zeros(3)" in said


def test_every_limit_belongs_to_a_flag():
    """A flag that is misspelt in LIMITS would have no limits."""
    sources = "".join(path.read_text() for folder in (".", "support", "toy", "tools")
                      for path in (ROOT / folder).glob("*.py"))
    assert [flag for flag in engine.LIMITS if f'"--{flag}"' not in sources] == []


@pytest.mark.parametrize("flag, value, ok", [
    ("--learning_rate", "nan", False), ("--learning_rate", "inf", False), ("--learning_rate", "-1e-4", False),
    ("--learning_rate", "1e-4", True), ("--ema_decay", "2", False), ("--ema_decay", "-3", False),
    ("--ema_decay", "0", True), ("--huber_c", "0", False), ("--num_solver_steps", "0", False),
    ("--num_solver_steps", "5", True), ("--seed", str(2 ** 63), False), ("--seed", "-1", False),
    ("--seed", "1e3", False), ("--width", "1000000", False), ("--lora_rank", "1000000000", False),
    ("--guidance", "nan", False), ("--weight_exponent", "-inf", False), ("--batch_size", "0", False)])
def test_flags_have_limits(capsys, flag, value, ok):
    parser = engine.command_line("test")
    parser.add_argument_group("in a group").add_argument(flag)
    if ok:
        number, = vars(parser.parse_args([f"{flag}={value}"])).values()
        assert number == float(value) and type(number).__name__ == engine.LIMITS[flag[2:]].__name__
        return
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([f"{flag}={value}"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and flag in said and said.count("\n") == 1


def test_a_size_that_the_model_cannot_take_is_refused(train):
    assert_refused(train(1, "--width 40 --height 40").wait(), "--width 40 --height 40", "multiples of 16")


def test_a_closed_stderr_does_not_end_a_script(monkeypatch):
    """Progress bars write to it."""
    monkeypatch.setattr(sys, "stderr", None)
    engine.command_line("test")
    print("a progress bar", file=sys.stderr)


@pytest.mark.parametrize("flag", ["--data", "--model", "--stage1"])
def test_empty_values_are_refused(capsys, flag):
    """An empty --data, from an unset shell variable, is not the default."""
    parser = engine.command_line("test")
    parser.add_argument(flag, default="toy")
    assert parser.parse_args([]).__dict__ == {flag[2:]: "toy"}
    with pytest.raises(SystemExit):
        parser.parse_args([flag, ""])
    assert f"{flag} is empty: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("name, error", [
    ("cpu", None), (None, None), ("tpu", "not available here"), ("cuda", "not available here"),
    ("cpu:0", None), ("cpu:1", "use .*cpu$"), ("cuda:9", "not available here"), ("cpu:", "not available")])
def test_devices(name, error):
    if name and name.startswith("cuda") and torch.cuda.is_available():
        name, error = name.replace(":9", ":99"), error and "not available here"
    if error is None or name == "cuda" and torch.cuda.is_available():
        assert engine.choose_device(name).type == (name or engine.choose_device().type).removesuffix(":0")
    else:
        with pytest.raises(checkpoint.ModelError, match=error):
            engine.choose_device(name)


def test_noise_belongs_to_the_clip():
    draw = lambda numbers, seed=3, stream=12: engine.normal(
        seed, torch.tensor(numbers), stream, (4, 5), "cpu")
    noise = draw([7, 8, 9, 1_000_000])
    assert torch.equal(noise, torch.cat((draw([7]), draw([8, 9]), draw([1_000_000]))))
    others = [noise[1:2], draw([7], stream=11), draw([7], seed=4)]
    assert not any(torch.equal(noise[:1], other) for other in others)
    many = draw(list(range(5000)))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02           # 6 standard errors of 100,000


def test_use_weights_ends_even_after_an_error():
    net = torch.nn.Linear(2, 2)
    own, other = net.weight.detach().clone(), torch.zeros(2, 2)
    with pytest.raises(ZeroDivisionError), engine.use_weights({"weight": net.weight}, {"weight": other}):
        assert torch.equal(net.weight, other)
        raise ZeroDivisionError
    assert torch.equal(net.weight, own) and not other.any()


def test_masters_keep_updates_that_bf16_rounds_away():
    net = torch.nn.Linear(1, 1, bias=False).bfloat16()
    net.weight.data.fill_(1.0)
    weights = engine.MasterWeights(net, ["weight"])
    for _ in range(100):                                        # bf16 has no number between 1 and 1 - 2^-8
        net(torch.ones(1, 1).bfloat16()).sum().backward()
        weights.grads_to_masters()
        with torch.no_grad():
            weights.masters["weight"] -= 1e-3 * weights.masters["weight"].grad
        weights.masters["weight"].grad = None
        weights.copy_to_net()
    assert weights.masters["weight"].item() == pytest.approx(0.9, abs=1e-5)
    assert net.weight.dtype == torch.bfloat16 and net.weight.item() == pytest.approx(0.9, abs=2 ** -8)
    assert net.weight.grad is None


def test_gradients_of_micro_batches_add_up_in_fp32():
    """In bf16, 1 + 2^-9 is 1, however often it is added."""
    net = torch.nn.Linear(1, 1, bias=False).bfloat16()
    weights = engine.MasterWeights(net, ["weight"])
    for x in [1.0] + 8 * [2.0 ** -9]:
        net(torch.full((1, 1), x).bfloat16()).sum().backward()
        weights.grads_to_masters()
    assert weights.masters["weight"].grad.item() == 1 + 2 ** -6 and net.weight.grad is None


def two_parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def give_gradients(parameters, scale=1.0):
    for i, p in enumerate(parameters):
        p.grad = scale * torch.linspace(-1, 2 + i, p.numel()).view_as(p)


@pytest.mark.parametrize("scale", [0.01, 10.0])                 # below and above the norm of 1
def test_finite_step_clips_as_torch_does(scale):
    ours, theirs = two_parameters(), two_parameters()
    give_gradients(ours, scale), give_gradients(theirs, scale)
    norm, stepped = engine.finite_step(torch.optim.SGD(ours, lr=0.1), ours, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD(theirs, lr=0.1).step()
    assert stepped and norm == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert a.grad is None


def test_finite_step_keeps_the_memory_format():
    """Weights of convolutions are channels-last on a GPU. Fused Adam needs gradients in the same format."""
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    grad, results = torch.randn_like(weight), []
    for fused in (False, True):
        p = torch.nn.Parameter(weight.clone())
        p.grad = grad.clone()
        engine.finite_step(torch.optim.Adam([p], fused=fused), [p], 1.0)
        results.append(p.detach())
    assert weight.stride() != weight.contiguous().stride() and weight.stride() == results[1].stride()
    torch.testing.assert_close(*results)


def test_restore_keeps_the_memory_format(tmp_path):
    """Fused Adam also needs its moments in the weight's format, but files hold contiguous tensors."""
    grads, results = torch.randn(2, 4, 3, 3, 3), []
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    for resumed in (False, True):
        p = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.Adam([p], fused=True)
        for i, grad in enumerate(grads):
            if i and resumed:
                tensors = checkpoint.collect({}, {"opt": optimizer})
                checkpoint.write_safetensors(tmp_path / "a.safetensors", tensors)
                checkpoint.restore({}, {"opt": optimizer}, load_file(tmp_path / "a.safetensors"))
            p.grad = grad.to(memory_format=torch.channels_last)
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


class Tape:
    """Stands for torch.cuda.CUDAGraph on a CPU. Recording leaves no gradients behind, and a replay does the
    work again with the recorded inputs, and puts the results into the recorded outputs."""

    newest = {}                                     # {id of a recorded output: its latest version}

    def replay(self):
        made = self.function(*[Tape.newest.get(id(x), x) for x in self.inputs])
        for own, new in zip(self.outputs, made):
            if new is not None:
                own.data.copy_(new.data)
                Tape.newest[id(own)] = new


Nested = namedtuple("Nested", "nothing twice")
Batch = namedtuple("Batch", "x nested")


def fake_graphs(patch, parameters):
    """Replaces CUDA graphs by tapes -> the recorder to use in place of engine.cuda_graph. parameters: all
    that may have gradients."""
    @contextmanager
    def recording(tape, *_):
        grads = [p.grad if p.grad is None else p.grad.clone() for p in parameters]
        tapes.append(tape)
        yield
        tapes.pop()
        for p, grad in zip(parameters, grads):
            p.grad = grad if p.grad is None or grad is None else p.grad.copy_(grad)

    def record(function, own_parameters):
        def taped(*inputs):
            outputs = function(*inputs)
            for tape in tapes:
                tape.function, tape.inputs, tape.outputs = function, inputs, outputs
            return outputs
        return cuda_graph(taped, own_parameters)

    tapes, cuda_graph, stream = [], engine.cuda_graph, SimpleNamespace(wait_stream=lambda other: None)
    Tape.newest.clear()
    patch.setattr(engine, "graph_memory", lambda: (stream, None, None))
    for name, stand_in in (("CUDAGraph", Tape), ("graph", recording), ("current_stream", lambda: None),
                           ("set_stream", lambda stream: None)):
        patch.setattr(torch.cuda, name, stand_in)
    return record


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("parts, keep", [(1, True), (3, True), (3, False), (8, False)])
def test_recorded_steps_are_the_same_steps(monkeypatch, device, checkpointed, parts, keep):
    """Two networks as in the scripts: gradients of several micro-batches add up in place. keep: one forward
    pass serves both steps, and each micro-batch has graphs of its own. A micro-batch is a named tuple with
    another one inside. Only the network that a step trains has gradients. Activations are checkpointed as in
    the UNet. On a CPU, tapes stand for the graphs."""
    def play(recorded):
        torch.manual_seed(0)
        net, disc = torch.nn.Linear(4, 4).to(device), torch.nn.Linear(4, 1).to(device)
        everything, calls, seen, places = [*net.parameters(), *disc.parameters()], [], [], []

        def forward(x):
            if not (checkpointed and torch.is_grad_enabled()):
                return net(x)
            return torch_checkpoint.checkpoint(net, x.detach().requires_grad_(), use_reentrant=True,
                                               preserve_rng_state=False)

        def d_step(batch):
            assert batch.nested.nothing is None
            x = batch.nested.twice / 2                  # exact; a comparison with batch.x cannot be recorded
            calls.append("d")
            with torch.set_grad_enabled(keep):
                y = forward(x)
            loss = (disc(y.detach()).square().mean() - x.mean()) / parts
            loss.backward()
            return y if keep else None, loss.detach()

        def g_step(y, batch):
            x = batch.x
            calls.append("g")
            loss = (disc(forward(x) if y is None else y) - x).square().mean() / parts
            loss.backward()
            return None, loss.detach()

        d_steps, g_steps = [d_step] * parts, [g_step] * parts
        with monkeypatch.context() as patch:
            if recorded and device == "cpu":
                patch.setattr(engine, "cuda_graph", fake_graphs(monkeypatch, everything))
            if recorded:
                d_steps = engine.cuda_graphs(d_step, disc.parameters(), parts, shared=not keep)
                g_steps = engine.cuda_graphs(g_step, net.parameters(), parts, shared=not keep)
        for _ in range(8):
            batches, ys = [torch.randn(3, 4).to(device) for _ in range(parts)], [None] * parts
            for mover, other in ((disc, net), (net, disc)):
                disc.requires_grad_(mover is disc)
                for i, x in enumerate(batches):
                    batch = Batch(x, Nested(None, 2 * x))
                    if mover is disc:
                        ys[i], loss = d_steps[i](batch)
                    else:
                        _, loss = g_steps[i](ys[i], batch)
                    seen.append(loss.item())
                assert all(p.grad is None for p in other.parameters())
                places.append(tuple(p.grad.data_ptr() for p in mover.parameters()))
                torch.optim.SGD(mover.parameters(), lr=0.1).step()
                mover.zero_grad(set_to_none=True)
        return seen, len(calls), len(set(places))

    stream = torch.cuda.current_stream() if device == "cuda" else None
    try:
        plain, all_calls, _ = play(recorded=False)
        recorded, calls, places = play(recorded=True)
    finally:
        if stream:
            torch.cuda.set_stream(stream)
    assert recorded == plain and len(set(plain)) == len(plain) == all_calls == 16 * parts
    assert places == 2                              # the gradients of either network never move
    assert device == "cpu" or calls == 2 * 4 * (parts if keep else 1)


def test_one_power_iteration_per_step():
    """It is the one that a forward pass in train mode does, and leaves the frozen networks as they are."""
    disc = torch.nn.ModuleDict({"a": torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 5, 1)),
                                "b": torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 2))})
    other = copy.deepcopy(disc)
    weights = [layer.train().weight.clone() for layer in other.values()]
    engine.power_iteration(disc)
    assert not disc["a"].training and equal(disc.state_dict(), other.state_dict())
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(disc.values(), weights))
    assert equal(disc.state_dict(), other.state_dict())             # computing a weight in eval mode: none


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_finite_step_refuses(bad):
    parameters = two_parameters()
    optimizer = torch.optim.Adam(parameters)
    give_gradients(parameters)
    engine.finite_step(optimizer, parameters, 1.0)
    weights, moments = [p.detach().clone() for p in parameters], checkpoint.collect({}, {"opt": optimizer})
    moments = {key: value.clone() for key, value in moments.items()}
    give_gradients(parameters)
    parameters[1].grad[2] = bad
    _, stepped = engine.finite_step(optimizer, parameters, 1.0)
    assert not stepped and all(p.grad is None for p in parameters)
    assert all(torch.equal(a, b) for a, b in zip(weights, parameters))
    assert equal(moments, checkpoint.collect({}, {"opt": optimizer}))


def test_optimizer_on_and_off_the_disk(tmp_path):
    ours, theirs = two_parameters(), two_parameters()
    a, b = torch.optim.Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    give_gradients(ours)
    engine.finite_step(a, ours, 1.0)
    saved = checkpoint.collect({}, {"opt": a})
    checkpoint.write_safetensors(tmp_path / "a.safetensors", saved)
    checkpoint.restore({}, {"opt": b}, load_file(tmp_path / "a.safetensors"))
    assert len(saved) == 6 and equal(saved, checkpoint.collect({}, {"opt": b}))
    for p, q in zip(ours, theirs):
        q.data.copy_(p)
    for optimizer, parameters in ((a, ours), (b, theirs)):
        give_gradients(parameters, -0.3)
        engine.finite_step(optimizer, parameters, 1.0)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))


@pytest.mark.parametrize("decay_steps, expected", [
    (None, [2, 4, 6, 8, 8, 8, 8]), (4, [2, 3.414, 3, 1.172, 0, 0, 0])])
def test_learning_rate_schedule(decay_steps, expected):
    """Warm-up alone, and multiplied by half a cosine: 1, 0.854, 0.5, 0.146 and 0 at quarters of the steps."""
    optimizer = torch.optim.SGD(two_parameters(), lr=1.0)
    rates = []
    for step in range(7):
        engine.set_learning_rate(optimizer, 8.0, step, 4, decay_steps)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, abs=1e-3)


def test_checkpoints_keep_the_last(tmp_path, capsys):
    config = {"lr": 0.1}
    assert checkpoint.load_checkpoint(tmp_path, "latest", config) == 0
    for step in (3, 6, 9, 12):
        checkpoint.save_checkpoint(tmp_path, step, {"x": torch.full((2,), step)}, config, keep=3)
    assert checkpoints(tmp_path) == [6, 9, 12]
    tensors = {}
    step = checkpoint.load_checkpoint(tmp_path, "latest", config, restore=tensors.update)
    assert step == 12 and tensors["x"].tolist() == [12, 12]
    (tmp_path / "checkpoint-0000012" / "state.json").unlink()
    assert checkpoint.load_checkpoint(tmp_path, "latest", config) == 9
    assert "checkpoint-0000012 is incomplete and skipped" in capsys.readouterr().err
    assert checkpoint.load_checkpoint(tmp_path, str(tmp_path / "checkpoint-0000006"), config) == 6
    with pytest.raises(checkpoint.ModelError, match="not a complete checkpoint"):
        checkpoint.load_checkpoint(tmp_path, str(tmp_path / "checkpoint-0000012"), config)
    with pytest.raises(checkpoint.ModelError, match="lr was 0.1, is 0.2"):
        checkpoint.load_checkpoint(tmp_path, "latest", {"lr": 0.2})
    assert checkpoint.load_checkpoint(tmp_path, "none", config) == 0
    checkpoint.rewind(tmp_path, 6)
    checkpoint.save_checkpoint(tmp_path, 7, {"x": torch.zeros(2)}, config, keep=3)
    assert checkpoints(tmp_path) == [6, 7]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("which", ["latest", "path"])
def test_a_checkpoint_that_cannot_be_read_is_no_incomplete_one(tmp_path, name, which, capsys):
    """Its files may be intact, so it is not skipped. A link to itself fails to open, for root as well."""
    for step in (3, 6):
        checkpoint.save_checkpoint(tmp_path, step, {"x": torch.zeros(2)}, {}, keep=3)
    file = tmp_path / "checkpoint-0000006" / name
    content = file.read_bytes()
    file.unlink()
    file.symlink_to(file)
    which = str(file.parent) if which == "path" else which
    with pytest.raises(OSError, match=f"symbolic links: .*{name}"):
        checkpoint.load_checkpoint(tmp_path, which, {})
    file.unlink()
    file.write_bytes(content)
    assert checkpoint.load_checkpoint(tmp_path, which, {}) == 6
    file.write_bytes(content[:len(content) // 2])
    assert which != "latest" or checkpoint.load_checkpoint(tmp_path, which, {}) == 3     # read, and broken
    assert checkpoint.load_checkpoint(tmp_path / "nowhere", "latest", {}) == 0


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, 3, {"x": torch.zeros(2)}, {}, keep=3)
    with no_free_handle(), pytest.raises(OSError, match="Too many open files"):
        checkpoint.load_checkpoint(tmp_path, "latest", {})

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch, pytest.raises(PermissionError, match=str(tmp_path)):
        patch.setattr(os, "listdir", refuse)
        patch.setattr(os, "scandir", refuse)
        checkpoint.load_checkpoint(tmp_path, "latest", {})
    assert checkpoint.load_checkpoint(tmp_path, "latest", {}) == 3


def test_rewind_replaces_the_metrics_whole(tmp_path, monkeypatch):
    file, write = tmp_path / "metrics.jsonl", Path.write_text
    rows = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 7))
    file.write_text(rows + '{"step": 7, "lo')

    def write_half(path, text):
        write(path, text[:len(text) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(Path, "write_text", write_half)
        checkpoint.rewind(tmp_path, 4)
    assert file.read_text().startswith(rows)
    checkpoint.rewind(tmp_path, 4)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4] and list(tmp_path.iterdir()) == [file]


def test_rewind_keeps_other_files(tmp_path):
    for name in ("checkpoint-0000004", "checkpoint-0000005", "checkpoint-0000012", "checkpoint-best",
                 "merged"):
        (tmp_path / name).mkdir()
    checkpoint.rewind(tmp_path, 4)                                                      # no metrics.jsonl yet
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-0000004", "checkpoint-best", "merged"]


def test_restarted_by_torchrun(tmp_path):
    checkpoint.save_checkpoint(tmp_path / "elsewhere", 3, {"x": torch.zeros(2)}, {}, keep=3)
    path, here = tmp_path / "elsewhere" / "checkpoint-0000003", tmp_path / "here"
    here.mkdir()
    load = lambda which: checkpoint.load_checkpoint(here, which, {}, restarted=True)
    assert load("none") == 0 and load(str(path)) == 3                         # nothing saved here
    checkpoint.save_checkpoint(here, 5, {"x": torch.zeros(2)}, {}, keep=3)
    assert load("none") == load(str(path)) == 5


def test_checkpoint_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    events, flush, replace = [], os.fsync, os.replace
    name = lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(name(handle)), flush(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"-> {Path(b).name}"), replace(a, b)))
    checkpoint.save_checkpoint(tmp_path, 3, {"x": torch.zeros(2)}, {}, keep=3)
    named = [re.sub(r"\.[0-9a-f]{8}\.part$", ".part", event) for event in events]
    assert named == [".state.safetensors.part", "-> state.safetensors", ".state.json.part", "-> state.json",
                     ".checkpoint-0000003.part", "-> checkpoint-0000003", tmp_path.name]
