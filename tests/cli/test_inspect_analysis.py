"""`personae inspect RECIPE --analysis`: what it prints, from both kinds of recipe, and refuses."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from families import saved, small_base, tuned
from personae.cli import app, console
from personae.commands.analyse import analyse

BASE = small_base()
MODELS = "base_model: base\nmodels: [{model: news}, {model: law}]\n"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A family, and recipes beside it."""
    saved(BASE, tmp_path / "base")
    saved(tuned(BASE, 1), tmp_path / "news")
    saved(tuned(BASE, 2), tmp_path / "law")
    (tmp_path / "merge.yaml").write_text("merge_method: drm\n" + MODELS)
    (tmp_path / "pack.yaml").write_text("pack_method: dts\n" + MODELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == exit_code, (result.stderr, result.exception)
    return result.stderr if exit_code else result.stdout


@pytest.mark.parametrize("recipe", ["merge.yaml", "pack.yaml"])
def test_json_is_what_the_function_returns(recipe: str):
    found = run(f"inspect {recipe} --analysis rank_drop --set density=0.5 --json")
    expected = analyse(
        "base", {"news": "news", "law": "law"}, "rank_drop", parameters={"density": 0.5}
    )
    assert json.loads(found) == json.loads(json.dumps(expected))


def test_the_table_has_a_row_for_each_tensor_and_a_column_for_each_headline():
    printed = run("inspect merge.yaml --analysis sign_agreement --tensor layer*")
    summary, parameters, columns, row = printed.splitlines()
    assert summary.startswith("Share of experts")
    assert "density 0.2" in parameters
    assert columns.split()[:3] == ["tensor", "original.agreement", "original.random"]
    assert row.split()[0] == "layer.weight"
    assert all(0.5 <= float(number) <= 1 for number in row.split()[1:])


def test_on_a_narrow_terminal_names_are_told_apart_by_what_differs(work, monkeypatch):
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    names = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1) for p in "qk"]
    base = dict.fromkeys(names, weight)
    for number, folder in enumerate(("base", "news", "law")):
        saved({name: number * 0.1 + weight.roll(number) for name in base}, work / "deep" / folder)
    (work / "deep/merge.yaml").write_text(
        "merge_method: drm\nbase_model: base\nmodels: [{model: news}, {model: law}]"
    )
    monkeypatch.setattr(console.out, "width", 80)
    printed = run("inspect deep/merge.yaml --analysis sign_agreement")
    assert "tensors: model.layers.*.weight" in printed
    rows = [line.split()[0] for line in printed.splitlines()[-4:]]
    assert rows == [f"{n}.self_attn.{p}_proj" for n in (0, 1) for p in "kq"]


def test_a_plot_is_drawn_beside(work: Path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed: pip install 'personae[plots]'")
    run("inspect merge.yaml --analysis dropped_percentage --plot p.png --workers 1")
    assert (work / "p.png").read_bytes().startswith(b"\x89PNG")


def test_refusals(work: Path):
    assert "with --analysis (" in run("inspect merge.yaml", 2)
    assert "not base" in run("inspect base --analysis rank_drop", 2)
    assert "or give --analysis" in run("inspect base --tensor layer*", 2)
    assert "'rank_drop'" in run("inspect merge.yaml --analysis rank_dorp", 2)
    assert "not as 'p.gif'" in run("inspect merge.yaml --analysis rank_drop --plot p.gif", 2)
    refused = run("inspect merge.yaml --analysis rank_drop --plot merge.yaml/p.png", 2)
    assert "merge.yaml is a file" in refused
    assert "absent.yaml" in run("inspect absent.yaml --analysis rank_drop", 2)
    assert sorted(path.name for path in work.iterdir() if path.is_file()) == [
        "merge.yaml",
        "pack.yaml",
    ]
