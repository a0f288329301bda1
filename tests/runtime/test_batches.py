"""Batches whose rows have tasks of their own: as each row alone with its task."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loaded import Family, Kind, family, loaded
from torch import Tensor

from personae import DTS, Runtime, load, pack, unpack
from personae.errors import MethodError, PackError
from toys import perturb, toy_gpt2, toy_llama, toy_t5

__all__ = ["family"]


def taken(kind: Kind, row: int) -> dict[str, Tensor]:
    return {name: one[row : row + 1] for name, one in kind.inputs.items()}


def alone(family: Family, tasks: tuple[str, ...]) -> Iterator[Tensor]:
    """Each row computed by its task's own checkpoint."""
    for row, task in enumerate(tasks):
        with torch.no_grad():
            yield loaded(family.unpacked[task])(**taken(family.kind, row))[family.kind.output][0]


@pytest.mark.parametrize("mode", ["merged", "factored"])
@pytest.mark.parametrize("tasks", [("b", "a", "b"), ("a", "a", "b"), ("a", "a", "a")])
def test_each_row_has_its_task(family: Family, mode: str, tasks: tuple[str, ...]):
    runtime = load(family.pack, mode=mode)
    with torch.no_grad():
        got = runtime(**family.kind.inputs, tasks=tasks)[family.kind.output]
    for row, right in zip(got, alone(family, tasks), strict=True):
        own = row[..., : right.shape[-1]]
        torch.testing.assert_close(own, right)
        assert (row[..., right.shape[-1] :] == -torch.inf).all()
    assert runtime.task is None


GENERATORS = {"gpt2": toy_gpt2, "llama": toy_llama, "t5": toy_t5}
PROMPTS = torch.tensor([[5, 9, 2], [7, 3, 8], [4, 4, 6], [9, 1, 3]])


@pytest.mark.parametrize("name", GENERATORS)
def test_sequences_are_generated_row_by_row(name: str, tmp_path: Path):
    """With a cache of keys; T5's table of relative positions has no rows."""
    base = GENERATORS[name](tmp_path / "base")
    experts = {task: perturb(base, tmp_path / task, seed, 0.3) for seed, task in enumerate("abc")}
    packed = pack(base, experts, tmp_path / "pack", DTS(rank_fraction=1.0)).directory
    runtime = load(packed, mode="factored")
    tasks = ["b", "c", "a", "b"]
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    how |= {"eos_token_id": None, "decoder_start_token_id": 0}
    got = runtime.generate(PROMPTS, tasks=tasks, **how)
    assert _shell(runtime).apart == (name == "t5")
    for row, task in enumerate(tasks):
        model = loaded(unpack(packed, task, tmp_path / "out" / str(row)))
        assert torch.equal(got[row], model.generate(PROMPTS[row : row + 1], **how)[0])


def test_linear_layers_compute_once_for_all_rows(family: Family):
    """T5's, too: this toy's table of positions is too narrow for a code."""
    runtime = load(family.pack, mode="factored")
    runtime(**family.kind.inputs, tasks=["a", "a", "b"])  # the first call is watched
    shell, calls = _shell(runtime), Counter[bool]()
    linear = [m for m in shell.module.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    for module in linear:
        module.register_forward_hook(lambda *_: calls.update([runtime.task is None]))
    runtime(**family.kind.inputs, tasks="a")
    runtime(**family.kind.inputs, tasks=["a", "a", "b"])
    assert calls[True] == calls[False] > 5 and not shell.apart


def _shell(runtime: Runtime) -> Any:
    return runtime._catalogue.shell("a")


def test_tasks_that_do_not_fit_the_rows(family: Family):
    runtime = load(family.pack, mode="factored")
    with pytest.raises(MethodError, match=r"tasks= names 2 tasks, but '.*' has 3 rows"):
        runtime(**family.kind.inputs, tasks=["a", "b"])
    with pytest.raises(MethodError, match=r"tasks= is empty"):
        runtime(**family.kind.inputs, tasks=[])
    with pytest.raises(MethodError, match="leave labels out"):
        runtime(**family.kind.inputs, labels=torch.tensor([0, 1, 1]), tasks=["a", "b", "a"])
    with pytest.raises(PackError, match="has no task 'A'"):
        runtime(**family.kind.inputs, tasks=["a", "b", "A"])
    assert runtime.task is None and runtime(**family.kind.inputs, tasks="a")


def test_the_cache_bounds_what_is_held_and_not_what_is_computed(family: Family):
    """What does not fit is decoded in each pass, and is the same."""
    whole = load(family.pack, mode="factored", cache="1GB")
    tasks = ["a", "b", "a"]
    with torch.no_grad():
        right = whole(**family.kind.inputs, tasks=tasks)[family.kind.output]
        for most in (whole.cached_bytes // 3, 0):
            small = load(family.pack, mode="factored", cache=most)
            for _ in range(2):
                got = small(**family.kind.inputs, tasks=tasks)[family.kind.output]
                torch.testing.assert_close(got, right)
                assert small.cached_bytes <= most and bool(small.cached_bytes) == bool(most)


def test_what_is_held_is_as_large_as_the_tensors(family: Family):
    runtime = load(family.pack, mode="factored", cache="1GB")
    runtime(**family.kind.inputs, tasks=["a", "b", "a"])
    held = {}
    for task in "ab":
        for path in runtime._catalogue.paths(task).values():
            for given in path.whole.values():
                held[given().data_ptr()] = given().nbytes
            for given in path.low_rank.values():
                held |= {factor.data_ptr(): factor.nbytes for factor in given()}
    assert runtime.cached_bytes == sum(held.values())
