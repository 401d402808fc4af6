"""The paper's tables as commands: trains each student in the toy world and measures it with evaluate.py.

    $ python -m tools.tables student --report results/student.json      # the shipped student and its teacher
    $ python -m tools.tables table1 --report results/table1.json
    $ python -m tools.tables table2 --rows a b --report results/table2.json
    $ python -m tools.tables budgets --report results/budgets.json      # two recipes, trained longer
    $ python -m tools.pages                                             # writes them into docs/tables.md

    RUNS                        the training flags of each student
    RATES                       runs that differ only in the learning rate
    SHIPPED, TABLE1, ..         the rows of each table
    fingerprints                of the sources and the teacher that students depend on
    trained                     trains a student, or finds it in --work
    measure_table               trains and measures all rows

A row is measured as soon as its student is trained. --resume keeps the rows of an earlier call, and training
continues from the last checkpoint.
"""
import hashlib
import math
import signal
import subprocess
import sys
from pathlib import Path

import model
from evaluate import ROOT, UNSEEN, Report, fingerprint, report_flags
from sampler import STUDENT
from support import checkpoint, engine
from support.media import to_bytes
from toy.world import toy_clips

# ---------------------------------------------------------------------------------------------------------
# Training runs

# Seconds per step of 32 clips on one H200, with no other training on it (results/pace.json). A single stage
# and a cheaper recipe get the steps that fill the time of "osv"; m = 1 fills the time of stage 2.
PACE = {"stage 1": 0.0800, "stage 2": 0.1337, "m = 1": 0.1020, "AnimateLCM": 0.0446, "SF-V": 0.0504}
STEPS = 200, 250
TIME = STEPS[0] * PACE["stage 1"] + STEPS[1] * PACE["stage 2"]
FILL = {name: f"--max_train_steps {TIME / pace:.0f}" for name, pace in PACE.items()}
FILL["m = 1"] = f"--max_train_steps {STEPS[1] * PACE['stage 2'] / PACE['m = 1']:.0f}"
BUDGET = " --batch_size 32 --num_clips 6000 --warmup_steps 25 --log_steps 25 --checkpointing_steps 100" \
    " --validation_steps 10000 --validation_teacher_steps 1"
LCM = "--adv_weight 0 --num_solver_steps 1 --train all " + FILL["AnimateLCM"]
SFV = "--discriminator unet --train all " + FILL["SF-V"]
# name: (flags of train_stage1.py, flags of train_stage2.py), None for a stage that is left out. --stage1 and
# --stage2 come first; they begin with STEPS and BUDGET. Runs without steps of their own have those of "osv".
RUNS = {
    "osv": ("", ""), "m = 1": ("", "--num_solver_steps 1 " + FILL["m = 1"]),
    "stage 1 alone": (FILL["stage 1"], None), "stage 2 alone": (None, FILL["stage 2"]),
    "no adversarial loss": ("--adv_weight 0", "--adv_weight 0"), "theta^- for real": ("", "--real ema"),
    "unguided teacher": ("", "--guidance 1 1 1 1"), "all weights train": ("--train all", "--train all"),
    "sub-pixel": ("--discriminator subpixel", "--discriminator subpixel"),
    "pixel (VAE decoder)": ("--discriminator pixel", "--discriminator pixel"),
    "unet": ("--discriminator unet", "--discriminator unet"),
    "stage 1 at half size": ("--width 64 --height 64", ""),
    "stage 2 at half size": ("", "--width 64 --height 64"),
    "AnimateLCM": (None, LCM), "AnimateLCM 5e-4": (None, LCM + " --learning_rate 5e-4"),
    "SF-V": (SFV, None), "SF-V 1e-4": (SFV + " --learning_rate 1e-4", None)}
# Baselines with the preset's learning rate (2e-4 in stage 2, 3e-4 in stage 1) and with another. The pages
# show the better one. BETTER is that of AnimateLCM in results/table1.json; the larger budgets use it.
RATES = ("AnimateLCM", "AnimateLCM 5e-4"), ("SF-V", "SF-V 1e-4")
BETTER = "AnimateLCM"
# Multiples of the budget, with as many clips as stage 2 of the shipped student: of 6,000 clips, AnimateLCM's
# recipe would see each one 84 times. The shipped student stands in for "osv x 12.5".
more_steps = lambda steps: f" --num_clips 20000 --max_train_steps {steps:.0f}"
RUNS |= {f"osv x {times}": tuple(more_steps(times * steps) for steps in STEPS) for times in (2.5, 6)}
RUNS |= {f"{BETTER} x {times}": (None, RUNS[BETTER][1] + more_steps(times * TIME / PACE["AnimateLCM"]))
         for times in (2.5, 6, 12.5)}
