"""tour.ipynb runs from top to bottom, and the outputs that it keeps belong to the code that it shows.

    $ python tests/test_tour.py         # runs it with its full numbers and keeps the outputs; minutes

Each code cell keeps a fingerprint of what made its outputs: the code cells up to and including this one, our
functions that they name, and the toy weights. What these functions call in turn is not followed.
"""
import ast
import hashlib
import os
import platform
import re

import pytest

nbformat = pytest.importorskip("nbformat")
from conftest import ROOT  # noqa: E402
from nbclient import NotebookClient  # noqa: E402

FILE = ROOT / "tour.ipynb"
NO_OUTPUT = "no-output"                         # the tag of a code cell that is meant to have none


def read():
    return nbformat.read(FILE, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def without_docstrings(tree):
    """The code of a syntax tree as text, without comments and docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def named_code(source):
    """The code of our functions, classes and constants that `source` names as module.name."""
    found = []
    for module, name in sorted(set(re.findall(r"\b(\w+)\.(\w+)", source))):
        if (ROOT / f"{module}.py").is_file():
            for node in ast.parse((ROOT / f"{module}.py").read_text()).body:
                targets = getattr(node, "targets", [node])
                if any(name in (getattr(t, "name", None), getattr(t, "id", None)) for t in targets):
                    found.append(without_docstrings(node))
    return "\n".join(found)


def fingerprints(notebook):
    """One per code cell."""
    weights = b"".join(path.read_bytes() for path in sorted((ROOT / "assets/toy").rglob("*.safetensors")))
    source, found = hashlib.sha256(weights).hexdigest(), []
    for cell in code_cells(notebook):
        source += cell.source + "\n"
        found.append(hashlib.sha256((source + named_code(source)).encode()).hexdigest()[:16])
    return found


def execute(notebook, folder):
    """Runs all cells in `folder`. An error in a cell raises CellExecutionError, with the cell's source."""
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": os.fspath(folder)}})
    client.execute()
    return notebook


def kinds(cell):
    """The kinds of a cell's outputs, such as stream or image/jpeg, without repetitions in a row."""
    found = [max(output.get("data", {output.output_type: ""})) for output in cell.outputs]
    return [kind for i, kind in enumerate(found) if i == 0 or kind != found[i - 1]]


def test_all_cells_run(tmp_path, monkeypatch):
    """With few frames and steps. The notebook runs in a folder of links, because it writes to out/ there."""
    for path in ROOT.iterdir():
        if path.name != "out":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", os.fspath(tmp_path / "runtime"))
    for kept, new in zip(code_cells(read()), code_cells(execute(read(), tmp_path))):
        assert kinds(new) == kinds(kept), f"cell {kept.id}: the outputs in the file are of other kinds"


def test_the_outputs_are_those_of_the_code():
    notebook = read()
    old = [cell.id for cell, wanted in zip(code_cells(notebook), fingerprints(notebook))
           if cell.metadata.get("made_by") != wanted]
    assert not old, f"cells {old}: code has changed since they ran: run `python tests/test_tour.py`"


def test_the_file_is_small_and_complete():
    assert FILE.stat().st_size < 1_500_000
    for cell in code_cells(read()):
        assert bool(cell.outputs) != (NO_OUTPUT in cell.metadata.get("tags", [])), f"cell {cell.id}: outputs"
        assert "error" not in kinds(cell), f"cell {cell.id}"


def test_outputs_do_not_name_the_machine():
    """No absolute paths, no host name, no warnings: warnings name files."""
    for cell in code_cells(read()):
        for output in cell.outputs:
            assert output.get("name") != "stderr", f"cell {cell.id}: {output.text}"
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            paths = re.findall(r"(?<![\w.:/])/\w+/\S*|[A-Z]:\\\S*", text)
            assert not paths and platform.node() not in text, f"cell {cell.id}: {paths or platform.node()}"


def main():
    notebook = execute(read(), ROOT)
    for cell, wanted in zip(code_cells(notebook), fingerprints(notebook)):
        cell.metadata["made_by"] = wanted
    part = FILE.with_suffix(".part")
    nbformat.write(notebook, part)
    part.replace(FILE)
    print(f"wrote {FILE.name}: {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
