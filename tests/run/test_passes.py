"""Passes over a family in chunks find what passes over tensors in memory do, and are kept."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import small_base, tuned
from personae import MergeSettings
from personae.commands.merge_job import open_to_merge, prepare
from personae.family import chunks
from personae.methods import Pass, Passes, Site, statistics_of
from personae.run.passes import kept, passes_over_family, passes_over_tensor
from personae.run.work import Work


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "drm"])
def test_over_a_family_as_in_memory(method: str, workers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 50)
    monkeypatch.setattr(chunks, "ITEM_ENTRIES", 90)
    base = small_base()
    experts = {name: tuned(base, seed) for seed, name in enumerate("abc", 1)}
    settings = MergeSettings(method=method)
    with open_to_merge(base, experts, settings) as family:
        job, work = prepare(family, settings), Work(workers=workers)
        items = job.merged_items
        assert len(items) > 5
        found = passes_over_family(job.method_of, job.stacks, items, job.cost, work, late=False)
    stacks = [
        (
            Site(name, tuple(base[name].shape)),
            torch.stack([e[name] - base[name] for e in experts.values()]),
        )
        for name in sorted(job.merged)
    ]
    expected = job.method_of("").statistics(stacks)
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_over_one_tensor_as_in_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 50)
    base = small_base()
    experts = {name: tuned(base, seed) for seed, name in enumerate("ab", 1)}
    settings = MergeSettings(method="ties", parameters={"scope": "tensor"})
    name = "layer.weight"
    with open_to_merge(base, experts, settings) as family:
        job = prepare(family, settings)
        cut = list(chunks.rows_of(family.base.specs[name]))
        assert len(cut) > 2
        found = passes_over_tensor(job.method_of(name), job.stacks, cut, late=False)
    stack = torch.stack([expert[name] - base[name] for expert in experts.values()])
    expected = job.method_of(name).statistics([(Site(name, (16, 12)), stack)])
    assert all(torch.equal(found[key], expected[key]) for key in ("thresholds", "majority"))


def test_what_was_found_is_kept_to_the_bit(tmp_path: Path):
    taken: list[None] = []

    def find() -> dict[str, Tensor]:
        taken.append(None)
        return {"third": torch.tensor(1 / 3, dtype=torch.float64), "counts": torch.arange(6)[::2]}

    first, again = (kept(tmp_path / "statistics", find) for _ in range(2))
    assert len(taken) == 1
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_pass_is_answered_before_the_next_is_asked():
    def passes() -> Passes:
        one = yield Pass("one", torch.sum)
        two = yield Pass("two", torch.sum, late=True)
        return {"sum": one if two is None else one + two}

    one = torch.tensor(1.0)
    assert statistics_of(passes(), lambda asked: None if asked.late else one) == {"sum": one}
    assert statistics_of(passes(), lambda _: one)["sum"] == 2
    with pytest.raises(StopIteration):  # not taken for the end of the passes
        statistics_of(passes(), lambda _: next(iter(())))
