"""UltraDelta: levels by hand, shares of each level, thirds by deviation, trace norms."""

import pytest
import torch

from personae.methods import Context, Site, numbers, scalars
from personae.methods.codecs.ultradelta import UltraDelta


def _parts(
    codec: UltraDelta,
    delta: torch.Tensor,
    found: dict[str, float],
    task: str = "t",
    name: str = "w",
):
    site = Site(name, tuple(delta.shape))
    return codec.encode(delta, None, Context(site, task, None, scalars(found)))


def test_levels_by_hand():
    # −5 to 10 in 15 steps of 1. Nothing is dropped at density 1: every entry at its nearest level.
    delta = torch.tensor([[-5.0, 10, 0.4], [2.6, -0.4, 0]])
    codec = UltraDelta(density=1.0, step=0, rescale="none")
    parts = _parts(codec, delta, {})
    assert parts["levels"].tolist() == [-5, 1]
    assert codec.decode(parts, (2, 3)).tolist() == [[-5, 10, 0], [3, 0, 0]]
    assert parts["mask"].tolist() == [31]  # the exact zero is no entry that could be kept
    # levels 0 15 5 8 5 in planes: bits 0 1 1 0 1, 0 1 0 0 0, 0 1 1 0 1, 0 1 0 1 0
    assert parts["codes"].tolist() == [22, 2, 22, 10]


def test_each_level_keeps_its_share():
    # 100 entries of level 0 and 40 of level 15: at density 0.1 ten and four, divided by 0.1.
    delta = torch.cat([torch.full((100,), -1.0), torch.full((40,), 2.0)])
    codec = UltraDelta(density=0.1, step=0, rescale="none")
    decoded = codec.decode(_parts(codec, delta, {}), (140,))
    assert int((decoded == -10).sum()) == 10
    assert int((decoded[100:] - 20).abs().lt(1e-4).sum()) == 4
    assert int(decoded.count_nonzero()) == 14


def test_zeros_count_as_dropped():
    # Half are exact zeros: of the other 100 entries 20 are kept at density 0.1 of all 200.
    delta = torch.cat([torch.zeros(100), torch.ones(100)])
    codec = UltraDelta(density=0.1, step=0, rescale="none")
    decoded = codec.decode(_parts(codec, delta, {}), (200,))
    assert not decoded[:100].any()
    assert int(decoded.count_nonzero()) == 20


def test_draws_depend_on_seed_tensor_and_task_alone():
    delta = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    first = _parts(UltraDelta(), delta, {})
    assert torch.equal(first["mask"], _parts(UltraDelta(), delta, {})["mask"])
    for other in (
        _parts(UltraDelta(seed=1), delta, {}),
        _parts(UltraDelta(), delta, {}, task="u"),
        _parts(UltraDelta(), delta, {}, name="v"),
    ):
        assert not torch.equal(first["mask"], other["mask"])


def test_thirds_by_deviation():
    # Deviations 1 2 3 4 of 30 entries each, 120: thirds end at 40 and 80. The first tensor (30)
    # is in the first; the second (60) and no other in the second; the others share the rest:
    # dropped (0.9 · 120 − 0.95 · 30 − 0.9 · 30) / 60 = 0.875.
    codec = UltraDelta(density=0.1, step=0.05)
    thirds = codec._thirds([(3.0, 30.0), (1.0, 30.0), (4.0, 30.0), (2.0, 30.0)])
    assert thirds == {"first": 1.0, "second": 2.0, "last": pytest.approx(0.875)}
    small, middle, large = (n * torch.tensor([1.0, -1]).repeat(10) for n in (1, 2, 3))
    assert codec._dropped(small, thirds) == pytest.approx(0.95)
    assert codec._dropped(middle, thirds) == pytest.approx(0.9)
    assert codec._dropped(large, thirds) == pytest.approx(0.875)


def test_the_whole_keeps_its_density():
    draw = torch.Generator().manual_seed(0)
    tensors = {f"w{n}": n * torch.randn(50, 40 + n, generator=draw) for n in range(1, 8)}
    codec = UltraDelta(density=0.1, step=0.05)

    blocks = [(d, Context(Site(n, tuple(d.shape)), "t")) for n, d in tensors.items()]
    found = numbers(codec.statistics(blocks))
    kept = [codec.decode(_parts(codec, d, found, name=n), d.shape) for n, d in tensors.items()]
    share = sum(int(k.count_nonzero()) for k in kept) / sum(k.numel() for k in kept)
    assert share == pytest.approx(0.1, abs=0.005)
    norm = sum(float(torch.linalg.svdvals(k).sum()) for k in kept)
    assert found["trace_norm"] == pytest.approx(norm, rel=1e-4)


def test_larger_trace_norms_are_damped():
    delta = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    norms = [scalars({"trace_norm": norm}) for norm in (4.0, 8.0)]
    codec = UltraDelta(density=0.5).for_family([*norms, {}])
    assert codec.smallest_trace_norm == 4.0
    plain = _parts(codec, delta, {"trace_norm": 4.0})
    damped = _parts(codec, delta, {"trace_norm": 8.0})
    torch.testing.assert_close(damped["levels"], plain["levels"] / 2)
    fixed = UltraDelta(smallest_trace_norm=1.0)
    assert fixed.for_family(norms) == fixed


def test_a_constant_delta_keeps_its_value():
    delta = torch.full((40, 50), 0.25)
    codec = UltraDelta(density=0.1, rescale="none")
    decoded = codec.decode(_parts(codec, delta, {}), (40, 50))
    assert int(decoded.count_nonzero()) == 200
    assert decoded.max() == pytest.approx(2.5)
