"""Families that cannot be packed, and bases that do not belong: refused with nothing written."""

import math

import pytest
import torch

from families import listing, saved, small_base, tuned
from personae.commands.merge import merge
from personae.commands.pack import pack, pack_many
from personae.commands.unpack import unpack
from personae.errors import BudgetError, CheckpointError, MethodError, PackError, RecipeError
from personae.methods.codecs.dts import DTS
from personae.recipe import PackSettings
from personae.run.work import Work
from toys import load

BASE = small_base()


def test_nan_and_infinity_of_base_and_experts_are_told_at_once(tmp_path):
    base = small_base()
    base["layer.bias"][3] = math.nan
    bad = tuned(BASE, 1)
    bad["embed.weight"][0, :2] = math.inf
    bad["head"] = torch.tensor([1.0, -math.inf, math.nan])
    fine = tuned(BASE, 2)
    with pytest.raises(CheckpointError) as caught:
        pack(base, {"bad": bad, "fine": fine}, tmp_path / "p")
    assert str(caught.value) == (
        "3 faults:\n"
        "  1. The base: tensor 'layer.bias' holds 1 value(s) that are NaN or infinite. "
        "Repair the checkpoint, or leave the tensor out with 'skip'.\n"
        "  2. Expert 'bad': tensor 'embed.weight' holds 2 value(s) that are NaN or infinite. "
        "Repair the checkpoint, or leave the tensor out with 'skip'.\n"
        "  3. Expert 'bad': tensor 'head' holds 2 value(s) that are NaN or infinite. "
        "Repair the checkpoint, or leave the tensor out with 'skip'."
    )
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_size_0_where_there_should_be_values(tmp_path):
    """ZeRO-3 saves placeholders; merge and pack name them all, of experts and of the base."""
    nothing = {"embed.weight": torch.empty(0), "layer.weight": torch.empty(0, 12)}
    whole, hollow = tuned(BASE, 1), tuned(BASE, 2) | nothing
    said = "has 2 tensor(s) of size 0 where there should be values: embed.weight, layer.weight"
    for base, experts, whose in (
        (BASE, {"x": whole, "y": hollow}, "Expert 'y'"),
        (BASE | nothing, {"x": whole, "y": whole}, "The base (dict)"),
    ):
        for do in (pack, merge):
            with pytest.raises(CheckpointError) as caught:
                do(base, experts, tmp_path / "out")
            assert f"{whose} {said}. ZeRO-3" in str(caught.value)
            assert "stage3_gather_16bit_weights_on_model_save" in str(caught.value)
            assert "faults" not in str(caught.value)  # said once
    empty = {"unused": torch.empty(0, 4)}  # on both sides: nothing is missing
    pack(BASE | empty, {"x": whole | empty}, tmp_path / "out")


def test_what_is_skipped_need_not_be_finite(tmp_path):
    base, expert = small_base(), tuned(BASE, 1)
    expert["layer.bias"][3] = math.nan
    made = pack(base, {"x": expert}, tmp_path / "p", settings=PackSettings(skip=("layer.bias",)))
    assert "layer.bias" not in made.task("x").tensors


def test_infinities_that_cancel_are_found(tmp_path):
    expert = tuned(BASE, 1)
    expert["layer.bias"][:2] = torch.tensor([math.inf, -math.inf])
    with pytest.raises(CheckpointError, match=r"tensor 'layer.bias' holds 2 value\(s\)"):
        pack(BASE, {"x": expert}, tmp_path / "p")


def test_large_finite_values_are_no_fault(tmp_path):
    base = {"w": torch.full((8, 8), 3e38), "b": torch.zeros(8)}
    made = pack(base, {"x": base | {"b": torch.ones(8)}}, tmp_path / "p")
    assert list(made.task("x").tensors) == ["b"]


def test_experts_equal_to_the_base_in_values_are_told_with_other_faults(tmp_path):
    same = {name: tensor.clone() for name, tensor in BASE.items()}
    bad = tuned(BASE, 1)
    bad["scale"] = torch.tensor(math.nan)
    with pytest.raises(CheckpointError, match="2 faults") as caught:
        pack(BASE, {"same": same, "bad": bad}, tmp_path / "p")
    assert "Expert 'same' equals the base: all 5 shared tensors are the same" in str(caught.value)
    assert "Expert 'bad': tensor 'scale' holds 1" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_expert_that_differs_in_its_head_alone_is_packed(tmp_path):
    """A linear probe: nothing to code, the head is private."""
    probe = {name: tensor.clone() for name, tensor in BASE.items()} | {"head": torch.ones(3)}
    made = pack(BASE, {"probe": probe}, tmp_path / "p")
    assert made.task("probe").tensors == {}
    unpack(tmp_path / "p", "probe", tmp_path / "out", base=BASE)
    found = load(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in probe.items())


