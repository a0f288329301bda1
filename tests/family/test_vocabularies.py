"""Vocabularies: one out of those of several models, and whose rows stand where."""

import json

import pytest
import torch

from families import saved
from personae.errors import CheckpointError
from personae.family.vocabularies import MergedVocabulary, TokenRow
from toy_vocabularies import WORDS, merged, model, tokenizer


def indexes(found: MergedVocabulary) -> dict[str, list[int] | None]:
    every = {**found.experts} | ({"base": found.base} if found.base else {})
    return {n: None if m.index is None else m.index.tolist() for n, m in every.items()}


# -- nothing asked for --------------------------------------------------------------------------


def test_equal_vocabularies_need_nothing(tmp_path):
    base = model(tmp_path / "base", 8, tokenizer("<x>"))
    same = model(tmp_path / "same", 8, tokenizer("<x>"))
    other_files = model(tmp_path / "other", 8, tokenizer("<x>"))
    settings = json.loads((other_files / "tokenizer.json").read_text())
    settings["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (other_files / "tokenizer.json").write_text(json.dumps({**settings}))
    no_files = model(tmp_path / "bare", 8, None)
    found, _ = merged(base, None, same=same, other=other_files, bare=no_files)
    assert found is None


def test_unequal_vocabularies_are_refused_all_at_once(tmp_path):
    base = model(tmp_path / "base", 8, tokenizer())
    larger = model(tmp_path / "larger", 9, tokenizer("<x>"))
    other = model(tmp_path / "other", 8, tokenizer("<y>"))
    with pytest.raises(CheckpointError) as caught:
        merged(base, None, larger=larger, other=other)
    text = str(caught.value)
    assert "Expert 'larger' and the base have vocabularies of 9 and 8 rows." in text
    assert "Expert 'other' and the base have vocabularies of 5 and 4 tokens in 8 rows" in text
    assert "not the same: <y>" in text
    assert "tokenizer_source: 'base', 'union' or an expert's name" in text


def test_models_without_embeddings_are_no_matter(tmp_path):
    for name in ("base", "a"):
        saved({"patch.weight": torch.ones(3, 2)}, tmp_path / name)
    assert merged(tmp_path / "base", None, a=tmp_path / "a")[0] is None
    assert merged(tmp_path / "base", "union", a=tmp_path / "a")[0] is None


# -- one model's vocabulary ---------------------------------------------------------------------


def test_the_base_s_vocabulary_with_padding(tmp_path):
    # base: 0 <unk>, 1 a, 2 b, 3 ab, 4 <x>, 5..7 padding
    base = model(tmp_path / "base", 8, tokenizer("<x>"))
    # swapped letters, <y> before <x>, rows 6..8 padding
    words = ("<unk>", "b", "a", "ab")
    expert = model(tmp_path / "expert", 9, tokenizer("<y>", "<x>", words=words))
    found, _ = merged(base, "base", e=expert)
    assert found is not None and found.size == 8
    # Row 5 is padding in the base, <x> in the expert: the base's row stays. 6, 7 are padding in
    # both. <y> does not come out.
    assert indexes(found) == {"base": None, "e": [0, 2, 1, 3, 5, -1, 6, 7]}


def test_an_expert_s_vocabulary(tmp_path):
    base = model(tmp_path / "base", 5, tokenizer("<z>"))
    expert = model(tmp_path / "expert", 7, tokenizer("<x>", "<y>"))
    found, _ = merged(base, "e", e=expert)
    assert found is not None and found.size == 7
    # 0..3 shared, 4 <x>, 5 <y>: the base has neither; 6 is no row of the base
    assert indexes(found) == {"base": [0, 1, 2, 3, -1, -1, -1], "e": None}


def test_an_expert_s_tokenizer_of_the_same_tokens(tmp_path):
    base, expert = (model(tmp_path / n, 5, tokenizer("<x>")) for n in ("base", "e"))
    found, (_, opened) = merged(base, "e", e=expert)
    assert found is not None and found.source is opened["e"]
    assert indexes(found) == {"base": None, "e": None}
    assert merged(base, "base", e=expert)[0] is None


def test_without_a_base_the_first_expert_stands_for_it(tmp_path):
    a = model(tmp_path / "a", 5, tokenizer("<x>"))
    b = model(tmp_path / "b", 5, tokenizer("<y>"))
    found, _ = merged(None, "union", a=a, b=b)
    assert found is not None and found.base is None and found.size == 6
    assert indexes(found) == {"a": [0, 1, 2, 3, 4, -1], "b": [0, 1, 2, 3, -1, 4]}


def test_a_model_whose_tokens_are_not_known(tmp_path):
    base = model(tmp_path / "base", 5, tokenizer("<x>"))
    bare = model(tmp_path / "bare", 6, None)
    with pytest.raises(CheckpointError, match=r"Expert 'e' .* has no tokenizer files"):
        merged(base, "base", e=bare)
    with pytest.raises(CheckpointError, match=r"The base .* has no tokenizer files"):
        merged(bare, "base", e=base)
    as_large = model(tmp_path / "as-large", 5, None)  # taken to have the base's
    assert merged(base, "base", e=as_large)[0] is None


def test_a_tokenizer_larger_than_its_embedding(tmp_path):
    base = model(tmp_path / "base", 5, tokenizer("<x>"))
    expert = model(tmp_path / "e", 4, tokenizer("<x>"))  # <x> has no row there
    found, _ = merged(base, "base", e=expert)
    assert found is not None and indexes(found) == {"base": None, "e": [0, 1, 2, 3, -1]}


# -- the union ----------------------------------------------------------------------------------


def test_a_union_takes_padding_rows_first(tmp_path):
    base = model(tmp_path / "base", 6, tokenizer())  # rows 4, 5 are padding
    a = model(tmp_path / "a", 6, tokenizer("<x>", "<y>"))
    b = model(tmp_path / "b", 7, tokenizer("<y>", "<z>"))
    found, _ = merged(base, "union", a=a, b=b)
    assert found is not None and found.size == 7
    # 4 <x> of a, 5 <y> of both, 6 <z> of b
    assert {t: said["id"] for t, said in found.appended.items()} == {"<x>": 4, "<y>": 5, "<z>": 6}
    assert indexes(found) == {
        "base": [0, 1, 2, 3, -1, -1, -1],
        "a": [0, 1, 2, 3, 4, 5, -1],
        "b": [0, 1, 2, 3, -1, 4, 5],
    }


def test_a_union_of_what_the_base_has_changes_nothing(tmp_path):
    base = model(tmp_path / "base", 6, tokenizer("<x>"))
    fewer = model(tmp_path / "a", 5, tokenizer())
    found, _ = merged(base, "union", a=fewer)
    assert found is not None and not found.appended
    # 4 is <x>, which a lacks; 5 is no row of a
    assert indexes(found) == {"base": None, "a": [0, 1, 2, 3, -1, -1]}


def test_what_a_union_cannot_hold_is_refused(tmp_path):
    base = model(tmp_path / "base", 5, tokenizer())
    other = model(tmp_path / "other", 6, tokenizer(words=(*WORDS, "c", "d")))
    with pytest.raises(CheckpointError, match=r"2 tokens of expert 'o' are in .*: c, d. A union"):
        merged(base, "union", o=other)
    old = model(tmp_path / "old", 5, None)
    (old / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(WORDS)}))
    added = model(tmp_path / "added", 5, tokenizer("<x>"))
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json, to which"):
        merged(old, "union", o=added)
    gaps = model(tmp_path / "gaps", 9, None)
    content = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 7}}, "added_tokens": []}
    (gaps / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="rows without tokens between its tokens"):
        merged(gaps, "union", o=gaps)


