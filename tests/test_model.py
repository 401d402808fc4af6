"""model.py against diffusers and PEFT: same keys, same numbers, same files; and what bad files say."""
import contextlib
import copy
import json
import math
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import huggingface_hub
import huggingface_hub.errors as hub_errors
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_close_relative,
    randomize,
    relative_error,
    small_image_encoder,
    unet_config,
    vae_config,
)
from diffusers import AutoencoderKLTemporalDecoder as DiffusersVAE
from diffusers import StableVideoDiffusionPipeline
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from diffusers.loaders import PeftAdapterMixin
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import clip
import model

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

CROSS_DOWN, DOWN = "CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"
CROSS_UP, UP = "CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"

UNETS = {
    "smallest": unet_config((32, 64)),
    "like SVD": unet_config((64, 64, 96, 96), layers_per_block=2, num_attention_heads=(1, 2, 4, 4)),
    "narrowing": unet_config((96, 32, 64), num_attention_heads=4, in_channels=6, out_channels=3),
    "layers per level": unet_config((64, 96, 32), layers_per_block=[1, 3, 2], cross_attention_dim=[24] * 3),
    "two transformer layers": unet_config(transformer_layers_per_block=2, num_attention_heads=[4, 8]),
    "transformer layers per level": unet_config((32, 64, 64), transformer_layers_per_block=[2, 1, 3]),
    "attention below": unet_config(down_block_types=(DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, UP)),
}
VAES = {
    "smallest": vae_config((64, 96)),
    "SVD's two layers": vae_config((64, 64, 96, 96), layers_per_block=2),
    "three layers, wide latents": vae_config((64, 32, 96), layers_per_block=3, latent_channels=8),
}


def unet_pair(config=UNETS["smallest"]):
    """Our UNet and diffusers' with the same random weights."""
    theirs = randomize(DiffusersUNet(**config))
    ours = model.UNet(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def vae_pair(config=VAES["smallest"]):
    theirs = randomize(DiffusersVAE(**config))
    ours = model.VAE(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def unet_inputs(b=2, f=3, h=8, w=16, channels=8):
    """x, c_noise, image_embeds, time_ids with different conditions for each clip."""
    return torch.randn(b, f, channels, h, w), torch.randn(b), torch.randn(b, 1, 24), 100 * torch.rand(b, 3)


def diffusers_unet(net, x, c_noise, image_embeds, time_ids):
    return net(x, c_noise, encoder_hidden_states=image_embeds, added_time_ids=time_ids).sample


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------
# The networks are SVD's


@pytest.mark.parametrize("ours, theirs, svd, count", [
    (model.UNet, DiffusersUNet, {"num_frames": 14, "sample_size": 96}, 1_524_623_082),
    (model.VAE, DiffusersVAE, {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768,
        "down_block_types": ("DownEncoderBlock2D",) * 4}, 97_742_847)], ids=["unet", "vae"])
def test_full_size_defaults_have_svds_parameters_and_norms(ours, theirs, svd, count):
    with torch.device("meta"):                                                  # shapes only, no memory
        ours, theirs = ours(), theirs(**svd)
    shapes = [{key: tensor.shape for key, tensor in net.state_dict().items()} for net in (ours, theirs)]
    norms = [{name: (isinstance(module, nn.GroupNorm), module.eps, getattr(module, "num_groups", None))
              for name, module in net.named_modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))}
             for net in (ours, theirs)]
    assert shapes[0] == shapes[1] and norms[0] == norms[1]
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in theirs.config.items()}
    assert {key: config.get(key) for key in ours.config} == ours.config


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("b, f, h, w", [(3, 5, 8, 16), (1, 1, 16, 8)])
@torch.no_grad()
def test_unet_computes_what_diffusers_computes(name, b, f, h, w):
    """fp32 keeps 6e-8 per operation; after the hundred layers of these networks about 1e-6 is left."""
    ours, theirs = unet_pair(UNETS[name])
    inputs = unet_inputs(b, f, h, w, UNETS[name].get("in_channels", 8))
    assert_close_relative(ours(*inputs), diffusers_unet(theirs, *inputs))


@torch.no_grad()
def test_unet_differs_from_diffusers_by_rounding_only():
    """In fp64 the two agree a billion times better: no small difference hides under the noise of fp32."""
    ours, theirs = unet_pair(UNETS["two transformer layers"])
    inputs = [tensor.double() for tensor in unet_inputs()]
    assert_close_relative(ours.double()(*inputs), diffusers_unet(theirs.double(), *inputs), 1e-13)


def test_unet_gradients_are_those_of_diffusers():
    """All but those of the query path of the one-token attention: zero there, absent here. In fp64, because
    the gradient of a mix factor is the small sum of many large terms."""
    ours, theirs = (net.double() for net in unet_pair(unet_config()))
    theirs.set_default_attn_processor()                                         # plain softmax: exact zeros
    inputs, weight = [tensor.double() for tensor in unet_inputs()], torch.randn(2, 3, 4, 8, 16)
    (ours(*inputs) * weight).sum().backward()
    (diffusers_unet(theirs, *inputs) * weight).sum().backward()
    references = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if re.search(r"transformer_blocks\.\d+\.(attn2\.to_[qk]|norm2)\.", name):
            assert parameter.grad is None and references[name].grad.abs().max() == 0, name
        else:
            assert relative_error(parameter.grad, references[name].grad) < 1e-10, name


