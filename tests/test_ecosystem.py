"""Export to diffusers, PEFT and the hub, and loading what they wrote: round trips on small pipelines."""
import json
import re
import sys
from io import BytesIO
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import assert_close_relative, randomize, relative_error, unet_config
from diffusers import StableVideoDiffusionPipeline
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from diffusers.loaders import PeftAdapterMixin
from forked import excepthook
from PIL import Image
from safetensors.torch import load_file, save_file
from test_model import diffusers_unet, same_weights, unet_inputs

import lora
import model
import sampler
from support import checkpoint
from support.kernels import fast
from support.media import contact_sheet
from tools import export as exporter

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A UNet folder, as the training scripts write it, for the pipeline of conftest."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("student")
    model.save_unet(randomize(model.UNet(**unet_config())), folder, torch.float16)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "in.png"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 180)).save(file)
    return file


def command(monkeypatch, script, *args):
    """Runs the command line of sampler.py or tools/export.py, in this process."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, args)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with excepthook():
        script.main()


def export(monkeypatch, pipeline, student, folder, *args, do="export"):
    command(monkeypatch, exporter, do, "--model", pipeline, "--student", student, "--output_dir", folder,
            *args)


def sheet(path):
    return np.asarray(Image.open(path)).astype(int)


def as_sheet(video):
    """What sampler.py --out x.png writes of these PIL frames."""
    frames = np.stack([np.asarray(frame) for frame in video]).astype(np.float32) / 127.5 - 1
    return contact_sheet(torch.from_numpy(frames).permute(0, 3, 1, 2)[None]).numpy().astype(int)


def recipe(folder):
    """The Python code of the model card. It needs diffusers and the folder, and none of our modules."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S))
    assert "import model" not in code and "sampler" not in code
    return code


