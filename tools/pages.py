"""Writes the tables of README.md and docs/*.md, and two pictures, from the reports in results/.

    $ python -m tools.pages

No figure of a table is typed by hand. A page says in a comment what stands in a table, and this script writes
the table between the comment and <!-- end -->:

    <!-- table heads.json: rows | fake = {fake} | heads = {heads} | accuracy = {accuracy:.0%} -->
    <!-- end -->

First the files in results/, then where their rows are: keys of the reports, joined by dots, or a function of
ROWS. Then the columns, each with the format of its cells.

The pictures are results/table1_nfe.png, a plot of table1.json, and results/student_rows.jpg, which is
results/student.jpg with the numbers of its rows.
"""
import re
import statistics
import textwrap
from collections import defaultdict
from functools import partial

from PIL import Image, ImageDraw

from evaluate import read_report
from support.checkpoint import read_json, read_lines, replacing
from support.engine import command_line
from tools.plot import new_figure, save_figure
from tools.tables import ROOT, SHIPPED, TABLE1, TABLE2

# ---------------------------------------------------------------------------------------------------------
# Rows of quality: reports of tools/tables.py

# The paper's claims, each in words and as "sampler < run, sampler", see tools/tables.py: with the first
# sampler, the run "osv" has a lower distance than the row on the right.
ORDERINGS = re.findall(r"(\S.*?): (.+?) < (.+?)[;\n]", """
one step beats 1 of the teacher: 1 < teacher, 1; one step beats 2 of the teacher: 1 < teacher, 2
one step beats 8 of the teacher: 1 < teacher, 8; one step beats 4 of the teacher: 1 < teacher, 4
Time Travel beats one plain step: tts < osv, 1; Time Travel beats two plain steps: tts < osv, 2
two stages beat stage 1 alone: tts < stage 1 alone, tts
two stages beat stage 2 alone: tts < stage 2 alone, tts
five solver steps beat one: tts < m = 1, tts; the adversarial loss helps: tts < no adversarial loss, tts
the adversarial loss helps one step: 1 < no adversarial loss, 1
guidance of 1.5 hurts a student: 1 < osv, 1 cfg 1.5; guidance of 3 hurts more: 1 cfg 1.5 < osv, 1 cfg 3.0
latents do better than decoded frames: tts < pixel (VAE decoder), tts
one step beats one of AnimateLCM: 1 < AnimateLCM, 1; one step beats one of SF-V: 1 < SF-V, 1
""")
FIGURES = "fvd", "seconds", "sharpness", "diversity", "motion", "first_psnr"
# The rows of the README, and what they are called there.
HEADLINE = {("real", "other futures"): "other real futures", ("teacher", "25"): "teacher, 25 steps",
            ("teacher", "8"): "teacher, 8 steps", ("teacher", "2"): "teacher, 2 steps",
            ("teacher", "1"): "teacher, 1 step", ("shipped", "1"): "student, 1 step",
            ("shipped", "tts"): "student, Time Travel", ("shipped", "2"): "student, 2 plain steps"}


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
        mean = {name: sum(row[name] for row in group) / len(group) for name in FIGURES}
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


def measured(report, rows):
    """Those of `rows` that a report has, as of over_seeds. rows: (label, run, sampler, the paper's FVD)."""
    found = over_seeds(report["rows"])
    return [{**found[key], "label": label, "in_paper": paper or "", "seconds": found[key]["seconds"] or ""}
            for label, run, name, paper in rows if (key := f"{run}, {name}") in found]


def orderings(*reports):
    """A row for each of ORDERINGS. A claim holds, or its reverse, if the intervals over all training seeds do
    not overlap. For bad clips, both rows are compared clip by clip."""
    rows = over_seeds([row for report in reports for row in report["rows"]])
    for claim, name, other in ORDERINGS:
        better, worse = rows.get(f"osv, {name}"), rows.get(other)
        if better and worse:
            here = verdict(better["low"] - worse["high"], better["high"] - worse["low"])
            yield {"claim": claim, "better": better["range"], "worse": worse["range"], "here": here,
                   "difference": paired_difference(better, worse, reports[0]["protocol"]["clips"])}


# ---------------------------------------------------------------------------------------------------------
# Rows of speed: reports of tools/bench.py, and logs


def side_by_side(report):
    """The rows of `tools.bench nets sample`, those of ours, plain and diffusers in one."""
    found = defaultdict(dict)
    for row in report["nets"] + report.get("sample", []):
        whose, what = row["what"].replace("ours, recorded", "ours").split(": ")
        what = re.sub(r"25 .*guided", "25 guided steps", re.sub(r", \d+ frames", "", what))
        figures = row.get("error") or cell("{ms:,.0f} ms, {memory_gib:.1f} GiB", row)
        found[what] |= {"what": what, whose: figures, f"share of {whose}": cell("{share:.0%}", row)}
    return found.values()


def scaling(lines):
    """Per stage, the mean rates of trainings on one and on two GPUs after the first 20 steps."""
    for stage in (1, 2):
        one, two = (statistics.mean(line["clips_per_s"] for line in lines if line["step"] > 20 and
                                    (line["stage"], line["gpus"]) == (stage, gpus)) for gpus in (1, 2))
        yield {"stage": stage, "one": one, "two": two, "times": two / one}


