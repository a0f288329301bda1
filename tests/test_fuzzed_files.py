"""Recipes, headers and adapters, edited at random: refused in our words, or read aright.

What is edited alike in packs is in `packs/test_hostile.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from families import small_base
from hostile import PHASES, edit, places, within_bounds
from personae.checkpoints import Checkpoint, open_checkpoint
from personae.errors import CheckpointError, RecipeError
from personae.recipe import (
    MergeSettings,
    merge_recipe_text,
    read_merge_recipe,
    read_merge_recipes,
    read_recipe,
    recipe_kind,
)

# Recipes

ROOT = Path(__file__).parent.parent
RECIPES = sorted(
    path
    for folder in ("recipes", "recipes/merge", "recipes/adapters", "tests/recipe/public_shapes")
    for path in (ROOT / folder).glob("*.yaml")
)
BASE = small_base()
LETTERS = [*"\0\t\n&*!%@`{[]}:-?|>'\"é", "---\n", "<<: ", "!!int ", "1e"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def _edited_recipe(data: st.DataObject) -> str:
    """The text of a recipe with one to three things changed: in what it says, or its letters."""
    text = data.draw(st.sampled_from(RECIPES), "recipe").read_text()
    if data.draw(st.booleans(), "in its letters"):
        place = data.draw(st.integers(0, len(text)), "place")
        new = data.draw(st.sampled_from(LETTERS), "letters")
        return text[:place] + new + text[place + data.draw(st.integers(0, 3), "less") :]
    documents = list(yaml.safe_load_all(text))
    for _ in range(data.draw(st.integers(1, 3), "edits")):
        document = data.draw(st.sampled_from(documents), "document")
        if document:
            edit(document, data, [*places(document)])
    return yaml.dump_all(documents, Dumper=_WithoutAliases, allow_unicode=True)


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


@settings(phases=PHASES, max_examples=1000)
@given(st.data())
def test_an_edited_recipe(folder: Path, data: st.DataObject):
    path = folder / "recipe.yaml"
    path.write_text(_edited_recipe(data))
    try:
        with within_bounds():
            if recipe_kind(path) == "pack":
                read_recipe(path)
                return
            *_, recipe = read_merge_recipes(path)
    except RecipeError as error:
        assert str(error)
        return
    wanted = recipe.settings
    if len(recipe.parts) > 1 or recipe.small_files or wanted.layers:
        return  # what settings alone do not tell
    path.write_text(merge_recipe_text(recipe.base, recipe.experts, wanted))
    found = read_merge_recipe(path).settings
    assert _said(found) == _said(wanted)


def _said(settings: MergeSettings) -> MergeSettings:
    """Settings of experts without any, written as none."""
    if any(settings.expert_parameters):
        return settings
    return settings.model_copy(update={"expert_parameters": ()})


# Headers of weight files


@settings(phases=PHASES, max_examples=1000)
@given(st.data())
def test_an_edited_header(folder: Path, data: st.DataObject):
    path = folder / "edited.safetensors"
    save_file(BASE, path, metadata={"format": "pt", "other": "scale"})
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    text = _edited_json(raw[8:start], data)
    stated = data.draw(st.sampled_from([len(text)] * 8 + [0, len(text) + 1, 2**31, 2**64 - 1]))
    path.write_bytes(stated.to_bytes(8, "little") + text + raw[start:])
    try:
        with within_bounds():
            opened = open_checkpoint(path)
            model = {name: opened.read(name) for name in opened.specs}
    except CheckpointError as error:
        assert str(error)
    else:
        said = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        assert model.keys() == said.keys()
        for name, tensor in model.items():
            begin, end = said[name]["data_offsets"]
            assert list(tensor.shape) == said[name]["shape"]
            assert tensor.numpy().tobytes() == raw[start + begin : start + end]


def _edited_json(raw: bytes, data: st.DataObject) -> bytes:
    """JSON with one or two places edited, or a few bytes replaced."""
    if data.draw(st.booleans(), "in its bytes"):
        place = data.draw(st.integers(0, len(raw)), "place")
        new = data.draw(st.sampled_from([b"", b"\xff", b"[" * 2000, b'"', b"}", b"9" * 400, b"-"]))
        return raw[:place] + new + raw[place + data.draw(st.integers(0, 3), "less") :]
    content: Any = json.loads(raw)
    for _ in range(data.draw(st.integers(1, 2), "edits")):
        edit(content, data, [*places(content)])
    return json.dumps(content).encode()


# Adapters

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["layer", "embed"],
    "rank_pattern": {"embed": 1},
    "alpha_pattern": {"la.er": 5.0},
    "modules_to_save": None,
    "use_rslora": True,
    "fan_in_fan_out": False,
    "bias": "none",
    "init_lora_weights": True,
    "task_type": None,
}
DECIDE = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"}
"""Keys that decide what the factors give."""


@pytest.fixture(scope="module")
def adapter(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """An adapter of a matrix, and the model that it stands for."""
    directory = folder / "adapter"
    directory.mkdir()
    a, b = torch.randn(2, 12), torch.randn(16, 2)
    names = "base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight"
    save_file(dict(zip(names, (a, b), strict=True)), directory / "adapter_model.safetensors")
    delta = (5 / 2**0.5) * (b.double() @ a.double())
    return directory, {**BASE, "layer.weight": (BASE["layer.weight"].double() + delta).float()}


@settings(phases=PHASES, max_examples=500)
@given(st.data())
def test_an_edited_adapter_configuration(
    folder: Path, adapter: tuple[Path, dict[str, Tensor]], data: st.DataObject
):
    directory, expected = adapter
    text = _edited_json(json.dumps(CONFIG).encode(), data)
    (directory / "adapter_config.json").write_bytes(text)
    try:
        with within_bounds():
            opened = open_checkpoint(directory, base=_base(folder))
            model = {name: opened.read(name) for name in opened.specs}
    except CheckpointError as error:
        assert str(error)
    else:
        said = json.loads(text)
        assert all(tensor.isfinite().all() for tensor in model.values())
        assert all(model[name].shape == BASE[name].shape for name in BASE)
        if all(said.get(key) == CONFIG[key] for key in DECIDE):
            for name, tensor in expected.items():
                torch.testing.assert_close(model[name], tensor)


def _base(folder: Path) -> Checkpoint:
    path = folder / "base.safetensors"
    if not path.exists():
        save_file(BASE, path)
    return open_checkpoint(path)


@pytest.mark.parametrize(
    "key", ["(a*)*b", "(.*.*)*x", "(a|a)*b", ".*.*.*.*.*x", "(" * 5000, "a{9999}{9999}"]
)
def test_a_pattern_that_takes_for_ever(folder: Path, adapter: tuple[Path, Any], key: str):
    content = CONFIG | {"rank_pattern": {key: 2}}
    (adapter[0] / "adapter_config.json").write_text(json.dumps(content))
    with within_bounds(), pytest.raises(CheckpointError, match="pattern"):
        open_checkpoint(adapter[0], base=_base(folder))