# ---- export ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_exported_folder_makes_our_frames_in_diffusers(
        tmp_path, monkeypatch, pipeline_folder, student, picture, dtype):
    """The code of the model card, unchanged, against sampler.py: one step, and Time Travel. A pixel may
    differ by one level of 255, where the two round a value near x.5 differently."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.png").write_bytes(picture.read_bytes())
    export(monkeypatch, pipeline_folder, student, tmp_path / "osv", "--dtype", dtype)
    code = recipe(tmp_path / "osv")
    assert ('variant="fp16", torch_dtype=torch.float16' in code) == (dtype == "fp16")
    variant = [] if dtype == "fp32" else ["--variant", "fp16"]
    names = {}
    exec(code.replace("torch_dtype=torch.float16", "torch_dtype=torch.float32"), names)    # a CPU has no fp16
    for video, options in ((names["video"], ["--no_tts"]), (names["again"], [])):
        command(monkeypatch, sampler, "--image", "in.png", "--model", "osv", "--student", "osv", "--out",
                "ours.png", "--device", "cpu", *variant, *options)
        difference = np.abs(as_sheet(video) - sheet("ours.png"))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert np.abs(as_sheet(names["video"]) - sheet("ours.png")).mean() > 2      # Time Travel has an effect
    assert (tmp_path / "one_step.gif").is_file() and (tmp_path / "time_travel.gif").is_file()
    half, scheduler = torch.ones(1, 14, 4, 8, 8, dtype=torch.float16), names["pipe"].scheduler
    scheduler.set_timesteps(sigmas=[700.0, 14.811282, 0.0])
    assert scheduler.step(half, scheduler.timesteps[0], half).prev_sample.dtype == torch.float16


def test_exported_weights_are_those_put_in(tmp_path, monkeypatch, pipeline_folder, student):
    """Into one folder, where an export deletes the weights of earlier ones, and no other files."""
    weights = {"unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "image_encoder/model"}
    others = {"unet/student.safetensors", "vae/model-00001-of-00002.safetensors", "lora.safetensors"}
    shards = {"unet/diffusion_pytorch_model-00001-of-00002.safetensors",
              "unet/diffusion_pytorch_model.safetensors.index.json"}
    for name in others | shards:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for dtype, suffix, variant in (("fp32", "", None), ("fp16", ".fp16", "fp16")):
        export(monkeypatch, pipeline_folder, student, tmp_path, "--dtype", dtype)
        files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
        assert files == others | {f"{name}{suffix}.safetensors" for name in weights} | {
            "README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
            "vae/config.json", "image_encoder/config.json", "feature_extractor/preprocessor_config.json"}
        theirs = StableVideoDiffusionPipeline.from_pretrained(tmp_path, variant=variant)
        assert same_weights(theirs.unet, model.load_unet(student))
        reference = model.load_vae(pipeline_folder)
        assert same_weights(theirs.vae, reference if variant is None else reference.half().float())
    half = load_file(tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


@pytest.mark.parametrize("base, svd", [("", False), ("", True), ("owner/name", False)], ids=str)
def test_model_card(tmp_path, monkeypatch, pipeline_folder, student, base, svd):
    """The card of a model derived from SVD names SVD's licence; that of the toy world's networks does not."""
    source = tmp_path / "source"
    source.symlink_to(pipeline_folder)
    if svd:                                                             # a pipeline with the sizes of SVD-XT
        source.unlink()
        export(monkeypatch, pipeline_folder, student, source)
        for name, changes in (("unet", {"sample_size": 96, "num_frames": 25}), ("vae", {"sample_size": 768})):
            file = source / name / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        (source / "LICENSE.md").write_text("the licence")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(source))
    export(monkeypatch, base or source, source if svd else student, tmp_path / "out")
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-to-video", "diffusers")
    if not svd and not base:
        assert card.data.base_model is None and card.data.license is None
        return
    assert card.data.base_model == (base or "stabilityai/stable-video-diffusion-img2vid-xt")
    assert card.data.license == "other"
    assert card.data.license_name == "stable-video-diffusion-nc-community"
    assert "does not allow commercial use" in card.text
    assert ("size = 1024, 576" in card.text) == svd == (tmp_path / "out" / "LICENSE.md").is_file()


def test_push_to_hub_uploads_what_was_written_and_no_more(
        tmp_path, monkeypatch, capsys, pipeline_folder, student):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: asked.update(repo=name))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: asked.update(options))
    (tmp_path / "notes.bin").write_bytes(b"private")
    export(monkeypatch, pipeline_folder, student, tmp_path, "--push_to_hub", "me/osv")
    assert asked["repo"] == asked["repo_id"] == "me/osv" and asked["folder_path"] == tmp_path
    files = [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()]
    sent = set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))
    assert set(files) - sent == {"notes.bin"}
    assert 'from_pretrained("me/osv")' in recipe(tmp_path)

    def refuse(*_, **__):
        raise huggingface_hub.errors.HFValidationError("no such name\n\nat all")
    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(SystemExit) as stop:
        export(monkeypatch, pipeline_folder, student, tmp_path, "--push_to_hub", "me/osv")
    complaint = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in complaint
    assert "me/osv: not uploaded: HFValidationError('no such name" in complaint


# ---- LoRA to PEFT and back ------------------------------------------------------------------------------


class LoraUNet(DiffusersUNet, PeftAdapterMixin):
    """diffusers' SVD UNet with the LoRA loader of diffusers' other models, which it lacks."""


def small_lora(pipeline_folder, folder, alpha=8):
    """Saves a LoRA of rank 4 for the pipeline of conftest. Returns the network with its LoRA layers."""
    net = lora.add_lora(model.load_unet(pipeline_folder), 4, alpha)
    for layer in lora.lora_layers(net).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.2)
    lora.save_lora(net, folder)
    return net


@torch.no_grad()
def test_lora_goes_into_the_unet_of_a_diffusers_pipeline(tmp_path, pipeline_folder):
    net, inputs = small_lora(pipeline_folder, tmp_path), unet_inputs()
    pipe = StableVideoDiffusionPipeline.from_pretrained(pipeline_folder)
    assert relative_error(diffusers_unet(pipe.unet, *inputs), net(*inputs)) > 0.1
    pipe.unet.__class__ = LoraUNet                                              # as the README says
    pipe.unet.load_lora_adapter(str(tmp_path), prefix="unet", use_safetensors=True)
    assert_close_relative(diffusers_unet(pipe.unet, *inputs), net(*inputs))


@torch.no_grad()
def test_lora_goes_into_peft_and_back(tmp_path, pipeline_folder):
    """alpha is twice the rank, so a forgotten scale changes the result. A folder that PEFT saved loads as
    is."""
    import peft  # three seconds
    net, inputs = small_lora(pipeline_folder, tmp_path), unet_inputs()
    tensors = load_file(tmp_path / lora.LORA_FILE)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=sorted(lora.lora_layers(net)))
    theirs = peft.get_peft_model(DiffusersUNet.from_pretrained(pipeline_folder / "unet"), config)
    report = peft.set_peft_model_state_dict(
        theirs, {key.replace("unet.", "base_model.model.", 1): tensor for key, tensor in tensors.items()})
    assert not report.unexpected_keys
    assert_close_relative(diffusers_unet(theirs, *inputs), net(*inputs))
    theirs.save_pretrained(tmp_path / "peft")
    assert {file.name for file in (tmp_path / "peft").glob("adapter*")} == {
        "adapter_config.json", "adapter_model.safetensors"}
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        loaded = lora.load_lora(model.load_unet(pipeline_folder), path)
        assert_close_relative(loaded(*inputs), net(*inputs), 1e-6)


def test_merge_and_unmerge(tmp_path, monkeypatch, pipeline_folder):
    """The pipeline class has no LoRA loader. `merge` adds the LoRA to its UNet, `unmerge` subtracts it."""
    net, inputs = small_lora(pipeline_folder, tmp_path / "lora"), unet_inputs()
    export(monkeypatch, pipeline_folder, tmp_path / "lora", tmp_path / "merged", do="merge")
    export(monkeypatch, tmp_path / "merged", tmp_path / "lora", tmp_path / "plain", do="unmerge")
    with torch.no_grad():
        merged = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "merged").unet
        assert_close_relative(diffusers_unet(merged, *inputs), net(*inputs))
        plain = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "plain").unet
        assert_close_relative(diffusers_unet(plain, *inputs), model.load_unet(pipeline_folder)(*inputs))


# ---- loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": "300KB"}], ids=str)
def test_pipelines_saved_by_diffusers_load_here(tmp_path, monkeypatch, pipeline_folder, picture, options):
    """One file, the fp16 variant, and shards with an index: the video equals that of the original folder to
    rounding (the memory alignment of a tensor can change the order of sums in a matrix product). The number
    of frames is 25 because the config says so, as SVD-XT's does."""
    pipe = StableVideoDiffusionPipeline.from_pretrained(pipeline_folder)
    pipe.unet.register_to_config(num_frames=25)
    half = "variant" in options
    for net in (pipe.unet, pipe.vae, pipe.image_encoder):
        net.to(torch.float16 if half else torch.float32)
    pipe.save_pretrained(tmp_path / "theirs", **options)
    indices = list((tmp_path / "theirs" / "unet").glob("*.index.json"))
    assert len(indices) == ("max_shard_size" in options)
    flags = ["--image", picture, "--width", 64, "--height", 64, "--steps", 1, "--max_guidance_scale", 1,
             "--device", "cpu"]
    command(monkeypatch, sampler, *flags, "--model", tmp_path / "theirs", "--out", tmp_path / "theirs.png",
            *(["--variant", "fp16"] if half else []))
    command(monkeypatch, sampler, *flags, "--model", pipeline_folder, "--num_frames", 25, "--out",
            tmp_path / "ours.png")
    difference = np.abs(sheet(tmp_path / "theirs.png") - sheet(tmp_path / "ours.png"))
    assert difference.shape[1] == 25 * (64 + 2) + 2 and difference.max() <= (3 if half else 1)
    for name, load in (("unet", model.load_unet), ("vae", model.load_vae)):
        loaded = load(tmp_path / "theirs", variant=options.get("variant"))
        assert same_weights(loaded, getattr(pipe, name).float())


