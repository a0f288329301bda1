"""What a codec does not code: kept exact, by the rows that changed where that is shorter."""

import pytest
import torch

from personae.errors import PackError
from personae.methods import CODECS, block_bits, decode_block, encode_block

CODEC = CODECS["bitdelta"]()


def test_rows_that_changed():
    delta = torch.zeros(5, 4)
    delta[1], delta[4] = torch.arange(4.0), -1.0
    parts = encode_block(CODEC, "exact", delta)
    # Rows 1 and 4: 0b10010 = 18; 2 · 4 numbers instead of 5 · 4.
    assert parts["rows"].tolist() == [18]
    assert parts["exact"].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert torch.equal(decode_block(CODEC, parts, (5, 4)), delta)
    assert 8 * sum(part.nbytes for part in parts.values()) == 8 * (1 + 32)
    assert block_bits(CODEC, "exact", (5, 4)).stored == 32 * 20  # at most


@pytest.mark.parametrize("shape", [(), (7,), (3, 1), (4, 5), (3, 2, 2)])
def test_what_changed_everywhere_is_stored_whole(shape):
    delta = torch.ones(shape)
    parts = encode_block(CODEC, "exact", delta)
    assert parts.keys() == {"exact"}
    assert torch.equal(decode_block(CODEC, parts, shape), delta)


def test_one_row_is_enough_for_more_axes():
    delta = torch.zeros(9, 2, 2)
    delta[8] = 0.5
    parts = encode_block(CODEC, "exact", delta)
    assert parts["exact"].shape == (4,) and len(parts["rows"]) == 2
    assert torch.equal(decode_block(CODEC, parts, (9, 2, 2)), delta)


def test_no_change_and_what_is_left_out_have_no_parts():
    assert encode_block(CODEC, "exact", torch.zeros(3, 4)) == {}
    assert encode_block(CODEC, "skip", torch.ones(3, 4)) == {}
    assert torch.equal(decode_block(CODEC, {}, (3, 4)), torch.zeros(3, 4))


def test_rows_that_do_not_fit_are_refused():
    parts = {"exact": torch.ones(4), "rows": torch.tensor([3], dtype=torch.uint8)}
    with pytest.raises(PackError, match="'exact' has 4 elements, expected 8"):
        decode_block(CODEC, parts, (5, 4))
