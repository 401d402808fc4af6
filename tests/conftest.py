"""What all tests share: the import path, no network, one thread, a fixed seed, small random networks."""
import gc
import os
import signal
import sys
from contextlib import suppress
from functools import cache
from inspect import getmembers
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                     # before any import that reads it
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"                    # for small tensors more threads are far slower
# A shell lets `make test &` ignore Ctrl-C. The commands that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                          # model.py and the rest, support, toy, tools

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"               # read when a kernel is defined

from forked import forking_python  # noqa: E402

import model  # noqa: E402

torch.set_num_threads(1)                               # the variable comes late if torch was there


def quicken_interpreter(interpreter):
    """Triton's interpreter exchanges the functions of triton.language before each launch, and again at each
    call of a function inside a kernel. It finds them in a list of all members, which takes a millisecond.
    Their names do not change, so here they are listed once."""
    is_builtin = interpreter.tl.core.is_builtin
    names = cache(lambda owner: [name for name, member in getmembers(owner) if is_builtin(member)])

    def patch_builtin(owner, builder, scope):
        for name in names(owner):
            if is_builtin(member := getattr(owner, name)):      # if not, it has been exchanged
                interpreter._patch_attr(owner, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


if os.environ.get("TRITON_INTERPRET"):
    with suppress(ImportError):
        from triton.runtime import interpreter
        quicken_interpreter(interpreter)


def pytest_collection_modifyitems(items):
    """The files that take longest run first: with `-n` a file's tests stay on one worker, and a long file at
    the end would leave the other workers idle."""
    long = ["test_training", "test_tour", "test_commands", "test_kernels", "test_evaluate",
            "test_exercise_mutations", "test_grade", "test_video", "test_pipeline", "test_ecosystem",
            "test_toy", "test_lora", "test_model"]
    items.sort(key=lambda item: long.index(item.path.stem) if item.path.stem in long else len(long))


def pytest_collection_finish():
    """Takes everything imported so far out of the garbage collector, which would scan it again and again."""
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter):
    """Students who forget OSV_IMPL would take the repository's points for their own."""
    if "test_exercises" in sys.modules and not os.environ.get("OSV_IMPL"):
        terminalreporter.write_line("tests/test_exercises.py graded the repository's own functions; "
                                    "`python exercises/grade.py` grades yours")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """Path of an executable that runs a script as `python` does, without seconds of imports (forked.py)."""
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
    """Fills a network with random weights that keep the scale of the signal, and returns it in eval mode.

    Every parameter influences the output, biases and mixing factors included. Values are drawn into a
    contiguous tensor first: normal_ follows the memory layout, so channels-last weights would differ.
    """
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
    """A small unet/config.json with SVD's block types, for any number of levels.

    64 channels at least: with 32, GroupNorm has one channel per group and removes the bias of the convolution
    before it, so a test could not see that bias.
    """
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
    """A CLIP image encoder of transformers, small and random."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    return randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=224,
        patch_size=32, projection_dim=24)))


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A complete pipeline folder in the diffusers layout, with small random networks. Tests must not write to
    it: it is made once per session."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    model.save_unet(randomize(model.UNet(**unet_config())), folder / "unet")
    model.save_vae(randomize(model.VAE(**vae_config())), folder / "vae")
    small_image_encoder().save_pretrained(folder / "image_encoder")
    model.save_configs(folder)
    return folder