# -- rows cut, added and taken from somewhere else ----------------------------------------------


def embedding(found: MergedVocabulary, opened, name: str | None) -> list[float]:
    """The first column of a model's input embedding under the vocabulary that comes out."""
    base, experts = found.seen(*opened)
    seen = base if name is None else experts[name]
    assert seen is not None
    rows = seen.read("model.embed_tokens.weight")
    assert torch.equal(seen.read_rows("model.embed_tokens.weight", 1, len(rows)), rows[1:])
    return rows[:, 0].tolist()


def test_padding_is_kept_or_cut(tmp_path):
    base = model(tmp_path / "base", 8, tokenizer("<x>"))
    a = model(tmp_path / "a", 9, tokenizer("<x>"))
    found, opened = merged(base, "base", a=a)
    assert found is not None and found.size == 8
    found, opened = merged(base, "base", {"cut": True}, a=a)
    assert found is not None and found.size == 5
    assert embedding(found, opened, "a") == [100, 101, 102, 103, 104]


def test_rows_are_padded_with_the_mean_of_a_model_s_own(tmp_path):
    base = model(tmp_path / "base", 4, tokenizer())
    a = model(tmp_path / "a", 5, tokenizer("<x>"))
    found, opened = merged(base, "union", {"pad_to_multiple_of": 4}, a=a)
    assert found is not None and found.size == 8
    # (100 + 101 + 102 + 103) / 4 of the base, which has no <x>; 102 of five
    assert embedding(found, opened, None) == [100, 101, 102, 103, 0, 101.5, 101.5, 101.5]
    assert embedding(found, opened, "a") == [100, 101, 102, 103, 104, 102, 102, 102]
    assert found.base is not None
    assert found.base.present(0, 8).tolist() == [True] * 4 + [False] + [True] * 3
    assert merged(base, "base", {"pad_to_multiple_of": 2}, a=base)[0] is None


def test_rows_of_tokens_from_somewhere_else(tmp_path):
    base = model(tmp_path / "base", 6, tokenizer("<x>"))  # <x> is row 4, row 5 padding
    a = model(tmp_path / "a", 6, tokenizer("<y>", "<x>"))
    tokens = {
        "<x>": TokenRow("a", force=True),
        "<y>": TokenRow("base", token="b"),
        "<blank>": TokenRow(),
        "<third>": TokenRow("a", token_id=3),
    }
    found, opened = merged(base, "union", {"tokens": tokens, "cut": True}, a=a)
    assert found is not None
    assert [*found.appended] == ["<y>", "<blank>", "<third>"]
    # <x> is a's row 5 in both; <y> of the base, which has none, is its own b; a keeps its own
    assert embedding(found, opened, None) == [100, 101, 102, 103, 105, 102, 0, 103]
    assert embedding(found, opened, "a") == [100, 101, 102, 103, 105, 104, 0, 103]
    assert found.base is not None and bool(found.base.present(0, 8).all())


def test_a_row_that_is_not_there_is_named(tmp_path):
    base = model(tmp_path / "base", 4, tokenizer())
    tokens = {"<p>": TokenRow("a", token="zz"), "<q>": TokenRow("base", token_id=4)}
    with pytest.raises(CheckpointError) as caught:
        merged(base, "base", {"tokens": tokens}, a=base)
    assert "'<p>' shall be token 'zz' of expert 'a', which has none" in str(caught.value)
    assert "'<q>' shall be row 4 of the base, which has none" in str(caught.value)