def test_every_kind_of_student(tmp_path, pipeline_folder, student):
    """A folder, a pipeline folder, shards, one file with diffusers' keys (as AnimateLCM-SVD is published),
    and a LoRA. The student has the dtype and device of the network that it replaces."""
    expected = model.load_unet(student)
    DiffusersUNet.from_pretrained(student).save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "unet").symlink_to(student)
    single = tmp_path / "AnimateLCM-SVD-xt-1.1.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in expected.state_dict().items()}, single)
    for path in (student, tmp_path / "pipeline", tmp_path / "shards", single):
        for dtype in (torch.float32, torch.bfloat16):
            loaded = lora.load_student(path, model.load_unet(pipeline_folder, dtype=dtype))
            assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
            assert same_weights(loaded, expected.to(dtype)) and not loaded.training
        loaded = lora.load_student(path, model.load_unet(pipeline_folder, device="meta"))
        assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
        expected = model.load_unet(student)
    expected = lora.merge_lora(small_lora(pipeline_folder, tmp_path / "lora"))
    for path in (tmp_path / "lora", str(tmp_path / "lora" / lora.LORA_FILE)):
        assert same_weights(lora.load_student(path, model.load_unet(pipeline_folder)), expected)


@pytest.mark.parametrize("name, keys, message", [
    ("svd.safetensors", ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"],
     f"svd.safetensors: a single file with the keys of Stability's own code.* instead: {checkpoint.SVD}"),
    ("unet.safetensors", ["input_blocks.0.0.bias"], "keys of Stability's own code"),
    ("other.safetensors", ["layer.weight"], "not part of the UNet|expected the diffusers layout"),
    ("kohya.safetensors", ["lora_unet_x.lora_down.weight"], "kohya.* fit|expected the diffusers layout"),
    ("svd.ckpt", None, "svd.ckpt: a pickle, which can run code"),
    ("student.bin", None, "student.bin: a pickle, which can run code"),
    ("student.pt", None, "student.pt: a pickle, which can run code")])
