"""Checking a merge: faults of headers and weights, norms, and what is only to be known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import personae
from families import State, saved, small_base, tuned
from personae.cli import app
from personae.commands import check as checking
from personae.commands.check import check
from personae.recipe import MergeSettings
from personae.run.work import Work

BASE = small_base()
X, Y = tuned(BASE, 1), tuned(BASE, 2)


def norm_of(expert: State, base: State = BASE) -> float:
    squares = [
        (expert[n].double() - base[n].double()).square().sum()
        for n in base
        if base[n].is_floating_point()
    ]
    return float(sum(squares)) ** 0.5


def with_value(state: State, name: str, value: float) -> State:
    tensor = state[name].clone()
    tensor.view(-1)[3] = value
    return state | {name: tensor}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a base and two experts beside it."""
    monkeypatch.chdir(tmp_path)
    for name, state in {"base": BASE, "x": X, "y": Y}.items():
        saved(state, tmp_path / name)
    path = tmp_path / "r.yaml"
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: x}, {model: y}]\n"
    path.write_text(text + "parameters: {weight: 0.5}\nscale: 1.0\n")
    return path


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["check", *map(str, words)])


def test_beside_adapters_nothing_is_relative_to_a_base_that_is_not_read(tmp_path: Path):
    rows, columns = BASE["layer.weight"].shape
    module = "base_model.model.layer"
    tuned_by = {
        f"{module}.lora_A.weight": torch.ones(1, columns),
        f"{module}.lora_B.weight": torch.ones(rows, 1),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["layer"]}
    for adapter in ("x", "y"):
        (tmp_path / adapter).mkdir()
        save_file(tuned_by, tmp_path / adapter / "adapter_model.safetensors")
        (tmp_path / adapter / "adapter_config.json").write_text(json.dumps(config))
    saved(BASE, tmp_path / "base")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "merge_method: average\noutput: adapter\nbase_model: ./base\n"
        "models: [{model: ./x}, {model: ./y}]\n"
    )
    found = json.loads(run(recipe, "--json").stdout)["norms"]["x"]
    assert found["norm"] == pytest.approx(2 * (rows * columns) ** 0.5, rel=1e-5)
    assert found["relative"] is None
    assert run(recipe).stdout.splitlines()[1].split()[-1] == "-"


def test_a_sound_family_has_norms_and_no_fault():
    found = personae.check(BASE, {"x": X, "y": Y})
    assert found.faults == []
    for name, expert in (("x", X), ("y", Y)):
        assert found.norms[name].norm == pytest.approx(norm_of(expert), rel=1e-5)
        whole = norm_of(BASE, {n: torch.zeros_like(t) for n, t in BASE.items()})
        assert found.norms[name].relative == pytest.approx(norm_of(expert) / whole, rel=1e-5)
    floating = sum(t.nbytes for t in BASE.values() if t.is_floating_point())
    assert found.bytes_read == 3 * floating


def test_every_value_that_is_not_finite_is_named():
    nan, inf = with_value(X, "layer.weight", torch.nan), with_value(Y, "layer.bias", torch.inf)
    experts = {"x": nan, "y": inf}
    found = check(BASE, experts)
    assert len(found.faults) == 2
    assert "Expert 'x': tensor 'layer.weight' holds 1 value" in " ".join(found.faults)
    assert "Expert 'y': tensor 'layer.bias' holds 1 value" in " ".join(found.faults)
    assert not found.norms


def test_faults_of_headers_come_together_and_weights_are_not_read(monkeypatch):
    monkeypatch.setattr(checking, "look", lambda *_: pytest.fail("weights were read"))
    short = X | {"layer.bias": torch.zeros(15)}
    found = check(BASE, {"x": short, "y": Y | {"layer.weight": Y["layer.weight"].half()}})
    assert len(found.faults) == 2
    assert "'layer.bias' is (15,), the base's (16,)" in found.faults[0]
    assert "'layer.weight' is float16" in found.faults[1]


