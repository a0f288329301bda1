"""TIES: by hand, against PEFT tensor by tensor, against sorting over the whole model."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft.utils import merge_utils
from registered import merged_as_model

from personae import TIES, ties
from personae.errors import MethodError
from personae.methods import MERGE_METHODS, build, lookup

Model = list[torch.Tensor]


shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4)


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Stacked task vectors of several tensors; small integers, so sums are exact and ties many."""
    experts = draw(st.integers(1, 4))
    most = draw(st.sampled_from([1, 3, 9]))
    arrays = [
        draw(hnp.arrays(np.float32, (experts, *shape), elements=st.integers(-most, most)))
        for shape in draw(shapes)
    ]
    return [torch.from_numpy(array) for array in arrays]


def naive_ties(
    model: Model, density: float, reduce: str = "mean", elect: str = "mass", scale: float = 1.0
) -> Model:
    """Flatten everything, sort, loop over positions: methods.md 4.3 word by word."""
    experts = len(model[0])
    flat = np.concatenate([t.reshape(experts, -1).numpy() for t in model], axis=1)
    flat = flat.astype(np.float64)
    k = max(1, int(density * flat.shape[1] + 1e-9))
    thresholds = np.sort(np.abs(flat), axis=1)[:, ::-1][:, k - 1]
    trimmed = np.where(np.abs(flat) >= thresholds[:, None], flat, 0)
    votes = trimmed if elect == "mass" else np.sign(trimmed)
    signs = np.sign(votes.sum(axis=0))
    majority = np.sign(signs.sum())
    merged = np.zeros(flat.shape[1])
    for p in range(flat.shape[1]):
        sign = signs[p] or majority
        agreeing = [value for value in trimmed[:, p] if value and np.sign(value) == sign]
        if agreeing:
            merged[p] = {
                "mean": np.mean(agreeing),
                "sum": np.sum(agreeing),
                "max": sign * np.max(np.abs(agreeing)),
            }[reduce]
    ends = np.cumsum([t[0].numel() for t in model])[:-1]
    pieces = np.split(scale * merged, ends)
    return [
        torch.from_numpy(piece).float().reshape(t[0].shape)
        for piece, t in zip(pieces, model, strict=True)
    ]


def test_hand_worked_three_experts():
    task_vectors = torch.tensor(
        [
            [4.0, -1.0, 2.0, 0.5],  # keep 2 of 4 ->  4  0  2  0
            [-1.0, 3.0, 2.0, 0.1],  #             ->  0  3  2  0
            [-6.0, 2.0, 1.0, 0.0],  #             -> -6  2  0  0
        ]
    )  # signed mass                            -2  5  4  0, so signs - + + and the majority +
    expected: dict[Any, list[float]] = {
        "mean": [-6.0, 2.5, 2.0, 0.0],
        "sum": [-6.0, 5.0, 4.0, 0.0],
        "max": [-6.0, 3.0, 2.0, 0.0],
    }
    for reduce, values in expected.items():
        merged = ties(task_vectors, density=0.5, scope="tensor", reduce=reduce)
        assert torch.equal(merged, torch.tensor(values))


def test_votes_by_count():
    # Mass: 5 - 1 - 1 = 3, so +. One vote each: 1 - 2 = -1, so -, and the mean of -1 and -1.
    task_vectors = torch.tensor([[5.0], [-1.0], [-1.0]])
    settings: dict[str, Any] = {"density": 1.0, "scope": "tensor"}
    assert ties(task_vectors, elect="mass", **settings).tolist() == [5.0]
    assert ties(task_vectors, elect="count", **settings).tolist() == [-1.0]


