"""A pack in memory: every task computes what its unpacked checkpoint computes."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

from personae import DTS, load, pack, unpack
from toys import (
    perturb,
    toy_bert,
    toy_clip_vision,
    toy_gpt2,
    toy_llama,
    toy_roberta,
    toy_t5,
    toy_vit,
)

TOKENS = torch.tensor([[3, 5, 7, 9], [4, 6, 2, 2], [8, 1, 2, 3]])
PIXELS = torch.linspace(-1, 1, 3 * 3 * 8 * 8).reshape(3, 3, 8, 8).sin()
TEXT = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}


class Kind(NamedTuple):
    """A toy, what it computes from, and which output is looked at."""

    make: Callable[..., Path]
    inputs: dict[str, Tensor]
    output: str = "logits"
    labels: bool = False


KINDS = {
    "bert": Kind(toy_bert, TEXT, labels=True),
    "roberta": Kind(toy_roberta, TEXT, labels=True),
    "vit": Kind(toy_vit, {"pixel_values": PIXELS}, labels=True),
    "clip": Kind(toy_clip_vision, {"pixel_values": PIXELS}, "pooler_output"),
    "gpt2": Kind(toy_gpt2, TEXT),
    "llama": Kind(toy_llama, TEXT),
    "t5": Kind(toy_t5, TEXT | {"decoder_input_ids": TOKENS[:, :3]}),
}


class Family(NamedTuple):
    """A pack of two tasks, and what it was made of."""

    kind: Kind
    base: Path
    pack: Path
    unpacked: dict[str, Path]


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Two tasks; of classifiers with unlike numbers of classes, and none of them the base's."""
    kind, root = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    made = [kind.make(root / "made", 1, num_labels=2)] if kind.labels else []
    base = kind.make(root / "base", 0)
    sources = {"a": made[0] if made else base, "b": base}
    experts = {
        task: perturb(source, root / task, seed, scale=0.1)
        for seed, (task, source) in enumerate(sources.items(), 1)
    }
    packed = pack(base, experts, root / "pack", DTS(rank_fraction=0.4)).directory
    unpacked = {task: unpack(packed, task, root / "out" / task) for task in experts}
    return Family(kind, base, packed, unpacked)


def computed(model: Any, kind: Kind) -> Tensor:
    with torch.no_grad():
        return model(**kind.inputs)[kind.output]


def loaded(directory: Path) -> Any:
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(directory)


def settings(model: Any) -> dict[str, Any]:
    return model.config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_a_task_computes_what_its_checkpoint_does(family: Family, mode: str):
    runtime = load(family.pack, mode=mode)
    assert runtime.tasks == ("a", "b") and runtime.task is None
    for task in ("b", "a", "b"):
        with runtime.activate(task):
            assert runtime.task == task
            expected = loaded(family.unpacked[task])
            got = computed(runtime, family.kind)
            torch.testing.assert_close(got, computed(expected, family.kind))
            assert type(runtime.model) is type(expected)
            assert settings(runtime.model) == settings(expected)
            for name, tensor in expected.state_dict().items():
                if mode == "merged":
                    assert torch.equal(runtime.model.state_dict()[name], tensor)
        assert runtime.task is None
    reference = loaded(family.base)
    torch.testing.assert_close(computed(runtime, family.kind), computed(reference, family.kind))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(runtime.model.state_dict()[name], tensor)


def test_nothing_dense_is_built_of_a_matrix_that_is_added(family: Family):
    runtime = load(family.pack, mode="factored")
    paths = runtime._catalogue.paths("a")
    whole = {given().shape for path in paths.values() for given in path.whole.values()}
    heads = {(2, 16), (16, 16)} if family.kind.labels else set()
    assert {tuple(shape) for shape in whole if len(shape) == 2} <= heads
    assert all(path.low_rank.keys() <= {"weight"} for path in paths.values())
    assert sum(bool(path.low_rank) for path in paths.values()) > 5


def test_threads_have_tasks_of_their_own(family: Family):
    runtime = load(family.pack, mode="factored")
    together = threading.Barrier(2)
    got: dict[str, Tensor] = {}
    told: dict[str, str | None] = {}

    def serve(task: str) -> None:
        with runtime.activate(task):
            together.wait()
            for _ in range(3):
                got[task] = computed(runtime, family.kind)
            told[task] = runtime.task_of(threading.current_thread())
            together.wait()

    threads = [threading.Thread(target=serve, args=(task,)) for task in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {"a": "a", "b": "b"} and runtime.task is None
    for task, tensor in got.items():
        expected = computed(loaded(family.unpacked[task]), family.kind)
        torch.testing.assert_close(tensor, expected)
    reference = computed(loaded(family.base), family.kind)
    torch.testing.assert_close(computed(runtime, family.kind), reference)
