"""What support/checkpoint.py promises about files: written whole or not at all, never over an input, by one
run at a time; damaged ones are named in one line."""
import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from support import checkpoint
from support.checkpoint import (
    ModelError,
    check_writable,
    clear_parts,
    read_json,
    read_lines,
    refuse_overwriting,
    replacing,
    write_json,
    write_safetensors,
)
from support.media import save_sheet

# ---------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("content, reason", [
    (b"", "not a readable JSON file"), (b'{"step": 1', "not a readable"), (b"\xff\xfe{}", "not a readable"),
    (b"[" * 100_000, "not a readable"), (b"[]", "not a JSON object"), (b"null", "not a JSON object"),
    (b"7", "not a JSON object"), (b'{"rows": []}', "step is None, not of type int"),
    (b'{"step": "1", "rows": []}', "step is '1', not of type int"),
    (b'{"step": true, "rows": []}', "step is True"), (b'{"step": 1, "rows": {}}', "rows is {}")])
def test_json_that_is_not_what_it_should_be(tmp_path, content, reason):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ModelError, match=f"a.json: .*{reason}"):
        read_json(tmp_path / "a.json", step=int, rows=list)


def test_json_with_the_right_types(tmp_path):
    (tmp_path / "a.json").write_text('{"step": 1, "rows": [], "more": "é"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", step=int, rows=list) == {"step": 1, "rows": [], "more": "é"}


def test_damaged_lines_are_left_out_and_counted(tmp_path, capsys):
    file, good = tmp_path / "a.jsonl", b'{"path": "a", "more": 1}\n'
    file.write_bytes(good + b"\0" * 40 + b"\n" + b'{"path": "\xff"}\n' + b"[" * 100_000 + b"\n"
                     + b'{"path": 7}\n[]\n\n' + good + b'{"path": "a", "mo')
    assert read_lines(file, path=str) == 2 * [{"path": "a", "more": 1}]
    assert capsys.readouterr().err == f"warning: {file}: 7 damaged lines are left out\n"
    assert read_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("read", [
    read_json, read_lines, lambda file: list(checkpoint.read_safetensors([file]))])
def test_named_pipes_are_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")                        # reading it would wait for ever
    with pytest.raises(ModelError, match="pipe: a folder, pipe or device, not a file"):
        read(tmp_path / "pipe")


# ---------------------------------------------------------------------------------------------------------
# Writing


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(error), replacing(tmp_path / "a.json") as part:
            part.write_text("half")
            raise error
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def write_picture(suffix):
    return lambda file: save_sheet(torch.rand(1, 2, 3, 256, 256), file.with_suffix(suffix))


@pytest.mark.parametrize("write", [
    lambda file: write_json(file, {"a": list(range(40_000))}),
    lambda file: write_safetensors(file, {"a": torch.zeros(100_000)}), write_picture(".jpg"),
    write_picture(".png")])
def test_a_full_disk_is_one_line_with_the_files_name(tmp_path, write):
    """A limit on the size of files stands for a full disk: it fails in the same place."""
    import resource
    import signal
    file = tmp_path / "model.safetensors"
    file.write_text("old")
    limits, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError) as caught:
            write(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert str(caught.value).startswith(f"{file.with_suffix('')}.") and "\n" not in str(caught.value)
    assert f": cannot be written ({os.strerror(errno.EFBIG)}" in str(caught.value).replace(
        "Error while serializing: I/O error: ", "") and ".part" not in str(caught.value)
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["model.safetensors"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """As two processes that write the same report at the same time. The last one to finish counts."""
    with replacing(tmp_path / "a.json") as first, replacing(tmp_path / "a.json") as second:
        first.write_text("first")
        second.write_text("second")
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "first"


def test_files_have_the_usual_mode(tmp_path):
    """That of the umask, as if `open` had made them, so that others in a group can read them."""
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        checkpoint.save_checkpoint(tmp_path, 3, {"x": torch.zeros(2)}, {}, keep=1)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a.json": 0o640, "a.safetensors": 0o640, "checkpoint-0000003": 0o750,
                     "state.json": 0o640, "state.safetensors": 0o640}


@pytest.mark.parametrize("numbers", [[1.5, float("inf"), -float("inf")], {"psnr": float("inf"), "n": 2}])
def test_json_without_the_words_that_json_lacks(tmp_path, numbers):
    """json.dumps writes Infinity and NaN, which strict parsers refuse. Strings that have these words stay.
    Files of older versions are read as well."""
    content = {"rows": [numbers], "text": 'has "NaN" and Infinity, NaN', "NaN": "NaN", "end": '\\"NaN'}
    write_json(tmp_path / "a.json", content)
    (tmp_path / "a.jsonl").write_text(2 * checkpoint.to_json(content))
    for line in [(tmp_path / "a.json").read_text(), *(tmp_path / "a.jsonl").read_text().splitlines()]:
        assert json.loads(line, parse_constant=lambda word: pytest.fail(word)) == content
    assert read_json(tmp_path / "a.json") == content and read_lines(tmp_path / "a.jsonl") == 2 * [content]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert read_json(tmp_path / "old.json") == content


def test_nan_is_null(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("nan"), "NaN"]})
    assert read_json(tmp_path / "a.json") == {"x": None, "y": [None, "NaN"]}


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"/pipe: cannot be written \(it is a device or a pipe\)"):
        write_json(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_the_longest_name_that_a_disk_allows(tmp_path):
    for name in ("a" * 250 + ".json", "語" * 83 + ".json"):                  # 255 and 254 bytes
        check_writable(tmp_path / name)
        write_json(tmp_path / name, {"a": 1})
        assert read_json(tmp_path / name) == {"a": 1}
    with pytest.raises(OSError, match="too long"):
        check_writable(tmp_path / ("a" * 256))


def test_a_folder_is_written_whole_and_named_in_errors(tmp_path):
    with pytest.raises(OSError, match=r"^\S*/checkpoint-0000003: cannot be written \(Is a directory\)$"), \
            replacing(tmp_path / "checkpoint-0000003") as part:
        write_json(part / "state.json", {})
        (part / "other.json").mkdir()
        write_json(part / "other.json", {})
    assert os.listdir(tmp_path) == []
    with replacing(tmp_path / "checkpoint-0000003") as part:
        write_json(part / "state.json", {})
    assert os.listdir(tmp_path / "checkpoint-0000003") == ["state.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_only_finite_weights_are_written(tmp_path, bad):
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    with pytest.raises(ModelError, match="a.safetensors: not written, because y has NaN or infinity"):
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(3), "y": torch.tensor([0.0, bad])})
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [1, 1, 1]


