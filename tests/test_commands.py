"""The commands and Python snippets of the pages are typed in, as a reader would: all of them that need
neither a GPU, nor the network, nor files that only the reader has.

They run in a copy of the repository, one copy for all tests. A command that reads what another one writes
names it under `needs`, and that one is typed first, unless it was typed before. So each of these tests runs
alone, and all of them together type no command twice.

Every command of a page is in one of the three tables below, or the first test fails. By default flags are
added that make a command short, nothing else is changed, and `python` is a fork of a process that has
imported torch (tests/forked.py). All of TYPED and SLOW, without added flags, takes two hours:

    $ OSV_README=all python -m pytest tests/test_commands.py -x
"""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import chain
from types import SimpleNamespace
from typing import NamedTuple

import av
import pytest
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from test_video import at_rate, write

from support.checkpoint import ModelError
from tools import bench

ALL = os.environ.get("OSV_README") == "all"
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
PAGES = ["README.md", *DOCS, "exercises/README.md"]
SMALL = "--width 64 --height 64 --num_frames 4"                 # a video in a third of a second, not in two
STEP = ("--max_train_steps 1 --batch_size 1 --num_clips 2 --width 32 --height 32 --log_steps 1 "
        "--validation_teacher_steps 1")                         # a stage in 3 seconds, not in minutes


class Typed(NamedTuple):
    """What a command has to do."""
    makes: str = ""                                             # files that must exist afterwards, and open
    says: str = ""                                              # a pattern on stdout
    adds: str = ""                                              # flags that make it short
    fails: str = ""                                             # it must say this and end with status 1
    needs: str = ""                                             # a key of TYPED that must be typed before