@pytest.mark.parametrize("flag", ["--model", "--student", "--model folder"])
def test_layouts_that_are_not_read_are_recognised(
        tmp_path, monkeypatch, capsys, pipeline_folder, picture, name, keys, message, flag):
    """Both commands report them on one line, with what to use instead. Pickles are never opened."""
    file = tmp_path / name
    if keys:
        save_file({key: torch.zeros(2) for key in keys}, file)
    else:
        class Bomb:
            def __reduce__(self):
                return pytest.fail, ("a pickle was opened",)
        torch.save(Bomb(), file)
    given = {"--model": pipeline_folder, "--student": pipeline_folder, flag.split()[0]: file}
    if "folder" in flag:
        given["--model"] = tmp_path
    flags = [part for pair in given.items() for part in pair]
    for script, rest in ((sampler, ["--image", picture, "--out", tmp_path / "o.png"]),
                         (exporter, ["export", "--output_dir", tmp_path / "out"])):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, script, *rest, *flags)
        complaint = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and "\n" not in complaint and re.search(message, complaint), complaint
    assert not (tmp_path / "o.png").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("args, message", [
    ("export", "required: --model, --student, --output_dir"),
    ("publish --model m --student s --output_dir o", "invalid choice: 'publish'"),
    ("export --model m --student s --output_dir o --fp16", "unrecognized arguments: --fp16"),
    ("export --model no/where/at/all --student s --output_dir o", "no such folder"),
    ("export --model PIPELINE --student no/where/at/all --output_dir o", "no such folder"),
    ("unmerge --model PIPELINE --student STUDENT --output_dir o", "does not fit a layer|not a LoRA"),
    ("export --model PIPELINE --student PIPELINE --output_dir a_file", "a_file")])
def test_bad_exports_are_one_line_and_status_2(
        tmp_path, monkeypatch, capsys, pipeline_folder, student, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("earlier")
    where = {"PIPELINE": pipeline_folder, "STUDENT": student / "diffusion_pytorch_model.safetensors"}
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, exporter, *(where.get(arg, arg) for arg in args.split()))
    complaint = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in complaint and complaint.startswith("export.py: ")
    assert re.search(message, complaint), complaint
    assert (tmp_path / "a_file").read_text() == "earlier" and not (tmp_path / "o").exists()


# ---- sampler.py -----------------------------------------------------------------------------------------


def test_several_videos_of_one_picture_from_stdin(tmp_path, monkeypatch, capsys, pipeline_folder, picture):
    """Videos have consecutive seeds, and each equals a run with its seed alone. The gallery has a row per
    video, and the saved latents decode to the frames."""
    flags = ["--model", pipeline_folder, "--student", pipeline_folder, "--device", "cpu", "--width", 100,
             "--height", 70]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(picture.read_bytes())))
    command(monkeypatch, sampler, "--image", "-", "--num_videos", 3, "--seed", 5, "--out", tmp_path / "v.png",
            "--gallery", tmp_path / "g.png", "--save_latents", *flags)
    assert "size 100x70 becomes 96x64, multiples of 16" in capsys.readouterr().err
    command(monkeypatch, sampler, "--image", picture, "--seed", 6, "--out", tmp_path / "alone.png", *flags)
    videos = [sheet(tmp_path / f"v_{seed}.png") for seed in (5, 6, 7)]
    assert np.array_equal(videos[1], sheet(tmp_path / "alone.png"))
    assert not np.array_equal(videos[0], videos[1])
    gallery = sheet(tmp_path / "g.png")                                 # 2 pixels between rows
    assert gallery.shape == (3 * 66 + 2, 4 * 98 + 2, 3)
    for i, video in enumerate(videos):
        assert np.array_equal(gallery[66 * i:66 * i + 68], video)
    latents = load_file(tmp_path / "v_7.safetensors")["latents"]
    assert latents.shape == (4, 4, 8, 12)
    with torch.no_grad():
        frames = sampler.decode(fast(model.load_vae(pipeline_folder)), latents[None])
    assert np.array_equal(contact_sheet(frames).numpy(), videos[2])
    assert not (tmp_path / "alone.safetensors").exists()


@pytest.mark.parametrize("args, message", [
    (["--image", "https://example.org/in.png"], "a URL; download it and give the file"),
    (["--image", "-"], "cannot be read as a picture"),
    (["--image", "in.png", "--gallery", "g.jpg"], "must end in .png"),
    (["--image", "in.png", "--num_videos", "0"], "argument --num_videos: 0 is not between 1 and 1000")])
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(b"")))
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, sampler, *args)
    complaint = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in complaint and message in complaint


def test_help_fits_a_screen_and_is_grouped(capsys):
    with pytest.raises(SystemExit):
        sampler.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 110
    assert [line for line in lines if re.fullmatch(r"\w.*:", line)] == [
        "options:", "what:", "with which model:", "how:"]
