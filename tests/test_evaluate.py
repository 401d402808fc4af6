"""evaluate.py: the distance against scipy, its interval, figures of known clips, the fvd command.
tools/: tables.py, readme.py, plot.py, and the networks of bench.py."""
import json
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from einops import rearrange
from PIL import Image
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

import data
import evaluate
import model
import sampler
import solver
from support import checkpoint
from tools import bench, plot, readme, tables
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
    half = evaluate.interval(*draw(), rounds=200)
    assert half == pytest.approx(1.96 * distances.std().item(), rel=0.4)


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


def test_displacement_follows_the_shapes():
    clips = world.toy_clips(4, torch.arange(24))
    colours = clips.attributes[:, :len(world.COLOURS)].bool()
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
    """A random pipeline with a small detector for the toy world at 64x64, and its UNet."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(pipeline_folder, folder, dirs_exist_ok=True)
    detector = evaluate.VideoClassifier(world.NUM_ATTRIBUTES, channels=(8, 8, 16, 16), size=64)
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
    assert f"4 clips are too few for {world.NUM_ATTRIBUTES} features" in run.stderr
    result = json.loads(report.read_text())
    assert result["protocol"] == json.loads(run.stdout.split("protocol: ")[1].splitlines()[0])
    assert set(result["protocol"]) == {
        "detector", "detector_sha256", "data", "clips", "frames", "fps", "size", "seed", "guidance"}
    row, = result["rows"]
    assert row["nfe"] == 2 and row["steps"] == 1 and np.isfinite(
        [row[key] for key in ("fvd", "interval", "sharpness", "diversity", "first_psnr", "motion")]).all()
    assert report.with_suffix(".jpg").stat().st_size > 0


def test_detectors_that_cannot_be_loaded(command, small, tmp_path):
    """One line each for a missing file, an unreachable hub, and weights of another shape."""
    folder, _ = small
    other = tmp_path / "i3d"
    evaluate.save_detector(evaluate.VideoClassifier(5, channels=(8, 8, 16, 16), size=64), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_classes": 6}))
    for detector in ("nowhere.pt", "i3d", other):
        bad = command("fvd", "--model", folder, "--detector", detector)
        assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1, bad.stderr
        assert f"{detector}: cannot be loaded as a detector" in bad.stderr


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
    assert reference.colours is None and reference.moved is None
    assert torch.equal(reference.ends, rearrange(videos[:, [0, -1]], "b f h w c -> b f c h w"))
    assert reference.cond.time_ids[:, 1].eq(127).all()
    draw = evaluate.parse_sampler("1", False, None)[2]
    generate = partial(evaluate.generate_clips, draw, unet, vae, reference)
    _, figures = evaluate.measure(generate, detector, reference)
    assert {"fvd", "sharpness", "diversity", "first_psnr"} <= figures.keys() and "motion" not in figures


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
    perfect = reference._replace(features=evaluate.video_features(detector, x), ends=x[:, [0, -1]],
                                 moved=evaluate.displacement(x, reference.colours))
    _, figures = evaluate.measure(generate, detector, perfect)
    assert figures["fvd"] == pytest.approx(0, abs=1e-3) and figures["sharpness"] == pytest.approx(1, abs=1e-3)
    assert figures["first_psnr"] > 50 and figures["diversity"] > 0 and figures["motion"] == pytest.approx(1)


def test_samplers_by_name(small):
    """Each name draws what the function of that name draws, with the stated number of evaluations."""
    folder, unet = small
    calls = []
    counted = lambda x, *rest: calls.append(len(x)) or unet(x, *rest)
    cond = model.Cond(torch.randn(2, 1, 24), torch.randn(2, 4, 4, 8, 8), torch.ones(2, 3))
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(2)]
    sigmas = solver.karras_sigmas(solver.NUM_SIGMAS)
    results = {}
    for name in ("1", "4", "tts", "tts printed", "tts v1", "1 cfg 1.5", "8 teacher"):
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
    assert len({tuple(x.flatten()[:4].tolist()) for x in results.values()}) == len(results)


def test_tables_train_what_is_missing_and_resume(small, python, tmp_path, monkeypatch, capsys):
    """Two seeds of a student train at the same time, from any working directory. --resume keeps the rows of a
    report that has the same protocol."""
    folder, _ = small
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28,
                             patch_size=14)).save_pretrained(folder / "dinov2")
    monkeypatch.setattr(tables, "RUNS", {"quick": (None, "--adv_weight 0 --num_solver_steps 1")})
    monkeypatch.setattr(tables, "TABLE1", [
        tables.FLOOR, ("teacher", "1", 9.0), ("quick", "1", 8.0), ("quick", "tts", None)])
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.chdir(tmp_path)                                             # --work below is relative
    report = tmp_path / "table1.json"
    stage2 = ("--preset toy_cpu --max_train_steps 2 --batch_size 1 --num_clips 2 --width 32 --height 32 "
              "--log_steps 1 --lora_rank 4 --validation_teacher_steps 1")
    settings = {"model": folder, "device": "cpu", "width": 64, "height": 64, "work": "work",
                "report": report, "stage2": stage2}

    def table1(*flags):
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["tables.py", "table1", *words, *map(str, flags)])
        tables.main()
        return json.loads(report.read_text())["rows"]

    rows = table1("--num_clips", 3, "--jobs", 2)
    assert [(row["run"], row["sampler"], row["seed"]) for row in rows] == [
        ("real", "other futures", 0), ("teacher", "1", 0),
        *(("quick", name, seed) for name in ("1", "tts") for seed in (0, 1))]
    assert all(row["training_seconds"] is None for row in rows)             # unknown with --jobs 2
    assert rows[0]["nfe"] == 0 and rows[2]["fvd"] != rows[3]["fvd"]
    assert len(list((tmp_path / "work").iterdir())) == 2
    earlier = json.loads(report.read_text())
    checkpoint.write_json(report, earlier | {"rows": rows[:-1]})
    capsys.readouterr()
    *same, last = table1("--num_clips", 3, "--resume")
    assert same == rows[:-1] and last["fvd"] == rows[-1]["fvd"] and last["training_seconds"] > 0
    said = capsys.readouterr().out
    assert said.count("NFE") == 1 and "train_stage" not in said             # both students exist
    with pytest.raises(SystemExit):
        table1("--num_clips", 4, "--resume")
    assert f"{report} has another protocol: clips was 3, is 4" in capsys.readouterr().err
    assert json.loads(report.read_text())["rows"] == [*same, last]
    checkpoint.write_json(report, {})
    with pytest.raises(SystemExit):
        table1("--num_clips", 3, "--resume")
    assert f"{report} has another protocol: detector was None, is i3d" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["soon", "0", "100", "tts v3", "1 cfg", "2 1.5"])
def test_unknown_samplers(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args(["fvd", "--sampler", name])
    assert f'--sampler {name}: must be 1 to 99 steps' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tts", "tts printed", "tts v1", "1 cfg 1.5"])
def test_samplers_of_students_need_a_student(name, capsys):
    """A teacher has steps only: it would ignore the rest of the name."""
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args(["fvd", "--sampler", name])
    line, = capsys.readouterr().err.splitlines()
    assert f"--sampler {name}: must be 1 to 99 steps, or for a --student tts" in line
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
    assert np.isfinite(evaluate.interval(a, b))


def test_tables_name_runs_and_samplers_that_exist():
    rows = tables.SHIPPED + tables.TABLE1 + [row for rows in tables.TABLE2.values() for row in rows]
    for run, name, paper in rows:
        if (run, name, paper) != tables.FLOOR:
            assert run in ("teacher", "shipped") or run in tables.RUNS
            evaluate.parse_sampler(name, run == "teacher", (1.0, 3.0))
    for stage in (1, 2):
        flags = " ".join(flags[stage - 1] or "" for flags in tables.RUNS.values()).split()
        scripts = [(ROOT / name).read_text() for name in (f"train_stage{stage}.py", "support/engine.py")]
        for flag in flags:
            assert not flag.startswith("--") or any(f'flag("{flag}"' in script for script in scripts), flag


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


def test_readme_tables_come_from_the_results(tmp_path):
    row = {"run": "osv", "sampler": "1", "seed": 0, "steps": 1, "nfe": 1, "paper": 335.36, "fvd": 40.0,
           "interval": 4.0, "seconds": 0.01, "sharpness": 1.0, "diversity": 0.1, "motion": 0.9,
           "first_psnr": 31.0}
    teacher = {**row, "run": "teacher", "nfe": 16}
    rows = [row, {**row, "seed": 1, "fvd": 50.0}, {**teacher, "sampler": "1", "fvd": 59.0},
            {**teacher, "sampler": "2", "fvd": 58.0}, {**teacher, "sampler": "8", "fvd": 31.0},
            {**row, "run": "real", "sampler": "other futures", "nfe": 0}]
    report = {"protocol": {"clips": 3}, "command": "python evaluate.py", "device": "cpu", "date": "today"}
    results = tmp_path / "results"
    checkpoint.write_json(results / "table1.json", report | {"rows": rows})
    checkpoint.write_json(results / "table2.json", report | {"rows": [{**row, "sampler": "tts"}]})
    checkpoint.write_json(results / "student.json", report | {"rows": rows})
    (tmp_path / "README.md").write_text("before\n<!-- table1 -->\nstale\n<!-- end -->\nafter\n"
                                        "<!-- table2 -->\n<!-- end -->\n<!-- orderings -->\n<!-- end -->\n")
    readme.main(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- table1 -->\n|") and "stale" not in text and "clips 3" in text
    assert "\nafter\n<!-- table2 -->\n|" in text and "<!-- end -->\n<!-- orderings -->\n|" in text
    assert "| osv | 1 | 1 | 45.0 (36.0 to 54.0) | 335.36 | 0.010 | 1.00 | 0.100 | 0.90 | 31.0 |" in text
    for letter, paper in zip("abcdeh", 5 * [171.15] + [181.95]):        # the same row in each part
        assert f"| {letter}: osv | tts | 1 | 40.0 (36.0 to 44.0) | {paper} | " in text
    for steps, fvd, verdict in ((1, "59.0 (55.0 to 63.0)", "yes"), (8, "31.0 (27.0 to 35.0)", "the reverse"),
                                (2, "58.0 (54.0 to 62.0)", "not told apart")):
        line = f"| one step beats {steps} of the teacher | 45.0 (36.0 to 54.0) | {fvd} | {verdict} |"
        assert line in text, text
    readme.main(tmp_path)
    assert (tmp_path / "README.md").read_text() == text                     # a second run changes nothing
    with Image.open(results / "table1_nfe.png") as picture:
        assert picture.size == (700, 420) and len(picture.convert("RGB").getcolors(100_000)) > 3


def test_orderings_are_of_rows_that_the_tables_have():
    rows = tables.TABLE1 + [row for rows in tables.TABLE2.values() for row in rows]
    measured = {f"{run}, {name}" for run, name, _ in rows}
    assert len(readme.ORDERINGS) == 16
    assert all({f"osv, {name}", other} <= measured for _, name, other in readme.ORDERINGS)


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


@pytest.mark.parametrize("words, complaint", [
    ([], "usage: python -m tools.plot METRICS.jsonl OUT.png"),
    (["nowhere.jsonl", "plot.png"], "usage: python -m tools.plot METRICS.jsonl OUT.png"),
    (["empty.jsonl", "plot.png"], "empty.jsonl: no numbers in it"),
])
def test_plot_fails_with_one_line(words, complaint, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", *words])
    with pytest.raises(SystemExit, match="2"):
        plot.main()
    said = capsys.readouterr().err
    assert complaint in said and len(said.splitlines()) == 1


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)             # as if it were not installed
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    with pytest.raises(SystemExit, match="2"):
        plot.plot(tmp_path / "metrics.jsonl", tmp_path / "plot.png")
    said = capsys.readouterr().err
    assert "matplotlib is missing" in said and len(said.splitlines()) == 1


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
