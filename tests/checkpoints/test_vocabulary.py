"""Vocabularies: what one model's tokenizer files and embeddings say."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from families import saved
from personae.checkpoints import open_checkpoint
from personae.checkpoints.vocabulary import (
    Vocabulary,
    embedding_rows,
    has_vocabulary_axis,
    is_input_embedding,
    is_output_layer,
    read_vocabulary,
)
from personae.commands.merge import merge
from personae.commands.merge_plan import plan_merge
from personae.errors import CheckpointError
from personae.recipe import MergeSettings
from toy_vocabularies import model, tokenizer


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
        ("vocab.json", f'{{"a": {2**70}}}', "holds no vocabulary"),
        ("vocab.json", '{"a": -1}', "holds no vocabulary"),
        ("vocab.json", '{"a": 1e999}', "holds no vocabulary"),
        ("tokenizer.json", f'{{"model": {{"vocab": {{"a": {2**31}}}}}}}', "holds no vocabulary"),
        ("added_tokens.json", f'{{"a": {2**70}}}', "names no tokens"),
        ("tokenizer.model", "binary", "is no SentencePiece model: .* AutoTokenizer"),
        ("tokenizer.model", "", "is no SentencePiece model: it has no pieces"),
        ("sentencepiece.bpe.model", "binary", "only in sentencepiece.bpe.model, which is not read"),
    ],
)
def test_files_that_tell_no_tokens(tmp_path, name, text, message):
    path = model(tmp_path / "m", 3, None)
    if name == "added_tokens.json":
        (path / "vocab.txt").write_text("a")
    (path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_vocabulary(open_checkpoint(str(path)))


def field(number: int, value: bytes | int, kind: int = 2) -> bytes:
    """A field of a message of protocol buffers, as its specification has it."""
    key = bytes([number << 3 | kind])
    if isinstance(value, int):
        return key + bytes([value & 0x7F | 0x80, value >> 7])  # as a number of two bytes
    return key + (bytes([len(value)]) if kind == 2 else b"") + value


def pieces(*texts: str) -> bytes:
    """A SentencePiece model: each piece with a score and, if it is no normal one, a type."""
    found = b""
    for text in texts:
        kind = field(3, 3) if text.startswith("<") else b""
        found += field(1, field(1, text.encode()) + field(2, b"\0\0\0\0", 5) + kind)
    return found + field(2, field(4, 300)) + field(3, b"nmt_nfkc")


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_pieces_of_sentencepiece_have_their_places_as_rows(tmp_path, name):
    path = model(tmp_path / "m", 6, None)
    (path / name).write_bytes(pieces("<unk>", "<s>", "▁the", "é"))
    (path / "added_tokens.json").write_text('{"<new>": 4}')
    found = read_vocabulary(open_checkpoint(str(path)))
    assert found is not None
    assert found.tokens == {"<unk>": 0, "<s>": 1, "▁the": 2, "é": 3, "<new>": 4}
    assert (found.core_size, found.next_row, found.rows) == (4, 5, 6)


def test_models_with_sentencepiece_alone_are_merged_by_token(tmp_path):
    base, other = model(tmp_path / "b", 4, None), model(tmp_path / "o", 4, None)
    (base / "tokenizer.model").write_bytes(pieces("<unk>", "a", "b", "c"))
    (other / "tokenizer.model").write_bytes(pieces("<unk>", "c", "a", "b"))
    experts = {"o": str(other)}
    with pytest.raises(CheckpointError, match="not the same"):
        plan_merge(str(base), experts)
    out = merge(
        str(base), experts, tmp_path / "out", settings=MergeSettings(tokenizer_source="base")
    )
    rows = load_file(out / "model.safetensors")["model.embed_tokens.weight"][:, 0]
    assert rows.tolist() == [100.0, 102.0, 103.0, 101.0]  # the other's rows, in the base's order
    assert (out / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("cut", [1, 3, 9, 20])
def test_a_cut_sentencepiece_model_is_told(tmp_path, cut):
    path = model(tmp_path / "m", 6, None)
    (path / "tokenizer.model").write_bytes(pieces("<unk>", "<s>", "▁the")[:cut])
    with pytest.raises(CheckpointError, match="is no SentencePiece model"):
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


# What transformers ties that is no embedding of tokens and no output layer over them, and modules.
_OTHERS = re.compile(
    r"\(|^head\.weight|bbox|class_embed|score_head|patch|relative_attention_bias|positional_embedding|ctc_head"
    r"|entity_|mim_head|image_head|eoi_embedding|additional_|layers$|norm\.weight|_head\.bias"
    r"|encoder\.out\.|embed_audio_tokens"
)


def test_names_of_embeddings_and_output_layers_are_those_that_transformers_ties():
    """Of every model of transformers, as its source says which weights are one."""
    models = Path(transformers.__file__).parent / "models"
    said = re.compile(r"_tied_weights_keys = [{\[](.*?)[}\]]", re.DOTALL)
    names = {
        re.sub(r"(?<!weight)(?<!bias)$", ".weight", name.replace("\\", "").rstrip("$"))
        for file in models.glob("*/modeling_*.py")
        for block in said.findall(file.read_text("utf-8"))
        for name in re.findall(r'"([^"]+)"', block)
        if not _OTHERS.search(name)
    }
    unknown = {n for n in names if not is_input_embedding(n) and not is_output_layer(n)}
    assert len(names) > 50 and unknown == set()


def test_the_next_row_follows_what_the_tokenizers_library_does():
    vocabulary = Vocabulary("m", 9, {"a": 0, "b": 1, "<x>": 5}, {"<x>": {"id": 5}}, 2)
    assert vocabulary.next_row == 6
    assert Vocabulary("m", 9, {"a": 0, "b": 1}, {}, 2).next_row == 2
