import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from personae._types import SVD, Parts, TensorSpec
from personae.errors import MethodError, PackError
from personae.methods import CODECS, Block, _codec, build
from personae.methods.codecs.dts import DTS


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- by hand ------------------------------------------------------------------------------------


def test_vector_by_hand():
    delta = torch.tensor([6.0, -2.0, 1.0, 3.0, -4.0, -0.5])
    # positive 6 1 3: large 6 (⌊3/2⌋ = 1), small 1 3.   negative 2 4 0.5: large 4, small 2 0.5.
    # codes, bit 0 negative, bit 1 large:  6→2  -2→1  1→0  3→0 | -4→3  -0.5→1
    # bytes: 2 + (1 << 2) + 0 + 0 = 6;  3 + (1 << 2) = 7
    # scales: sqrt((1 + 9)/2), sqrt((4 + 0.25)/2), 6, 4
    small_plus, small_minus = np.float32(math.sqrt(5)), np.float32(math.sqrt(2.125))
    parts = DTS().encode(delta)
    assert parts.keys() == {"codes", "scales"}
    assert parts["codes"].tolist() == [6, 7]
    assert parts["scales"].tolist() == [small_plus, small_minus, 6, 4]
    decoded = [6, -small_minus, small_plus, small_plus, -4, -small_minus]
    assert DTS().decode(parts, (6,)).tolist() == decoded
    # counted 3 · 6, lean 2 · 6, stored 2 bytes of codes and 4 scales
    assert DTS().bits((6,)) == (18, 12, 16 + 128)


def test_diagonal_by_hand():
    delta = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    identity = torch.eye(4)
    svd = SVD(identity, torch.tensor([8.0, 4.0, 2.0, 1.0]), identity)
    codec = DTS(rank_fraction=0.5)  # keeps ⌊0.5 · 4⌋ = 2 triplets
    parts = codec.encode(delta, svd)
    assert parts["singular_values"].tolist() == [8, 4]
    # Vectors 1000 and 0100: two positives, both 1; the first is the large one: codes 2 and 0.
    # bytes per factor: 2, 0; zeros are entries 1 2 3 4 6 7: 2 + 4 + 8 + 16 + 64 + 128 = 222
    assert parts["codes"].tolist() == [2, 0, 2, 0]
    assert parts["zeros"].tolist() == [222, 222]
    assert parts["scales"].tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    assert "rows" not in parts
    assert torch.equal(codec.decode(parts, (4, 4)), torch.diag(torch.tensor([8.0, 4.0, 0.0, 0.0])))


def test_rank_one_by_hand():
    # 5 · (0.8, 0.6)ᵀ (0.6, -0.8): no group holds two values, so nothing is lost
    delta = torch.tensor([[2.4, -3.2], [1.8, -2.4]])
    svd = SVD(torch.tensor([[0.8], [0.6]]), torch.tensor([5.0]), torch.tensor([[0.6, -0.8]]))
    parts = DTS(rank_fraction=0.5).encode(delta, svd)
    # U: 0.8 large, 0.6 small: codes 2, 0 -> byte 2.  V: 0.6 and -0.8, each alone, so small:
    # codes 0, 1 -> byte 4
    assert parts["codes"].tolist() == [2, 4]
    torch.testing.assert_close(DTS(rank_fraction=0.5).decode(parts, (2, 2)), delta)


def test_untouched_rows_by_hand():
    delta = torch.zeros(9, 2)
    delta[1], delta[8] = torch.tensor([2.4, -3.2]), torch.tensor([1.8, -2.4])
    codec = DTS(rank_fraction=0.5)
    parts = codec.encode(delta)
    assert parts["rows"].tolist() == [2, 1]  # bit 1 of byte 0, bit 0 of byte 1
    assert parts["codes"].numel() == 2  # two codes of U, not nine, and two of V
    decoded = codec.decode(parts, (9, 2))
    torch.testing.assert_close(decoded, delta)
    assert decoded.any(dim=1).tolist() == [False, True, *[False] * 6, True]


def test_scalar_is_exact():
    parts = DTS().encode(torch.tensor(0.1))
    assert torch.equal(parts["exact"], torch.tensor([0.1]))
    assert torch.equal(DTS().decode(parts, ()), torch.tensor(0.1))
    assert DTS().bits(()) == (32, 32, 32)


# ---- against the paper's three masks ------------------------------------------------------------


Scale = Callable[[np.ndarray], np.float32]


