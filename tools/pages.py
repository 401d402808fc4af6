"""Writes the tables of README.md and docs/*.md, and three pictures, from the reports in results/.

    $ python -m tools.pages

No figure of a table is typed by hand. A page says in a comment what stands in a table, and this script writes
the table between the comment and <!-- end -->:

    <!-- table heads.json: rows | fake = {fake} | heads = {heads} | accuracy = {accuracy:.0%} -->
    <!-- end -->

First the files in results/, then where their rows are: keys of the reports, joined by dots, or a function of
ROWS. Then the columns, each with the format of its cells.

The pictures are results/table1_nfe.png and results/budgets.png, plots of table1.json and budgets.json, and
copies of contact sheets with the numbers of their rows, such as results/student_rows.jpg.
"""
import re
import statistics
import textwrap
from collections import defaultdict
from contextlib import suppress
from functools import partial

from PIL import ImageDraw, ImageOps

from evaluate import half_width
from support.checkpoint import ModelError, read_json, read_lines, replacing
from support.engine import command_line
from support.media import load_image
from tools.plot import new_figure, save_figure
from tools.tables import BETTER, BUDGETS, RATES, ROOT, SHIPPED, TABLE1, TABLE2

# ---------------------------------------------------------------------------------------------------------
# Rows of quality: reports of tools/tables.py

# The paper's claims, each in words and as "sampler < run, sampler", see tools/tables.py: with the first
# sampler, the run "osv" has a lower distance than the row on the right.
ORDERINGS = re.findall(r"(\S.*?): (.+?) < (.+?)[;\n]", """
one step beats 1 of the teacher: 1 < teacher, 1; one step beats 2 of the teacher: 1 < teacher, 2
Time Travel beats 8 of the teacher: tts < teacher, 8; Time Travel beats 8 of AnimateLCM: tts < AnimateLCM, 8
Time Travel beats one plain step: tts < osv, 1; Time Travel beats two plain steps: tts < osv, 2
two stages beat stage 1 alone: tts < stage 1 alone, tts
two stages beat stage 2 alone: tts < stage 2 alone, tts
five solver steps beat one: tts < m = 1, tts; the adversarial loss helps: tts < no adversarial loss, tts
the adversarial loss helps one step: 1 < no adversarial loss, 1
guidance of 1.5 hurts a student: 1 < osv, 1 cfg 1.5; guidance of 3 hurts more: 1 cfg 1.5 < osv, 1 cfg 3.0
latents do better than decoded frames: tts < pixel (VAE decoder), tts
one step beats one of AnimateLCM: 1 < AnimateLCM, 1; one step beats one of SF-V: 1 < SF-V, 1
one step beats one of AnimateLCM: 1 < AnimateLCM 5e-4, 1; one step beats one of SF-V: 1 < SF-V 1e-4, 1
Time Travel beats 8 of AnimateLCM: tts < AnimateLCM 5e-4, 8
""")                                            # over_seeds keeps one learning rate of each baseline
FIGURES = "fvd", "seconds", "sharpness", "diversity", "motion", "first_psnr", "bad", "training_seconds"
SAMPLERS = {"1": "one step", "2": "two steps", "tts": "Time Travel"}
# The rows of the README, and what they are called there.
HEADLINE = {("real", "other futures"): "other real futures", ("teacher", "25"): "teacher, 25 steps",
            ("teacher", "8"): "teacher, 8 steps", ("teacher", "2"): "teacher, 2 steps",
            ("teacher", "1"): "teacher, 1 step", ("shipped", "1"): "student, 1 step",
            ("shipped", "tts"): "student, Time Travel", ("shipped", "2"): "student, 2 plain steps"}


