"""evaluate.py: the distance against scipy, its interval, figures of known clips, the fvd command.
tools/: tables.py, pages.py, plot.py, and the networks of bench.py."""
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from einops import rearrange
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

import data
import evaluate
import model
import sampler
import solver
from support import checkpoint
from support.checkpoint import ModelError
from support.media import to_bytes
from tools import bench, export, pages, plot, tables
from toy import world

TOY_I3D = sampler.TOY / "i3d"


def test_distance_is_the_formula_with_scipys_square_root():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    real = torch.randn(300, 12, generator=generator, dtype=torch.float64) @ mix
    fake = torch.randn(300, 12, generator=generator, dtype=torch.float64) * 1.3 + 0.2
    cov_real, cov_fake = np.cov(real.numpy().T), np.cov(fake.numpy().T)
    root = scipy.linalg.sqrtm(cov_real @ cov_fake)
    shift = (real.mean(0) - fake.mean(0)).square().sum().item()
    expected = shift + np.trace(cov_real) + np.trace(cov_fake) - 2 * np.trace(root).real
    assert evaluate.frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shared", [0.0, 3.0])
def test_interval_covers_what_other_draws_give(shared):
    """Also if real and generated clips share a first frame, which then causes most of the variance."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        picture, real, fake = torch.randn(3, 400, 3, generator=generator)
        return shared * picture + real, shared * picture + fake + 1

    distances = torch.tensor([evaluate.frechet_distance(*draw()) for _ in range(100)])
    distance = lambda values: {"fvd": evaluate.frechet_distance(values["real"], values["fake"])}
    draws = evaluate.bootstrap(distance, dict(zip(("real", "fake"), draw())), rounds=200)["fvd"]
    assert evaluate.half_width(draws) == pytest.approx(1.96 * distances.std().item(), rel=0.4)


def test_distance_grows_with_blur_noise_and_shuffling():
    """With the shipped detector, the distance grows with the damage, and is 0 without any."""
    clips = world.toy_clips(3 + data.HELD_OUT, torch.arange(8)).frames                       # b f c h w
    detector = evaluate.load_detector(TOY_I3D)
    features = evaluate.video_features(detector, clips)
    distance = lambda x: evaluate.frechet_distance(features, evaluate.video_features(detector, x))
    # With fewer clips than features some eigenvalues are 0 up to rounding; their roots are around 1e-8.
    assert distance(clips) == pytest.approx(0, abs=1e-6 * features.var(dim=0).sum().item())

    def blurred(k):
        frames = F.avg_pool2d(clips.flatten(0, 1), k, 1, k // 2)                            # (b f) c h w
        return rearrange(frames, "(b f) c h w -> b f c h w", f=clips.shape[1])

    def shuffled(n):                                                            # permutes the first n frames
        return torch.cat((clips[:, torch.randperm(n)], clips[:, n:]), dim=1)

    noise = torch.randn_like(clips)
    for worse in ([blurred(3), blurred(9)], [clips + 0.05 * noise, clips + 0.4 * noise],
                  [shuffled(4), shuffled(14)]):
        distances = [distance(x) for x in worse]
        assert 0 < distances[0] and distances == sorted(distances), distances


@pytest.fixture(scope="module")
def small(pipeline_folder, tmp_path_factory):
    """A random pipeline with a small detector for the toy world at 64x64, and its UNet."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(pipeline_folder, folder, dirs_exist_ok=True)
    detector = evaluate.VideoClassifier(world.NUM_ATTRIBUTES, channels=(8, 8, 16, 16), size=64)
    checkpoint.save_network(detector, folder / "i3d")
    return folder, model.load_unet(folder)


@pytest.fixture
def command(python):
    def command(*flags):
        run = [python, "evaluate.py", *map(str, flags), "--device", "cpu"]
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    return command


def test_fvd_of_one_way_of_sampling(command, small, tmp_path):
    folder, unet = small
    report = tmp_path / "fvd.json"
    run = command("fvd", "--model", folder, "--student", folder / "unet", "--sampler", "tts",
                  "--num_clips", 4, "--width", 64, "--height", 64, "--report", report)
    assert run.returncode == 0, run.stderr
    assert f"4 clips are too few for {world.NUM_ATTRIBUTES} features" in run.stderr
    result = json.loads(report.read_text())
    assert result["protocol"] == json.loads(run.stdout.split("protocol: ")[1].splitlines()[0])
    assert set(result["protocol"]) == {
        "detector", "detector_sha256", "data", "clips", "frames", "fps", "size", "seed", "world", "guidance"}
    assert result["protocol"]["world"] == evaluate.UNSEEN
    row, = result["rows"]
    assert row["nfe"] == 2 and row["steps"] == 1 and np.isfinite(
        [row[key] for key in ("fvd", "interval", "sharpness", "diversity", "first_psnr", "motion", "bad",
                              "bad_interval")]).all()
    assert row["bad"] == int(row["bad_clips"], 16).bit_count() / 4
    assert row["bad"] >= max(row[name] for name in ("parts", "size", "kind", "colour"))
    assert report.with_suffix(".jpg").stat().st_size > 0


def test_a_detector_that_cannot_be_loaded_is_one_line(command, small):
    bad = command("fvd", "--model", small[0], "--detector", "nowhere.pt")
    assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1, bad.stderr
    assert "nowhere.pt: cannot be loaded as a detector" in bad.stderr


class OtherArguments(nn.Module):
    def forward(self, x):
        return x.mean(dim=[2, 3, 4])


class Pair(nn.Module):
    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = True):
        return x.mean(dim=[2, 3, 4]), x


class OneColumnMore(nn.Module):
    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = True):
        return x.mean(dim=[2, 3, 4])[:, :, None]


class OneForAllClips(nn.Module):
    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = True):
        return x.mean(dim=[0, 2, 3, 4])[None]


class NotFinite(nn.Module):
    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = True):
        return x.mean(dim=[2, 3, 4]) / 0


@pytest.mark.parametrize("kind, message", [
    ("hub", "Hub"), ("shape", "config.json asks for"), ("pipe", "not a file"), ("text", ""),
    (OtherArguments, "received 5 argument"), (Pair, "tuple"), (OneColumnMore, r"\(2, 3, 1\), not"),
    (OneForAllClips, r"\(1, 3\), not"), (NotFinite, "not finite")])
def test_detectors_that_are_none(kind, message, tmp_path, monkeypatch):
    """Refused before the clips are read: missing ones, broken ones, and those that compute something else."""
    monkeypatch.chdir(tmp_path)
    if kind == "shape":
        checkpoint.save_network(evaluate.VideoClassifier(5, (8, 8, 16, 16), size=64), tmp_path / kind)
        config = json.loads((tmp_path / "shape/config.json").read_text())
        (tmp_path / "shape/config.json").write_text(json.dumps(config | {"num_classes": 6}))
    elif kind == "pipe":
        os.mkfifo(kind)
    elif kind == "text":
        Path(kind).write_text("no network")
    elif kind != "hub":
        torch.jit.script(kind()).save("detector.pt")
    detector = {"hub": "i3d"}.get(kind, kind if isinstance(kind, str) else "detector.pt")
    with pytest.raises(ModelError, match=rf"(?s){detector}: cannot be loaded as a detector .*{message}"):
        evaluate.load_detector(detector)


