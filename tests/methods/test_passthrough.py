"""Passthrough: the model as it is, bit by bit, or times a number."""

from pathlib import Path

import pytest
import torch

from families import saved, small_base
from personae import Passthrough, merge, passthrough
from personae.errors import MethodError
from toys import load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_out_as_it_is(dtype: torch.dtype, tmp_path: Path):
    state = small_base(dtype=dtype)
    merge(None, {"a": saved(state, tmp_path / "a")}, tmp_path / "out", Passthrough())
    out = load(tmp_path / "out")
    assert all(torch.equal(out[name], tensor) for name, tensor in state.items())
    merge(None, {"a": tmp_path / "a"}, tmp_path / "half", Passthrough(scale=0.5))
    torch.testing.assert_close(load(tmp_path / "half")["scale"], 0.5 * state["scale"])


def test_of_two_models_none_passes():
    assert passthrough(torch.tensor([[1.0, 2.0]]), scale=-2.0).tolist() == [-2.0, -4.0]
    with pytest.raises(MethodError, match="takes one model, and here are 2"):
        passthrough(torch.ones(2, 3))
