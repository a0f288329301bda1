"""Slices and modules of a merge recipe, taken apart; no model is opened."""

from pathlib import Path
from typing import Any

import pytest
from merge_recipes import read, refused

from personae.family.layers import Layers

STACK = """\
slices:
- sources:
  - model: some/a
    layer_range: [0, 3]
- sources:
  - model: some/b
    layer_range: [1, 4]
    parameters:
      scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]
merge_method: passthrough
"""
SLERP = """\
slices:
- sources:
  - {model: some/a, layer_range: [0, 4]}
  - {model: some/b, layer_range: [2, 6]}
  parameters:
    t: [{filter: mlp, value: 0.9}]
merge_method: slerp
base_model: some/a
parameters: {t: [0.1, 0.5]}
"""


def test_layers_that_follow_each_other(tmp_path: Path):
    first, second = read(tmp_path, STACK).parts
    assert first.experts == {"a": "some/a"}
    assert second.experts == {"b": "some/b"}
    assert first.settings.layers == Layers(((0, 3),), after="none")
    assert second.settings.layers == Layers(((1, 4),), first=3, before="none")


def test_a_base_among_the_sources_is_the_base(tmp_path: Path):
    (part,) = read(tmp_path, SLERP).parts
    assert part.base == "some/a"
    assert part.experts == {"b": "some/b"}
    assert part.settings.layers == Layers(((2, 6),), base=(0, 4))


def test_where_no_filter_of_a_slice_fits_the_recipe_is_asked(tmp_path: Path):
    (part,) = read(tmp_path, SLERP).parts
    at = [part.settings.for_tensor(f"layers.{n}.attn", 4, 1).model_dump()["t"] for n in range(4)]
    assert at == pytest.approx([0.1, 0.1 + 0.4 / 3, 0.1 + 0.8 / 3, 0.5])
    assert part.settings.for_tensor("layers.2.mlp.up", 4, 1).model_dump()["t"] == 0.9


def test_a_gradient_runs_within_a_slice(tmp_path: Path):
    text = """\
slices:
- sources: [{model: some/a, layer_range: [0, 3]}, {model: some/b, layer_range: [0, 3]}]
- sources: [{model: some/b, layer_range: [0, 1]}, {model: some/a, layer_range: [4, 5]}]
merge_method: linear
parameters: {weight: [0.25, 0.75]}
"""
    parts = read(tmp_path, text).parts

    def weight(part: int, name: str, layers: int) -> Any:
        settings = parts[part].settings
        return settings.for_tensor(name, layers, 2).model_dump(by_alias=True)["weight"]

    assert [weight(0, f"layers.{n}.x", 3) for n in range(3)] == [0.25, 0.5, 0.75]
    assert weight(1, "layers.3.x", 1) == 0.75  # the one layer of a slice is its last
    assert weight(1, "norm", 1) == 0.25


def test_parameters_of_modules_go_before_those_of_the_recipe(tmp_path: Path):
    text = """\
modules:
  decoder:
    parameters: {scale: 0.5}
    slices: [{sources: [{model: some/a, layer_range: [0, 1]}]}]
  encoder:
    models: [{model: some/a}]
merge_method: passthrough
parameters: {scale: 2.0}
"""
    decoder, encoder = read(tmp_path, text).parts
    assert decoder.settings.parameters == {"scale": 0.5}
    assert encoder.settings.parameters == {"scale": 2.0}
    assert decoder.settings.layers == Layers(((0, 1),), module="decoder", after="module")
    assert encoder.settings.layers == Layers((None,), module="encoder", before="module")


def test_a_slice_with_a_method_and_a_base_of_its_own(tmp_path: Path):
    text = """\
slices:
- sources: [{model: some/a, layer_range: [0, 2]}]
  merge_method: passthrough
- sources: [{model: some/a, layer_range: [2, 4]}, {model: some/b, layer_range: [2, 4]}]
- sources: [{model: some/a, layer_range: [4, 6]}]
  base_model: some/b
  merge_method: task_arithmetic
merge_method: slerp
base_model: some/a
parameters: {t: 0.3}
"""
    recipe = read(tmp_path, text)
    first, second, third = recipe.parts
    methods = [part.settings.method for part in recipe.parts]
    assert methods == ["passthrough", "slerp", "task_arithmetic"]
    assert first.base is None
    assert first.settings.parameters == {}  # t is slerp's
    assert second.settings.parameters == {"t": 0.3}
    assert third.base == "some/b"
    assert third.settings.layers and third.settings.layers.base == (4, 6)  # as its one source
    assert recipe.small_files == "some/a"


def test_what_has_no_effect_is_said(tmp_path: Path):
    recipe = read(tmp_path, STACK.replace("- sources", "- residual_weight: 0.1\n  sources", 1))
    assert recipe.notes == ["residual_weight has no effect, as in mergekit 0.1.5."]


def test_all_faults_with_their_lines(tmp_path: Path):
    told = refused(
        tmp_path,
        """\
merge_method: slerp
base_model: some/a
slices:
- sources:
  - {model: some/a, layer_range: [0, 4]}
  - {model: some/b, layer_range: [2, 5]}
- sources:
  - {model: some/a, layer_range: [4, 4]}
  - {model: some/b, layer_rnage: [4, 8]}
  parameters: {t: 1.5}
- sources:
  - {model: some/b, layer_range: [0, 2]}
  - {model: some/c, layer_range: [1, 3]}
  merge_method: tise
- sources: []
random: 1
""",
    )
    wanted = [
        "line 4: The sources of a slice have as many layers each; here there are 4 of 'some/a' "
        "[0, 4], 3 of 'some/b' [2, 5].",
        "line 8: layer_range [4, 4] holds no layers",
        "line 9: A source of a slice needs 'layer_range'",
        "line 9: Unknown key 'slices.1.sources.1.layer_rnage'. Did you mean 'layer_range'?",
        "line 10: slerp: t = 1.5: Input should be less than or equal to 1.",
        "line 11: The base 'some/a' is not among the sources, and these are of unlike layers.",
        "line 14: Unknown method 'tise'. Did you mean 'ties'?",
        "line 15: A slice takes layers of models: list them under 'sources'.",
        "line 16: Unknown key 'random'.",
    ]
    for text in wanted:
        assert text in told
    assert told.splitlines()[0].endswith(f"wrong in {len(wanted)} places:")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{STACK}models: [{{model: x}}]\n", "'models' and 'slices' both say what is merged."),
        (f"{STACK}modules: {{}}\n", "'slices' and 'modules' both say what is merged."),
        ("merge_method: linear\nmodules: {}\n", "'modules' is empty: list what is merged."),
        ("merge_method: linear\nslices: []\n", "'slices' is empty: list what is merged."),
        (
            "merge_method: linear\nmodules: {default: {slices: []}}\n",
            "'slices' is empty: list what is merged.",
        ),
        (
            "merge_method: linear\nmodules: {default: {}}\n",
            "A module has 'slices' or 'models'; 'default' has both or none.",
        ),
        (
            STACK.replace("[0, 3]", "[0, 3]\n  - {model: some/c, layer_range: [0, 3]}"),
            "passthrough takes one model, and here are 2.",
        ),
    ],
)
def test_refused(tmp_path: Path, text: str, told: str):
    assert told in refused(tmp_path, text)