# A key that ends in ... means a command that begins like this.
TYPED = {
    # -- README.md
    "make sample": Typed("out.mp4", "wrote out.mp4: 14 frames"),
    "python sampler.py --image in.png --out out.mp4": Typed("out.mp4", "wrote out.mp4", SMALL),
    "python sampler.py --image in.png --student out/stage2/merged":
        Typed("out.mp4", "wrote out.mp4", SMALL, needs="python train_stage2.py"),
    # -- docs/sampling.md
    "python sampler.py --image in.png": Typed("out.mp4", "wrote out.mp4", SMALL),
    "python sampler.py --image photos/ --out clip.gif --seed 7":
        Typed("clip_a.gif clip_b.gif", "seed 7,(.|\n)*seed 8,", SMALL),
    "python sampler.py --image in.png --num_videos 8 --gallery seeds.png":
        Typed("out_0.mp4 out_7.mp4 seeds.png", "seeds.png: 8 videos", SMALL),
    "python sampler.py --image - --out clip.gif < in.png": Typed("clip.gif", "wrote clip.gif", SMALL),
    "python sampler.py --image in.png --save_latents": Typed("out.mp4 out.safetensors", "", SMALL),
    "python sampler.py --image in.png --plain": Typed("out.mp4", "wrote out.mp4", SMALL),
    "python sampler.py --help": Typed(says="--image IN"),
    # -- docs/toy_world.md
    'python -c "from pathlib import Path; ...': Typed("toy.png"),
    # -- docs/training.md: one step instead of all
    "python train_stage1.py": Typed(
        "out/stage1/metrics.jsonl out/stage1/student.safetensors out/stage1/disc.safetensors "
        "out/stage1/pytorch_lora_weights.safetensors out/stage1/merged/config.json", "from step 0", STEP),
    "python train_stage2.py": Typed(
        "out/stage2/metrics.jsonl out/stage2/student.safetensors out/stage2/merged/config.json",
        "from step 0", STEP, needs="python train_stage1.py"),
    "python -m tools.plot out/stage1/metrics.jsonl plot.png":
        Typed("plot.png", needs="python train_stage1.py"),
    "python train_stage2.py --stage1 none --adv_weight 0 ...": Typed(
        "out/lcm/metrics.jsonl out/lcm/merged/config.json", "from step 0", STEP),
    "python train_stage1.py --discriminator unet --train all ...": Typed(
        "out/sfv/metrics.jsonl out/sfv/merged/config.json", "from step 0", STEP),
    # -- docs/videos.md
    "python data.py check VIDEOS --out good.jsonl": Typed("good.jsonl good.bad.jsonl", "2 .* 1 are not"),
    "python data.py preview VIDEOS --out sheet.png": Typed("sheet.png", "wrote sheet.png", "--num_clips 2"),
    "python data.py encode VIDEOS --model SVD --out SHARDS": Typed(
        "SHARDS/index.json SHARDS/shard-000000.safetensors", "wrote SHARDS", "--width 64 --height 64"),
    'python train_stage1.py --data OpenVid-1M.csv --where "motion score" 2 20 --flip ...': Typed(
        "out/videos/metrics.jsonl out/videos/merged/config.json", "from step 0", f"{STEP} --workers 1"),
    # -- docs/troubleshooting.md; most of its commands are variants of those above and stand in SLOW
    'python -c "import json; runs ...': Typed("curves.jsonl"),
    "python -m tools.plot curves.jsonl docs/expected_loss.png":
        Typed("docs/expected_loss.png", needs='python -c "import json; runs ...'),
    "cat out/stage1/checkpoint-*/state.json": Typed(says='"model": "', needs="python train_stage1.py"),
    # -- docs/diffusers.md
    "python -m tools.export export ...": Typed(
        "out/osv/README.md out/osv/model_index.json out/osv/unet/diffusion_pytorch_model.safetensors",
        needs="python train_stage2.py"),
    "python -m tools.export merge ...": Typed(
        "out/merged/model_index.json out/merged/unet/diffusion_pytorch_model.safetensors",
        needs="python train_stage1.py"),
    "python -m tools.export unmerge ...": Typed(
        "out/plain/model_index.json out/plain/unet/diffusion_pytorch_model.safetensors",
        needs="python -m tools.export merge ..."),
    # -- exercises/README.md
    "python exercises/grade.py ex01": Typed(says="of 1 points\n\nnext, ex01_karras_grid.py: to be written"),
    "python -c ...": Typed(says=r"\d"),
    "python exercises/between.py --out between.jpg": Typed(
        "between.jpg between.json", "mean of 1: teacher",
        "--clips 1 --places 3 --solver_steps 1 --num_frames 2"),
    "python exercises/guidance.py --out guidance.jpg": Typed(
        "guidance.jpg", r"student, sigma +700", "--clips 1 --solver_steps 1 --num_frames 2"),
    'python -c "import pathlib as p; ...': Typed("out_attached.py"),
    "python out_attached.py ...": Typed(                        # fails is the answer to question 12
        says="from step 0", adds=STEP, fails="Trying to backward through the graph a second time",
        needs='python -c "import pathlib as p; ...'),
}