@torch.no_grad()
def test_unet_treats_each_clip_of_a_batch_alone():
    """Each clip has its own noise level, image and ids, in its temporal layers too."""
    net, inputs = randomize(model.UNet(**UNETS["smallest"])), unet_inputs(3)
    together = net(*inputs)
    for i in range(3):
        assert_close_relative(together[i:i + 1], net(*(tensor[i:i + 1] for tensor in inputs)), 2e-6)
        for j in range(1, 4):                                                   # and each of them matters
            changed = [t.roll(1, 0) if k == j else t for k, t in enumerate(inputs)]
            assert relative_error(net(*changed)[i], together[i]) > 1e-3


@torch.no_grad()
def test_unet_sees_the_order_of_the_frames():
    net, (x, *rest) = randomize(model.UNet(**UNETS["smallest"])), unet_inputs(1, 4)
    assert relative_error(net(x.flip(1), *rest).flip(1), net(x, *rest)) > 1e-2


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("b, f, height, width", [(2, 3, 16, 32), (1, 1, 32, 16)])
@torch.no_grad()
def test_vae_computes_what_diffusers_computes(name, b, f, height, width):
    ours, theirs = vae_pair(VAES[name])
    frames = torch.rand(b * f, 3, height, width) * 2 - 1
    posterior = theirs.encode(frames).latent_dist
    mean, logvar = ours.moments(frames)
    assert_close_relative(mean, posterior.mean)
    assert_close_relative(logvar, posterior.logvar)
    assert torch.equal(ours.encode(frames), mean)
    latents = torch.randn_like(mean)
    assert_close_relative(ours.decode(latents, f), theirs.decode(latents, num_frames=f).sample)


@torch.no_grad()
def test_vae_clamps_the_log_variance():
    ours, theirs = vae_pair()
    for net in (ours, theirs):
        net.quant_conv.weight.mul_(100)
    frames = torch.rand(1, 3, 32, 32)
    _, logvar = ours.moments(frames)
    assert logvar.min() == -30 and logvar.max() == 20
    assert_close_relative(logvar, theirs.encode(frames).latent_dist.logvar)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4), (5, 3), (6, 8)])
def test_upsampling_folded_into_its_convolution_is_the_same(height, width):
    """Borders, too: exactly, but for the order of sums. And LoRA stays what it is."""
    net, x = randomize(model.Upsample(6)).double(), torch.randn(2, 6, height, width).double().requires_grad_()
    folded = model.FoldedUpsample(6).double()
    folded.load_state_dict(net.state_dict())
    grad, results = torch.randn(2, 6, 2 * height, 2 * width).double(), []
    for up in (net, folded):
        y = up(x)
        results.append((y, *torch.autograd.grad(y, (x, *up.parameters()), grad)))
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert relative_error(results[0][0], net.conv(doubled)) < 1e-14
    for one, other in zip(*results):
        assert one.shape == other.shape and relative_error(one, other) < 1e-14
    net.conv = model.lora_beside(net.conv, 2, 2)
    nn.init.normal_(net.conv.lora_B.weight)
    assert relative_error(net(x), net.conv(doubled)) < 1e-14


