"""The samplers against closed forms, and the command line of sampler.py with good and bad input."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close_relative
from einops import rearrange
from forked import excepthook
from PIL import Image
from safetensors.torch import load_file
from test_media import picture

import model
import sampler
from model import Cond
from sampler import decode, draw_noise, sample, sample_teacher, time_travel
from solver import NUM_SIGMAS, karras_sigmas, precondition, strided
from support.checkpoint import ModelError
from support.kernels import fast
from support.media import fit_image, load_image

ROOT = Path(__file__).resolve().parent.parent


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def cond_of(num_clips, num_frames=3):
    return Cond(torch.zeros(num_clips, 1, 4), torch.zeros(num_clips, num_frames, 4, 4, 4),
                torch.zeros(num_clips, 3))


class Recorder:
    """A network whose consistency function is f(x, sigma) = fn(x, sigma). It records its inputs."""

    def __init__(self, fn):
        self.fn, self.calls = fn, []

    def __call__(self, x, c_noise, image_embeds, time_ids):
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1, 1)
        c_skip, c_out, c_in, _ = precondition(sigma)
        x_t = x[:, :, :4] / c_in
        self.calls.append((x_t, sigma))
        return (self.fn(x_t, sigma) - c_skip * x_t) / c_out


def gaussian(mean, std):
    """The exact consistency function of data N(mean, std^2): where the ODE from (x, sigma) ends."""
    return lambda x, sigma: mean + (x - mean) * std / (std ** 2 + sigma ** 2).sqrt()


# ---- samplers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_k_steps_draw_from_the_data_distribution(k):
    net = Recorder(gaussian(0.5, 0.3))
    x0 = sample(net, cond_of(400), strided(karras_sigmas(NUM_SIGMAS), k), generators(*range(400)))
    assert len(net.calls) == k
    assert abs(x0.mean() - 0.5) < 0.01 and abs(x0.std() - 0.3) < 0.01


def test_each_step_starts_at_its_noise_level():
    sigmas = strided(karras_sigmas(NUM_SIGMAS), 4)
    net = Recorder(lambda x, sigma: torch.zeros_like(x))
    sample(net, cond_of(50), sigmas, generators(*range(50)))
    for (x_t, sigma), expected in zip(net.calls, sigmas):
        assert torch.allclose(sigma, expected, rtol=1e-5)
        assert abs(x_t.std() / expected - 1) < 0.03
    first, second = net.calls[0][0] / sigmas[0], net.calls[1][0] / sigmas[1]
    assert abs((first * second).mean()) < 0.03                          # fresh noise in each step


@pytest.mark.parametrize("tts", [False, True])
def test_a_clip_does_not_depend_on_its_batch(tts):
    net, sigmas = Recorder(gaussian(0.1, 0.5)), strided(karras_sigmas(NUM_SIGMAS), 2)
    together = sample(net, cond_of(3), sigmas, generators(7, 8, 9), tts)
    alone = [sample(net, cond_of(1), sigmas, generators(seed), tts) for seed in (7, 8, 9)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], together[1])


def test_time_travel_is_equation_13():
    """Both readouts against the paper's equation written out term by term, with a nonlinear network."""
    fn = lambda x, sigma: torch.tanh(x / (1 + sigma)) + 0.1 * sigma.log()
    cond, (sigma_t, sigma_s, _) = cond_of(2), strided(karras_sigmas(NUM_SIGMAS), 2)
    gens = generators(1, 2)
    noise = [torch.stack([torch.randn(3, 4, 4, 4, generator=g) for g in gens])
             for _ in range(2)]                                                 # for x_t, then eps_0
    x_t = sigma_t * noise[0]
    f = fn(x_t, sigma_t)
    eps = 0.5 * (noise[1] + (x_t - f) / sigma_t)
    x_s = f + sigma_s * eps
    f_s = fn(x_s, sigma_s)
    eps_t = 0.5 * (noise[1] + (x_s - f_s) / sigma_s)
    s, t = precondition(sigma_s), precondition(sigma_t)
    printed = t.c_skip * (f_s + sigma_t * eps_t) + t.c_out * (f_s - s.c_skip * x_s) / s.c_out

    net = Recorder(fn)
    look_ahead = time_travel(net, cond, sigma_t, sigma_s, generators(1, 2))
    assert len(net.calls) == 2
    # The network returns F in fp32, and f is computed from it at sigma 700, which loses three digits.
    torch.testing.assert_close(look_ahead, f_s, rtol=0, atol=5e-4)
    as_printed = time_travel(net, cond, sigma_t, sigma_s, generators(1, 2), "printed")
    torch.testing.assert_close(as_printed, printed, rtol=0, atol=5e-4)


