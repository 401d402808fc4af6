"""The heads, the frozen features, and which parameters get gradients."""
import pytest
import torch
from conftest import randomize, unet_config, vae_config
from safetensors.torch import load_file, save_file
from test_model import same_weights
from torch import nn

import losses
import model
from discriminator import DinoFeatures, Discriminator, SpatialHead, TemporalHead, UNetFeatures, load_dino
from support.checkpoint import ModelError

# ---- heads ----------------------------------------------------------------------------------------------


def test_a_spatial_head_sees_no_motion():
    """Permuted frames give the same logits, permuted."""
    head, x, order = SpatialHead(8, 8).eval(), torch.randn(6, 8, 3, 4), torch.tensor([3, 0, 5, 1, 4, 2])
    logits = head(x, 6).view(6, 12)
    torch.testing.assert_close(head(x[order], 6).view(6, 12), logits[order])


def test_a_temporal_head_sees_motion_but_no_shape():
    head, x = TemporalHead(8, 8).eval(), torch.randn(6, 8, 3, 4)
    logits = head(x, 6)
    shuffled = head(x[[3, 0, 5, 1, 4, 2]], 6)
    assert abs(logits.sum() - shuffled.sum()) > 1e-3
    places = torch.randperm(12)
    moved = head(x.flatten(2)[:, :, places].view_as(x), 6)
    torch.testing.assert_close(moved.view(6, 12), logits.view(6, 12)[:, places])


def test_spectral_norm_bounds_every_convolution():
    head = SpatialHead(8, 8)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "original" in name:
                parameter.mul_(50)
        for _ in range(200):
            head(torch.randn(2, 8, 4, 4), 2)        # each pass in training mode is one power iteration
    for conv in (head.conv_in, head.conv_res, head.conv_out):
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2).item() == pytest.approx(1, abs=0.02)


# ---- discriminator --------------------------------------------------------------------------------------


def small_dino(num_layers=4, image_size=56):
    from transformers import Dinov2Config, Dinov2Model
    config = Dinov2Config(hidden_size=32, num_hidden_layers=num_layers, num_attention_heads=2,
                          image_size=image_size, patch_size=14)
    return Dinov2Model(config)


def add(key):
    return lambda tensors: tensors.update({key: torch.zeros(3)})


@pytest.mark.parametrize("change, message", [
    (lambda tensors: tensors.pop("layernorm.weight"), "missing_keys layernorm.weight"),
    (add("surplus"), "unexpected_keys surplus"),
    (add("embeddings.register_tokens"), "unexpected_keys embeddings.register_tokens"),
    (add("layernorm.weight"), r"mismatched_keys .*layernorm.weight.*\[3\].*\[32\]")])
