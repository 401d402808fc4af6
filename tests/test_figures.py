"""The figures of the pages: the code has every name in them, nothing in them overlaps, and the pictures in
docs/ are those that tools/figures.py draws."""
import ast
import re
from functools import cache
from itertools import chain, combinations

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tools import figures


@pytest.fixture(scope="module", params=figures.FIGURES)
def drawn(request):
    """(name, axes, canvas) of each figure, drawn once."""
    figure = figures.FIGURES[request.param]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return request.param, figure.axes[0], canvas


def code_in(text):
    """The names in a text of a figure that are set as code."""
    parts = re.findall(r"\\mathtt{(.*?)}", text.get_text())
    parts += [text.get_text()] if text.get_family() == ["monospace"] else []
    return {name for part in parts for name in re.findall(r"[A-Za-z_]\w*", part.replace("\\_", "_"))}


@cache
def names_of_the_code():
    """All names in the modules of the top level and of support/, but no words of strings and comments."""
    found = set()
    for path in chain(ROOT.glob("*.py"), (ROOT / "support").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            found |= {getattr(node, kind, None) for kind in ("id", "attr", "arg", "name")}
    return found


def test_the_code_has_each_name_in_a_figure(drawn):
    names = set().union(*map(code_in, drawn[1].texts))
    assert len(names) > 8
    assert not names - names_of_the_code(), f"renamed? {names - names_of_the_code()}"


def outline(artist):
    """Points at most a pixel apart on a line or around a patch, in pixels: x [n], y [n]."""
    path = artist.get_transform().transform_path(artist.get_path())
    found = [np.linspace(start, end, 2 + int(np.abs(end - start).max()))
             for part in path.to_polygons(closed_only=False) for start, end in zip(part, part[1:])]
    return np.concatenate(found).T if found else np.empty((2, 0))


def test_no_line_crosses_a_text_and_no_two_texts_overlap(drawn):
    _, axes, canvas = drawn
    width, height = canvas.get_width_height()
    texts = {text: text.get_window_extent().padded(-2) for text in axes.texts if text.get_text()}
    assert not [text for text, a in texts.items() if min(a.x0, a.y0, width - a.x1, height - a.y1) < 5]
    assert not [pair for pair in combinations(texts, 2) if texts[pair[0]].overlaps(texts[pair[1]])]
    for artist in (*axes.patches, *axes.lines):
        x, y = outline(artist)
        crossed = [text for text, a in texts.items()
                   if ((a.x0 < x) & (x < a.x1) & (a.y0 < y) & (y < a.y1)).any()]
        assert not crossed, f"{artist} crosses {crossed}"


def test_the_pictures_in_docs_are_up_to_date(drawn):
    """If not: python -m tools.figures."""
    name, _, canvas = drawn
    picture = ROOT / "docs" / f"{name}.png"
    old, new = (np.asarray(image.convert("L")).astype(np.int16)             # one channel is enough
                for image in (Image.open(picture), Image.fromarray(np.asarray(canvas.buffer_rgba()))))
    assert old.shape == new.shape and (np.abs(old - new) > 60).sum() < 20   # one letter has more pixels
    assert picture.stat().st_size < 200_000


def test_the_script_writes_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {"empty": lambda: figures.Sheet(0.5).figure})
    figures.main(tmp_path)
    assert Image.open(tmp_path / "empty.png").size == (1800, 50)
    before = (tmp_path / "empty.png").read_bytes()

    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(Image.Image, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        figures.main(tmp_path)
    assert (tmp_path / "empty.png").read_bytes() == before and len([*tmp_path.iterdir()]) == 1