def test_folded_weights_are_rounded_once():
    net = randomize(model.FoldedUpsample(16))
    exact = copy.deepcopy(net.bfloat16()).double()
    torch.testing.assert_close(net.folded(), exact.folded().bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("frames_at_once", [1, 4, 100])
def test_vae_enlarges_a_few_frames_at_a_time(frames_at_once, monkeypatch):
    """Memory, not numbers; with a gradient all at once."""
    net, latents = randomize(model.VAE(**vae_config())), torch.randn(6, 4, 4, 5)
    whole = net.decode(latents, 3)                                                          # with a gradient
    seen = []
    for block in net.decoder.up_blocks[1:]:
        block.resnets[0].spatial_res_block.register_forward_hook(
            lambda module, args, out: seen.append((len(out), out.shape[-1])))
    monkeypatch.setattr(model, "PIXELS_AT_ONCE", frames_at_once * 32 * 40)              # of the last level
    with torch.no_grad():
        assert_close_relative(net.decode(latents, 3), whole, 2e-6)
    last = [count for count, width in seen if width == 40]
    assert last == {1: [1] * 6, 4: [4, 2], 100: [6]}[frames_at_once]


@torch.no_grad()
def test_vae_decodes_the_frames_of_a_clip_together_and_clips_apart():
    net, latents = randomize(model.VAE(**VAES["smallest"])), torch.randn(6, 4, 8, 8)
    frames = net.decode(latents, 3)
    assert_close_relative(frames[3:], net.decode(latents[3:], 3), 2e-6)
    assert relative_error(frames, net.decode(latents, 1)) > 1e-2


def test_sizes_that_do_not_fit_are_refused():
    unet, vae = model.UNet(**UNETS["like SVD"]), model.VAE(**vae_config())
    with pytest.raises(AssertionError, match="not a multiple of 8"):
        unet(*unet_inputs(h=8, w=12))
    with pytest.raises(AssertionError, match="not a multiple of 8"):
        vae.encode(torch.zeros(1, 3, 64, 60))
    with pytest.raises(AssertionError, match="not whole clips"):
        vae.decode(torch.zeros(5, 4, 8, 8), num_frames=2)
    x, c_noise, image_embeds, time_ids = unet_inputs()
    with pytest.raises(AssertionError, match="image_embeds"):
        unet(x, c_noise, image_embeds.repeat(1, 2, 1), time_ids)


@torch.no_grad()
def test_attention_to_one_token_is_a_linear_map_of_it():
    """Softmax over a single key is 1: full attention gives for every query what ours gives once per clip."""
    theirs = randomize(diffusers.models.attention.Attention(32, cross_attention_dim=24, heads=4, dim_head=8))
    ours = model.ContextAttention(32, 24)
    ours.load_state_dict(theirs.state_dict())
    queries, context = torch.randn(2, 50, 32), torch.randn(2, 1, 24)
    expected = theirs(queries, encoder_hidden_states=context)
    assert_close_relative(ours(context).expand(2, 50, 32), expected, 1e-6)


@torch.no_grad()
def test_vae_decoder_compiles_as_one_graph():
    """No graph break: what torch.compile gets is the whole decoder, and computes the same."""
    net, latents = randomize(model.VAE(**VAES["smallest"])), torch.randn(3, 4, 8, 8)
    compiled = torch.compile(net.decode, backend="eager", fullgraph=True)
    assert_close_relative(compiled(latents, 3), net.decode(latents, 3), 1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
@torch.no_grad()
def test_half_precision_networks_take_and_give_fp32(dtype, tolerance):
    """Rounding is 2^-9 in bf16 and 2^-12 in fp16; a few times that is left at the output of a network."""
    unet, vae = randomize(model.UNet(**UNETS["smallest"])), randomize(model.VAE(**VAES["smallest"]))
    inputs, frames, latents = unet_inputs(), torch.rand(3, 3, 32, 32), torch.randn(3, 4, 8, 8)
    expected = unet(*inputs), vae.encode(frames), vae.decode(latents, 3)
    unet, vae = unet.to(dtype), vae.to(dtype)
    for actual, exact in zip((unet(*inputs), vae.encode(frames), vae.decode(latents, 3)), expected):
        assert actual.dtype == torch.float32
        assert 1e-5 < relative_error(actual, exact) < tolerance                 # 1e-5: not in fp32


# ---------------------------------------------------------------------------------------------------------
# Files: written here, read by diffusers, and the other way round

NETWORKS = {
    "unet": (model.UNet, UNETS["smallest"], model.save_unet, model.load_unet, DiffusersUNet),
    "vae": (model.VAE, VAES["smallest"], model.save_vae, model.load_vae, DiffusersVAE)}
LOADERS = {"unet": model.load_unet, "vae": model.load_vae, "image_encoder": model.load_image_encoder}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("variant, dtype", [(None, torch.float32), ("fp16", torch.float16)])
def test_diffusers_saves_and_we_load(tmp_path, name, variant, dtype):
    """Whole, in shards, and in half precision; found in the network's folder or the pipeline's."""
    _, config, _, load, cls = NETWORKS[name]
    theirs = randomize(cls(**config)).to(dtype)
    for i, shard_size in enumerate(("10GB", "200KB")):
        theirs.save_pretrained(tmp_path / str(i) / name, variant=variant, max_shard_size=shard_size)
        assert (len(list((tmp_path / str(i) / name).glob("*.safetensors"))) > 1) == (i == 1)
        for folder in (tmp_path / str(i), str(tmp_path / str(i) / name)):
            ours = load(folder, variant=variant, dtype=dtype)
            assert not ours.training and same_weights(ours, theirs)
            assert all(parameter.dtype == dtype for parameter in ours.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_we_save_and_diffusers_loads(tmp_path, name):
    ours, config, save, load, cls = NETWORKS[name]
    ours = randomize(ours(**config))
    save(ours, tmp_path)
    theirs, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert same_weights(ours, theirs)
    written = json.loads((tmp_path / "config.json").read_text())
    assert all(theirs.config[key] == value for key, value in written.items() if not key.startswith("_"))
    assert same_weights(load(tmp_path), ours)
    save(ours, tmp_path, torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_image_encoder_is_that_of_transformers(tmp_path, hidden_act):
    """OpenCLIP's, which SVD has, uses gelu, OpenAI's quick_gelu. Old files have positions in them."""
    config = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3,
                  image_size=56, patch_size=14, projection_dim=24, hidden_act=hidden_act, layer_norm_eps=1e-3)
    theirs = randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(**config))).eval()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours, pixels = model.load_image_encoder(tmp_path), torch.randn(3, 3, 56, 56)
    assert_close_relative(ours(pixels), theirs(pixels).image_embeds)
    model.save_image_encoder(ours, tmp_path / "out", torch.float16, "fp16")
    back = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out", variant="fp16")
    assert back.dtype == torch.float16 and same_weights(back, ours.half())


def test_full_size_image_encoder_has_transformers_keys():
    """CLIP ViT-H/14, 632 million weights."""
    config = CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14,
                              num_attention_heads=16, projection_dim=1024, hidden_act="gelu")
    with torch.device("meta"):
        ours, theirs = model.CLIPVision(**config.to_dict()), CLIPVisionModelWithProjection(config)
    shapes = lambda net: {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert shapes(ours) == shapes(theirs) and sum(p.numel() for p in ours.parameters()) == 632_076_800


@torch.no_grad()
def test_image_encoder_round_trip(tmp_path):
    theirs, pixels = small_image_encoder(), torch.randn(1, 3, 224, 224)
    for i, options in enumerate(({}, {"max_shard_size": "20KB"}, {"variant": "fp16"})):
        theirs.save_pretrained(tmp_path / str(i) / "image_encoder", **options)
        ours = model.load_image_encoder(tmp_path / str(i), variant=options.get("variant"))
        assert not ours.training and same_weights(ours, theirs)
        assert_close_relative(ours(pixels), theirs(pixels).image_embeds, 1e-6)
    half = model.load_image_encoder(tmp_path / "0" / "image_encoder", dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())


def test_diffusers_opens_the_whole_pipeline_folder(pipeline_folder):
    pipeline = StableVideoDiffusionPipeline.from_pretrained(pipeline_folder)
    for name, load in LOADERS.items():
        assert same_weights(load(pipeline_folder), getattr(pipeline, name))
    scheduler = pipeline.scheduler.config
    assert (scheduler.sigma_min, scheduler.sigma_max) == (0.002, 700)
    assert scheduler.prediction_type == "v_prediction"
    extractor = pipeline.feature_extractor
    assert (tuple(extractor.image_mean), tuple(extractor.image_std)) == (clip.CLIP_MEAN, clip.CLIP_STD)
    assert extractor.resample == Image.Resampling.BICUBIC


def test_a_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    net = randomize(model.UNet(**UNETS["smallest"]))
    model.save_unet(net, tmp_path)
    before = load_file(tmp_path / WEIGHTS)

    def half_a_save(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_file", half_a_save)
    with pytest.raises(OSError, match="disk full"):
        model.save_unet(randomize(net), tmp_path)
    after = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be replaced there")
def test_a_save_replaces_the_file_at_once(tmp_path):
    """By a rename: whoever has the earlier file open, or mapped, keeps reading that."""
    net = randomize(model.UNet(**UNETS["smallest"]))
    model.save_unet(net, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with open(tmp_path / WEIGHTS, "rb") as reader:
        model.save_unet(randomize(net), tmp_path)
        assert reader.read() == before != (tmp_path / WEIGHTS).read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", WEIGHTS}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_no_second_copy(tmp_path):
    """An fp32 file loaded as bf16 may take half its size in memory and one tensor, not all of its size.
    Measured as a fresh process's own (anonymous) memory; pages of the mapped file are not counted."""
    config = unet_config((320, 384), cross_attention_dim=1024)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in model.UNet(**config).state_dict().items()}
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = """if True:
        import re, sys, threading, time
        import torch, model

        def own_megabytes():
            return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

        def watch():
            while not done:
                peaks.append(own_megabytes())
                time.sleep(0.001)

        done, peaks, before = [], [], own_megabytes()
        thread = threading.Thread(target=watch)
        thread.start()
        net = model.load_unet(sys.argv[1], dtype=torch.bfloat16)
        done.append(True)
        thread.join()
        print(max(peaks + [own_megabytes()]) - before, sum(p.nbytes for p in net.parameters()) / 2**20)
    """
    command = [sys.executable, "-c", script, tmp_path]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    growth, size = map(float, output.split())
    assert size > 100
    assert 0.8 * size < growth < 1.25 * size, f"{growth:.0f} MB to load {size:.0f} MB"


# ---------------------------------------------------------------------------------------------------------
# Files that cannot be used


@pytest.fixture
def saved(tmp_path):
    """A pipeline folder with a good unet/, to be broken."""
    model.save_unet(model.UNet(**UNETS["smallest"]), tmp_path / "unet")
    return tmp_path


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("conv_in.bias"), "key conv_in.bias is missing$"),
    (lambda t: [t.pop(f"conv_{end}.bias") for end in ("in", "out")], "conv_in.bias is missing, and 1 more"),
    (lambda t: t.update(surplus=torch.zeros(3)), "key surplus is not part of the UNet"),
    (lambda t: t.update({"conv_in.bias": torch.zeros(7)}), r"conv_in.bias has shape \(7,\), .* for \(32,\)")],
    ids=["missing", "two missing", "extra", "misshaped"])
