"""SLERP, Karcher mean and Model Stock: by hand, against fp64, and through files."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from families import saved
from personae import (
    SLERP,
    Karcher,
    ModelStock,
    MultiSLERP,
    NuSLERP,
    karcher,
    merge_state_dicts,
    model_stock,
    multislerp,
    nuslerp,
    slerp,
)
from personae.commands.merge import merge
from personae.errors import MethodError, PersonaeError
from toys import load


def test_slerp_by_hand():
    # (1, 0) and (0, 2) are at 90°: sin 45° / sin 90° of each at t = 1/2, sin 60°, sin 30° at 1/3.
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    half = math.sqrt(0.5)
    torch.testing.assert_close(slerp([first, second]), torch.tensor([half, 2 * half]))
    third = slerp([first, second], t=1 / 3)
    torch.testing.assert_close(third, torch.tensor([math.sqrt(0.75), 2 * 0.5]))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_keeps_length_and_turns_evenly(t: float):
    generator = torch.Generator().manual_seed(0)
    pair = torch.nn.functional.normalize(torch.randn(2, 768 * 100, generator=generator), dim=1)
    merged = slerp(pair, t=t).double()
    assert merged.norm() == pytest.approx(1, abs=1e-6)
    whole = math.acos(pair[0].double() @ pair[1].double())
    assert math.acos(min(1, merged @ pair[0].double())) == pytest.approx(t * whole, abs=1e-3)


@pytest.mark.parametrize(
    ("first", "second"), [([2.0, 0.0], [1.0, 0.0]), ([2.0, 0.0], [-1.0, 0.0]), ([2.0, 0.0], [0, 0])]
)
@pytest.mark.parametrize("linear_above", [0.9995, 1.0])
def test_slerp_of_what_has_no_arc_is_a_line(first: list, second: list, linear_above: float):
    merged = slerp([torch.tensor(first), torch.tensor(second)], t=0.25, linear_above=linear_above)
    torch.testing.assert_close(merged, 0.75 * torch.tensor(first) + 0.25 * torch.tensor(second))


def test_slerp_of_near_models_is_a_line_unless_asked():
    # At an angle of 0.02 the cosine is 0.9998: the arc's middle is 1 / cos 0.01 times the line's.
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(0.02), math.sin(0.02)])
    line = (first + second) / 2
    torch.testing.assert_close(slerp([first, second]), line)
    arc = slerp([first, second], linear_above=1.0)
    torch.testing.assert_close(arc, line / math.cos(0.01), rtol=1e-6, atol=0)
    assert not torch.equal(arc, line)


def test_karcher_by_hand():
    # Lengths 1, 2, 3 along the axes: the direction (1, 1, 1) / √3 at the mean length, 2.
    merged = karcher(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    torch.testing.assert_close(merged, torch.full((3,), 2 / math.sqrt(3)))


def test_karcher_of_two_is_the_middle_of_the_arc():
    pair = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 5.0]])
    torch.testing.assert_close(karcher(pair), slerp(pair))


def test_karcher_weighs():
    # Weights 3 and 1 of a right angle: a quarter of the way.
    pair = torch.eye(2)
    torch.testing.assert_close(karcher(pair, weight=(3.0, 1.0), tol=1e-9), slerp(pair, t=0.25))


def test_karcher_minimises_the_squared_arcs():
    generator = np.random.default_rng(0)
    models = generator.normal(size=(4, 6)) + 1.5
    units = models / np.linalg.norm(models, axis=1, keepdims=True)

    def cost(point: np.ndarray) -> float:
        direction = point / np.linalg.norm(point)
        return float((np.arccos(np.clip(units @ direction, -1, 1)) ** 2).sum())

    best = minimize(cost, units.mean(axis=0), tol=1e-14).x
    expected = best / np.linalg.norm(best) * np.linalg.norm(models, axis=1).mean()
    merged = karcher(models, max_iter=100, tol=1e-9)
    np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_karcher_of_zeros_and_of_opposites():
    zeros = torch.zeros(2, 3)
    assert torch.equal(karcher(zeros), torch.zeros(3))
    with_zero = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(karcher(with_zero), torch.tensor([0.0, 2.0]))
    opposites = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert karcher(opposites).isfinite().all()


def test_model_stock_by_hand():
    # cos 45° = 0.7071: t = 2 · 0.7071 / (1 + 0.7071) = 0.8284, times the mean (1, 1/2).
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(model_stock(vectors), 0.8284271 * torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize(("angle", "share"), [(0, 1.0), (60, 0.75), (90, 0.0), (150, 0.0)])
def test_model_stock_by_the_angle(angle: float, share: float):
    # Three vectors at 60°: 3 · 0.5 / (1 + 2 · 0.5) = 0.75. Beyond 90° the base is kept.
    cosine = math.cos(math.radians(angle))
    gram = np.full((3, 3), cosine) + (1 - cosine) * np.eye(3)
    np.testing.assert_allclose(ModelStock().solve(gram), np.full(3, share / 3), atol=1e-12)


def test_model_stock_of_rows():
    # Rows at 60° and at 90°: 2 · 0.5 / 1.5 of their mean, and none.
    half = math.sqrt(0.75)
    stack = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.5, half], [3.0, 0.0]]])
    merged = model_stock(stack, filter_wise=True)
    torch.testing.assert_close(merged[0], (stack[0, 0] + stack[1, 0]) / 3)
    torch.testing.assert_close(merged[1], torch.zeros(2), rtol=0, atol=1e-6)


def test_nuslerp_by_hand():
    # At 90°, of weights 1 and 3: t = 3/4, sin 22.5° and sin 67.5° of each.
    first, second = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    near, far = math.sin(math.pi / 8), math.sin(3 * math.pi / 8)
    for settings in ({}, {"nuslerp_flatten": False}):
        merged = nuslerp([first, second], weight=(1.0, 3.0), **settings)
        torch.testing.assert_close(merged, near * first + far * second)
    # Rows of one model are alike: the first is parallel to the other's, the second at 90° to it.
    first, second = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    half = math.sqrt(0.5)
    merged = nuslerp([first, second], nuslerp_flatten=False)
    torch.testing.assert_close(merged, torch.tensor([[2.0, 0.0], [half, 3 * half]]))
    # So are columns of the transposed ones.
    columns = [first.T.contiguous(), second.T.contiguous()]
    merged_columns = nuslerp(columns, nuslerp_flatten=False, nuslerp_row_wise=True)
    torch.testing.assert_close(merged_columns, merged.T)


def test_multislerp_by_hand():
    # Directions (1, 0) and (0, 1) of weights 1/4 and 3/4: (1, 3) / √10 at length (4 + 3 · 2) / 4.
    stack = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    merged = multislerp(stack, weight=(1.0, 3.0))
    torch.testing.assert_close(merged, 2.5 / math.sqrt(10) * torch.tensor([1.0, 3.0]))
    # Opposite directions cancel: what they add up to.
    opposite = torch.tensor([[4.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(multislerp(opposite, weight=3.0), torch.tensor([2 / 3, 0.0]))
    with pytest.raises(MethodError, match="sum of the weights, which is 0"):
        multislerp(stack, weight=(1.0, -1.0))


@pytest.mark.parametrize("method", [NuSLERP(), NuSLERP(nuslerp_flatten=False), MultiSLERP()])
def test_they_turn_around_the_base_if_there_is_one(method: NuSLERP | MultiSLERP, tmp_path):
    """Of a base, task vectors; without one the models. In memory and through files."""
    base, one, other = family(torch.float32)
    paths = [saved(state, tmp_path / str(n)) for n, state in enumerate((base, one, other))]
    named = dict(zip("ab", paths[1:], strict=True))
    for start in (base, None):
        merge(paths[0] if start else None, named, tmp_path / f"out-{start is None}", method)
        written = load(tmp_path / f"out-{start is None}")
        held = merge_state_dicts(start, [one, other], method)
        for name in base:
            origin = start[name] if start else torch.zeros(base[name].shape)
            wanted = origin + method(torch.stack([one[name] - origin, other[name] - origin]))
            torch.testing.assert_close(written[name], wanted)
            torch.testing.assert_close(held[name], wanted)


def family(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """A base and two experts: matrices of real size, a vector, a scalar."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (300, 700), "b.bias": (50,), "c.scale": ()}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = [
        {name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        for _ in range(2)
    ]
    return [{name: t.to(dtype) for name, t in state.items()} for state in (base, *experts)]


