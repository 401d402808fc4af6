"""The capstone: your functions train a one-step video model. Toy world, CPU, 15 to 20 minutes.

    $ python exercises/capstone.py
    $ python exercises/capstone.py --stage1_steps 1 --stage2_steps 1 --num_clips 2 --train_clips 4

It grades the exercises, replaces the library's functions by those that pass, runs train_stage1.py and
train_stage2.py unchanged, and measures the one-step videos of each stage on held-out pictures: toy-FVD
(lower is better) and the sharpness of the last frame (real clips have 1). Writes capstone.png: one clip,
with one row per line of the table.

The pictures are the first ones that evaluate.py measures on. No training has seen them.
"""
import json
import runpy
import sys
import time
from pathlib import Path

import grade
import plug
import torch

import data
import evaluate
import model
import sampler
import solver
from support.checkpoint import ModelError, check_writable, read_json, write_json
from support.engine import command_line, number, positive
from support.kernels import fast
from support.media import save_sheet
from toy.world import toy_clips

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "reference.json"
FLAGS = ("--preset toy_cpu --device cpu --mixed_precision no --resume_from_checkpoint none "
         "--validation_steps 1000000 --validation_teacher_steps 1 --checkpointing_steps 1000000 "
         "--log_steps 5").split()

parser = command_line("Train with your own functions.")
flag = parser.add_argument
flag("--answers", type=Path, default=HERE, help="folder of ex*.py")
flag("--stage1_steps", type=positive, default=90, help="training steps of stage 1")
flag("--stage2_steps", type=positive, default=12, help="training steps of stage 2")
flag("--num_clips", type=number(2, 10 ** 9), default=32, help="held-out clips that toy-FVD is measured on")
flag("--train_clips", type=positive, default=64, help="clips to train on")
flag("--model", type=Path, default=sampler.TOY, help="pipeline folder of the toy world")
flag("--output_dir", type=Path, default="out/capstone", help="everything is written here")
flag("--reference", action="store_true",
     help=f"for instructors: the library's own functions; writes exercises/{REFERENCE.name}")
args = parser.parse_args()
if not args.answers.is_dir():
    parser.error(f"{args.answers}: not a folder; give one of ex*.py")
picture, table = args.output_dir / "capstone.png", args.output_dir / "capstone.json"
check_writable(picture, table)
start, seconds = time.perf_counter(), {}

# ---- Your functions -------------------------------------------------------------------------------------

passed = [] if args.reference else [
    name for name, (good, tests, _) in grade.grade(args.answers).items() if good == tests]
answers = {} if args.reference else plug.answers(args.answers)
plug.plug({name: answers[name] for file in passed for name in plug.EXERCISES[file][1:]})
for file, (_, *names) in plug.EXERCISES.items():
    print(f"{'yours' if file in passed else 'the library':12} {', '.join(names)}")

# ---- Networks and held-out clips ------------------------------------------------------------------------

try:
    vae, image_encoder = fast(model.load_vae(args.model)), model.load_image_encoder(args.model)
    teacher, detector = fast(model.load_unet(args.model)), evaluate.load_detector(args.model / "i3d")
except (ModelError, OSError) as problem:
    parser.error(f"{problem}; make the toy networks with `python -m toy.train`")
num_frames, size = teacher.config["num_frames"], 8 * teacher.config["sample_size"]
numbers = torch.arange(args.num_clips)
encode, encoded = data.toy_latents, {}


def encode_once(vae, image_encoder, seed, num_clips, *shape):
    """data.toy_latents, but only once for both stages. Four clips at a time, to save memory."""
    if (seed, num_clips) not in encoded:
        encoded[seed, num_clips] = encode(vae, image_encoder, seed, num_clips, *shape, batch_size=4)
    return encoded[seed, num_clips]


data.toy_latents = encode_once
held_out = encode_once(vae, image_encoder, evaluate.UNSEEN, args.num_clips, num_frames, size)


def real_clips(future):
    """b f 3 H W: held-out first frames with one of their futures, by number: other directions, same speed."""
    motion_seed = evaluate.UNSEEN + 1 + future
    return toy_clips(evaluate.UNSEEN, numbers, num_frames, size, motion_seed=motion_seed).frames


