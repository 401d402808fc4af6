"""Writes the README's tables and its plot from the reports in results/, so that no figure is typed by hand.

    $ python -m tools.readme

The tables of results/student.json, table1.json, table2.json and sensitivity.json replace the text between
two marks in the README: <!-- student --> and <!-- end -->, and so on. The mark <!-- orderings --> gets a
table of the paper's claims, and whether the toy world confirms them. The plot is results/table1_nfe.png.
"""
import re
import statistics
from collections import defaultdict

from evaluate import read_report
from support.checkpoint import replacing
from support.engine import command_line
from tools.plot import new_figure, save_figure
from tools.tables import ROOT, SHIPPED, TABLE1, TABLE2

# The paper's claims, each in words and as "sampler < run, sampler", see tools/tables.py: with the first
# sampler, the run "osv" has a lower distance than the row on the right.
ORDERINGS = re.findall(r"(\S.*?): (.+?) < (.+?)[;\n]", """
one step beats 1 of the teacher: 1 < teacher, 1; one step beats 2 of the teacher: 1 < teacher, 2
one step beats 8 of the teacher: 1 < teacher, 8; (and 4 of them): 1 < teacher, 4
Time Travel beats one plain step: tts < osv, 1; and two plain steps: tts < osv, 2
two stages beat stage 1 alone: tts < stage 1 alone, tts; and stage 2 alone: tts < stage 2 alone, tts
five solver steps beat one: tts < m = 1, tts; the adversarial loss helps: tts < no adversarial loss, tts
(the same in one step): 1 < no adversarial loss, 1; guidance of 1.5 hurts a student: 1 < osv, 1 cfg 1.5
guidance of 3 hurts more: 1 cfg 1.5 < osv, 1 cfg 3.0
latents do better than decoded frames: tts < pixel (VAE decoder), tts
one step beats one of AnimateLCM: 1 < AnimateLCM, 1; and one of SF-V: 1 < SF-V, 1
""")
COLUMNS = {"seconds": ".3f", "sharpness": ".2f", "diversity": ".3f", "motion": ".2f", "first_psnr": ".1f"}


def over_seeds(rows):
    """The rows of a report, one per training seed -> {"run, sampler": row}. Its figures are means over the
    seeds; "low" and "high" are the lowest and highest end of their FVD intervals, "range" is FVD with both.
    "bad_range" is the same for the share of bad clips; "masks" has a number per seed, whose bit i says
    whether clip i is bad. Both are empty for rows of older reports.
    """
    groups, merged = defaultdict(list), {}
    for row in rows:
        groups[f"{row['run']}, {row['sampler']}"].append(row)
    for key, group in groups.items():
        mean = {name: sum(row[name] for row in group) / len(group) for name in ("fvd", *COLUMNS)}
        low, high = ends(group, "fvd", "interval")
        merged[key] = {**group[0], **mean, "low": low, "high": high, "bad_range": "", "masks": [],
                       "range": f"{mean['fvd']:.1f} ({low:.1f} to {high:.1f})"}
        if all("bad_clips" in row for row in group):
            bad = statistics.mean(row["bad"] for row in group)
            least, most = ends(group, "bad", "bad_interval")
            merged[key] |= {"bad_range": f"{bad:.1%} ({max(least, 0):.1%} to {min(most, 1):.1%})",
                            "masks": [int(row["bad_clips"], 16) for row in group]}
    return merged


def ends(rows, figure, interval):
    """The lowest and the highest end of a figure's intervals."""
    return min(row[figure] - row[interval] for row in rows), max(row[figure] + row[interval] for row in rows)


def verdict(low, high):
    """Whether an interval of the difference "one minus other" says that the one has less."""
    return "yes" if high < 0 else "the reverse" if low > 0 else "not told apart"


def paired_difference(row, other, clips):
    """By how much the share of bad clips is larger in one row of over_seeds than in another, with the 95 %
    interval over the clips, which are the same, and the verdict; empty for rows of older reports."""
    if not (row["masks"] and other["masks"]):
        return ""
    share = lambda masks, i: sum(mask >> i & 1 for mask in masks) / len(masks)
    differences = [share(row["masks"], i) - share(other["masks"], i) for i in range(clips)]
    mean, half = statistics.mean(differences), 1.96 * statistics.stdev(differences) / clips ** 0.5
    return f"{mean:+.1%} ± {half:.1%}: {verdict(mean - half, mean + half)}"


