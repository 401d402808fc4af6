"""The pages agree with the code and with results/: commands name scripts and flags that exist, links lead
somewhere, the file table counts right, figures are those of the files that they name. And the house keeps its
form: sizes below their limits, imports in one direction."""
import ast
import io
import json
import re
import subprocess
import tokenize
from functools import cache
from itertools import chain

import pytest
from conftest import ROOT

from tools import pages

GENERATED = r"(?s)<!-- table (.*?) -->\n(.*?)<!-- end -->"      # by tools/pages.py
DOCS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
PAGES = DOCS + ["exercises/README.md", "exercises/INSTRUCTORS.md", "LOG.md", "assets/model_card.md"]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for pattern in ("*.py", "*/*.py")
                 for path in ROOT.glob(pattern) if not path.name.startswith("out_"))
FOLDERS = ["support", "toy", "tools"]                           # of our modules, besides the top level
SCRIPTS = {"train_stage1", "train_stage2", "toy.train"}         # and all of tools/: run, never imported

# Lines of code. Each file and each function stands 3 % below 450 and 60, so that a small addition fits.
LARGEST = {"a file": 446, "a function": 58, "the top level": 2000, "all of it": 5230}


# ---- Commands and links ---------------------------------------------------------------------------------


def commands(page):
    """Calls of our scripts, indented or `in a sentence`, continued lines joined -> (file, words). In a source
    file, those of the docstrings, which begin with $."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}.*\$ .*" if page.endswith(".py") else r"^ {4}.*", text, re.M)
    lines += [" ".join(inside.split()) for inside in re.findall(r"`((?:python|torchrun) [^`]+)`", text)]
    called = re.compile(r".*?(?:python|torchrun)(?: -(?!m )\S+)*"
                        r" (?:((?:\w+/)?\w+\.py)|-m ((?:tools|toy)\.\w+))(?= |$)(.*)")
    for line in lines:
        if match := called.match(line):
            script = match[1] or match[2].replace(".", "/") + ".py"
            yield script, match[3].split("#")[0].split("|")[0].split()


@pytest.fixture(scope="module")
def help_of(python):
    """A function that returns the help text of a script."""
    @cache
    def help_of(script):
        how = ["-m", script.removesuffix(".py").replace("/", ".")] \
            if script.startswith(("tools/", "toy/")) else [script]
        run = subprocess.run([python, *how, "--help"], cwd=ROOT, capture_output=True, text=True)
        return run.stdout + run.stderr
    return help_of


@pytest.mark.parametrize("page", PAGES + SOURCES)
def test_commands_name_scripts_and_flags_that_exist(page, help_of):
    """Most flags stand in the script as they are typed; the help text has the others, but takes a second."""
    has = lambda script, flag: flag == "--help" or f'"{flag}"' in (ROOT / script).read_text() \
        or re.search(rf"{flag}\b", help_of(script))
    for script, words in commands(page):
        if script.startswith("out_"):                           # made by the command before
            continue
        assert (ROOT / script).is_file(), f"{page}: {script}"
        for flag in {word.partition("=")[0] for word in words if word.startswith("--")}:
            assert has(script, flag), f"{page}: {script} has no {flag}"


def test_there_are_commands_to_check():
    found = [command for page in DOCS for command in commands(page)]
    assert len(found) > 50
    assert {script for script, _ in found} >= {
        "sampler.py", "train_stage1.py", "data.py", "tools/export.py", "tools/bench.py", "tools/tables.py",
        "toy/train.py"}


@pytest.mark.parametrize("page", PAGES)
def test_code_that_is_named_in_passing_exists(page):
    """Files, `results/x.json` or `support/engine.py`, and modules, `-m tools.x`, in sentences."""
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:results|assets|exercises|support|tests|tools|toy)/[\w./]+)`", text)
    named += re.findall(r"`(\w+\.py)`", text)
    if page == "LOG.md":                                        # its old entries name scripts of their day
        named = [name for name in named if not name.endswith(".py")]
    modules = re.findall(r"-m ((?:tools|toy)\.\w+)", text)
    named += [name.replace(".", "/") + ".py" for name in modules]
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing, f"{page}: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert "://" in target or (folder / target).exists(), f"{page}: {target}"


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) < 16_000, "something has to move to docs/"
    missing = [page for page in DOCS[1:] if f"]({page})" not in text]
    assert not missing, f"not linked from README.md: {missing}"


@pytest.mark.parametrize("page", DOCS)
def test_lines_of_pages_are_short(page):
    text = re.sub(GENERATED, "", (ROOT / page).read_text())
    long = [line for line in text.splitlines() if len(line) > 125 and not line.startswith("|")]
    assert not long, "\n".join(long)


# ---- Figures --------------------------------------------------------------------------------------------

# By how much a figure of a file is multiplied when a sentence gives it in this unit.
UNITS = {"%": 100, "s": 1e-3, "seconds": 1e-3, "TB": 1e-6}
# Figures that their file does not have as such: how they follow from numbers of the file, from CONSTANTS and
# from other entries of the page; or in words, where they are from.
CONSTANTS = {1, 8, 10, 60, 1000, 3600, 1e6}
ELSEWHERE = {
    "README.md": {"18.4": "hours, 3:26:02 and 14:55:53", "23": "the limit of the memory"},
    "docs/decisions.md": {"2.5": "a default of --guidance"},
    "docs/full_size.md": {
        "2000": "the paper", "20000": "the paper", "40000": "clips of stage 2", "10.5": "3.2 + 7.3",
        "3.2": "2000 * 8 * 716.698 / 1000 / 3600", "7.3": "20000 * 2 * 657.36 / 1000 / 3600",
        "13.8": "345.6 * 40000 / 1000 / 1000", "9.6": "hours, 2:44:39 and 6:48:32", "16": "cores",
        "18.4": "hours, 3:26:02 and 14:55:53", "1.6": "8 / 4.92", "1.7": "1 / 0.6", "6.51": "6.51333"},
    "docs/speed.md": {
        "786": "the machine of the profile", "74": "sum over kernels of the profile", "490": "the same",
        "1.7e-3": "0.001657", "2.2e-2": "0.02229", "4.22": "4216175561065 / 1e6 / 1e6",
        "0.03": "0.010532 + 0.017576", "0.9": "0.107016 + 0.825304"},
    "docs/tables.md": {"2048": "2048", "95": "the level of the intervals", "0.93": "7.31170 / 7.87119",
                       "2.1": "the paper: 335.36 / 156.94", "1.8": "13.9595 / 7.87119",
                       "4.4": "11.3298 - 6.93736", "6.6": "in the table, 13.9595 - 7.31170",
                       "2.3": "in LOG.md, clip by clip"},
    "docs/toy_world.md": {"512": "512", "41.5": "41.5475", "0.4": "0.357353"},
    "docs/training.md": {
        "158": "seconds, with the steps after the last line of the log", "1240": "steps", "465": "their sum",
        "2000": "the paper", "20000": "the paper", "9.6": "as on full_size.md", "18.4": "as on full_size.md",
        "10000": "half of the paper's", "24": "2000 * 716.698 / 1000 / 60",
        "1.8": "10000 * 657.36 / 1000 / 3600"},
    "docs/videos.md": {
        "56": "two seconds of a file of 30 frames per second", "4.4": "246.862 / 56",
        "16": "cores of a host", "15": "1105.92 * 8 / 10 / 60", "0.51": "1 / 1.95518", "0.56": "1 / 1.80152",
        "142": "1e6 / 1.95518 / 3600", "154": "1e6 / 1.80152 / 3600", "10": "154 / 16",
        "11.7": "counted", "39.1": "counted", "361": "36.5509 / 101.378 * 1000",
        "30": "39.1 * 1e6 / 361 / 3600", "1.1": "11.7 * 1e6 / 361 / 3600 / 8", "3.8": "30 / 8"}}


@pytest.mark.parametrize("page", DOCS)
def test_generated_tables_are_those_of_the_results(page, tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text((ROOT / page).read_text())
    pages.write_page(copy, ROOT / "results")
    assert copy.read_text() == (ROOT / page).read_text(), "run python -m tools.pages"


NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"


def leaves(content):
    """All numbers in a report, also those of its sentences, which are texts with a space."""
    if isinstance(content, dict):
        content = [*content.keys(), *content.values()]
    if isinstance(content, list):
        return [number for part in content for number in leaves(part)]
    if isinstance(content, str):
        return [float(number.replace(",", "")) for number in re.findall(NUMBER, content)] * (" " in content)
    return [float(content)] if isinstance(content, (int, float)) else []


@cache
def figures_of(name):
    """(all numbers in a file of results/, those of the tables on the pages that are made of it). If there are
    no such tables, the first stand for the second."""
    file = ROOT / "results" / name
    text = file.read_text()
    numbers = leaves(text if file.suffix == ".txt" else json.loads(text) if file.suffix == ".json" else
                     [json.loads(line) for line in text.splitlines()])
    tables = [line for page in DOCS for comment, part in re.findall(GENERATED, (ROOT / page).read_text())
              if name in re.split("[ :]", comment) for line in part.splitlines() if line.startswith("|")]
    return numbers, leaves(tables) or numbers


def is_rounded(figure, numbers):
    """Whether a figure, such as 1240 or 0.85 or 1.7e-3, is one of the numbers, rounded to its digits."""
    digits, _, exponent = figure.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return any(abs(number - float(figure)) <= 0.500001 * unit for number in numbers)


def stale_figures(text, elsewhere):
    """Figures in paragraphs, list items and table rows that name files of results/, which none of these files
    has: decimals, and whole numbers from 10 on. Smaller ones mostly count things. Commands do not count: they
    may write the file that they name."""
    text = re.sub(rf"{GENERATED}|```.*?```|(?m:^ {{4}}[^\n]*)", "", text)
    for paragraph in re.split(r"\n\n|\n(?=[-|] |\d+\. )", text):
        names = re.findall(r"results/(\w+\.(?:jsonl?|txt))", paragraph)
        numbers, shown = ([x for name in names for x in figures_of(name)[i]] for i in (0, 1))
        words = re.sub(r"`[^`]*`|\]\([^)]*\)|\d{4}-\d\d-\d\d", " ", paragraph)
        for figure, unit in re.findall(rf"(?<![\w.,/])({NUMBER})(?!\w)[ ]?([%\w]*)", words) * bool(names):
            figure = figure.replace(",", "")
            derivation = elsewhere.get(figure, "")
            operands = re.findall(NUMBER, derivation) if derivation[:1].isdigit() else []
            known = shown + [number * UNITS[unit] for number in shown if unit in UNITS]
            if operands and all(x in elsewhere or float(x) in CONSTANTS or is_rounded(x, numbers)
                                for x in operands):
                known.append(eval(derivation))
            if len(figure) > 1 and not is_rounded(figure, known) and (operands or not derivation):
                yield figure


@pytest.mark.parametrize("page", DOCS)
def test_figures_are_those_of_the_files_that_are_named_beside_them(page):
    stale = list(stale_figures((ROOT / page).read_text(), ELSEWHERE.get(page, {})))
    assert not stale, f"{page}: not in the files of results/ that their paragraphs name: {stale}"


@pytest.mark.parametrize("page, old, new", [
    ("README.md", "11.2 GiB", "12.2 GiB"), ("README.md", "3.7 s", "3.9 s"),
    ("docs/speed.md", "111 ms", "107 ms"),
    ("docs/speed.md", "2.2e-2", "2.3e-2"), ("docs/tables.md", "0.93 of", "0.95 of"),
    ("docs/training.md", "24 minutes", "27 minutes"), ("docs/videos.md", "142 or", "148 or")])
def test_a_stale_figure_is_seen(page, old, new):
    text = (ROOT / page).read_text()
    assert old in text
    assert list(stale_figures(text.replace(old, new), ELSEWHERE.get(page, {}))) == [new.split()[0]]


# ---- Sizes ----------------------------------------------------------------------------------------------


@cache
def our_files():
    """{"support/engine.py": its syntax tree} of all modules but tests and exercises."""
    paths = chain(ROOT.glob("*.py"), *((ROOT / folder).glob("*.py") for folder in FOLDERS))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(paths)}


def code_lines(file):
    """Numbers of the lines that have code on them: no comments, no docstrings, no blank lines."""
    text, spoken = (ROOT / file).read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            spoken |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    silent = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    spans = [range(token.start[0], token.end[0] + 1) for token in tokens
             if tokenize.tok_name[token.type] not in silent]
    return {*chain(*spans)} - spoken


def test_the_code_stays_an_afternoons_reading():
    """A file or a function that comes near its limit needs something taken out before something goes in."""
    lines = {file: code_lines(file) for file in our_files()}
    sizes = [("a file", file, len(found)) for file, found in lines.items()]
    for file, tree in our_files().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                inside = lines[file] & {*range(node.lineno, node.end_lineno + 1)}
                sizes.append(("a function", f"{file}: {node.name}", len(inside)))
    sizes.append(("the top level", "*.py", sum(len(lines[file]) for file in lines if "/" not in file)))
    sizes.append(("all of it", "all but tests and exercises", sum(map(len, lines.values()))))
    large = [f"{name}: {size} lines of code; {kind} has {LARGEST[kind]} at most"
             for kind, name, size in sizes if size > LARGEST[kind]]
    assert not large, "\n".join(large)


def test_the_file_table_is_complete_and_counts_well():
    listed = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    lines = {file: len(code_lines(file)) for file in our_files()}
    empty = {file for file in lines if file.endswith("__init__.py")}
    assert not any(lines[file] for file in empty)               # a docstring, no code
    assert sorted(file for file, _ in listed) == sorted(lines.keys() - empty)
    wrong = {file: lines[file] for file, count in listed if abs(lines[file] - int(count)) > 10}
    assert not wrong, f"lines of code, for the README's table: {wrong}"


# ---- Imports --------------------------------------------------------------------------------------------


def imports():
    """{module: our modules that it imports, anywhere in it}."""
    names = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tree
             for file, tree in our_files().items()}
    found = {}
    for name, tree in names.items():
        said = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                said |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                said |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = said & names.keys()
    return found


def reached(graph, start):
    """All modules that are imported when `start` is."""
    found, waiting = set(), [start]
    while waiting:
        for name in graph[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def test_imports_run_one_way():
    graph = imports()
    assert "model" in graph["solver"] and "support.checkpoint" in graph["model"]
    circles = {name for name in graph if name in reached(graph, name)}
    assert not circles, f"these import each other: {circles}"


def test_the_networks_do_not_know_their_kernels():
    """model.py is the specification, support/kernels.py the optimisation."""
    assert not reached(imports(), "model") & {"support.kernels", "support.fused", "support.upsample"}


def test_no_module_imports_a_script():
    """Scripts in tools/ share their tables and plots among themselves."""
    found = {f"{name} imports {other}" for name, others in imports().items() for other in others
             if other in SCRIPTS or other.startswith("tools.") and not name.startswith("tools.")}
    assert not found, found