def _three_masks(factor: np.ndarray, scale: Scale) -> np.ndarray:
    """Keep mask, sign mask g, magnitude masks g⁺ and g⁻, four scales; decoded as their sum."""
    keep, g = factor != 0, factor > 0
    halves = []
    for sign in (1, -1):
        members = np.flatnonzero(sign * factor > 0)
        ascending = members[np.argsort(sign * factor.flat[members], kind="stable")]
        mask = np.zeros(factor.size, bool)
        mask[ascending[len(members) - len(members) // 2 :]] = True
        halves.append(mask.reshape(factor.shape))
    plus, minus = halves
    total = np.zeros(factor.shape, np.float32)
    for sign, group in (
        (1, keep & g & plus),
        (1, keep & g & ~plus),
        (-1, keep & ~g & minus),
        (-1, keep & ~g & ~minus),
    ):
        if group.any():
            total += np.float32(sign) * group * scale(factor[group].astype(np.float64))
    return total


def _rms(values: np.ndarray) -> np.float32:
    return np.float32(np.linalg.norm(values) / math.sqrt(values.size))


def _mean(values: np.ndarray) -> np.float32:
    return np.float32(np.abs(values).mean())


def _read(parts: Parts, rows: int, columns: int) -> list[np.ndarray]:
    """Both factors, vectors as rows, read from the parts without any code of the package."""
    rank = parts["singular_values"].numel()
    stream, scales = parts["codes"].numpy(), parts["scales"].numpy().reshape(2, -1, 4)
    factors = []
    for number, width in enumerate((rows, columns)):
        size = -(-rank * width // 4)
        bits = np.unpackbits(stream[:size], bitorder="little")[: 2 * rank * width].reshape(-1, 2)
        stream = stream[size:]
        codes = (bits[:, 0] + 2 * bits[:, 1]).reshape(len(scales[number]), -1)
        signed = scales[number] * np.array([1, -1, 1, -1], np.float32)
        factors.append(np.take_along_axis(signed, codes, axis=1).reshape(rank, width))
    assert not stream.size
    return factors


@pytest.mark.parametrize("shape", [(20, 31), (64, 20), (33, 33)])
@pytest.mark.parametrize(("scales", "scale"), [("rms", _rms), ("mean", _mean)])
def test_identical_to_the_three_masks(shape: tuple[int, int], scales: Any, scale: Scale):
    codec = DTS(scales=scales)
    delta = _normal(*shape)
    svd = codec.decompose(delta, codec.rank(shape))
    parts = codec.encode(delta, svd)
    left = torch.from_numpy(_three_masks(svd.u.T.contiguous().numpy(), scale))
    right = torch.from_numpy(_three_masks(svd.vh.contiguous().numpy(), scale))
    for read, expected in zip(_read(parts, *shape), (left, right), strict=True):
        assert torch.equal(torch.from_numpy(read), expected)
    expected = left.T @ (svd.singular_values[:, None] * right)
    assert torch.equal(codec.decode(parts, shape), expected)


def test_vector_grouping_is_the_three_masks_of_every_vector():
    codec = DTS(grouping="vector")
    delta = _normal(20, 31)
    svd = codec.decompose(delta, 6)
    parts = codec.encode(delta, svd)
    assert parts["scales"].numel() == 2 * 6 * 4
    for read, factor in zip(_read(parts, 20, 31), (svd.u.T, svd.vh), strict=True):
        expected = [_three_masks(vector, _rms) for vector in factor.contiguous().numpy()]
        assert np.array_equal(read, np.stack(expected))


def test_conv_and_vector_are_the_three_masks_of_the_flat_tensor():
    for delta in (_normal(6, 3, 4, 4), _normal(45)):
        expected = _three_masks(delta.numpy().reshape(1, -1), _rms).reshape(delta.shape)
        decoded = DTS().decode(DTS().encode(delta), tuple(delta.shape))
        assert torch.equal(decoded, torch.from_numpy(expected))


def test_exact_zeros_against_the_three_masks():
    delta = _normal(50)
    delta[::3] = 0
    parts = DTS().encode(delta)
    expected = torch.from_numpy(_three_masks(delta.numpy(), _rms))
    assert torch.equal(DTS().decode(parts, (50,)), expected)
    assert parts["zeros"].numel() == 7  # ⌈50 / 8⌉


def test_few_zeros_are_positions_and_decode_to_the_same():
    u, vh = _normal(30, 4), _normal(4, 50)
    u[7, 1] = 0  # Uᵀ is coded vector after vector: 1 · 30 + 7 = 37
    vh[2, 49] = 0  # after the 120 of U: 120 + 2 · 50 + 49 = 269
    svd = SVD(u, torch.tensor([4.0, 3.0, 2.0, 1.0]), vh)
    codec = DTS(rank_fraction=4 / 30)
    parts = codec.encode(u @ vh, svd)
    assert parts["zero_positions"].tolist() == [37, 269]
    assert parts["zero_positions"].dtype == torch.int32
    assert "zeros" not in parts
    left, right = (torch.from_numpy(_three_masks(f.numpy(), _rms)) for f in (u.T.contiguous(), vh))
    expected = left.T @ (svd.singular_values[:, None] * right)
    assert torch.equal(codec.decode(parts, (30, 50)), expected)


# ---- properties (methods.md 10, no. 7) ----------------------------------------------------------


def test_norms_signs_and_group_sizes_of_the_factors():
    delta = _normal(60, 45)
    svd = DTS().decompose(delta, 13)
    parts = DTS().encode(delta, svd)
    for read, factor in zip(_read(parts, 60, 45), (svd.u.T, svd.vh), strict=True):
        decoded = torch.from_numpy(read)
        torch.testing.assert_close(decoded.norm(), factor.norm())
        assert torch.equal(decoded.sign(), factor.sign())
        for sign in (1, -1):
            members = decoded[decoded.sign() == sign]
            large = int((members.abs() == members.abs().max()).sum())
            assert large == len(members) // 2


@pytest.mark.parametrize(
    ("settings", "error"),
    [({}, 0.145), ({"scales": "mean"}, 0.140), ({"thresholding": False}, 0.404)],
)
def test_relative_squared_error_of_gaussian_values(settings: dict, error: float):
    # One sign alone, RMS: E(|x| - 1)² = 2 - 2·sqrt(2/π) = 0.404
    delta = _normal(200_000)
    decoded = DTS(**settings).decode(DTS(**settings).encode(delta), (200_000,))
    relative = (decoded - delta).square().sum() / delta.square().sum()
    assert float(relative) == pytest.approx(error, abs=2e-3)


# ---- options ------------------------------------------------------------------------------------


def test_without_scaling_every_entry_of_a_factor_is_one():
    parts = DTS(scaling=False).encode(_normal(20, 31))
    assert all(np.array_equal(np.abs(read), np.ones_like(read)) for read in _read(parts, 20, 31))


def test_without_thresholding_one_bit_and_two_scales():
    codec = DTS(thresholding=False)
    parts = codec.encode(torch.tensor([3.0, -1.0, 4.0, -7.0]))
    # negatives at places 1 and 3: 2 + 8 = 10; scales sqrt((9 + 16)/2), sqrt((1 + 49)/2) = 5
    assert parts["codes"].tolist() == [10]
    plus = np.float32(math.sqrt(12.5))
    assert parts["scales"].tolist() == [plus, 5]
    assert codec.decode(parts, (4,)).tolist() == [plus, -5, plus, -5]


def test_without_decomposition_a_matrix_is_coded_as_its_entries():
    codec, delta = DTS(decomposition=False), _normal(12, 7)
    assert codec.rank((12, 7)) == 0
    assert codec.encode(delta).keys() == {"codes", "scales"}
    flat = DTS().decode(DTS().encode(delta.flatten()), (84,))
    assert torch.equal(codec.decode(codec.encode(delta), (12, 7)), flat.reshape(12, 7))


def test_median_split_leaves_ties_small():
    delta = torch.tensor([1.0, 2.0, 2.0, 2.0])  # median 2: none lies above; by rank two do
    assert DTS(split="median").encode(delta)["codes"].tolist() == [0]
    assert DTS(split="rank").encode(delta)["codes"].tolist() == [2 << 2 | 2 << 4]


def test_conv_as_a_matrix():
    codec, delta = DTS(conv="matrix"), _normal(20, 3, 4, 4)
    assert codec.rank((20, 3, 4, 4)) == 6
    matrix = DTS().decode(DTS().encode(delta.reshape(20, 48)), (20, 48))
    assert torch.equal(
        codec.decode(codec.encode(delta), (20, 3, 4, 4)), matrix.reshape(delta.shape)
    )
    assert codec.bits((20, 3, 4, 4)) == DTS().bits((20, 48))


def test_half_precision_singular_values():
    codec, delta = DTS(singular_value_dtype="float16"), _normal(20, 31)
    parts = codec.encode(delta)
    full = DTS().encode(delta)["singular_values"]
    assert torch.equal(parts["singular_values"], full.half())
    stored = 8 * sum(part.numel() * part.element_size() for part in parts.values())
    assert codec.bits((20, 31)).stored == stored == DTS().bits((20, 31)).stored - 16 * 6


def test_singular_value_too_large_for_half_precision_is_refused():
    codec = DTS(singular_value_dtype="float16", rank_fraction=1)
    with pytest.raises(MethodError, match="does not fit in float16"):
        codec.encode(torch.diag(torch.tensor([1e5, 1.0])))


@pytest.mark.parametrize(
    ("rank_fraction", "width", "rank"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.3, 768, 230), (0.3, 3, 0)],
)
def test_rank_is_the_floor_without_rounding_error(rank_fraction: float, width: int, rank: int):
    # In floats 0.29 · 100 = 28.999999999999996
    assert DTS(rank_fraction=rank_fraction).rank((width, 2 * width)) == rank


def test_rank_tolerance_cuts_small_triplets():
    delta = torch.diag(torch.tensor([1.0, 0.5, 1e-3, 1e-3]))
    parts = DTS(rank_fraction=1, rank_tolerance=0.01).encode(delta)
    torch.testing.assert_close(parts["singular_values"], torch.tensor([1.0, 0.5]))


def test_options_of_the_decomposition_reach_the_solver(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}

    def fake(matrix: torch.Tensor, rank: int, **options: Any) -> SVD:
        seen.update(options, rank=rank)
        return SVD(matrix[:, :rank], torch.ones(rank), matrix[:rank])

    monkeypatch.setattr(_codec, "truncated_svd", fake)
    DTS(solver="gram", signs="solver", rank_tolerance=0.5).decompose(_normal(5, 5), 2)
    assert seen == {"rank": 2, "solver": "gram", "signs": "solver", "rank_tolerance": 0.5}


def test_a_matrix_of_rank_zero_is_dropped():
    # RoBERTa's token types: ⌊0.3 · 1⌋ = 0
    assert DTS().encode(_normal(1, 768)) == {}
    assert DTS().bits((1, 768)) == (0, 0, 0)
    assert not DTS().decode({}, (1, 768)).any()


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (12, 4), 0),
        ("transformer.h.0.attn.c_attn.weight", (4, 12), 1),  # GPT-2, Conv1D
        ("transformer.h.0.attn.c_attn.weight", (12, 4), 0),  # Qwen
        ("layers.0.self_attn.qkv_proj.weight", (12, 4), 0),
    ],
)
def test_split_qkv(name: str, shape: tuple[int, int], axis: int):
    spec = TensorSpec(name, shape, torch.float32)
    assert DTS(qkv="split").blocks(spec) == (
        Block(axis, 0, 4),
        Block(axis, 4, 8),
        Block(axis, 8, 12),
    )
    assert DTS().blocks(spec) == (Block(0, 0, shape[0]),)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("h.0.self_attention.query_key_value.weight", (12, 4)),  # heads interleaved
        ("layers.0.self_attn.qkv_proj.weight", (8, 4)),  # fewer key and value heads
        ("h.0.attn.c_attn.bias", (12,)),
        ("layers.0.mlp.up_proj.weight", (12, 4)),
    ],
)
def test_what_is_not_split(name: str, shape: tuple[int, ...]):
    spec = TensorSpec(name, shape, torch.float32)
    assert DTS(qkv="split").blocks(spec) == (Block(0, 0, shape[0]),)


# ---- refusals -----------------------------------------------------------------------------------


def test_damaged_parts_are_refused():
    parts = DTS().encode(_normal(20, 31))
    # 6 vectors of 20 and of 31 codes: 30 and ⌈46.5⌉ bytes
    with pytest.raises(PackError, match="'codes' has 76 elements, expected 77"):
        DTS().decode({**parts, "codes": parts["codes"][1:]}, (20, 31))
    with pytest.raises(PackError, match="'scales' has 4 elements, expected 8"):
        DTS().decode({**parts, "scales": parts["scales"][:4]}, (20, 31))
    del parts["singular_values"]
    with pytest.raises(PackError, match="'singular_values' is missing; found: codes, scales"):
        DTS().decode(parts, (20, 31))


def test_wrong_parameters_are_refused_together():
    with pytest.raises(MethodError, match=r"(?s)rank_fraction = 1\.5.*no parameter 'grouped'"):
        build(CODECS["dts"], {"rank_fraction": 1.5, "grouped": "vector"})
