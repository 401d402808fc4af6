"""The distance against scipy, its interval, what the other figures say of known clips, and the tables."""
import json
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from einops import rearrange
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

import data
import evaluate
import model
import results.readme
import sampler
import solver

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
    """Also where real and generated clips have a picture in common, and with it most of what is by chance."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        picture, real, fake = torch.randn(3, 400, 3, generator=generator)
        return shared * picture + real, shared * picture + fake + 1

    distances = torch.tensor([evaluate.frechet_distance(*draw()) for _ in range(100)])
    half = evaluate.interval(*draw(), rounds=200)
    assert half == pytest.approx(1.96 * distances.std().item(), rel=0.4)


def test_distance_grows_with_blur_noise_and_shuffling():
    """With the shipped detector: the more is wrong, the larger; nothing wrong, nothing."""
    clips = data.toy_clips(3 + data.HELD_OUT, torch.arange(8)).frames                       # b f c h w
    detector = evaluate.load_detector(TOY_I3D)
    features = evaluate.video_features(detector, clips)
    distance = lambda x: evaluate.frechet_distance(features, evaluate.video_features(detector, x))
    # Fewer clips than features: the root of an eigenvalue 0 +- 1e-16 of the largest is not that small.
    assert distance(clips) == pytest.approx(0, abs=1e-6 * features.var(dim=0).sum().item())

    def blurred(k):
        frames = F.avg_pool2d(clips.flatten(0, 1), k, 1, k // 2)                            # (b f) c h w
        return rearrange(frames, "(b f) c h w -> b f c h w", f=clips.shape[1])

    def shuffled(n):                                                                # the first n frames
        return torch.cat((clips[:, torch.randperm(n)], clips[:, n:]), dim=1)

    noise = torch.randn_like(clips)
    for worse in ([blurred(3), blurred(9)], [clips + 0.05 * noise, clips + 0.4 * noise],
                  [shuffled(4), shuffled(14)]):
        distances = [distance(x) for x in worse]
        assert 0 < distances[0] and distances == sorted(distances), distances


def test_displacement_follows_the_shapes():
    clips = data.toy_clips(4, torch.arange(24))
    colours = clips.attributes[:, :len(data.COLOURS)].bool()
    moved = evaluate.displacement(evaluate.to_bytes(clips.frames), colours)
    true = clips.centres.diff(dim=1).norm(dim=-1).mean(dim=1)                               # b n
    true = (true * clips.present).sum(1) / clips.present.sum(1)
    assert torch.corrcoef(torch.stack((moved, true)))[0, 1] > 0.99
    alone = clips.present.sum(1) == 1
    torch.testing.assert_close(moved[alone], true[alone], rtol=0.1, atol=0.1)
    still = evaluate.to_bytes(clips.frames[:, :1].expand(-1, 14, -1, -1, -1))
    assert evaluate.displacement(still, colours).max() < 1e-3


@pytest.fixture(scope="module")
def small(pipeline_folder, tmp_path_factory):
    """A random pipeline with a detector of its own, in the toy world at 64x64."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(pipeline_folder, folder, dirs_exist_ok=True)
    detector = evaluate.VideoClassifier(data.NUM_ATTRIBUTES, channels=(8, 8, 16, 16), size=64)
    evaluate.save_detector(detector, folder / "i3d")
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
    assert f"4 clips are too few for {data.NUM_ATTRIBUTES} features" in run.stderr
    result = json.loads(report.read_text())
    assert result["protocol"] == json.loads(run.stdout.split("protocol: ")[1].splitlines()[0])
    assert set(result["protocol"]) == {
        "detector", "detector_sha256", "data", "clips", "frames", "fps", "size", "seed", "guidance"}
    row, = result["rows"]
    assert row["nfe"] == 2 and row["steps"] == 1 and np.isfinite(
        [row[key] for key in ("fvd", "interval", "sharpness", "diversity", "first_psnr", "motion")]).all()
    assert report.with_suffix(".jpg").stat().st_size > 0


