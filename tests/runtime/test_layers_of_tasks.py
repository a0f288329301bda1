"""Modules that a caller gives, of every kind of layer: merged, factored, and with all weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from personae import CODECS, SVD, load, pack, unpack
from toys import load as tensors_of


class Scaled(nn.Embedding):
    """An embedding that scales and shifts, as those of Bart, Gemma and OPT do."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input + 1)


class Everything(nn.Module):
    """One of each: tied embedding and output, attention, convolution, norms with and without."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, 16))
        self.embed = nn.Embedding(20, 16)
        self.place = Scaled(9, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.recur = nn.LSTM(16, 16, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.output = nn.Linear(16, 20, bias=False)
        self.output.weight = self.embed.weight
        self.classifier = nn.Linear(16, labels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1])[None]) + self.start
        x = self.layer(x + self.attend(x, x, x, need_weights=False)[0])
        x = x + self.recur(x)[0]
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.output(x), self.classifier(x[:, 0])


TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [2, 4, 6, 8, 1]])


def everything(seed: int, labels: int = 3) -> Everything:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Everything(labels)
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in [*model.parameters(), model.norm.running_mean, model.norm.running_var]:
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


def computed(model: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(TOKENS)


@pytest.fixture
def base() -> Everything:
    return everything(0)


@pytest.fixture
def packed(base: Everything, tmp_path: Path) -> Path:
    experts = {"a": everything(1), "b": everything(2, labels=5)}
    return pack(base, experts, tmp_path / "pack", SVD(rank_fraction=0.4)).directory


def expected(packed: Path, base: Everything, task: str, labels: int) -> Everything:
    """With every weight of the task, read from what `unpack` writes."""
    model = everything(9, labels)
    out = unpack(packed, task, packed.parent / task, base=base, overwrite=True)
    missing, unexpected = model.load_state_dict(tensors_of(out), strict=False)
    assert not unexpected and {*missing} <= {"output.weight", "embed.weight"}
    return model.eval()


@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_every_kind_of_layer(packed: Path, base: Everything, mode: str):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    reference = computed(base)
    runtime = load(packed, model=base, mode=mode)
    for task, labels in {"a": 3, "b": 5}.items():
        other = expected(packed, copy.deepcopy(base), task, labels)
        with runtime.activate(task):
            assert runtime.model is base
            torch.testing.assert_close(computed(runtime), computed(other))
            assert computed(base)[1].shape == (3, labels)
        for name, tensor in base.state_dict().items():
            assert torch.equal(tensor, before[name])
    # The weights are the same to the bit; what BLAS makes of them depends on where they lie.
    torch.testing.assert_close(computed(runtime), reference)


def test_attention_and_recurrence_add_their_matrices_up(packed: Path, base: Everything):
    runtime = load(packed, model=base, mode="factored")
    paths = runtime._catalogue.paths("a")
    changes = {type(path.module): {*path.low_rank} for path in paths.values() if path.low_rank}
    assert changes == {
        nn.Embedding: {"weight"},
        Scaled: {"weight"},
        nn.Linear: {"weight"},
        nn.MultiheadAttention: {"in_proj_weight", "out_proj.weight"},
        nn.LSTM: {"weight_ih_l0", "weight_hh_l0"},
    }


def test_rows_have_tasks(packed: Path, base: Everything):
    runtime = load(packed, model=base, mode="factored")
    with torch.no_grad():
        got = runtime(TOKENS, tasks=["b", "a", "b"])
    for row, (task, labels) in enumerate((("b", 5), ("a", 3), ("b", 5))):
        right = expected(packed, copy.deepcopy(base), task, labels)
        for ours, theirs in zip(got, computed(right), strict=True):
            torch.testing.assert_close(ours[row, ..., : theirs.shape[-1]], theirs[row])


def test_a_closed_runtime_leaves_the_module_as_it_was(packed: Path, base: Everything):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    reference = computed(base)
    for mode in ("merged", "factored"):
        runtime = load(packed, model=base, mode=mode)
        runtime.activate("b")
        runtime.close()
        for module in base.modules():
            assert "forward" not in module.__dict__ and not module._forward_pre_hooks
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
        torch.testing.assert_close(computed(base), reference)


@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
def test_every_codec_in_place(codec: Any, base: Everything, tmp_path: Path):
    experts = {task: everything(seed) for seed, task in enumerate("abc", 1)}
    packed = pack(base, experts, tmp_path / "pack", codec()).directory
    other = expected(packed, copy.deepcopy(base), "c", 3)
    runtime = load(packed, model=base)
    runtime.activate("c")
    assert all(map(torch.equal, base.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("name", ["svd", "dts", "delta_come", "tsv_c", "residual"])
def test_codecs_whose_factors_are_added(name: str, base: Everything, tmp_path: Path):
    experts = {task: everything(seed) for seed, task in enumerate("abc", 1)}
    packed = pack(base, experts, tmp_path / "pack", CODECS[name]()).directory
    other = computed(expected(packed, copy.deepcopy(base), "c", 3))
    with load(packed, model=base, mode="factored").activate("c"):
        for mine, theirs in zip(computed(base), other, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
