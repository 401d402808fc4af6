"""support/checkpoint.py: folders, shards, variants, the hub, strict loading, and damaged or hostile files."""
import contextlib
import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.errors as hub_errors
import pytest
import torch
from conftest import (
    ROOT,
    assert_close_relative,
    randomize,
    small_image_encoder,
    unet_config,
    vae_config,
)
from diffusers import AutoencoderKLTemporalDecoder as DiffusersVAE
from diffusers import StableVideoDiffusionPipeline
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from PIL import Image
from safetensors.torch import load_file, save_file
from test_model import CROSS_DOWN, DOWN, same_weights
from test_training import no_free_handle

import model
from evaluate import VideoClassifier
from support import checkpoint
from support.checkpoint import ModelError

UNET, VAE = unet_config((32, 64)), vae_config((64, 96))
NETWORKS = {
    "unet": (model.UNet, UNET, model.save_unet, model.load_unet, DiffusersUNet),
    "vae": (model.VAE, VAE, model.save_vae, model.load_vae, DiffusersVAE)}
LOADERS = {"unet": model.load_unet, "vae": model.load_vae, "image_encoder": model.load_image_encoder}
WEIGHTS = "diffusion_pytorch_model.safetensors"

# ---------------------------------------------------------------------------------------------------------
# Folders: diffusers and transformers read what is written here, and the other way round


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("variant, dtype", [(None, torch.float32), ("fp16", torch.float16)])
def test_diffusers_saves_and_we_load(tmp_path, name, variant, dtype):
    """As one file, in shards, and in half precision. The path is the pipeline's folder or the network's."""
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
    assert (tuple(extractor.image_mean), tuple(extractor.image_std)) == (model.CLIP_MEAN, model.CLIP_STD)
    assert extractor.resample == Image.Resampling.BICUBIC


def test_a_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    net = randomize(model.UNet(**UNET))
    model.save_unet(net, tmp_path)
    before = load_file(tmp_path / WEIGHTS)

    def half_a_save(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half_a_save)
    with pytest.raises(OSError, match="disk full"):
        model.save_unet(randomize(net), tmp_path)
    after = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be replaced there")
def test_a_save_renames_a_complete_file(tmp_path):
    """A process that has the earlier file open, or mapped to memory, keeps reading the earlier content."""
    net = randomize(model.UNet(**UNET))
    model.save_unet(net, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with open(tmp_path / WEIGHTS, "rb") as reader:
        model.save_unet(randomize(net), tmp_path)
        assert reader.read() == before != (tmp_path / WEIGHTS).read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", WEIGHTS}


@pytest.mark.skipif(sys.platform == "win32", reason="has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_the_mode_of_a_file_follows_the_umask(tmp_path, umask):
    """Also of a file that replaces one with another mode."""
    earlier = os.umask(umask)
    try:
        for _ in range(2):
            checkpoint.write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
            checkpoint.write_json(tmp_path / "a.json", {})
            for file in tmp_path.iterdir():
                assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file
                file.chmod(0o600)
    finally:
        os.umask(earlier)


def test_a_loaded_network_does_not_depend_on_its_file(tmp_path):
    """Weights are copied. With a memory map, writing into the file would change a loaded network."""
    net = randomize(model.UNet(**UNET))
    model.save_unet(net, tmp_path)
    loaded, size = model.load_unet(tmp_path), (tmp_path / WEIGHTS).stat().st_size
    with open(tmp_path / WEIGHTS, "r+b") as file:
        file.write(bytes(size))
    assert same_weights(loaded, net)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_no_second_copy(python, tmp_path):
    """An fp32 file that is loaded as bf16 takes half its size, plus one tensor at a time. The measure is the
    anonymous memory of a fresh process, which does not count the pages of the mapped file."""
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
    command = [python, "-c", script, tmp_path]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    growth, size = map(float, output.split())
    assert size > 100
    assert 0.8 * size < growth < 1.25 * size, f"{growth:.0f} MB to load {size:.0f} MB"


# ---------------------------------------------------------------------------------------------------------
# Files that cannot be used


@pytest.fixture
def saved(tmp_path):
    """A pipeline folder with a valid unet/, which a test then damages."""
    model.save_unet(model.UNet(**UNET), tmp_path / "unet")
    return tmp_path


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("conv_in.bias"), "key conv_in.bias is missing$"),
    (lambda t: [t.pop(f"conv_{end}.bias") for end in ("in", "out")], "conv_in.bias is missing, and 1 more"),
    (lambda t: t.update(surplus=torch.zeros(3)), "key surplus is not part of the UNet"),
    (lambda t: t.update({"conv_in.bias": torch.zeros(7)}), r"conv_in.bias has shape \(7,\), .* for \(32,\)"),
    (lambda t: t.update({"conv_in.bias": t["conv_in.bias"].char()}), "conv_in.bias is torch.int8")],
    ids=["missing", "two missing", "extra", "misshaped", "quantised"])