def test_experts_that_are_the_base_or_each_other_are_noted():
    copy = {name: tensor.clone() for name, tensor in BASE.items()}
    found = check(BASE, {"x": X, "same": copy, "again": tuned(BASE, 1)})
    assert found.faults == []
    assert "same equals the base in every tensor that is merged" in found.notes
    told = [note for note in found.notes if "equal in every tensor" in note]
    assert told == ["x and again are equal in every tensor that is merged: they count twice"]


@pytest.mark.parametrize(("scale", "is_noted"), [(0.029, False), (0.035, True)])
def test_uneven_norms_are_noted_beyond_a_factor_of_three(scale, is_noted):
    """The noise is of one draw, so that norms are as the scales are."""
    found = check(BASE, {"x": tuned(BASE, 1), "long": tuned(BASE, 1, scale)})
    told = [note for note in found.notes if "norms" in note]
    assert bool(told) == is_noted
    if told:
        assert "a factor of 3.5: x " in told[0]


def test_without_a_base_norms_are_from_the_mean():
    found = check(None, {"x": X, "y": Y}, MergeSettings(method="average"))
    half = {n: (X[n].double() + Y[n].double()) / 2 for n in X if X[n].is_floating_point()}
    expected = norm_of({n: X[n] for n in half}, half)
    assert [found.norms[n].norm for n in "xy"] == pytest.approx([expected, expected], rel=1e-4)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers):
    experts = {"x": X, "y": Y, "again": X}
    assert check(BASE, experts, work=Work(workers=workers)) == check(BASE, experts)


def test_a_bound_on_memory_that_is_too_low_is_a_fault():
    found = check(BASE, {"x": X, "y": Y}, work=Work(memory=100))
    assert len(found.faults) == 1
    assert "--memory" in found.faults[0]


def test_the_command_tells_norms_and_bytes(recipe):
    result = run(recipe)
    assert result.exit_code == 0, result.stderr
    assert f"{norm_of(X):.4g}" in result.stdout
    assert "can be merged" in result.stdout
    assert "read 7.5 KB of weights" in result.stdout


def test_the_command_as_json_with_faults(recipe):
    saved(with_value(X, "conv.weight", torch.nan), recipe.parent / "z")
    recipe.write_text(recipe.read_text().replace("{model: x}", "{model: z}"))
    result = run(recipe, "--json")
    assert result.exit_code == 2
    (fault,) = json.loads(result.stdout)["faults"]
    assert fault in result.stderr
    headers = run(recipe, "--no-weights", "--json")
    assert headers.exit_code == 0
    assert json.loads(headers.stdout)["norms"] == {}
    assert json.loads(headers.stdout)["bytes_read"] == 0


def test_what_it_refuses_merge_refuses(recipe):
    saved(X | {"layer.bias": torch.zeros(15)}, recipe.parent / "z")
    recipe.write_text(recipe.read_text().replace("{model: y}", "{model: z}"))
    checked = run(recipe)
    merged = CliRunner().invoke(app, ["merge", str(recipe), "out"])
    assert checked.exit_code == merged.exit_code == 2
    assert checked.stderr.splitlines()[-1] == merged.stderr.splitlines()[-1]


def test_several_recipes_are_checked_and_models_in_between_are_not_read(recipe):
    first = recipe.read_text()
    recipe.write_text(
        f"name: mid\n{first}---\nmerge_method: linear\n"
        "models: [{model: mid, parameters: {weight: 0.5}}, {model: y, parameters: {weight: 0.5}}]\n"
    )
    found = json.loads(run(recipe, "--json").stdout)
    assert set(found) == {"mid", "the output"}
    assert set(found["mid"]["norms"]) == {"x", "y"}
    assert found["the output"]["norms"] == {}
    assert any("weights are not read" in note for note in found["the output"]["notes"])


def test_a_pack_recipe_is_refused_with_a_way_out(tmp_path):
    path = tmp_path / "pack.yaml"
    path.write_text("pack_method: dts\nbase_model: base\nexperts: {x: x}\n")
    result = run(path)
    assert result.exit_code == 2
    assert "personae plan" in result.stderr


def test_settings_that_cannot_be_are_faults():
    found = check(BASE, {"x": X}, MergeSettings(tokenizer_source="nobody"))
    assert "no vocabulary 'nobody'" in found.faults[0]
