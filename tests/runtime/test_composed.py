"""Composed tasks in memory: what `personae compose` writes, without a checkpoint."""

from pathlib import Path

import pytest
import torch
from test_loaded import KINDS, computed, loaded

from personae import DTS, compose, load, pack
from personae.errors import PackError, RecipeError
from personae.packs.reader import Pack
from personae.packs.weighting import given
from toys import perturb, toy_bert

WEIGHTS = {"a": 0.3, "b": 0.7}
BERT = KINDS["bert"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with heads of their own."""
    root = tmp_path_factory.mktemp("composed")
    base = toy_bert(root / "base")
    source = toy_bert(root / "two", num_labels=2)
    experts = {"a": perturb(source, root / "a", 1, 0.1), "b": perturb(source, root / "b", 2, 0.1)}
    return pack(base, experts, root / "pack", DTS(rank_fraction=0.4)).directory


@pytest.mark.parametrize("mode", ["merged", "factored"])
@pytest.mark.parametrize("head", [None, "b"])
def test_a_composed_task_is_what_compose_writes(
    packed: Path, tmp_path: Path, mode: str, head: str | None
):
    runtime = load(packed, mode=mode)
    runtime.compose("mix", WEIGHTS, head=head)
    assert runtime.tasks == ("a", "b", "mix")
    expected = computed(loaded(compose(packed, WEIGHTS, tmp_path / "out", head=head)), BERT)
    with runtime.activate("mix"):
        assert expected.shape == (3, 3 if head is None else 2)
        torch.testing.assert_close(computed(runtime, BERT), expected)
    with torch.no_grad():
        got = runtime(**BERT.inputs, tasks=["mix", "a", "mix"]).logits
    torch.testing.assert_close(got[0, : expected.shape[1]], expected[0])


def test_a_head_of_a_composed_task(packed: Path):
    runtime = load(packed)
    runtime.compose("mix", WEIGHTS)
    with pytest.raises(PackError, match=r"no task 'mix'\. Known: a, b\."):
        runtime.compose("again", WEIGHTS, head="mix")


def test_weights_beyond_float32_are_refused(packed: Path):
    with pytest.raises(
        RecipeError, match=r"weight of 'b' is 1e\+308\. Give a finite number, within"
    ):
        given({"a": 1.0, "b": 1e308}, Pack(packed).manifest, packed)


def test_what_cannot_be_composed(packed: Path):
    runtime = load(packed)
    with pytest.raises(PackError, match="a task 'a' already"):
        runtime.compose("a", WEIGHTS)
    with pytest.raises(PackError, match="has no task 'c'"):
        runtime.compose("mix", {"a": 1.0, "c": 2.0})
    with pytest.raises(PackError, match="has no task 'c'"):
        runtime.compose("mix", WEIGHTS, head="c")
    with pytest.raises(RecipeError, match="No task has a weight"):
        runtime.compose("mix", {"a": 0.0})
    assert runtime.tasks == ("a", "b")