def test_detectors_that_cannot_be_loaded(command, small, tmp_path):
    """One line each: no such file; the hub out of reach; a folder whose weights are another network's."""
    folder, _ = small
    other = tmp_path / "i3d"
    evaluate.save_detector(evaluate.VideoClassifier(5, channels=(8, 8, 16, 16), size=64), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_classes": 6}))
    for detector in ("nowhere.pt", "i3d", other):
        bad = command("fvd", "--model", folder, "--detector", detector)
        assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1, bad.stderr
        assert f"{detector}: cannot be loaded as a detector" in bad.stderr


def test_figures_do_not_depend_on_the_batch(small):
    folder, unet = small
    vae, image_encoder = model.load_vae(folder), model.load_image_encoder(folder)
    detector = evaluate.load_detector(folder / "i3d")
    args = evaluate.parse_args(["fvd", "--num_clips", "3", "--batch_size", "2"])
    device, frames = torch.device("cpu"), []
    reference = evaluate.open_reference(args, vae, image_encoder, detector, 4, 64, 64, device)
    _, _, draw = evaluate.how("2", False, None)
    generate = evaluate.by_sampler(partial(draw, unet), vae, reference, device)
    for batch_size in (2, 3):
        x, figures = evaluate.measure(generate, detector, reference, batch_size=batch_size)
        x = torch.stack(x)
        frames.append(x.float())
    assert (frames[0] - frames[1]).abs().max() <= 1                         # a rounding of the last bit
    perfect = reference._replace(features=evaluate.video_features(detector, x), ends=x[:, [0, -1]],
                                 moved=evaluate.displacement(x, reference.colours))
    _, figures = evaluate.measure(generate, detector, perfect)
    assert figures["fvd"] == pytest.approx(0, abs=1e-3) and figures["sharpness"] == pytest.approx(1, abs=1e-3)
    assert figures["first_psnr"] > 50 and figures["diversity"] > 0 and figures["motion"] == pytest.approx(1)


def test_samplers_by_name(small):
    """Each name draws what the function of that name draws, with as many evaluations as it says."""
    folder, unet = small
    calls = []
    counted = lambda x, *rest: calls.append(len(x)) or unet(x, *rest)
    cond = model.Cond(torch.randn(2, 1, 24), torch.randn(2, 4, 4, 8, 8), torch.ones(2, 3))
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(2)]
    sigmas = solver.karras_sigmas(solver.NUM_SIGMAS)
    results = {}
    for name in ("1", "4", "tts", "tts printed", "tts v1", "1 cfg 1.5", "8 teacher"):
        calls.clear()
        steps, nfe, draw = evaluate.how(name.removesuffix(" teacher"), "teacher" in name, (1.0, 3.0))
        results[name] = draw(counted, cond, generators())
        assert sum(calls) == 2 * nfe, name                                  # of two clips
    torch.testing.assert_close(
        results["4"], sampler.sample(unet, cond, solver.strided(sigmas, 4), generators()))
    torch.testing.assert_close(
        results["tts"], sampler.sample(unet, cond, solver.strided(sigmas, 2), generators(), tts=True))
    assert len({tuple(x.flatten()[:4].tolist()) for x in results.values()}) == len(results)


def test_tables_train_what_is_missing_and_resume(small, python, tmp_path, monkeypatch, capsys):
    """Two seeds of a student at a time; what a report has is kept, if it was made in the same way."""
    folder, _ = small
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28,
                             patch_size=14)).save_pretrained(folder / "dinov2")
    monkeypatch.setattr(evaluate, "RUNS", {"quick": (None, "--adv_weight 0 --num_solver_steps 1")})
    monkeypatch.setattr(evaluate, "TABLE1", [
        ("teacher", "1", 9.0), ("quick", "1", 8.0), ("quick", "tts", None)])
    monkeypatch.setattr(sys, "executable", python)
    report = tmp_path / "table1.json"
    stage2 = ("--preset toy_cpu --max_train_steps 2 --batch_size 1 --num_clips 2 --width 32 --height 32 "
              "--log_steps 1 --lora_rank 4 --validation_teacher_steps 1")
    settings = {"model": folder, "device": "cpu", "width": 64, "height": 64, "work": tmp_path / "work",
                "report": report, "stage2": stage2}

    def table1(*flags):
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "table1", *words, *map(str, flags)])
        evaluate.main()
        return json.loads(report.read_text())["rows"]

    rows = table1("--num_clips", 3, "--jobs", 2)
    assert [(row["run"], row["sampler"], row["seed"]) for row in rows] == [
        ("teacher", "1", 0), *(("quick", name, seed) for name in ("1", "tts") for seed in (0, 1))]
    assert all(row["training_seconds"] is None for row in rows)             # two shared the machine
    assert rows[1]["fvd"] != rows[2]["fvd"] and len(list((tmp_path / "work").iterdir())) == 2
    earlier = json.loads(report.read_text())
    model.write_json(report, earlier | {"rows": rows[:-1]})
    capsys.readouterr()
    *same, last = table1("--num_clips", 3, "--resume")
    assert same == rows[:-1] and last["fvd"] == rows[-1]["fvd"] and last["training_seconds"] > 0
    said = capsys.readouterr().out
    assert said.count("NFE") == 1 and "train_stage" not in said             # the students were there
    with pytest.raises(SystemExit):
        table1("--num_clips", 4, "--resume")
    assert f"{report} has another protocol: clips was 3, is 4" in capsys.readouterr().err
    assert json.loads(report.read_text())["rows"] == [*same, last]
    model.write_json(report, {})
    with pytest.raises(SystemExit):
        table1("--num_clips", 3, "--resume")
    assert f"{report}: no report of a table" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["soon", "0", "100", "tts v3", "1 cfg", "2 1.5"])