@pytest.mark.parametrize("flags, message", [
    ("--data EMPTY", "no videos in it"),
    ("--width 128", "the toy world is square, not 128x64"), ("--device cuda:99", "--device cuda:99: "),
    ("--device gpu", "--device gpu: not available here"),
    ("--report MODEL/unet", "cannot be written"), ("--report .", "it is a folder"),
    ("--report /", "it is a folder"), ("--report a_file/fvd.json", "cannot be written"),
    ("--report fvd.jpg", "would overwrite"),                    # the picture beside it has the same name
    ("--data list.csv --report link.json", "would overwrite list.csv"),
    ("--student MODEL/unet --report MODEL/unet/diffusion_pytorch_model.safetensors", "would overwrite")])
def test_bad_flags_are_refused_before_anything_is_measured(flags, message, small, tmp_path, monkeypatch):
    """Also a --report that cannot be written, or would be written over what is read."""
    folder, _ = small
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    Path("a_file").write_text("earlier")
    Path("list.csv").write_text("path\nmissing.mp4\n")
    os.link("list.csv", "link.json")
    before = {path: path.read_bytes() for path in (*tmp_path.rglob("*.*"), *folder.rglob("*.*"))}
    words = [word.replace("MODEL", str(folder)) for word in flags.split()]
    args = evaluate.parse_args(["fvd", "--model", str(folder), "--num_clips", "2", "--height", "64", *words])
    monkeypatch.setattr(evaluate, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises((ModelError, OSError), match=message):
        args.width = args.width or 64
        evaluate.Report(args).add("teacher", "1", 0, 0, 0, None)
    after = {path: path.read_bytes() for path in (*tmp_path.rglob("*.*"), *folder.rglob("*.*"))}
    assert after == before


@pytest.mark.parametrize("flags", ["--batch_size 0", "--width 0", "--height nan", "--guidance nan 3",
                                   "--guidance 1 inf", "--seed -1", "--num_clips x"])
def test_numbers_out_of_range(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args(["fvd", *flags.split()])
    said = capsys.readouterr().err
    assert flags.split()[0] in said and len(said.splitlines()) == 1


def test_a_size_becomes_one_that_the_model_has(small, capsys):
    args = evaluate.parse_args(["fvd", "--model", str(small[0]), "--device", "cpu", "--num_clips", "2",
                                "--width", "33", "--height", "33"])
    report = evaluate.Report(args)
    assert report.shape == (4, 32, 32) and report.protocol["size"] == [32, 32]
    assert "size 33x33 becomes 32x32" in capsys.readouterr().err


def test_fvd_resumes_the_rows_of_the_same_student(small, tmp_path, monkeypatch, capsys):
    """The row that is asked for is measured again, because another student may be at its path."""
    folder, unet = small
    student, report = tmp_path / "unet", tmp_path / "fvd.json"
    figures = {"fvd": 1.0, "interval": 0.1, "intervals": {}}
    measured, picture = [], report.with_suffix(".jpg")

    def measure(*_):
        measured.append(1)
        return torch.zeros(2, 4, 3, 64, 64, dtype=torch.uint8), figures

    monkeypatch.setattr(evaluate, "measure", measure)
    words = ["evaluate.py", "fvd", "--model", folder, "--student", student, "--num_clips", 2, "--width", 64,
             "--height", 64, "--device", "cpu", "--report", report, "--resume"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    model.save_unet(unet, student)
    evaluate.main()
    figures["fvd"] = 2.0
    evaluate.main()
    row, = json.loads(report.read_text())["rows"]
    assert len(measured) == 2 and row["fvd"] == 2.0             # the student may have changed: measured again
    assert f"{report}, which new pictures do not show: {student} 1 0;\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--sampler", "2"])
    evaluate.main()
    row, other = json.loads(report.read_text())["rows"]
    assert (row["sampler"], other["sampler"]) == ("1", "2") and picture.exists()
    content = json.loads(report.read_text())
    checkpoint.write_json(report, content | {"rows": [{k: row[k] for k in row if k != "intervals"}]})
    with pytest.raises(ModelError, match="not the rows of a report .intervals is None"):
        evaluate.main()


def test_a_missing_student_is_reported_before_clips_are_measured(small, monkeypatch):
    monkeypatch.setattr(evaluate, "open_reference", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "fvd", "--model", str(small[0]), "--device", "cpu",
                                      "--student", "nowhere", "--width", "64", "--height", "64"])
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        evaluate.main()


def test_networks_that_return_nan(small):
    """Frames of 8 bits would hide it: NaN becomes black."""
    folder, unet = small
    reference = SimpleNamespace(cond=model.Cond(*torch.zeros(3, 2)))
    draw = lambda net, cond, generator: torch.full((2, 4, 4, 8, 8), torch.nan)
    with pytest.raises(ModelError, match="NaN or infinity"):
        evaluate.generate_clips(draw, unet, model.load_vae(folder), reference, torch.arange(2), 0)


ROW = {"run": "teacher", "sampler": "1", "seed": 0, "steps": 1, "nfe": 2, "fvd": 1.0}
REPORT = {"command": "python evaluate.py", "date": "today", "device": "cpu", "protocol": {}, "rows": [ROW]}


@pytest.mark.parametrize("text", [
    "", "[]", "7", "null", json.dumps(REPORT)[:-20], "[" * 100_000, "\0" * 20,
    *(json.dumps(REPORT | change) for change in (
        {"rows": {}}, {"rows": [7]}, {"rows": [[ROW]]}, {"rows": [{}]}, {"rows": [ROW | {"run": []}]},
        {"rows": [ROW | {"seed": "0"}]}, {"protocol": None}))])
def test_reports_that_are_none(text, tmp_path):
    (tmp_path / "fvd.json").write_text(text)
    with pytest.raises(ModelError, match="fvd.json: "):
        evaluate.read_report(tmp_path / "fvd.json")
    (tmp_path / "fvd.json").write_text(json.dumps(REPORT))
    assert evaluate.read_report(tmp_path / "fvd.json", fvd=float) == REPORT
    with pytest.raises(ModelError, match="motion"):
        evaluate.read_report(tmp_path / "fvd.json", motion=float)


def test_real_clips_come_from_videos(small, tmp_path, monkeypatch):
    """With --data VIDEOS the reference has no toy figures, and all others are measured."""
    folder, unet = small
    videos = torch.randint(256, (3, 4, 64, 64, 3), dtype=torch.uint8)                       # b f H W c
    monkeypatch.setattr(data, "open_files", lambda path: [path])
    monkeypatch.setattr(data, "Clips", lambda files, *shape: SimpleNamespace(take=lambda i: videos[i]))
    args = evaluate.parse_args(["fvd", "--num_clips", "3", "--data", "videos"])
    vae, image_encoder = model.load_vae(folder), model.load_image_encoder(folder)
    detector, device = evaluate.load_detector(folder / "i3d"), torch.device("cpu")
    reference = evaluate.open_reference(args, vae, image_encoder, detector, 4, 64, 64, device)
    assert reference.moved is None and reference.scene is None
    assert torch.equal(reference.ends, rearrange(videos[:, [0, -1]], "b f h w c -> b f c h w"))
    assert reference.cond.time_ids[:, 1].eq(127).all()
    draw = evaluate.parse_sampler("1", False, None)[2]
    generate = partial(evaluate.generate_clips, draw, unet, vae, reference)
    _, figures = evaluate.measure(generate, detector, reference)
    assert {"fvd", "sharpness", "diversity", "first_psnr"} <= figures.keys()
    assert not {"motion", "bad"} & figures.keys()


