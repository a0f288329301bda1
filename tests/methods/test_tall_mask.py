"""TALL-masks worked by hand, and against their formula."""

import pytest
import torch

from personae.errors import MethodError
from personae.methods import Context, Site
from personae.methods.codecs.tall_mask import TALLMask

ONE = torch.tensor([3.0, -1, 2, 0])
TWO = torch.tensor([1.0, -4, -2, 0])


def _decoded(codec: TALLMask, delta: torch.Tensor, shared: torch.Tensor) -> list[float]:
    context = Context(Site("x", tuple(delta.shape)), "", shared)
    return codec.decode(codec.encode(delta, None, context), delta.shape, shared).tolist()


def test_by_hand():
    # τ = 4 −5 0 0. Task one, threshold ½: 3 > ½·1, 1 < ½·4, 2 > ½·2 but τ is 0 there.
    codec = TALLMask(threshold=0.5)
    shared = codec.share([ONE, TWO])
    assert shared.tolist() == [4, -5, 0, 0]
    assert _decoded(codec, ONE, shared) == [4, 0, 0, 0]
    # Task two: 1 < ½·3, 4 > ½·1.
    assert _decoded(codec, TWO, shared) == [0, -5, 0, 0]
    parts = codec.encode(TWO, None, Context(Site("x", (4,)), "", shared))
    assert {name: values.tolist() for name, values in parts.items()} == {"mask": [2]}
    assert codec.bits((4,)) == (4, 4, 8)


def test_a_larger_threshold_keeps_less():
    draw = torch.Generator().manual_seed(0)
    family = list(torch.randn(4, 300, generator=draw))
    shared = TALLMask().share(family)
    kept = []
    for threshold in (0.2, 0.4, 0.6, 5.0):
        decoded = torch.tensor(_decoded(TALLMask(threshold=threshold), family[0], shared))
        expected = family[0].abs() > threshold * (shared - family[0]).abs()
        assert torch.equal(decoded, shared * expected)
        kept.append(int(expected.sum()))
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 300 / 4  # such a mask is stored by its gaps


def test_a_task_has_its_own_threshold():
    codec = TALLMask(threshold={"a": 0.2, "b": 0.6})
    assert codec.for_task("b") == TALLMask(threshold=0.6)
    assert TALLMask().for_task("b") == TALLMask()
    with pytest.raises(MethodError, match="no value for task 'c', only for a, b"):
        codec.for_task("c")
