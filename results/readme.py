"""The tables of the README, and its plot, from the JSON files beside this one: no figure is typed by hand.

    $ python results/readme.py

What evaluate.py measured goes between marks in the README, <!-- student --> and <!-- end -->, the same for
table1 and table2, and, made of these two, orderings: what the paper says, and whether it holds here.
"""
import json
import math
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import engine  # noqa: E402
import evaluate  # noqa: E402

# What the paper's tables say: (in words, the better one, the worse one), each (run, sampler) of evaluate.py.
ORDERINGS = [
    *((f"one step beats {k} of the teacher", ("osv", "1"), ("teacher", k)) for k in ("1", "2", "8")),
    ("(and 4 of them)", ("osv", "1"), ("teacher", "4")),
    ("Time Travel beats one plain step", ("osv", "tts"), ("osv", "1")),
    ("and two plain steps", ("osv", "tts"), ("osv", "2")),
    ("two stages beat stage 1 alone", ("osv", "tts"), ("stage 1 alone", "tts")),
    ("and stage 2 alone", ("osv", "tts"), ("stage 2 alone", "tts")),
    ("five solver steps beat one", ("osv", "tts"), ("m = 1", "tts")),
    ("the adversarial loss helps", ("osv", "tts"), ("no adversarial loss", "tts")),
    ("(the same in one step)", ("osv", "1"), ("no adversarial loss", "1")),
    ("guidance of 1.5 hurts a student", ("osv", "1"), ("osv", "1 cfg 1.5")),
    ("guidance of 3 hurts more", ("osv", "1 cfg 1.5"), ("osv", "1 cfg 3.0")),
    ("latents do better than decoded frames", ("osv", "tts"), ("pixel (VAE decoder)", "tts")),
    ("one step beats one of AnimateLCM", ("osv", "1"), ("AnimateLCM", "1")),
    ("and one of SF-V", ("osv", "1"), ("SF-V", "1")),
]
SHOWN = {"seconds": ".3f", "sharpness": ".2f", "diversity": ".3f", "motion": ".2f", "first_psnr": ".1f"}


def over_seeds(rows, run, name):
    """One line of a table: the first of its rows, their means, lowest and highest end of their intervals."""
    rows = [row for row in rows if (row["run"], row["sampler"]) == (run, name)]
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("fvd", *SHOWN)}
    low = min(row["fvd"] - row["interval"] for row in rows)
    return rows[0], mean, low, max(row["fvd"] + row["interval"] for row in rows)


def markdown(result, listed):
    """A report of evaluate.py -> a table, a line per row over all its training seeds, and how it was made.
    listed: its lines, (what stands in front, run, sampler, the paper's FVD)."""
    rows = result["rows"]
    measured = {(row["run"], row["sampler"]) for row in rows}
    lines = ["| | sampler | NFE | toy-FVD | paper's FVD | s per clip | sharpness | diversity | motion | "
             "first frame, dB |", "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for label, run, name, paper in listed:
        if (run, name) in measured:
            first, mean, low, high = over_seeds(rows, run, name)
            cells = [label + run, name, first["nfe"], f"{mean['fvd']:.1f} ({low:.1f} to {high:.1f})",
                     paper or "", *(f"{mean[key]:{digits}}" for key, digits in SHOWN.items())]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    protocol = ", ".join(f"{key} {value}" for key, value in result["protocol"].items())
    seeds = sorted({row["seed"] for row in rows})
    return "\n".join(lines) + (
        f"\n\n`{result['command']}` on {result['device']}, {result['date']}. Protocol: {protocol}. Training "
        f"seeds {seeds}: mean, and from the lowest to the highest end of their 95 % intervals.\n")


def orderings(rows):
    """Does what the paper says hold here: do the intervals, over all seeds, part the two?"""
    lines = ["| the paper says | toy-FVD of the one | of the other | here |", "|---|--:|--:|---|"]
    there = {(row["run"], row["sampler"]) for row in rows}
    for claim, *keys in ORDERINGS:
        if there.issuperset(keys):
            (_, one, low, high), (_, other, other_low, other_high) = (over_seeds(rows, *key) for key in keys)
            verdict = "yes" if high < other_low else "the reverse" if other_high < low else "not told apart"
            lines.append(f"| {claim} | {one['fvd']:.1f} ({low:.1f} to {high:.1f}) | "
                         f"{other['fvd']:.1f} ({other_low:.1f} to {other_high:.1f}) | {verdict} |")
    return "\n".join(lines) + "\n"


def plot(rows, out, width=640, height=360, margin=48):
    """FVD against network evaluations into a PNG, both axes logarithmic, a line per model."""
    lines = {}
    for row in sorted(rows, key=lambda row: row["nfe"]):
        if row["seed"] == rows[0]["seed"] and row["nfe"]:               # real clips need none
            label = f"{row['run']} {row['sampler']}: {row['fvd']:.0f}"
            lines.setdefault(row["run"], []).append((math.log(row["nfe"]), math.log(row["fvd"]), label))
    image = Image.new("RGB", (width, height), "white")
    engine.draw_chart(image, (margin, margin, width - 3 * margin, height - margin),
                      "toy-FVD over network evaluations, both logarithmic", list(lines.values()))
    image.save(out)


def main(root=ROOT):
    text, found, parts = (root / "README.md").read_text(), {}, {}
    tables = {"student": {"": evaluate.SHIPPED}, "table1": {"": evaluate.TABLE1}, "table2": {
        f"{letter}: ": rows for letter, rows in evaluate.TABLE2.items()}}
    for name, table in tables.items():
        if (file := root / "results" / f"{name}.json").exists():
            found[name] = json.loads(file.read_text())
            listed = [(label, *row) for label, rows in table.items() for row in rows]
            parts[name] = markdown(found[name], listed)
    if "table1" in found:
        plot(found["table1"]["rows"], root / "results" / "table1_nfe.png")
        rows = [row for name in ("table1", "table2") if name in found for row in found[name]["rows"]]
        parts["orderings"] = orderings(rows)
    for name, part in parts.items():
        if (mark := f"<!-- {name} -->\n") in text:
            before, rest = text.split(mark, 1)
            text = before + mark + part + rest[rest.index("<!-- end -->"):]
    (root / "README.md").write_text(text)


if __name__ == "__main__":
    main()
