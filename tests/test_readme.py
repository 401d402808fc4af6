"""The pages agree with the code: commands name scripts and flags that exist, links lead somewhere, the file
table counts right. And the house keeps its form: sizes below their limits, imports in one direction."""
import ast
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from itertools import chain

import pytest
from conftest import ROOT

PAGES = ["README.md", "exercises/README.md", "exercises/INSTRUCTORS.md", "LOG.md", "assets/model_card.md"]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for pattern in ("*.py", "*/*.py")
                 for path in ROOT.glob(pattern) if not path.name.startswith("out_"))
FOLDERS = ["support", "toy", "tools"]                           # of our modules, besides the top level
SCRIPTS = {"train_stage1", "train_stage2", "toy.train"}         # and all of tools/: run, never imported

# Lines of code. Each file and each function stands 3 % below 450 and 60, so that a small addition fits.
LARGEST = {"a file": 436, "a function": 58, "the top level": 2000, "all of it": 4750}


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


@cache
def help_of(script):
    how = ["-m", script.removesuffix(".py").replace("/", ".")] if script.startswith(("tools/", "toy/")) \
        else [script]
    run = subprocess.run([sys.executable, *how, "--help"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout + run.stderr


def has(script, flag):
    """Most flags stand in the script as they are typed; the help text has the others, but takes seconds."""
    return flag == "--help" or f'"{flag}"' in (ROOT / script).read_text() \
        or re.search(rf"{flag}\b", help_of(script))


@pytest.mark.parametrize("page", PAGES + SOURCES)
def test_commands_name_scripts_and_flags_that_exist(page):
    for script, words in commands(page):
        if script.startswith("out_"):                           # made by the command before
            continue
        assert (ROOT / script).is_file(), f"{page}: {script}"
        for flag in {word.partition("=")[0] for word in words if word.startswith("--")}:
            assert has(script, flag), f"{page}: {script} has no {flag}"


def test_there_are_commands_to_check():
    found = list(commands("README.md"))
    assert len(found) > 25
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