# The real set has few pictures but eight futures of each, because a one-step student should show them all.
real = torch.cat([evaluate.video_features(detector, real_clips(future)) for future in range(8)])
sigmas = solver.karras_sigmas(solver.NUM_SIGMAS)
rows, sheet = {}, []


def sharpness(frames):
    """Mean difference of neighbouring pixels in the last frame; blur lowers it."""
    return sum(frames[:, -1].diff(dim=dim).abs().mean().item() for dim in (-1, -2))


def compare(name, frames):
    fvd = evaluate.frechet_distance(real, evaluate.video_features(detector, frames))
    rows[name] = round(fvd, 1), round(sharpness(frames) / sharpness(real_clips(0)), 3)
    sheet.append(frames[:1])
    print(f"{name:40} toy-FVD {rows[name][0]:8.1f}   sharpness {rows[name][1]:5.2f}", flush=True)


def measure(name, net, k=1, tts=False, draw=sampler.sample):
    frames = []
    for part in numbers.split(8):
        generators = [torch.Generator().manual_seed(int(i)) for i in part]
        cond = held_out.take(part)[1]
        x0 = draw(net, cond, solver.strided(sigmas, k), generators, tts)
        frames.append(sampler.decode(vae, x0))
    compare(name, torch.cat(frames))


def train(script, steps, *flags):
    """Runs a script of the repository in this process, so that it imports the replaced functions."""
    folder, began = args.output_dir / Path(script).stem.removeprefix("train_"), time.perf_counter()
    sys.argv = [script, *FLAGS, "--num_clips", str(args.train_clips), "--model", str(args.model),
                "--max_train_steps", str(steps), "--output_dir", str(folder), *flags]
    if runpy.run_path(str(plug.ROOT / script), run_name="__main__")["run"].stopped:
        sys.exit(f"capstone.py: {script} was stopped by SIGTERM; run the same command again to start over")
    seconds[script] = time.perf_counter() - began
    return folder


# ---- Train and measure ----------------------------------------------------------------------------------

compare("real: a ninth future", real_clips(8))
measure("before: the teacher in one step", teacher)
stage1 = train("train_stage1.py", args.stage1_steps, "--learning_rate", "5e-4", "--lr_d", "1e-3")
measure("after stage 1, one step", model.load_unet(stage1 / "merged"))
stage2 = train("train_stage2.py", args.stage2_steps, "--stage1", str(stage1), "--learning_rate", "2e-4",
               "--lr_d", "5e-4")
student = model.load_unet(stage2 / "merged")
measure("after stage 2, one step", student)
measure("after stage 2, Time Travel Sampler", student, 2, True)
if args.reference:
    measure("the teacher in 25 steps", teacher, draw=lambda net, cond, sigmas, generators, tts:
            sampler.sample_teacher(net, cond, solver.karras_sigmas(25), generators))

# ---- Compare with the reference -------------------------------------------------------------------------

settings = {name: getattr(args, name)
            for name in ("num_clips", "train_clips", "stage1_steps", "stage2_steps")}
settings["teacher"] = evaluate.fingerprint(teacher)
found = {"date": time.strftime("%Y-%m-%d"), "settings": settings, "yours": passed, "rows": rows}
write_json(table, found)
if args.reference:
    write_json(REFERENCE, found)
reference = read_json(REFERENCE) if REFERENCE.exists() else {"settings": settings, "rows": {}}
save_sheet(torch.cat(sheet), picture)
show = lambda pair: f"{pair[0]:10.1f}{pair[1]:10.2f}" if pair else f"{'-':>10}{'-':>10}"
print(f"\n{'':40}{'toy-FVD':>10}{'sharpness':>10}{'reference':>20}")
for name in rows | reference["rows"]:
    print(f"{name:40}{show(rows.get(name))}{show(reference['rows'].get(name))}")
if reference["settings"] != settings:
    print(f"the reference was measured with {json.dumps(reference['settings'])}, not {json.dumps(settings)}: "
          "the two do not compare")
print(f"{time.perf_counter() - start:.0f} s ({', '.join(f'{s} {t:.0f} s' for s, t in seconds.items())}); "
      f"look at {picture}")
