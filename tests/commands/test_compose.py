"""Composed models: the reference and a weighted sum of decoded deltas, with or without a head."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same, coded

from families import State, listing, saved, small_base, tuned
from personae.checkpoints import open_checkpoint
from personae.commands.compose import compose
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.errors import OutputError, PackError, RecipeError
from personae.methods import CODECS
from personae.methods.codecs.dts import DTS
from personae.methods.codecs.svd import SVD
from personae.packs.fingerprint import sha256_file
from personae.recipe import PackSettings
from personae.run.composed import open_composed
from personae.run.rebuilt import Rebuilt
from personae.run.work import Work
from toys import load

BASE = small_base()
EXPERTS = {name: tuned(BASE, seed) for seed, name in enumerate("abc", 1)}
HALF: dict[str, Any] = {"rank_fraction": 0.5}
SETTINGS = {
    "dts": PackSettings(parameters=HALF),
    "dts-difference": PackSettings(parameters=HALF, vector="difference"),
    "dts-budget": PackSettings(budget="80%"),
    "svd": PackSettings(method="svd", parameters=HALF),
    "svd-difference": PackSettings(method="svd", parameters=HALF, vector="difference"),
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pack of three experts a setting, and the base they came from."""
    folder = tmp_path_factory.mktemp("packs")
    saved(BASE, folder / "base")
    for name, how in SETTINGS.items():
        pack(folder / "base", EXPERTS, folder / name, settings=how)
    return folder


def _deltas(folder: Path, name: str) -> tuple[State, dict[str, State]]:
    """The reference of a pack and, for each expert, the deltas its codec makes of the real ones."""
    settings = SETTINGS[name]
    reference = load(folder / name / "reference") if settings.vector == "difference" else BASE
    codec: DTS | SVD = SVD(rank_fraction=0.5) if settings.method == "svd" else DTS(**HALF)
    if settings.budget:
        task = json.loads((folder / name / "pack.json").read_text())["tasks"]["a"]
        codec = DTS(rank_fraction=task["parameters"]["rank_fraction"])
    return reference, {
        expert: {
            key: coded(codec, key, tensor - reference[key])
            for key, tensor in state.items()
            if tensor.is_floating_point()
        }
        for expert, state in EXPERTS.items()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_the_naive_sum(packs, tmp_path, name):
    reference, deltas = _deltas(packs, name)
    compose(packs / name, {"c": 0.75, "a": 0.25}, tmp_path / "out")
    found = load(tmp_path / "out")
    assert found.keys() == BASE.keys()
    assert torch.equal(found["position_ids"], BASE["position_ids"])
    for key in deltas["a"]:
        expected = reference[key] + (0.25 * deltas["a"][key] + 0.75 * deltas["c"][key])
        torch.testing.assert_close(found[key], expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(found[key], reference[key]), key


@pytest.mark.parametrize("name", SETTINGS)
def test_the_whole_weight_on_one_task_is_that_task_unpacked(packs, tmp_path, name):
    compose(packs / name, {"b": 1.0, "a": 0.0}, tmp_path / "out")
    unpack(packs / name, "b", tmp_path / "b")
    assert_same(load(tmp_path / "out"), load(tmp_path / "b"))


def test_equal_weights_on_differences_from_the_mean_nearly_vanish(packs, tmp_path):
    # Σ (θₙ - mean) = 0, so that what is left is the mean coding error (methods.md 7.1).
    reference, deltas = _deltas(packs, "dts-difference")
    third = dict.fromkeys("abc", 1 / 3)
    compose(packs / "dts-difference", third, tmp_path / "out")
    found = load(tmp_path / "out")
    for key, mean in reference.items():
        if mean.is_floating_point():
            true = {n: state[key] - mean for n, state in EXPERTS.items()}
            errors = sum(deltas[n][key] - true[n] for n in "abc") / 3
            torch.testing.assert_close(found[key] - mean, errors, rtol=1e-4, atol=3e-7)
    one = float(torch.linalg.vector_norm(EXPERTS["a"]["layer.weight"] - reference["layer.weight"]))
    left = float(torch.linalg.vector_norm(found["layer.weight"] - reference["layer.weight"]))
    assert left < 0.6 * one


@settings(max_examples=12)
@given(
    weights=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 4.0]), min_size=3, max_size=3),
    offset=st.integers(-3, 3),
)
def test_exact_sums_of_whole_numbers(tmp_path_factory, weights, offset):
    # An SVD pack keeps vectors exactly; halves and whole numbers sum without rounding.
    if not any(weights):
        weights = [1.0, 0.0, 0.0]
    folder = tmp_path_factory.mktemp("exact")
    base = {"v": torch.arange(6.0) + offset, "w": torch.zeros(2, 2)}
    experts = {
        n: {"v": base["v"] + k * torch.arange(1.0, 7.0), "w": base["w"]}
        for k, n in enumerate("abc", 1)
    }
    pack(base, experts, folder / "p", settings=PackSettings(method="svd"))
    given_weights = dict(zip("abc", weights, strict=True))
    found = dict(open_composed(folder / "p", given_weights, base=base))
    factor = sum(k * weight for k, weight in enumerate(weights, 1))
    assert torch.equal(found["v"], base["v"] + factor * torch.arange(1.0, 7.0))
    assert torch.equal(found["w"], base["w"])


