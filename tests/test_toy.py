"""toy/train.py makes a pipeline folder, also when interrupted; the toy detector and the Frechet distance."""
import json
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, unet_config
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import data
import evaluate
import model
from support.checkpoint import save_network
from toy import world

TINY = ["--quick", "--device", "cpu", "--size", "32", "--vae_steps", "2", "--image_encoder_steps", "4",
        "--dinov2_steps", "2", "--i3d_steps", "2", "--unet_steps", "2",
        "--log_every", "1", "--num_frames", "4", "--report_clips", "4"]


def train_toy(python, folder, *flags):
    command = [*python, "-m", "toy.train", *TINY, "--output_dir", str(folder), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    assert evaluate.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 3.0])
    assert evaluate.frechet_distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-6)
    # For commuting covariances the distance is that of the standard deviations. Whiten first,
    # so that the sample moments are exact.
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    std = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 0.0])
    assert evaluate.frechet_distance(x, x * std) == pytest.approx((1 - std).square().sum().item(), rel=1e-6)
    few = torch.randn(4, 20, generator=generator)                   # singular covariances
    assert evaluate.frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    assert evaluate.frechet_distance(x, x * 2 + 1) == pytest.approx(evaluate.frechet_distance(x * 2 + 1, x))


def test_detector_on_and_off_the_disk(tmp_path):
    detector = evaluate.VideoClassifier(world.NUM_ATTRIBUTES, channels=(8, 8, 16, 16), size=32).eval()
    save_network(detector, tmp_path / "i3d")
    loaded = evaluate.load_detector(tmp_path / "i3d")
    pixels = torch.rand(2, 3, 6, 32, 32) * 255
    with torch.no_grad():
        logits = loaded(pixels, rescale=True, resize=True, return_features=True)
        assert logits.shape == (2, world.NUM_ATTRIBUTES)
        assert torch.equal(logits, detector(pixels))
        torch.testing.assert_close(loaded(pixels / 127.5 - 1, rescale=False), logits, rtol=1e-4, atol=1e-5)
        assert loaded(torch.rand(1, 3, 14, 50, 40) * 255).shape == (1, world.NUM_ATTRIBUTES)     # resized
    frames = torch.rand(3, 6, 3, 32, 32) * 2.4 - 1.2
    features = evaluate.video_features(loaded, frames, batch_size=2)
    torch.testing.assert_close(features, evaluate.video_features(loaded, frames), rtol=1e-4, atol=1e-5)


def test_torchscript_detector(tmp_path):
    class Means(nn.Module):                                         # I3D's signature
        def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = True):
            return x.mean(dim=[2, 3, 4])

    torch.jit.script(Means()).save(str(tmp_path / "i3d_torchscript.pt"))
    detector = evaluate.load_detector(tmp_path / "i3d_torchscript.pt")
    features = evaluate.video_features(detector, torch.ones(2, 4, 3, 8, 8))
    assert torch.equal(features, torch.full((2, 3), 255.0))