# ---------------------------------------------------------------------------------------------------------
# Tables

ROWS = {
    "headline": partial(measured, rows=[(HEADLINE[row[:2]], *row) for row in SHIPPED if row[:2] in HEADLINE]),
    "student": partial(measured, rows=[("", *row) for row in SHIPPED]), "scaling": scaling,
    "table1": partial(measured, rows=[("", *row) for row in TABLE1]), "side_by_side": side_by_side,
    "table2": partial(measured, rows=[(f"{part}: ", *row) for part, rows in TABLE2.items() for row in rows]),
    "toy": lambda report: [row | {"guidance": row["guidance"] or "none"} for row in report["teacher"]],
    "orderings": orderings, "sensitivity": lambda report: report["rows"][1:]}        # 0: undamaged


def read_result(file):
    if file.suffix == ".jsonl":
        return read_lines(file, device=str, date=str)
    if file.name in ("student.json", "table1.json", "table2.json"):
        return read_report(file, nfe=int, interval=float, **dict.fromkeys(FIGURES, float))
    return read_json(file, device=str, date=str)


def rows_at(keys, *reports):
    """The rows under "key.key" of each report. A dictionary of rows has their names as "what"."""
    for report in reports:
        for key in keys.split("."):
            report = report[key]
        yield from ([{"what": what, **row} for what, row in report.items()] if isinstance(report, dict) else
                    report)


def cell(form, row):
    """A cell of a row: empty if the row has no such figure."""
    try:
        return form.format_map(row).replace("1 GPUs", "1 GPU")
    except (KeyError, ValueError):
        return ""


def table(comment, results):
    """What a comment describes, as Markdown: a table, its columns of numbers aligned to the right, and a
    paragraph about its sources. results: the folder of reports."""
    source, *columns = comment.replace("\n", " ").split(" | ")
    files, where = source.split(": ")
    reports = {file: read_result(results / file) for file in files.split()}
    rows = ROWS.get(where, partial(rows_at, where))(*reports.values())
    heads, forms = zip(*(column.strip().split(" = ") for column in columns))
    lines = [[cell(form, row) for form in forms] for row in rows]
    is_number = re.compile(r"([+-]?\d|inf|out of memory|$)").match
    align = ["--:" if i and all(map(is_number, column)) else "---" for i, column in enumerate(zip(*lines))]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in [heads, align, *lines])
    return f"{markdown}\n\n{sources(reports, where in ('student', 'table1', 'table2'))}\n"


def sources(reports, protocol):
    """A paragraph about the reports {file: report}: machine, versions and date, and with `protocol` how clips
    were made."""
    sentences = []
    for file, report in reports.items():
        last = report if isinstance(report, dict) else report[-1]                   # of a .jsonl
        words = [f"`results/{file}`: {last['device']}"]
        if rate := last.get("matmul_tflops_per_s"):
            words.append(f"matrix product {rate:.0f} TFLOP/s")
        words += [f"{name} {last[key]}" for name, key in (("PyTorch", "torch"), ("diffusers", "diffusers"))
                  if last.get(key)]
        sentences.append(", ".join([*words, last["date"]]))
        if protocol:
            said = ", ".join(f"{key} {value}" for key, value in report["protocol"].items())
            seeds = sorted({row["seed"] for row in report["rows"]})
            sentences += [f"Protocol: {said}", f"Training seeds {seeds}: mean, and from the lowest to the "
                          "highest end of their 95 % intervals"]
    return textwrap.fill(". ".join(sentences) + ".", 120, break_long_words=False, break_on_hyphens=False)


def write_page(page, results):
    """Replaces the tables of a page by those made of the reports in the folder `results`."""
    text = re.sub(r"(?s)(<!-- table (.*?) -->\n).*?(?=<!-- end -->)",
                  lambda match: match[1] + table(match[2], results), page.read_text())
    with replacing(page) as part:
        part.write_text(text)


# ---------------------------------------------------------------------------------------------------------
# Pictures


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


def number_rows(sheet, out, rows, height=65):
    """Writes a contact sheet with the numbers 1 to `rows`, again and again, left of its rows."""
    picture = Image.open(sheet)
    numbered = Image.new("RGB", (picture.width + 16, picture.height), "white")
    numbered.paste(picture, (16, 0))
    for i in range(picture.height // height):
        ImageDraw.Draw(numbered).text((8, i * height + height // 2), str(i % rows + 1), "black", anchor="mm")
    with replacing(out) as part:
        numbered.save(part, "JPEG", quality=90)


def main(root=ROOT):
    for page in [root / "README.md", *sorted(root.glob("docs/*.md"))]:
        write_page(page, root / "results")
    plot(read_result(root / "results/table1.json")["rows"], root / "results/table1_nfe.png")
    number_rows(root / "results/student.jpg", root / "results/student_rows.jpg", rows=5)


if __name__ == "__main__":
    command_line("Write the tables and pictures of the pages from the reports in results/.").parse_args()
    main()