def models_of(states: list[dict[str, torch.Tensor]], name: str) -> np.ndarray:
    """The models' tensors of one name, flat, in fp64."""
    return np.stack([state[name].double().numpy().ravel() for state in states])


def check(out: dict[str, torch.Tensor], states: list, expected, dtype: torch.dtype) -> None:
    """Each tensor is that of fp64, to a rounding of its dtype."""
    for name, tensor in out.items():
        want = torch.from_numpy(np.asarray(expected(models_of(states, name))))
        assert tensor.dtype == dtype
        atol = float(want.abs().max()) * torch.finfo(dtype).eps * 2
        torch.testing.assert_close(tensor.double().ravel(), want, rtol=0, atol=atol)


def arc(pair: np.ndarray, t: float) -> np.ndarray:
    """SLERP in fp64, by the formula; the line above a cosine of 0.9995."""
    cosine = pair[0] @ pair[1] / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1])
    if abs(cosine) >= 0.9995:
        return (1 - t) * pair[0] + t * pair[1]
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * pair[0] + math.sin(t * angle) * pair[1]) / math.sin(angle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_base", [True, False])
def test_slerp_through_files_and_in_memory(tmp_path, dtype: torch.dtype, with_base: bool):
    base, one, other = family(dtype)
    pair = [base, one] if with_base else [one, other]
    paths = [saved(state, tmp_path / str(n)) for n, state in enumerate(pair)]
    named = {"a": paths[0], "b": paths[1]}
    if with_base:
        merge(paths[0], {"b": paths[1]}, tmp_path / "out", SLERP(t=0.3))
        held = merge_state_dicts(base, [one], SLERP(t=0.3))
    else:
        merge(None, named, tmp_path / "out", SLERP(t=0.3))
        held = merge_state_dicts(None, [one, other], SLERP(t=0.3))
    out = load(tmp_path / "out")
    check(out, pair, lambda models: arc(models, 0.3), dtype)
    check(held, pair, lambda models: arc(models, 0.3), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_stock_through_files(tmp_path, dtype: torch.dtype):
    states = family(dtype)
    base, *experts = (saved(state, tmp_path / str(n)) for n, state in enumerate(states))
    merge(base, dict(zip("ab", experts, strict=True)), tmp_path / "out", ModelStock())

    def expected(models: np.ndarray) -> np.ndarray:
        one, other = models[1:] - models[0]
        cosine = max(one @ other / np.linalg.norm(one) / np.linalg.norm(other), 0)
        return models[0] + 2 * cosine / (1 + cosine) * (one + other) / 2

    check(load(tmp_path / "out"), states, expected, dtype)


def test_karcher_leaves_the_base_out(tmp_path):
    base, one, other = family(torch.float32)
    with_base = merge_state_dicts(base, [one, other], Karcher())
    without = merge_state_dicts(None, [one, other], Karcher())
    for name, tensor in with_base.items():
        torch.testing.assert_close(tensor, without[name])


def test_what_they_need_is_said():
    base, one, other = family(torch.float32)
    with pytest.raises(MethodError, match=r"slerp is between two models, and here are 3"):
        slerp(torch.ones(3, 2))
    with pytest.raises(PersonaeError, match=r"the base and 2 expert.*karcher"):
        merge_state_dicts(base, [one, other], SLERP())
    with pytest.raises(PersonaeError, match=r"model_stock needs a base"):
        merge_state_dicts(None, [one, other], ModelStock())
    with pytest.raises(PersonaeError, match=r"Give at least two"):
        merge_state_dicts(base, [one], ModelStock())
    with pytest.raises(PersonaeError, match=r"all weights are 0"):
        merge_state_dicts(base, [one], Karcher(weight=0.0))