SHIPPED_SECONDS = 624                       # on one H200: results/student_stage*.jsonl


def fingerprints(path):
    """What a student depends on besides its command: the first digits of the SHA-256 of the sources that
    training runs, and of the teacher's weights at `path`."""
    names = ("train_stage*.py", "model.py", "lora.py", "solver.py", "losses.py", "discriminator.py",
             "data.py", "support/*.py", "toy/world.py")
    sources = b"".join(file.read_bytes() for name in names for file in sorted(ROOT.glob(name)))
    return {"sources": hashlib.sha256(sources).hexdigest()[:8],
            "teacher_sha256": fingerprint(model.load_unet(path))[:8]}


def trained(run, seed, args, protocol):
    """The folder of a run's UNet, and the seconds that its stages trained: steps times the seconds per step
    in the fastest logged interval after the first: checkpoints, and the start of a resumed run, only make an
    interval slower. Trains the stages that --work lacks. Raises ModelError."""
    stage1, seconds = "none", 0.0
    for stage, (budget, flags) in enumerate(zip((args.stage1, args.stage2), RUNS[run]), start=1):
        if flags is None:
            continue
        command = [f"train_stage{stage}.py", "--model", args.model, "--seed", str(seed), *budget.split(),
                   *flags.split(), *(["--stage1", stage1] if stage == 2 else [])]   # the last --stage1 counts
        # The folder is named after the command, so that runs with the same stage 1 share it, and after the
        # fingerprints, so that a student of older code or of another teacher is not taken for this one.
        name = hashlib.sha256(" ".join(command).encode()).hexdigest()[:12]
        folder = args.work / "-".join([name, protocol["sources"], protocol["teacher_sha256"]])
        student = folder / "merged" / "config.json"     # written last
        if not student.exists():
            command += ["--device", str(args.device), "--output_dir", str(folder)]
            print(*command, flush=True)
            # After Ctrl-C or SIGTERM here, `call` kills the training.
            subprocess.call([sys.executable, ROOT / command[0], *command[1:]])
        if not student.exists():                        # also after exit status 0: SIGTERM
            raise checkpoint.ModelError(f"{run}: training failed or was stopped, see above; "
                                        "run the same command again")
        lines = checkpoint.read_lines(folder / "metrics.jsonl", s_per_step=float)
        steps = [int(path.name[-7:]) for path in folder.glob(checkpoint.CHECKPOINTS)]
        pace = min((line["s_per_step"] for line in lines[1:]), default=math.nan)
        seconds += max(steps, default=math.nan) * pace
        stage1 = str(folder)
    return folder / "merged", seconds


# ---------------------------------------------------------------------------------------------------------
# Tables

# (run, sampler, the paper's FVD). The run is "teacher", "shipped", "real" or a name in RUNS; samplers are
# those of evaluate.parse_sampler. FLOOR compares real clips with other real futures of the same first
# frames: no sampler can be expected to reach a lower distance.
FLOOR = ("real", "other futures", None)
TEACHER = [("teacher", "25", 156.94), ("teacher", "8", 229.94), ("teacher", "4", None),
           ("teacher", "2", 1015.25), ("teacher", "1", 1177.34)]
ONE, TTS, TWO = ("osv", "1", 335.36), ("osv", "tts", 171.15), ("osv", "2", 181.95)
# "8" is a strided part of the noise levels of training, as for a student; "8 karras" is a grid of its own.
# The strided grid is better (results/student.json: toy-FVD 8.3 strided and 8.6 Karras in 8 steps, 12.0 and
# 20.2 in 4), and therefore used for comparisons.
SHIPPED = [FLOOR, *TEACHER, ("teacher", "8 karras", None), ("teacher", "4 karras", None),
           *(("shipped", *row[1:]) for row in (ONE, TTS, TWO)),
           ("shipped", "tts printed", None), ("shipped", "tts v1", None)]