@pytest.mark.parametrize("vector", ["task", "difference"])
@pytest.mark.parametrize("method", CODECS)
def test_every_codec(tmp_path, method, vector):
    made = pack(BASE, EXPERTS, tmp_path / "p", settings=PackSettings(method=method, vector=vector))
    base = BASE if vector == "task" else None
    reference = open_checkpoint(made.reference_source(base))
    rebuilt = {name: Rebuilt(made, name, reference) for name in "abc"}
    weights = {"a": 0.25, "b": 0.5, "c": 0.25}
    found = open_composed(tmp_path / "p", weights, base=base)
    for name, tensor in found.items():
        expected = reference.read(name)
        for task, weight in weights.items() if tensor.is_floating_point() else ():
            expected = expected + weight * rebuilt[task].delta(name)
        torch.testing.assert_close(tensor, expected)
    unpack(tmp_path / "p", "b", tmp_path / "b", base=base)
    assert_same(dict(open_composed(tmp_path / "p", {"b": 1.0}, base=base)), load(tmp_path / "b"))


def test_order_and_workers_change_no_byte(packs, tmp_path):
    weights = {"a": 0.1, "b": 0.3, "c": 0.6}
    backwards = dict(reversed(weights.items()))
    compose(packs / "dts", weights, tmp_path / "x", work=Work(workers=1))
    compose(packs / "dts", backwards, tmp_path / "y", work=Work(workers=3, memory=1_000_000))
    assert listing(tmp_path / "x") == listing(tmp_path / "y")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single_and_cast_once(tmp_path, dtype):
    base = {"v": torch.tensor([1.0, 2.0, 60000.0]).to(dtype)}
    experts = {n: {"v": base["v"] + torch.tensor([0.5, 1.0, 5000.0]).to(dtype)} for n in "ab"}
    experts["b"]["v"][0] += 1
    pack(base, experts, tmp_path / "p", settings=PackSettings(method="svd"))
    found = open_composed(tmp_path / "p", {"a": 2.0, "b": 1.0}, base=base)["v"]
    true = [
        float(base["v"][i])
        + 2 * float(experts["a"]["v"][i] - base["v"][i])
        + float(experts["b"]["v"][i] - base["v"][i])
        for i in range(3)
    ]
    limit = torch.finfo(dtype).max
    expected = torch.tensor(true, dtype=torch.float64).clamp(-limit, limit).to(dtype)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert dtype != torch.float16 or found[2] == 65504  # 60000 + 3 x 5000: held to what fp16 has


def test_what_it_was_made_of_is_beside_it(packs, tmp_path):
    compose(packs / "dts", {"b": 0.5, "a": 0.25}, tmp_path / "out")
    made = json.loads((tmp_path / "out/personae.json").read_text())
    assert made["weights"] == {"a": 0.25, "b": 0.5}
    assert (made["kind"], made["gamma"], made["head"]) == ("composed", "given", None)
    assert made["pack_sha256"] == sha256_file(packs / "dts/pack.json")
    assert (tmp_path / "out/config.json").read_text() == "{}"


def _heads(folder: Path) -> dict[str, State]:
    """A family under a prefix the base has not, with heads of its own."""
    heads = {n: {"head.weight": torch.full((k, 16), float(k))} for k, n in enumerate("abc", 2)}
    experts = {
        n: {f"bert.{key}": tensor for key, tensor in EXPERTS[n].items()} | heads[n] for n in "abc"
    }
    saved(BASE, folder / "base", '{"of": "base"}')
    for name, state in experts.items():
        saved(state, folder / name, json.dumps({"of": name}))
    paths = {name: folder / name for name in "ab"}
    pack(folder / "base", paths, folder / "p", settings=PackSettings(parameters=HALF))
    return heads


def test_heads_are_not_mixed(tmp_path):
    _heads(tmp_path)
    noted: list[str] = []
    compose(tmp_path / "p", {"a": 0.5, "b": 0.5}, tmp_path / "o", work=Work(note=noted.append))
    assert load(tmp_path / "o").keys() == BASE.keys()
    assert json.loads((tmp_path / "o/config.json").read_text()) == {"of": "base"}
    assert noted == [
        f"the reference, as the pack names it: {tmp_path / 'base'}",
        "a: kept whole, so not composed: head.weight",
        "b: kept whole, so not composed: head.weight",
        "the result has the reference's head, if any; --head attaches a task's",
    ]


