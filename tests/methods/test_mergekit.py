"""What mergekit means by its methods, by hand. `test_against_mergekit.py` asks mergekit itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from registered import merged_as_model, mergekits
from safetensors.torch import load_file

from drawn_masks import give_masks
from families import small_base, tuned
from personae.commands.merge import merge as merge_files
from personae.commands.state_dicts import merge_state_dicts
from personae.errors import Faults, MethodError
from personae.methods import MERGEKIT_METHODS, Site, build, lookup

TASK_VECTORS = torch.tensor(
    [
        [4.0, -1.0, 2.0, 0.5],  # density 0.5 keeps 2 of 4:  4  0  2  0
        [-1.0, 3.0, 2.0, 0.1],  #                            0  3  2  0
        [-6.0, 2.0, 1.0, 0.0],  #                           -6  2  0  0
    ]
)


def merge(method: str, task_vectors: torch.Tensor, **settings: Any) -> list[float]:
    return mergekits(method, **settings)(task_vectors, name="w").tolist()


def test_linear():
    # (2·4 + 1·-1 + 1·-6) / 4, (2·-1 + 3 + 2) / 4, (4 + 2 + 1) / 4, (1 + 0.1 + 0) / 4
    merged = merge("linear", TASK_VECTORS, weight=(2.0, 1.0, 1.0))
    assert merged == pytest.approx([0.25, 0.75, 1.75, 0.275])


def test_task_arithmetic():
    settings: dict[str, Any] = {"weight": (2.0, 1.0, 1.0), "lambda": 0.5}
    merged = merge("task_arithmetic", TASK_VECTORS, **settings)
    assert merged == pytest.approx([0.5, 1.5, 3.5, 0.55])
    # Divided by 4; weights 1, 1, -2 sum to 0 and are divided by 1.
    merged = merge("task_arithmetic", TASK_VECTORS, normalize=True, **settings)
    assert merged == pytest.approx([0.125, 0.375, 0.875, 0.1375])
    merged = merge("task_arithmetic", TASK_VECTORS, normalize=True, weight=(1.0, 1.0, -2.0))
    assert merged == pytest.approx([15.0, -2.0, 2.0, 0.6])


def test_ties_divides_by_the_weights_that_agree():
    # Weighted 2, 1, 1: 8 0 4 0 | 0 3 2 0 | -6 2 0 0; sums 2 5 6 0, all +.
    # Agreeing: 8/2 | (3 + 2)/2 | (4 + 2)/3 | none.
    settings: dict[str, Any] = {"weight": (2.0, 1.0, 1.0), "density": 0.5}
    assert merge("ties", TASK_VECTORS, **settings) == [4.0, 2.5, 2.0, 0.0]
    assert merge("ties", TASK_VECTORS, normalize=False, **settings) == [8.0, 5.0, 6.0, 0.0]
    assert merge("ties", TASK_VECTORS, **{"lambda": 0.5}, **settings) == [
        2.0,
        1.25,
        1.0,
        0.0,
    ]


def test_ties_keeps_as_many_as_there_of_entries_that_tie():
    # Two of four: 3 and the first of the three 2s; at 0.75 two of them.
    task_vectors = torch.tensor([[2.0, -3.0, 2.0, -2.0]])
    assert merge("ties", task_vectors, density=0.5) == [2.0, -3.0, 0.0, 0.0]
    assert merge("ties", task_vectors, density=0.75) == [2.0, -3.0, 2.0, 0.0]
    assert merge("ties", task_vectors, density=1.0) == [2.0, -3.0, 2.0, -2.0]
    # The norm 9 is restored from what is kept, 5.
    restored = merge("ties", task_vectors, density=0.5, rescale=True)
    assert restored == pytest.approx([2 * 9 / 5, -3 * 9 / 5, 0.0, 0.0])


@pytest.mark.parametrize("shape", [(300, 257), (1, 5), (70_001,)])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_keeps_exactly_k_of_bf16_differences(shape: tuple[int, ...], density: float):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator).bfloat16()
    experts = [(base + 0.01 * torch.randn(shape, generator=generator)).bfloat16() for _ in "ab"]
    for expert in experts:
        delta = (expert.float() - base.float())[None]
        kept = torch.tensor(merge("ties", delta, density=density)).flatten()
        k = max(1, int(density * kept.numel()))
        order = delta.abs().flatten().sort(descending=True, stable=True).indices[:k]
        expected = torch.zeros_like(kept)
        expected[order] = delta.flatten()[order]
        assert torch.equal(kept, expected)


def test_ties_trims_rows_as_it_trims_the_whole():
    """Rows are merged apart: the cut is a place in the tensor."""
    entry = lookup(MERGEKIT_METHODS, "ties")
    built = build(entry, {"weight": 1.0, "density": 0.3})
    task_vectors = torch.randint(-3, 4, (2, 40, 25), generator=torch.Generator().manual_seed(0))
    task_vectors = task_vectors.float()
    site = Site("w", (40, 25))
    statistics = built.statistics([(site, task_vectors)])
    whole = built.apply(task_vectors, statistics, site)
    rows = [
        built.apply(task_vectors[:, n : n + 8], statistics, replace(site, start=25 * n))
        for n in range(0, 40, 8)
    ]
    assert torch.equal(torch.cat(rows), whole)
    alone = built.apply(task_vectors[:1], site=site)
    assert int((alone != 0).sum()) == 300


def test_ties_calls_an_undecided_sum_positive_and_trims_each_tensor():
    model = [torch.tensor([[2.0], [-2.0]]), torch.tensor([[-1.0, -1.0, 3.0], [-1.0, -1.0, 3.0]])]
    merged = merged_as_model(mergekits("ties", density=0.5), model)
    # k = int(0.5 · 1) = 0 is raised to 1; int(0.5 · 3) = 1 keeps the 3 alone.
    assert [t.tolist() for t in merged] == [[2.0], [0.0, 0.0, 3.0]]


def test_a_negative_weight_flips_vote_and_divisor():
    # 1·2 - 0.5·1 = 1.5 elects +; only the first agrees: 2/1. Second: 1·2 - 0.5·-2 = 3, both agree,
    # divided by 1 - 0.5: 6. There is no guard, as there is none in mergekit.
    merged = merge("ties", torch.tensor([[2.0, 2.0], [1.0, -2.0]]), weight=(1.0, -0.5))
    assert merged == [2.0, 6.0]


def test_ties_restores_the_norm_if_asked_to():
    # Norms 7.5, 6.1, 9; kept 6, 5, 8. Sums of signs: 4·1.25 - 6·1.125 < 0, the others are +.
    merged = merge("ties", TASK_VECTORS, density=0.5, rescale=True)
    expected = [-6 * 9 / 8, (3 * 6.1 / 5 + 2 * 9 / 8) / 2, (2 * 1.25 + 2 * 6.1 / 5) / 2, 0.0]
    assert merged == pytest.approx(expected)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given masks in place of drawn ones."""
    give_masks(monkeypatch, [[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 1]])


