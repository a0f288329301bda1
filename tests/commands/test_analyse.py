"""Analyses over a family: which tensors, which values, whatever the workers, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from families import saved, small_base, tuned
from personae.commands.analyse import analyse
from personae.errors import BudgetError, CheckpointError, MethodError, RecipeError
from personae.methods.analyses import ANALYSES
from personae.run.work import Work
from toys import perturb, toy_bert, toy_gpt2

BASE = small_base()
EXPERTS = {"a": tuned(BASE, 1), "b": tuned(BASE, 2), "c": tuned(BASE, 3)}


def stack(name: str) -> torch.Tensor:
    return torch.stack([state[name] - BASE[name] for state in EXPERTS.values()])


@pytest.mark.parametrize("name", sorted(ANALYSES))
def test_every_linear_layer_is_analysed_and_nothing_else(name: str):
    found = analyse(BASE, EXPERTS, name)
    assert found["analysis"] == name
    assert found["experts"] == ["a", "b", "c"]
    assert found["tensors"] == {"layer.weight": ANALYSES[name].function(stack("layer.weight"))}
    json.dumps(found, allow_nan=False)


def test_without_a_base_it_is_about_difference_vectors():
    found = analyse(None, EXPERTS, "singular_value_bound")
    experts = torch.stack([state["layer.weight"] for state in EXPERTS.values()])
    expected = ANALYSES["singular_value_bound"].function(experts - experts.mean(dim=0))
    assert found["tensors"]["layer.weight"]["stack"] == pytest.approx(expected["stack"], abs=1e-6)


def test_tensors_are_chosen_by_pattern_and_workers_change_nothing(tmp_path: Path):
    base = toy_bert(tmp_path / "base")
    experts = {n: str(perturb(base, tmp_path / n, seed)) for seed, n in enumerate("ab", 1)}
    chosen = ("*query.weight", "*.1.attention.*.key.weight")
    found = analyse(str(base), experts, "sign_agreement", tensors=chosen)
    assert [name.rpartition("layer.")[2] for name in found["tensors"]] == [
        "0.attention.self.query.weight",
        "1.attention.self.key.weight",
        "1.attention.self.query.weight",
    ]
    work = Work(workers=3)
    assert found == analyse(str(base), experts, "sign_agreement", tensors=chosen, work=work)
    everything = analyse(str(base), experts, "sign_agreement")["tensors"]
    assert not [name for name in everything if "embed" in name or "bias" in name]


def test_weights_stored_in_out_are_turned(tmp_path: Path):
    base = toy_gpt2(tmp_path / "base")
    expert = perturb(base, tmp_path / "a", 1)
    name = next(n for n in load_file(base / "model.safetensors") if n.endswith("mlp.c_fc.weight"))
    found = analyse(str(base), {"a": str(expert)}, "dropped_percentage", tensors=[name])
    delta = (
        load_file(expert / "model.safetensors")[name] - load_file(base / "model.safetensors")[name]
    )
    expected = ANALYSES["dropped_percentage"].function(delta.T[None])
    assert found["tensors"][name]["as_is"] == expected["as_is"]


def test_refusals(tmp_path: Path):
    with pytest.raises(
        MethodError, match=r"Unknown analysis 'sign_agree'\. Did you mean 'sign_agreement'"
    ):
        analyse(BASE, EXPERTS, "sign_agree")
    with pytest.raises(MethodError, match=r"rank_drop has no parameter 'densty'.*'density'"):
        analyse(BASE, EXPERTS, "rank_drop", parameters={"densty": 0.2})
    with pytest.raises(MethodError, match="density = 2"):
        analyse(BASE, EXPERTS, "rank_drop", parameters={"density": 2})
    with pytest.raises(RecipeError, match=r"No linear layer .* matches query"):
        analyse(BASE, EXPERTS, "rank_drop", tensors=["query"])
    with pytest.raises(RecipeError, match="share no linear layer"):
        analyse(BASE, EXPERTS, "rank_drop", skip=["layer.weight"])
    with pytest.raises(BudgetError, match="The largest tensor needs"):
        analyse(BASE, EXPERTS, "rank_drop", work=Work(memory=1000))
    broken = EXPERTS["a"] | {"layer.weight": torch.full((16, 12), torch.nan)}
    with pytest.raises(CheckpointError, match=r"'a'.*layer\.weight"):
        analyse(saved(BASE, tmp_path / "base"), {"a": saved(broken, tmp_path / "a")}, "rank_drop")
