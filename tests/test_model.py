"""model.py against diffusers and transformers: keys, numbers, gradients; and the conditions of a clip."""
import math
import re

import diffusers
import numpy as np
import pytest
import torch
from conftest import assert_close_relative, randomize, relative_error, unet_config, vae_config
from diffusers import AutoencoderKLTemporalDecoder as DiffusersVAE
from diffusers import StableVideoDiffusionPipeline
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import lora
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
UNUSED = r"transformer_blocks\.\d+\.(attn2\.to_[qk]|norm2)\."       # see model.ContextAttention


def unet_pair(config=UNETS["smallest"]):
    """Our UNet and that of diffusers, with the same random weights."""
    theirs = randomize(DiffusersUNet(**config))
    ours = model.UNet(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def vae_pair(config=VAES["smallest"]):
    """Our VAE and that of diffusers, with the same random weights."""
    theirs = randomize(DiffusersVAE(**config))
    ours = model.VAE(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def unet_inputs(b=2, f=3, h=8, w=16, channels=8):
    """x, c_noise, image_embeds, time_ids with different conditions for each clip."""
    return torch.randn(b, f, channels, h, w), torch.randn(b), torch.randn(b, 1, 24), 100 * torch.rand(b, 3)


def diffusers_unet(net, x, c_noise, image_embeds, time_ids):
    """The output of a UNet of diffusers for the arguments of ours."""
    return net(x, c_noise, encoder_hidden_states=image_embeds, added_time_ids=time_ids).sample


def same_weights(a, b):
    """Whether two networks have the same keys and, bit for bit, the same tensors."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------
# UNet


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
    """One operation in fp32 has a relative error of 6e-8. A hundred layers add up to about 1e-6."""
    ours, theirs = unet_pair(UNETS[name])
    inputs = unet_inputs(b, f, h, w, UNETS[name].get("in_channels", 8))
    assert_close_relative(ours(*inputs), diffusers_unet(theirs, *inputs))


@torch.no_grad()
def test_unet_differs_from_diffusers_by_rounding_only():
    """In fp64 the two agree a billion times better, so fp32 rounding does not hide a small difference."""
    ours, theirs = unet_pair(UNETS["two transformer layers"])
    inputs = [tensor.double() for tensor in unet_inputs()]
    assert_close_relative(ours.double()(*inputs), diffusers_unet(theirs.double(), *inputs), 1e-13)


def test_unet_gradients_are_those_of_diffusers():
    """In fp64, because the gradient of a mix factor is the small sum of many large terms. The query path of
    the attention to one token has gradient zero in diffusers and none here."""
    ours, theirs = (net.double() for net in unet_pair(unet_config()))
    theirs.set_default_attn_processor()                                         # plain softmax: exact zeros
    inputs, weight = [tensor.double() for tensor in unet_inputs()], torch.randn(2, 3, 4, 8, 16)
    (ours(*inputs) * weight).sum().backward()
    (diffusers_unet(theirs, *inputs) * weight).sum().backward()
    references = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if re.search(UNUSED, name):
            assert parameter.grad is None and references[name].grad.abs().max() == 0, name
        else:
            assert relative_error(parameter.grad, references[name].grad) < 1e-10, name


@torch.no_grad()
def test_unet_computes_each_clip_of_a_batch_independently():
    """Each clip has its own noise level, image and ids, in temporal layers too."""
    net, inputs = randomize(model.UNet(**UNETS["smallest"])), unet_inputs(3)
    together = net(*inputs)
    for i in range(3):
        assert_close_relative(together[i:i + 1], net(*(tensor[i:i + 1] for tensor in inputs)), 2e-6)
        for j in range(1, 4):                                                   # each condition has an effect
            changed = [t.roll(1, 0) if k == j else t for k, t in enumerate(inputs)]
            assert relative_error(net(*changed)[i], together[i]) > 1e-3


@torch.no_grad()
def test_unet_depends_on_the_order_of_frames():
    net, (x, *rest) = randomize(model.UNet(**UNETS["smallest"])), unet_inputs(1, 4)
    assert relative_error(net(x.flip(1), *rest).flip(1), net(x, *rest)) > 1e-2


@torch.no_grad()
def test_attention_to_one_token_is_a_linear_map_of_it():
    """Softmax over a single key is 1: full attention gives every query what ours gives once per clip."""
    theirs = randomize(diffusers.models.attention.Attention(32, cross_attention_dim=24, heads=4, dim_head=8))
    ours = model.ContextAttention(32, 24)
    ours.load_state_dict(theirs.state_dict())
    queries, context = torch.randn(2, 50, 32), torch.randn(2, 1, 24)
    expected = theirs(queries, encoder_hidden_states=context)
    assert_close_relative(ours(context).expand(2, 50, 32), expected, 1e-6)


def test_sinusoid_is_cosines_then_sines():
    """cos and sin of x 10000^(-i / half), computed in fp64."""
    x = torch.tensor([0.0, 1.0, -1.55, 127.0])
    angles = [[value * 10000 ** (-i / 8) for i in range(8)] for value in x.tolist()]
    expected = torch.tensor([[*map(math.cos, row), *map(math.sin, row)] for row in angles])
    torch.testing.assert_close(model.sinusoid(x, 16), expected, rtol=0, atol=2e-5)  # fp32 has 127 to 8e-6


@pytest.mark.parametrize("targets", [None, lora.LORA_TARGETS], ids=["all weights", "LoRA"])
def test_checkpointing_changes_no_gradient(targets):
    """In fp64. Outputs are bitwise equal. Gradients of a tensor with several uses are added in another order.

    With LoRA, no input of the first layer requires a gradient. Reentrant checkpointing alone would then drop
    the gradients of that layer.
    """
    unet, inputs, results = unet_pair()[0].double(), [x.double() for x in unet_inputs()], []
    if targets:
        lora.add_lora(unet, 2, targets=targets)
    for on in (False, True):
        unet.zero_grad()
        unet.set_checkpointing(on)
        out = unet(*inputs)
        out.square().sum().backward()
        results.append([out.detach()] + [p.grad for p in unet.parameters() if p.requires_grad])
    assert len(results[0]) > 100 and torch.equal(results[0][0], results[1][0])
    for plain, checkpointed in zip(*results):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------
# VAE


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


@torch.no_grad()
def test_vae_decodes_frames_of_a_clip_together_and_clips_independently():
    net, latents = randomize(model.VAE(**VAES["smallest"])), torch.randn(6, 4, 8, 8)
    frames = net.decode(latents, 3)
    assert_close_relative(frames[3:], net.decode(latents[3:], 3), 2e-6)
    assert relative_error(frames, net.decode(latents, 1)) > 1e-2


# ---------------------------------------------------------------------------------------------------------
# UNet and VAE


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


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
@torch.no_grad()
def test_half_precision_networks_take_and_return_fp32(dtype, tolerance):
    """One rounding has a relative error of 2^-9 in bf16 and 2^-12 in fp16. A network adds up several."""
    unet, vae = randomize(model.UNet(**UNETS["smallest"])), randomize(model.VAE(**VAES["smallest"]))
    inputs, frames, latents = unet_inputs(), torch.rand(3, 3, 32, 32), torch.randn(3, 4, 8, 8)
    expected = unet(*inputs), vae.encode(frames), vae.decode(latents, 3)
    unet, vae = unet.to(dtype), vae.to(dtype)
    for actual, exact in zip((unet(*inputs), vae.encode(frames), vae.decode(latents, 3)), expected):
        assert actual.dtype == torch.float32
        assert 1e-5 < relative_error(actual, exact) < tolerance                 # 1e-5: not computed in fp32


# ---------------------------------------------------------------------------------------------------------
# Image encoder


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_image_encoder_computes_what_transformers_computes(tmp_path, hidden_act):
    """SVD's encoder is from OpenCLIP, which uses gelu. OpenAI's CLIP uses quick_gelu. Old files also hold
    position_ids, a constant."""
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


def test_full_size_image_encoder_has_the_keys_of_transformers():
    """CLIP ViT-H/14, 632 million parameters."""
    config = CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14,
                              num_attention_heads=16, projection_dim=1024, hidden_act="gelu")
    with torch.device("meta"):
        ours, theirs = model.ImageEncoder(**config.to_dict()), CLIPVisionModelWithProjection(config)
    shapes = lambda net: {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert shapes(ours) == shapes(theirs) and sum(p.numel() for p in ours.parameters()) == 632_076_800


@pytest.fixture(scope="module")
def pipeline(pipeline_folder):
    return StableVideoDiffusionPipeline.from_pretrained(pipeline_folder)


@pytest.mark.parametrize("width, height", [(64, 64), (128, 96), (1024, 576), (37, 500), (224, 224)])
@torch.no_grad()
def test_image_embedding_is_that_of_the_diffusers_pipeline(pipeline_folder, pipeline, width, height):
    """Images that are reduced with blur along one axis or both, and images that are enlarged without."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]     # 1 3 H W
    expected = pipeline._encode_image(Image.fromarray(pixels), "cpu", 1, do_classifier_free_guidance=False)
    image_encoder = model.load_image_encoder(pipeline_folder)
    assert_close_relative(model.embed_image(image_encoder, images), expected, 2e-6)


@torch.no_grad()
def test_image_embedding_of_tensors_is_that_of_the_diffusers_pipeline(pipeline_folder, pipeline):
    """diffusers takes tensors as 224 x 224 in [0, 1] and does not resize them. Ours are in [-1, 1], and a
    resize from 224 to 224 changes nothing."""
    images = torch.rand(2, 3, 224, 224)
    expected = pipeline._encode_image(images, "cpu", 1, do_classifier_free_guidance=False)
    image_encoder = model.load_image_encoder(pipeline_folder)
    assert_close_relative(model.embed_image(image_encoder, images * 2 - 1), expected, 2e-6)


# ---------------------------------------------------------------------------------------------------------
# Conditions of a clip


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
@torch.no_grad()
def test_condition_of_half_precision_networks_is_fp32(pipeline_folder, dtype, tolerance):
    """Only the networks compute in half precision. Time ids hold 0.02 as fp32 does, bit for bit."""
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
def test_condition_is_computed_as_in_svd(pipeline_folder):
    """Noise is added to the VAE's input only. Latents are the mode, unscaled, on each frame. The time ids
    hold fps - 1."""
    vae, image_encoder = model.load_vae(pipeline_folder), model.load_image_encoder(pipeline_folder)
    images, noise = torch.rand(2, 3, 64, 96) * 2 - 1, torch.randn(2, 3, 64, 96)
    cond = model.encode_condition(vae, image_encoder, images, noise, num_frames=3, fps=25,
                                  motion_bucket_id=torch.tensor([1, 255]), noise_aug_strength=0.5)
    assert cond.image_latents.shape == (2, 3, 4, 8, 12) and cond.image_embeds.shape == (2, 1, 24)
    for frame in range(3):
        assert torch.equal(cond.image_latents[:, frame], vae.moments(images + 0.5 * noise)[0])
    assert torch.equal(cond.image_embeds, model.embed_image(image_encoder, images))
    assert torch.equal(cond.time_ids, torch.tensor([[24, 1, 0.5], [24, 255, 0.5]]))


@torch.no_grad()
def test_condition_takes_a_number_or_one_number_per_clip(pipeline_folder):
    """Tensors [b] give each clip what single numbers give it alone."""
    vae, image_encoder = model.load_vae(pipeline_folder), model.load_image_encoder(pipeline_folder)
    images, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 3, 32, 32)
    encode = lambda i, fps, bucket, strength: model.encode_condition(
        vae, image_encoder, images[i], noise[i], num_frames=2, fps=fps, motion_bucket_id=bucket,
        noise_aug_strength=strength)
    both = encode(slice(None), torch.tensor([7, 25]), torch.tensor([1, 255]), torch.tensor([0.02, 0.5]))
    for i, settings in enumerate(((7, 1, 0.02), (25, 255, 0.5))):
        alone = encode(slice(i, i + 1), *settings)
        assert torch.equal(both.time_ids[i:i + 1], alone.time_ids)
        for actual, expected in zip(both[:2], alone[:2]):
            assert_close_relative(actual[i:i + 1], expected, 2e-6)


def test_unconditional_drops_the_image_only():
    cond = model.Cond(torch.randn(2, 1, 8), torch.randn(2, 3, 4, 8, 8), torch.rand(2, 3))
    uncond = model.unconditional(cond)
    assert not uncond.image_embeds.any() and not uncond.image_latents.any()
    assert torch.equal(uncond.time_ids, cond.time_ids) and cond.image_embeds.any()


@pytest.mark.parametrize("sample_size, size", [(96, (1024, 576)), (16, (128, 128)), (64, (512, 512))])
def test_default_size_is_the_size_of_training(sample_size, size):
    with torch.device("meta"):
        assert model.default_size(model.UNet(**unet_config(sample_size=sample_size))) == size
