"""Plots of analyses: a file that is one, and clear refusals without matplotlib."""

import importlib.util
import sys
from pathlib import Path

import pytest

from families import small_base, tuned
from personae.commands.analyse import analyse
from personae.errors import RecipeError
from personae.methods.analyses import ANALYSES
from personae.report import plots

BASE = small_base()
EXPERTS = {"a": tuned(BASE, 1), "b": tuned(BASE, 2)}
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason="matplotlib is not installed: pip install 'personae[plots]'",
)


@needs_matplotlib
@pytest.mark.parametrize("name", sorted(ANALYSES))
def test_every_analysis_can_be_drawn(name: str, tmp_path: Path):
    found = analyse(BASE, EXPERTS, name)
    assert plots.draw(found, tmp_path / "plot.svg") == 0
    drawn = (tmp_path / "plot.svg").read_text("utf-8")
    assert "<svg" in drawn
    assert drawn.count('id="axes_') == 1
    plots.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["plot.png", "plot.svg"]


@needs_matplotlib
def test_nine_tensors_are_drawn_and_the_rest_is_counted(tmp_path: Path):
    found = analyse(BASE, EXPERTS, "rank_drop")
    one = found["tensors"]["layer.weight"]
    found["tensors"] = {
        f"a.rather.long.name.of.a.tensor.in.layer.{n}.weight": one for n in range(11)
    }
    assert plots.draw(found, tmp_path / "plot.svg") == 2
    assert (tmp_path / "plot.svg").read_text("utf-8").count('id="axes_') == 9


def test_every_analysis_has_its_panel():
    assert plots._PANELS.keys() == ANALYSES.keys()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RecipeError, match=r"drawn as .png, .svg, .pdf, not as 'plot.jpeg2'"):
        plots.check(tmp_path / "plot.jpeg2")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RecipeError, match=r"pip install 'personae\[plots\]'"):
        plots.check(tmp_path / "plot.png")