def test_loading_is_strict_about_keys(saved, change, message):
    tensors = load_file(saved / "unet" / WEIGHTS)
    change(tensors)
    save_file(tensors, saved / "unet" / WEIGHTS)
    with pytest.raises(model.ModelError, match=message) as error:
        model.load_unet(saved)
    assert str(saved / "unet") in str(error.value)


@pytest.mark.parametrize("content", [
    lambda good: good[:len(good) // 2], lambda good: good[:5], lambda good: b"",
    lambda good: b"<html>404</html>" * 100, lambda good: good + b"tail"],
    ids=["half", "five bytes", "empty", "a web page", "too long"])
def test_broken_weights_name_the_file(saved, content):
    file = saved / "unet" / WEIGHTS
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(model.ModelError, match=f"{WEIGHTS}: not a readable safetensors file"):
        model.load_unet(saved)


def broken_config(**changes):
    return json.dumps({**UNETS["smallest"], **changes})


@pytest.mark.parametrize("content", ["{", "\x80", "[]", "7"])
def test_config_that_is_no_json_object_names_the_file(saved, content):
    (saved / "unet" / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(model.ModelError, match="config.json: not a (readable JSON|configuration of SVD's)"):
        model.load_unet(saved)


@pytest.mark.parametrize("change", [
    {"speed": 3}, {"block_out_channels": [33, 64]}, {"block_out_channels": []}, {"block_out_channels": None},
    {"in_channels": "8"}, {"in_channels": -8}, {"num_attention_heads": [2]}, {"num_attention_heads": 3},
    {"down_block_types": [CROSS_DOWN]}, {"down_block_types": ["DownBlock2D", DOWN]}], ids=str)
def test_config_of_another_network_names_the_file(saved, change):
    """Unknown and impossible settings, and lists that do not match the number of levels."""
    file = saved / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(model.ModelError, match="config.json: not a configuration of SVD's UNet"):
        model.load_unet(saved)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "../nowhere", "/no/where", "no/where", "no/whe/re"])
