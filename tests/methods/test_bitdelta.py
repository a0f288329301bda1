"""BitDelta worked by hand: signs, mean magnitude, zeros that stay, which tensors."""

import pytest
import torch

from personae._types import TensorSpec
from personae.methods.codecs.bitdelta import BitDelta


def test_by_hand():
    # |1| + |−2| + |−3| + |2| = 8, mean 2; signs + − − +: 2 + 4.
    codec = BitDelta()
    parts = codec.encode(torch.tensor([[1.0, -2], [-3, 2]]))
    assert {name: values.tolist() for name, values in parts.items()} == {
        "signs": [6],
        "scale": [2],
    }
    assert codec.decode(parts, (2, 2)).tolist() == [[2, -2], [-2, 2]]
    assert codec.bits((2, 2)) == (4, 4, 8 * (1 + 4))


def test_zeros_stay_zero_and_are_no_part_of_the_mean():
    # Entries 1 and 3: mask 2 + 8; signs + −; mean of 1 and 5.
    parts = BitDelta().encode(torch.tensor([0.0, 1, 0, -5, 0]))
    assert {name: values.tolist() for name, values in parts.items()} == {
        "mask": [10],
        "signs": [2],
        "scale": [3],
    }
    assert BitDelta().decode(parts, (5,)).tolist() == [0, 3, 0, -3, 0]


def test_zeros_are_positive_and_part_of_the_mean_as_in_the_paper():
    # Mean of 0 1 0 5 0 is 1.2; the one negative entry is number 3: 8. It has no zeros to tell of.
    codec, delta = BitDelta(zeros="positive"), torch.tensor([0.0, 1, 0, -5, 0])
    parts = codec.encode(delta)
    assert parts["signs"].tolist() == [8] and parts["scale"].tolist() == [pytest.approx(1.2)]
    decoded = codec.decode(parts, (5,)).tolist()
    assert decoded == pytest.approx([1.2, 1.2, 1.2, -1.2, 1.2])
    assert codec.remark([((5,), parts)]) == ""
    told = BitDelta().remark([((5,), BitDelta().encode(delta))])
    assert told.startswith("60 % of the coded entries are exactly zero and stay so")


def test_no_scale_gives_a_smaller_error():
    delta = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    codec = BitDelta()
    decoded = codec.decode(codec.encode(delta), (30, 40))
    assert torch.equal(decoded.sign(), delta.sign())
    error = float((decoded - delta).square().sum())
    assert all(error <= float((f * decoded - delta).square().sum()) for f in (0.99, 1.01))


@pytest.mark.parametrize(
    ("name", "coded"),
    [
        ("encoder.layer.0.attention.self.query.weight", True),
        ("h.3.mlp.c_fc.weight", True),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", True),
        ("model.layers.0.mlp.experts.3.up_proj.weight", True),
        ("embeddings.word_embeddings.weight", False),
        ("pooler.dense.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_attention_and_mlp_matrices_are_coded(name: str, coded: bool):
    spec = TensorSpec(name, (8, 8), torch.float32)
    assert BitDelta().treats(spec) == ("code" if coded else "exact")
    assert BitDelta(rest="skip").treats(spec) == ("code" if coded else "skip")
    assert BitDelta(tensors="all").treats(spec) == "code"
    assert BitDelta().treats(TensorSpec("layer.0.mlp.bias", (8,), torch.float32)) == "exact"
