"""What the READMEs say to type: scripts that are there, with flags that they have."""
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

PAGES = ["README.md", "exercises/README.md", "LOG.md"]


def commands(page):
    """Indented lines that call one of our scripts, continued lines joined -> [(script, words)]."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if match := re.match(r" {4,}.*?(?:python|torchrun)(?: -\S+| --\S+)* ((?:\w+/)?\w+\.py)(.*)", line):
            yield match[1], match[2].split("#")[0].split("|")[0].split()


@cache
def help_of(script):
    run = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout + run.stderr


def has(script, flag):
    """Most flags stand in the script as they are typed; of others it is asked, which takes seconds."""
    return f'"{flag}"' in (ROOT / script).read_text() or re.search(rf"{flag}\b", help_of(script))


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_and_flags_that_exist(page):
    for script, words in commands(page):
        if script.startswith("out_"):                           # the reader has just made it
            continue
        assert (ROOT / script).is_file(), f"{page}: {script}"
        for flag in {word for word in words if word.startswith("--")}:
            assert has(script, flag), f"{page}: {script} has no {flag}"


def test_there_are_commands_to_check():
    found = list(commands("README.md"))
    assert len(found) > 25
    assert {"sampler.py", "train_stage1.py", "data.py", "model.py"} <= {script for script, _ in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert "://" in target or (folder / target).exists(), f"{page}: {target}"
    for name in re.findall(r"`(results/[\w./]+)`", (ROOT / page).read_text()):
        assert (ROOT / name).exists(), f"{page}: {name}"


def lines_of_code(path):
    """Lines with code on them: no comments, no docstrings, no blank ones."""
    text, spoken = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            spoken |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    silent = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    spans = [range(token.start[0], token.end[0] + 1) for token in tokens
             if tokenize.tok_name[token.type] not in silent]
    return len({*chain(*spans)} - spoken)


def test_the_file_table_is_complete_and_counts_well():
    """And the code stays an afternoon's reading: who needs more lines finds some that can go."""
    listed = re.findall(r"^\| `([\w]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    lines = {path.name: lines_of_code(path) for path in ROOT.glob("*.py")}
    assert {name for name, _ in listed} == set(lines)
    wrong = {name: lines[name] for name, count in listed if abs(lines[name] - int(count)) > 10}
    assert not wrong, f"lines of code, for the README's table: {wrong}"
    assert sum(lines.values()) <= 4200 and lines["model.py"] <= 732
