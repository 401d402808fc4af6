"""lora.py: updates that train, switch off, merge, save and load; the same files in diffusers and PEFT."""
import copy
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import assert_close_relative, randomize, relative_error, unet_config
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import load_file, save_file
from test_model import diffusers_unet, same_weights, unet_inputs
from torch import nn

import evaluate
import lora
import model
import sampler
from support.checkpoint import ModelError

CONFIG = unet_config((32, 64))

with_convs = pytest.mark.parametrize(
    "targets", [lora.LORA_TARGETS, lora.LORA_CONVS], ids=["linear", "convs"])


def lora_unet(rank=4, alpha=2, targets=lora.LORA_TARGETS):
    """(a network, the same network with a random LoRA)."""
    plain = randomize(model.UNet(**CONFIG))
    net = lora.add_lora(copy.deepcopy(plain), rank, alpha, targets)
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return plain, net


# ---------------------------------------------------------------------------------------------------------
# Networks


@with_convs
@torch.no_grad()
def test_fresh_lora_changes_nothing(targets):
    plain, inputs = randomize(model.UNet(**CONFIG)), unet_inputs()
    expected = plain(*inputs)
    assert torch.equal(lora.add_lora(plain, 4, targets=targets)(*inputs), expected)


@with_convs
def test_only_the_update_trains(targets):
    plain, net = lora_unet(targets=targets)
    frozen = {name: parameter.clone() for name, parameter in net.named_parameters() if "lora_" not in name}
    assert {name for name, parameter in net.named_parameters() if parameter.requires_grad} == {
        f"{path}.lora_{m}.weight" for path in lora.lora_layers(net) for m in "AB"}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    net(*unet_inputs()).square().mean().backward()
    for path, layer in lora.lora_layers(net).items():
        assert layer.lora_A.weight.grad.abs().max() > 0 and layer.lora_B.weight.grad.abs().max() > 0, path
    optimizer.step()
    assert all(torch.equal(dict(net.named_parameters())[name], value) for name, value in frozen.items())


def test_default_targets_are_the_linears_of_attention_and_feed_forward():
    """Except the query path of the attention to one token, which has no influence."""
    plain, net = lora_unet()
    expected = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)
                and any(part in name for part in (".attn1.", ".attn2.", ".ff.", ".ff_in."))
                and not name.endswith(("attn2.to_q", "attn2.to_k"))}
    assert set(lora.lora_layers(net)) == expected
    # The published adapters of LCM-LoRA name these layers. Here some of them are temporal convolutions.
    ends = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv",
            "upsamplers.0.conv", "time_emb_proj")
    more = {name for name, module in plain.named_modules()
            if name.endswith(ends) and not isinstance(module, nn.Identity)}
    assert any("temporal_res_block.conv1" in name for name in more)
    assert set(lora.lora_layers(lora_unet(targets=lora.LORA_CONVS)[1])) == expected | more


def test_targets_are_any_regular_expression():
    net = model.UNet(**CONFIG)
    with pytest.raises(ModelError, match="nothing to add LoRA to"):
        lora.add_lora(net, 2, targets="no_such_layer")
    lora.add_lora(net, 2, targets=r"time_embedding\.linear_[12]")
    assert set(lora.lora_layers(net)) == {"time_embedding.linear_1", "time_embedding.linear_2"}
    with pytest.raises(ModelError, match="has LoRA layers already: merge_lora"):
        lora.add_lora(net, 2)


@with_convs
@torch.no_grad()
def test_without_lora_is_the_network_as_it_was(targets):
    """Also after an error inside the with statement the updates are on again."""
    (plain, net), inputs = lora_unet(targets=targets), unet_inputs()
    expected = net(*inputs)
    with pytest.raises(KeyError), lora.without_lora(net) as off:
        assert off is net and torch.equal(net(*inputs), plain(*inputs))
        raise KeyError
    assert torch.equal(net(*inputs), expected) and relative_error(plain(*inputs), expected) > 0.1


