"""Draws the log of a training run: one panel for each number.

    $ python -m tools.plot out/stage1/metrics.jsonl plot.png
"""
import math
from collections import defaultdict
from pathlib import Path

from PIL import Image

from support.checkpoint import ModelError, read_lines, refuse_overwriting, replacing
from support.engine import command_line

COLUMNS = 3
LARGEST = 1e300                         # larger numbers overflow in matplotlib's arithmetic


def new_figure(width, height):
    """An empty matplotlib figure, width x height in units of 100 pixels. Raises ModelError if matplotlib is
    missing: only requirements-dev.txt has it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModelError("matplotlib is missing: `pip install -r requirements-dev.txt` has it") from error
    return Figure((width, height), dpi=100, layout="constrained")


def save_figure(figure, out, colours=None):
    """Writes a figure, whole or not at all, in the format that the suffix of `out` names. Raises ModelError
    for another suffix. colours: reduces a PNG to this number of colours; 128 take a third of the bytes."""
    kind = out.suffix[1:].lower()
    if kind not in ("png", "jpg", "svg", "pdf"):
        raise ModelError(f"{out}: the name must end in .png, .jpg, .svg or .pdf")
    with replacing(out) as part:
        figure.savefig(part, format=kind)
        if colours:
            image = Image.open(part).convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=2)
            image.save(part, "PNG")


def plot(metrics, out):
    """Draws a picture with one panel for each number of a metrics.jsonl, over the step. Values that are no
    finite numbers are left out. Raises ModelError."""
    refuse_overwriting([out], [metrics])
    panels = defaultdict(list)                                  # name: its points (step, value)
    for row in read_lines(metrics, step=int):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and abs(value) < LARGEST:
                panels[name].append((row["step"], value))
    if not panels:
        raise ModelError(f"{metrics}: no numbers in it, or no file; did the run stop before its first line?")
    num_rows = math.ceil(len(panels) / COLUMNS)
    figure = new_figure(3.6 * COLUMNS, 2 * num_rows)
    for i, (name, points) in enumerate(panels.items(), start=1):
        panel = figure.add_subplot(num_rows, COLUMNS, i)
        panel.plot(*zip(*points), ".-", markersize=3, linewidth=1.2)
        panel.set_title(name, fontsize=9, parse_math=False)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    figure.supxlabel("step", fontsize=8)
    save_figure(figure, out)


def main():
    parser = command_line("Draw the log of a training run.")
    parser.add_argument("metrics", type=Path, metavar="METRICS.jsonl", help="the log of train_stage1 or 2")
    parser.add_argument("out", type=Path, metavar="OUT.png", help="the picture to write")
    args = parser.parse_args()
    plot(args.metrics, args.out)


if __name__ == "__main__":
    main()
