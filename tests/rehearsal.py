"""Runs every command from videos to a student in diffusers, and checks all files and logs that they write.

    $ python tests/rehearsal.py --report results/rehearsal.json     # SVD's size: 80 GB of GPU, 40 of disk
    $ python tests/rehearsal.py --size small                        # the toy networks: minutes on a CPU
    $ python tests/rehearsal.py --work out/rehearsal --legs pipeline videos     # two legs; the folder stays

It is run by hand, not by pytest, and needs diffusers and PEFT. At full size, weights are random. The script
makes its own videos. LEGS is the table of what runs: each leg has commands, checks and a folder WORK/NAME,
and reads folders of legs above it. Dry runs read only those of pipeline, videos and check. A leg that passes
leaves the marker WORK/NAME.json, and is skipped when the script starts again with the same --work. To stop
the script from outside, send it SIGTERM (`timeout 570 python ..`): it ends the command in progress, too. The
exit status is 1 if a check failed.

Memory in the report is what PyTorch allocated on the GPU, if the command prints it. Otherwise it is how much
more of the GPU was in use than before the command; without a GPU, the memory of the process.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
from support import checkpoint, engine, media  # noqa: E402
from tools import bench  # noqa: E402

parser = engine.command_line("Run all commands from videos to diffusers once, and check what they write.")
flag = parser.add_argument
flag("--size", type=str, choices=["full", "small"], default="full", help="of the networks: SVD's, or toys")
flag("--work", type=Path, help="folder for all files (None: a temporary one, deleted at the end)")
flag("--legs", nargs="+", help="run only these (None: all that have not passed)")
flag("--report", type=Path, help="JSON file to write")
flag("--inside", help="for the script itself: do the work of this leg in this process")
args = parser.parse_args()
args.device = engine.choose_device()
full, on_gpu = args.size == "full", args.device.type == "cuda"
work = (args.work or Path(tempfile.mkdtemp(prefix="rehearsal"))).resolve()

STEPS1, STEPS2, TERM_AT, SAVE_AT = 12, 14, 9, 6 if full else 10                  # SAVE_AT: of stage 1
KILL_AT, TEACHER_STEPS = (SAVE_AT + 3, 2) if full else (SAVE_AT + 1, 8)
SIZE1, SIZE2 = ((1024, 576), (576, 320)) if full else ((64, 48), (48, 32))      # of stages 1 and 2
GOOD, BAD = 12, {"broken.mp4", "short.mp4"}                                     # videos

# ---- What no command of the repository does -------------------------------------------------------------


def make_pipeline(folder):
    """Writes a pipeline in SVD's layout, with DINOv2 inside."""
    torch.manual_seed(0)
    if full:
        bench.random_pipeline(folder, args.device)
    else:
        shutil.copytree(checkpoint.ASSETS / "toy", folder, dirs_exist_ok=True)


