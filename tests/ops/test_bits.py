import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personae.errors import PackError
from personae.ops.bits import Width, pack, packed_size, unpack, unpack_values


def _codes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_two_bit_codes_lowest_bits_first():
    # 3 | 0 << 2 | 1 << 4 | 2 << 6 = 3 + 16 + 128 = 147; then 2 alone, padded with zeros
    assert pack(_codes(3, 0, 1, 2, 2), 2).tolist() == [147, 2]
    assert unpack(_codes(147, 2), 5, 2).tolist() == [3, 0, 1, 2, 2]


def test_one_bit_codes_lowest_bit_first():
    # 1 + 4 + 128 = 133; the ninth code is bit 0 of a second byte
    assert pack(_codes(1, 0, 1, 0, 0, 0, 0, 1, 1), 1).tolist() == [133, 1]
    assert unpack(_codes(133, 1), 9, 1).tolist() == [1, 0, 1, 0, 0, 0, 0, 1, 1]


def test_padding_is_not_read():
    # A foreign writer may leave anything in the unused bits of the last byte.
    assert unpack(_codes(0b11111101), 1, 2).tolist() == [1]


@given(st.lists(st.integers(0, 3), max_size=40), st.sampled_from([1, 2]))
def test_against_integer_arithmetic(values: list[int], width: Width):
    values = [value % (1 << width) for value in values]
    packed = pack(_codes(*values), width)
    number = sum(value << (width * place) for place, value in enumerate(values))
    size = packed_size(len(values), width)
    assert bytes(packed.tolist()) == number.to_bytes(size, "little")
    assert unpack(packed, len(values), width).tolist() == values


@pytest.mark.parametrize(
    ("count", "width", "size"), [(0, 2, 0), (1, 2, 1), (4, 2, 1), (5, 2, 2), (8, 1, 1), (9, 1, 2)]
)
def test_packed_size(count: int, width: Width, size: int):
    assert packed_size(count, width) == size


def test_input_is_not_written_to():
    codes = _codes(1, 2, 3, 0)
    pack(codes, 2)
    assert codes.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("width", [1, 2])
def test_values_of_codes_without_the_codes(width: Width):
    codes = torch.arange(11, dtype=torch.uint8) % (1 << width)
    values = torch.tensor([0.5, -2.0, 3.0, -7.0])[: 1 << width]
    found = unpack_values(pack(codes, width), 11, width, values)
    assert found.tolist() == [values.tolist()[code] for code in codes.tolist()]
    with pytest.raises(PackError, match="12 codes"):
        unpack_values(pack(codes, width)[:-1], 12, width, values)


def test_wrong_length_is_refused():
    with pytest.raises(PackError, match="3 bytes of codes, but 5 codes of 2 bit take 2"):
        unpack(_codes(0, 0, 0), 5, 2)


def test_a_code_wider_than_its_width_is_a_bug():
    with pytest.raises(AssertionError, match="exceeds its width"):
        pack(_codes(0, 2), 1)