# Typed only with OSV_README=all. Other tests run most of their code.
SLOW = {
    # The page promises a CPU minute; tests/test_toy.py takes fewer steps
    "python -m toy.train --quick --output_dir out_toy":
        Typed("out_toy/model_index.json out_toy/unet/diffusion_pytorch_model.safetensors", "together"),
    # A minute: it writes a video of 1080p and a list of a million rows first
    "python tests/video_speed.py --report results/videos.json":
        Typed("results/videos.json", "1,000,000 rows"),
    # Twenty minutes and more; tests/test_exercise_mutations.py has smaller networks
    "python exercises/capstone.py":
        Typed("out/capstone/capstone.png out/capstone/capstone.json", "after stage 2, Time Travel Sampler"),
    "python exercises/capstone.py --stage1_steps 1 ...":
        Typed("out/capstone/capstone.png out/capstone/capstone.json", "after stage 2, Time Travel Sampler"),
    # Five commands of some seconds each, even with STEP
    "python train_stage2.py --stage1 none --max_train_steps 8 ...": Typed(
        "", "loss_huber .* s_per_step", STEP),
    "python train_stage2.py --stage1 none --num_clips 16 --max_train_steps 20 ...": Typed(
        "", "loss_huber .* s_per_step", STEP),
    "python tests/rehearsal.py --size small ...": Typed("results/rehearsal_small.json", "peft .* 7 of 7"),
    "python -m tools.bench train --size toy ...": Typed("results/discriminators.json", "pixel discriminator"),
    # Minutes: many steps of the teacher
    "python exercises/between.py --out results/between.jpg": Typed("results/between.json", "Time Travel"),
    "python exercises/guidance.py --out results/guidance.jpg": Typed("results/guidance.jpg", "teacher"),
    "python -m tools.tables student --num_clips 3 ...": Typed("out.json out.jpg", "shipped +tts"),
    # A sampler's flags: tests/test_sampler.py and tests/test_media.py
    "python sampler.py --image in.png --teacher --steps 1 --out teacher.mp4":
        Typed("teacher.mp4", "1-step teacher", SMALL),
    "python sampler.py --image in.png --student out/stage1/merged --no_tts --out one.mp4":
        Typed("one.mp4", "1-step student", SMALL, needs="python train_stage1.py"),
    "python sampler.py --image in.png --teacher --steps 8 --max_guidance_scale 8 --out much.mp4":
        Typed("much.mp4", "8-step teacher", SMALL),
    "python sampler.py --image in.png --teacher --steps 8 --max_guidance_scale 1 --out none.mp4":
        Typed("none.mp4", "8-step teacher", SMALL),
    "python sampler.py --image in.png --motion_bucket_id 220 --out fast.mp4":
        Typed("fast.mp4", "wrote fast.mp4", SMALL),
    "python sampler.py --image in.png --decode_chunk_size 2 --offload":
        Typed("out.mp4", "wrote out.mp4", SMALL),
    "python sampler.py --image in.png --width 96 --height 64":
        Typed("out.mp4", "wrote out.mp4", "--num_frames 4"),
    # Trainers' flags: tests/test_training.py has smaller networks
    "python train_stage1.py --dry_run": Typed(says="run +1 steps in", adds=STEP),
    "python train_stage1.py --preset toy_cpu --overfit 1 ...":
        Typed("out/overfit/metrics.jsonl", "psnr", f"{STEP} --validation_steps 1"),
    "python train_stage1.py --mixed_precision no --plain --output_dir out/fp32":
        Typed("out/fp32/metrics.jsonl", "from step 0", STEP),
    "python train_stage1.py --gradient_checkpointing --gradient_accumulation_steps 4 --output_dir out/small":
        Typed("out/small/metrics.jsonl", "from step 0", f"{STEP} --batch_size 4"),
    "python train_stage1.py --preset toy_cpu --max_train_steps 2 --log_steps 1 --output_dir out/alone":
        Typed("out/alone/metrics.jsonl", "from step 0", STEP),
    "torchrun --standalone --nproc_per_node=2 train_stage1.py --preset toy_cpu ...":
        Typed("out/cpus/metrics.jsonl", "from step 0", f"{STEP} --batch_size 2"),
    # tests/test_evaluate.py has a smaller network
    "python evaluate.py fvd --student out/stage2/merged --sampler 1 ...": Typed(
        "diversity.json", "protocol", "--num_clips 2 --width 32 --height 32", needs="python train_stage2.py"),
    # Seconds, but tests/test_grade.py grades all twelve as well, and one is typed above
    "python exercises/grade.py": Typed(says=r"0\.0 of 27 points\n\nnext, ex01_karras_grid.py: to be written"),
    # Seconds, but tests/test_grade.py grades a class as well
    "python exercises/grade.py submissions --csv grades.csv": Typed("grades.csv", r"ada +0\.0"),
}