TABLE1 = [FLOOR, *TEACHER,
          *((run, *row) for run in RATES[0] for row in zip("8421", (184.79, 405.8, 575.33, 997.94))),
          *((run, "1", 425.68) for run in RATES[1]), ONE, TTS, TWO]
TABLE2 = dict(
    a=[("m = 1", "tts", 332.25), TTS], b=[("stage 2 alone", "tts", 221.75), TTS],
    c=[("stage 1 alone", "2", 298.35), ("stage 1 alone", "tts", 234.13), TTS],
    d=[("no adversarial loss", "tts", 405.41), TTS, ("no adversarial loss", "1", None), ("osv", "1", None)],
    e=[("pixel (VAE decoder)", "tts", 232.25), ("unet", "tts", None), ("sub-pixel", "tts", None), TTS],
    f=[("osv", "1 cfg 3.0", 531.23), ("osv", "1 cfg 1.5", 426.71), ONE],
    g=[("stage 1 at half size", "1", 455.35), ("osv", "1", 388.86)],
    h=[("stage 2 at half size", "tts", 171.15), ("osv", "tts", 181.95)],
    ours=[(run, name, None) for name in ("1", "tts")
          for run in ("theta^- for real", "unguided teacher", "all weights train", "osv")],
    tts=[("osv", name, None) for name in ("1", "2", "tts", "tts printed", "tts v1")])
BUDGETS = [(run, name, None) for recipe, *names in (("osv", "1", "tts"), ("AnimateLCM", "1", "2"))
           for run in RUNS if run.startswith(recipe) for name in names]
BUDGETS += [("shipped", "1", None), ("shipped", "tts", None)]
PICTURED = "teacher 25", "teacher 1", "osv 1", "osv tts", "shipped 1", "shipped tts"


def measure_table(table, args, protocol):
    """Measures each row of a table, those of RUNS once for each of --seeds; `budgets` has the first seed
    only. Raises ModelError."""
    report = Report(args, **protocol, **fingerprints(args.model))
    # A row that stands in a table several times is measured once.
    rows = dict.fromkeys((run, name, seed) for run, name, _ in table for seed in
                         (args.seeds if run in RUNS and args.what != "budgets" else args.seeds[:1]))
    rows = [row for row in rows if row not in report.rows]
    world_seed, (f, _, size) = args.seed + UNSEEN, report.shape

    def other_futures(numbers, seed):
        clips = toy_clips(world_seed, numbers, f, size, report.device, motion_seed=world_seed + 1 + seed)
        return to_bytes(clips.frames), 0

    for run, name, seed in rows:
        student, seconds = (STUDENT, SHIPPED_SECONDS) if run == "shipped" else (None, None)
        if run in RUNS:
            student, seconds = trained(run, seed, args, report.protocol)
        sampler = (0, 0, other_futures) if run == "real" else report.sampler(name, student)
        pictured = seed == args.seeds[0] and (args.what == "table2" or f"{run} {name}" in PICTURED)
        report.add(run, name, seed, *sampler, pictured=pictured, training_seconds=seconds)


def main():
    parser = engine.command_line("Train and measure the rows of the paper's tables.")
    flag = parser.add_argument
    flag("what", choices=["student", "table1", "table2", "budgets"], help="student: the one in assets/toy")
    report_flags(parser)
    flag("--rows", nargs="+", choices=TABLE2, default=list(TABLE2), help="rows of table2 to measure")
    flag("--seeds", nargs="+", default=[0, 1], help="training seeds")
    flag("--work", type=Path, default="out/tables", help="where students are trained, and kept")
    flag("--stage1", default=f"--max_train_steps {STEPS[0]}" + BUDGET, help="flags of each train_stage1.py")
    flag("--stage2", default=f"--max_train_steps {STEPS[1]}" + BUDGET, help="flags of each train_stage2.py")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # ends the training like Ctrl-C
    tables = {"student": SHIPPED, "table1": TABLE1, "budgets": BUDGETS,
              "table2": [FLOOR, *(row for name in args.rows for row in TABLE2[name])]}
    # FLOOR needs other futures of the same first frames, which real videos do not have.
    table = [row for row in tables[args.what] if row != FLOOR or args.data == "toy"]
    protocol = {} if args.what == "student" else {"stage1": args.stage1, "stage2": args.stage2}
    measure_table(table, args, protocol)


if __name__ == "__main__":
    main()