def test_figures_do_not_depend_on_the_batch(small):
    folder, unet = small
    vae, image_encoder = model.load_vae(folder), model.load_image_encoder(folder)
    detector = evaluate.load_detector(folder / "i3d")
    args = evaluate.parse_args(["fvd", "--num_clips", "3", "--batch_size", "2"])
    frames = []
    reference = evaluate.open_reference(
        args, vae, image_encoder, detector, 4, 64, 64, torch.device("cpu"))
    draw = evaluate.parse_sampler("2", False, None)[2]
    generate = partial(evaluate.generate_clips, draw, unet, vae, reference)
    for batch_size in (2, 3):
        x, figures = evaluate.measure(generate, detector, reference, batch_size=batch_size)
        frames.append(x.float())
    assert (frames[0] - frames[1]).abs().max() <= 1                         # one unit of 8 bits: rounding
    perfect = reference._replace(features=evaluate.video_features(detector, x), ends=x[:, [0, -1]])
    _, figures = evaluate.measure(generate, detector, perfect)
    assert figures["fvd"] == pytest.approx(0, abs=1e-3) and figures["sharpness"] == pytest.approx(1, abs=1e-3)
    assert figures["first_psnr"] > 50 and figures["diversity"] > 0 and figures["motion"] >= 0


def test_samplers_by_name(small):
    """Each name draws what the function of that name draws, with the stated number of evaluations."""
    folder, unet = small
    calls = []
    counted = lambda x, *rest: calls.append(len(x)) or unet(x, *rest)
    cond = model.Cond(torch.randn(2, 1, 24), torch.randn(2, 4, 4, 8, 8), torch.ones(2, 3))
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(2)]
    sigmas = solver.karras_sigmas(solver.NUM_SIGMAS)
    results = {}
    for name in ("1", "4", "tts", "tts printed", "tts v1", "1 cfg 1.5", "8 teacher", "8 karras teacher"):
        calls.clear()
        steps, nfe, draw = evaluate.parse_sampler(
            name.removesuffix(" teacher"), "teacher" in name, (1.0, 3.0))
        results[name] = draw(counted, cond, generator=generators())
        assert sum(calls) == 2 * nfe, name                                  # two clips
    torch.testing.assert_close(
        results["4"], sampler.sample(unet, cond, solver.strided(sigmas, 4), generators()))
    torch.testing.assert_close(
        results["tts"], sampler.sample(unet, cond, solver.strided(sigmas, 2), generators(), tts=True))
    torch.testing.assert_close(results["8 teacher"], sampler.sample_teacher(
        unet, cond, solver.strided(sigmas, 8), generators(), (1.0, 3.0)))
    torch.testing.assert_close(results["8 karras teacher"], sampler.sample_teacher(
        unet, cond, solver.karras_sigmas(8), generators(), (1.0, 3.0)))
    assert len({tuple(x.flatten()[:4].tolist()) for x in results.values()}) == len(results)


def test_tables_train_what_is_missing_and_resume(small, python, tmp_path, monkeypatch, capsys):
    """Two seeds of a student train, from any working directory, when their first rows are due. --resume keeps
    the rows of a report that has the same protocol."""
    folder, _ = small
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28,
                             patch_size=14)).save_pretrained(folder / "dinov2")
    monkeypatch.setattr(tables, "RUNS", {"quick": (None, "--adv_weight 0 --num_solver_steps 1")})
    monkeypatch.setattr(tables, "TABLE1", [
        tables.FLOOR, ("teacher", "1", 9.0), ("quick", "1", 8.0), ("quick", "tts", None)])
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.chdir(tmp_path)                                             # --work below is relative
    report = tmp_path / "table1.json"
    events, trained, measure = [], tables.trained, evaluate.measure
    monkeypatch.setattr(tables, "trained", lambda *args: (trained(*args), events.append("trained"))[0])
    monkeypatch.setattr(evaluate, "measure", lambda *args: (events.append("measured"), measure(*args))[1])
    stage2 = ("--preset toy_cpu --max_train_steps 2 --batch_size 1 --num_clips 2 --width 32 --height 32 "
              "--log_steps 1 --lora_rank 4 --validation_teacher_steps 1")
    settings = {"model": folder, "device": "cpu", "width": 64, "height": 64, "work": "work",
                "report": report, "stage2": stage2}

    def table1(*flags):
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["tables.py", "table1", *words, *map(str, flags)])
        tables.main()
        return json.loads(report.read_text())["rows"]

    rows = table1("--num_clips", 3)
    assert [(row["run"], row["sampler"], row["seed"]) for row in rows] == [
        ("real", "other futures", 0), ("teacher", "1", 0),
        *(("quick", name, seed) for name in ("1", "tts") for seed in (0, 1))]
    assert events == [*["measured"] * 2, *["trained", "measured"] * 4]      # trained: or found
    assert rows[0]["nfe"] == 0 and rows[2]["fvd"] != rows[3]["fvd"]
    assert rows[2]["training_seconds"] > 0 and rows[1]["training_seconds"] is None
    assert all(len(row["fvd_draws"]) == 40 for row in rows)
    assert len(list((tmp_path / "work").iterdir())) == 2
    earlier = json.loads(report.read_text())
    checkpoint.write_json(report, earlier | {"rows": rows[:-1]})
    capsys.readouterr()
    *same, last = table1("--num_clips", 3, "--resume")
    assert same == rows[:-1] and last["fvd"] == rows[-1]["fvd"]
    stage, = {path.parent for path in (tmp_path / "work").glob("*/metrics.jsonl")
              if f'"seed": {last["seed"]},' in next(path.parent.glob("checkpoint-*/state.json")).read_text()}
    pace = [json.loads(line)["s_per_step"] for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert last["training_seconds"] == rows[-1]["training_seconds"] == 2 * pace[1]          # 2 steps
    said = capsys.readouterr().out
    assert said.count("NFE") == 1 and "train_stage" not in said             # both students exist
    with pytest.raises(ModelError, match=f"{report} has another protocol: clips was 3, is 4"):
        table1("--num_clips", 4, "--resume")
    assert json.loads(report.read_text())["rows"] == [*same, last]
    checkpoint.write_json(report, earlier | {"protocol": {}})
    with pytest.raises(ModelError, match=f"{report} has another protocol: detector was None, is i3d"):
        table1("--num_clips", 3, "--resume")
    assert all(f"-{earlier['protocol']['sources']}-{earlier['protocol']['teacher_sha256']}" in path.name
               for path in (tmp_path / "work").iterdir())


def test_training_time_is_that_of_the_fastest_interval(tmp_path, monkeypatch):
    """The seconds of both stages, of steps that are no multiple of the interval, although another training
    and a resume slowed some intervals down. The first interval does not count."""
    monkeypatch.setattr(tables, "RUNS", {"quick": ("--a 1", "--b 2")})
    args = SimpleNamespace(stage1="", stage2="", model="m", work=tmp_path, device="cpu")
    protocol = {"sources": "s", "teacher_sha256": "t"}
    paces = {1: [0.01, 0.2, 0.1, 0.3], 2: [5.0, 0.5, 0.4]}

    def train(command):
        folder, stage = Path(command[command.index("--output_dir") + 1]), int(command[1].name[11])
        checkpoint.write_json(folder / "merged/config.json", {})
        for step in (100, 110 * stage):
            (folder / f"checkpoint-{step:07}").mkdir()
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps({"step": 25 * i, "s_per_step": pace}) + "\n" for i, pace in enumerate(paces[stage])))

    monkeypatch.setattr(tables.subprocess, "call", train)
    folder, seconds = tables.trained("quick", 0, args, protocol)
    assert seconds == pytest.approx(110 * 0.1 + 220 * 0.4) and folder.parent.parent == tmp_path
    monkeypatch.setattr(tables.subprocess, "call", lambda _: pytest.fail("trained again"))
    assert tables.trained("quick", 0, args, protocol) == (folder, seconds)