def markdown(report, table):
    """A report of tools/tables.py -> a Markdown table with a line for each measured row of `table`, and the
    protocol. table: (label in front of the run, run, sampler, the paper's FVD)."""
    rows = over_seeds(report["rows"])
    lines = ["| | sampler | NFE | toy-FVD | bad clips | paper's FVD | s per clip | sharpness | diversity | "
             "motion | first frame, dB |", "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for label, run, name, paper in table:
        if row := rows.get(f"{run}, {name}"):
            cells = [label + run, name, row["nfe"], row["range"], row["bad_range"], paper or "",
                     *(f"{row[column]:{digits}}" for column, digits in COLUMNS.items())]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    protocol = ", ".join(f"{key} {value}" for key, value in report["protocol"].items())
    seeds = sorted({row["seed"] for row in report["rows"]})
    return "\n".join(lines) + (
        f"\n\n`{report['command']}` on {report['device']}, {report['date']}. Protocol: {protocol}. Training "
        f"seeds {seeds}: mean, and from the lowest to the highest end of their 95 % intervals.\n")


def orderings(rows, clips):
    """A Markdown table of ORDERINGS. A claim holds, or its reverse, if the intervals over all training seeds
    do not overlap. For bad clips, both rows are compared clip by clip. clips: their number."""
    rows = over_seeds(rows)
    lines = ["| the paper says | toy-FVD of the one | of the other | here | difference of bad clips |",
             "|---|--:|--:|---|---|"]
    for claim, name, other in ORDERINGS:
        better, worse = rows.get(f"osv, {name}"), rows.get(other)
        if better and worse:
            here = verdict(better["low"] - worse["high"], better["high"] - worse["low"])
            cells = claim, better["range"], worse["range"], here, paired_difference(better, worse, clips)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sensitivity(report):
    """A report of `evaluate.py sensitivity` -> a Markdown table: how far each damage moves each figure."""
    figures = "fvd", "bad", "astray", "sharpness", "motion", "follows"
    lines = [f"| damage | {' | '.join(figures)} |", "|---|" + "--:|" * len(figures)]
    for row in report["rows"][1:]:                              # the first is undamaged
        moved = [f"{row['moved_by'][figure]:+.1f}" for figure in figures]
        lines.append(f"| {row['sampler']} | {' | '.join(moved)} |")
    return "\n".join(lines) + f"\n\n`{report['command']}` on {report['device']}, {report['date']}.\n"


def plot(rows, out):
    """Draws FVD over network evaluations on logarithmic axes: a line per run, its first training seed."""
    axes = new_figure(7, 4.2).subplots()
    rows = [row for row in rows if row["seed"] == rows[0]["seed"] and row["nfe"]]   # real clips have no NFE
    for run in dict.fromkeys(row["run"] for row in rows):
        points = sorted((row for row in rows if row["run"] == run), key=lambda row: row["nfe"])
        line, = axes.plot([row["nfe"] for row in points], [row["fvd"] for row in points], "o-", label=run)
        # The labels of OSV are on the left, so that they do not cover those of nearby points.
        place = dict(xytext=(-7, -3), ha="right") if run == "osv" else dict(xytext=(5, 4))
        for row in points:
            axes.annotate(f"{row['sampler']}: {row['fvd']:.0f}", (row["nfe"], row["fvd"]), fontsize=8,
                          textcoords="offset points", color=line.get_color(), **place)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per clip", ylabel="toy-FVD",
             title="toy-FVD over network evaluations (labels: sampler, toy-FVD)", xmargin=0.1, ymargin=0.1)
    axes.set_xticks(nfe := sorted({row["nfe"] for row in rows}), nfe)
    axes.set_yticks(fvd := [5, 10, 20, 50, 100, 200], fvd)
    axes.minorticks_off()
    axes.legend()
    save_figure(axes.figure, out)


def main(root=ROOT):
    tables = {"student": [("", *row) for row in SHIPPED], "table1": [("", *row) for row in TABLE1],
              "table2": [(f"{letter}: ", *row) for letter, rows in TABLE2.items() for row in rows]}
    types = {"nfe": int, **dict.fromkeys(("fvd", "interval", *COLUMNS), float)}
    reports = {name: read_report(root / "results" / f"{name}.json", **types) for name in tables}
    parts = {name: markdown(reports[name], table) for name, table in tables.items()}
    parts["sensitivity"] = sensitivity(read_report(root / "results" / "sensitivity.json"))
    parts["orderings"] = orderings(reports["table1"]["rows"] + reports["table2"]["rows"],
                                   reports["table1"]["protocol"]["clips"])
    plot(reports["table1"]["rows"], root / "results" / "table1_nfe.png")
    text = (root / "README.md").read_text()
    for name, part in parts.items():
        text = re.sub(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", lambda _: part, text, count=1)
    with replacing(root / "README.md") as part:
        part.write_text(text)


if __name__ == "__main__":
    command_line("Write the tables and the plot of the README from the reports in results/.").parse_args()
    main()
