"""Shared by all tests: the import path, no network, one thread, one seed, small random networks."""
import gc
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                     # before any import that reads it
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"                    # two threads on busy cores cost 100x at this size
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"               # read when a kernel is defined

from forked import forking_python  # noqa: E402

import model  # noqa: E402

torch.set_num_threads(1)                               # where torch was imported before the variable was set


def pytest_collection_modifyitems(items):
    """With `-n`, a file's tests stay together: the files that take long go first, so that no worker is left
    with one of them at the end."""
    long = ["test_training", "test_norm", "test_commands", "test_toy", "test_discriminator", "test_video"]
    items.sort(key=lambda item: long.index(item.path.stem) if item.path.stem in long else len(long))


def pytest_collection_finish():
    """What has been imported stays: the garbage collector need not look through it again and again."""
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """What runs our scripts as a user's `python` does, without seconds of imports each."""
    with forking_python(tmp_path_factory.mktemp("bin")) as path:
        yield path


def relative_error(actual, expected):
    """|actual - expected| / |expected|, Euclidean norms in fp64."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_close_relative(actual, expected, tolerance=1e-5):
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.0e}"


@torch.no_grad()
def randomize(net):
    """Random weights that keep the signal's scale and give each parameter a say, biases and mixers too. The
    same ones whatever the memory layout, which normal_ would follow."""
    for name, parameter in net.named_parameters():
        mean, std = 0.0, 0.2
        if parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5
        elif "mix_factor" in name:
            std = 1.0
        else:
            mean = float("norm" in name and name.endswith("weight"))
        parameter.copy_(torch.empty(parameter.shape).normal_(mean, std))
    return net.eval()


def unet_config(channels=(64, 96), **changes):
    """A small unet/config.json: SVD's block types for any number of levels. (With 32 channels, one per group
    of a GroupNorm, the bias of the convolution before it has no effect: hence 64.)"""
    cross = len(channels) - 1                                                   # levels with attention
    return {
        "block_out_channels": channels, "layers_per_block": 1, "num_attention_heads": 2,
        "cross_attention_dim": 24, "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 48,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * cross + ("DownBlockSpatioTemporal",),
        "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * cross,
        "num_frames": 4, "sample_size": 16, **changes}


def vae_config(channels=(32, 32, 64, 64), **changes):
    """A small vae/config.json."""
    return {"block_out_channels": channels, "layers_per_block": 1, "sample_size": 128,
            "down_block_types": ("DownEncoderBlock2D",) * len(channels), **changes}


def small_image_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    return randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=224,
        patch_size=32, projection_dim=24)))


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A whole pipeline folder in the diffusers layout, with small random networks. Read only."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    model.save_unet(randomize(model.UNet(**unet_config())), folder / "unet")
    model.save_vae(randomize(model.VAE(**vae_config())), folder / "vae")
    small_image_encoder().save_pretrained(folder / "image_encoder")
    model.save_configs(folder)
    return folder