@pytest.mark.parametrize("status", ["true", "false"])
def test_a_training_that_fails_or_is_stopped_ends_the_table(status, tmp_path, monkeypatch):
    """A trainer that gets a SIGTERM ends early with exit status 0."""
    monkeypatch.setattr(tables, "RUNS", {"quick": ("", "")})
    monkeypatch.setattr(tables.subprocess, "call", lambda _: subprocess.run(status).returncode)
    args = SimpleNamespace(stage1="", stage2="", model="m", work=tmp_path, device="cpu")
    message = "^quick: training failed or was stopped, .*; run the same command again$"
    with pytest.raises(ModelError, match=message):
        tables.trained("quick", 0, args, {"sources": "s", "teacher_sha256": "t"})


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_patch_of_the_page_fits_the_code(tmp_path):
    """Its changes are off by default: the flags of "osv" stay, and it only adds rows to tables."""
    for folder in ("support", "tools", "toy"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    run = partial(subprocess.run, cwd=tmp_path, text=True, capture_output=True,
                  env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
    done = run(["git", "apply", ROOT / "results/one_step.patch"])
    assert done.returncode == 0, done.stderr
    code = "from tools.tables import *; print(*(RUNS[run] for run in CHANGES), sep=';')"
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    runs = done.stdout.strip().split(";")
    assert len(runs) == 9 and runs[0] == "('', '')" and "('--relativistic', '--relativistic')" in runs


def test_sigterm_to_the_tables_ends_the_training(tmp_path, monkeypatch):
    """A trainer that went on alone would lock its folder."""
    monkeypatch.setattr(tables, "RUNS", {"quick": ("", "")})
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "train_stage1.py").write_text(
        "import os, signal, time\ntime.sleep(0.5)       # until the parent is past Popen\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n")
    children, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args: children.append(popen(*args)) or children[0])
    monkeypatch.setattr(tables, "Report", lambda *_, **__: SimpleNamespace(
        protocol={"sources": "s", "teacher_sha256": "t"}, rows={}, shape=(4, 64, 64)))
    monkeypatch.setattr(tables, "fingerprints", lambda _: {})
    monkeypatch.setattr(tables, "TABLE1", [("quick", "1", None)])
    monkeypatch.setattr(sys, "argv", ["tables.py", "table1", "--model", "m", "--device", "cpu"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            tables.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert children[0].wait(10) == -signal.SIGKILL


def test_bad_clips_by_speed_are_those_of_the_report(python, tmp_path):
    """Split by speed and kind, the bad clips of results/student.json are as many as in the report."""
    cli = lambda *words: subprocess.run([python, "exercises/by_speed.py", *map(str, words)], cwd=ROOT,
                                        capture_output=True, text=True)
    done = cli("--out", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "plot.json").read_text())["rows"]
    assert rows == json.loads((ROOT / "results/by_speed.json").read_text())["rows"]
    for row in json.loads((ROOT / "results/student.json").read_text())["rows"]:
        name = {("teacher", "25"): "teacher, 25 steps", ("shipped", "1"): "one step"}.get(
            (row["run"], row["sampler"]))
        if name:
            assert sum(part[name] * part["clips"] for part in rows) == pytest.approx(2048 * row["bad"])
    no_student = cli("--report", "results/table1.json", "--out", tmp_path / "b.png")
    assert no_student.returncode == 2 and "it lacks the rows [('shipped', '1')" in no_student.stderr


def test_bad_clips_by_speed_of_other_reports(python, tmp_path):
    """The figures beside the plot never replace the report, whatever its name. Few clips leave groups empty,
    which have no share."""
    report, cli = tmp_path / "student.json", [python, "exercises/by_speed.py", "--report"]
    shipped = checkpoint.read_json(ROOT / "results/student.json")
    checkpoint.write_json(report, shipped | {"protocol": shipped["protocol"] | {"clips": 3}})
    before = report.read_bytes()
    for out, says in (("student", f"would overwrite {report}"), ("plot", "its 3 clips are too few")):
        done = subprocess.run([*cli, report, "--out", tmp_path / f"{out}.png"], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert report.read_bytes() == before and os.listdir(tmp_path) == ["student.json"]


@pytest.mark.parametrize("words, says", [
    ("between.py --out FILE/a.png", "FILE/a.png: cannot be written"),
    ("guidance.py --out FILE/a.png", "FILE/a.png: cannot be written"),
    ("capstone.py --output_dir FILE", "FILE/capstone.png: cannot be written"),
    ("heads.py --report FILE/a.json", "FILE/a.json: cannot be written"),
    ("heads.py --learning_rate nan", "nan is not between 0.0 and 1.0"),
    ("heads.py --device cuda:7", "--device cuda:7: ")])
def test_exercises_that_draw_refuse_bad_flags_at_once(python, tmp_path, words, says):
    """Before minutes of work, and before the first line of their output."""
    (tmp_path / "file").touch()
    put = lambda text: text.replace("FILE", f"{tmp_path}/file")
    done = subprocess.run([python, *f"exercises/{put(words)}".split()], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == "" and put(says) in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and os.listdir(tmp_path) == ["file"]


def test_fingerprints_change_with_the_code_and_the_teacher(small, tmp_path, monkeypatch):
    """Not with a file that training does not run."""
    for name in ("train_stage1.py", "support/engine.py", "toy/world.py", "toy/shapes.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    found = [tables.fingerprints(small[0])]
    for name in ("toy/shapes.py", "toy/world.py", "support/engine.py"):
        (tmp_path / name).write_text("2")
        found.append(tables.fingerprints(small[0]))
    sources = [row["sources"] for row in found]
    assert sources[0] == sources[1] and len(set(sources)) == 3
    other = tables.fingerprints(sampler.TOY)["teacher_sha256"]
    assert other != found[0]["teacher_sha256"] and len(other) == 8


@pytest.mark.parametrize("name", ["soon", "0", "100", "tts v3", "1 cfg", "2 1.5", "8 karras 8", "karras"])
def test_unknown_samplers(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args(["fvd", "--sampler", name])
    assert f'--sampler {name}: write 8 or 8 karras' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tts", "tts printed", "tts v1", "1 cfg 1.5"])
def test_samplers_of_students_need_a_student(name, capsys):
    """A teacher has steps only: it would ignore the rest of the name."""
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args(["fvd", "--sampler", name])
    line, = capsys.readouterr().err.splitlines()
    assert f"--sampler {name}: write 8 or 8 karras; for a --student 8, 8 cfg 1.5 or tts" in line
    assert evaluate.parse_args(["fvd", "--sampler", name, "--student", "out"]).sampler == name
    assert evaluate.parse_args(["fvd", "--sampler", "25"]).sampler == "25"


def test_a_covariance_needs_two_clips(capsys):
    for count in (0, 1):
        with pytest.raises(SystemExit, match="2"):
            evaluate.parse_args(["fvd", "--num_clips", str(count)])
        assert f"argument --num_clips: {count} is not between 2 and" in capsys.readouterr().err
    assert evaluate.parse_args(["fvd", "--num_clips", "2"]).num_clips == 2
    a, b = torch.tensor([[0.0, 0], [2, 0]]), torch.tensor([[1.0, 3], [5, 3]])       # variances 2 and 8
    assert evaluate.frechet_distance(a, b) == pytest.approx(4 + 9 + (8 ** 0.5 - 2 ** 0.5) ** 2)
    distance = lambda values: {"fvd": evaluate.frechet_distance(values["a"], values["b"])}
    assert np.isfinite(evaluate.bootstrap(distance, {"a": a, "b": b})["fvd"]).all()
    assert evaluate.half_width([np.inf, 1.0, 3.0]) == pytest.approx(1.96 * 2 ** 0.5)
    assert evaluate.half_width([np.inf, 1.0]) == 0


def test_draws_of_two_samplers_are_paired():
    """The second sampler's clips are those of the first, all shifted by 1: the distances of both vary, their
    difference does not. The draws are those that another process makes for as many clips."""
    values = dict(zip(("real", "fake"), torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))))
    shift = lambda by: lambda values: {"mean": (values["fake"] + by - values["real"]).mean().item()}
    draws, others = (evaluate.bootstrap(shift(by), values)["mean"] for by in (0, 1))
    assert len(draws) == 40 and evaluate.half_width(draws) > 0.1
    assert evaluate.half_width([a - b for a, b in zip(draws, others)]) < 1e-5
    assert evaluate.bootstrap(shift(0), values)["mean"] == draws


def test_tables_name_runs_and_samplers_that_exist():
    rows = [row for rows in tables.TABLE2.values() for row in rows]
    for run, name, paper in rows + tables.SHIPPED + tables.TABLE1 + tables.BUDGETS:
        if (run, name, paper) != tables.FLOOR:
            assert run in ("teacher", "shipped") or run in tables.RUNS
            evaluate.parse_sampler(name, run == "teacher", (1.0, 3.0))
    for stage in (1, 2):
        flags = " ".join(flags[stage - 1] or "" for flags in tables.RUNS.values()).split()
        scripts = [(ROOT / name).read_text() for name in (f"train_stage{stage}.py", "support/engine.py")]
        for flag in flags:
            assert not flag.startswith("--") or any(f'flag("{flag}"' in script for script in scripts), flag


def test_budgets_are_multiples_of_those_of_the_tables():
    """One training seed. The smallest budget is that of the tables, so its students are found in --work. A
    single stage and a cheaper recipe train as long as "osv"."""
    last = lambda flags: int(flags.split("--max_train_steps ")[-1])
    one, two = tables.RUNS["osv x 6"]
    assert (last(one), last(two)) == (1200, 1500) and "--adv_weight" not in one + two
    none, lcm = tables.RUNS[f"{tables.BETTER} x 2.5"]
    assert none is None and "--adv_weight 0" in lcm
    assert last(lcm) == round(2.5 * tables.TIME / tables.PACE["AnimateLCM"])
    runs = list(dict.fromkeys(run for run, *_ in tables.BUDGETS))
    assert len(runs) == 3 + 2 + 3 + 1 and {"osv", *tables.RATES[0]} <= {*runs}
    assert tables.BETTER in tables.RATES[0]
    for run, stage, kind in (("stage 1 alone", 0, "stage 1"), ("stage 2 alone", 1, "stage 2"),
                             ("AnimateLCM", 1, "AnimateLCM"), ("SF-V", 0, "SF-V")):
        assert abs(last(tables.RUNS[run][stage]) * tables.PACE[kind] / tables.TIME - 1) < 0.01
    for runs, stage in zip(tables.RATES, (1, 0)):
        first, second = (tables.RUNS[run][stage] for run in runs)
        assert second == f"{first} --learning_rate {runs[1].split()[-1]}"


def test_budgets_have_one_training_seed(tmp_path, monkeypatch):
    rows, trained = [], []
    report = SimpleNamespace(protocol={}, rows={}, shape=(4, 64, 64), device="cpu", sampler=lambda *_: (),
                             add=lambda *row, **more: rows.append((*row, more["training_seconds"])))
    monkeypatch.setattr(tables, "Report", lambda *_, **__: report)
    monkeypatch.setattr(tables, "fingerprints", lambda _: {})
    monkeypatch.setattr(tables, "trained", lambda run, seed, *_: trained.append((run, seed)) or ("s", 9.0))
    monkeypatch.setattr(sys, "argv", ["tables.py", "budgets", "--seeds", "3", "4"])
    tables.main()
    seconds = {"shipped": tables.SHIPPED_SECONDS}
    assert rows == [(run, name, 3, seconds.get(run, 9.0)) for run, name, _ in tables.BUDGETS]
    assert len({*trained}) == 8 and {seed for _, seed in trained} == {3}


@pytest.mark.parametrize("argv0, module, program", [
    ("evaluate.py", None, "evaluate.py"),
    (str(ROOT / "tools" / "tables.py"), SimpleNamespace(name="tools.tables"), "-m tools.tables"),
])
def test_record_names_the_command(argv0, module, program, monkeypatch):
    """As it is typed: a script by its file, a module with -m. Paths in the repository are relative."""
    monkeypatch.setattr(sys, "argv", [argv0, "--flag"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module)
    record = evaluate.record(SimpleNamespace(device="cpu", model=ROOT / "assets"))
    assert record["command"] == f"python {program} --flag" and record["settings"]["model"] == "assets"


@pytest.mark.parametrize("device, name", [
    ("cuda", "a GPU"), ("cuda:1", "a GPU"), (torch.device("cuda", 1), "a GPU"), (torch.device("cpu"), "cpu")])
def test_record_names_the_gpu(device, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert evaluate.record(SimpleNamespace(device=device))["device"] == name


def test_tables_of_pages_come_from_the_results(tmp_path):
    row = {"run": "osv", "sampler": "1", "seed": 0, "steps": 1, "nfe": 1, "paper": 335.36, "fvd": 40.0,
           "interval": 4.0, "fvd_draws": [40.0, 41.0, 42.0], "seconds": 0.01, "sharpness": 1.0,
           "diversity": 0.1, "motion": 0.9, "first_psnr": 31.0, "training_seconds": 50.0}
    teacher = {**row, "run": "teacher", "nfe": 16}
    rows = [row, {**row, "seed": 1, "fvd": 50.0, "training_seconds": 60.0},
            {**teacher, "sampler": "1", "fvd": 59.0, "training_seconds": None},
            {**teacher, "sampler": "2", "fvd": 45.0}, {**teacher, "sampler": "8", "fvd": 31.0},
            {**row, "run": "real", "sampler": "other futures", "nfe": 0}]
    report = {"protocol": {"clips": 3}, "command": "python evaluate.py", "device": "a GPU", "date": "today"}
    results = tmp_path / "results"
    checkpoint.write_json(results / "table1.json", report | {"rows": rows})
    checkpoint.write_json(results / "table2.json", report | {"rows": [{**row, "sampler": "tts"}]})
    bench = [{"what": "ours: a net", "ms": 1234.5, "memory_gib": 2.0, "share": 0.5},
             {"what": "plain: a net", "error": "out of memory"}]
    checkpoint.write_json(results / "bench.json", report | {"nets": bench, "matmul_tflops_per_s": 700.4})
    text = """before
        <!-- table table1.json: table1 | run = {run} | NFE = {nfe} | toy-FVD = {range} | bad = {bad_range}
        | paper = {in_paper} | s = {seconds:.2f} | trained = {training_seconds:.0f} | misses = {lacks} -->
        stale
        <!-- end -->
        after
        <!-- table table2.json: table2 | run = {label}{run} | paper = {in_paper} -->
        <!-- end -->
        <!-- table table1.json table2.json: orderings | claim = {claim} | a = {better} | b = {worse}
        | difference = {fvd_difference} | here = {fvd_here} -->
        <!-- end -->
        <!-- table table1.json: rows | run = {run} | motion = {motion:.1f} -->
        <!-- end -->
        <!-- table bench.json: side_by_side | net = {what} | ours = {ours} | plain = {plain} -->
        <!-- end -->
        """.replace("\n        ", "\n")
    for page in (tmp_path / "README.md", tmp_path / "docs" / "page.md"):
        page.parent.mkdir(exist_ok=True)
        page.write_text(text)
        pages.write_page(page, results)
    text = page.read_text()
    assert text == (tmp_path / "README.md").read_text() and "stale" not in text and "\nafter\n" in text
    assert "| s | trained | misses |\n| --- | --: | --: | --: | --: | --: | --: | --: |\n" in text
    assert "| osv | 1 | 45.0 (36.0 to 54.0) |  | 335.36 | 0.01 | 55 |  |\n" in text
    assert "| teacher | 16 | 59.0 (55.0 to 63.0) |  | 1177.34 | 0.01 |  |  |\n" in text
    assert "Protocol: clips 3" in text
    for letter, paper in zip("abcdeh", 5 * [171.15] + [181.95]):        # the same row in each part
        assert f"| {letter}: osv | {paper} |\n" in text
    one, tts = "one step beats {} of the teacher | 45.0 (36.0 to 54.0)", "Time Travel beats 8 of the teacher"
    for claim, fvd, verdict in (
            (one.format(1), "59.0 (55.0 to 63.0)", "-14.0 (-19.0 to -9.0) | yes"),
            (one.format(2), "45.0 (41.0 to 49.0)", "+0.0 (-5.0 to +5.0) | not told apart"),
            (f"{tts} | 40.0 (36.0 to 44.0)", "31.0 (27.0 to 35.0)", "+9.0 (+9.0 to +9.0) | the reverse")):
        assert f"| {claim} | {fvd} | {verdict} |" in text, text
    assert text.count("| osv | 0.9 |") == 2                             # a row per training seed
    assert "| a net | 1,234 ms, 2.0 GiB | out of memory |\n" in text
    assert "`results/bench.json`: a GPU, matrix product 700 TFLOP/s, today." in text
    pages.write_page(page, results)
    assert page.read_text() == text                                     # a second run changes nothing
    for file, content, wrong in (
            ("bench.json", report, "bench.json: side_by_side (KeyError('nets')"),
            ("bench.json", report | {"nets": 5}, "bench.json: side_by_side (TypeError("),
            ("table1.json", report | {"rows": rows[:2], "protocol": {}}, "orderings (KeyError('clips')"),
            ("table2.json", {"rows": []}, "table2.json: table2 (ModelError(")):
        good = (results / file).read_bytes()
        checkpoint.write_json(results / file, content)
        with pytest.raises(ModelError) as caught:                       # of another version, or cut short
            pages.write_page(page, results)
        assert f"{page}: no table of " in str(caught.value) and wrong in str(caught.value)
        assert page.read_text() == text
        (results / file).write_bytes(good)
    pages.plot(rows, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (700, 420) and len(picture.convert("RGB").getcolors(100_000)) > 3


FIGURES = {"seed": 0, "steps": 1, "nfe": 1, "interval": 4.0, "seconds": 0.01, "sharpness": 1.0,
           "diversity": 0.1, "motion": 0.9, "first_psnr": 31.0}


def test_distances_are_compared_draw_by_draw():
    """The draws of a difference are the differences of the draws: 1.96 standard deviations of (1, 2, 3) here,
    although the distances' own intervals of 4 overlap. Seeds are compared one by one; the teacher's row
    serves for each. An older report without draws has empty cells."""
    osv = [{**FIGURES, "run": "osv", "sampler": "1", "seed": seed, "fvd": 15.0 + seed,
            "fvd_draws": [10.0, 20.0, 30.0]} for seed in (0, 1)]
    teacher = {**FIGURES, "run": "teacher", "sampler": "1", "fvd": 18.0, "fvd_draws": [11.0, 22.0, 33.0]}
    sfv = [{**teacher, "run": "SF-V", "seed": seed, "fvd": fvd} for seed, fvd in ((1, 17.0), (0, 18.0))]
    old = {**FIGURES, "run": "teacher", "sampler": "2", "fvd": 90.0}
    elsewhere = [{**teacher, "run": "AnimateLCM", "seed": seed} for seed in (5, 6)]     # no seed in common
    report = {"protocol": {"clips": 64}, "rows": [*osv, teacher, *sfv, old, *elsewhere]}
    found = {claim["claim"]: (claim.get("fvd_difference"), claim.get("fvd_here"))
             for claim in pages.orderings(report)}
    assert found == {
        "one step beats 1 of the teacher": ("-2.5 (-5.0 to -0.0)", "yes"),          # -3 and -2, each +- 1.96
        "one step beats one of SF-V": ("-2.0 (-5.0 to +1.0)", "not told apart"),    # -3 and -1
        "one step beats 2 of the teacher": (None, None), "one step beats one of AnimateLCM": (None, None)}


def test_of_two_learning_rates_the_better_one_is_shown(tmp_path):
    """By the mean toy-FVD of one step, also if the other one is better with more steps."""
    row = lambda run, name, seed, fvd: {**FIGURES, "run": run, "sampler": name, "seed": seed, "fvd": fvd}
    slow, fast = tables.RATES[0]
    rows = [row(slow, "1", 0, 20.0), row(slow, "1", 1, 50.0), row(slow, "2", 0, 5.0), row(fast, "1", 0, 31.0),
            row(fast, "1", 1, 31.0), row(fast, "2", 0, 9.0), row(tables.RATES[1][0], "1", 0, 99.0)]
    assert list(pages.over_seeds(rows)) == [f"{fast}, 1", f"{fast}, 2", "SF-V, 1"]
    rows[0]["fvd"] = 10.0
    assert list(pages.over_seeds(rows)) == [f"{slow}, 1", f"{slow}, 2", "SF-V, 1"]
    report = {"protocol": {"clips": 3}, "rows": [*rows, row("osv", "1", 0, 7.0)]}
    assert [claim["worse"] for claim in pages.orderings(report)] == [
        "30.0 (6.0 to 54.0)", "99.0 (95.0 to 103.0)"]
    assert [row["run"] for row in pages.ROWS["table1"](report)] == [slow, slow, "SF-V", "osv"]


def test_changes_are_compared_with_none():
    row = lambda run, name, seed, fvd, bits: {
        **FIGURES, "run": run, "change": {"base": "as it is"}.get(run, "more"), "sampler": name, "seed": seed,
        "fvd": fvd, "bad": bits / 64, "bad_interval": 0.1, "bad_clips": f"{2 ** bits - 1:x}"}
    rows = [row("base", name, seed, 20.0 + seed, 32) for name in ("1", "tts") for seed in (0, 1)]
    rows += [row("new", name, seed, 10.0 + seed, 40) for name in ("1", "tts") for seed in (0, 1)]
    rows[-1] |= row("new", "tts", 1, 13.0, 32)
    rows.append(row("stopped half way", "1", 0, 9.0, 3))
    report = {"protocol": {"clips": 64}, "rows": rows}
    base, new = pages.one_step(report)
    assert base["change"] == "as it is" and base["one"]["fvd"] == 20.5 and base["tts"]["bad"] == 0.5
    assert "bad_difference" not in base["one"]
    assert new["one"]["fvd"] == 10.5 and new["one"]["bad_difference"] == "+12.5% (+4.3% to +20.7%)"
    assert new["tts"]["fvd"] == 11.5 and new["tts"]["bad_difference"] == "+6.2% (+0.0% to +20.7%)"


def test_recipes_are_compared_at_equal_time():
    row = lambda run, name, fvd, bits: {
        **FIGURES, "run": run, "sampler": name, "fvd": fvd, "fvd_draws": [fvd - 1, fvd, fvd + 1],
        "bad": bits / 64, "bad_interval": 0.1, "bad_clips": f"{2 ** bits - 1:x}"}
    rows = []
    for osv, length, *figures in (
            ("osv", "", 18.0, 40, 32.0, 44), ("osv x 2.5", " x 2.5", 15.0, 39, 14.0, 40),
            ("osv x 6", " x 6", 15.0, 38, 12.0, 40), ("shipped", " x 12.5", 14.0, 38, 12.0, 40)):
        other = f"{tables.BETTER}{length}"
        rows += [row(osv, "1", *figures[:2]), row(osv, "tts", 9.0, 30), row(other, "1", *figures[2:]),
                 row(other, "2", 9.0, 36)]
    short, _, long, shipped = pages.recipes({"protocol": {"clips": 64}, "rows": rows})
    assert (short["run"], long["run"], shipped["run"]) == ("osv", "osv x 6", "shipped")
    assert shipped["one"]["fvd_difference"] == "+2.0 (+2.0 to +2.0)"
    del rows[-1]                                        # a table that stopped half way
    assert len(list(pages.recipes({"protocol": {"clips": 64}, "rows": rows}))) == 3
    assert short["one"]["fvd_difference"] == "-14.0 (-14.0 to -14.0)" and short["one"]["fvd_here"] == "yes"
    assert long["one"]["fvd_difference"] == "+3.0 (+3.0 to +3.0)"
    assert long["one"]["bad_difference"].startswith("-3.1%")
    assert long["two"]["fvd_here"] == "not told apart" and long["two"]["bad_here"] == "yes"


def test_budgets_are_plotted(tmp_path):
    row = {**FIGURES, "fvd": 9.0, "bad": 0.5, "bad_interval": 0.1}
    rows = [{**row, "run": f"osv{times}", "sampler": name, "nfe": nfe, "seed": 0, "interval": 1.0,
             "training_seconds": seconds}
            for name, nfe in (("1", 1), ("tts", 2)) for times, seconds in (("", 50), (" x 6", 300))]
    pages.plot_budgets(rows, tmp_path / "budgets.png")
    with Image.open(tmp_path / "budgets.png") as picture:
        assert picture.size == (900, 400) and len(picture.convert("RGB").getcolors(100_000)) > 3


def test_bad_clips_are_compared_clip_by_clip():
    """64 clips; in the second row 8 more are bad. The difference of the shares is told apart, though their
    own intervals overlap. A row of an older report has empty cells."""
    row = {**FIGURES, "fvd": 40.0}
    half = evaluate.share_interval(0.5, 64)
    bad = lambda bits: {"bad": bits / 64, "bad_interval": half, "bad_clips": f"{2 ** bits - 1:x}"}
    rows = [{**row, "run": "osv", "sampler": "1", **bad(32)},
            {**row, "run": "teacher", "sampler": "1", **bad(40)}, {**row, "run": "teacher", "sampler": "2"},
            {**row, "run": "AnimateLCM", "sampler": "1", **bad(32)},
            {**row, "run": "SF-V", "sampler": "1", **bad(20)}]
    report = {"protocol": {"clips": 64}, "rows": rows}
    assert [pages.cell("{bad_difference}: {bad_here}", claim) for claim in pages.orderings(report)] == [
        "-12.5% (-20.7% to -4.3%): yes", "", "+0.0% (+0.0% to +0.0%): not told apart",
        "+18.8% (+9.1% to +28.4%): the reverse"]
    assert half == pytest.approx(0.119, abs=0.001)
    first, second = pages.measured(report, [("", "osv", "1", None), ("", "teacher", "2", None)])
    assert first["bad_range"] == "50.0% (38.1% to 61.9%)" and "bad_range" not in second


def test_rows_of_a_sheet_are_numbered(tmp_path):
    Image.new("RGB", (40, 131)).save(tmp_path / "sheet.jpg")
    pages.number_rows(tmp_path / "sheet.jpg", tmp_path / "out.jpg", rows=2)
    with Image.open(tmp_path / "out.jpg") as picture:
        left = picture.convert("L").crop((0, 0, 14, 131))
        assert picture.size == (56, 131)
        assert left.crop((0, 0, 14, 65)).getextrema()[0] < 100 < left.crop((0, 65, 14, 131)).getextrema()[1]
    (tmp_path / "sheet.jpg").write_bytes((tmp_path / "sheet.jpg").read_bytes()[:-40])
    with pytest.raises(ModelError, match="sheet.jpg: cannot be read as a picture"):
        pages.number_rows(tmp_path / "sheet.jpg", tmp_path / "out.jpg", rows=2)


def test_an_interval_of_no_bad_clips_is_not_empty():
    """Wilson's interval: 0 of 40 clips still allow for a share of several percent; more clips for less."""
    assert 0.03 < evaluate.share_interval(0, 40) < 0.06
    assert evaluate.share_interval(0, 4000) < 0.001
    assert evaluate.share_interval(0.5, 1024) == pytest.approx(1.96 * 0.5 / 32, rel=0.01)


def test_evaluation_has_clips_and_noise_of_its_own(small, monkeypatch):
    """Not the clips of sample sheets, and not the noise that samplers start from on the input picture."""
    folder, _ = small
    drawn, draw = [], sampler.draw_noise
    spy = lambda shape, generators, device: drawn.append(
        [generator.initial_seed() for generator in generators]) or draw(shape, generators, device)
    monkeypatch.setattr(sampler, "draw_noise", spy)
    args = evaluate.parse_args(["fvd", "--num_clips", "3", "--seed", "5"])
    vae, image_encoder = model.load_vae(folder), model.load_image_encoder(folder)
    reference = evaluate.open_reference(
        args, vae, image_encoder, evaluate.load_detector(folder / "i3d"), 4, 64, 64, torch.device("cpu"))
    real = to_bytes(world.toy_clips(5 + evaluate.UNSEEN, range(3), 4, 64).frames)
    assert torch.equal(reference.ends, real[:, [0, -1]])
    assert evaluate.UNSEEN not in (0, data.HELD_OUT)
    pictures, = drawn
    _, _, draw_clips = evaluate.parse_sampler("1", False, None)
    evaluate.generate_clips(draw_clips, model.load_unet(folder), vae, reference, torch.arange(3), 5)
    assert len(drawn) == 2 and not {*pictures} & {*drawn[1]}
    assert min(pictures) > (2 ** 40 + 1) * 1_000_003 + 10 ** 9              # the largest --seed, and any clip


def test_each_damage_moves_a_figure(small, tmp_path, monkeypatch, capsys):
    """By more than the figure's interval. 3 of 32 clips are damaged."""
    report = tmp_path / "sensitivity.json"
    words = ["sensitivity", "--num_clips", "32", "--width", "64", "--height", "64", "--batch_size", "8"]
    args = evaluate.parse_args([*words, "--detector", str(small[0] / "i3d"), "--device", "cpu", "--report",
                                str(report)])
    evaluate.sensitivity(args)
    undamaged, *rows = json.loads(report.read_text())["rows"]
    assert undamaged["bad"] <= 0.05 and undamaged["astray"] == 0
    assert [row["sampler"] for row in rows] == [*evaluate.DAMAGES]
    moved = {row["sampler"]: {name for name, x in row["moved_by"].items() if abs(x) > 1} for row in rows}
    assert all(moved.values()), moved
    for name in ("kind", "squash", "melt", "split", "ghost", "drift"):
        assert "bad" in moved[name], moved
    assert {"astray", "follows"} <= moved["freeze"] and {"astray", "motion"} <= moved["jump"], moved
    said = capsys.readouterr().out
    assert "moved by, in units of the interval:\nkind " in said
    args.resume = True
    monkeypatch.setattr(evaluate, "measure", lambda *_: pytest.fail("measured again"))
    evaluate.sensitivity(args)
    assert [undamaged, *rows] == json.loads(report.read_text())["rows"]


def test_real_videos_cannot_be_damaged():
    for flag in ("--data", "--student"):
        with pytest.raises(ModelError, match="damages real clips of the toy world: leave out"):
            evaluate.sensitivity(evaluate.parse_args(["sensitivity", flag, "given"]))


def test_orderings_are_of_rows_that_the_tables_have():
    rows = tables.TABLE1 + [row for rows in tables.TABLE2.values() for row in rows]
    measured = {f"{run}, {name}" for run, name, _ in rows}
    assert len(pages.ORDERINGS) == 19
    assert all({f"osv, {name}", other} <= measured for _, name, other in pages.ORDERINGS)


def test_plot_has_a_panel_per_number(tmp_path):
    rows = [{"step": step, "loss": 1 / step, "grad_norm": float("nan") if step == 2 else 1.0, "kind": "text"}
            for step in (1, 2, 3)]
    rows[-1]["late"] = 1
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.plot(tmp_path / "metrics.jsonl", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (3 * 360, 200)
        ink = picture.convert("L")
        widths = [ink.crop((i * 360, 0, (i + 1) * 360, 200)).getextrema()[0] for i in range(3)]
    assert max(widths) < 128                                                # three panels, none is empty


GOOD = b'{"step": 1, "loss": 2}\n'


@pytest.mark.parametrize("log, out, complaint", [
    (None, "plot.png", "no numbers in it"), (b"", "plot.png", "no numbers in it"),
    (b'{"step": 1, "loss": "2", "heads": [1], "far": NaN, "more": null}\n', "plot.png", "no numbers in it"),
    (b"[]\n7\n{}\n", "plot.png", "no numbers in it"), (GOOD, "metrics.jsonl", "would overwrite"),
    (GOOD, "link.png", "would overwrite"), (GOOD, "plot.xyz", "plot.xyz: the name must end in"),
    (GOOD, "plot", "plot: the name must end in"), (GOOD, "folder.png", "folder.png: cannot be written"),
    (GOOD, "metrics.jsonl/plot.png", "cannot be written")])
def test_plots_that_cannot_be_drawn(log, out, complaint, tmp_path, monkeypatch):
    """The log and an earlier picture stay as they are."""
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    if log is not None:
        Path("metrics.jsonl").write_bytes(log)
        os.link("metrics.jsonl", "link.png")
    Path("plot.png").write_text("earlier")
    monkeypatch.setattr(sys, "argv", ["plot.py", "metrics.jsonl", out])
    with pytest.raises((ModelError, OSError), match=complaint):
        plot.main()
    assert Path("plot.png").read_text() == "earlier" and not list(tmp_path.glob(".*"))
    assert log is None or Path("metrics.jsonl").read_bytes() == log


def test_plot_leaves_out_what_is_damaged(tmp_path, capsys):
    """The line that a killed run tore, text that is not UTF-8, and values that are no numbers."""
    (tmp_path / "metrics.jsonl").write_bytes(
        GOOD + b'{"step": 2, "loss": [3], "$x^$": 1, "huge": 1' + b"0" * 400 + b', "large": 1e309}\n'
        b'\xff\xfe\n"step"\n{"loss": 3}\n{"step": "3", "loss": 1}\n{"step": 4, "lo')
    plot.plot(tmp_path / "metrics.jsonl", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (3 * 360, 200)                               # one row of panels: loss, $x^$
    assert "5 damaged lines" in capsys.readouterr().err


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)             # as if it were not installed
    (tmp_path / "metrics.jsonl").write_bytes(GOOD)
    with pytest.raises(ModelError, match="matplotlib is missing"):
        plot.plot(tmp_path / "metrics.jsonl", tmp_path / "plot.png")


@pytest.mark.parametrize("output, refused", [
    ("model", True), (".", True), ("model/../link", True), ("model/new", False), ("out", False)])
def test_export_does_not_write_over_what_it_reads(output, refused, tmp_path, pipeline_folder, monkeypatch):
    """Nor into a folder that holds it. What a killed export left behind is gone after the next one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipeline_folder, "model")
    Path("link").symlink_to("model")
    left = Path(output) / "unet" / ".diffusion_pytorch_model.fp16.safetensors.part"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    if not refused:
        left.parent.mkdir(parents=True)
        left.touch()
    monkeypatch.setattr(sys, "argv", ["export.py", "export", "--model", "model", "--student", "model/unet",
                                      "--output_dir", output])
    if refused:
        with pytest.raises(ModelError, match="would overwrite"):
            export.main()
    else:
        export.main()
        assert not left.exists() and (Path(output) / "model_index.json").is_file()
    assert before.items() <= {path: path.read_bytes() for path in tmp_path.rglob("*.*")}.items()


BENCH = ["bench.py", "nets", "--size", "toy", "--device", "cpu", "--repeats", "1", "--warmup", "0", "--width",
         "64", "--height", "64", "--num_frames", "1"]


def test_bench_measures_fast_and_plain(tmp_path, monkeypatch):
    """The toy networks on a CPU: the same rows for both variants, in a report."""
    report = tmp_path / "bench.json"
    monkeypatch.setattr(bench, "matmul_ceiling", lambda *_: 1.0)            # takes half a second
    monkeypatch.setattr(sys, "argv", [*BENCH, "--no_diffusers", "--report", str(report)])
    bench.main()
    rows = json.loads(report.read_text())["nets"]
    parts = ("UNet forward", "VAE encode, 1 frames", "VAE decode, 1 frames", "UNet forward + backward",
             "the same, checkpointed")
    names = [f"{variant}: {part}" for variant in ("ours", "plain") for part in parts]
    assert [row["what"] for row in rows] == names
    assert all(row["ms"] > 0 and row["tflop"] > 0 and row["memory_gib"] is None for row in rows)


@pytest.mark.parametrize("flags, variants", [
    ([], {"ours", "plain", "diffusers"}), (["--no_diffusers"], {"ours", "plain"})])
def test_bench_leaves_diffusers_out(flags, variants, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*BENCH, *flags])
    monkeypatch.setattr(bench, "measure", lambda name, fn, args, *networks: name)
    args = bench.parse_args()
    args.model = sampler.TOY
    assert {name.split(":")[0] for name in bench.nets(args)} == variants