def test_weights_have_the_same_bytes_each_time(tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for file in files:
        write_safetensors(file, {"a": torch.zeros(2), "b": torch.ones(3)}, {"lora_adapter_metadata": "{}"})
    assert len({file.read_bytes() for file in files}) == 1


# ---------------------------------------------------------------------------------------------------------
# At the start of a script


def test_outputs_that_are_inputs_are_refused(tmp_path):
    picture, weights = tmp_path / "in.png", tmp_path / "unet" / "model.safetensors"
    weights.parent.mkdir()
    for file in (picture, weights):
        file.write_text("old")
    (tmp_path / "soft.png").symlink_to(picture)
    os.link(picture, tmp_path / "hard.png")
    inputs = [picture, weights.parent, None, tmp_path / "missing"]
    for name in ("in.png", "unet/../in.png", "soft.png", "hard.png", "unet", "missing",
                 "unet/model.safetensors"):
        with pytest.raises(ModelError, match="would overwrite .*; choose another name"):
            refuse_overwriting([tmp_path / name], inputs)
    with pytest.raises(ModelError, match="out.png: would overwrite .*out.png"):
        refuse_overwriting([tmp_path / "out.png", tmp_path / "unet" / ".." / "out.png"], [])
    refuse_overwriting([tmp_path / "out.mp4", tmp_path / "unet" / "new.json", None], inputs)


def test_what_cannot_be_written_is_found_first(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file" / "a.json", tmp_path, Path("/"), Path("."), Path("/proc/nothing/a.json")):
        with pytest.raises(OSError, match=f"{path}.*: cannot be written"):
            check_writable(None, tmp_path / "good.json", path)
    check_writable(tmp_path / "file", tmp_path / "new" / "a.json")
    assert (tmp_path / "file").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["file", "new"]


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.json").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "link.json"):
        with pytest.raises(OSError, match=f"{path}: cannot be written .it is a device or a pipe"):
            check_writable(path)


def test_leftovers_of_killed_writers_are_cleared(tmp_path):
    with replacing(tmp_path / "a.json") as file, replacing(tmp_path / "checkpoint-0000005") as folder:
        file.touch()
        folder.mkdir()
    for name in (file.name, ".tmpAb3xYz", "a.json", ".tmp", "b.part"):
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoint-0000005").rename(folder)    # both names are now as a killed writer leaves them
    clear_parts(tmp_path)
    clear_parts(tmp_path / "nowhere")
    assert sorted(os.listdir(tmp_path)) == [".tmp", "a.json", "b.part"]


def test_one_process_per_folder(tmp_path):
    code = f"from pathlib import Path; from support.checkpoint import lock; lock(Path({str(tmp_path)!r}))"
    holder = subprocess.Popen([sys.executable, "-c", code + "; print(1, flush=True); input()"], cwd=ROOT,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.read(2) == b"1\n"
    with pytest.raises(ModelError, match=f"{tmp_path}: process {holder.pid} on .* works in it"):
        checkpoint.lock(tmp_path)
    holder.kill()                                       # leaves no lock behind
    holder.wait()
    (tmp_path / ".checkpoint-5.part").mkdir()           # it was killed while it wrote this
    checkpoint.lock(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]
    checkpoint.LOCKS.pop().close()


# ---------------------------------------------------------------------------------------------------------
# Checkpoints whose tensors do not fit


@pytest.mark.parametrize("step", [-3, 5, 10 ** 30])
def test_a_checkpoint_with_another_step_is_incomplete(tmp_path, step, capsys):
    for number in (3, 6):
        checkpoint.save_checkpoint(tmp_path, number, {"x": torch.zeros(2)}, {}, keep=3)
    file = tmp_path / "checkpoint-0000006" / "state.json"
    write_json(file, read_json(file) | {"step": step})
    assert checkpoint.load_checkpoint(tmp_path, "latest", {}) == 3
    assert f"its step is {step}" in capsys.readouterr().err


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.pop("theta.weight"), lambda tensors: tensors.update(other=torch.zeros(2)),
    lambda tensors: tensors.update({"theta.weight": torch.zeros(3, 2)}),
    lambda tensors: tensors.update({"opt.0.exp_avg": torch.zeros(1)}),
    lambda tensors: tensors.update({"opt.9.step": torch.zeros(())})])
def test_tensors_that_do_not_fit_make_a_checkpoint_incomplete(tmp_path, change, capsys):
    net = torch.nn.Linear(2, 2)
    groups, optimizers = {"theta": dict(net.named_parameters())}, {"opt": torch.optim.Adam(net.parameters())}
    net(torch.ones(1, 2)).sum().backward()
    optimizers["opt"].step()
    tensors = checkpoint.collect(groups, optimizers)
    checkpoint.save_checkpoint(tmp_path, 3, tensors, {}, keep=3)
    change(tensors)
    checkpoint.save_checkpoint(tmp_path, 6, tensors, {}, keep=3)
    restore = partial(checkpoint.restore, groups, optimizers)
    step = checkpoint.load_checkpoint(tmp_path, "latest", {}, restore=restore)
    assert step == 3 and "checkpoint-0000006 is incomplete and skipped" in capsys.readouterr().err
    with pytest.raises(ModelError, match="not a complete checkpoint"):
        checkpoint.load_checkpoint(tmp_path, str(tmp_path / "checkpoint-0000006"), {}, restore=restore)
    with pytest.raises(ModelError, match="rank was None, is 8"):        # whose tensors have other shapes
        checkpoint.load_checkpoint(tmp_path, "latest", {"rank": 8}, restore=restore)
    shutil.rmtree(tmp_path / "checkpoint-0000003")                  # a run from step 0 would delete the rest
    with pytest.raises(ModelError, match="none of its checkpoints can be used"):
        checkpoint.load_checkpoint(tmp_path, "latest", {}, restore=restore)
    assert checkpoint.load_checkpoint(tmp_path, "none", {}, restore=restore) == 0