def test_time_travel_as_first_printed_is_nearly_deterministic():
    """v1's Eq. 11 adds no noise between its evaluations, and its result hardly depends on the first noise."""
    net, (sigma_t, sigma_s, _) = Recorder(gaussian(0.0, 0.5)), strided(karras_sigmas(NUM_SIGMAS), 2)
    v1 = time_travel(net, cond_of(100), sigma_t, sigma_s, generators(*range(100)), "v1")
    v2 = time_travel(net, cond_of(100), sigma_t, sigma_s, generators(*range(100)))
    assert v1.std() < 0.05 < 0.3 < v2.std()


def test_teacher_reaches_the_end_of_the_ode():
    # The denoiser of data N(0.5, 0.5^2).
    net = Recorder(lambda x, sigma: (0.25 * x + sigma ** 2 * 0.5) / (0.25 + sigma ** 2))
    x0 = sample_teacher(net, cond_of(200), karras_sigmas(200), generators(*range(200)))
    assert abs(x0.mean() - 0.5) < 0.02 and abs(x0.std() - 0.5) < 0.02
    assert len(net.calls) == 200


def test_guidance_grows_over_the_frames():
    """The unconditional half of the batch has no image; with w the result is uncond + w (cond - uncond)."""
    class Net:
        def __call__(self, x, c_noise, image_embeds, time_ids):
            c = precondition((4 * c_noise).exp().view(-1, 1, 1, 1, 1))
            f = image_embeds.mean((1, 2)).view(-1, 1, 1, 1, 1)
            return (f - c.c_skip * x[:, :, :4] / c.c_in) / c.c_out
    cond = cond_of(1, num_frames=5)._replace(image_embeds=torch.ones(1, 1, 4))
    x0 = sample_teacher(Net(), cond, karras_sigmas(3), generators(0), guidance=(1, 3.0))
    torch.testing.assert_close(x0.mean((0, 2, 3, 4)), torch.linspace(1, 3, 5), rtol=0, atol=1e-3)


def test_noise_is_the_same_in_any_batch():
    batch = draw_noise((3, 2, 2), generators(1, 2, 3), "cpu")
    assert torch.equal(batch[1:2], draw_noise((1, 2, 2), generators(2), "cpu"))
    with pytest.raises(AssertionError, match="2 generators for 3 clips"):
        draw_noise((3, 2), generators(1, 2), "cpu")


def test_decode_unscales_and_keeps_clips_apart():
    vae = model.VAE(block_out_channels=(32, 32), scaling_factor=0.5).eval()
    x0 = torch.randn(2, 4, 4, 8, 8)
    frames = decode(vae, x0)                                                    # 2 4 3 16 16
    for n in range(2):
        with torch.no_grad():
            alone = vae.decode(x0[n] / 0.5, num_frames=4).clamp(-1, 1)
        torch.testing.assert_close(frames[n], alone, rtol=0, atol=1e-5)
    assert decode(vae, x0, decode_chunk_size=3).shape == frames.shape


# ---- the command line -----------------------------------------------------------------------------------


@pytest.fixture
def run(python):
    return lambda *args: subprocess.run([python, ROOT / "sampler.py", *map(str, args)], capture_output=True,
                                        text=True)