LEFT_OUT = {
    # The network
    "python sampler.py --image in.png --model stabilityai/stable-video-diffusion-img2vid": "9 GB of weights",
    "python sampler.py --image in.png --model stabilityai/stable-video-diffusion-img2vid --student ...":
        "the same",
    "python -m tools.export export --model stabilityai/stable-video-diffusion-img2vid ...": "the same",
    "python sampler.py --image in.png --model stabilityai/stable-video-diffusion-img2vid-xt ...": "the same",
    "git clone <this repository> osv && cd osv": "network, and the reader has to insert the address",
    "make .venv/dev": "network: installs packages",
    # GPUs
    "python -m toy.train": "half an hour of a GPU",
    "torchrun --standalone --nproc_per_node=2 -m toy.train": "two GPUs",
    "python -m toy.train --stages report ...": "a GPU; tests/test_toy.py has 4 clips",
    "torchrun --standalone --nproc_per_node=2 train_stage1.py ...": "two GPUs; tests/test_training.py: CPUs",
    "NCCL_DEBUG=INFO torchrun --standalone --nproc_per_node=2 train_stage1.py ...": "two GPUs",
    "torchrun --standalone --nproc_per_node=8 train_stage1.py ...": "eight GPUs, SVD, OpenVid-1M",
    "torchrun --standalone --nproc_per_node=2 train_stage2.py ...": "two GPUs, SVD, OpenVid-1M",
    "python train_stage1.py --preset one_gpu ...": "a GPU, SVD, OpenVid-1M",
    "python train_stage2.py --preset one_gpu ...": "the same",
    "head -n -1000 good.jsonl > train.jsonl && ...": "a list of more than a thousand videos",
    "python data.py check OpenVid-1M.csv ...": "a million videos; above, `check` has a folder of three",
    "python evaluate.py fvd ...": "SVD, I3D; tests/test_evaluate.py has small ones",
    "python data.py encode train.jsonl ...": "SVD; above, `encode` has the toy networks",
    "python tests/full_size_parity.py ...": "a GPU with 60 GB",
    "python tests/rehearsal.py --report results/rehearsal.json": "a GPU, and minutes",
    "python -m tools.tables student --report ...": "a GPU, and minutes",
    "python -m tools.tables student --seed 1 --report ...": "a GPU, and minutes",
    "python exercises/by_speed.py ...": "tests/test_evaluate.py runs it",
    "python exercises/grade.py --show ex01": "needs an answer; other tests draw the pictures",
    "python evaluate.py sensitivity --num_clips 768 ...": "a GPU; tests/test_evaluate.py has a small one",
    "python -m tools.tables table1 --report results/table1.json":
        "a GPU; tests/test_evaluate.py has a small one",
    "python -m tools.tables table2 --report results/table2.json": "the same",
    "python -m tools.tables budgets --report results/budgets.json": "the same",
    "python -m tools.tables one_step --report results/one_step.json": "the same, with the patch",
    "git apply results/one_step.patch": "changes the code; tests/test_evaluate.py checks that it applies",
    "python -m tools.pages": "rewrites the pages under test; tests/test_evaluate.py has one of its own",
    "python -m tools.bench nets ...": "a GPU",
    "python -m tools.bench train --report results/train.json": "a GPU",
    "python -m tools.bench train --gpus 2 --discriminators latent ...": "two GPUs",
    "python -m tools.bench train --discriminators latent ...": "a GPU",
    "python -m tools.bench memory ...": "a GPU",
    "PYTORCH_ALLOC_CONF=per_process_memory_fraction:0.29 ...": "a GPU",
    "python exercises/heads.py ...": "minutes of a GPU",
    "python tests/kernel_speed.py ...": "a GPU",
    # Without a point here
    "make test": "runs this test",
    "source .venv/bin/activate": "each command here has a shell of its own, with the PATH that this sets",
    "the last but one of 100 levels: ...": "no command: the message of a grader",
    "Hint: ...": "no command: the message of a grader",
}

# The same for the snippets: one step instead of 25, and a smaller picture for diffusers.
SHORTER = {"karras_sigmas(25)": "karras_sigmas(1)", "size = 128, 128": "size = 64, 64"}
CHECKS = """
assert x0.shape == (1, 14, 4, 16, 16) and x0.isfinite().all()
assert len(video) == len(again) == 14 and video[0].size == size
assert any("lora" in name for name, _ in pipe.unet.named_parameters())
"""


# ---- Commands on the pages ------------------------------------------------------------------------------


def text_of(page):
    return (ROOT / page).read_text()