@with_convs
@torch.no_grad()
def test_merged_lora_computes_the_same_with_plain_keys(tmp_path, targets):
    plain, net = lora_unet(targets=targets)
    inputs = unet_inputs()
    expected = net(*inputs)
    assert relative_error(plain(*inputs), expected) > 0.1               # the update has a visible effect
    with pytest.raises(ModelError, match="merge_lora it first"):
        model.save_unet(net, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    lora.merge_lora(net)
    assert_close_relative(net(*inputs), expected)
    assert list(net.state_dict()) == list(plain.state_dict())
    model.save_unet(net, tmp_path)
    theirs = DiffusersUNet.from_pretrained(tmp_path)
    assert_close_relative(diffusers_unet(theirs, *inputs), expected)


@with_convs
@torch.no_grad()
def test_merging_with_scale_minus_one_subtracts_a_merged_update(tmp_path, targets):
    plain, net = lora_unet(targets=targets)
    lora.save_lora(net, tmp_path)
    merged = lora.merge_lora(net)
    back = lora.merge_lora(lora.load_lora(merged, tmp_path), scale=-1).state_dict()
    for key, weight in plain.state_dict().items():
        torch.testing.assert_close(back[key], weight, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# Files


@with_convs
@pytest.mark.parametrize("alpha", [2, 7.5])
@torch.no_grad()
def test_lora_round_trip(tmp_path, alpha, targets):
    plain, net = lora_unet(4, alpha, targets)
    inputs = unet_inputs()
    lora.save_lora(net, tmp_path)
    assert set(load_file(tmp_path / lora.LORA_FILE)) == {
        f"unet.{path}.lora_{m}.weight" for path in lora.lora_layers(net) for m in "AB"}
    for path in (tmp_path, str(tmp_path), tmp_path / lora.LORA_FILE):
        loaded = lora.load_lora(copy.deepcopy(plain), path)
        assert torch.equal(loaded(*inputs), net(*inputs))
    lora.save_lora(loaded, tmp_path / "again")
    assert torch.equal(lora.load_lora(plain, tmp_path / "again")(*inputs), net(*inputs))


@torch.no_grad()
def test_lora_of_a_bf16_network_round_trip(tmp_path):
    """The network is bf16. The update that trains is fp32, in the file too."""
    plain = randomize(model.UNet(**CONFIG)).bfloat16()
    net = lora.add_lora(copy.deepcopy(plain), 4)
    for layer in lora.lora_layers(net).values():
        nn.init.normal_(layer.lora_B.weight, std=0.2)
    assert {parameter.dtype for parameter in net.parameters() if parameter.requires_grad} == {torch.float32}
    lora.save_lora(net, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / lora.LORA_FILE).values()} == {torch.float32}
    again, inputs = lora.load_lora(plain, tmp_path), unet_inputs()
    assert all(torch.equal(x, net.state_dict()[key]) for key, x in again.state_dict().items())
    before = net(*inputs)
    # Not to the bit: sums in bf16 on a CPU depend on where in memory their terms are.
    assert relative_error(again(*inputs), before) < 0.01
    assert relative_error(lora.merge_lora(net)(*inputs), before) < 0.05        # one bf16 rounding is 2^-9


class DiffusersLoraUNet(DiffusersUNet, PeftAdapterMixin):
    """diffusers' SVD UNet with the LoRA loader of diffusers' other models, which it lacks."""


@with_convs
@pytest.mark.parametrize("alpha", [2, 4])
@torch.no_grad()
def test_lora_files_are_shared_with_diffusers_and_peft(tmp_path, alpha, targets):
    """Our files load there, and files saved there load here, with the same scale alpha / rank."""
    plain, net = lora_unet(4, alpha, targets)
    inputs = unet_inputs()
    lora.save_lora(net, tmp_path / "ours")
    theirs = DiffusersLoraUNet(**CONFIG).eval()
    theirs.load_state_dict(plain.state_dict())
    theirs.load_lora_adapter(str(tmp_path / "ours"), prefix="unet", adapter_name="osv", use_safetensors=True)
    expected = net(*inputs)
    assert_close_relative(diffusers_unet(theirs, *inputs), expected)
    theirs.save_lora_adapter(str(tmp_path / "theirs"), adapter_name="osv")
    assert_close_relative(lora.load_lora(plain, tmp_path / "theirs")(*inputs), expected)


@torch.no_grad()
def test_lora_file_may_hold_whole_weights(tmp_path):
    """Such as the temporal blocks that stage 2 trains. whole=False refuses them, and changes nothing."""
    (plain, net), inputs = lora_unet(), unet_inputs()
    lora.save_lora(net, tmp_path)
    whole = {key: torch.randn_like(tensor) for key, tensor in net.state_dict().items()
             if "temporal_transformer_blocks" in key and ".norm" in key}
    net.load_state_dict(whole, strict=False)
    tensors = load_file(tmp_path / lora.LORA_FILE)
    save_file({**tensors, **{f"unet.{key}": tensor for key, tensor in whole.items()}},
              tmp_path / "whole.safetensors")
    before = copy.deepcopy(plain)
    with pytest.raises(ModelError, match="does not fit a layer of this network"):
        lora.load_lora(plain, tmp_path / "whole.safetensors", whole=False)
    assert same_weights(plain, before)
    loaded = lora.load_lora(plain, tmp_path / "whole.safetensors")
    for layer in lora.lora_layers(loaded).values():
        layer.alpha = 2                                         # this file has no metadata: alpha is the rank
    assert torch.equal(loaded(*inputs), net(*inputs))


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
    lora.save_lora(net, tmp_path)
    tensors = load_file(tmp_path / lora.LORA_FILE)
    last = max(tensors)                                         # the key that is read last: others are fine
    change(tensors, last)
    save_file(tensors, tmp_path / lora.LORA_FILE)
    path = last.removeprefix("unet.").rsplit(".lora_", 1)[0].replace(".", r"\.")
    with pytest.raises(ModelError, match=f"{lora.LORA_FILE}: .*{message.replace('{path}', path)}"):
        lora.load_lora(plain, tmp_path)
    assert not lora.lora_layers(plain)


@pytest.mark.parametrize("metadata, message", [
    ("{", "cannot be read"), ("[]", "cannot be read"), ("[" * 9999, "cannot be read"),
    *((f'{{"unet.lora_alpha": {alpha}}}', "lora_alpha is .*, not a number up to") for alpha in (
        '"large"', "NaN", "Infinity", "-1e9", "true", "[4]")),
    ('{"unet.use_rslora": true}', "use_rslora, which is not supported"),
    ('{"unet.use_dora": true}', "use_dora, which is not supported"),
    ('{"alpha_pattern": {"to_q": 8}}', "alpha_pattern, which is not supported")])
def test_lora_of_unknown_scale_is_refused(tmp_path, metadata, message):
    """The error names where the settings are: in diffusers' file, or in a file beside PEFT's."""
    plain, net = lora_unet()
    lora.save_lora(net, tmp_path)
    file = tmp_path / lora.LORA_FILE
    save_file(load_file(file), file, {"lora_adapter_metadata": metadata})
    with pytest.raises(ModelError, match=f"{lora.LORA_FILE}: its lora_adapter_metadata.*{message}"):
        lora.load_lora(plain, tmp_path)
    save_file(load_file(file), tmp_path / lora.PEFT_FILE)
    file.unlink()
    (tmp_path / "adapter_config.json").write_text(metadata.replace("unet.", ""))
    with pytest.raises(ModelError, match="adapter_config.json: (?!.*metadata)") as error:
        lora.load_lora(plain, tmp_path)
    assert not lora.lora_layers(plain) and "\n" not in str(error.value)


def test_lora_of_an_absurd_rank_is_refused(tmp_path):
    """Before memory for it is allocated."""
    plain, net = lora_unet()
    path = min(lora.lora_layers(net))
    rows, columns = lora.lora_layers(net)[path].weight.shape
    save_file({f"unet.{path}.lora_A.weight": torch.zeros(70_000, columns, dtype=torch.int8),
               f"unet.{path}.lora_B.weight": torch.zeros(rows, 70_000, dtype=torch.int8)},
              tmp_path / lora.LORA_FILE)
    with pytest.raises(ModelError, match=r"lora_A and lora_B have shapes \[\(70000"):
        lora.load_lora(plain, tmp_path)


def test_lora_files_are_the_same_in_every_run(tmp_path):
    """safetensors writes several metadata keys in random order."""
    _, net = lora_unet()
    for i in range(8):
        lora.save_lora(net, tmp_path / str(i))
    assert len({(tmp_path / str(i) / lora.LORA_FILE).read_bytes() for i in range(8)}) == 1


@torch.no_grad()
def test_lora_without_metadata_has_scale_one(tmp_path):
    """As in diffusers, alpha defaults to the rank. Ranks may differ between layers."""
    plain, net = lora_unet(4, alpha=4)
    lora.save_lora(net, tmp_path)
    tensors, inputs = load_file(tmp_path / lora.LORA_FILE), unet_inputs()
    a = min(tensors)                                                            # a layer's .lora_A.weight
    b = a.replace("lora_A", "lora_B")
    for key, dim in ((a, 0), (b, 1)):                                           # rank 8, of which 4 are zeros
        tensors[key] = torch.cat([tensors[key], torch.zeros_like(tensors[key])], dim)
    save_file(tensors, tmp_path / lora.LORA_FILE)
    loaded = lora.load_lora(plain, tmp_path)
    assert_close_relative(loaded(*inputs), net(*inputs), 1e-6)
    with pytest.raises(ModelError, match=r"different \(rank, alpha\) \[\(4, 4\), \(8, 8\)\]"):
        lora.save_lora(loaded, tmp_path / "again")


def test_missing_lora_file_is_one_sentence(tmp_path):
    plain, _ = lora_unet()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.safetensors"):
        with pytest.raises(ModelError, match="not a readable safetensors file"):
            lora.load_lora(plain, path)
    with pytest.raises(ModelError, match="call add_lora first"):
        lora.save_lora(plain, tmp_path)


@torch.no_grad()
def test_student_is_a_unet_or_a_lora(tmp_path):
    """A folder, a single file, and a LoRA, which is merged; all in the dtype of the pipeline's UNet.
    (test_ecosystem.py has more kinds, and hostile files.)"""
    plain, net = lora_unet()
    lora.save_lora(net, tmp_path / "lora")
    merged = lora.merge_lora(net)
    model.save_unet(merged, tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    for path in (tmp_path / "lora", tmp_path / "lora" / lora.LORA_FILE, tmp_path / "unet", file):
        assert same_weights(lora.load_student(path, copy.deepcopy(plain)), merged)
    student = lora.load_student(tmp_path / "unet", copy.deepcopy(plain).bfloat16())
    assert same_weights(student, copy.deepcopy(merged).bfloat16())


def test_a_small_lora_survives_in_bf16(pipeline_folder, tmp_path):
    """sampler.py and evaluate.py merge a LoRA in fp32 and convert the sum: the weights are those of merged/.
    Converted first, weights would lose an update that is smaller than their rounding."""
    net = lora.add_lora(model.load_unet(pipeline_folder), 4)
    for layer in lora.lora_layers(net).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=1e-4)
    lora.save_lora(net, tmp_path)
    expected = lora.merge_lora(net).bfloat16()
    args = sampler.parse_args(["--image", "in.png", "--model", str(pipeline_folder), "--student",
                               str(tmp_path), "--plain"])
    assert same_weights(sampler.load_networks(args, torch.bfloat16)[0], expected)
    report = SimpleNamespace(args=args, device=SimpleNamespace(type="cuda"))
    loader = lambda path, dtype, device: model.load_unet(path, dtype=dtype)
    assert same_weights(evaluate.Report.load(report, loader, tmp_path), expected)
    lossy = lora.load_student(tmp_path, model.load_unet(pipeline_folder, dtype=torch.bfloat16))
    assert not same_weights(lossy, expected)


def test_student_folder_is_read_in_its_pipelines_variant_if_it_has_it(tmp_path):
    net = randomize(model.UNet(**CONFIG))
    model.save_unet(net, tmp_path / "one")
    model.save_unet(net, tmp_path / "both")
    model.save_unet(net, tmp_path / "both", torch.float16, "fp16")
    half = copy.deepcopy(net).half().float()
    assert same_weights(lora.load_student(tmp_path / "one", net, variant="fp16"), net)
    assert same_weights(lora.load_student(tmp_path / "both", net, variant="fp16"), half)
    assert same_weights(lora.load_student(tmp_path / "both", net), net)


def test_hub_student_is_read_in_its_pipelines_variant_if_it_has_it(tmp_path, monkeypatch):
    """From a cache in the layout of the hub: a bare UNet, and one in unet/; with the variant, and without."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    net = randomize(model.UNet(**CONFIG))
    half = copy.deepcopy(net).half().float()
    for name, inside in (("bare", ""), ("pipeline", "unet")):
        for variants in ("one", "both"):
            repo = tmp_path / f"models--owner--{name}-{variants}"
            folder = repo / "snapshots" / ("a" * 40) / inside
            model.save_unet(net, folder)
            if variants == "both":
                model.save_unet(net, folder, torch.float16, "fp16")
            (repo / "refs").mkdir()
            (repo / "refs" / "main").write_text("a" * 40)
        teacher = model.UNet(**CONFIG)
        assert same_weights(lora.load_student(f"owner/{name}-one", teacher), net)
        assert same_weights(lora.load_student(f"owner/{name}-one", teacher, variant="fp16"), net)
        assert same_weights(lora.load_student(f"owner/{name}-both", teacher), net)
        assert same_weights(lora.load_student(f"owner/{name}-both", teacher, variant="fp16"), half)
    with pytest.raises(ModelError, match="owner/none: no such folder here, and the hub cannot"):
        lora.load_student("owner/none", teacher, variant="fp16")


def test_a_student_of_another_model_is_refused(tmp_path):
    """A UNet that takes image embeddings of another length, as SVD's student beside the toy model."""
    teacher = model.UNet(**unet_config())
    model.save_unet(model.UNet(**unet_config(cross_attention_dim=48)), tmp_path)
    with pytest.raises(ModelError, match="its cross_attention_dim is 48, that of --model is 24"):
        lora.load_student(tmp_path, teacher)