def test_dino_is_loaded_strictly(tmp_path, change, message, capfd):
    """Nothing but the error is said: transformers has no table of its own for the user to read."""
    dino = small_dino()
    dino.save_pretrained(tmp_path)
    loaded = load_dino(tmp_path)
    assert same_weights(loaded, dino) and not loaded.training
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(ModelError, match=f"^{tmp_path}: cannot be loaded as a DINOv2 model .*{message}"):
        load_dino(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_other_vision_transformers_are_no_dino(tmp_path):
    """Most keys of a DINOv1 or ViT are unknown to DINOv2. A damaged file is refused as well."""
    from transformers import ViTConfig, ViTModel
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ViTModel(ViTConfig(**size, image_size=56, patch_size=14)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="missing_keys .*, unexpected_keys encoder.layer.0"):
        load_dino(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage" * 100)
    with pytest.raises(ModelError, match="cannot be loaded as a DINOv2 model"):
        load_dino(tmp_path)
    small_dino(image_size=(56, 28)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"image_size \[56, 28\] is not one number"):
        load_dino(tmp_path)


def build(kind, **settings):
    """A small random discriminator of one kind."""
    torch.manual_seed(0)
    if kind == "unet":
        features = UNetFeatures(randomize(model.UNet(**unet_config())))
    else:
        vae = randomize(model.VAE(**vae_config())) if kind == "pixel" else None
        features = DinoFeatures(small_dino(), kind, vae=vae)
    return Discriminator(features, **settings)


def inputs(num_clips=2, num_frames=3, height=8, width=8):
    shape = num_clips, num_frames, 4, height, width
    cond = model.Cond(torch.randn(num_clips, 1, 24), torch.randn(shape), torch.rand(num_clips, 3))
    return torch.randn(shape, requires_grad=True), cond


@pytest.mark.parametrize("kind", ["latent", "subpixel", "pixel", "unet"])
def test_gradients_reach_latents_and_heads_but_never_the_frozen_network(kind):
    disc = build(kind)
    latents, cond = inputs()
    logits = disc(latents, cond)
    assert logits.ndim == 2 and len(logits) == 2 and logits.dtype == torch.float32
    logits.square().sum().backward()
    assert latents.grad.abs().sum() > 0
    frozen = {id(p) for net in disc.frozen for p in net.parameters()}
    assert frozen
    for name, parameter in disc.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in frozen), name


def test_large_frames_are_decoded_a_few_at_a_time(monkeypatch):
    """Frames and gradients equal those of parts that are decoded one by one, without checkpointing."""
    disc = build("pixel")
    features, (latents, _) = disc.features, inputs(2, 3)
    flat = latents.flatten(0, 1)                                                            # (b f) c h w
    whole = features.decode(flat, 3)
    monkeypatch.setattr(DinoFeatures, "LATENTS_AT_ONCE", 2 * 8 * 8)
    cut = features.decode(flat, 3)
    parts = torch.cat([features.vae.decode(part, len(part)) for part in flat.split([2, 1, 2, 1])])
    assert torch.equal(cut, parts) and not torch.equal(cut, whole)
    ours, theirs = (torch.autograd.grad(x.square().sum(), latents)[0] for x in (cut, parts))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_frozen_network_stays_frozen_whatever_is_asked():
    disc = build("latent")
    disc.train().requires_grad_(True)
    assert not disc.features.backbone.training and disc.heads.training
    assert not any(p.requires_grad for p in disc.features.backbone.parameters())
    assert all(p.requires_grad for p in disc.heads.parameters())
    disc.requires_grad_(False)
    assert not any(p.requires_grad for p in disc.parameters())


@pytest.mark.parametrize("kind", ["latent", "subpixel", "pixel"])
def test_a_clip_is_judged_alone(kind):
    disc = build(kind).eval()
    latents, _ = inputs(3)
    torch.testing.assert_close(disc(latents)[1:2], disc(latents[1:2]), rtol=1e-4, atol=1e-4)


def test_noise_of_a_clip_follows_from_its_number():
    """A clip of the unet discriminator is judged alone, too: its noise does not depend on the batch."""
    disc = build("unet").eval()
    latents, cond = inputs(3)
    numbers = torch.tensor([7, 8, 5_000_000])
    logits = disc(latents, cond, numbers)
    one = model.Cond(*(x[1:2] for x in cond))
    torch.testing.assert_close(logits[1:2], disc(latents[1:2], one, numbers[1:2]), rtol=1e-4, atol=1e-4)
    assert (logits[1:2] - disc(latents[1:2], one, numbers[:1])).abs().max() > 1e-2
    assert (disc(latents, cond) - disc(latents, cond)).abs().max() > 1e-2       # random


def test_noise_of_the_unet_discriminator_is_normal():
    """The backbone gets c_in (latents + sigma noise): of zeros, noise of variance sigma^2 / (sigma^2 + 1)."""
    disc, seen = build("unet"), {}
    n, cond = 400, inputs(1)[1]
    cond = model.Cond(*(x.expand(n, *x.shape[1:]) for x in cond))

    def see(x, c_noise, *others):
        seen.update(x=x[:, :, :4], sigma=(4 * c_noise).exp())
        raise InterruptedError

    disc.features.backbone.encode = see
    with pytest.raises(InterruptedError):
        disc(torch.zeros(cond.image_latents.shape), cond, torch.arange(n))
    sigma = seen["sigma"]
    assert abs(sigma.log().mean() + 1) < 0.2 and abs(sigma.log().std() - 1) < 0.15      # 4 standard errors
    noise = seen["x"] * ((sigma ** 2 + 1).sqrt() / sigma).view(-1, 1, 1, 1, 1)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01                     # of 300,000 numbers
    assert abs(noise.pow(4).mean() - 3) < 0.1                                           # as of a normal
    flat = noise.flatten(1)
    assert abs((flat[:-1] * flat[1:]).mean()) < 0.01 and abs((flat[:, :-1] * flat[:, 1:]).mean()) < 0.01


@pytest.mark.parametrize("height, width", [(8, 8), (5, 9), (9, 16), (16, 3), (1, 1)])
def test_any_latent_size(height, width):
    disc = build("latent")
    latents, _ = inputs(1, 2, height, width)
    rows, columns = (side // 14 for side in disc.features.size_for(height, width))
    assert disc(latents).shape == (1, 5 * 2 * 2 * rows * columns)      # levels, kinds of head, frames, places
    if height > 1:
        assert rows / columns == pytest.approx(height / width, rel=0.5)


def test_levels_are_those_of_the_paper_relatives():
    assert DinoFeatures(small_dino(12)).levels == [0, 3, 6, 9, 12]  # after blocks 2 5 8 11, counted from 0
    assert DinoFeatures(small_dino(4)).levels == [0, 1, 2, 3, 4]


def test_cls_joins_every_patch_token():
    features = DinoFeatures(small_dino()).eval()
    latents, _ = inputs(1, 2)
    seen = []
    features.backbone.embeddings.register_forward_hook(lambda module, args, out: seen.append(out))
    maps = features(latents)
    tokens = seen[0]                                                    # (b f) 1 + p d
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), tokens[:, 1:] + tokens[:, :1])
    assert [m.shape for m in maps] == [(2, 32, 4, 4)] * 5