def test_missing_folder_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(model.ModelError, match="no such folder"):
        model.load_unet(name)


def test_missing_files_say_what_to_do(saved):
    folder, weights = saved / "unet", saved / "unet" / WEIGHTS
    shard = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    with pytest.raises(model.ModelError, match="no vae/config.json .* expected the diffusers layout"):
        model.load_vae(saved)
    with pytest.raises(model.ModelError, match="no fp16 .safetensors weights"):
        model.load_unet(saved, variant="fp16")
    weights.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(model.ModelError, match="no .safetensors weights; there are fp16 .* ask for"):
        model.load_unet(saved)
    (folder / "diffusion_pytorch_model.fp16.safetensors").rename(shard)
    with pytest.raises(model.ModelError, match="unet: 1 of 3 weight shards are there: fetch all"):
        model.load_unet(saved)
    shard.unlink()
    with pytest.raises(model.ModelError, match="unet: no .safetensors weights$"):
        model.load_unet(saved)


def test_pickles_are_not_loaded(saved):
    """Opening a pickle can run any code, so one is not even opened."""
    (saved / "unet" / WEIGHTS).unlink()

    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("a pickle was opened",)

    torch.save(Bomb(), saved / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(model.ModelError, match="diffusion_pytorch_model.bin is a pickle.* convert it"):
        model.load_unet(saved)


def test_broken_image_encoder_is_one_sentence(tmp_path):
    def check(message, change=None, **files):
        folder = tmp_path / "image_encoder"
        small_image_encoder().save_pretrained(folder)
        for suffix, content in files.items():
            (folder / {"config": "config.json", "weights": "model.safetensors"}[suffix]).write_bytes(content)
        if change:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(model.ModelError, match=message):
            model.load_image_encoder(tmp_path)

    check("key visual_projection.weight is missing", lambda t: t.pop("visual_projection.weight"))
    check("image_encoder: key surplus is not", lambda t: t.update(surplus=torch.zeros(2)))
    check(r"weight has shape \(2, 2\)", lambda t: t.update({"visual_projection.weight": torch.zeros(2, 2)}))
    check("model.safetensors: not a readable", weights=b"garbage" * 100)
    check("config.json: not a readable", config=b"{")
    for config in (b"[]", b'{"hidden_size": "wide"}'):
        check("config.json: not a configuration of SVD's CLIPVision", config=config)


# ---------------------------------------------------------------------------------------------------------
# The hub, without the network

STEMS = {"unet": "unet/diffusion_pytorch_model", "vae": "vae/diffusion_pytorch_model",
         "image_encoder": "image_encoder/model"}
SHARDS = ("-00001-of-00002", "-00002-of-00002")
HUB_FILES = [f"{stem}{variant}{shard}.safetensors" for stem in STEMS.values() for variant in ("", ".fp16")
             for shard in ("", *SHARDS)]
HUB_FILES += [f"{name}/config.json" for name in STEMS]
HUB_FILES += ["model_index.json", "scheduler/scheduler_config.json", "README.md",
              "feature_extractor/preprocessor_config.json", "svd.safetensors"]


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_hub_fetches_one_network_in_one_variant(monkeypatch, pipeline_folder, name, variant):
    """Revision and file patterns reach the hub client, whose own filter then picks no gigabyte too many."""
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(pipeline_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with contextlib.suppress(model.ModelError):                                 # the folder has no fp16 files
        LOADERS[name]("owner/name", revision="v1.1", variant=variant)
    assert asked["repo_id"] == "owner/name" and asked["revision"] == "v1.1"
    fetched = huggingface_hub.utils.filter_repo_objects(HUB_FILES, allow_patterns=asked["allow_patterns"])
    suffix = ".fp16" if variant else ""
    assert set(fetched) == {f"{name}/config.json"} | {
        f"{STEMS[name]}{suffix}{shard}.safetensors" for shard in ("", *SHARDS)}


def test_hub_cache_is_used_offline_by_revision(monkeypatch, tmp_path):
    """Two revisions in a cache as huggingface_hub lays it out: each loads, with its own weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    nets = {}
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        nets[revision] = randomize(model.UNet(**UNETS["smallest"]))
        model.save_unet(nets[revision], repo / "snapshots" / commit / "unet")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    for options, revision in (({}, "main"), ({"revision": "v2"}, "v2"), ({"revision": "b" * 40}, "v2")):
        loaded = model.load_unet("owner/name", **options)
        assert torch.equal(loaded.conv_in.weight, nets[revision].conv_in.weight)
    with pytest.raises(model.ModelError, match="no vae/config.json"):
        model.load_vae("owner/name")
    with pytest.raises(model.ModelError, match="hub cannot be reached or does not have it"):
        model.load_unet("owner/name", revision="v3")


def test_unknown_hub_id_offline_is_one_sentence(monkeypatch):
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *_, **__: pytest.fail("network used although offline"))
    with pytest.raises(model.ModelError, match="no-owner/no-model: no such folder here, and the hub cannot"):
        model.load_unet("no-owner/no-model")


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize("error, message", [
    (hub_errors.GatedRepoError("403", response=RESPONSE), "accept its licence .* `hf auth login`"),
    (hub_errors.RepositoryNotFoundError("404", response=RESPONSE), "neither a folder here nor a model"),
    (hub_errors.RevisionNotFoundError("404", response=RESPONSE), "does not have it"),
    (hub_errors.HfHubHTTPError("500", response=RESPONSE), "hub cannot be reached"),
    (hub_errors.LocalEntryNotFoundError("offline"), "give a local folder, or go online once"),
    (hub_errors.HFValidationError("name"), "no such folder"),
    (hub_errors.HTTPError("proxy"), "hub cannot be reached"),
    (ConnectionError("cable"), "hub cannot be reached")], ids=lambda value: type(value).__name__)
def test_hub_errors_are_one_sentence(monkeypatch, error, message):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(model.ModelError, match=f"^owner/name: .*{message}") as caught:
        model.load_unet("owner/name")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# LoRA


with_convs = pytest.mark.parametrize(
    "targets", [model.LORA_TARGETS, model.LORA_CONVS], ids=["linear", "convs"])


def lora_unet(rank=4, alpha=2, targets=model.LORA_TARGETS):
    """(the network as it was, the network with a random LoRA)."""
    plain = randomize(model.UNet(**UNETS["smallest"]))
    net = model.add_lora(copy.deepcopy(plain), rank, alpha, targets)
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return plain, net


@with_convs
@torch.no_grad()
def test_fresh_lora_changes_nothing(targets):
    plain, inputs = randomize(model.UNet(**UNETS["smallest"])), unet_inputs()
    expected = plain(*inputs)
    assert torch.equal(model.add_lora(plain, 4, targets=targets)(*inputs), expected)


@with_convs
def test_lora_alone_is_trained(targets):
    plain, net = lora_unet(targets=targets)
    frozen = {name: parameter.clone() for name, parameter in net.named_parameters() if "lora_" not in name}
    assert {name for name, parameter in net.named_parameters() if parameter.requires_grad} == {
        f"{path}.lora_{m}.weight" for path in model.lora_layers(net) for m in "AB"}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    net(*unet_inputs()).square().mean().backward()
    for path, layer in model.lora_layers(net).items():
        assert layer.lora_A.weight.grad.abs().max() > 0 and layer.lora_B.weight.grad.abs().max() > 0, path
    optimizer.step()
    assert all(torch.equal(dict(net.named_parameters())[name], value) for name, value in frozen.items())


def test_lora_sits_on_every_linear_of_attention_and_feed_forward():
    """All but the query path of the one-token attention, which has no influence."""
    plain, net = lora_unet()
    expected = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)
                and any(part in name for part in (".attn1.", ".attn2.", ".ff.", ".ff_in."))
                and not name.endswith(("attn2.to_q", "attn2.to_k"))}
    assert set(model.lora_layers(net)) == expected
    with pytest.raises(model.ModelError, match="nothing to add LoRA to"):
        model.add_lora(plain, 2, targets="no_such_layer")
    # What LCM-LoRA's published adapters name, of a network that also has convolutions in time.
    ends = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv",
            "upsamplers.0.conv", "time_emb_proj")
    more = {name for name, module in plain.named_modules() if name.endswith(ends)}
    assert any("temporal_res_block.conv1" in name for name in more)
    assert set(model.lora_layers(lora_unet(targets=model.LORA_CONVS)[1])) == expected | more
    model.add_lora(plain, 2, targets=r"time_embedding\.linear_[12]")
    assert set(model.lora_layers(plain)) == {"time_embedding.linear_1", "time_embedding.linear_2"}


@with_convs
@torch.no_grad()
def test_merged_lora_computes_the_same_with_plain_keys(tmp_path, targets):
    plain, net = lora_unet(targets=targets)
    inputs = unet_inputs()
    expected = net(*inputs)
    assert relative_error(plain(*inputs), expected) > 0.1                       # else the rest shows nothing
    with pytest.raises(model.ModelError, match="merge_lora it first"):
        model.save_unet(net, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model.merge_lora(net)
    assert_close_relative(net(*inputs), expected)
    assert list(net.state_dict()) == list(plain.state_dict())
    model.save_unet(net, tmp_path)
    theirs = DiffusersUNet.from_pretrained(tmp_path)
    assert_close_relative(diffusers_unet(theirs, *inputs), expected)


@with_convs
@pytest.mark.parametrize("alpha", [2, 7.5])
@torch.no_grad()
def test_lora_round_trip(tmp_path, alpha, targets):
    plain, net = lora_unet(4, alpha, targets)
    inputs = unet_inputs()
    model.save_lora(net, tmp_path)
    assert set(load_file(tmp_path / model.LORA_FILE)) == {
        f"unet.{path}.lora_{m}.weight" for path in model.lora_layers(net) for m in "AB"}
    for path in (tmp_path, str(tmp_path), tmp_path / model.LORA_FILE):
        loaded = model.load_lora(copy.deepcopy(plain), path)
        assert torch.equal(loaded(*inputs), net(*inputs))
    model.save_lora(loaded, tmp_path / "again")
    assert torch.equal(model.load_lora(plain, tmp_path / "again")(*inputs), net(*inputs))


@torch.no_grad()
def test_bf16_network_with_lora_round_trip(tmp_path):
    """The network is bf16, what trains stays fp32, in the file too."""
    plain = randomize(model.UNet(**UNETS["smallest"])).bfloat16()
    net = model.add_lora(copy.deepcopy(plain), 4)
    for layer in model.lora_layers(net).values():
        nn.init.normal_(layer.lora_B.weight, std=0.2)
    assert {parameter.dtype for parameter in net.parameters() if parameter.requires_grad} == {torch.float32}
    model.save_lora(net, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / model.LORA_FILE).values()} == {torch.float32}
    inputs = unet_inputs()
    assert torch.equal(model.load_lora(plain, tmp_path)(*inputs), net(*inputs))
    before = net(*inputs)
    assert relative_error(model.merge_lora(net)(*inputs), before) < 0.05       # bf16 keeps 2^-9


class DiffusersLoraUNet(DiffusersUNet, PeftAdapterMixin):
    """diffusers gives its SVD UNet no LoRA loader; the one of its other models fits."""


@with_convs
@pytest.mark.parametrize("alpha", [2, 4])
@torch.no_grad()
def test_lora_files_are_shared_with_diffusers_and_peft(tmp_path, alpha, targets):
    """Ours loads there, what is saved there loads here, with the same scale alpha / rank."""
    plain, net = lora_unet(4, alpha, targets)
    inputs = unet_inputs()
    model.save_lora(net, tmp_path / "ours")
    theirs = DiffusersLoraUNet(**UNETS["smallest"]).eval()
    theirs.load_state_dict(plain.state_dict())
    theirs.load_lora_adapter(str(tmp_path / "ours"), prefix="unet", adapter_name="osv", use_safetensors=True)
    expected = net(*inputs)
    assert_close_relative(diffusers_unet(theirs, *inputs), expected)
    theirs.save_lora_adapter(str(tmp_path / "theirs"), adapter_name="osv")
    assert_close_relative(model.load_lora(plain, tmp_path / "theirs")(*inputs), expected)


@pytest.mark.parametrize("change, message", [
    (lambda t, last: t.pop(last), "{path}.* does not fit"),
    (lambda t, last: t.update({"unet.other.lora_A.weight": torch.zeros(4, 2)}), "other.* does not fit"),
    (lambda t, last: t.update({"unet.conv_in.lora_A.weight": torch.zeros(4, 2)}), "conv_in.* does not fit"),
    (lambda t, last: t.update({"unet.proj_in.bias": torch.zeros(4)}), "proj_in.bias"),
    (lambda t, last: t.update({last: torch.zeros(3, 5)}), r"{path}.lora_A and lora_B have shapes .*\(3, 5\)"),
    (lambda t, last: t.update({last: torch.tensor(1.0)}), "{path}.lora_A and lora_B have shapes"),
    (lambda t, last: t.clear(), "no LoRA")],
    ids=["half a pair", "unknown layer", "no linear layer", "no LoRA key", "misshaped", "a number", "empty"])
def test_lora_that_does_not_fit_names_the_key_and_changes_nothing(tmp_path, change, message):
    plain, net = lora_unet()
    model.save_lora(net, tmp_path)
    tensors = load_file(tmp_path / model.LORA_FILE)
    last = max(tensors)                                                         # so that all others were fine
    change(tensors, last)
    save_file(tensors, tmp_path / model.LORA_FILE)
    path = last.removeprefix("unet.").rsplit(".lora_", 1)[0].replace(".", r"\.")
    with pytest.raises(model.ModelError, match=f"{model.LORA_FILE}: .*{message.replace('{path}', path)}"):
        model.load_lora(plain, tmp_path)
    assert not model.lora_layers(plain)


@pytest.mark.parametrize("metadata, message", [
    ("{", "metadata"), ("[]", "metadata"), ('{"unet.lora_alpha": "large"}', "metadata"),
    ('{"unet.use_rslora": true}', "use_rslora, which is not supported"),
    ('{"alpha_pattern": {"to_q": 8}}', "alpha_pattern, which is not supported")])
def test_lora_of_unknown_scale_is_refused(tmp_path, metadata, message):
    plain, net = lora_unet()
    model.save_lora(net, tmp_path)
    file = tmp_path / model.LORA_FILE
    save_file(load_file(file), file, {"lora_adapter_metadata": metadata})
    with pytest.raises(model.ModelError, match=f"{model.LORA_FILE}: .*{message}"):
        model.load_lora(plain, tmp_path)


@torch.no_grad()
def test_lora_without_metadata_has_scale_one(tmp_path):
    """As in diffusers, alpha is the rank where nothing is said. Ranks may differ between layers."""
    plain, net = lora_unet(4, alpha=4)
    model.save_lora(net, tmp_path)
    tensors, inputs = load_file(tmp_path / model.LORA_FILE), unet_inputs()
    a = min(tensors)                                                            # a layer's .lora_A.weight
    b = a.replace("lora_A", "lora_B")
    for key, dim in ((a, 0), (b, 1)):                                           # rank 8, of which 4 are zeros
        tensors[key] = torch.cat([tensors[key], torch.zeros_like(tensors[key])], dim)
    save_file(tensors, tmp_path / model.LORA_FILE)
    loaded = model.load_lora(plain, tmp_path)
    assert_close_relative(loaded(*inputs), net(*inputs), 1e-6)
    with pytest.raises(model.ModelError, match=r"different \(rank, alpha\) \[\(4, 4\), \(8, 8\)\]"):
        model.save_lora(loaded, tmp_path / "again")


def test_lora_file_that_is_not_there_is_one_sentence(tmp_path):
    plain, _ = lora_unet()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.safetensors"):
        with pytest.raises(model.ModelError, match="not a readable safetensors file"):
            model.load_lora(plain, path)
    with pytest.raises(model.ModelError, match="call add_lora first"):
        model.save_lora(plain, tmp_path)


# ---------------------------------------------------------------------------------------------------------
# The image condition


@pytest.fixture(scope="module")
def pipeline(pipeline_folder):
    return StableVideoDiffusionPipeline.from_pretrained(pipeline_folder)


@pytest.mark.parametrize("width, height", [(64, 64), (128, 96), (1024, 576), (37, 500), (224, 224)])
@torch.no_grad()
def test_clip_embedding_is_that_of_the_diffusers_pipeline(pipeline_folder, pipeline, width, height):
    """From shrinking with blur in one or both axes to enlarging without."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]     # 1 3 H W
    expected = pipeline._encode_image(Image.fromarray(pixels), "cpu", 1, do_classifier_free_guidance=False)
    image_encoder = model.load_image_encoder(pipeline_folder)
    assert_close_relative(model.embed_image(image_encoder, images), expected, 2e-6)


@torch.no_grad()
def test_clip_embedding_of_tensors_is_that_of_the_diffusers_pipeline(pipeline_folder, pipeline):
    """diffusers takes tensors as 224 x 224 in [0, 1] and does not resize them. Ours are in [-1, 1], and
    resizing 224 to 224 changes nothing."""
    images = torch.rand(2, 3, 224, 224)
    expected = pipeline._encode_image(images, "cpu", 1, do_classifier_free_guidance=False)
    image_encoder = model.load_image_encoder(pipeline_folder)
    assert_close_relative(model.embed_image(image_encoder, images * 2 - 1), expected, 2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
@torch.no_grad()
def test_condition_of_half_precision_networks_is_fp32(pipeline_folder, dtype, tolerance):
    """Only the networks compute in half precision; the time ids keep 0.02 exactly as fp32 has it."""
    images, noise = torch.rand(2, 3, 64, 96) * 2 - 1, torch.randn(2, 3, 64, 96)
    conds = []
    for net_dtype in (torch.float32, dtype):
        nets = (load(pipeline_folder, dtype=net_dtype) for load in (model.load_vae, model.load_image_encoder))
        conds.append(model.encode_condition(*nets, images, noise, num_frames=3, fps=7, motion_bucket_id=127,
                                            noise_aug_strength=0.02))
    for exact, actual in zip(*conds):
        assert actual.dtype == torch.float32
        assert relative_error(actual, exact) < tolerance
    assert torch.equal(conds[1].time_ids, torch.tensor([[6, 127, 0.02]] * 2))


@torch.no_grad()
def test_condition_is_made_as_svd_makes_it(pipeline_folder):
    """Noise goes to the VAE's pixels alone; latents are the mode, unscaled, on each frame; fps is fps - 1."""
    vae, image_encoder = model.load_vae(pipeline_folder), model.load_image_encoder(pipeline_folder)
    images, noise = torch.rand(2, 3, 64, 96) * 2 - 1, torch.randn(2, 3, 64, 96)
    cond = model.encode_condition(vae, image_encoder, images, noise, num_frames=3, fps=25,
                                  motion_bucket_id=torch.tensor([1, 255]), noise_aug_strength=0.5)
    assert cond.image_latents.shape == (2, 3, 4, 8, 12) and cond.image_embeds.shape == (2, 1, 24)
    for frame in range(3):
        assert torch.equal(cond.image_latents[:, frame], vae.moments(images + 0.5 * noise)[0])
    assert torch.equal(cond.image_embeds, model.embed_image(image_encoder, images))
    assert torch.equal(cond.time_ids, torch.tensor([[24, 1, 0.5], [24, 255, 0.5]]))


def test_unconditional_forgets_the_image_alone():
    cond = model.Cond(torch.randn(2, 1, 8), torch.randn(2, 3, 4, 8, 8), torch.rand(2, 3))
    uncond = model.unconditional(cond)
    assert not uncond.image_embeds.any() and not uncond.image_latents.any()
    assert torch.equal(uncond.time_ids, cond.time_ids) and cond.image_embeds.any()


def test_sinusoid_is_cosines_then_sines():
    """cos and sin of x 10000^(-i / half), written out in fp64."""
    x = torch.tensor([0.0, 1.0, -1.55, 127.0])
    angles = [[value * 10000 ** (-i / 8) for i in range(8)] for value in x.tolist()]
    expected = torch.tensor([[*map(math.cos, row), *map(math.sin, row)] for row in angles])
    torch.testing.assert_close(model.sinusoid(x, 16), expected, rtol=0, atol=2e-5)  # 127 is known to 8e-6


def test_checkpointing_changes_no_gradient():
    """In fp64: what is computed twice is the same, but where a tensor is used three times, by a skip
    connection and twice in the next layer, its gradients are added in another order. And none is lost where
    only LoRA trains, so that no input of the first layer wants one."""
    unet, inputs, results = unet_pair()[0].double(), [x.double() for x in unet_inputs()], []
    for targets in (None, model.LORA_TARGETS):
        if targets:
            model.add_lora(unet.requires_grad_(False), 2, targets=targets)
        results = []
        for on in (False, True):
            unet.zero_grad()
            unet.set_checkpointing(on)
            out = unet(*inputs)
            out.square().sum().backward()
            results.append([out.detach()] + [p.grad for p in unet.parameters() if p.requires_grad])
        assert len(results[0]) > 100 and torch.equal(results[0][0], results[1][0])
        for plain, checkpointed in zip(*results):
            torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-9)
