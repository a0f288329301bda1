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
from personae.methods._trellis import Writer
from personae.methods._triplets import greedy_triplets
from personae.methods.codecs.dts import DTS
from personae.methods.codecs.residual import Residual
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


def _codes(*vectors: list[int], model: int = 3) -> Tensor:
    writer = Writer()
    for vector in vectors:
        writer.add(torch.tensor(vector, dtype=torch.int8), model)
    return writer.end()


def test_decoded_by_hand():
    # Rows 1 and 2 of three. Even integers, and odd ones from the first k that is odd on.
    parts = {
        "singular_values": torch.tensor([0.5, 1.0]).bfloat16(),
        "models": _bytes(3, 3),
        "codes": _codes([0, 2], [-2, -1, 3, 0], [2, -1], [4, 0, -2, 1]),
        "rows": _bytes(0b110),
    }
    first = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [-2, -1, 3, 0]])
    second = torch.tensor([[0.0, 0, 0, 0], [8, 0, -4, 2], [-4, 0, 2, -1]])
    assert torch.equal(Residual().decode(parts, (3, 4)), first + second)
    found = Residual().triplets(parts, (3, 4))
    assert found is not None
    assert found.u.tolist() == [[0, 0], [0, 2], [2, -1]]
    assert found.vh.tolist() == [[-2, -1, 3, 0], [4, 0, -2, 1]]


def test_a_vector_by_hand():
    # One row: p = 2, q = (2, -1, 1), q read first; 2, -1 and 1 have the widths and starts that
    # `test_trellis.py` names. 2^23 = 8665 · 968 + 888, 8665 · 4096 + 888 + 1880 = 35494608
    # = 21749 · 1632 + 240, 21749 · 4096 + 240 + 2 = 89084146 = 54585 · 1632 + 1426,
    # 54585 · 4096 + 1426 + 1634 = 223583220 = 230974 · 968 + 388, then + 1880. The third is 0.
    parts = {
        "singular_values": torch.tensor([0.25]).bfloat16(),
        "models": _bytes(3),
        "codes": _bytes(*(230974 * 4096 + 388 + 1880).to_bytes(4, "big")),
        "zeros": _bytes(0b100),
    }
    assert Residual().decode(parts, (3,)).tolist() == [1, -0.5, 0]


def test_encoded_by_hand():
    # 32 x 32 of ±2: one triplet, of integers of one size but where the path begins.
    draw = torch.Generator().manual_seed(0)
    left, right = (2.0 * torch.randint(0, 2, (32,), generator=draw) - 1 for _ in range(2))
    delta = 2 * torch.outer(left, right)
    parts = Residual(gain=20).encode(delta)
    assert len(parts["models"]) == 1
    # A byte of fp32 holds 1 of the squared norm 4096; that of a code is to save 20 and saves more.
    assert 40 < 4096 / _nbytes(parts) < 4096 / 17
    torch.testing.assert_close(Residual().decode(parts, (32, 32)).sign(), delta.sign())
    assert Residual(gain=200).encode(delta) == {}


def test_a_triplet_is_what_fits_best_in_fp64():
    delta = _low_rank(60, 40)
    left = delta.double()
    for _, triplet in zip(range(12), greedy_triplets(delta, 0.1, 5), strict=False):
        p, q = triplet.left.double(), triplet.right.double()
        scale = p @ left @ q / (p @ p * (q @ q))
        assert triplet.value == pytest.approx(float(scale), rel=2.0**-8)
        before = float(left.square().sum())
        left -= triplet.value * torch.outer(p, q)
        saved = before - float(left.square().sum())
        assert triplet.gain == pytest.approx(saved, rel=1e-2)


def test_what_is_taken_is_a_beginning_of_what_could_be():
    delta = _low_rank(60, 40)
    codec = Residual()
    least = [30.0, 5.0, 0.5]
    found = [codec.encode(delta, None, _at(0.5, each)) for each in least]
    assert 0 < len(found[0]["models"]) < len(found[1]["models"]) < len(found[2]["models"])
    for fewer, more in pairwise(found):
        for part in ("singular_values", "models"):
            assert torch.equal(more[part][: len(fewer[part])], fewer[part])
    errors = [float((codec.decode(one, (60, 40)) - delta).square().sum()) for one in found]
    assert errors[0] > errors[1] > errors[2]


def test_a_byte_saves_what_is_asked():
    delta = _low_rank(60, 40)
    whole = float(delta.square().sum())
    for gain in (2.0, 5.0, 10.0):
        parts = Residual(gain=gain).encode(delta)
        lost = float((Residual().decode(parts, (60, 40)) - delta).square().sum())
        assert whole - lost >= 0.99 * gain * whole / delta.nbytes * _nbytes(parts)


def test_dear_bytes_leave_coarse_steps_and_large_triplets_have_finer_ones():
    delta = _low_rank(200, 200)
    cheap, dear = (Residual(gain=gain).encode(delta)["models"].tolist() for gain in (1.0, 20.0))
    assert cheap[0] > cheap[-1]
    assert len(dear) < len(cheap) and sum(dear) < sum(cheap[: len(dear)])


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


def test_a_model_that_there_is_not_is_refused():
    parts = {"singular_values": torch.ones(1), "models": _bytes(8), "codes": _codes([2], [2])}
    with pytest.raises(PackError, match="'models' has 8, expected less than 8"):
        Residual().decode(parts, (1, 1))


def test_codes_of_other_triplets_are_refused():
    codes = _codes([2, 1], [2, -1])
    parts = {"singular_values": torch.ones(1), "models": _bytes(3), "codes": codes}
    assert Residual().decode(parts, (2, 2)).tolist() == [[4, -2], [2, -1]]
    for damaged in (codes[:-1], torch.cat([codes, codes]), _codes([2, 1], [2, -1], model=2)):
        with pytest.raises(PackError, match="bytes is no code of its triplets"):
            Residual().decode(parts | {"codes": damaged}, (2, 2))


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
    # Header 768, the scalar 4, and a triplet: 3 + 4 bytes, and its codes.
    settings = PackSettings(method="residual", budget="774B")
    with pytest.raises(BudgetError, match=r"budget of 774 bytes cannot be met.* costs 779 bytes"):
        pack(BASE, {"x": _expert(1)}, tmp_path / "p", settings=settings)


def test_packs_of_several_sizes_are_made_one_by_one(tmp_path):
    from personae import pack_many

    outs = {tmp_path / size: PackSettings(method="residual", budget=size) for size in ("5%", "10%")}
    with pytest.raises(RecipeError, match="Make these packs one by one"):
        pack_many(BASE, {"x": _expert(1)}, outs)


def test_budget_and_size_say_the_same():
    with pytest.raises(RecipeError, match="a budget sets the size: give budget or size, not both"):
        PackSettings(method="residual", budget="1%", parameters={"size": 5})
