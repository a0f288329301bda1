"""T-Switch worked by hand, per tensor and over the model, and against sorting."""

import pytest
import torch

from personae.methods import Context, Site, numbers
from personae.methods.codecs.t_switch import TSwitch

DELTA = torch.tensor([4.0, -1.0, 3.0, 0.0, -6.0, 1.0, 2.0])


def test_by_hand():
    # Positive 4 3 1 2: ⌊0.5 · 4⌋ = 2 are kept, 4 and 3. Negative 1 6: 6. Entries 0, 2, 4:
    # 1 + 4 + 16 = 21; signs + + −: 4. s = √((16 + 9 + 36) / 3).
    codec = TSwitch(density=0.5)
    parts = codec.encode(DELTA)
    scale = (61 / 3) ** 0.5
    assert parts["mask"].tolist() == [21]
    assert parts["signs"].tolist() == [4]
    assert parts["scale"].tolist() == [pytest.approx(scale)]
    assert codec.decode(parts, (7,)).tolist() == pytest.approx([scale, 0, scale, 0, -scale, 0, 0])
    assert codec.bits((7,)) == (14, 10, 8 * (1 + 1 + 4))


def test_all_that_tie_at_the_threshold_are_kept():
    # Two of four positive entries, 3 and the 2s beside it; of the negative one ⌊0.5 · 1⌋ = 0: all.
    parts = TSwitch(density=0.5).encode(torch.tensor([2.0, 2, 3, 1, -1]))
    scale = ((4 + 4 + 9 + 1) / 4) ** 0.5
    found = TSwitch().decode(parts, (5,)).tolist()
    assert found == pytest.approx([scale, scale, scale, 0, -scale])


@pytest.mark.parametrize("density", [0.4, 0.1])
def test_as_released_on_differences_of_bf16(density: float):
    """Of each sign the ⌊density · n⌋-th largest value is the threshold; what reaches it stays."""
    draw = torch.Generator().manual_seed(3)
    base = torch.randn(768, 768, generator=draw).bfloat16()
    expert = (base + 0.01 * torch.randn(768, 768, generator=draw)).bfloat16()
    delta = expert.double() - base.double()
    kept = torch.zeros_like(delta, dtype=torch.bool)
    for sign in (1, -1):
        sizes = (sign * delta).clamp(min=0)
        count = int((sizes > 0).sum())
        kept |= sizes >= sizes.flatten().topk(int(density * count)).values[-1]
    scale = (delta.square() * kept).sum().div(kept.sum()).sqrt()
    codec = TSwitch(density=density)
    decoded = codec.decode(codec.encode(delta.float()), (768, 768))
    assert int(kept.sum()) > 1.01 * density * int((delta != 0).sum())  # there are ties
    torch.testing.assert_close(decoded.double(), scale * delta.sign() * kept, rtol=1e-5, atol=0)


def test_a_single_entry_is_kept():
    # ⌊0.4 · 1⌋ = 0: the released code keeps all of that sign then
    assert TSwitch().decode(TSwitch().encode(torch.tensor([5.0])), (1,)).tolist() == [5.0]


def test_over_the_model_by_hand():
    # Two tensors: positive 9 1 | 3 5, of which ⌊0.5 · 4⌋ = 2 are kept, 9 and 5; negative 2 | 4 of
    # which 4. The scale is √((81 + 25 + 16) / 3) in both.
    codec = TSwitch(scope="model", density=0.5)
    tensors = {"a": torch.tensor([9.0, -2, 1]), "b": torch.tensor([3.0, -4, 5])}
    none = Context(Site("", ()))
    statistics = codec.statistics([(delta, none) for delta in tensors.values()])
    scale = (122 / 3) ** 0.5
    expected = {"positive": 5.0, "negative": 4.0, "scale": pytest.approx(scale)}
    assert numbers(statistics) == expected
    contexts = {name: Context(Site(name, (3,)), "", None, statistics) for name in tensors}
    found = {
        name: codec.decode(codec.encode(delta, None, contexts[name]), (3,))
        for name, delta in tensors.items()
    }
    assert found["a"].tolist() == pytest.approx([scale, 0, 0])
    assert found["b"].tolist() == pytest.approx([0, -scale, scale])


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_against_sorting(density: float):
    delta = torch.randn(31, 17, generator=torch.Generator().manual_seed(3))
    expected = torch.zeros_like(delta)
    for sign in (1, -1):
        own = (sign * delta).clamp(min=0).flatten()
        kept = own.argsort(descending=True)[: int(density * int((own > 0).sum()))]
        expected.view(-1)[kept] = sign * 1.0
    expected *= delta[expected != 0].square().mean().sqrt()
    for scope in ("tensor", "model"):  # one tensor is the whole model
        codec = TSwitch(density=density, scope=scope)
        torch.testing.assert_close(codec.decode(codec.encode(delta), (31, 17)), expected)


def test_an_expert_of_one_sign():
    codec = TSwitch(scope="model", density=0.5)
    delta = torch.arange(1.0, 9)
    decoded = codec.decode(codec.encode(delta), (8,))
    assert decoded.tolist() == pytest.approx([0] * 4 + [((25 + 36 + 49 + 64) / 4) ** 0.5] * 4)
