"""Families that do not fit: every fault at once, nothing left open, nothing written."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from families import State, saved, small_base, tuned
from personae.commands.merge import merge
from personae.commands.merge_plan import plan_merge
from personae.errors import CheckpointError
from personae.recipe import MergeSettings
from toys import load

BASE = small_base()
X, Y = tuned(BASE, 1), tuned(BASE, 2)


def changed(state: State, **tensors: torch.Tensor | None) -> State:
    """With other tensors under these names, `__` for a dot; without those that are None."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {n: t for n, t in (state | named).items() if t is not None}


def refusal(base: State | None, experts: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        plan_merge(base, experts, MergeSettings(**settings))
    return str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ties", "parameters": {"scope": "tensor"}},
        {"method": "dare_ties", "parameters": {"scope": "tensor"}},
        {"method": "ties", "conventions": "mergekit", "parameters": {"density": 0.02}},
        {"method": "dare_ties", "conventions": "mergekit", "parameters": {"density": 0.5}},
    ],
    ids=["ties", "dare_ties", "mergekit-ties", "mergekit-dare_ties"],
)
def test_passes_over_each_tensor_tell_what_is_not_finite(tmp_path, settings, value):
    weight = X["layer.weight"].clone()
    weight[3, 4] = value
    settings = {**settings, "parameters": {**settings["parameters"], "weight": 1.0}}
    with pytest.raises(CheckpointError, match=r"Expert 'x': tensor 'layer.weight' holds 1 value"):
        experts = {"x": changed(X, layer__weight=weight), "y": Y}
        merge(BASE, experts, tmp_path / "out", settings=MergeSettings(**settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_m"])
def test_a_base_that_is_not_finite_is_told_where_no_delta_tells_of_it(tmp_path, method):
    """Adapters' deltas are products of their factors: the base is not in them."""
    base = {"a.weight": torch.zeros(4, 3), "b.weight": torch.zeros(4, 3)}
    base["a.weight"][1, 1] = torch.nan
    saved(base, tmp_path / "base")
    for seed, name in enumerate("xy"):
        draw = torch.Generator().manual_seed(seed)
        (tmp_path / name).mkdir()
        factors = {
            f"base_model.model.{module}.lora_{side}.weight": torch.randn(shape, generator=draw)
            for module in "ab"
            for side, shape in (("A", (2, 3)), ("B", (4, 2)))
        }
        save_file(factors, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    experts = {name: str(tmp_path / name) for name in "xy"}
    settings = MergeSettings(method=method)
    with pytest.raises(CheckpointError, match=r"The base: tensor 'a.weight' holds 1 value"):
        merge(str(tmp_path / "base"), experts, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_faults_of_every_kind_come_together(tmp_path):
    experts = {
        "nowhere": str(tmp_path / "nowhere"),
        "lacking": changed(X, layer__bias=None),
        "odd": changed(X, layer__weight=torch.zeros(5, 12)),
        "half": {n: t.half() if t.is_floating_point() else t for n, t in Y.items()},
    }
    text = refusal(BASE, experts)
    assert "4 faults" in text
    assert "Expert 'nowhere'" in text
    assert "Expert 'lacking' lacks 1 tensor(s) of the base: layer.bias" in text
    assert "Expert 'odd': tensor 'layer.weight' is (5, 12), the base's (16, 12)" in text
    assert "Expert 'half': 'conv.weight' is float16, the base's is float32" in text


def test_shapes_that_differ_are_told_in_one_fault_for_an_expert():
    odd = changed(X, layer__weight=torch.zeros(5, 12), layer__bias=torch.zeros(5))
    text = refusal(BASE, {"x": odd, "y": Y})
    assert "tensor 'layer.bias' is (5,), the base's (16,) (1 more differ likewise)" in text
    assert 'skip: ["layer.*"]' in text


def test_a_float_in_place_of_integers_is_told_by_its_dtype():
    ids = X["position_ids"].float()
    text = refusal(BASE, {"x": changed(X, position_ids=ids), "y": Y})
    assert "'position_ids' is float32, the base's int64. Tensors of different kinds" in text


def test_without_a_base_the_first_expert_is_what_others_differ_from():
    half = {n: t.half() if t.is_floating_point() else t for n, t in Y.items()}
    text = refusal(None, {"x": X, "y": half})
    assert "the first expert's is float32" in text


def test_what_is_not_merged_need_not_fit(tmp_path):
    """By `only` as by `skip`: absent, of another shape or dtype, it stays as in the base."""
    odd = changed(X, layer__bias=None, conv__weight=torch.zeros(2), embed__weight=torch.zeros(3, 3))
    odd["scale"] = odd["scale"].half()
    settings = MergeSettings(only=("layer.weight",))
    merge(BASE, {"x": odd, "y": Y}, tmp_path / "out", settings=settings)
    merged = load(tmp_path / "out")
    mean = (X["layer.weight"] + Y["layer.weight"]) / 2
    torch.testing.assert_close(merged.pop("layer.weight"), mean)
    assert all(torch.equal(tensor, BASE[name]) for name, tensor in merged.items())


@pytest.mark.parametrize("chosen", [{"only": ("layer.weight",)}, {"skip": ("[!l]*", "*.bias")}])
def test_without_a_base_what_is_not_merged_is_the_first_expert_s(tmp_path, chosen):
    first = changed(X, head__weight=torch.ones(2, 2))  # nobody else has it
    settings = MergeSettings(**chosen)
    notes = plan_merge(None, {"x": first, "y": Y}, settings).notes
    assert any(note.startswith("left as in the first expert, x: ") for note in notes)
    merge(None, {"x": first, "y": Y}, tmp_path / "out", settings=settings)
    merged = load(tmp_path / "out")
    assert merged.keys() == first.keys()
    mean = (X["layer.weight"] + Y["layer.weight"]) / 2
    torch.testing.assert_close(merged.pop("layer.weight"), mean)
    assert all(torch.equal(tensor, first[name]) for name, tensor in merged.items())


def test_patterns_that_fit_names_of_experts_alone_are_no_mistake():
    expert = changed(X, head__weight=torch.ones(2, 2))
    notes = plan_merge(BASE, {"x": expert, "y": Y}, MergeSettings(skip=("head.*",))).notes
    assert notes == []
    notes = plan_merge(BASE, {"x": X, "y": Y}, MergeSettings(skip=("haed.*",))).notes
    assert notes == ["skip: haed.* matches no tensor; '*' matches any text"]


def test_heads_that_are_merged_are_named():
    head = {"classifier.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2, 2)}
    family = BASE | head, {"x": X | head, "y": Y | head}
    (note,) = plan_merge(*family, MergeSettings()).notes
    assert note.startswith(
        "merged like all other tensors, although their names are those of heads: classifier.weight;"
    )
    (note,) = plan_merge(*family, MergeSettings(skip=("classifier.*",))).notes
    assert note == "left as in the base: classifier.weight"


def test_the_configuration_names_the_dtype_that_was_asked_for(tmp_path):
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "layers": 2}, "n": 1}
    base = saved(BASE, tmp_path / "base", json.dumps(config))
    settings = MergeSettings(dtype="bfloat16")
    merge(str(base), {"x": X, "y": Y}, tmp_path / "out", settings=settings)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "layers": 2},
        "n": 1,
    }
    merge(str(base), {"x": X, "y": Y}, tmp_path / "as-it-is")
    assert (tmp_path / "as-it-is/config.json").read_text() == json.dumps(config)


def test_a_configuration_that_is_damaged_or_missing(tmp_path):
    damaged = saved(BASE, tmp_path / "damaged", '{"hidden_size": 1')
    with pytest.raises(CheckpointError, match=r"config.json is no JSON"):
        merge(str(damaged), {"x": X, "y": Y}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bare = saved(BASE, tmp_path / "bare", config=None)
    (bare / "tokenizer.json").write_text("{}")
    (note,) = plan_merge(str(bare), {"x": X, "y": Y}, MergeSettings()).notes
    assert note.startswith("the base has no config.json")