def test_a_sampler_that_there_is_not(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args(["fvd", "--sampler", name])
    assert f'--sampler "{name}": neither 1 to 99 steps' in capsys.readouterr().err


def test_tables_name_runs_and_samplers_that_exist():
    rows = evaluate.SHIPPED + evaluate.TABLE1 + [row for rows in evaluate.TABLE2.values() for row in rows]
    for run, name, paper in rows:
        if (run, name, paper) != evaluate.FLOOR:
            assert run in ("teacher", "shipped") or run in evaluate.RUNS
            evaluate.how(name, run == "teacher", (1.0, 3.0))
    for stage in (1, 2):
        flags = " ".join(flags[stage - 1] or "" for flags in evaluate.RUNS.values()).split()
        scripts = [(ROOT / name).read_text() for name in (f"train_stage{stage}.py", "engine.py")]
        for flag in flags:
            assert not flag.startswith("--") or any(f'flag("{flag}"' in script for script in scripts), flag


def test_readme_tables_come_from_the_results(tmp_path):
    row = {"run": "osv", "sampler": "1", "seed": 0, "steps": 1, "nfe": 1, "paper": 335.36, "fvd": 40.0,
           "interval": 4.0, "seconds": 0.01, "sharpness": 1.0, "diversity": 0.1, "motion": 0.9,
           "first_psnr": 31.0}
    teacher = {**row, "run": "teacher", "nfe": 16}
    rows = [row, {**row, "seed": 1, "fvd": 50.0}, {**teacher, "sampler": "1", "fvd": 59.0},
            {**teacher, "sampler": "2", "fvd": 58.0}, {**teacher, "sampler": "8", "fvd": 31.0},
            {**row, "run": "real", "sampler": "other futures", "nfe": 0}]
    report = {"protocol": {"clips": 3}, "command": "python evaluate.py", "device": "cpu", "date": "today"}
    model.write_json(tmp_path / "results" / "table1.json", report | {"rows": rows})
    model.write_json(tmp_path / "results" / "table2.json", report | {"rows": [{**row, "sampler": "tts"}]})
    (tmp_path / "README.md").write_text("before\n<!-- table1 -->\nstale\n<!-- end -->\nafter\n"
                                        "<!-- table2 -->\n<!-- end -->\n<!-- orderings -->\n<!-- end -->\n")
    results.readme.main(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- table1 -->\n|") and "stale" not in text and "clips 3" in text
    assert "\nafter\n<!-- table2 -->\n|" in text and "<!-- end -->\n<!-- orderings -->\n|" in text
    assert "| osv | 1 | 1 | 45.0 (36.0 to 54.0) | 335.36 | 0.010 | 1.00 | 0.100 | 0.90 | 31.0 |" in text
    for letter, paper in zip("abcdeh", 5 * [171.15] + [181.95]):        # the same row, where it stands
        assert f"| {letter}: osv | tts | 1 | 40.0 (36.0 to 44.0) | {paper} | " in text
    for steps, fvd, verdict in ((1, "59.0 (55.0 to 63.0)", "yes"), (8, "31.0 (27.0 to 35.0)", "the reverse"),
                                (2, "58.0 (54.0 to 62.0)", "not told apart")):
        line = f"| one step beats {steps} of the teacher | 45.0 (36.0 to 54.0) | {fvd} | {verdict} |"
        assert line in text, text
    results.readme.main(tmp_path)
    assert (tmp_path / "README.md").read_text() == text                     # again is the same
    assert (tmp_path / "results" / "table1_nfe.png").stat().st_size > 0


def test_orderings_are_of_rows_that_the_tables_have():
    tables = [evaluate.TABLE1, *evaluate.TABLE2.values()]
    measured = {row[:2] for rows in tables for row in rows}
    assert all(measured.issuperset(keys) for _, *keys in results.readme.ORDERINGS)