def over_seeds(rows):
    """The rows of a report, one per training seed -> {"run, sampler": row}. Its figures are means over the
    seeds; "range" and "bad_range" are toy-FVD and the share of bad clips as `span` writes them, "rows" the
    rows themselves. Figures that the rows lack are left out. Of two learning rates (RATES) only the run with
    the lower toy-FVD in one step is kept."""
    groups, merged = defaultdict(list), {}
    for row in rows:
        groups[f"{row['run']}, {row['sampler']}"].append(row)
    for key, group in groups.items():
        mean = merged[key] = {**group[0], "rows": group}
        for name in FIGURES:
            if all(row.get(name) is not None for row in group):
                mean[name] = statistics.mean(row[name] for row in group)
        mean["range"] = span([(row["fvd"], row["interval"]) for row in group], ".1f")[0]
        if "bad" in group[0]:
            mean["bad_range"] = span([(row["bad"], row["bad_interval"]) for row in group], ".1%", 0, 1)[0]
    for runs in RATES:
        ranked = sorted((row["fvd"], run) for run in runs if (row := merged.get(f"{run}, 1")))
        merged = {key: row for key, row in merged.items() if row["run"] not in [run for _, run in ranked[1:]]}
    return merged


def span(found, form, least=float("-inf"), most=float("inf")):
    """A figure and half the width of its 95 % interval, for each seed -> "mean (lowest end to highest end)",
    lowest end, highest end. No end is beyond `least` or `most`."""
    low, high = max(least, min(x - half for x, half in found)), min(most, max(x + half for x, half in found))
    return f"{statistics.mean(x for x, _ in found):{form}} ({low:{form}} to {high:{form}})", low, high


def fvd_difference(a, b, _):
    """By how much the toy-FVD of row a is larger than that of b, and half the width of the 95 % interval.
    Draw i of both has the same clips, so the difference varies less than the two distances."""
    return a["fvd"] - b["fvd"], half_width([x - y for x, y in zip(a["fvd_draws"], b["fvd_draws"])])


def bad_difference(a, b, clips):
    """The same for the share of bad clips. The difference of a clip is -1, 0 or 1."""
    differ = (int(a["bad_clips"], 16) ^ int(b["bad_clips"], 16)).bit_count() / clips
    return a["bad"] - b["bad"], 1.96 * ((differ - (a["bad"] - b["bad"]) ** 2) / (clips - 1)) ** 0.5


def compared(row, other, clips):
    """How two rows of over_seeds differ -> cells of the columns fvd_difference and bad_difference, as `span`
    writes them, and fvd_here and bad_here: whether the first has less. Rows of the same training seed are
    compared; the single row of the teacher or of real clips is compared with each. Figures are left out that
    rows lack (real videos, old reports) or for which no seed is common.
    """
    pairs = [(a, b) for a in row["rows"] for b in other["rows"]
             if a["seed"] == b["seed"] or 1 in (len(row["rows"]), len(other["rows"]))]
    for name, difference, form in (("fvd", fvd_difference, "+.1f"), ("bad", bad_difference, "+.1%")):
        with suppress(KeyError, ValueError):
            text, low, high = span([difference(*pair, clips) for pair in pairs], form)
            yield f"{name}_difference", text
            yield f"{name}_here", "yes" if high < 0 else "the reverse" if low > 0 else "not told apart"


def measured(report, rows):
    """Those of `rows` that a report has, as of over_seeds. rows: (label, run, sampler, the paper's FVD)."""
    found = over_seeds(report["rows"])
    return [{**found[key], "label": label, "in_paper": paper or "", "seconds": found[key]["seconds"] or ""}
            for label, run, name, paper in rows if (key := f"{run}, {name}") in found]


def orderings(*reports):
    """A row for each of ORDERINGS. A claim holds, or its reverse, if the interval of the difference does not
    contain 0."""
    rows = over_seeds([row for report in reports for row in report["rows"]])
    for claim, name, other in ORDERINGS:
        first, second = rows.get(f"osv, {name}"), rows.get(other)
        if first and second:
            yield {"claim": claim, "better": first["range"], "worse": second["range"],
                   **dict(compared(first, second, reports[0]["protocol"]["clips"]))}