@pytest.fixture(scope="module")
def toy(python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    run = train_toy([python], folder)
    assert run.returncode == 0, run.stderr
    return folder


def test_all_stages_make_folders_that_load(toy):
    unet, vae, image_encoder = model.load_unet(toy), model.load_vae(toy), model.load_image_encoder(toy)
    detector = evaluate.load_detector(toy / "i3d")
    from transformers import Dinov2Model
    dino = Dinov2Model.from_pretrained(toy / "dinov2")
    frames = world.toy_clips(0, torch.arange(1), 4, 32).frames
    with torch.no_grad():
        latents = vae.encode(frames[0])[None]
        cond = model.encode_condition(
            vae, image_encoder, frames[:, 0], torch.zeros(1, 3, 32, 32), num_frames=4, fps=data.FPS,
            motion_bucket_id=127, noise_aug_strength=0.02)
        x = torch.cat((latents, cond.image_latents), dim=2)
        F_x = unet(x, torch.zeros(1), cond.image_embeds, cond.time_ids)
        tokens = dino(pixel_values=torch.zeros(1, 3, 126, 126)).last_hidden_state
    assert F_x.shape == latents.shape == (1, 4, 4, 4, 4) and tokens.shape == (1, 82, 96)
    assert evaluate.video_features(detector, frames).shape == (1, world.NUM_ATTRIBUTES)
    assert all(F_x.isfinite().flatten()) and vae.config["scaling_factor"] != 0.18215
    for name in ("model_index.json", "scheduler/scheduler_config.json",
                 "feature_extractor/preprocessor_config.json"):
        json.loads((toy / name).read_text())
    assert not list((toy / ".train").rglob("*.safetensors"))        # checkpoints of finished stages are gone


def test_report(toy):
    report = json.loads((toy / ".train" / "report.json").read_text())
    assert [row["steps"] for row in report["teacher"]] == [25, 8, 2, 1, 25, 8]
    assert set(report["stages"]) == {"vae", "image_encoder", "dinov2", "i3d", "unet"}
    assert report["vae_psnr"] > 0
    for name in ("reconstructions", "samples"):
        sheet = Image.open(toy / ".train" / f"report_{name}.jpg").convert("L")
        rows = np.array_split(np.asarray(sheet)[:-1], sheet.height // 17)       # 32 pixels and a gap, halved
        assert len(rows) >= 8 and max((row > 250).mean() for row in rows) < 0.5     # no clip is white
    log = [json.loads(line) for line in (toy / "train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if entry["stage"] == "unet" and "loss" in entry] == [1, 2]


def test_interrupted_training_goes_on_where_it_stopped(python, toy, tmp_path):
    train = partial(train_toy, [python], tmp_path, "--stages", "image_encoder")
    run = train("--time_limit", "0")
    assert run.returncode == 3 and "stopped after step 1 of 4" in run.stdout
    assert not (tmp_path / "image_encoder").exists()
    other = train("--image_encoder_lr", "0.1")
    assert other.returncode == 2 and "other settings" in other.stderr and "Traceback" not in other.stderr
    run = train()
    assert run.returncode == 0, run.stderr
    whole, parts = (load_file(folder / "image_encoder" / "model.safetensors") for folder in (toy, tmp_path))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert "image_encoder: finished already; --overwrite trains it again" in train().stdout


def test_a_network_is_trained_again_and_replaced(python, toy, tmp_path):
    """The stray folder of a killed run is cleared, and the log has a torn line."""
    shutil.copytree(toy, tmp_path / "toy")
    stray = tmp_path / "toy/.train/i3d/.finished.part"
    stray.mkdir(parents=True)
    (stray / "left_behind").touch()
    with open(tmp_path / "toy/train_log.jsonl", "a") as log:
        log.write('{"stage": "i3d", "fini\n')
    before = (toy / "i3d/model.safetensors").read_bytes()
    run = train_toy([python], tmp_path / "toy", "--stages", "i3d", "report", "--overwrite", "--i3d_lr", "0.1")
    assert run.returncode == 0 and "1 damaged lines" in run.stderr, run.stderr
    assert {file.name for file in (tmp_path / "toy/i3d").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "toy/i3d/model.safetensors").read_bytes() != before
    assert {path.name for path in (tmp_path / "toy/.train").iterdir()} == {
        "report.json", "report_reconstructions.jpg", "report_samples.jpg"}


def test_a_unet_of_another_model_is_refused(python, toy, tmp_path):
    shutil.copytree(toy, tmp_path / "toy")
    save_network(model.UNet(**unet_config((32, 64))), tmp_path / "other/unet")
    flags = "--stages", "unet", "--overwrite", "--unet_init", str(tmp_path / "other")
    (checkpointed := tmp_path / "toy/.train/unet/checkpoint-0000001").mkdir(parents=True)
    run = train_toy([python], tmp_path / "toy", *flags)
    assert run.returncode == 2 and "image embeddings" in run.stderr and "Traceback" not in run.stderr
    assert checkpointed.exists()                    # --overwrite deletes nothing before the check
    assert train_toy([python], tmp_path / "toy", *flags[:3]).returncode == 0 and not checkpointed.exists()


@pytest.mark.parametrize("flags, says", [
    ("--size 33", "--size must be a multiple of 16"),
    ("--vae_channels 32 32 48 32", "channels must be multiples of 32"),
    ("--unet_channels 32 32 32", "--unet_attention must have 3 values"),
    ("--num_clips 0", "--num_clips"), ("--num_frames 1", "--num_frames"),
    ("--vae_lr nan", "--vae_lr"), ("--unet_steps 0", "--unet_steps"),
    ("--device cuda", "--device cuda"), ("--train_log /dev/null/log.jsonl", "/dev/null"),
    ("--output_dir /dev/null/toy", "/dev/null/toy")])
def test_bad_flags_are_one_line_before_anything_is_trained(python, tmp_path, flags, says):
    run = train_toy([python], tmp_path / "toy", *flags.split())
    assert run.returncode == 2 and says in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr
    assert not run.stdout and not list(tmp_path.rglob("*.safetensors"))


def test_two_processes_share_the_unet_s_batch(python, toy, tmp_path):
    """Each process has its own clips and half of the batch; rank 0 writes. The UNet has another shape."""
    shutil.copytree(toy, tmp_path / "toy", ignore=shutil.ignore_patterns("unet", ".train"))
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    train = partial(train_toy, torchrun, tmp_path / "toy", "--stages", "unet")
    run = train("--unet_channels", "64", "32", "--unet_attention", "0", "1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("unet: finished") == 1
    assert model.load_unet(tmp_path / "toy").config["down_block_types"] == [
        "DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"]
    run = train("--overwrite", "--unet_batch_size", "3")
    assert run.returncode and "--unet_batch_size 3 does not divide by 2 processes" in run.stderr