def test_an_undecided_entry_takes_the_majority_of_its_scope():
    # Signs over the model: 0 in the first tensor, - - + in the second: majority -1.
    model = [torch.tensor([[2.0], [-2.0]]), torch.tensor([[-1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])]
    merged = merged_as_model(TIES(density=1.0), model)
    assert merged[0].tolist() == [-2.0]
    # Alone, the first tensor has no majority either: nothing wins.
    merged = merged_as_model(TIES(density=1.0, scope="tensor"), model)
    assert merged[0].tolist() == [0.0]


def test_trimming_over_the_model_differs_from_trimming_each_tensor():
    # Density 0.5 keeps 2 of 4: both in the second tensor, or the larger one of each.
    model = [torch.tensor([[1.0, 2.0]]), torch.tensor([[30.0, 40.0]])]
    over_model = merged_as_model(TIES(density=0.5), model)
    assert [t.tolist() for t in over_model] == [[0.0, 0.0], [30.0, 40.0]]
    each = merged_as_model(TIES(density=0.5, scope="tensor"), model)
    assert [t.tolist() for t in each] == [[0.0, 2.0], [0.0, 40.0]]


@given(
    models(),
    st.sampled_from([0.1, 0.2, 0.5, 1.0]),
    st.sampled_from(["mean", "sum", "max"]),
    st.sampled_from(["mass", "count"]),
    st.sampled_from([1.0, 0.5, -2.0]),
)
def test_whole_model_equals_flatten_and_sort(
    model: Model, density: float, reduce: str, elect: str, scale: float
):
    settings: dict[str, Any] = {
        "density": density,
        "reduce": reduce,
        "elect": elect,
        "scale": scale,
    }
    expected = naive_ties(model, **settings)
    whole = merged_as_model(TIES(**settings), model)
    for merged, value in zip(whole, expected, strict=True):
        torch.testing.assert_close(merged, value, rtol=3e-7, atol=0)
    for task_vectors in model:
        merged = ties(task_vectors, scope="tensor", **settings)
        value = naive_ties([task_vectors], **settings)[0]
        torch.testing.assert_close(merged, value, rtol=3e-7, atol=0)


def test_whole_model_with_many_entries_and_ties(monkeypatch: pytest.MonkeyPatch):
    """Several blocks, real numbers of bf16 precision, and one entry in three cancelling."""
    generator = torch.Generator().manual_seed(7)
    model = [torch.randn(4, 30, 10, generator=generator).bfloat16().float() for _ in range(3)]
    for task_vectors in model:
        task_vectors.view(4, -1)[1::2, ::3] = -task_vectors.view(4, -1)[::2, ::3]
    expected = naive_ties(model, 0.4)
    monkeypatch.setattr("personae.methods._deltas.BLOCK", 37)
    merged = merged_as_model(TIES(density=0.4), model)
    for ours, theirs in zip(merged, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)
    undecided = sum(int((t.view(4, -1)[:, ::3].sum(0) == 0).sum()) for t in model)
    assert undecided == 300  # the case is there: 100 entries in each of the 3 tensors


@given(models())
def test_order_of_tensors_is_free(model: Model):
    forward = merged_as_model(TIES(density=0.5), model)
    backward = merged_as_model(TIES(density=0.5), model[::-1])[::-1]
    assert all(map(torch.equal, forward, backward))


@pytest.mark.parametrize(("elect", "theirs"), [("mass", "total"), ("count", "frequency")])
@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("weight", [1.0, (0.5, 2.0, 1.0), (1.0, -1.5, 0.7)])
def test_against_peft(elect: Any, theirs: str, density: float, weight: Any):
    """PEFT trims each tensor, with the same k.

    Known differences, avoided here: its votes are not weighted, so that it is given task vectors
    that are (which changes nothing about what is trimmed). It calls an undecided entry positive,
    breaks ties at the threshold arbitrarily, and keeps nothing where int(density * numel) is 0. An
    odd number of experts of continuous values has no undecided mass, and density 1 would skip its
    trimming.
    Votes by count are often undecided; there the entries are compared where they are decided.
    """
    generator = torch.Generator().manual_seed(3)
    task_vectors = torch.randn(3, 40, 25, generator=generator)
    merged = ties(task_vectors, density=density, scope="tensor", elect=elect, weight=weight)
    weighted = list(task_vectors * (torch.ones(3) * torch.tensor(weight))[:, None, None])
    expected = merge_utils.ties(weighted, torch.ones(3), density, theirs)  # pyright: ignore
    decided = torch.ones_like(merged, dtype=torch.bool)
    if elect == "count":
        kept = [merge_utils.prune(t, density, "magnitude").sign() for t in weighted]
        decided = torch.stack(kept).sum(dim=0) != 0
        assert 0.3 < decided.float().mean() < 1
    torch.testing.assert_close(merged[decided], expected[decided])


def test_trimming_against_peft():
    """`magnitude_prune` adds up what is trimmed: the sum of TIES where all signs agree."""
    task_vectors = torch.rand(3, 40, 25, generator=torch.Generator().manual_seed(3))
    weight = (0.5, 2.0, 1.0)
    expected = merge_utils.magnitude_prune(list(task_vectors), torch.tensor(weight), 0.3)
    merged = ties(task_vectors, density=0.3, scope="tensor", reduce="sum", weight=weight)
    torch.testing.assert_close(merged, expected)


def test_weights_and_densities_of_each_expert_by_hand():
    task_vectors = torch.tensor(
        [
            [4.0, -1.0, 2.0, 0.5],  # keep 2 of 4, times 1   ->  4   0   2   0
            [-1.0, 3.0, 2.0, 0.1],  # keep 1 of 4, times 4   ->  0  12   0   0
            [-6.0, 2.0, 1.0, 1.0],  # keep 4 of 4, times -1  ->  6  -2  -1  -1
        ]
    )  # sums 10 10 1 -1; agreeing 4 6 | 12 | 2 | -1
    settings: dict[str, Any] = {"density": (0.5, 0.25, 1.0), "weight": (1.0, 4.0, -1.0)}
    assert ties(task_vectors, **settings).tolist() == [5.0, 12.0, 2.0, -1.0]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_a_sum_within_rounding_of_nothing_is_summed_exactly(order: list[int]):
    # 1 + 2^-24 - 1 is 0 in fp32 from the left, 2^-24 exactly; 1 + 2^-24 rounds to 1.
    # Positive wins: the mean of 1 and 2^-24 is 0.5 + 2^-25, which fp32 holds as 0.5.
    # In the second entry -(1 + 2^-23) + 1 + 2^-24 = -2^-24 < 0.
    values = torch.tensor([[1.0, 1.0], [2.0**-24, 2.0**-24], [-1.0, -1.0 - 2.0**-23]])
    merged = ties(values[order], density=1.0)
    assert merged.tolist() == [0.5, -1.0 - 2.0**-23]


def test_one_expert_at_full_density_is_itself():
    task_vectors = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ties(task_vectors, density=1.0), task_vectors[0])


def test_parameters_are_refused_with_their_names():
    method = lookup(MERGE_METHODS, "ties")
    with pytest.raises(
        MethodError,
        match=r"(?s)scope = 'layer'.*'model' or 'tensor'.*no parameter 'densty'.*'density'",
    ):
        build(method, {"densty": 0.2, "scope": "layer"})
    with pytest.raises(MethodError, match="density = 20"):
        build(method, {"density": 20})
