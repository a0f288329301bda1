"""DRM: by hand, against loops over LAPACK's SVD, and the properties that define it."""

from typing import Any

import numpy as np
import pytest
import torch
from registered import merged_as_model

from personae import DRM
from personae.methods import MERGE_METHODS, Site, build, lookup
from personae.methods.merge.drm import decompose, kept_entries, pruned, rows_of_unit_length
from personae.ops.stacks import stacked_svd

WHOLE: dict[str, Any] = {"prune": False, "rank_tolerance": 0.0}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drm(
    task_vectors: torch.Tensor, name: str = "0.weight", transposed: bool = False, **settings: Any
) -> torch.Tensor:
    """DRM on one tensor alone."""
    method = lookup(MERGE_METHODS, "drm")
    site = Site(name, tuple(task_vectors.shape[1:]), transposed=transposed)
    return build(method, settings).apply(task_vectors, site=site)


def naive_drm(
    task_vectors: torch.Tensor,
    *,
    direction: str = "horizontal",
    density: float = 0.2,
    pruning: str = "joint",
    renormalise: bool = True,
    prune: bool = True,
    elect: bool = True,
    disjoint: bool = True,
    rank_tolerance: float = 0.01,
    rank_drop: float = 0.0,
    scale: float = 1.0,
    weight: float | tuple[float, ...] = 1.0,
) -> torch.Tensor:
    """methods.md 8.1 step by step, in fp64, with LAPACK's SVD, sorting and loops over entries."""
    deltas = task_vectors.double().numpy()
    if direction == "vertical":
        deltas = deltas.transpose(0, 2, 1)
    experts, _, columns = deltas.shape
    weights = weight if isinstance(weight, tuple) else (weight,) * experts
    u, values, vh = np.linalg.svd(np.concatenate(list(deltas), axis=1), full_matrices=False)
    rank = int((values > max(rank_tolerance, 1e-10) * values[0]).sum())
    rank = max(1, int((1 - rank_drop) * rank + 1e-9))
    u, values, vh = u[:, :rank], values[:rank], vh[:rank]
    looked = np.zeros((experts, rank, columns))
    sigma = np.zeros((experts, rank))
    for t in range(experts):
        for i in range(rank):
            row = vh[i, t * columns : (t + 1) * columns]
            length = np.sqrt((row**2).sum())
            if length < 1e-12:  # an expert without change: rounding noise
                continue
            length = length if renormalise else 1.0
            looked[t, i] = row / length
            sigma[t, i] = values[i] * length
    if prune:
        scopes = [looked] if pruning == "joint" else list(looked)  # views: pruned in place
        for scope in scopes:
            flat = np.sort(np.abs(scope).ravel())[::-1]
            scope[np.abs(scope) < flat[max(1, round(density * flat.size)) - 1]] = 0
    a = sigma[:, :, None] * looked
    signs = np.sign(a.sum(axis=0))
    majority = np.sign(signs.sum())
    merged = np.zeros((rank, columns))
    for i in range(rank):
        for j in range(columns):
            sign = signs[i, j] or majority
            left = [t for t in range(experts) if not elect or np.sign(a[t, i, j]) == sign]
            divisor = max(1, sum(a[t, i, j] != 0 for t in left)) if disjoint else experts
            merged[i, j] = sum(weights[t] * a[t, i, j] for t in left) / divisor
    result = scale * (u @ merged)
    return torch.from_numpy(result.T if direction == "vertical" else result).float()