def test_order_of_heads_does_not_change_the_losses():
    latents, _ = inputs()
    one, two = build("latent").eval(), build("latent", heads=("temporal", "spatial")).eval()
    two.load_state_dict(one.state_dict())
    a, b = one(latents), two(latents)
    assert not torch.equal(a, b)
    torch.testing.assert_close(losses.hinge_d(a, a), losses.hinge_d(b, b))
    torch.testing.assert_close(losses.hinge_g(a), losses.hinge_g(b))


def test_each_step_gives_gradients_to_its_own_network_only():
    """As in the trainers: the D step detaches the sample, the G step freezes D."""
    disc, net = build("latent"), nn.Conv3d(4, 4, 1)
    real, _ = inputs()
    fake = net(torch.randn(2, 4, 3, 8, 8)).transpose(1, 2)              # b f c h w
    losses.hinge_d(disc(real.detach()), disc(fake.detach())).backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in disc.heads.parameters())
    disc.zero_grad(set_to_none=True)
    disc.requires_grad_(False)
    losses.hinge_g(disc(fake)).backward()
    assert all(p.grad is None for p in disc.parameters())
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_it_learns_what_only_temporal_heads_can_see():
    """Real clips brighten over time, fake ones are real clips with their frames shuffled. Single frames have
    the same distribution in both, so only the order tells them apart."""
    torch.manual_seed(0)
    loss = {}
    for heads in (("spatial",), ("temporal",)):
        disc = build("latent", heads=heads, width=16)
        trained = [p for p in disc.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=5e-3, betas=(0.0, 0.99))
        for _ in range(20):
            start = torch.randn(8, 1, 1, 1, 1)
            real = (start + torch.linspace(-1, 1, 6).view(1, 6, 1, 1, 1)).expand(8, 6, 4, 4, 4)
            fake = torch.stack([clip[torch.randperm(6)] for clip in real])
            loss[heads] = losses.hinge_d(disc(real), disc(fake))
            optimizer.zero_grad()
            loss[heads].backward()
            optimizer.step()
    assert loss[("spatial",)] > 1.8                                     # 2 is the loss of a constant D
    assert loss[("temporal",)] < 1.4