def make_videos(folder):
    """Writes moving random patterns: GOOD videos, a third of them in 576p, BAD ones, and a picture."""
    torch.manual_seed(0)

    def write(name, seconds, fps, width, height):
        pattern = 255 * torch.rand(1, 3, height // 20, width // 20)
        pattern = F.interpolate(pattern, (height, width), mode="bilinear")[0].byte().permute(1, 2, 0)
        frames = [pattern.contiguous().roll((i, 7 * i), (0, 1)) for i in range(seconds * fps)]
        media.write_mp4(torch.stack(frames).numpy(), folder / name, fps)                        # f H W 3
        return pattern                                                                          # H W 3

    sizes = ((1920, 1080), (1024, 576)) if full else ((320, 180), (160, 90))
    for i in range(GOOD):
        pattern = write(f"{i:02d}.mp4", 3, (24, 25, 30)[i % 3], *sizes[i % 3 == 2])
    media.save_sheet(pattern.permute(2, 0, 1)[None, None] / 127.5 - 1, folder / "picture.png")
    write("short.mp4", 1, 24, *sizes[1])
    (folder / "broken.mp4").write_bytes((folder / "00.mp4").read_bytes()[:4000])


def run_card(folder):
    """Runs the code of the exported model card, which writes two gif files."""
    code = "".join(re.findall(r"(?s)```python\n(.*?)```", (work / "export/osv/README.md").read_text()))
    code = code.replace('"osv"', repr(f"{work}/export/osv")).replace("in.png", f"{work}/videos/picture.png")
    os.chdir(folder)
    exec(code.replace('   # .to("cuda")', '.to("cuda")') if on_gpu else code, {})


@torch.no_grad()
def run_peft(folder):
    """Puts the LoRA of stage 1 into diffusers' UNet through PEFT, as docs/diffusers.md says. Writes relative
    differences to its outputs in fp32: of merged/, of both in bf16, and of the UNet without the LoRA."""
    from diffusers import UNetSpatioTemporalConditionModel as Theirs
    from diffusers.loaders import PeftAdapterMixin
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    theirs = Theirs.from_pretrained(work / "pipeline/unet", torch_dtype=torch.float32)
    width, height = SIZE2
    given = [torch.randn(1, 14, 8, height // 8, width // 8), torch.tensor([1.625]),     # 1 f 8 h w, c_noise
             torch.randn(1, 1, theirs.config.cross_attention_dim), torch.tensor([[6.0, 127.0, 0.0]])]
    call = lambda net, dtype: net.to(args.device, dtype)(
        *(x.to(args.device, dtype) for x in given))[0].float().flatten()
    outputs = {"without": call(theirs, torch.float32)}
    theirs.__class__ = type("LoraUNet", (Theirs, PeftAdapterMixin), {})
    theirs.load_lora_adapter(str(work / "stage1"), prefix="unet", use_safetensors=True)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        outputs |= {f"peft_{name}": call(theirs, dtype),
                    f"merged_{name}": call(model.load_unet(work / "stage1/merged"), dtype)}
    reference = outputs.pop("peft_fp32")
    checkpoint.write_json(folder / "errors.json", {
        name: ((y - reference).norm() / reference.norm()).item() for name, y in outputs.items()})


# ---- Checks: generators of (what, passed, value); passed is None for a measurement ----------------------


def tensors(folder, name="diffusion_pytorch_model"):
    return dict(checkpoint.read_safetensors([folder / f"{name}.safetensors"]))


def probe(file):
    """Decodes a video or gif -> [width, height, frames, fps], and whether its last frame has contrast."""
    with av.open(str(file)) as container:
        *_, last = frames = list(container.decode(video=0))
        fps = round(float(container.streams.video[0].average_rate), 1)
        return [last.width, last.height, len(frames), fps], bool(last.to_ndarray(format="rgb24").std() > 1)


def intact(folder):
    """Opens every file of a leg. One that cannot be opened raises an error."""
    files, bad = [file for file in folder.rglob("*") if file.is_file() and file.name not in BAD], []
    for file in files:
        bad += [file.name] * (".part" in file.name or file.name.startswith(".tmp"))
        if file.suffix == ".safetensors":
            bad += [key for key, x in tensors(file.parent, file.stem).items() if not x.isfinite().all()]
        elif file.suffix in (".json", ".jsonl"):
            bad += re.findall(r"\b(?:NaN|Infinity|1e999)\b", file.read_text())
            bad += re.findall(r'"loss\w*": null', file.read_text())         # NaN, see checkpoint.to_json
        elif file.suffix in (".png", ".jpg"):
            Image.open(file).load()
        elif file.suffix == ".mp4":
            probe(file)
    yield "files open, numbers in them are finite", not bad, bad or len(files)


def has(*names):
    return lambda folder: ((name, (folder / name).is_file(), None) for name in names)


def says(*patterns):
    """A check that the log has lines that match."""
    lines = lambda folder, pattern: re.findall(f".*{pattern}.*", folder.with_suffix(".log").read_text())
    return lambda folder: ((p, bool(lines(folder, p)), lines(folder, p)) for p in patterns)


def dry(clips, folder):
    """The figures of a dry run, which leaves no file. clips: number of clips in a step."""
    text = folder.with_suffix(".log").read_text()
    find = lambda pattern: re.search(pattern, text)[1]
    step = float(find(r"step +(\S+) s on"))
    yield "no file is left", [file.name for file in folder.iterdir()] == [".lock"], None
    yield "seconds per step", None, step
    yield "seconds per clip", None, step / clips
    yield "seconds of waiting for data per step", None, float(find(r"(\S+) s of waiting for data"))
    yield "whole run", None, find(r"steps in (.*), limited")
    yield "peak memory", None, float(find(r"peak memory (\S+) GB"))


def lists_bad(name, folder):
    rows = {Path(row["path"]).name: row["reason"] for row in checkpoint.read_lines(folder / name)}
    yield "bad videos and reasons", rows.keys() == BAD, rows


def trained(num_steps, pattern, folder):
    """The log of a training, and its merged/: weights that do not match `pattern` are those of the source, to
    the bit. Both files are in fp16."""
    rows = checkpoint.read_lines(folder / "metrics.jsonl")
    steps = [row["step"] for row in rows if not row["skipped"]]
    yield "a line for each step, none skipped", steps == [*range(1, num_steps + 1)], len(rows)
    middle = lambda values: sorted(values)[len(values) // 2]
    yield "seconds per step", None, middle([row["s_per_step"] for row in rows])
    yield "share of a step that waits for data", None, middle([row["data_wait"] for row in rows])
    yield "relative change of loss_huber from step to step", None, middle([
        abs(a["loss_huber"] / b["loss_huber"] - 1) for a, b in zip(rows, rows[1:])])
    source, merged = tensors(work / "pipeline/unet"), tensors(folder / "merged")
    changed = {key for key in source if not torch.equal(source[key], merged[key])}
    wrong, free = [key for key in changed if not re.search(pattern, key)], [
        key for key in source if re.search(pattern, key)]
    same = source.keys() == merged.keys() and not wrong
    yield "frozen weights equal the source to the bit", same, wrong[:3] or len(source) - len(free)
    yield "trained tensors that changed", bool(changed), f"{len(changed)} of {len(free)}"


def resumed(straight, first, twice, folder):
    """A stopped and resumed run against the run `straight`, which it must equal bit for bit. (On a GPU this
    needs --deterministic: without it, two runs differ from step 2 on.) first: steps at which the resumed run
    may begin. twice: number of steps that the first process ran after its last checkpoint, at least, and the
    second one again."""
    begins = [*map(int, re.findall(r"; from step (\d+)", folder.with_suffix(".log").read_text()))]
    yield "first step of each process", len(begins) == 2 and begins[1] in first, begins
    ours, theirs = (checkpoint.read_lines(path / "metrics.jsonl") for path in (folder, work / straight))
    killed = [row for row in checkpoint.read_lines(folder / "killed.jsonl") if row["step"] > begins[-1]]
    yield "steps that ran twice", len(killed) >= twice, len(killed)
    for name in ("loss_d", "loss_huber", "loss_adv"):
        a, b = ([row[name] for row in rows] for rows in (ours, theirs))
        yield f"{name}: equal to that of the uninterrupted run", a == b, max(abs(x - y) for x, y in zip(a, b))
        if killed:
            pairs = [(row[name], a[row["step"] - 1]) for row in killed]
            yield f"{name}: the same after the kill as before it", all(x == y for x, y in pairs), pairs
    for name in ("student", "disc"):
        a, b = (tensors(path, name) for path in (folder, work / straight))
        differ = [key for key in a | b if not torch.equal(a[key], b[key])]      # KeyError: the check fails
        yield f"{name}.safetensors: equal to that of the uninterrupted run", not differ, differ[:3] or len(b)


def video(name, size, folder):
    """size: exact, or of a sheet, which may be reduced."""
    (width, height, *rest), contrast = probe(folder / name)
    same = (width, height) == size if "sample" not in name else width * size[1] == height * size[0]
    right = same and rest[0] == 14 and 7 <= rest[1] < 7.2
    yield f"{name}: size, frames, fps, contrast", right and contrast, [width, height, *rest]


def exported(folder):
    for name, source in (("unet", work / "stage2/merged"), ("vae", work / "pipeline/vae")):
        ours = tensors(source)
        theirs = tensors(folder / "osv" / name, "diffusion_pytorch_model" + ".fp16" * full)
        same = ours.keys() == theirs.keys() and all(
            torch.equal(x.float(), theirs[key].float()) for key, x in ours.items())
        yield f"{name} equals its source to the bit", same, len(ours)


def near(folder):
    errors = json.loads((folder / "errors.json").read_text())
    yield "fp32: 5 times nearer than without LoRA", 5 * errors["merged_fp32"] < errors["without"], errors
    yield "bf16: as near as PEFT in bf16", errors["merged_bf16"] < 1.5 * errors["peft_bf16"], None


# ---- Legs -----------------------------------------------------------------------------------------------

# commands: without `python`. stop: (signal, step) that ends the command, which then runs again. gib: limit of
# the GPU memory that PyTorch may take. Checkpoints are deleted after the checks: one of stage 2 has 7 GB.
Leg = namedtuple("Leg", "what commands checks stop gib", defaults=[None, None])
INSIDE = {"pipeline": make_pipeline, "videos": make_videos, "diffusers": run_card, "peft": run_peft}
inside = {name: [f"tests/rehearsal.py --inside {name} --size {args.size} --work WORK"] for name in INSIDE}
AT1, AT2 = (f"--width {width} --height {height}" for width, height in (SIZE1, SIZE2))
SMALL = " --batch_size 2 --gradient_accumulation_steps 2" * (not full)
NETWORKS, VIDEOS = "--model WORK/pipeline --dino WORK/pipeline/dinov2", "--data WORK/check/good.jsonl"
TRAIN = (f"--preset one_gpu{SMALL} {NETWORKS} --learning_rate 1e-4 --lr_d 2e-4 --warmup_steps 5 "
         f"--log_steps 1 --deterministic --validation_teacher_steps {TEACHER_STEPS} "
         "--checkpoints_total_limit 1")
RUN1 = f"train_stage1.py {TRAIN} {AT1} {VIDEOS} --max_train_steps {STEPS1} --checkpointing_steps {SAVE_AT}"
RUN2 = (f"train_stage2.py {TRAIN} {AT2} --data WORK/encode --stage1 WORK/stage1 "
        f"--max_train_steps {STEPS2} --checkpointing_steps 99")
STUDENT = "--model WORK/pipeline --student WORK/stage2/merged"
SAMPLE = f"sampler.py --image WORK/videos/picture.png {STUDENT} {AT1}"
LORA = rf"(^|\.)({lora.LORA_TARGETS})\.weight$"
FILES = "student.safetensors", "disc.safetensors", "merged/config.json"
AFTER1 = [partial(trained, STEPS1, LORA), has(*FILES, lora.LORA_FILE)]
AFTER2 = [partial(trained, STEPS2, rf"{LORA}|\.temporal_transformer_blocks\."), has(*FILES)]

# Dry runs say what each preset needs. "single" has one clip per step: the share of one of several GPUs.
PRESETS = {}
for stage, batch, flags in ((1, 8 if full else 2, AT1), (2, 2, f"{AT2} --stage1 none")):
    for name, preset, clips, gib in (("single", "paper --batch_size 1", 1, None),
                                     ("one_gpu", f"one_gpu{SMALL}", batch, None),
                                     ("24gb", f"one_gpu_24gb{SMALL}", batch, 23)):
        PRESETS[f"dry{stage}_{name}"] = Leg(
            f"stage {stage}, --preset {preset}", [f"train_stage{stage}.py --preset {preset} {NETWORKS} "
            f"{VIDEOS} {flags} --dry_run --output_dir WORK/dry{stage}_{name}"],
            [says("clips read, ", "disk    "), partial(dry, clips)], None, gib)

LEGS = {
    "pipeline": Leg("networks in SVD's layout", inside["pipeline"], [has("model_index.json")]),
    "videos": Leg("video files", inside["videos"], [has(*BAD, "picture.png")]),
    "check": Leg("data.py check", [f"data.py check WORK/videos {AT2} --out WORK/check/good.jsonl"], [
        says(f"{GOOD} videos are good", "2 are not"), partial(lists_bad, "good.bad.jsonl")]),
    **PRESETS,                                          # before the trainings: they want 28 GB of free disk
    "encode": Leg("data.py encode", [
        f"data.py encode WORK/videos --model WORK/pipeline {AT2} --num_clips {GOOD + 2} --shard_size 7 "
        "--out WORK/encode", "data.py check WORK/encode"], [
        says("all 2 shards have the right checksums"), partial(lists_bad, "bad-0.jsonl")]),
    "preview": Leg("data.py preview", [
        f"data.py preview WORK/videos {AT2} --num_clips 4 --out WORK/preview/sheet.png"], [has("sheet.png")]),
    "stage1_straight": Leg(f"stage 1, {STEPS1} steps", [
        f"{RUN1} --validation_steps 99 --output_dir WORK/stage1_straight"], AFTER1),
    "stage1": Leg(f"stage 1, SIGKILL at {KILL_AT}, resumed", [
        f"{RUN1} --validation_steps {STEPS1} --output_dir WORK/stage1"], [
        *AFTER1, partial(resumed, "stage1_straight", [SAVE_AT], KILL_AT - SAVE_AT),
        partial(video, f"sample-{STEPS1:06d}.mp4", SIZE1), has(f"sample-{STEPS1:06d}.png")],
        (signal.SIGKILL, KILL_AT)),
    "stage2_straight": Leg(f"stage 2, {STEPS2} steps", [
        f"{RUN2} --validation_steps 99 --output_dir WORK/stage2_straight"], AFTER2),
    "stage2": Leg(f"stage 2, SIGTERM at {TERM_AT}, resumed", [
        f"{RUN2} --validation_steps {STEPS2} --output_dir WORK/stage2"], [
        *AFTER2, partial(resumed, "stage2_straight", range(TERM_AT, STEPS2), 0),
        partial(video, f"sample-{STEPS2:06d}.mp4", SIZE2), has(f"sample-{STEPS2:06d}.png")],
        (signal.SIGTERM, TERM_AT)),
    "one_step": Leg("sampler.py, one step", [f"{SAMPLE} --no_tts --out WORK/one_step/out.mp4"], [
        partial(video, "out.mp4", SIZE1)]),
    "time_travel": Leg("sampler.py, Time Travel", [f"{SAMPLE} --out WORK/time_travel/out.mp4"], [
        partial(video, "out.mp4", SIZE1)]),
    "fvd": Leg("evaluate.py fvd, 32 clips", [
        f"evaluate.py fvd {STUDENT} {AT1} --sampler tts --detector assets/toy/i3d --num_clips 32 "
        "--data WORK/check/good.jsonl --batch_size 4 --report WORK/fvd/fvd.json"],
        [has("fvd.json", "fvd.jpg")]),
    "export": Leg("tools.export export", [
        f"-m tools.export export {STUDENT} --output_dir WORK/export/osv" + " --dtype fp16" * full],
        [exported]),
    "diffusers": Leg("code of the model card", inside["diffusers"], [
        partial(video, name, SIZE1 if full else (128, 128)) for name in ("one_step.gif", "time_travel.gif")]),
    "peft": Leg("LoRA through PEFT", inside["peft"], [near]),
}

# ---- Running --------------------------------------------------------------------------------------------

RUNNING = []                                                                    # the command in progress


def stop_all(number, _):
    """Handles SIGTERM and Ctrl-C: ends the command in progress and the script. An exception would not do,
    because PyAV and safetensors lose one that is raised inside of their calls."""
    for child in RUNNING:
        os.killpg(child.pid, signal.SIGKILL)
    if not args.work:
        shutil.rmtree(work, ignore_errors=True)
    os._exit(128 + number)


def run(command, log, stop=None, gib=None):
    """Runs a command until it ends -> (exit status, GB). GB: by how much more of the GPU was in use than
    before; without a GPU, the memory of the process. stop: (signal, step, metrics.jsonl): sends the signal
    when the log has this many lines, one per step. gib: as in Leg."""
    free = lambda: torch.cuda.mem_get_info(args.device)[0] if on_gpu else 0
    before = least = free()
    argv = [sys.executable, *(part.replace("WORK", str(work)) for part in command.split())]
    settings = {"HF_HUB_OFFLINE": "1", "OSV_REHEARSAL": str(work)}
    if gib and on_gpu:
        share = gib * 2 ** 30 / torch.cuda.get_device_properties(args.device).total_memory
        settings["PYTORCH_ALLOC_CONF"] = f"per_process_memory_fraction:{share:.4f}"
    with open(log, "a") as file:
        print(f"$ python {command}", file=file, flush=True)
        child = subprocess.Popen(argv, stdout=file, stderr=file, cwd=ROOT, start_new_session=True,
                                 env=os.environ | settings)
    RUNNING.append(child)
    while not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if stop and stop[2].exists() and stop[2].read_bytes().count(b"\n") >= stop[1]:
            os.kill(child.pid, stop[0])
            stop = None
        least = min(least, free())
        time.sleep(0.02)
    # Before wait4: afterwards another process may have this number, and stop_all would kill that one.
    RUNNING.clear()
    ended = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(ended[1])
    return child.returncode, (before - least if on_gpu else ended[2].ru_maxrss * 1024) / 1e9


def run_leg(name, leg):
    """Runs a leg and its checks -> its row. An error in a check is a failed check."""
    print(f"{time.strftime('%H:%M:%S')} {name}: {leg.what}", flush=True)
    folder, log, rows, memory = work / name, work / f"{name}.log", [], 0.0
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    folder.mkdir()
    add = lambda what, passed, value=None: rows.append({"check": what, "passed": passed, "value": value})
    began, runs = time.time(), [(command, None) for command in leg.commands]
    if leg.stop:
        runs.insert(0, (leg.commands[0], (*leg.stop, folder / "metrics.jsonl")))
    for command, stop in runs:
        if leg.stop and not stop and (folder / "metrics.jsonl").exists():
            shutil.copy(folder / "metrics.jsonl", folder / "killed.jsonl")      # a resume shortens it
        status, used = run(command, log, stop, leg.gib)
        memory = max(memory, used)
        add("exit status", status == (-9 if stop and stop[0] == signal.SIGKILL else 0), status)
    seconds, text = time.time() - began, log.read_text()
    on_card = [float(a or b) for a, b in re.findall(
        r"(?:memory_gb |peak memory )([\d.]+)|([\d.]+) GB of GPU memory", text)] if on_gpu else []
    disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
    changed = [str(file) for file in work.rglob("*") if file.is_file() and file.stat().st_mtime > began
               and folder not in file.parents and file != log]
    search, wait = f"sleep 1; grep -lszxF 'OSV_REHEARSAL={work}' /proc/[0-9]*/environ", 5
    # -zx compares whole variables, so that WORK2 is not taken for WORK. A decoder ends after its trainer,
    # when it has decoded the clip in progress. One of 1080p takes a second.
    while (left := subprocess.getoutput(search).split()) and wait:
        wait -= 1
    for what, found in (
            ("no process is left", left), ("no file of another leg is changed", changed),
            ("no error in the log", re.findall(r"(?i).*(?:traceback|\bnan\b|\binf\b).*", text))):
        add(what, not found, found or None)
    add("warnings in the log", None, sorted(set(re.findall(r"(?i).*warning.*", text))))
    for check in (intact, *leg.checks):
        try:
            for result in check(folder):
                add(*result)
        except Exception as error:
            add(getattr(check, "func", check).__name__, False, repr(error))
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    told, passed = ([row for row in rows if (row["passed"] is None) == told] for told in (True, False))
    return {"leg": name, "what": leg.what, "commands": [f"python {command}" for command, _ in runs],
            "seconds": seconds, "peak_memory_gb": max(on_card, default=memory), "disk_gb": disk,
            "memory": "PyTorch" if on_card else "GPU" if on_gpu else "process", "gib_allowed": leg.gib,
            "figures": {row["check"]: row["value"] for row in told},
            "passed": f"{sum(row['passed'] for row in passed)} of {len(passed)}", "checks": passed}


def main():
    """Runs the legs, prints and writes the table -> lines of the checks that failed, or None."""
    rows, failures = [], []
    for name, leg in LEGS.items():
        marker = work / f"{name}.json"
        if not marker.exists() and name not in (args.legs or LEGS):
            continue
        row = json.loads(marker.read_text()) if marker.exists() else run_leg(name, leg)
        bad = [check for check in row["checks"] if check["passed"] is False]
        failures += [f"FAILED {name}: {check['check']}: {check['value']}" for check in bad]
        rows.append(row)
        if not bad:
            checkpoint.write_json(marker, row)
        if args.report:                                     # after each leg, in case the time ends
            presets = [row for row in rows if row["leg"] in PRESETS]
            legs = [row for row in rows if row["leg"] not in PRESETS]
            checkpoint.write_json(args.report, {**evaluate.record(args), "legs": legs, "presets": presets})
    for row in rows:
        bench.tell(f"{row['leg']:16} {row['what']}", s=row["seconds"], disk_gb=row["disk_gb"],
                   memory_gb=row["peak_memory_gb"], of=row["memory"], checks=row["passed"])
    return "\n".join(failures) or None


if args.inside:
    INSIDE[args.inside](work / args.inside)
    print(f"peak memory {engine.peak_memory(args.device):.2f} GB")
    sys.exit()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop_all)
work.mkdir(parents=True, exist_ok=True)
try:
    if unknown := set(args.legs or []) - set(LEGS):
        parser.error(f"--legs {' '.join(unknown)}: not in {' '.join(LEGS)}")
    if missing := [name for name in {"diffusers", "peft"} & set(args.legs or LEGS) if not find_spec(name)]:
        parser.error(f"{' and '.join(missing)} must be installed, or give other --legs")
    sys.exit(main())
finally:
    if not args.work:
        shutil.rmtree(work)