def test_hand_worked_two_experts():
    # Side by side the rows are (3 0 | 4 0) and (0 1 | 0 -1): orthogonal, so U = I, σ = 5 and √2.
    task_vectors = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, -1.0]]])
    # V₁ᵀ = (.6 0; 0 .71), V₂ᵀ = (.8 0; 0 -.71). Rows of length 1: (1 0; 0 1), (1 0; 0 -1), with
    # Σ₁ = (3, 1), Σ₂ = (4, 1). 0.5 · 8 = 4 entries: all that are not 0. Sums (7 0; 0 0): the
    # undecided entry takes the majority, +, so the 1 stays. Means: (3 + 4) / 2 and 1 / 1.
    expected = torch.tensor([[3.5, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(drm(task_vectors, density=0.5), expected)
    # Without renormalisation 0.375 · 8 = 3 entries: .8, .71, -.71. The 3 is pruned.
    expected = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(drm(task_vectors, density=0.375, renormalise=False), expected)
    # No election: the 1 and the -1 cancel. Plain mean: half of what is left.
    expected = torch.tensor([[3.5, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(drm(task_vectors, density=0.5, elect=False), expected)
    expected = torch.tensor([[3.5, 0.0], [0.0, 0.5]])
    torch.testing.assert_close(drm(task_vectors, density=0.5, disjoint=False), expected)
    # Weights after counting: (2 · 3 + 0 · 4) / 2 and 2 · 1 / 1.
    expected = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(drm(task_vectors, density=0.5, weight=(2.0, 0.0)), expected)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"direction": "vertical"},
    {"density": 0.5},
    {"pruning": "individual"},
    {"renormalise": False},
    {"renormalise": False, "direction": "vertical", "pruning": "individual"},
    {"prune": False},
    {"elect": False},
    {"disjoint": False},
    {"rank_tolerance": 0.3},
    {"rank_drop": 0.5},
    {"scale": 1.5, "weight": (0.5, 2.0, 0.0)},
]


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(6, 9), (12, 5), (20, 4), (2, 7), (7, 2)], ids=str)
def test_agrees_with_loops_over_lapack(settings: dict[str, Any], shape: tuple[int, int]):
    task_vectors = gaussian(3, *shape, seed=sum(shape))
    if shape == (6, 9):
        task_vectors[1] = 0  # an expert that did not touch the tensor
    merged = drm(task_vectors, **settings)
    torch.testing.assert_close(merged, naive_drm(task_vectors, **settings), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", OPTIONS[1:], ids=str)
def test_every_option_changes_something(settings: dict[str, Any]):
    task_vectors = gaussian(3, 12, 9)
    assert not torch.allclose(drm(task_vectors, **settings), drm(task_vectors), atol=1e-3)


@pytest.mark.parametrize("shape", [(6, 9), (12, 5)], ids=str)
def test_automatic_direction_is_one_of_the_two(shape: tuple[int, int]):
    task_vectors = gaussian(3, *shape)
    both = [drm(task_vectors, direction=d) for d in ("horizontal", "vertical")]
    for criterion in ("auto:rank", "auto:orthogonality"):
        merged = drm(task_vectors, direction=criterion)
        assert sum(torch.equal(merged, one) for one in both) == 1


def test_auto_rank_takes_the_stack_of_fewer_directions():
    # Every expert has its own two columns' span to the left and shares rows: side by side rank
    # 2·3, on top of each other rank 2, and the other way round for the transposes.
    left, right = gaussian(3, 10, 2), gaussian(2, 8, seed=1)
    shares_rows = left @ right
    assert decompose(shares_rows, "auto:rank", 0.01)[1]
    assert not decompose(shares_rows.mT, "auto:rank", 0.01)[1]
    square = gaussian(1, 5, 5)
    assert decompose(square, "auto:rank", 0.01)[1]  # a tie: vertical


def test_auto_orthogonality_takes_the_blocks_that_overlap_less():
    # W₁ = e₁e₁ᵀ, W₂ = e₁e₂ᵀ. Side by side U = e₁ and the blocks of Vᵀ are e₁ᵀ, e₂ᵀ: cosine 0.
    # On top of each other V = (e₁, e₂), the blocks of U are e₁e₁ᵀ, e₁e₂ᵀ: cosine 0 too, a tie.
    tied = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    assert decompose(tied, "auto:orthogonality", 0.01)[1]
    stack = gaussian(4, 12, 3)
    for flipped, side in ((False, stack), (True, stack.mT)):
        scores = []
        for blocks in (side, side.mT):
            beside = torch.cat(list(blocks), dim=1).double()
            vh = torch.linalg.svd(beside, full_matrices=False)[2]
            parts = [part.flatten() for part in vh.split(blocks.shape[2], dim=1)]
            pairs = [
                abs(float(torch.cosine_similarity(a, b, dim=0)))
                for i, a in enumerate(parts)
                for b in parts[:i]
            ]
            scores.append(sum(pairs) / len(pairs))
        vertical = decompose(side, "auto:orthogonality", 0.01)[1]
        assert vertical == (scores[0] >= scores[1]), (flipped, scores)


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_copies_of_one_matrix_merge_to_it(direction: str, experts: int):
    """Properties 1 and 2: one expert, or the same several times, with nothing pruned."""
    matrix = gaussian(7, 10)
    copies = matrix.expand(experts, -1, -1)
    for settings in (WHOLE, WHOLE | {"prune": True, "density": 1.0}):
        merged = drm(copies, direction=direction, **settings)
        torch.testing.assert_close(merged, matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"renormalise": False}, {"direction": "auto:orthogonality"}, {"direction": "auto:rank"}],
    ids=str,
)
def test_experts_without_change_leave_everything_finite(settings: dict[str, Any]):
    """Property 3: nothing changed at all, in one expert, in one row or column."""
    zeros = torch.zeros(3, 6, 8)
    assert torch.equal(drm(zeros, **settings), zeros[0])
    assert torch.equal(drm(zeros, qkv="split", name="a.qkv.weight", **settings), zeros[0])
    some = gaussian(3, 6, 8)
    some[0], some[:, 2], some[:, :, 5] = 0, 0, 0
    assert drm(some, **settings).isfinite().all()


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_order_of_experts_changes_nothing(direction: str):
    """Property 4."""
    task_vectors, weight = gaussian(4, 9, 7), (1.0, 0.5, 2.0, 1.5)
    order = [2, 0, 3, 1]
    merged = drm(task_vectors, direction=direction, weight=weight)
    shuffled = drm(task_vectors[order], direction=direction, weight=tuple(weight[n] for n in order))
    torch.testing.assert_close(merged, shuffled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"pruning": "individual", "rank_drop": 0.3}], ids=str)
