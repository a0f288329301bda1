"""Vocabularies: rows of embeddings as they come out, and what stands for those a model lacks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personae.checkpoints import open_checkpoint
from personae.checkpoints.vocabulary_rows import ModelRows, WithRows, settle
from personae.errors import CheckpointError
from toy_vocabularies import model


def test_a_token_the_base_lacks_has_the_mean_of_those_who_have_it_as_reference():
    values = torch.tensor([[[4.0], [3.0], [0.0]], [[8.0], [0.0], [5.0]]])  # two experts, 3 rows
    reference = torch.tensor([[0.0], [1.0], [1.0]])
    present = torch.tensor([[True, True, False], [True, False, True]])
    settle(values, reference, present, torch.tensor([False, True, True]))
    # row 0: the base lacks it; (4 + 8) / 2. Row 1: 3 - 1, absent. Row 2: absent, 5 - 1.
    assert reference.flatten().tolist() == [6.0, 1.0, 1.0]
    assert values[..., 0].tolist() == [[-2.0, 2.0, 0.0], [2.0, 0.0, 4.0]]


@given(
    st.lists(st.integers(-1, 6), min_size=1, max_size=12),
    st.data(),
)
def test_rows_seen_are_rows_selected(tmp_path_factory, index, data):
    path = tmp_path_factory.getbasetemp() / "seen"
    if not path.exists():
        model(path, 7, None)
    plain = open_checkpoint(str(path))
    view = WithRows(plain, ModelRows(7, torch.tensor(index)))
    name = "lm_head.weight"
    whole = torch.stack([plain.read(name)[n] if n >= 0 else torch.zeros(2) for n in index])
    assert view.specs[name].shape == (len(index), 2)
    assert torch.equal(view.read(name), whole)
    start = data.draw(st.integers(0, len(index)))
    stop = data.draw(st.integers(start, len(index)))
    assert torch.equal(view.read_rows(name, start, stop), whole[start:stop])
    assert torch.equal(view.read("model.layers.0.norm.weight"), torch.ones(2))


def test_rows_out_of_range_are_refused(tmp_path):
    view = WithRows(
        open_checkpoint(str(model(tmp_path / "m", 7, None))), ModelRows(7, torch.arange(5))
    )
    with pytest.raises(CheckpointError, match=r"rows 3:6 of 'lm_head.weight' were asked for"):
        view.read_rows("lm_head.weight", 3, 6)