def test_loading_is_strict_about_keys(saved, change, message):
    tensors = load_file(saved / "unet" / WEIGHTS)
    change(tensors)
    save_file(tensors, saved / "unet" / WEIGHTS)
    with pytest.raises(ModelError, match=message) as error:
        model.load_unet(saved)
    assert str(saved / "unet") in str(error.value)


def test_the_folder_of_a_training_stands_for_its_merged_unet(saved):
    (saved / "unet").rename(saved / "merged")
    assert model.load_unet(saved).config["sample_size"] == UNET["sample_size"]
    with pytest.raises(ModelError, match="no vae/config.json"):
        model.load_vae(saved)


@pytest.mark.parametrize("content", [
    lambda good: good[:len(good) // 2], lambda good: good[:5], lambda good: b"",
    lambda good: b"<html>404</html>" * 100, lambda good: good + b"tail"],
    ids=["half", "five bytes", "empty", "a web page", "too long"])
def test_broken_weights_name_the_file(saved, content):
    file = saved / "unet" / WEIGHTS
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ModelError, match=f"{WEIGHTS}: not a readable safetensors file"):
        model.load_unet(saved)


@pytest.mark.parametrize("content", ["{", "\x80", "[]", "7"])
def test_config_that_is_no_json_object_is_refused(saved, content):
    (saved / "unet" / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match="config.json: (not a readable JSON|it is not a JSON object)"):
        model.load_unet(saved)


@pytest.mark.parametrize("change", [
    {"speed": 3}, {"block_out_channels": [33, 64]}, {"block_out_channels": []}, {"block_out_channels": None},
    {"in_channels": "8"}, {"in_channels": -8}, {"num_attention_heads": [2]}, {"num_attention_heads": 3},
    {"down_block_types": [CROSS_DOWN]}, {"down_block_types": ["DownBlock2D", DOWN]}], ids=str)
def test_config_of_another_network_names_the_file(saved, change):
    """Unknown settings, impossible settings, and lists of the wrong length."""
    file = saved / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match="config.json: not a configuration of SVD's UNet"):
        model.load_unet(saved)


# Values that no setting has; a text is also no number, and a number no text.
ODD = [None, [], {}, [[1]], 0, -1, 10 ** 7, float("nan"), float("inf"), True, [0], [True], ["x", 1], [1] * 99]


def configurations():
    """(network, its configuration, key) of every setting that a network reads."""
    unet = {"in_channels": 8, "out_channels": 4, "transformer_layers_per_block": 1, **UNET}
    vae = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "scaling_factor": 0.5,
           "force_upcast": True, **VAE}
    encoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
               "image_size": 224, "patch_size": 32, "projection_dim": 24, "layer_norm_eps": 1e-5,
               "hidden_act": "gelu"}
    detector = {"num_classes": 5, "channels": [8, 8, 8, 16], "size": 32}
    for cls, config in ((model.UNet, unet), (model.VAE, vae), (model.ImageEncoder, encoder),
                        (VideoClassifier, detector)):
        for key in config:
            yield pytest.param(cls, json.loads(json.dumps(config)), key, id=f"{cls.__name__}-{key}")


