"""Fused experts, one tensor (expert, out, in): coded and merged as each matrix is alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from families import State, saved
from personae.commands.inspect import inspect
from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.errors import BudgetError
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work

UP, DOWN = "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fused() -> list[State]:
    """A base and three experts."""
    base = {UP: noise(4, 32, 24, seed=1), DOWN: noise(4, 24, 16, seed=2)}
    base["layers.0.self_attn.q_proj.weight"] = noise(24, 24, seed=3)
    experts = [
        {
            name: tensor + 0.1 * noise(*tensor.shape, seed=10 * n + len(name))
            for name, tensor in base.items()
        }
        for n in range(3)
    ]
    return [base, *experts]


def split(state: State) -> State:
    """The same model with a tensor for each expert."""
    apart: State = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            apart[name] = tensor
            continue
        for number, matrix in enumerate(tensor):
            key = name.replace("experts.", f"experts.{number}.") + ".weight"
            apart[key] = matrix.clone()
    return apart


def written(models: list[State], folder: Path) -> tuple[Path, dict[str, Path]]:
    for name, state in zip(("base", "a", "b", "c"), models, strict=True):
        saved(state, folder / name)
    return folder / "base", {name: folder / name for name in "abc"}


@pytest.mark.parametrize("method", ["drm", "tsv_m", "iso_c", "cart", "average"])
def test_merged_as_each_matrix_is(tmp_path, method):
    results = []
    for name, models in (("fused", fused()), ("split", [split(one) for one in fused()])):
        base, experts = written(models, tmp_path / name)
        out = tmp_path / name / "out"
        merge(base, experts, out, settings=MergeSettings(method=method), work=Work(workers=1))
        results.append(load_file(out / "model.safetensors"))
    whole, apart = split(results[0]), results[1]
    for name, tensor in apart.items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", ["dts", "svd", "tsv_c", "delta_come", "bitdelta"])
def test_coded_as_each_matrix_is(tmp_path, codec):
    results = []
    for name, models in (("fused", fused()), ("split", [split(one) for one in fused()])):
        base, experts = written(models, tmp_path / name)
        folder = tmp_path / name / "pack"
        pack(base, experts, folder, settings=PackSettings(method=codec), work=Work(workers=1))
        unpack(folder, "a", tmp_path / name / "out")
        results.append(load_file(tmp_path / name / "out" / "model.safetensors"))
    whole, apart = split(results[0]), results[1]
    for name, tensor in apart.items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=1e-5)


def test_a_budget_that_would_store_nothing_is_refused_with_the_smallest(tmp_path):
    base, experts = written(fused(), tmp_path)
    with pytest.raises(BudgetError, match=r"at least|smallest|needs") as caught:
        pack(base, experts, tmp_path / "p", settings=PackSettings(budget="0.1%"))
    assert "%" in str(caught.value)
    pack(base, experts, tmp_path / "p", settings=PackSettings(budget="8%"))
    ranks = inspect(tmp_path / "p")["tasks"]["a"]["tensors"]
    assert all(tensor["rank"] >= 1 for tensor in ranks.values())