def test_the_head_of_a_packed_task(tmp_path):
    heads = _heads(tmp_path)
    compose(tmp_path / "p", {"b": 1.0}, tmp_path / "o", head="a")
    unpack(tmp_path / "p", "b", tmp_path / "ub")
    expected = {k: v for k, v in load(tmp_path / "ub").items() if k != "head.weight"} | heads["a"]
    assert_same(load(tmp_path / "o"), expected)
    assert json.loads((tmp_path / "o/config.json").read_text()) == {"of": "a"}


def test_all_weight_and_head_of_one_task_is_that_task_to_the_byte(tmp_path):
    _heads(tmp_path)
    compose(tmp_path / "p", {"b": 1.0}, tmp_path / "o", head="b")
    unpack(tmp_path / "p", "b", tmp_path / "u")
    found = listing(tmp_path / "o")
    assert found.pop("personae.json") is not None
    assert found == listing(tmp_path / "u")


def test_the_head_of_another_checkpoint(tmp_path):
    heads = _heads(tmp_path)  # 'c' is not in the pack: an unseen task that has a head
    compose(tmp_path / "p", {"a": 0.5, "b": 0.5}, tmp_path / "o", head=tmp_path / "c")
    plain = dict(open_composed(tmp_path / "p", {"a": 0.5, "b": 0.5}))
    assert_same(load(tmp_path / "o"), {f"bert.{k}": v for k, v in plain.items()} | heads["c"])
    assert json.loads((tmp_path / "o/config.json").read_text()) == {"of": "c"}


def test_a_grown_vocabulary_comes_with_the_head(tmp_path):
    extra = torch.full((2, 16), 3.0)
    grown = EXPERTS["a"] | {"embed.weight": torch.cat([EXPERTS["a"]["embed.weight"], extra])}
    pack(BASE, {"a": grown, "b": EXPERTS["b"]}, tmp_path / "p")
    plain = open_composed(tmp_path / "p", {"a": 1.0, "b": 1.0}, base=BASE)["embed.weight"]
    assert plain.shape == (20, 16)
    saved(grown, tmp_path / "grown")
    for head in ("a", tmp_path / "grown"):
        of = open_composed(tmp_path / "p", {"a": 1.0, "b": 1.0}, base=BASE, head=head)
        assert torch.equal(of["embed.weight"], torch.cat([plain, extra]))


def test_tied_names_are_in_the_state_dict(tmp_path):
    from toys import perturb, toy_gpt2

    toy_gpt2(tmp_path / "base")
    perturb(tmp_path / "base", tmp_path / "x", seed=1)
    pack(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "p")
    compose(tmp_path / "p", {"x": 0.5}, tmp_path / "o")
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(tmp_path / "o")
    written = load(tmp_path / "o")
    assert torch.equal(model.transformer.wte.weight, written["transformer.wte.weight"])
    state = dict(open_composed(tmp_path / "p", {"x": 0.5}))
    assert len(state) == len(open_composed(tmp_path / "p", {"x": 0.5}))
    assert_same({name: state[name] for name in written}, written)


def test_transformers_takes_the_mapping_without_a_file(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    from toys import perturb, toy_vit

    toy_vit(tmp_path / "base")
    perturb(tmp_path / "base", tmp_path / "x", seed=1)
    pack(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "p")
    compose(tmp_path / "p", {"x": 0.5}, tmp_path / "o")
    state = dict(open_composed(tmp_path / "p", {"x": 0.5}))
    config = ViTConfig.from_pretrained(tmp_path / "base")
    found = ViTForImageClassification.from_pretrained(None, config=config, state_dict=state)
    expected = ViTForImageClassification.from_pretrained(tmp_path / "o")
    assert_same(found.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        ({"a": 1.0, "d": 1.0, "e": 2.0}, PackError, "has no task 'd'"),
        ({"a": math.nan, "b": math.inf}, RecipeError, "The weight of 'b' is inf"),
        ({"a": 0.0}, RecipeError, "would be the reference"),
        ({}, RecipeError, "would be the reference"),
    ],
)
def test_bad_weights(packs, tmp_path, weights, error, text):
    with pytest.raises(error, match=text):
        compose(packs / "dts", weights, tmp_path / "out")
    assert listing(tmp_path) == {}


def test_nothing_is_written_over_inputs_or_where_something_is(packs, tmp_path):
    saved(EXPERTS["a"], tmp_path / "head")
    before = listing(tmp_path)
    with pytest.raises(OutputError, match="overlap"):
        compose(packs / "dts", {"a": 1.0}, tmp_path / "head", head=tmp_path / "head")
    with pytest.raises(OutputError, match="not empty"):
        compose(packs / "dts", {"a": 1.0}, tmp_path / "head")
    assert listing(tmp_path) == before


def test_a_damaged_task_is_refused_and_one_of_no_weight_is_not_read(packs, tmp_path):
    shutil.copytree(packs / "dts", tmp_path / "p")
    file = tmp_path / "p/tasks/a.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(PackError, match="damaged"):
        compose(tmp_path / "p", {"a": 0.5, "b": 0.5}, tmp_path / "out")
    compose(tmp_path / "p", {"a": 0.0, "b": 0.5}, tmp_path / "out")
