import pytest
import torch
from torch import nn

from personae.checkpoints import open_checkpoint
from personae.checkpoints.memory import InMemory
from personae.checkpoints.specs import dtype_faults
from personae.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool), persistent=False)


NAMES = [
    "embedding.weight",
    "norm.bias",
    "norm.num_batches_tracked",
    "norm.running_mean",
    "norm.running_var",
    "norm.weight",
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_module_gives_parameters_and_persistent_buffers_once(device: str) -> None:
    with torch.device(device):
        opened = open_checkpoint(Tied())
    assert opened.source == "Tied"
    assert list(opened.specs) == NAMES
    assert dict(opened.tied) == {"head.weight": "embedding.weight"}
    assert opened.specs["norm.num_batches_tracked"].shape == ()
    assert not opened.specs["norm.num_batches_tracked"].is_floating


def test_reading_shares_and_needs_no_gradient() -> None:
    model = Tied()
    opened = open_checkpoint(model)
    tensor = opened.read("embedding.weight")
    assert torch.equal(tensor, model.embedding.weight) and not tensor.requires_grad
    assert tensor.data_ptr() == model.embedding.weight.data_ptr()
    assert torch.equal(opened.read_rows("embedding.weight", 1, 3), model.embedding.weight[1:3])
    assert opened.factors("norm.bias") is None and not opened.same_as_base("norm.bias")


def test_mapping_ties_by_storage() -> None:
    """`state_dict()` gives new tensor objects over the same storage."""
    opened = open_checkpoint(Tied().state_dict())
    assert list(opened.specs) == NAMES
    assert dict(opened.tied) == {"head.weight": "embedding.weight"}


def test_empty_tensors_are_not_tied() -> None:
    opened = open_checkpoint({"a": torch.zeros(0), "b": torch.zeros(0)})
    assert list(opened.specs) == ["a", "b"]


def test_meta_has_headers_alone() -> None:
    with torch.device("meta"):
        opened = open_checkpoint(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="'weight' is on the meta device and has no values"):
        opened.read("weight")


def test_faults_come_together() -> None:
    wrong = {"a": 3, "b": torch.ones(2, dtype=torch.complex64), "c.weight": torch.ones(2).byte()}
    with pytest.raises(CheckpointError) as refused:
        InMemory(wrong)
    text = str(refused.value)
    assert text.startswith("3 faults") and "'a' is a int, not a tensor" in text
    assert "'b' has dtype complex64, which is not supported. Convert it: " in text
    assert "'c.weight' holds uint8 codes" in text


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("C64", "Convert it"),
        (torch.complex128, "Convert it"),
        ("F8_E4M3", "Dequantise it first"),
        ("F4", "Dequantise it first"),
        (torch.float8_e5m2, "Dequantise it first"),
        ("F6_E2M3", "Dequantise it first"),
    ],
)
def test_what_to_do_with_a_dtype_that_is_not_read(dtype: torch.dtype | str, hint: str) -> None:
    assert f"is not supported. {hint}: " in dtype_faults("m", {"w": dtype})[0]


def test_a_dtype_that_is_not_read_is_told_once_for_all_its_tensors() -> None:
    codes = {f"{n}.weight": torch.ones(2, dtype=torch.int8) for n in range(3)}
    with pytest.raises(CheckpointError) as refused:
        InMemory(codes | {"s": torch.ones(1, dtype=torch.float8_e5m2)})
    unread, held = refused.value.faults
    assert unread.startswith("dict: 's' has dtype float8_e5m2, which is not supported.")
    assert held.startswith("dict: '0.weight' and 2 other tensor(s) hold int8 codes of a quantised")