def commands(page):
    """The lines of indented code blocks, also inside of lists; continued lines joined, without comments."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S).replace("\\\n", "")
    for block in re.findall(r"(?<=\n\n)(?: {4,}\S.*\n)+", text):
        for line in block.splitlines():
            yield re.sub(r"\s{2,}# .*", "", line).strip()


def keys(command):
    """The keys of all tables that mean this command, the longest first."""
    words = " ".join(command.split())
    found = [key for key in (*TYPED, *SLOW, *LEFT_OUT)
             if words == key or key.endswith("...") and words.startswith(key[:-3].strip())]
    return sorted(found, key=len, reverse=True)


def test_each_command_is_in_one_table():
    found = [(page, command) for page in PAGES for command in commands(page)]
    assert len(found) > 50
    assert not TYPED.keys() & SLOW.keys() and not (TYPED | SLOW).keys() & LEFT_OUT.keys()
    unknown = [f"{page}: {command}" for page, command in found if not keys(command)]
    assert not unknown, "add to a table of tests/test_commands.py: " + "\n".join(unknown)
    needed = {expected.needs for expected in (TYPED | SLOW).values() if expected.needs}
    assert needed <= TYPED.keys(), f"needed, but not in TYPED: {needed - TYPED.keys()}"
    stale = {*TYPED, *SLOW, *LEFT_OUT} - {keys(command)[0] for _, command in found}
    assert not stale, f"on no page: {stale}"
    fences = {fence for page in PAGES for fence in re.findall(r"^ *```(\w.*)", text_of(page), re.M)}
    assert fences == {"python", "bibtex"}                       # commands in other fences would not be found


# ---- A copy of the repository to type them in -----------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory, request):
    """A copy of the repository, with the reader's own files: .folder, .environment, and .typed, the commands
    that were typed in it."""
    folder = tmp_path_factory.mktemp("readme") / "osv"
    for part in ("assets", "exercises", "results", "support", "tests", "tools", "toy"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for file in ROOT.iterdir():                                 # no other files that lie there
        if file.suffix in (".py", ".txt", ".toml") or file.name == "Makefile":
            shutil.copy(file, folder)
    shutil.copy(folder / "assets/input.png", folder / "in.png")
    (folder / "photos").mkdir()
    for name in ("a", "b"):
        shutil.copy(folder / "assets/input.png", folder / "photos" / f"{name}.png")
    for name in ("VIDEOS", "video"):                            # the second is OpenVid-1M's folder
        (folder / name).mkdir()
        for i in range(2):
            write(folder / name / f"{i}.mp4", at_rate(10))
    (folder / "VIDEOS/2.mp4").write_text("no video")
    (folder / "OpenVid-1M.csv").write_text("video,motion score\n0.mp4,3.5\n1.mp4,5\nmissing.mp4,1\n")
    (folder / "SVD").symlink_to("assets/toy")
    (folder / "docs").mkdir()
    (folder / "submissions/ada").mkdir(parents=True)
    shutil.copy(folder / "exercises/ex01_karras_grid.py", folder / "submissions/ada")

    bin = folder / ".venv/bin"
    bin.mkdir(parents=True)
    for stamp in ("run", "dev"):                                # for `make`, everything is installed
        (folder / ".venv" / stamp).touch()
    python = sys.executable if ALL else request.getfixturevalue("python")
    (bin / "python").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    torchrun = 'python -c "from torch.distributed.run import main; main()"'
    (bin / "torchrun").write_text(f'#!/bin/sh\nexec {torchrun} "$@"\n')
    for program in ("python", "torchrun"):
        (bin / program).chmod(0o755)
    environment = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)                   # set by conftest.py, not by readers
    return SimpleNamespace(folder=folder, environment=environment, typed=set())


def opens(file):
    """Whether a file has the format that its suffix names, its video moves, its picture has two colours."""
    match file.suffix:
        case ".mp4":
            with av.open(str(file)) as video:
                return len({frame.to_ndarray().tobytes() for frame in video.decode(video=0)}) > 1
        case ".gif":
            return Image.open(file).n_frames > 1
        case ".png":
            low, high = Image.open(file).convert("L").getextrema()
            return low < high
        case ".safetensors":
            return len(safe_open(file, "pt").keys()) > 0
        case ".json":
            return bool(json.loads(file.read_text()))
        case ".jsonl":
            return all(map(json.loads, file.read_text().splitlines()))
        case ".csv":
            return len(list(csv.DictReader(file.open()))) > 0
    return file.stat().st_size > 0


def type_in(tree, command, expected):
    """Types a command, and before it the one that it needs, unless they were typed before."""
    if command in tree.typed:
        return
    if expected.needs:
        listed = (found for page in PAGES for found in commands(page))
        needed = next(found for found in listed if keys(found)[:1] == [expected.needs])
        type_in(tree, needed, TYPED[expected.needs])
    run_and_check(tree, command, expected)
    tree.typed.add(command)


def run_and_check(tree, command, expected):
    files = [tree.folder / name for name in expected.makes.split()]
    for file in files:
        file.unlink(missing_ok=True)                            # several commands make the same file
    if not ALL:                                                 # of a repeated flag the last value counts
        command = command.replace("; done", f" {expected.adds}; done") if "; done" in command \
            else f"{command} {expected.adds}"
    run = subprocess.run(["bash", "-ec", command], cwd=tree.folder, env=tree.environment, text=True,
                         stdin=subprocess.DEVNULL, capture_output=True)
    said = f"$ {command}\n{run.stdout}\n{run.stderr}"
    assert re.search(expected.says, run.stdout), said
    if expected.fails:
        assert run.returncode == 1 and expected.fails in run.stdout + run.stderr, said
    else:
        assert run.returncode == 0 and not re.search("^(traceback|.*warning:)", run.stderr, re.M | re.I), said
    missing = [str(file) for file in files if not file.is_file() or not opens(file)]
    assert not missing, f"{missing} not written by\n{said}"


# ---- Tests ----------------------------------------------------------------------------------------------


def typed(page):
    for command in commands(page):
        key = (keys(command) or ["?"])[0]
        if expected := (TYPED | SLOW).get(key):
            marks = [pytest.mark.skip("OSV_README=all")] if key in SLOW and not ALL else []
            yield pytest.param(command, expected, marks=marks, id=" ".join(command.split())[:60])


@pytest.mark.parametrize("command, expected", chain.from_iterable(map(typed, ["README.md", *DOCS])))
def test_readme_and_docs(tree, command, expected):
    type_in(tree, command, expected)


def test_snippets(tree):
    """One after another, like cells of a notebook. They read what the stages and the export have written."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", "\n".join(map(text_of, PAGES)), re.M | re.S))
    for text, shorter in SHORTER.items() if not ALL else ():
        assert text in code
        code = code.replace(text, shorter)
    (tree.folder / "out_snippets.py").write_text(code + CHECKS)
    type_in(tree, "python out_snippets.py", Typed("out.gif", needs="python -m tools.export export ..."))


