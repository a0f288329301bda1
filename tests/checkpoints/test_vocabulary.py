"""Vocabularies: what tokenizer files say, and one vocabulary out of several."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from families import saved
from personae.checkpoints import open_checkpoint
from personae.checkpoints.vocabularies import MergedVocabulary, merge_vocabularies
from personae.checkpoints.vocabulary import (
    Vocabulary,
    embedding_rows,
    has_vocabulary_axis,
    read_vocabulary,
)
from personae.checkpoints.vocabulary_files import companions_with
from personae.checkpoints.vocabulary_rows import ModelRows, WithRows, settle
from personae.errors import CheckpointError

WORDS = ("<unk>", "a", "b", "ab")


def tokenizer(*added: str, words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """A BPE of a few letters: 'a' + 'b' merge. Added tokens take the next rows."""
    model = models.BPE({w: n for n, w in enumerate(words)}, [("a", "b")], unk_token="<unk>")
    plain = Tokenizer(model)
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.decoder = decoders.BPEDecoder()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    fast.add_tokens(list(added))
    return fast


def model(
    directory: Path, rows: int, tokens: PreTrainedTokenizerFast | None, name: str = "model."
) -> Path:
    """A checkpoint with embeddings of so many rows: row n holds n + 100, n + 200, …"""
    first = torch.arange(rows, dtype=torch.float32)[:, None]
    state = {
        f"{name}embed_tokens.weight": first + torch.tensor([100.0, 200.0]),
        f"{name}layers.0.norm.weight": torch.ones(2),
        "lm_head.weight": first + torch.tensor([300.0, 400.0]),
    }
    saved(state, directory, json.dumps({"vocab_size": rows, "eos_token_id": 0}))
    if tokens is not None:
        tokens.save_pretrained(directory)
    return directory


def merged(
    base: Path | None, source: str | None, **experts: Path
) -> tuple[MergedVocabulary | None, Any]:
    opened = {name: open_checkpoint(str(path)) for name, path in experts.items()}
    reference = open_checkpoint(str(base)) if base else None
    return merge_vocabularies(reference, opened, source), (reference, opened)


def indexes(found: MergedVocabulary) -> dict[str, list[int] | None]:
    every = {**found.experts} | ({"base": found.base} if found.base else {})
    return {n: None if m.index is None else m.index.tolist() for n, m in every.items()}


# -- one model ----------------------------------------------------------------------------------


def test_tokens_of_a_tokenizer_json(tmp_path):
    path = model(tmp_path / "m", 8, tokenizer("<x>", "<y>"))
    found = read_vocabulary(open_checkpoint(str(path)))
    assert found is not None
    assert found.rows == 8
    assert found.tokens == {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "<x>": 4, "<y>": 5}
    assert set(found.added) == {"<unk>", "<x>", "<y>"}
    assert (found.core_size, found.next_row) == (4, 6)


def test_tokens_of_a_unigram_model(tmp_path):
    path = model(tmp_path / "m", 3, None)
    content = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁a", -1.0]]}}
    (path / "tokenizer.json").write_text(json.dumps(content))
    found = read_vocabulary(open_checkpoint(str(path)))
    assert found is not None and found.tokens == {"<unk>": 0, "▁a": 1}


def test_tokens_of_old_files(tmp_path):
    path = model(tmp_path / "m", 6, None)
    (path / "vocab.txt").write_text("[PAD]\n[UNK]\nword\n##s\n", "utf-8")
    (path / "added_tokens.json").write_text('{"<x>": 4}')
    decoder = {"0": {"content": "[PAD]", "special": True}, "5": {"content": "<y>"}}
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    found = read_vocabulary(open_checkpoint(str(path)))
    assert found is not None
    assert found.tokens == {"[PAD]": 0, "[UNK]": 1, "word": 2, "##s": 3, "<x>": 4, "<y>": 5}
    (path / "vocab.txt").unlink()
    (path / "vocab.json").write_text('{"a": 0, "b": 1}')
    found = read_vocabulary(open_checkpoint(str(path)))
    assert found is not None and found.tokens["b"] == 1 and found.core_size == 2


def test_no_tokenizer_and_no_embedding_are_no_vocabulary(tmp_path):
    assert read_vocabulary(open_checkpoint(str(model(tmp_path / "m", 3, None)))) is None
    saved({"patch.weight": torch.ones(3, 2)}, tmp_path / "v")
    vision = open_checkpoint(str(tmp_path / "v"))
    assert embedding_rows(vision.specs) is None
    assert read_vocabulary(vision) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "is no JSON"),
        ("tokenizer.json", "{}", "holds no vocabulary"),
        ("vocab.json", "[1]", "holds no vocabulary"),
        ("tokenizer.model", "binary", r"only in tokenizer.model, which is not read"),
    ],
)
def test_files_that_tell_no_tokens(tmp_path, name, text, message):
    path = model(tmp_path / "m", 3, None)
    (path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_vocabulary(open_checkpoint(str(path)))


def test_which_tensors_have_a_vocabulary_axis(tmp_path):
    shapes = {
        "model.embed_tokens.weight": (8, 2),
        "lm_head.weight": (8, 2),
        "cls.predictions.bias": (8,),
        "cls.predictions.decoder.weight": (8, 2),
        "classifier.weight": (8, 2),
        "wpe.weight": (8, 2),
        "decoder.weight": (3, 2),
    }
    saved({n: torch.zeros(s) for n, s in shapes.items()}, tmp_path / "m")
    specs = open_checkpoint(str(tmp_path / "m")).specs
    assert embedding_rows(specs) == 8
    assert sorted(n for n, s in specs.items() if has_vocabulary_axis(s, 8)) == [
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]


# -- several: nothing asked for -----------------------------------------------------------------


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


def test_the_union_tokenizer_reads_the_tokens_of_all(tmp_path):
    base = model(tmp_path / "base", 5, tokenizer("<x>"))
    a = model(tmp_path / "a", 7, tokenizer("<x>", "<p>", "<q>"))
    b = model(tmp_path / "b", 6, tokenizer("<q>"))
    found, (reference, _) = merged(base, "union", a=a, b=b)
    assert found is not None
    out = tmp_path / "out"
    _write(companions_with(found, reference), out)
    joint = AutoTokenizer.from_pretrained(out)
    assert joint("ab<p> a<q><x>").input_ids == [3, 5, 1, 6, 4]
    assert len(joint) == 7
    assert joint.decode([5, 6]) == "<p><q>"
    config = json.loads((out / "config.json").read_text())
    assert config == {"vocab_size": 7, "eos_token_id": 0}


def test_tokens_are_added_to_every_file_that_lists_them(tmp_path):
    base = model(tmp_path / "base", 4, tokenizer())
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"0": {"content": "<unk>", "special": True}}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "added_tokens.json").write_text("{}")
    expert = model(tmp_path / "e", 5, tokenizer("<x>"))
    found, (reference, _) = merged(base, "union", e=expert)
    assert found is not None
    out = tmp_path / "out"
    _write(companions_with(found, reference), out)
    decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder["4"]["content"] == "<x>" and "id" not in decoder["4"]
    assert json.loads((out / "added_tokens.json").read_text()) == {"<x>": 4}
    assert AutoTokenizer.from_pretrained(out)("a<x>").input_ids == [1, 4]


def test_an_expert_s_tokenizer_replaces_the_base_s(tmp_path):
    base = model(tmp_path / "base", 5, tokenizer("<x>"))
    (base / "chat_template.jinja").write_text("the base's")
    (base / "preprocessor_config.json").write_text("{}")
    expert = model(tmp_path / "e", 6, tokenizer("<y>"))
    config = {"vocab_size": 6, "eos_token_id": 4, "text_config": {"vocab_size": 6}}
    (expert / "config.json").write_text(json.dumps({**config, "architectures": ["Other"]}))
    nested = {"vocab_size": 5, "eos_token_id": 0, "text_config": {"vocab_size": 5, "x": 1}}
    (base / "config.json").write_text(json.dumps(nested))
    found, (reference, _) = merged(base, "e", e=expert)
    assert found is not None
    out = tmp_path / "out"
    _write(companions_with(found, reference), out)
    assert not (out / "chat_template.jinja").exists()
    assert (out / "preprocessor_config.json").exists()
    assert (out / "tokenizer.json").read_bytes() == (expert / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text()) == {
        "vocab_size": 6,
        "eos_token_id": 4,
        "text_config": {"vocab_size": 6, "x": 1},
    }


def test_a_merged_model_with_a_union_vocabulary_runs(tmp_path):
    """The mean of two experts of different vocabularies, row by row, loaded by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    added = {"base": (), "a": ("<p>",), "b": ("<q>", "<p>")}
    for seed, (name, tokens) in enumerate(added.items()):
        config = LlamaConfig(
            vocab_size=4 + len(tokens),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=0,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer(*tokens).save_pretrained(tmp_path / name)
    found, (base, experts) = merged(tmp_path / "base", "union", a=tmp_path / "a", b=tmp_path / "b")
    assert found is not None and found.base is not None
    state: dict[str, Tensor] = {}
    views = [WithRows(experts[name], found.experts[name]) for name in ("a", "b")]
    reference = WithRows(base, found.base)
    for name, spec in reference.specs.items():
        values, kept = torch.stack([view.read(name) for view in views]), reference.read(name)
        if found.base.has_axis(base.specs[name]):
            rows = spec.shape[0]
            present = torch.stack([found.experts[n].present(0, rows) for n in ("a", "b")])
            kept = kept.clone()
            settle(values, kept, present, found.base.present(0, rows))
        else:
            values -= kept
        state[name] = kept + values.mean(dim=0)
    out = tmp_path / "out"
    saved(state, out, None)
    _write(companions_with(found, base), out)
    joint: Any = AutoModelForCausalLM.from_pretrained(out)
    tokens = AutoTokenizer.from_pretrained(out)
    a, b = (experts[name].read("model.embed_tokens.weight") for name in ("a", "b"))
    rows = joint.get_input_embeddings().weight.detach()
    assert tokens("<p><q>").input_ids == [4, 5]
    torch.testing.assert_close(rows[4], (a[4] + b[5]) / 2)
    assert torch.equal(rows[5], b[4])
    torch.testing.assert_close(rows[:4], (a[:4] + b[:4]) / 2)
    assert joint(torch.tensor([tokens("ab<p> b<q>").input_ids])).logits.shape == (1, 4, 6)


# -- rows ---------------------------------------------------------------------------------------


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


def test_the_next_row_follows_what_the_tokenizers_library_does():
    vocabulary = Vocabulary("m", 9, {"a": 0, "b": 1, "<x>": 5}, {"<x>": {"id": 5}}, 2)
    assert vocabulary.next_row == 6
    assert Vocabulary("m", 9, {"a": 0, "b": 1}, {}, 2).next_row == 2


def _write(files: dict[str, Path | bytes], out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content.read_bytes() if isinstance(content, Path) else content
        (out / name).write_bytes(data)
