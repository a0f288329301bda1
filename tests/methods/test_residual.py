"""Residual triplets: by hand, against fp64, and under a size."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from personae import PackSettings, pack, unpack
from personae._types import Parts
from personae.errors import BudgetError, PackError, RecipeError
from personae.methods import Context, Site
from personae.methods._method import scalars
from personae.methods.codecs.dts import DTS
from personae.methods.codecs.residual import Residual
from personae.ops.residual import greedy_triplets
from toys import load


def _bytes(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def _low_rank(rows: int, columns: int, seed: int = 0, rank: int = 6) -> Tensor:
    """Triplets of which each is half as large as the one before, and a little noise."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=draw) for n in (rows, columns))
    sizes = 0.5 ** torch.arange(rank)
    return left * sizes @ right.T + 0.02 * torch.randn(rows, columns, generator=draw)


def _at(price: float, least: float, name: str = "") -> Context:
    return Context(Site(name, ()), "", None, scalars({"price": price, "least": least}))


def _nbytes(parts: Parts) -> int:
    return sum(values.nbytes for values in parts.values())


def test_decoded_by_hand():
    # Rows 1 and 2 of three. Triplet 1, of 3 levels: p = (2, 0), digits 2 1, byte 2 + 1·3 = 5;
    # q = (-2, 0, 2, 2), digits 0 1 2 2, byte 0 + 3 + 18 + 54 = 75. Triplet 2, of 4 levels:
    # p = (-3, 1), digits 0 2, byte 0 + 8 = 8; q = (1, -1, 3, -3), digits 2 1 3 0, byte 2 + 4 + 48.
    parts = {
        "singular_values": torch.tensor([0.5, 1.0]),
        "levels": _bytes(3, 4),
        "codes": _bytes(5, 75, 8, 54),
        "rows": _bytes(0b110),
    }
    first = torch.tensor([[0.0, 0, 0, 0], [-2, 0, 2, 2], [0, 0, 0, 0]])
    second = torch.tensor([[0.0, 0, 0, 0], [-3, 3, -9, 9], [1, -1, 3, -3]])
    assert torch.equal(Residual().decode(parts, (3, 4)), first + second)
    found = Residual().triplets(parts, (3, 4))
    assert found is not None
    assert found.u.tolist() == [[0, 0], [2, -3], [0, 1]]
    assert found.vh.tolist() == [[-2, 0, 2, 2], [1, -1, 3, -3]]


def test_a_vector_by_hand():
    # One row: p = 1, digit 1 of 2 levels; q = (1, -1, 1), digits 1 0 1, byte 5; the third is 0.
    parts = {
        "singular_values": torch.tensor([0.25]),
        "levels": _bytes(2),
        "codes": _bytes(1, 5),
        "zeros": _bytes(0b100),
    }
    assert Residual().decode(parts, (3,)).tolist() == [0.25, -0.25, 0]


def test_encoded_by_hand():
    # 8 x 8 of ±2: squared norm 256, of which a byte of fp32 holds 1. Of 4 levels a triplet takes
    # 5 + 2 + 2 bytes, each of which saves 256 / 9 = 28.4. Values ±1 are ±3, so that 9 s = 2.
    left, right = torch.tensor([1.0, 1, -1, 1, 1, 1, 1, 1]), torch.tensor([1.0, -1] * 4)
    delta = 2 * torch.outer(left, right)
    parts = Residual(gain=28).encode(delta)
    assert parts["levels"].tolist() == [4]
    assert parts["singular_values"].tolist() == pytest.approx([2 / 9], rel=1e-6)
    # Digits 3 3 0 3 | 3 3 3 3 are bytes 3 + 12 + 192, 255; 3 0 3 0 | 3 0 3 0 are 3 + 48 twice.
    # Or both vectors turned round: 48, 0 and 12 + 192 twice.
    assert parts["codes"].tolist() in ([207, 255, 51, 51], [48, 0, 204, 204])
    torch.testing.assert_close(Residual().decode(parts, (8, 8)), delta)
    assert Residual(gain=29).encode(delta) == {}


def test_a_triplet_is_what_fits_best_in_fp64():
    delta = _low_rank(60, 40)
    left = delta.double()
    for _, triplet in zip(range(12), greedy_triplets(delta, 0.1, 5), strict=False):
        p, q = triplet.left.double(), triplet.right.double()
        for vector in (p, q):
            assert int(vector.abs().max()) <= triplet.levels - 1
            assert ((vector + triplet.levels - 1) % 2 == 0).all()
        scale = p @ left @ q / (p @ p * (q @ q))
        assert triplet.value == pytest.approx(float(scale), rel=1e-3)
        before = float(left.square().sum())
        left -= triplet.value * torch.outer(p, q)
        saved = before - float(left.square().sum())
        assert triplet.gain == pytest.approx(saved, rel=1e-2)


def test_what_is_taken_is_a_beginning_of_what_could_be():
    delta = _low_rank(60, 40)
    codec = Residual()
    least = [30.0, 5.0, 0.5]
    found = [codec.encode(delta, None, _at(0.5, each)) for each in least]
    assert 0 < len(found[0]["levels"]) < len(found[1]["levels"]) < len(found[2]["levels"])
    for fewer, more in pairwise(found):
        for part, values in fewer.items():
            assert torch.equal(more[part][: len(values)], values)
    errors = [float((codec.decode(one, (60, 40)) - delta).square().sum()) for one in found]
    assert errors[0] > errors[1] > errors[2]