@pytest.mark.parametrize("cls, config, key", configurations())
def test_no_setting_has_an_odd_value(tmp_path, cls, config, key):
    """Wrong types and numbers without sense are refused at once, and the error names the key. The weights
    are read last, so the error of good values is that they are missing."""
    good, kind = config[key], type(config[key])
    odd = [value for value in ODD if not (kind is bool and value is True)]
    for value in [*odd, good if kind is list else [good, good], 7 if isinstance(good, str) else "x"]:
        allowed = value is good or value == [good, good] and key in checkpoint.PER_LEVEL and cls is model.UNet
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ModelError) as error:
            checkpoint.load_network(cls, tmp_path, None, torch.float32, "cpu")
        assert ("no .safetensors weights" in str(error.value)) <= allowed, value
        if not allowed:
            assert f"config.json: not a configuration of SVD's {cls.__name__} (" in str(error.value)
            assert "\n" not in str(error.value) and len(str(error.value)) < len(str(tmp_path)) + 220
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no .safetensors weights"):
        checkpoint.load_network(cls, tmp_path, None, torch.float32, "cpu")


@pytest.mark.parametrize("config", [
    {}, {"layers_per_block": [1, 2, 2, 1], "cross_attention_dim": [1024] * 4, "num_attention_heads": 10,
         "transformer_layers_per_block": [1] * 4}, {"sample_size": 72, "num_frames": 25}], ids=str)
def test_settings_that_svd_allows(config):
    """One number for all levels or a number per level, and SVD's own values."""
    checkpoint.check_config(model.UNet, config)
    checkpoint.check_config(model.VAE, {"scaling_factor": 1})
    checkpoint.check_config(model.ImageEncoder, checkpoint.CLIP | {"dropout": 0.0, "bos_token_id": None})


@pytest.mark.parametrize("cls, change, message", [
    (model.UNet, {"addition_time_embed_dim": 15}, "is 768, not 3 times addition_time_embed_dim 15"),
    (model.ImageEncoder, {"num_attention_heads": 3}, "num_attention_heads 3 do not divide hidden_size")])
def test_settings_that_do_not_fit_each_other(cls, change, message):
    with pytest.raises(ModelError, match=message):
        checkpoint.check_config(cls, change)


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes in folders")
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_named_pipes_are_not_read(saved, name):
    """Reading one would wait for ever."""
    (saved / "unet" / name).unlink()
    os.mkfifo(saved / "unet" / name)
    with pytest.raises(ModelError, match="a folder, pipe or device, not a file|no config.json in it"):
        model.load_unet(saved)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "../nowhere", "/no/where", "no/where", "no/whe/re"])
def test_missing_folder_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        model.load_unet(name)


def test_missing_files_say_what_to_do(saved):
    folder, weights = saved / "unet", saved / "unet" / WEIGHTS
    shard = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    with pytest.raises(ModelError, match="no vae/config.json .* expected the diffusers layout"):
        model.load_vae(saved)
    with pytest.raises(ModelError, match="no fp16 .safetensors weights; .* with no variant: ask"):
        model.load_unet(saved, variant="fp16")
    weights.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ModelError, match="no .safetensors weights; there are weights with variant fp16: ask"):
        model.load_unet(saved)
    (folder / "diffusion_pytorch_model.fp16.safetensors").rename(shard)
    with pytest.raises(ModelError, match="unet: 1 of 3 weight shards are there: fetch all"):
        model.load_unet(saved)
    shard.unlink()
    with pytest.raises(ModelError, match="unet: no .safetensors weights$"):
        model.load_unet(saved)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_an_error_of_reading_says_nothing_about_the_content(saved, name):
    """OSError names the cause. A missing file is a ModelError. A link to itself cannot be opened."""
    file = saved / "unet" / name
    read = checkpoint.read_json if name == "config.json" else lambda file: dict(
        checkpoint.read_safetensors([file]))
    with no_free_handle(), pytest.raises(OSError, match=f"Too many open files: .*{name}"):
        read(file)
    assert read(file)
    file.unlink()
    with pytest.raises(ModelError, match=f"{name}: not a readable"):
        read(file)
    file.symlink_to(file)
    with pytest.raises(OSError, match=f"symbolic links: .*{name}"):
        read(file)