def test_the_student_that_ships(run, tmp_path):
    """Two seeds for one picture, with the weights in assets/: both videos begin with the picture, move, end
    as sharp as it is, and differ from each other."""
    done = run("--image", ROOT / "assets" / "input.png", "--num_videos", 2, "--out", tmp_path / "out.png",
               "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "1-step student with Time Travel Sampler, network evaluations: 2" in done.stdout
    assert "toy model: it knows moving shapes, not photographs" in done.stderr
    assert "wrote" in done.stdout and "memory" in done.stdout
    sheets = torch.from_numpy(np.stack([Image.open(tmp_path / f"out_{i}.png") for i in range(2)]))
    frames = rearrange(sheets[:, 2:-2, 2:] / 127.5 - 1, "b h (f w) c -> b f c h w", f=14)[..., :-2]
    image, _ = fit_image(load_image(ROOT / "assets" / "input.png"), 128, 128)
    edges = lambda x: x.diff(dim=-1).abs().mean((-3, -2, -1))
    assert ((frames[:, 0] - image).square().mean((1, 2, 3)) < 2e-3).all()       # 33 dB
    sharpness = edges(frames[:, -1]) / edges(image)
    assert ((0.75 < sharpness) & (sharpness < 1.25)).all()
    assert (frames[:, -1] - frames[:, 0]).abs().mean((1, 2, 3)).min() > 2 / 127.5
    assert (frames[0] - frames[1]).abs().mean() > 0.02


def test_several_pictures_have_seeds_of_their_own(run, tmp_path, pipeline_folder):
    """A folder is several pictures. The second video equals, bit for bit, a run with its seed alone."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        picture(64, 64).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not a picture")
    common = ["--model", pipeline_folder, "--steps", 2, "--max_guidance_scale", 1, "--device", "cpu"]
    both = run("--image", folder, "--out", tmp_path / "v.png", "--seed", 4, *common)
    second = run("--image", folder / "b.png", "--out", tmp_path / "alone.png", "--seed", 5, *common)
    assert both.returncode == second.returncode == 0
    a, b, alone = (np.asarray(Image.open(tmp_path / name)) for name in ("v_a.png", "v_b.png", "alone.png"))
    assert np.array_equal(b, alone) and not np.array_equal(a, b)


@pytest.mark.parametrize("args, message", [
    (["--image", "missing.png"], "missing.png: cannot be read"),
    (["--image", "text.png", "missing.png"], "missing.png: cannot be read"),
    (["--image", "in.png", "--out", "in.png"], "in.png: would overwrite in.png"),
    (["--image", "empty/../in.png", "--out", "link.png"], "link.png: would overwrite empty/../in.png"),
    (["--image", "in.png", "--out", "a.png", "--gallery", "in.png"], "in.png: would overwrite in.png"),
    (["--image", "in.png", "--out", "a.png", "--gallery", "empty/../a.png"], "a.png: would overwrite a.png"),
    (["--image", "in.png", "--student", "net", "--save_latents", "--out", "net/w.mp4"],
     "net/w.safetensors: would overwrite net/w.safetensors"),
    (["--image", "in.png", "--student", "net/w.safetensors", "--save_latents", "--out", "net/w.gif"],
     "net/w.safetensors: would overwrite net/w.safetensors"),
    (["--image", "in.png", "--out", "text.png/out.mp4"], "text.png/out.mp4"),
    (["--image", "in.png", "--gallery", "text.png/out.png"], "text.png/out.png"),
    (["--image", "in.png", "--out", "folder.mp4"], "folder.mp4: cannot be written"),
    (["--image", "text.png"], "text.png: cannot be read"),
    (["--image", "cut.png"], "cut.png: cannot be read"),
    (["--image", "empty"], "no pictures in this folder"),
    (["--image", "in.png", "--out", "out.avi"], "must end in .mp4 or .gif or .png"),
    (["--image", "in.png", "--stepz", "4"], "unrecognized arguments: --stepz"),
    (["--image", "in.png", "--step", "4"], "unrecognized arguments: --step"),
    (["--image", "in.png", "--steps", "four"], "invalid int value: 'four'"),
    (["--image", "in.png", "--steps", "0"], "argument --steps: 0 is not between 1 and 1000"),
    (["--image", "in.png", "--motion_bucket_id", "999"], "999 is not between 1 and 255"),
    (["--image", "in.png", "--motion_bucket_id", "0"], "0 is not between 1 and 255"),
    (["--image", "in.png", "--noise_aug_strength", "nan"], "nan is not between 0.0 and 10.0"),
    (["--image", "in.png", "--model", "no/such/folder"], "no such folder"),
    (["--image", "in.png", "--model", "empty"], "expected the diffusers layout"),
    (["--image", "in.png", "--student", "empty"], "expected the diffusers layout"),
    (["--image", "in.png", "--device", "tpu"], "--device tpu: not available here; use"),
    (["--image", "in.png", "--device", "cpu:7"], "--device cpu:7: not available here; use"),
    (["--image", "in.png", "--teacher", "--student", "net"], "--teacher does not go with --student"),
    (["--image", "in.png", "--teacher", "--tts"], "--tts: the Time Travel Sampler is for a student"),
    (["--image", "in.png", "--model", "empty", "--tts"], "--tts: the Time Travel Sampler is for a student"),
    (["--image", "in.png", "--out", "keep.mp4", "--num_videos", "2"], "keep_1.mp4: cannot be written"),
    (["--image", "in.png", "--out", "a.mp4", "--save_latents"], "a.safetensors: cannot be written"),
    (["--image", "in.png", "--offload", "--cuda_graph"], "--offload does not go with --cuda_graph"),
    (["--image", "in.png", "--tts", "--steps", "4"], "in place of one step"),
    (["--image", "in.png", "--student", "net", "--steps", "101"], "a student has 100 noise levels"),
    (["--image", "in.png", "--student", str(sampler.STUDENT.parent / "unet")],
     "its cross_attention_dim is 64, that of --model is 24"),
    ([], "required: --image"),
])
def test_bad_input_is_one_line_and_status_2(pipeline_folder, tmp_path, monkeypatch, capsys, args, message):
    """In this process: importing torch in a new one for each case would take a minute."""
    picture().save(tmp_path / "in.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "in.png").read_bytes()[:60])
    for folder in ("empty", "net", "folder.mp4", "keep_1.mp4", "a.safetensors"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link.png").symlink_to("in.png")
    (tmp_path / "out.mp4").write_bytes(b"earlier")
    (tmp_path / "net" / "w.safetensors").write_bytes(b"earlier")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampler, "TOY", pipeline_folder)
    monkeypatch.setattr(sys, "argv", ["sampler.py", *args])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as stop, excepthook():
        sampler.main()
    complaint = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in complaint[-1] and complaint[-1].startswith("sampler.py: ")
    assert [line for line in complaint[:-1] if not line.startswith(("toy model", "left out"))] == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_bad_pictures_cost_only_themselves(pipeline_folder, tmp_path, monkeypatch, capsys):
    """A video for each other picture, with the seed that it has beside readable ones, and exit status 2."""
    (tmp_path / "in").mkdir()
    for name in ("b", "d"):
        picture(64, 64).save(tmp_path / "in" / f"{name}.png")
    for name in ("a", "c"):
        (tmp_path / "in" / f"{name}.png").write_text("hello")
    argv = ["--image", tmp_path / "in", "--model", pipeline_folder, "--steps", 1, "--max_guidance_scale", 1,
            "--device", "cpu", "--out", tmp_path / "v.png", "--gallery", tmp_path / "g.png"]
    monkeypatch.setattr(sys, "argv", ["sampler.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        sampler.main()
    printed = capsys.readouterr()
    left_out = [line for line in printed.err.splitlines() if "cannot be read" in line]
    assert stop.value.code == 2 and len(left_out) == 3
    assert left_out[-1] == "sampler.py: pictures left out, because they cannot be read: 2"
    assert "v_b.png" in printed.out and "seed 1," in printed.out and "seed 3," in printed.out
    assert {file.name for file in tmp_path.iterdir()} == {"in", "v_b.png", "v_d.png", "g.png"}


def test_nothing_readable_is_noticed_before_networks_are_loaded(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("hello")
    monkeypatch.setattr(sampler, "load_networks", lambda *_: pytest.fail("networks were loaded"))
    monkeypatch.setattr(sys, "argv", ["sampler.py", "--image", str(tmp_path), "--out", f"{tmp_path}/o.png"])
    with pytest.raises(ModelError, match="a.png: cannot be read"):
        sampler.main()


def test_every_video_has_a_file_of_its_own(tmp_path, monkeypatch):
    """With pictures and seeds whose names look alike, in a folder that is made."""
    for name in ("a", "a_1", "x/a", "a_1_2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / f"{name}.png")
    images = [str(tmp_path / f"{name}.png") for name in ("a", "a_1", "x/a", "a_1_2")]
    for num_videos in (1, 3):
        args = sampler.parse_args(["--image", *images, "--out", f"{tmp_path}/new/o.mp4", "--seed", "1",
                                   "--num_videos", str(num_videos)])
        videos = sampler.plan_videos(args)
        assert len({out for _, _, out in videos}) == len(videos) == 4 * num_videos
        assert [seed for _, seed, _ in videos] == [*range(1, 1 + 4 * num_videos)]
        assert [str(path) for path, _, _ in videos[::num_videos]] == images
    assert list((tmp_path / "new").iterdir()) == []


def test_every_flag_is_explained_and_read(capsys):
    """Each flag has help text, and the program reads it."""
    source = (ROOT / "sampler.py").read_text()
    with pytest.raises(SystemExit):
        sampler.parse_args(["--help"])
    text = capsys.readouterr().out
    flags = {line.split()[0].rstrip(",") for line in text.splitlines() if line.strip().startswith("--")}
    assert {"--image", "--steps", "--tts", "--seed", "--decode_chunk_size", "--plain"} <= flags
    for flag in flags - {"--no_tts"}:
        assert f"args.{flag[2:]}" in source, f"{flag} is never read"


def test_plain_networks_make_the_same_video(pipeline_folder, tmp_path, monkeypatch):
    """--plain loads the layers of model.py, and without it they have the classes of support/kernels.py. The
    latents agree to rounding."""
    picture(64, 64).save(tmp_path / "in.png")
    kept = []
    monkeypatch.setattr(sampler, "fast", lambda net: kept.append(net) or fast(net))
    latents = []
    for name, flags in (("fast", []), ("plain", ["--plain"])):
        argv = ["--image", tmp_path / "in.png", "--model", pipeline_folder, "--steps", 2, "--device", "cpu",
                "--save_latents", "--out", tmp_path / f"{name}.png", *flags]
        monkeypatch.setattr(sys, "argv", ["sampler.py", *map(str, argv)])
        sampler.main()
        latents.append(load_file(tmp_path / f"{name}.safetensors")["latents"])
    assert [type(net) for net in kept] == [model.UNet, model.VAE]       # --plain does not call it
    assert_close_relative(latents[0], latents[1], 1e-4)


def test_sheets_of_large_clips_are_reduced(tmp_path, monkeypatch):
    sheets, clips = sampler.Sheets.__new__(sampler.Sheets), torch.zeros(1, 2, 3, 288, 512)
    sheets.vae, sheets.fixed_rows, sheets.draw = None, [clips, clips], lambda *_, **__: None
    monkeypatch.setattr(sampler, "decode", lambda *_: clips)
    sheets.save(tmp_path, 3, 7)
    with Image.open(tmp_path / "sample-000003.png") as sheet:
        assert 2 * 256 <= sheet.width < 2 * 260 and 4 * 144 <= sheet.height < 4 * 148
