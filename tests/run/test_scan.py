"""A first look: what is no weight, what may be broken, whose model it is; to the rebuilt file."""

import math

import pytest
import torch

from families import State, saved, small_base, tuned
from personae.checkpoints import open_checkpoint
from personae.commands.pack import add_tasks, pack
from personae.commands.unpack import unpack
from personae.commands.verify import verify
from personae.errors import CheckpointError, Faults
from personae.family.opened import open_family
from personae.packs.reader import Pack
from personae.recipe import PackSettings
from personae.run.scan import Scanned, fingerprint
from personae.run.work import Work
from toys import load

BASE = small_base()
DIFFERENCE = PackSettings(vector="difference")


def _there_and_back(base: State, expert: State, folder) -> State:
    pack(base, {"x": expert}, folder / "p")
    assert verify(folder / "p", against={"x": expert}, base=base)["x"].same_original
    unpack(folder / "p", "x", folder / "out", base=base)
    return load(folder / "out")


def _statistics(value: float) -> State:
    return {"bn.running_mean": torch.full((4,), value), "bn.running_var": torch.full((4,), value)}


def test_a_head_called_like_a_tensor_of_the_base_is_itself(tmp_path):
    base = BASE | {"norm.weight": torch.ones(16)}
    head = torch.arange(5.0)
    expert = {f"backbone.{n}": t for n, t in tuned(base, 1).items()} | {"norm.weight": head}
    found = _there_and_back(base, expert, tmp_path)
    assert set(found) == set(expert)
    assert torch.equal(found["norm.weight"], head)
    assert torch.allclose(found["backbone.norm.weight"], expert["backbone.norm.weight"], atol=0.05)


def test_differing_statistics_are_kept_whole(tmp_path):
    base, expert = BASE | _statistics(1.0), tuned(BASE, 1) | _statistics(1.25)
    found = _there_and_back(base, expert, tmp_path)
    record = Pack(tmp_path / "p").task("x")
    assert set(record.private) == set(_statistics(0))
    assert set(record.tensors).isdisjoint(_statistics(0))
    assert all(torch.equal(found[name], expert[name]) for name in _statistics(0))


def test_equal_statistics_come_from_the_reference(tmp_path):
    found = _there_and_back(BASE | _statistics(3.0), tuned(BASE, 1) | _statistics(3.0), tmp_path)
    assert Pack(tmp_path / "p").task("x").private == {}
    assert torch.equal(found["bn.running_var"], torch.full((4,), 3.0))


def test_statistics_are_averaged_in_an_average_and_kept_of_each_task(tmp_path):
    base = saved(BASE | _statistics(1.0), tmp_path / "base")
    experts = {n: tuned(BASE, s) | _statistics(s * 1.5) for s, n in enumerate("xy", 1)}
    pack(str(base), experts, tmp_path / "p", settings=DIFFERENCE)
    merged = load(tmp_path / "p" / "reference")
    assert torch.equal(merged["bn.running_mean"], torch.full((4,), 2.25))  # of 1.5, 3
    unpack(tmp_path / "p", "y", tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["bn.running_mean"], torch.full((4,), 3.0))


def test_statistics_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"'x': tensor 'bn.running_mean' holds 4 value"):
        pack(BASE | _statistics(1.0), {"x": tuned(BASE, 1) | _statistics(math.nan)}, tmp_path / "p")


@pytest.mark.parametrize("vector", ["task", "difference"])
def test_what_is_skipped_need_not_be_finite_in_the_base(tmp_path, vector):
    base = small_base()
    base["layer.bias"][3] = math.nan
    experts = {"x": tuned(BASE, 1), "y": tuned(BASE, 2)}
    settings = PackSettings(vector=vector, skip=("layer.bias",))
    made = pack(base, experts, tmp_path / "p", settings=settings)
    assert "layer.bias" not in made.task("x").tensors


def test_what_one_expert_codes_must_be_finite_in_the_base(tmp_path):
    base = small_base()
    base["layer.bias"][3] = math.nan
    odd = tuned(BASE, 1) | {"layer.bias": torch.ones(3)}  # private, by its shape
    with pytest.raises(CheckpointError, match=r"The base: tensor 'layer.bias' holds 1 value\(s\)"):
        pack(base, {"odd": odd, "x": tuned(BASE, 2)}, tmp_path / "p")
    pack(base, {"odd": odd}, tmp_path / "p")


def test_an_unchecked_tensor_still_counts_in_the_fingerprint():
    faults = Faults()
    of = [
        fingerprint(
            open_checkpoint({"a": torch.tensor([value, math.nan])}),
            "It",
            Work(workers=1),
            faults,
            unchecked={"a"},
        )
        for value in (1.0, 2.0)
    ]
    assert of[0] != of[1]
    assert faults.messages == []


def test_a_tied_tensor_kept_under_its_other_name_comes_back(tmp_path):
    """'a_head.weight' is kept, 'embed.weight' noted as tied; the base has the latter alone."""
    expert = tuned(BASE, 1)
    expert = {"a_head.weight": expert["embed.weight"]} | expert
    found = _there_and_back(BASE, expert, tmp_path)
    record = Pack(tmp_path / "p").task("x")
    assert record.private == {}
    assert record.tied == {"a_head.weight": "embed.weight"}
    assert set(found) == set(BASE)
    assert torch.allclose(found["embed.weight"], expert["embed.weight"], atol=0.1)


def test_a_tie_to_a_skipped_tensor_is_unpacked(tmp_path):
    head = torch.ones(3, 3)
    expert = tuned(BASE, 1) | {"a.head": head, "b.head": head}
    pack(BASE, {"x": expert}, tmp_path / "p", settings=PackSettings(skip=("a.head",)))
    unpack(tmp_path / "p", "x", tmp_path / "out", base=BASE)
    assert set(load(tmp_path / "out")) == set(BASE)


@pytest.mark.parametrize(
    "own",
    [
        {"embed.weight": torch.cat([BASE["embed.weight"], torch.ones(2, 16)])},
        {"position_ids": torch.arange(6).flip(0).reshape(1, 6)},
    ],
)
def test_extra_rows_or_another_buffer_make_it_another_model(tmp_path, own):
    expert = BASE | own
    found = _there_and_back(BASE, expert, tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expert.items())


def test_an_expert_equal_to_its_reference_is_told_by_what_that_is(tmp_path):
    with open_family(BASE, {"x": dict(BASE)}) as family:
        with pytest.raises(CheckpointError, match="'x' equals the base: all 5 shared tensors are"):
            Scanned.of(family, Work())
        with pytest.raises(CheckpointError) as caught:
            Scanned.of(family, Work(), from_base=False)
    assert str(caught.value) == (
        "Expert 'x' equals the merged reference (a single expert equals its own average): all 5 "
        "shared tensors are the same. Pack it with task vectors (vector 'task')."
    )


def test_a_model_of_other_tensors_may_be_added(tmp_path):
    pack(BASE, {"x": tuned(BASE, 1)}, tmp_path / "p")
    add_tasks(tmp_path / "p", {"y": BASE | {"head": torch.ones(3)}}, base=BASE)
    assert set(Pack(tmp_path / "p").task("y").private) == {"head"}
