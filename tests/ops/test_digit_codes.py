import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personae.errors import PackError
from personae.ops.digits import digits_of_byte, digits_size, pack_digits, unpack_digits


def _codes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_as_many_to_a_byte_as_fit():
    # 2^8 = 256, 3^5 = 243, 4^4 = 256, 6^3 = 216, 16^2 = 256, and 17^2 = 289
    found = [digits_of_byte(levels) for levels in (2, 3, 4, 6, 16, 17, 256)]
    assert found == [8, 5, 4, 3, 2, 1, 1]
    assert [digits_size(count, 3) for count in (0, 1, 5, 6)] == [0, 1, 1, 2]


def test_lowest_digits_first():
    # 2 + 0·3 + 1·9 + 2·27 + 1·81 = 146; then 2 alone
    assert pack_digits(_codes(2, 0, 1, 2, 1, 2), 3).tolist() == [146, 2]
    assert unpack_digits(_codes(146, 2), 6, 3).tolist() == [2, 0, 1, 2, 1, 2]


@given(st.lists(st.integers(0, 15), max_size=40), st.sampled_from([2, 3, 4, 6, 16]))
def test_there_and_back(values: list[int], levels: int):
    codes = _codes(*(value % levels for value in values))
    packed = pack_digits(codes, levels)
    assert packed.numel() == digits_size(len(codes), levels)
    assert torch.equal(unpack_digits(packed, len(codes), levels), codes)


def test_whatever_the_bytes_are_codes_are_in_range():
    every = torch.arange(256, dtype=torch.uint8)
    for levels in (2, 3, 4, 6, 16):
        codes = unpack_digits(every, 256 * digits_of_byte(levels), levels)
        assert int(codes.max()) == levels - 1


def test_a_wrong_length_is_refused():
    with pytest.raises(PackError, match="3 bytes of codes, but 6 codes of 3 levels take 2"):
        unpack_digits(_codes(1, 2, 3), 6, 3)
