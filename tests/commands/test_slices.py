"""Layers of models under other numbers, merged slice by slice into one model."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from families import listing, saved
from personae.commands.merge import merge, merge_parts
from personae.commands.merge_parts import LayersPlan, open_parts
from personae.commands.merge_plan import plan_parts
from personae.errors import CheckpointError
from personae.recipe import MergeRecipe, MergeSettings, read_merge_recipe
from personae.run.work import Work
from toys import load, perturb, toy_llama

LAYERS = 4
SHAPES = {"attn.q_proj.weight": (4, 4), "mlp.up_proj.weight": (6, 4), "norm.weight": (4,)}
OUTSIDE = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,)}
CONFIG = {"num_hidden_layers": LAYERS, "layer_types": ["s", "f", "s", "f"]}
PREFIX = "model.layers."
State = dict[str, Tensor]


def state(seed: int, layers: int = LAYERS, head: bool = True) -> State:
    """A decoder by its names: an embedding, layers, a norm, an output layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = OUTSIDE | ({"lm_head.weight": (10, 4)} if head else {})
    shapes |= {f"{PREFIX}{n}.{s}": shape for n in range(layers) for s, shape in SHAPES.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


A, B, C = state(1), state(2), state(3)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Three models of four layers."""
    for name, model in (("a", A), ("b", B), ("c", C)):
        saved(model, tmp_path / name, json.dumps(CONFIG))
    return tmp_path


def recipe(folder: Path, text: str) -> MergeRecipe:
    (folder / "recipe.yaml").write_text(text)
    return read_merge_recipe(folder / "recipe.yaml")


def merged(folder: Path, text: str, out: str = "out", **more: Any) -> State:
    read = recipe(folder, text)
    merge_parts(read.parts, folder / out, small_files=read.small_files, recipe=read.text, **more)
    return load_file(folder / out / "model.safetensors")


def layers(model: State, own: Iterable[int], first: int = 0) -> State:
    """Layers of a model under other numbers."""
    return {
        f"{PREFIX}{number}.{s}": model[f"{PREFIX}{n}.{s}"]
        for number, n in enumerate(own, first)
        for s in SHAPES
    }


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def refused(folder: Path, text: str) -> str:
    read = recipe(folder, text)
    with pytest.raises(CheckpointError) as caught, open_parts(read.parts, read.small_files):
        pass
    return str(caught.value)


STACK = """\
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 4], parameters: {scale: [{filter: q_proj, value: 0.5}]}}]
merge_method: passthrough
"""


def test_stacked_layers_are_those_of_the_models(models: Path):
    expected = layers(A, [0, 1, 2]) | layers(B, [1, 2, 3], 3)
    expected = {n: t / 2 if n[13] in "345" and "q_proj" in n else t for n, t in expected.items()}
    expected |= {"model.embed_tokens.weight": A["model.embed_tokens.weight"]}
    expected |= {name: B[name] for name in ("model.norm.weight", "lm_head.weight")}
    same(merged(models, STACK), expected)
    said = json.loads((models / "out/config.json").read_text())
    assert said == {"num_hidden_layers": 6, "layer_types": ["s", "f", "s", "f", "s", "f"]}
    card = (models / "out/README.md").read_text()
    assert "A model made of layers of 2 models." in card
    assert "| 3 to 5 | b 1 to 3 | passthrough |" in card


def test_the_plan_tells_where_layers_come_from(models: Path):
    read = recipe(models, STACK)
    with open_parts(read.parts) as opened:
        plan = plan_parts(opened, Work(workers=1))
    assert plan.layers == [
        LayersPlan(None, (0, 3), "passthrough", {"a": (0, 3)}),
        LayersPlan(None, (3, 6), "passthrough", {"b": (1, 4)}),
    ]
    assert plan.bytes_out == 4 * (6 * (16 + 24 + 4) + 40 + 40 + 4)


def test_one_slice_of_whole_models_is_another_way_to_write_models(models: Path):
    slices = """\
merge_method: slerp
base_model: a
parameters: {t: [0.1, 0.5, 0.2]}
slices:
- sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
"""
    whole = slices.partition("slices")[0] + "models: [{model: a}, {model: b}]\n"
    same(merged(models, slices), merged(models, whole, "whole"))
    assert json.loads((models / "out/config.json").read_text()) == CONFIG


def test_unlike_ranges_meet_layer_by_layer(models: Path):
    text = """\
merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: 1.0}}
  - {model: b, layer_range: [2, 4], parameters: {weight: [3.0, 1.0]}}
"""
    found = merged(models, text)
    for n, weight in ((0, 3.0), (1, 1.0)):
        for s in SHAPES:
            a, b = A[f"{PREFIX}{n}.{s}"].double(), B[f"{PREFIX}{n + 2}.{s}"].double()
            mean = ((a + weight * b) / (1 + weight)).float()
            torch.testing.assert_close(found[f"{PREFIX}{n}.{s}"], mean)
    for name in (*OUTSIDE, "lm_head.weight"):  # outside layers a gradient has its first value
        mean = (A[name].double() + 3 * B[name].double()) / 4
        torch.testing.assert_close(found[name], mean.float())


SEVERAL = """\
merge_method: slerp
base_model: a
parameters: {t: 0.3}
slices:
- sources: [{model: c, layer_range: [0, 1]}]
  merge_method: passthrough
- sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [0, 2]}]
- sources:
  - {model: a, layer_range: [2, 4]}
  - {model: b, layer_range: [2, 4]}
  - {model: c, layer_range: [2, 4]}
  merge_method: ties
  parameters: {density: 0.5}
"""


def test_several_methods_give_what_the_pieces_give_apart(models: Path):
    """TIES looks at all of its slice: that of the whole models would trim elsewhere."""
    ends = [name for name in A if not name.startswith(PREFIX)]
    last = [name for name in ends if "embed" not in name]

    def apart(out: str, pieces: list[State], settings: MergeSettings) -> State:
        base, *experts = pieces
        named = {str(n): expert for n, expert in enumerate(experts)}
        merge(base, named, models / out, settings=settings)
        return load_file(models / out / "model.safetensors")

    middle = MergeSettings(method="slerp", parameters={"t": 0.3})
    end = MergeSettings(method="ties", parameters={"density": 0.5})
    pieces = [layers(model, [2, 3], 3) | {n: model[n] for n in last} for model in (A, B, C)]
    expected = layers(C, [0]) | {"model.embed_tokens.weight": C["model.embed_tokens.weight"]}
    expected |= apart("middle", [layers(A, [1, 2], 1), layers(B, [0, 1], 1)], middle)
    expected |= apart("end", pieces, end)
    config = json.dumps(CONFIG | {"layer_types": ["s"] * 4})
    for name in "abc":
        (models / name / "config.json").write_text(config)
    same(merged(models, SEVERAL), expected)
    assert json.loads((models / "out/config.json").read_text())["num_hidden_layers"] == 5


def test_on_any_number_of_workers_and_going_on(models: Path):
    merged(models, SEVERAL.replace("[0, 2]}", "[1, 3]}"), work=Work(workers=1))

    def stop(stage: str, done: int, _: int) -> None:
        if stage == "merging (ties)" and done == 0:
            raise KeyboardInterrupt

    notes: list[str] = []
    text = SEVERAL.replace("[0, 2]}", "[1, 3]}")
    with pytest.raises(KeyboardInterrupt):
        merged(models, text, "again", work=Work(workers=2, progress=stop))
    assert not (models / "again").exists()
    merged(models, text, "again", work=Work(workers=2, note=notes.append))
    assert any(note.startswith("going on with an interrupted run: 2 of 3") for note in notes)
    assert listing(models / "again") == listing(models / "out")


def test_another_order_of_the_same_layers_is_another_merge(models: Path):
    """Headers and models are the same; the layers tell."""

    def stop(stage: str, done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    text = "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [%d, %d]}]\n"
    with pytest.raises(KeyboardInterrupt):
        merged(models, text % (0, 2), work=Work(workers=1, progress=stop))
    found = merged(models, text % (2, 4))
    same({n: t for n, t in found.items() if PREFIX in n}, layers(A, [2, 3]))


def test_small_files_are_those_of_the_base_of_the_recipe(models: Path):
    (models / "b/tokenizer_config.json").write_text('{"b": 1}')
    merged(models, f"{STACK}base_model: b\n")
    assert (models / "out/tokenizer_config.json").read_text() == '{"b": 1}'


def test_a_tied_output_layer_stays_tied(tmp_path: Path):
    """Whether a copy of it is stored or not."""
    config = json.dumps({"num_hidden_layers": 4, "tie_word_embeddings": True})
    bare, stored = state(1, head=False), state(2, head=False)
    saved(bare, tmp_path / "a", config)
    copy = stored["model.embed_tokens.weight"].clone()
    saved(stored | {"lm_head.weight": copy}, tmp_path / "b", config)
    assert "lm_head.weight" not in merged(tmp_path, STACK)
    turned = STACK.replace("model: a", "model: x").replace("model: b", "model: a")
    found = merged(tmp_path, turned.replace("model: x", "model: b"), "turned")
    assert torch.equal(found["lm_head.weight"], copy)


def test_layers_that_are_not_there(models: Path):
    told = refused(models, STACK.replace("[0, 3]", "[2, 5]").replace("[1, 4]", "[4, 7]"))
    assert "2 faults" in told
    for name, span in (("a", "2 to 5"), ("b", "4 to 7")):
        assert f"Expert '{name}': layers {span} are asked for, but" in told
    assert "layer_range goes to 4 at most" in told


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"num_hidden_layers": 12},
            "its config.json says num_hidden_layers 12, its tensors are of other numbers of layers "
            "(4 in model.layers).",
        ),
        ({"decoder_sparse_step": 2, "num_hidden_layers": 4}, "'decoder_sparse_step: 2'"),
    ],
)
def test_a_configuration_that_says_otherwise(models: Path, config: dict[str, Any], told: str):
    text = STACK.replace("[0, 3]", "[0, 2]").replace("[1, 4]", "[1, 3]")
    for name in "ab":
        (models / name / "config.json").write_text(json.dumps(config))
    assert told in refused(models, text)


def test_models_of_other_sizes_cannot_be_stacked(models: Path):
    narrow = {n: t[..., :3] if "up_proj" in n else t for n, t in B.items()}
    half = {n: t.half() for n, t in C.items()}
    saved(narrow, models / "narrow", json.dumps(CONFIG))
    saved(half, models / "half", json.dumps(CONFIG | {"tie_word_embeddings": False}))
    text = STACK + "- sources: [{model: c, layer_range: [1, 4]}]\n"
    told = refused(models, STACK.replace("model: b", "model: narrow"))
    assert "'model.layers.3.mlp.up_proj.weight' is ((6, 3), 'float32')" in told
    told = refused(models, STACK.replace("model: b", "model: half"))
    assert "or set the dtype of the output: dtype." in told
    assert "do not agree in tie_word_embeddings" in told
    assert "There is no expert" not in text


def test_layers_of_other_kinds_stay_where_they_are(tmp_path: Path):
    """A first layer that lacks a norm can only be the first."""
    odd = {n: t for n, t in A.items() if n != f"{PREFIX}0.norm.weight"}
    saved(odd, tmp_path / "a", json.dumps({"num_hidden_layers": 4}))
    text = "merge_method: passthrough\nslices:\n"
    source = "- sources: [{model: a, layer_range: [%d, %d]}]\n"
    told = refused(tmp_path, text + source % (0, 2) + source % (0, 2))
    assert "layer 0 has other tensors than the others of its kind" in told
    told = refused(tmp_path, text + source % (1, 3))
    assert "Here layer 1 would be layer 0 of the output." in told
    merged(tmp_path, text + source % (0, 2) + source % (1, 4))


def test_stages_of_a_pyramid_are_only_taken_whole(tmp_path: Path):
    stages = {f"{PREFIX}{n}.up.weight": torch.ones(2 ** (n + 1), 2) for n in range(3)}
    saved(stages, tmp_path / "a", json.dumps({"num_hidden_layers": 3}))
    text = "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, %d]}]\n"
    assert "are of different sizes ('up.weight' is" in refused(tmp_path, text % 2)
    same(merged(tmp_path, text % 3), stages)


def test_models_without_layers_and_with_two_stacks(tmp_path: Path):
    saved({"weight": torch.ones(2, 2)}, tmp_path / "a")
    both = {f"{m}.block.{n}.w": torch.ones(2, 2) for m in ("encoder", "decoder") for n in range(2)}
    saved(both, tmp_path / "b", json.dumps({"num_layers": 2, "num_decoder_layers": 2}))
    told = refused(tmp_path, STACK.replace("[0, 3]", "[0, 1]").replace("[1, 4]", "[0, 1]"))
    assert "Expert 'a':" in told
    assert "has no layers: no tensor has a number in its name." in told
    assert "has 2 stacks of layers: decoder.block (2 layers), encoder.block (2 layers)." in told


def test_each_module_has_slices_of_its_own(tmp_path: Path):
    """As T5 is: what only the first layer has stays the first layer's."""
    generator = torch.Generator().manual_seed(1)
    shapes = {f"{m}.block.{n}.w": (3, 3) for m in ("encoder", "decoder") for n in range(3)}
    shapes |= {
        f"{m}.block.0.relative_attention_bias.weight": (2, 2) for m in ("encoder", "decoder")
    }
    shapes |= {"encoder.final_norm.weight": (3,), "decoder.final_norm.weight": (3,)}
    shapes |= {"shared.weight": (7, 3), "lm_head.weight": (7, 3)}
    model = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    saved(model, tmp_path / "a", json.dumps({"num_layers": 3, "num_decoder_layers": 3}))
    text = """\
merge_method: passthrough
modules:
  encoder:
    slices: [{sources: [{model: a, layer_range: [1, 3]}]}]
  decoder:
    slices:
    - sources: [{model: a, layer_range: [0, 2]}]
    - sources: [{model: a, layer_range: [0, 3]}]
"""
    expected = {name: model[name] for name in shapes if "block" not in name}
    expected |= {name: model[name] for name in shapes if "relative" in name}
    expected |= {
        f"encoder.block.{k}.w": model[f"encoder.block.{j}.w"] for k, j in enumerate([1, 2])
    }
    decoder = enumerate([0, 1, 0, 1, 2])
    expected |= {f"decoder.block.{k}.w": model[f"decoder.block.{j}.w"] for k, j in decoder}
    same(merged(tmp_path, text), expected)
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said == {"num_layers": 2, "num_decoder_layers": 5}


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_loads(tied: bool, tmp_path: Path):
    from transformers import LlamaForCausalLM

    toy_llama(tmp_path / "a", tied=tied)
    perturb(tmp_path / "a", tmp_path / "b", 1)
    merged(tmp_path, STACK.replace("[0, 3]", "[0, 2]").replace("[1, 4]", "[0, 2]"))
    loaded: Any = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert model.config.num_hidden_layers == 4
    found, b = model.model.layers[3].mlp.up_proj.weight, load(tmp_path / "b")
    assert torch.equal(found, b["model.layers.1.mlp.up_proj.weight"])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
