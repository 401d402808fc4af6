"""Why one step breaks shapes: the share of bad clips, slow and fast clips apart. Seconds on a CPU.

    $ python exercises/by_speed.py --out by_speed.png                 # the clips of results/student.json

In the toy world the first frame does not show in which direction a shape moves. The possible futures of a
slow clip lie close together, those of a fast one far apart. Two explanations of bad clips predict different
things: a network that is too weak to draw a shape in one evaluation also breaks slow shapes; a network that
blends futures breaks fast shapes more often than slow ones. Discs tell most: a disc has no corners to lose,
and its outline is the same in every rotation.

Reads from a report which clips are bad. Computes kind and speed of their shapes again from the world's seed,
without any network. Writes a plot, and beside it the figures as JSON.
"""
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import read_report, share_interval  # noqa: E402
from support import checkpoint, engine  # noqa: E402
from support.checkpoint import ModelError  # noqa: E402
from tools.plot import new_figure, save_figure  # noqa: E402
from toy.world import KINDS, paths, scene  # noqa: E402

# Quarters of the range of motion buckets. Bucket 127 is 4 pixels per frame.
SPEEDS = (1, 64), (65, 128), (129, 192), (193, 255)
SAMPLERS = {"teacher, 25 steps": ("teacher", "25"), "one step": ("shipped", "1"),
            "two plain steps": ("shipped", "2"), "Time Travel": ("shipped", "tts")}

parser = engine.command_line("Compare the share of bad clips at different speeds.")
flag = parser.add_argument
flag("--report", type=Path, default=ROOT / "results/student.json", help="a report of `tools.tables student`")
flag("--out", type=Path, default="by_speed.png", help="the plot; figures go beside it, .json")
args = parser.parse_args()
figures = args.out.with_suffix(".json")
checkpoint.refuse_overwriting([args.out, figures], [args.report])
checkpoint.check_writable(args.out, figures)

report = read_report(args.report, bad_clips=str)
if wrong := checkpoint.misfit(report["protocol"], {"world": int, "clips": int}):
    raise ModelError(f"{args.report}: not a protocol of the toy world ({wrong})")
rows = {(row["run"], row["sampler"]): row for row in report["rows"]}
if missing := set(SAMPLERS.values()) - rows.keys():
    raise ModelError(f"{args.report}: it lacks the rows {sorted(missing)}; give a report of "
                     "`tools.tables student`")
world, numbers = report["protocol"]["world"], torch.arange(report["protocol"]["clips"])
start = scene(world, numbers)
bucket = paths(start, world, numbers, num_frames=1).bucket                                      # n
# As in evaluate.py, clip i is bit i of a hexadecimal number.
bad = {name: torch.tensor([int(rows[key]["bad_clips"], 16) >> i & 1 for i in numbers.tolist()]).float()
       for name, key in SAMPLERS.items()}                                                       # n each
single, disc = ~start.present[:, 1], start.kind[:, 0] == list(KINDS).index("disc")              # n each
groups = {"one disc": single & disc, "one shape with corners": single & ~disc, "two shapes": ~single}

found, axes = [], new_figure(10, 3.4).subplots(1, len(groups), sharey=True)
for (group, inside), panel in zip(groups.items(), axes):
    masks = [inside & (low <= bucket) & (bucket <= high) for low, high in SPEEDS]
    if not all(mask.any() for mask in masks):
        raise ModelError(f"{args.report}: its {len(numbers)} clips are too few: no {group} at one speed")
    counts = [int(mask.sum()) for mask in masks]
    shares = {name: [clips[mask].mean().item() for mask in masks] for name, clips in bad.items()}
    for name, values in shares.items():
        half = [share_interval(p, n) for p, n in zip(values, counts)]
        low_ends = [min(p, h) for p, h in zip(values, half)]            # a share lies between 0 and 1
        high_ends = [min(1 - p, h) for p, h in zip(values, half)]
        panel.errorbar(range(len(SPEEDS)), values, [low_ends, high_ends], fmt="o-", capsize=3, label=name)
    for i, (low, high) in enumerate(SPEEDS):
        row = {name: values[i] for name, values in shares.items()}
        found.append({"group": group, "speed": f"{low} to {high}", "clips": counts[i], **row})
        print(f"{group:24} {low:3} to {high:3} {counts[i]:4} clips ", ", ".join(
            f"{name} {share:.0%}" for name, share in row.items()))
    panel.set(title=group, xlabel="motion bucket (slow to fast)")
    panel.set_xticks(range(len(SPEEDS)), [f"{low}-{high}" for low, high in SPEEDS])
axes[0].set(ylabel="share of bad clips")
axes[0].legend()
save_figure(axes[0].figure, args.out)
checkpoint.write_json(figures, {
    "date": time.strftime("%Y-%m-%d"), "device": report["device"], "report": args.report.name, "rows": found})
