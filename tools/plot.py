"""Draws the log of a training run: one panel for each number.

    $ python -m tools.plot out/stage1/metrics.jsonl plot.png
"""
import json
import math
import sys
from pathlib import Path

from support.engine import fail

COLUMNS = 3


def new_figure(width, height):
    """An empty matplotlib figure, width x height in units of 100 pixels. Ends the command with one line if
    matplotlib is missing: only requirements-dev.txt has it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("matplotlib is missing; install it with `pip install -r requirements-dev.txt`")
    return Figure((width, height), dpi=100, layout="constrained")


def plot(metrics, out):
    """Draws a picture with one panel for each number of a metrics.jsonl, over the step. Values that are not
    finite are left out."""
    rows = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    names = list(dict.fromkeys(
        name for row in rows for name, value in row.items() if name != "step" and not isinstance(value, str)))
    if not names:
        fail(f"{metrics}: no numbers in it; was the run stopped before its first log line?")
    num_rows = math.ceil(len(names) / COLUMNS)
    figure = new_figure(3.6 * COLUMNS, 2 * num_rows)
    for i, name in enumerate(names, start=1):
        panel = figure.add_subplot(num_rows, COLUMNS, i)
        points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        panel.plot([x for x, _ in points], [y for _, y in points], ".-", markersize=3, linewidth=1.2)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    figure.supxlabel("step", fontsize=8)
    figure.savefig(out)


def main():
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        fail("usage: python -m tools.plot METRICS.jsonl OUT.png")
    plot(*sys.argv[1:])


if __name__ == "__main__":
    main()
