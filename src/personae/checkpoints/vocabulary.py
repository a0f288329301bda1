"""The vocabulary of one model: its tokens, and the rows they have in its embedding matrices.

Read from the tokenizer's small files (tokenizer.json, vocab.json, vocab.txt, SentencePiece's
tokenizer.model, added tokens), without a tokenizer library. A vocabulary may be padded: the
matrices then have more rows than there are tokens.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from personae import _small_files as small_files
from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.sentencepiece import read_pieces
from personae.errors import CheckpointError

_PIECES = ("tokenizer.model", "spiece.model")
"""SentencePiece files whose pieces' places are their rows; fairseq's have other rows."""
TOKEN_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", *_PIECES)
"""Files that hold a vocabulary, in the order in which they are looked for."""

_ADDED_FILES = ("added_tokens.json", "tokenizer_config.json")
_MOST_ROWS = 1 << 31
_BINARY_ENDINGS = (".model", ".tiktoken")
_INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in|token_embedding|shared"
    r"|embeddings|tokens_embed|embedding_projection|codec_embedding|transformer\.w)\.weight$"
)
_OUTPUT = re.compile(
    r"((^|\.)(\w*lm_head|lm_head\.out_proj|lm_loss|embed_out|output|decoder|predictions"
    r"|output_projection|vocab_projector|unembedding_projection|codec_head|pred_layer\.proj)|^proj_out)"
    r"\.(weight|bias)$"
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of one model.

    Attributes:
        source: The model, for texts.
        rows: Rows of its embedding matrix; with padding, more than there are tokens.
        tokens: Token to row.
        added: Tokens that are taken out of a text before the tokenizer's model sees it, such as
            '<|im_end|>', with what tokenizer.json says of them.
        core_size: Number of tokens of the tokenizer's model itself.
    """

    source: str
    rows: int
    tokens: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    core_size: int = 0

    @property
    def next_row(self) -> int:
        """The row the tokenizers library gives to the next token that is added."""
        after = 1 + max((self.tokens[token] for token in self.added), default=-1)
        return max(after, self.core_size)


def is_input_embedding(name: str) -> bool:
    """Whether a tensor is by its name an embedding of tokens."""
    return _INPUT.search(name) is not None


def is_output_layer(name: str) -> bool:
    """Whether a tensor is by its name a language model's output layer, or the bias of one."""
    return _OUTPUT.search(name) is not None


def embedding_rows(specs: Mapping[str, TensorSpec]) -> int | None:
    """Rows of the input embedding; None if there is none (a vision model)."""
    for name, spec in specs.items():
        if len(spec.shape) == 2 and is_input_embedding(name):
            return spec.shape[0]
    return None


def has_vocabulary_axis(spec: TensorSpec, rows: int) -> bool:
    """Whether a tensor's first axis is the vocabulary, of which there are so many rows.

    Input embeddings and output layers with their biases, told by name and size; position
    embeddings and classifiers are none.
    """
    called = is_input_embedding(spec.name) or is_output_layer(spec.name)
    return called and len(spec.shape) in (1, 2) and spec.shape[0] == rows


def same_token_files(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two models have tokenizer files, and the same bytes in those that say the tokens."""
    names = [
        {n for n in model.auxiliary_files if n in (*TOKEN_FILES, *_ADDED_FILES) or _is_binary(n)}
        for model in (one, other)
    ]
    return names[0] == names[1] != set() and all(
        one.auxiliary_files[name].read_bytes() == other.auxiliary_files[name].read_bytes()
        for name in names[0]
    )


def read_vocabulary(model: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a model; None if it has no tokenizer files or no embedding.

    Raises:
        CheckpointError: if a file is damaged, or the tokens are only in a binary one.
    """
    rows = embedding_rows(model.specs)
    found = next((name for name in TOKEN_FILES if name in model.auxiliary_files), None)
    if rows is None:
        return None
    if found is None:
        binary = next(filter(_is_binary, model.auxiliary_files), None)
        if binary is None:
            return None
        raise CheckpointError(
            f"{model.source} has its tokens only in {binary}, which is not read. Load it with "
            "AutoTokenizer and save it, which writes tokenizer.json."
        )
    tokens, added = _read_tokens(model.auxiliary_files[found])
    core_size = len(tokens)
    for name in _ADDED_FILES:
        if name in model.auxiliary_files:
            for content, said in _read_added(model.auxiliary_files[name]).items():
                added.setdefault(content, said)
    rows_of = tokens | {content: said["id"] for content, said in added.items()}
    return Vocabulary(model.source, rows, rows_of, added, core_size)


def _is_binary(name: str) -> bool:
    return name.endswith(_BINARY_ENDINGS)


def _read_tokens(path: Path) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Tokens of the tokenizer's model to rows, and what is added to them.

    Raises:
        CheckpointError: if the file is not what its name says.
    """
    if path.name == "vocab.txt":
        try:
            lines = small_files.read_text(path).removesuffix("\n").split("\n")
        except small_files.Unfit as error:
            raise CheckpointError(f"{path} {error}. Copy or download it again.") from error
        return {token.removesuffix("\r"): row for row, token in enumerate(lines)}, {}
    if path.name in _PIECES:
        try:
            return {piece: row for row, piece in enumerate(read_pieces(path))}, {}
        except ValueError as error:
            raise CheckpointError(
                f"{path} is no SentencePiece model: {error}. Load it with AutoTokenizer and save "
                "it, which writes tokenizer.json; or copy or download it again."
            ) from error
    content = read_json(path)
    try:
        if path.name == "vocab.json":
            return {str(token): _row(row) for token, row in content.items()}, {}
        vocab = content["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: pairs of token and score
            vocab = {piece[0]: row for row, piece in enumerate(vocab)}
        tokens = {str(token): _row(row) for token, row in vocab.items()}
        return tokens, _by_content(content.get("added_tokens") or [])
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} holds no vocabulary. Copy or download it again.") from error


def _read_added(path: Path) -> dict[str, dict[str, Any]]:
    """Tokens that added_tokens.json or tokenizer_config.json add.

    Raises:
        CheckpointError: if the file is not what its name says.
    """
    content = read_json(path)
    try:
        if path.name == "added_tokens.json":
            return {token: {"id": _row(row), "content": token} for token, row in content.items()}
        decoder = content.get("added_tokens_decoder") or {}
        return _by_content([{**said, "id": row} for row, said in decoder.items()])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} names no tokens. Copy or download it again.") from error


def _by_content(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(entry["content"]): {**entry, "id": _row(entry["id"])} for entry in entries}


def _row(value: Any) -> int:
    """A token's row, given as a number or, as a key of JSON, its digits.

    Raises:
        ValueError: if it cannot be the row of a matrix.
    """
    row = int(value) if isinstance(value, int | str) else -1
    if not 0 <= row < _MOST_ROWS:
        raise ValueError(f"{value!r} is no row")
    return row


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        CheckpointError: if it is none.
    """
    try:
        return small_files.read_json(path)
    except small_files.Unfit as error:
        raise CheckpointError(f"{path} {error}. Copy or download it again.") from error
