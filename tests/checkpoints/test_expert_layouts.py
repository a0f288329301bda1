"""Experts of a mixture, one tensor each or stacked: read as the base has them."""

import pytest
import torch
from torch import Tensor

from personae.checkpoints import open_checkpoint
from personae.checkpoints.expert_layouts import with_experts_like
from personae.commands.merge_plan import plan_merge
from personae.errors import CheckpointError
from personae.run.work import Work

# Two experts of inner width 1 and hidden width 2. The stack has the gate's rows above the up's.
_GATE, _UP = [[[1.0, 2.0]], [[3.0, 4.0]]], [[[5.0, 6.0]], [[7.0, 8.0]]]
_DOWN = [[[9.0], [10.0]], [[11.0], [12.0]]]
_STACKED = {
    "l.mlp.experts.gate_up_proj": torch.tensor([[[1.0, 2], [5, 6]], [[3, 4], [7, 8]]]),
    "l.mlp.experts.down_proj": torch.tensor(_DOWN),
    "l.norm.weight": torch.ones(2),
}


def _apart(gate: str, up: str, down: str) -> dict[str, Tensor]:
    matrices = {gate: _GATE, up: _UP, down: _DOWN}
    return {"l.norm.weight": torch.ones(2)} | {
        f"l.mlp.experts.{index}.{matrix}.weight": torch.tensor(values[index])
        for matrix, values in matrices.items()
        for index in range(2)
    }


_QWEN = _apart("gate_proj", "up_proj", "down_proj")
_MIXTRAL = _apart("w1", "w3", "w2")


@pytest.mark.parametrize(
    ("base", "model"),
    [(_QWEN, _STACKED), (_MIXTRAL, _STACKED), (_STACKED, _QWEN), (_STACKED, _MIXTRAL)],
)
def test_the_same_values_under_the_names_of_the_base(
    base: dict[str, Tensor], model: dict[str, Tensor]
):
    found = with_experts_like(open_checkpoint(base), open_checkpoint(model))
    assert {name: spec.shape for name, spec in found.specs.items()} == {
        name: tuple(tensor.shape) for name, tensor in base.items()
    }
    for name, tensor in base.items():
        assert torch.equal(found.read(name), tensor)
        rows = len(tensor)
        assert torch.equal(found.read_rows(name, rows - 1, rows), tensor[rows - 1 :])
        assert found.read_rows(name, 0, 0).shape == tensor[:0].shape


@pytest.mark.parametrize("model", [_QWEN, _STACKED, {"l.norm.weight": torch.ones(2)}])
def test_a_model_in_the_layout_of_its_base_is_itself(model: dict[str, Tensor]):
    opened = open_checkpoint(model)
    assert with_experts_like(open_checkpoint(model), opened) is opened


def test_experts_that_are_not_alike_are_left_as_they_are():
    odd = _QWEN | {"l.mlp.experts.1.down_proj.weight": torch.ones(3, 1)}
    found = with_experts_like(open_checkpoint(_STACKED), open_checkpoint(odd))
    assert "l.mlp.experts.gate_up_proj" in found.specs
    assert "l.mlp.experts.1.down_proj.weight" in found.specs


def test_a_gap_among_the_experts_is_no_stack():
    gap = {name.replace(".1.", ".5."): tensor for name, tensor in _QWEN.items()}
    found = with_experts_like(open_checkpoint(_STACKED), open_checkpoint(gap))
    assert found.specs.keys() == gap.keys()


def test_rows_of_one_matrix_read_its_stack_once(monkeypatch: pytest.MonkeyPatch):
    stored = open_checkpoint(_STACKED)
    found, read, asked = (
        with_experts_like(open_checkpoint(_QWEN), stored),
        stored.read_rows,
        list[str](),
    )

    def counted(name: str, start: int, stop: int) -> Tensor:
        asked.append(f"{name}[{start}:{stop}]")
        return read(name, start, stop)

    monkeypatch.setattr(stored, "read_rows", counted)
    for matrix in ("down_proj", "gate_proj", "up_proj"):  # in the order of names, row by row
        name = f"l.mlp.experts.1.{matrix}.weight"
        for row in range(len(_QWEN[name])):
            assert torch.equal(found.read_rows(name, row, row + 1), _QWEN[name][row : row + 1])
    assert asked == ["l.mlp.experts.down_proj[1:2]", "l.mlp.experts.gate_up_proj[1:2]"]


def test_names_and_rows_that_are_not_there_are_refused():
    found = with_experts_like(open_checkpoint(_QWEN), open_checkpoint(_STACKED))
    with pytest.raises(CheckpointError, match="has no tensor"):
        found.read("l.mlp.experts.gate_up_proj")
    with pytest.raises(CheckpointError, match="Ask for rows within 0:1"):
        found.read_rows("l.mlp.experts.0.up_proj.weight", 0, 2)


def test_a_matrix_that_a_thread_keeps_is_counted_in_a_plan():
    base, expert = _QWEN, {name: tensor + 1 for name, tensor in _STACKED.items()}
    largest = [
        plan_merge(base, {"a": model, "b": model}, work=Work(workers=1)).largest
        for model in ({name: tensor + 1 for name, tensor in base.items()}, expert)
    ]
    one_expert = 4 * 4 * 2  # gate and up, two columns each, of the largest stack
    assert largest[1] - largest[0] == 2 * one_expert // 2  # of each of two experts