@pytest.mark.usefixtures("masks")
def test_dare_matches_the_norm_and_not_the_density():
    # Kept: 4 -1 0 0.5 | 0 3 2 0.1 | -6 0 0 0, with norms 5.5 of 7.5, 5.1 of 6.1, 6 of 9.
    a, b, c = 7.5 / 5.5, 6.1 / 5.1, 1.5
    merged = merge("dare_linear", TASK_VECTORS, density=0.9, weight=(1.0, 2.0, 1.0))
    assert merged == pytest.approx([4 * a - 6 * c, -a + 6 * b, 4 * b, 0.5 * a + 0.2 * b], rel=1e-6)
    merged = merge("dare_linear", TASK_VECTORS, density=0.9, rescale=False, normalize=True)
    assert merged == pytest.approx([-2 / 3, 2 / 3, 2 / 3, 0.2])
    # Elected - + + +: what agrees, added up.
    merged = merge("dare_ties", TASK_VECTORS, density=0.9, weight=(1.0, 2.0, 1.0))
    assert merged == pytest.approx([-6 * c, 6 * b, 4 * b, 0.5 * a + 0.2 * b], rel=1e-6)
    merged = merge("dare_ties", TASK_VECTORS, density=0.9, rescale=False, normalize=True)
    assert merged == pytest.approx([-6.0, 3.0, 2.0, 0.3])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_at_density_one_drops_nothing(method: str):
    merged = merge(method, TASK_VECTORS[:1])
    assert merged == TASK_VECTORS[0].tolist()


def test_every_weight_has_to_be_given_and_lambda_has_its_name():
    weighted = [m for m in MERGEKIT_METHODS.values() if "weight" in m.fields()]
    assert len(weighted) == 9
    for method in weighted:
        with pytest.raises(MethodError, match="weight"):
            build(method, {})
    with pytest.raises(MethodError, match=r"ties has no parameter 'lamda'\. Did you mean 'lambda'"):
        build(lookup(MERGEKIT_METHODS, "ties"), {"weight": 1.0, "lamda": 0.5})


def test_linear_refuses_what_would_be_no_model():
    faults, built = Faults(), mergekits("linear", weight=(1.0, -1.0))
    built.check_experts(2, faults, has_base=True)
    text = "linear divides by the sum of the weights, and 1, -1 sum to 0"
    with pytest.raises(MethodError, match=text):
        faults.raise_if_any(MethodError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_base", [True, False])
def test_linear_without_normalize_is_the_sum_of_the_models(
    tmp_path: Path, has_base: bool, dtype: torch.dtype
):
    base = small_base(dtype=dtype)
    models = [tuned(base, seed, 0.5) for seed in (1, 2)]
    method = mergekits("linear", weight=(0.1, 1.0), normalize=False)
    reference = base if has_base else None
    out = merge_files(reference, dict(zip("ab", models, strict=True)), tmp_path / "out", method)
    written, held = (
        load_file(out / "model.safetensors"),
        merge_state_dicts(reference, models, method),
    )
    for name, tensor in base.items():
        if tensor.is_floating_point():
            exact = 0.1 * models[0][name].double() + models[1][name].double()
            for merged in (written, held):
                torch.testing.assert_close(
                    merged[name], exact.to(dtype), rtol=torch.finfo(dtype).eps * 4, atol=1e-5
                )