def test_pickles_are_not_loaded(saved):
    """Opening a pickle can run any code, so it is not opened."""
    (saved / "unet" / WEIGHTS).unlink()

    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("a pickle was opened",)

    torch.save(Bomb(), saved / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="diffusion_pytorch_model.bin is a pickle.* convert it"):
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
        with pytest.raises(ModelError, match=message):
            model.load_image_encoder(tmp_path)

    check("key visual_projection.weight is missing", lambda t: t.pop("visual_projection.weight"))
    check("image_encoder: key surplus is not", lambda t: t.update(surplus=torch.zeros(2)))
    check(r"weight has shape \(2, 2\)", lambda t: t.update({"visual_projection.weight": torch.zeros(2, 2)}))
    check("model.safetensors: not a readable", weights=b"garbage" * 100)
    check("config.json: not a readable", config=b"{")
    check("config.json: it is not a JSON object", config=b"[]")
    check("config.json: not a configuration of SVD's ImageEncoder", config=b'{"hidden_size": "wide"}')


# ---------------------------------------------------------------------------------------------------------
# The hub; no test uses the network

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
    """Revision and file patterns reach the hub client. Its own filter selects no other file with them."""
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(pipeline_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with contextlib.suppress(ModelError):                               # the folder has no fp16 files
        LOADERS[name]("owner/name", revision="v1.1", variant=variant)
    assert asked["repo_id"] == "owner/name" and asked["revision"] == "v1.1"
    fetched = huggingface_hub.utils.filter_repo_objects(HUB_FILES, allow_patterns=asked["allow_patterns"])
    suffix = ".fp16" if variant else ""
    assert set(fetched) == {f"{name}/config.json"} | {
        f"{STEMS[name]}{suffix}{shard}.safetensors" for shard in ("", *SHARDS)}


def test_hub_cache_is_used_offline_by_revision(monkeypatch, tmp_path):
    """A cache in the layout of huggingface_hub holds two revisions. Each loads with its own weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    nets = {}
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        nets[revision] = randomize(model.UNet(**UNET))
        model.save_unet(nets[revision], repo / "snapshots" / commit / "unet")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    for options, revision in (({}, "main"), ({"revision": "v2"}, "v2"), ({"revision": "b" * 40}, "v2")):
        loaded = model.load_unet("owner/name", **options)
        assert torch.equal(loaded.conv_in.weight, nets[revision].conv_in.weight)
    with pytest.raises(ModelError, match="no vae/config.json"):
        model.load_vae("owner/name")
    with pytest.raises(ModelError, match="hub cannot be reached or does not have it"):
        model.load_unet("owner/name", revision="v3")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_hub_fetches_a_network_at_the_root(monkeypatch, tmp_path, variant):
    """A repository that is a bare UNet. Its other files are not fetched."""
    asked = {}
    net = randomize(model.UNet(**UNET))
    model.save_unet(net, tmp_path, variant=variant)

    def snapshot_download(repo_id, **options):
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert same_weights(model.load_unet("owner/name", variant=variant), net)
    stem, suffix = "diffusion_pytorch_model", ".fp16" if variant else ""
    files = [f"{stem}{kind}{shard}.{end}" for kind in ("", ".fp16", ".non_ema") for shard in ("", *SHARDS)
             for end in ("safetensors", "bin")] + ["config.json", "README.md", f"safety/{stem}.safetensors"]
    fetched = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"])
    assert set(fetched) == {"config.json"} | {f"{stem}{suffix}{shard}.safetensors" for shard in ("", *SHARDS)}


def test_unknown_hub_id_offline_is_one_sentence(monkeypatch):
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *_, **__: pytest.fail("network used although offline"))
    with pytest.raises(ModelError, match="no-owner/no-model: no such folder here, and the hub cannot"):
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
    with pytest.raises(ModelError, match=f"^owner/name: .*{message}") as caught:
        model.load_unet("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [None, "cross_attention_dim", "in_channels", "out_channels"])
def test_networks_of_two_models_do_not_fit(wrong):
    unet = {"cross_attention_dim": 64, "in_channels": 8, "out_channels": 4}
    configs = unet, {"latent_channels": 4}, {"projection_dim": 64}
    nets = [SimpleNamespace(config=config) for config in configs]
    if not wrong:
        return checkpoint.check_fit(*nets)
    nets[0].config[wrong] *= 2
    with pytest.raises(ModelError, match="are all of them from one model"):
        checkpoint.check_fit(*nets)