def recipes(report):
    """A row for each length of training: our student less AnimateLCM's. "one": in one step. "two": in two
    evaluations, where ours is sampled with Time Travel."""
    rows, clips = over_seeds(report["rows"]), report["protocol"]["clips"]
    for run, length in (("osv", ""), ("osv x 2.5", " x 2.5"), ("osv x 6", " x 6"), ("shipped", " x 12.5")):
        with suppress(KeyError):                            # not measured yet
            one = dict(compared(rows[f"{run}, 1"], rows[f"{BETTER}{length}, 1"], clips))
            two = dict(compared(rows[f"{run}, tts"], rows[f"{BETTER}{length}, 2"], clips))
            yield {"run": run, "one": one, "two": two}


def one_step(report):
    """A row for each change of a training: "one" in one step, "tts" with Time Travel. Each is compared with
    the first, which is without a change."""
    rows, base, clips = over_seeds(report["rows"]), report["rows"][0]["run"], report["protocol"]["clips"]
    for run, change in {row["run"]: row["change"] for row in report["rows"]}.items():
        with suppress(KeyError):                            # not measured yet
            pairs = [(rows[f"{run}, {name}"], rows[f"{base}, {name}"]) for name in ("1", "tts")]
            one, tts = (a | dict(compared(a, b, clips)) if run != base else a for a, b in pairs)
            yield {"change": change, "one": one, "tts": tts}


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
    "budgets": partial(measured, rows=[("", *row) for row in BUDGETS]),
    "table2": partial(measured, rows=[(f"{part}: ", *row) for part, rows in TABLE2.items() for row in rows]),
    "toy": lambda report: [row | {"guidance": row["guidance"] or "none"} for row in report["teacher"]],
    # The first row of the sensitivity is that of undamaged clips.
    "orderings": orderings, "recipes": recipes, "one_step": one_step,
    "sensitivity": lambda report: report["rows"][1:]}


def read_result(file):
    read = read_lines if file.suffix == ".jsonl" else read_json
    return read(file, device=str, date=str)


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
    except (KeyError, TypeError, ValueError):
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
    trained = where in ("student", "table1", "budgets", "table2", "one_step")
    return f"{markdown}\n\n{sources(reports, protocol=trained)}\n"


def sources(reports, protocol):
    """A paragraph about the reports {file: report}: machine, versions and date, and with `protocol` how clips
    were made."""
    sentences = []
    for file, report in reports.items():
        last = report if isinstance(report, dict) else report[-1]                   # of a .jsonl
        forms = ("matrix product {matmul_tflops_per_s:.0f} TFLOP/s", "PyTorch {torch:s}",
                 "diffusers {diffusers:s}")
        words = [f"`results/{file}`: {last['device']}", *(cell(form, last) for form in forms), last["date"]]
        sentences.append(", ".join(filter(None, words)))
        if protocol:
            said = ", ".join(f"{key} {value}" for key, value in report["protocol"].items())
            seeds = sorted({row["seed"] for row in report["rows"]})
            sentences += [f"Protocol: {said}", f"Training seeds {seeds}: mean, and from the lowest to the "
                          "highest end of their 95 % intervals"]
    return textwrap.fill(". ".join(sentences) + ".", 120, break_long_words=False, break_on_hyphens=False)


def write_page(page, results):
    """Replaces the tables of a page by those made of the reports in the folder `results`. Raises ModelError
    if a table cannot be made: its files are of another version, or lack its rows."""
    def replaced(match):
        try:
            return match[1] + table(match[2], results)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            source, _, _ = match[2].partition(" | ")
            raise ModelError(f"{page}: no table of {source} ({error!r}); measure again") from error

    text = re.sub(r"(?s)(<!-- table (.*?) -->\n).*?(?=<!-- end -->)", replaced,
                  page.read_text(encoding="utf-8"))
    with replacing(page) as part:
        part.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------
