"""What every static method keeps to, whatever it computes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from matrices import adapters, products
from registered import every_method, method_of

from personae.methods import MERGE_METHODS, MergeMethod, Site, _deltas, build, lookup
from pretend_device import DEVICE, PretendDevice

SHAPES = [(4, 6), (5,), (), (2, 3, 2, 2), (6, 4)]


def reals(experts: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Task vectors of real numbers, some of them 0; the first expert is left out of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    stacks = {
        f"{n}.weight": torch.randn(experts, *shape, generator=generator)
        for n, shape in enumerate([(37, 11), (50,), (), (5, 3, 2, 2), (8, 64)])
    }
    for stack in stacks.values():
        stack[stack.abs() < 0.1] = 0
    stacks["0.weight"][0] = 0
    return stacks


def model_for(cls: type[MergeMethod]) -> list[torch.Tensor]:
    """As many as the method takes, three if it takes any number."""
    return model(cls.takes or 3)


def merge_each(
    cls: type[MergeMethod], stacks: Sequence[torch.Tensor], **parameters: Any
) -> list[torch.Tensor]:
    """Each tensor alone."""
    method = method_of(cls, **parameters)
    return [method(stack, name=f"{n}.weight") for n, stack in enumerate(stacks)]


def model(experts: int = 3, seed: int = 0) -> list[torch.Tensor]:
    """Task vectors of small integers, not all zero."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-9, 10, (experts, *shape), generator=generator).float() for shape in SHAPES
    ]


@every_method
def test_shape_dtype_finite_and_inputs_unmodified(cls: type[MergeMethod]):
    stacks = model_for(cls)
    before = [stack.clone() for stack in stacks]
    for merged, stack in zip(merge_each(cls, stacks), stacks, strict=True):
        assert merged.shape == stack.shape[1:]
        assert merged.dtype == torch.float32
        assert merged.isfinite().all()
    assert all(map(torch.equal, stacks, before))


@every_method
def test_zero_gives_zero(cls: type[MergeMethod]):
    for merged in merge_each(cls, [torch.zeros_like(stack) for stack in model_for(cls)]):
        assert torch.equal(merged, torch.zeros_like(merged))


@every_method
def test_one_tensor_or_one_expert_of_zeros_is_finite(cls: type[MergeMethod]):
    stacks = model_for(cls)
    stacks[0].zero_()
    for stack in stacks:
        stack[-1] = 0
    merged = merge_each(cls, stacks)
    assert torch.equal(merged[0], torch.zeros_like(merged[0]))
    assert all(tensor.isfinite().all() for tensor in merged)


@every_method
def test_same_bytes_on_a_rerun(cls: type[MergeMethod]):
    first, again = merge_each(cls, model_for(cls)), merge_each(cls, model_for(cls))
    assert [t.numpy().tobytes() for t in first] == [t.numpy().tobytes() for t in again]


@every_method
def test_computes_on_the_device_of_its_input(cls: type[MergeMethod]):
    expected = merge_each(cls, model_for(cls))
    with PretendDevice():
        merged = merge_each(cls, [stack.to(DEVICE) for stack in model_for(cls)])
        assert {tensor.device for tensor in merged} == {DEVICE}
        assert all(map(torch.equal, [tensor.cpu() for tensor in merged], expected))


@every_method
def test_layout_in_memory_is_free(cls: type[MergeMethod]):
    """A stack that is not contiguous merges as its contiguous copy does."""
    stacks = [stack.movedim(0, -1).contiguous().movedim(-1, 0) for stack in model_for(cls)]
    plain_tensors = merge_each(cls, model_for(cls))
    for strided, plain in zip(merge_each(cls, stacks), plain_tensors, strict=True):
        torch.testing.assert_close(strided, plain)


@every_method
def test_order_of_experts_is_free_where_declared(cls: type[MergeMethod]):
    if not cls.order_free:
        pytest.skip(f"{cls.name} declares that the order of experts matters")
    stacks = model_for(cls)
    shuffled = merge_each(cls, [stack.roll(1, dims=0) for stack in stacks])
    for merged, other in zip(merge_each(cls, stacks), shuffled, strict=True):
        torch.testing.assert_close(merged, other, rtol=1e-5, atol=1e-5)


@every_method
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_merge_as_their_products_do(
    cls: type[MergeMethod], shape: tuple[int, int], transposed: bool
):
    factors, built = adapters(cls.takes or 3, *shape, rank=2), method_of(cls)
    site = Site("a.weight", shape, transposed=transposed)
    merged = built.merge_factors(factors, site=site)
    expected = built.apply(products(factors), site=site)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


COPIES = [
    ("average", {}, 0),
    ("cart", {}, 0),
    ("core_space", {"rule": "ties", "density": 1.0}, 1e-4),
    ("dare_ties", {"density": 1.0}, 0),
    ("karcher", {}, 1e-5),
    ("knots", {"density": 1.0}, 1e-4),
    ("model_stock", {}, 1e-5),
    ("ties", {"density": 1.0}, 0),
]


@pytest.mark.parametrize(("name", "settings", "tolerance"), COPIES)
@pytest.mark.parametrize("experts", [1, 2, 3, 5])
def test_copies_of_one_vector_merge_to_it(
    name: str, settings: dict, tolerance: float, experts: int
):
    if refusal := build(MERGE_METHODS[name], settings).check(experts, has_base=True):
        pytest.skip(refusal)
    stacks = [stack.repeat(experts, *[1] * (stack.ndim - 1)) for stack in model(experts=1)]
    merged_tensors = merge_each(lookup(MERGE_METHODS, name), stacks, **settings)
    for merged, stack in zip(merged_tensors, stacks, strict=True):
        torch.testing.assert_close(merged, stack[0], rtol=0, atol=tolerance)


@every_method
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_rows_cut_apart_merge_as_the_whole_does(
    cls: type[MergeMethod], experts: int, rows: int, monkeypatch: pytest.MonkeyPatch
):
    """Where a method is entry-wise, a tensor in blocks of rows gives the same bytes as whole.

    Its passes are cut in the same blocks; blocks inside the method are cut elsewhere.
    """
    if cls.takes not in (None, experts):
        pytest.skip(f"{cls.name} takes {cls.takes} models")
    built = method_of(cls)
    pieces: dict[str, list[tuple[Site, torch.Tensor]]] = {}
    whole: dict[str, tuple[Site, torch.Tensor]] = {}
    for key, stack in reals(experts).items():
        site = Site(key, tuple(stack.shape[1:]))
        whole[key] = site, stack
        if stack.ndim > 1 + cls.whole_rows and built.entrywise(site):
            row = stack[0, 0].numel()
            starts = range(0, stack.shape[1], rows)
            cut = [stack[:, start : start + rows] for start in starts]
            sites = [Site(key, site.shape, start * row) for start in starts]
            pieces[key] = list(zip(sites, cut, strict=True))
        else:
            pieces[key] = [(site, stack)]
    statistics = cut_statistics = None
    if built.passes_over == "model":
        statistics = built.statistics(whole.values())
        flat = [piece for of_tensor in pieces.values() for piece in of_tensor]
        cut_statistics = built.statistics(flat)
    for key, (site, stack) in whole.items():
        monkeypatch.undo()
        expected = built.apply(stack, statistics, site)
        monkeypatch.setattr(_deltas, "BLOCK", 36)
        own = cut_statistics or built.statistics(pieces[key])
        merged = [built.apply(part, own, place) for place, part in pieces[key]]
        joined = torch.cat(merged) if stack.ndim > 1 else merged[0]
        assert joined.numpy().tobytes() == expected.numpy().tobytes(), key