def test_vertical_is_horizontal_of_the_transposes(settings: dict[str, Any]):
    """Property 10, first part; weights stored (in, out) are the transposes too."""
    task_vectors = gaussian(3, 9, 6)
    vertical = drm(task_vectors, direction="vertical", **settings)
    torch.testing.assert_close(vertical, drm(task_vectors.mT.contiguous(), **settings).T)
    horizontal = drm(task_vectors, **settings)
    stored_in_out = drm(task_vectors.mT.contiguous(), transposed=True, **settings)
    torch.testing.assert_close(stored_in_out, horizontal.T)
    assert not torch.allclose(horizontal, vertical, atol=1e-3)


def test_rows_have_unit_length_and_their_lengths_go_to_sigma():
    """Property 10, second and third part."""
    stack = gaussian(3, 6, 8)
    stack[2] = 0
    svd = stacked_svd(stack)
    rows = rows_of_unit_length(svd)
    lengths = torch.tensor([1.0, 1.0, 0.0])[:, None].expand(3, 6)
    torch.testing.assert_close(rows.norm(dim=2), lengths)
    sigma = svd.coordinates.norm(dim=2, keepdim=True)
    torch.testing.assert_close(sigma * rows, svd.coordinates)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.37, 1.0])
@pytest.mark.parametrize("renormalise", [True, False])
def test_pruning_keeps_exactly_the_entries_asked_for(density: float, renormalise: bool):
    """Property 10, last part: round(ρ · N · q · d), or round(ρ · q · d) of each."""
    svd = stacked_svd(gaussian(3, 6, 8))
    joint = pruned(svd, density, "joint", renormalise)
    assert int((joint != 0).sum()) == round(density * 3 * 6 * 8) == kept_entries(144, density)
    for of_expert in pruned(svd, density, "individual", renormalise):
        assert int((of_expert != 0).sum()) == max(1, round(density * 6 * 8))


