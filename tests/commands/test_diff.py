"""Two models compared: values against fp64 by hand, names and copies met, what the command says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import personae
from families import State, saved, small_base, tuned
from personae.cli import app
from personae.commands.diff import Ranks, diff
from personae.errors import BudgetError, CheckpointError
from personae.ops.svd import effective_rank, singular_values
from personae.run.work import Work
from toys import load, perturb, toy_bert, toy_llama

pytestmark = pytest.mark.filterwarnings("ignore")
BASE = small_base()


def test_values_are_those_of_fp64():
    new = tuned(BASE, 1)
    new["layer.weight"].view(-1)[:48] = BASE["layer.weight"].view(-1)[:48]
    found = personae.diff(BASE, new)
    exact = {n: new[n].double() - BASE[n].double() for n in BASE if BASE[n].is_floating_point()}
    assert found.tensors.keys() == exact.keys()
    assert list(found.tensors) == sorted(exact, key=lambda name: -float(exact[name].norm()))
    for name, delta in exact.items():
        change, size = found.tensors[name], BASE[name].double().norm()
        assert change.shape == tuple(delta.shape)
        assert change.norm == pytest.approx(float(delta.norm()), rel=1e-6)
        assert change.relative == pytest.approx(float(delta.norm() / size), rel=1e-6)
        assert change.changed == int(delta.count_nonzero()) / delta.numel()
    assert found.tensors["layer.weight"].changed == 0.75
    whole = torch.cat([delta.flatten() for delta in exact.values()])
    size = torch.cat([BASE[name].double().flatten() for name in exact]).norm()
    assert found.norm == pytest.approx(float(whole.norm()), rel=1e-6)
    assert found.relative == pytest.approx(float(whole.norm() / size), rel=1e-6)
    assert found.changed == int(whole.count_nonzero()) / whole.numel()
    assert found.compared == len(BASE)


@pytest.mark.parametrize("shape", [(48, 40), (40, 48), (3000, 40)])
def test_ranks_are_those_of_an_exact_decomposition(shape):
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 7, generator=draw) for n in shape)
    a = {"w": torch.zeros(shape), "v": torch.randn(shape, generator=draw)}
    b = {"w": left @ right.T, "v": a["v"] + torch.randn(shape, generator=draw)}
    found = diff(a, b).tensors
    for name, rank in (("w", 7), ("v", 40)):
        values = torch.linalg.svdvals(b[name].double() - a[name].double())[:rank]
        shares = values / values.sum()
        assert found[name].rank == rank
        wanted = float((-shares * shares.log()).sum().exp())
        assert found[name].effective_rank == pytest.approx(wanted, rel=1e-4)
    assert found["w"].relative is None  # A is zero there


@pytest.mark.parametrize(("ranks", "told"), [("small", False), ("all", True), ("none", False)])
def test_of_which_matrices_ranks_are_computed(ranks: Ranks, told, monkeypatch):
    monkeypatch.setattr("personae.commands.diff.SMALL_SIDE", 8)
    found = diff(BASE, tuned(BASE, 1), ranks=ranks).tensors
    assert (found["layer.weight"].rank == 12) == told
    assert found["conv.weight"].rank is None


def test_spectra_of_tiny_and_tall_matrices():
    matrix = 1e-30 * torch.randn(2500, 6, generator=torch.Generator().manual_seed(1))
    wanted = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(singular_values(matrix), wanted, rtol=1e-6, atol=0)
    assert effective_rank(torch.zeros(3)) == 0.0


def test_equal_models_are_equal_be_they_not_finite():
    state = {**BASE, "odd": torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])}
    found = diff(state, {name: tensor.clone() for name, tensor in state.items()})
    assert found.equal
    assert found.norm == 0


def test_what_is_not_finite_in_one_has_no_norm():
    a = {**BASE, "odd": torch.tensor([torch.nan, 1.0, 2.0, 3.0])}
    b = {**BASE, "odd": torch.tensor([torch.nan, torch.inf, 2.0, 4.0])}
    found = diff(a, b)
    assert found.tensors["odd"].norm is None and found.norm is None
    assert found.tensors["odd"].changed == 0.5
    json.dumps(found.to_json(), allow_nan=False)


def test_integers_names_shapes_and_dtypes():
    new = {**BASE, "position_ids": BASE["position_ids"] + (BASE["position_ids"] == 4)}
    new |= {"layer.bias": BASE["layer.bias"].double(), "conv.weight": torch.zeros(8, 3, 3, 3)}
    new |= {"head": torch.ones(2), "embed.weight": torch.cat([BASE["embed.weight"]] * 2)}
    del new["scale"]
    found = diff(BASE, new)
    assert {n: c.changed for n, c in found.tensors.items()} == {"position_ids": 1 / 6}
    assert found.dtypes == {"layer.bias": ("float32", "float64")}
    assert found.shapes == {
        "conv.weight": ((8, 3, 2, 2), (8, 3, 3, 3)),
        "embed.weight": ((20, 16), (40, 16)),
    }
    assert found.only_in_a == ("scale",)
    assert found.only_in_b == ("head",)


def test_models_of_nothing_in_common():
    found = diff({"a": torch.ones(2)}, {"b": torch.ones(2)})
    assert (found.compared, found.only_in_a, found.only_in_b) == (0, ("a",), ("b",))
    assert not found.equal


def test_a_model_is_equal_to_itself(tmp_path):
    path = saved(BASE, tmp_path / "m")
    assert diff(path, path).equal


def test_keys_of_configurations(tmp_path):
    a = {"same": 1, "rope_theta": 1e4, "text_config": {"eps": 1e-5}, "gone": True, "nothing": None}
    b = {"same": 1, "rope_theta": 1e6, "text_config": {"eps": 1e-6}, "new": [1, 2]}
    one = saved(BASE, tmp_path / "a", json.dumps(a))
    other = saved(BASE, tmp_path / "b", json.dumps(b))
    assert diff(one, other).config == {
        "gone": (True, None),
        "new": (None, [1, 2]),
        "rope_theta": (1e4, 1e6),
        "text_config.eps": (1e-5, 1e-6),
    }
    bare = saved(BASE, tmp_path / "c", None)
    assert diff(one, bare).config == {}


def test_wrapped_names_and_prefixes_meet(tmp_path):
    toy = toy_bert(tmp_path / "bert")
    state: State = load(toy)
    bare = {n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")}
    (tmp_path / "b").mkdir()
    wrapped = {f"module.{name}": tensor.clone() for name, tensor in bare.items()}
    save_file(wrapped, tmp_path / "b" / "model.safetensors")
    found = diff(toy, tmp_path / "b")
    assert not found.tensors
    assert set(found.only_in_a) == {"classifier.weight", "classifier.bias"}
    assert found.notes


def test_a_stored_copy_of_a_tied_tensor_is_no_difference(tmp_path):
    lean = toy_llama(tmp_path / "lean", tied=True)
    full = shutil.copytree(lean, tmp_path / "full")
    state = load(lean)
    both = state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file(both, full / "model.safetensors", metadata={"format": "pt"})
    assert diff(lean, full).equal
    assert diff(full, lean).equal
    both["lm_head.weight"][0, 0] += 1
    save_file(both, full / "model.safetensors", metadata={"format": "pt"})
    assert diff(lean, full).only_in_b == ("lm_head.weight",)


@pytest.mark.parametrize("form", ["on top of A", "MODEL+ADAPTER"])
def test_an_adapter_is_what_peft_merges(tmp_path, form):
    model, adapter = toy_llama(tmp_path / "model"), tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapted.save_pretrained(str(adapter))
    before = load(model)
    after = adapted.merge_and_unload().state_dict()
    found = diff(model, adapter if form == "on top of A" else f"{model}+{adapter}")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert found.tensors.keys() == changed
    for name, change in found.tensors.items():
        wanted = float((after[name].double() - before[name].double()).norm())
        assert change.norm == pytest.approx(wanted, rel=1e-4)
        if form == "on top of A":  # the other is rounded where it is added
            assert change.rank == 2
    with pytest.raises(CheckpointError, match=r"both together: MODEL\+"):
        diff(adapter, model)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_a_bound_change_nothing(workers):
    new = tuned(BASE, 1)
    assert diff(BASE, new, work=Work(workers=workers, memory=1 << 20)) == diff(BASE, new)
    with pytest.raises(BudgetError, match="--memory"):
        diff(BASE, new, work=Work(memory=1000))


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["diff", *map(str, words)])


def test_the_command(tmp_path):
    a = toy_llama(tmp_path / "a")
    b = perturb(a, tmp_path / "b", seed=1)
    assert run(a, a).exit_code == 0
    assert run(a, a).stdout.startswith("equal: ")
    result = run(a, b, "--limit", "3")
    assert result.exit_code == 1, result.stderr
    assert "… and " in result.stdout and "weight" in result.stdout
    assert "… and " not in run(a, b, "--all").stdout
    told = json.loads(run(a, b, "--json").stdout)
    assert not told["equal"]
    assert len(told["tensors"]) == len(load(a)) == told["compared"]
    assert run(a, tmp_path / "nowhere").exit_code == 2
    assert run(a, b, "--rank", "some").exit_code == 2
    assert run(a, b, "--all", "--limit", "2").exit_code == 2
