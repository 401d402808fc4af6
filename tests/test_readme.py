"""What the READMEs say to type: scripts that are there, with flags that they have."""
import re
import subprocess
import sys
from functools import cache

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


def test_the_file_table_is_complete():
    listed = set(re.findall(r"^\| `([\w]+\.py)` \|", (ROOT / "README.md").read_text(), re.M))
    assert listed == {path.name for path in ROOT.glob("*.py")}