def test_ties_at_the_threshold_do_not_add_entries():
    # Four orthogonal rows of one entry: all of length 1, all equal. 0.5 · 16 = 8; four are not 0.
    svd = stacked_svd(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))[None])
    assert torch.equal(
        pruned(svd, 0.125, "joint", True)[0].diagonal(), torch.tensor([4.0, 3, 0, 0])
    )


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_with_everything_off_it_is_averaging(direction: str, renormalise: bool):
    """Over a whole model, on difference vectors as on task vectors."""
    model = [gaussian(3, 6, 9), gaussian(3, 5, seed=1), gaussian(3, 2, 3, 2, 2, seed=2)]
    off: dict[str, Any] = WHOLE | {"elect": False, "disjoint": False, "renormalise": renormalise}
    whole = merged_as_model(build(DRM, off | {"direction": direction}), model)
    for merged, stack in zip(whole, model, strict=True):
        torch.testing.assert_close(merged, stack.mean(dim=0), rtol=1e-5, atol=1e-6)
    differences = model[0] - model[0].mean(dim=0)
    assert drm(differences, direction=direction, **off).abs().max() < 1e-6
    assert drm(differences, direction=direction).isfinite().all()


def test_others_elect_over_all_of_them_or_are_averaged():
    # Sums 4, 0 and -1, -1: one + and two -, so the undecided entry keeps its -2. Linear weights
    # have no vote.
    model = {
        "a.bias": torch.tensor([[1.0, 2.0], [3.0, -2.0]]),
        "b.bias": torch.tensor([[-3.0, -1.0], [2.0, 0.0]]),
        "c.weight": torch.ones(2, 8, 8),
    }
    merged = merged_as_model(DRM(), model)
    assert merged[0].tolist() == [2.0, -2.0]  # (1 + 3) / 2; -2 alone
    assert merged[1].tolist() == [-3.0, -1.0]  # -3 alone; -1 alone, the 0 does not count
    weighted = merged_as_model(DRM(weight=(2.0, 0.5), scale=2.0), model)
    assert weighted[0].tolist() == [3.5, -2.0]  # 2 (2 · 1 + 0.5 · 3) / 2; 2 · 0.5 · -2
    plain = merged_as_model(DRM(others="paper", weight=(2.0, 0.5)), model)
    assert plain[0].tolist() == [1.75, 1.5]  # (2 · 1 + 0.5 · 3) / 2; (2 · 2 - 0.5 · 2) / 2
    assert torch.equal(plain[2], merged_as_model(DRM(weight=(2.0, 0.5)), model)[2])


def test_embeddings_and_heads_are_others():
    stack = gaussian(3, 8, 6)
    for name in ("embed_tokens.weight", "lm_head.weight", "visual.proj"):
        torch.testing.assert_close(drm(stack, name, others="paper"), stack.mean(dim=0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_fused_attention_weights_can_be_merged_apart(transposed: bool, direction: str):
    stack = gaussian(3, 18, 6)
    axis, name = (2, "h.0.attn.c_attn.weight") if transposed else (1, "attn.in_proj_weight")
    stack = stack.mT.contiguous() if transposed else stack
    apart = [
        drm(part, transposed=transposed, direction=direction) for part in stack.split(6, dim=axis)
    ]
    split = drm(stack, name, transposed, qkv="split", direction=direction)
    assert torch.equal(split, torch.cat(apart, dim=axis - 1))
    assert not torch.allclose(split, drm(stack, name, transposed, direction=direction), atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("direction", ["horizontal", "vertical", "auto:rank"])
@pytest.mark.parametrize("qkv", ["stacked", "split"])
def test_adapters_merge_as_their_products_do(transposed: bool, direction: str, qkv: str):
    """Both sides are larger than the sum of ranks, so that a basis is used where it may be."""
    shape = (20, 60) if transposed else (60, 20)
    name = "attn.qkv.weight"
    factors = [(gaussian(shape[0], 2, seed=n), gaussian(2, shape[1], seed=9 + n)) for n in range(3)]
    method = lookup(MERGE_METHODS, "drm")
    built = build(method, {"direction": direction, "qkv": qkv, "rank_tolerance": 0.0})
    site = Site(name, shape, transposed=transposed)
    dense = built.apply(torch.stack([a @ b for a, b in factors]), site=site)
    torch.testing.assert_close(built.merge_factors(factors, site=site), dense, rtol=1e-4, atol=1e-4)
    side = built.equivariant(site)
    if direction == "auto:rank":
        assert side == "none"
    elif (direction == "horizontal") != transposed:
        assert side == ("none" if qkv == "split" and not transposed else "left")
    else:
        assert side == ("none" if qkv == "split" and transposed else "right")