def test_a_byte_saves_what_is_asked():
    delta = _low_rank(60, 40)
    whole = float(delta.square().sum())
    for gain in (2.0, 5.0, 10.0):
        parts = Residual(gain=gain).encode(delta)
        lost = float((Residual().decode(parts, (60, 40)) - delta).square().sum())
        assert whole - lost >= 0.99 * gain * whole / delta.nbytes * _nbytes(parts)


def test_dear_bytes_leave_few_levels_and_large_triplets_have_more():
    delta = _low_rank(200, 200)
    cheap, dear = (Residual(gain=gain).encode(delta)["levels"].tolist() for gain in (1.0, 20.0))
    assert cheap[0] == 16 and cheap[0] > cheap[-1]
    assert max(dear) <= 16 and len(dear) < len(cheap)


@pytest.mark.parametrize("size", [700, 1500])
def test_a_size_is_shared_by_all_tensors_and_nearly_used_up(size: int):
    large, small = _low_rank(60, 40), 0.03 * _low_rank(60, 40, seed=1)
    vector, scalar = torch.full((40,), 0.5), torch.tensor(2.0)
    deltas = [large, small, vector, scalar]
    codec = Residual(size=size)
    contexts = [Context(Site(str(n), tuple(d.shape))) for n, d in enumerate(deltas)]
    found = codec.statistics(list(zip(deltas, contexts, strict=True)))
    parts = [codec.encode(d, None, Context(Site("", ()), "", None, found)) for d in deltas]
    used = sum(map(_nbytes, parts))
    assert used <= size
    assert used >= 0.85 * size
    assert _nbytes(parts[0]) > _nbytes(parts[1])  # a thousandth of the squared norm
    assert parts[3]["exact"].tolist() == [2.0]


def test_less_is_lost_than_by_dts_in_as_many_bytes():
    delta = _low_rank(200, 120, rank=12)
    whole = float(delta.square().sum())
    for fraction in (0.05, 0.1, 0.3):
        dts = DTS(rank_fraction=fraction)
        theirs = dts.encode(delta)
        lost = float((dts.decode(theirs, (200, 120)) - delta).square().sum())
        ours = Residual(size=_nbytes(theirs)).encode(delta)
        left = float((Residual().decode(ours, (200, 120)) - delta).square().sum())
        assert _nbytes(ours) <= _nbytes(theirs)
        assert left < lost, (fraction, left / whole, lost / whole)


def test_levels_that_no_triplet_has_are_refused():
    parts = {"singular_values": torch.ones(1), "levels": _bytes(5), "codes": _bytes(0, 0)}
    with pytest.raises(PackError, match="'levels' has 5, expected one of 2, 3, 4, 6, 16"):
        Residual().decode(parts, (2, 2))


def test_codes_of_other_levels_are_refused():
    # 9 codes of 2 levels are 2 bytes, of 16 levels 5.
    parts = {"singular_values": torch.ones(1), "levels": _bytes(16), "codes": _bytes(0, 0, 0, 0)}
    with pytest.raises(PackError, match="'codes' has 4 elements, expected 10"):
        Residual().decode(parts, (9, 9))


BASE = {
    "embed.weight": torch.zeros(300, 64),
    "layer.weight": torch.zeros(128, 64),
    "layer.bias": torch.ones(128),
    "scale": torch.tensor(1.0),
}


def _expert(seed: int) -> dict[str, Tensor]:
    embed = _low_rank(300, 64, seed)
    embed[100:] = 0  # rows that did not change
    layer = 2 * _low_rank(128, 64, seed + 1)
    return {
        "embed.weight": embed,
        "layer.weight": layer,
        "layer.bias": 1 + layer[:, 0],
        "scale": torch.tensor(1.5),
    }


@pytest.mark.parametrize("budget", ["3%", "10%", "6000B"])
@pytest.mark.parametrize("vector", ["task", "difference"])
def test_a_budget_is_met_from_below(tmp_path, budget, vector):
    experts = {"x": _expert(1), "y": _expert(5)}
    settings = PackSettings(method="residual", budget=budget, vector=vector)
    made = pack(BASE, experts, tmp_path / "p", settings=settings)
    whole = 4 * (300 * 64 + 128 * 64 + 128 + 1)
    most = 6000 if budget.endswith("B") else float(budget[:-1]) / 100 * whole
    for task in made.manifest.tasks.values():
        assert 0.85 * most - 400 <= task.bytes <= most  # the room for the header is 768 bytes
        assert task.parameters["size"] <= most
    if vector == "task":
        rebuilt = load(unpack(tmp_path / "p", "x", tmp_path / "x", base=BASE))
        assert float(rebuilt["scale"]) == 1.5
        assert torch.equal(rebuilt["embed.weight"][100:], BASE["embed.weight"][100:])


def test_a_budget_below_the_smallest_is_refused_with_it(tmp_path):
    # Header 768, the scalar 4, and a triplet of the layer: 5 + 1 + 8 bytes (of the bias: 22).
    settings = PackSettings(method="residual", budget="780B")
    with pytest.raises(BudgetError, match=r"budget of 780 bytes cannot be met.* costs 786 bytes"):
        pack(BASE, {"x": _expert(1)}, tmp_path / "p", settings=settings)


def test_packs_of_several_sizes_are_made_one_by_one(tmp_path):
    from personae import pack_many

    outs = {tmp_path / size: PackSettings(method="residual", budget=size) for size in ("5%", "10%")}
    with pytest.raises(RecipeError, match="Make these packs one by one"):
        pack_many(BASE, {"x": _expert(1)}, outs)


def test_budget_and_size_say_the_same():
    with pytest.raises(ValueError, match="a budget sets the size: give budget or size, not both"):
        PackSettings(method="residual", budget="1%", parameters={"size": 5})