def test_checkpoints_that_cannot_be_read_are_told_with_bad_names(tmp_path):
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    experts = {"../x": BASE, "gone": str(tmp_path / "gone"), "empty": str(tmp_path / "empty")}
    with pytest.raises(CheckpointError, match="4 faults") as caught:
        pack(str(tmp_path / "no-base"), experts, tmp_path / "p")
    text = str(caught.value)
    assert "'../x' is not a safe file name" in text
    assert "The base: " in text and "no-base: no such file" in text
    assert "Expert 'gone': " in text and "Expert 'empty': " in text
    assert listing(tmp_path) == before


def test_there_must_be_an_expert(tmp_path):
    with pytest.raises(RecipeError, match=r"There is no expert. Give at least one"):
        pack(BASE, {}, tmp_path / "p")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PackSettings(method="dtz"), r"Unknown method 'dtz'. Did you mean 'dts'\?"),
        (PackSettings(parameters={"rank_fractoin": 0.1}), "no parameter 'rank_fractoin'"),
        (PackSettings(parameters={"rank_fraction": 0}), "rank_fraction = 0: .*greater than 0"),
        (PackSettings(parameters={"rank_fraction": 1.5}), "rank_fraction = 1.5: .*less than or eq"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(MethodError, match=message):
        pack(BASE, {"x": tuned(BASE, 1)}, tmp_path / "p", settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_a_memory_bound_below_the_largest_tensor_names_what_it_takes(tmp_path):
    # embed.weight, 20 x 16: its delta, 4 · 320, the way in chunks, 24 · 320, and the decomposition,
    # 4 · 320 for the matrix scaled and 32 · 16² for its Gram matrix.
    with pytest.raises(BudgetError) as caught:
        pack(BASE, {"x": tuned(BASE, 1)}, tmp_path / "p", work=Work(memory=10_000))
    assert str(caught.value) == (
        "The largest tensor needs 18,432 bytes of memory, the bound is 10,000. "
        "Give --memory 1MiB or more."
    )
    assert list(tmp_path.iterdir()) == []
    pack(BASE, {"x": tuned(BASE, 1)}, tmp_path / "p", work=Work(memory=18_432))
    # In chunks again, 24 · 320, the reference, 4 · 320, the product, 4 · 320, and its factors of
    # rank 4, 14 · 4 · (20 + 16).
    with pytest.raises(BudgetError, match=r"The largest tensor needs 12,256 bytes"):
        unpack(tmp_path / "p", "x", tmp_path / "x", base=BASE, work=Work(memory=5_000))
    assert not (tmp_path / "x").exists()


def test_packs_of_one_sweep_share_what_decompositions_depend_on(tmp_path):
    outs = {
        tmp_path / "a": PackSettings(parameters={"rank_fraction": 0.1}),
        tmp_path / "b": PackSettings(parameters={"rank_fraction": 0.2, "qkv": "split"}),
    }
    with pytest.raises(RecipeError, match=r"may differ only in the budget .* grouping, rank_frac"):
        pack_many(BASE, {"x": tuned(BASE, 1)}, outs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_a_wrong_base_is_refused_before_anything_is_decoded(tmp_path, monkeypatch, change):
    pack(BASE, {"x": tuned(BASE, 1)}, tmp_path / "p")
    wrong = {name: tensor.clone() for name, tensor in BASE.items()}
    if change == "value":
        wrong["layer.bias"][0] += 1e-6
    elif change == "name":
        wrong["other.bias"] = wrong.pop("layer.bias")
    elif change == "shape":
        wrong["layer.bias"] = wrong["layer.bias"].reshape(4, 4)
    else:
        wrong["layer.bias"] = wrong["layer.bias"].double()
    monkeypatch.setattr(DTS, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(PackError, match=r"dict is not the reference .* Give the right one with"):
        unpack(tmp_path / "p", "x", tmp_path / "out", base=wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def test_a_base_that_has_moved_is_asked_for(tmp_path):
    base = saved(BASE, tmp_path / "base")
    pack(str(base), {"x": tuned(BASE, 1)}, tmp_path / "p")
    base.rename(tmp_path / "moved")
    with pytest.raises(PackError, match=r"cannot be opened: .* Say where it is with --base."):
        unpack(tmp_path / "p", "x", tmp_path / "out")


def test_a_base_whose_auxiliary_files_changed_is_refused(tmp_path):
    """Same weights, but the expert's configuration was the base's, which is another now."""
    base = saved(BASE, tmp_path / "base", '{"labels": 3}')
    pack(str(base), {"x": tuned(BASE, 1)}, tmp_path / "p")
    (base / "config.json").write_text('{"labels": 4}')
    with pytest.raises(PackError, match=r"config.json.* is not the one .*'x' was packed with"):
        unpack(tmp_path / "p", "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()