@pytest.mark.parametrize("command, expected", typed("exercises/README.md"))
def test_readme_of_the_exercises(tree, command, expected):
    type_in(tree, command, expected)


# ---- tools/bench.py -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, error, says", [
    ("train --discriminators foo", SystemExit, "--discriminators"),
    ("nets --width 100", SystemExit, "multiples of 64"), ("nets --repeats 0", SystemExit, "--repeats"),
    ("nets --size toy --width 64 --height 40", SystemExit, "multiples of 16"),
    ("nets --device cpu --cuda_graph", SystemExit, "--cuda_graph"),
    ("nets --device tpu", ModelError, "--device tpu"), ("nets --device cuda:99", ModelError, "cuda:99"),
    ("nets --report /dev/null/bench.json", OSError, "/dev/null/bench.json")])
def test_bench_refuses_bad_flags_before_it_measures(flags, error, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    with pytest.raises(error) as raised:
        bench.parse_args()
    assert says in f"{raised.value}{capsys.readouterr().err}"


def test_bench_ends_its_script_when_interrupted(monkeypatch):
    children = []

    def interrupted(child):
        children.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run("a row", None, "-c", "import time; time.sleep(60)")
    assert children[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize("gpus", [1, 2])
def test_bench_gives_the_device_to_both_stages(gpus, monkeypatch, tmp_path):
    """A single process has no torchrun, which would choose its GPU by itself."""
    flags = f"train --size toy --device cpu --discriminators pixel --gpus {gpus}"
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    monkeypatch.setattr(bench, "run", lambda what, read, *command: [str(word) for word in command])
    args = bench.parse_args()
    args.folder, args.model = tmp_path, "MODEL"
    stage1, stage2 = bench.train(args)
    assert "train_stage1.py" in stage1 and "train_stage2.py" in stage2
    for command in (stage1, stage2):
        assert command[command.index("--device") + 1] == "cpu"
        assert ("torch.distributed.run" in command) == (gpus > 1)
