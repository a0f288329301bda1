"""Masks: worked by hand, there and back, and close to the entropy where they are sparse."""

from math import log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personae.errors import PackError
from personae.ops.bits import pack_planes, planes_size, unpack_planes
from personae.ops.masks import decode_mask, encode_mask, mask_size


def _bytes(*values: int) -> list[int]:
    return list(values)


def test_a_dense_mask_is_a_bit_an_entry():
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1]).bool()
    parts = encode_mask(mask)
    # 1 + 4 + 8 = 13, then the ninth entry
    assert {name: values.tolist() for name, values in parts.items()} == {"mask": _bytes(13, 1)}


def test_a_sparse_mask_by_hand():
    # Entries 5 and 38 of 40. Gaps 5 and 32; near = ⌊log2 20⌋ = 4. k = 4: 5 = 0·16 + 5,
    # 32 = 2·16 + 0, unary 1 001 in 1 byte, 4 planes of 1 byte: 5 bytes, as many as 40 bits. k = 3:
    # quotients 0 and 4, unary 1 00001: 1 + 3 bytes. Bits of the remainders 5 and 0: 1 0 1.
    mask = torch.zeros(40, dtype=torch.bool)
    mask[[5, 38]] = True
    parts = encode_mask(mask)
    assert parts["mask"].tolist() == [1 + 2**5]
    assert parts["gaps"].tolist() == [1, 0, 1]
    assert decode_mask(parts, 40).nonzero()[:, 0].tolist() == [5, 38]


def test_an_empty_mask_has_no_parts():
    assert encode_mask(torch.zeros(9, dtype=torch.bool)) == {}
    assert encode_mask(torch.zeros(0, dtype=torch.bool)) == {}


@given(st.integers(1, 700), st.integers(0, 700), st.integers(0, 2**16))
def test_there_and_back(count: int, marked: int, seed: int):
    mask = torch.zeros(count, dtype=torch.bool)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    mask[order[:marked]] = True
    parts = encode_mask(mask)
    if not parts:
        assert not mask.any()
        return
    assert torch.equal(decode_mask(parts, count), mask)
    size = sum(len(values) for values in parts.values())
    assert size <= mask_size(count, min(marked, count)) <= -(-count // 8)


@pytest.mark.parametrize("density", [0.001, 0.03, 0.2])
def test_close_to_the_entropy(density: float):
    mask = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) < density
    p = float(mask.float().mean())
    entropy = -p * log2(p) - (1 - p) * log2(1 - p)
    bits = 8 * sum(len(values) for values in encode_mask(mask).values())
    assert entropy < bits / 200_000 < 1.05 * entropy


def test_a_mask_for_another_shape_is_refused():
    mask = torch.zeros(400, dtype=torch.bool)
    mask[[5, 380]] = True
    with pytest.raises(PackError, match="marks entries beyond the 300 there are"):
        decode_mask(encode_mask(mask), 300)
    with pytest.raises(PackError, match="5 codes of 1 bit"):
        decode_mask(encode_mask(torch.ones(40, dtype=torch.bool)), 5)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_planes_of_bits(width: int):
    codes = torch.arange(21) % 2**width
    packed = pack_planes(codes, width)
    assert len(packed) == planes_size(21, width) == 3 * width
    assert torch.equal(unpack_planes(packed, 21, width), codes)
    with pytest.raises(PackError, match="damaged"):
        unpack_planes(packed[1:], 21, width)