# Pictures


def plot(rows, out):
    """Draws FVD over network evaluations on logarithmic axes: a line per run, means over the seeds."""
    axes = new_figure(7, 4.2).subplots()
    rows = [row for row in over_seeds(rows).values() if row["nfe"]]                 # real clips have no NFE
    for run in dict.fromkeys(row["run"] for row in rows):
        points = sorted((row for row in rows if row["run"] == run), key=lambda row: row["nfe"])
        line, = axes.plot([row["nfe"] for row in points], [row["fvd"] for row in points], "o-", label=run)
        for row in points:
            # The labels of OSV are on the left, that of Time Travel lower, so that they cover no others.
            left = dict(xytext=(-7, -12 if row["sampler"] == "tts" else 0), ha="right")
            place = left if run == "osv" else dict(xytext=(5, 4))
            axes.annotate(f"{row['sampler']}: {row['fvd']:.0f}", (row["nfe"], row["fvd"]), fontsize=8,
                          textcoords="offset points", color=line.get_color(), **place)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per clip", ylabel="toy-FVD",
             title="toy-FVD over network evaluations (labels: sampler, toy-FVD)", xmargin=0.1, ymargin=0.1)
    axes.set_xticks(nfe := sorted({row["nfe"] for row in rows}), nfe)
    axes.set_yticks(fvd := [5, 10, 20, 50, 100, 200], fvd)
    axes.minorticks_off()
    axes.legend()
    save_figure(axes.figure, out)


def plot_budgets(rows, out):
    """Draws toy-FVD and the share of bad clips over seconds of training, with 95 % intervals: a colour per
    recipe, a solid line for one step and a dashed one for two evaluations."""
    lines = defaultdict(list)
    for row in sorted(over_seeds(rows).values(), key=lambda row: row["training_seconds"]):
        lines[row["run"].split(" x ")[0], row["sampler"]].append(row)
    colours = {run: f"C{i}" for i, run in enumerate(dict.fromkeys(run for run, _ in lines))}
    for axes, y, half in zip(new_figure(9, 4).subplots(1, 2), ("fvd", "bad"), ("interval", "bad_interval")):
        for (run, name), points in lines.items():
            x, values, error = zip(*((row["training_seconds"], row[y], row[half]) for row in points))
            axes.errorbar(x, values, error, fmt="o-" if name == "1" else "s--", capsize=3, color=colours[run],
                          label=f"{run}, {SAMPLERS[name]}")
        axes.set(xscale="log", xlabel="seconds of training", ylabel={"fvd": "toy-FVD", "bad": "bad clips"}[y])
        axes.set_xticks(ticks := [50, 100, 200, 500], ticks)
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(axes.figure, out)


def number_rows(sheet, out, rows, height=65):
    """Writes a contact sheet with the numbers 1 to `rows`, again and again, left of its rows."""
    numbered = ImageOps.expand(load_image(sheet), (16, 0, 0, 0), "white")
    for i in range(numbered.height // height):
        ImageDraw.Draw(numbered).text((8, i * height + height // 2), str(i % rows + 1), "black", anchor="mm")
    with replacing(out) as part:
        numbered.save(part, "JPEG", quality=90)


def main(root=ROOT):
    for page in [root / "README.md", *sorted(root.glob("docs/*.md"))]:
        write_page(page, root / "results")
    plot(read_result(root / "results/table1.json")["rows"], root / "results/table1_nfe.png")
    plot_budgets(read_result(root / "results/budgets.json")["rows"], root / "results/budgets.png")
    for name, rows in (("student", 5), ("table1", 3), ("sensitivity", 10)):
        number_rows(root / f"results/{name}.jpg", root / f"results/{name}_rows.jpg", rows)


if __name__ == "__main__":
    command_line("Write the tables and pictures of the pages from the reports in results/.").parse_args()
    main()
