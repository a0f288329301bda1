"""One vocabulary out of several: which row of each model stands for each row that comes out.

Everything here is decided from headers and tokenizer files. Rows of one token are merged over the
models that have it; a token that only some have is theirs alone. Padding, rows without a token, is
merged by position where it is padding in every model.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.configuration import CONFIG, with_dtype
from personae.checkpoints.naming import shown
from personae.checkpoints.vocabulary import (
    Vocabulary,
    embedding_rows,
    read_json,
    read_vocabulary,
    same_token_files,
)
from personae.checkpoints.vocabulary_rows import Lent, ModelRows, WithRows
from personae.errors import CheckpointError, Faults

BASE, UNION = "base", "union"
_HINT = (
    "Choose the vocabulary of the output with tokenizer_source: 'base', 'union' or an "
    "expert's name."
)


@dataclass(frozen=True)
class TokenRow:
    """Where the row of one token comes from, for models that have none.

    Attributes:
        model: 'base' or an expert's name; None: a row of zeros.
        token: The token whose row it is there; by default the same one.
        token_id: The row itself, in place of a token.
        force: Whether models get it that have a row of their own.
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class VocabularyChoice:
    """The vocabulary that shall come out.

    Attributes:
        source: 'base', 'union' or an expert's name. None: all models must have the same.
        tokens: Tokens whose rows come from somewhere else; added where the source lacks them.
        pad_to_multiple_of: What the number of rows is made a multiple of, with rows of the mean.
        cut: Whether rows after the last token are left out.
    """

    source: str | None = None
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    cut: bool = False


@dataclass(frozen=True)
class MergedVocabulary:
    """The vocabulary that comes out.

    Attributes:
        source: The model whose tokenizer comes out.
        size: Its rows, padding included.
        base: The base's rows; None where there is no base.
        experts: Name to the expert's rows.
        appended: Tokens that a union adds to the source's, with their rows and what tokenizer.json
            says of them.
    """

    source: Checkpoint
    size: int
    base: ModelRows | None
    experts: Mapping[str, ModelRows]
    appended: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def seen(
        self, base: Checkpoint | None, experts: Mapping[str, Checkpoint]
    ) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
        """Base and experts under this vocabulary; those that have it anyway as they are."""
        if base is not None and self.base is not None and self.base.index is not None:
            base = WithRows(base, self.base)
        return base, {
            name: model if rows.index is None else WithRows(model, rows)
            for (name, model), rows in zip(experts.items(), self.experts.values(), strict=True)
        }


def merge_vocabularies(
    base: Checkpoint | None,
    experts: Mapping[str, Checkpoint],
    choice: VocabularyChoice,
    is_merged: Callable[[str], bool] = lambda _: True,
) -> MergedVocabulary | None:
    """Work out the vocabulary that comes out.

    Args:
        base: The base, if there is one.
        experts: Name to expert.
        choice: What is wanted.
        is_merged: Whether a tensor is merged; where no embedding is, vocabularies do not matter.

    Returns:
        The vocabulary; None if all models have the base's (without one, the first expert's) and
        nothing else was asked for, or if they have none.

    Raises:
        CheckpointError: naming every model whose vocabulary differs though no source is named, or
            is not known, and tokens that cannot be added to another tokenizer.
    """
    models = ({} if base is None else {None: base}) | dict(experts)
    source = choice.source
    if source is None:
        _check_same(models, is_merged)
        return None
    first = next(iter(models))
    chosen = source if source in experts and source not in (BASE, UNION) else first
    vocabularies = _read_all(models, chosen)
    if vocabularies is None:
        return None
    out, appended = vocabularies[chosen], {}
    if source == UNION:
        out, appended = _union(vocabularies, chosen)
    out, appended = _with_new(out, appended, choice.tokens)
    _check_can_append(models[chosen], appended)
    out = _cut(out, appended) if choice.cut else out
    rows = _rows(out, vocabularies, models, chosen, choice.tokens)
    size = out.rows
    if choice.pad_to_multiple_of:
        size += -size % choice.pad_to_multiple_of
        rows = {name: _padded(own, out.rows, size) for name, own in rows.items()}
    if chosen == first and all(model.index is None for model in rows.values()):
        return None
    return MergedVocabulary(
        source=models[chosen],
        size=size,
        base=rows.pop(None, None),
        experts={str(name): found for name, found in rows.items()},
        appended=appended,
    )


def _label(name: str | None) -> str:
    return "the base" if name is None else f"expert '{name}'"


def _check_same(models: Mapping[str | None, Checkpoint], is_merged: Callable[[str], bool]) -> None:
    """Refuse vocabularies that differ from the first model's.

    Raises:
        CheckpointError: naming all that do, with both sizes.
    """
    faults = Faults()
    (name, first), *others = models.items()
    rows, tokens = _merged_rows(first, is_merged), None
    for other_name, other in others:
        own_rows = _merged_rows(other, is_merged)
        if rows is None or own_rows is None:
            continue
        both = f"{_label(other_name)} and {_label(name)}"
        both = both[0].upper() + both[1:]
        if own_rows != rows:
            faults.add(f"{both} have vocabularies of {own_rows:,} and {rows:,} rows. {_HINT}")
        elif not same_token_files(first, other):
            tokens = tokens or read_vocabulary(first)
            own = read_vocabulary(other)
            if tokens and own and own.tokens != tokens.tokens:
                pairs = own.tokens.items() ^ tokens.tokens.items()
                apart = sorted({token for token, _ in pairs})
                faults.add(
                    f"{both} have vocabularies of {len(own.tokens):,} and {len(tokens.tokens):,} "
                    f"tokens in {rows:,} rows each, but not the same: {shown(apart)}. {_HINT}"
                )
    faults.raise_if_any(CheckpointError)


def _merged_rows(model: Checkpoint, is_merged: Callable[[str], bool]) -> int | None:
    return embedding_rows({name: spec for name, spec in model.specs.items() if is_merged(name)})


def _read_all(
    models: Mapping[str | None, Checkpoint], chosen: str | None
) -> dict[str | None, Vocabulary] | None:
    """Every model's vocabulary; None if none has an embedding.

    A model without tokenizer files, but of the first one's size, has the first one's vocabulary.

    Raises:
        CheckpointError: naming every model whose vocabulary is not known.
    """
    faults = Faults()
    found: dict[str | None, Vocabulary] = {}
    rows = {name: embedding_rows(model.specs) for name, model in models.items()}
    if not any(rows.values()):
        return None
    first = next(iter(models))
    for name, model in models.items():
        vocabulary = read_vocabulary(model)
        if vocabulary is None and name != chosen and first in found and rows[name] == rows[first]:
            vocabulary = replace(found[first], source=model.source)
        if vocabulary is None:
            label = _label(name)
            faults.add(
                f"{label[0].upper()}{label[1:]} ({model.source}) has no tokenizer files that tell "
                "its vocabulary. Copy its tokenizer beside the weights."
            )
        else:
            found[name] = vocabulary
    faults.raise_if_any(CheckpointError)
    return found


def _union(
    vocabularies: Mapping[str | None, Vocabulary],
    chosen: str | None,
) -> tuple[Vocabulary, dict[str, Mapping[str, object]]]:
    """The chosen vocabulary, and after it the tokens that others have added to theirs.

    Raises:
        CheckpointError: naming tokens that cannot be added, as they are part of the other
            tokenizer's model and not taken out of texts beforehand.
    """
    faults = Faults()
    start = vocabularies[chosen]
    row = start.next_row
    if row <= max(start.tokens.values(), default=-1):
        faults.add(
            f"{start.source} has rows without tokens between its tokens, so none can be added. "
            f"Name another tokenizer_source."
        )
    tokens, appended = dict(start.tokens), {}
    for name, own in vocabularies.items():
        extra = [t for t in sorted(own.tokens, key=own.tokens.__getitem__) if t not in tokens]
        extra = [token for token in extra if own.tokens[token] < own.rows]
        strange = [token for token in extra if token not in own.added]
        if strange:
            faults.add(
                f"{len(strange):,} tokens of {_label(name)} are in its tokenizer's own model and "
                f"not in {start.source}: {shown(strange)}. A union adds only added tokens. Choose "
                "the tokenizer of the output: tokenizer_source: base, or an expert's name."
            )
            continue
        for token in extra:
            tokens[token] = row
            appended[token] = {**own.added[token], "id": row}
            row += 1
    faults.raise_if_any(CheckpointError)
    size = max(start.rows, row if appended else 0)
    return replace(start, tokens=tokens, rows=size), appended


def _with_new(
    out: Vocabulary,
    appended: Mapping[str, Mapping[str, object]],
    tokens: Mapping[str, TokenRow],
) -> tuple[Vocabulary, dict[str, Mapping[str, object]]]:
    """A vocabulary with tokens after its last one, and all that are added to it."""
    after, rows = dict(appended), dict(out.tokens)
    row = max(out.next_row, 1 + max(out.tokens.values(), default=-1))
    for token in tokens:
        if token not in rows:
            rows[token] = row
            after[token] = {"content": token, "id": row}
            row += 1
    size = max(out.rows, row) if len(rows) > len(out.tokens) else out.rows
    return replace(out, tokens=rows, rows=size), after


def _check_can_append(source: Checkpoint, appended: Mapping[str, object]) -> None:
    """Refuse tokens for a tokenizer without a file to which they could be added.

    Raises:
        CheckpointError: saying what to do.
    """
    if appended and "tokenizer.json" not in source.auxiliary_files:
        raise CheckpointError(
            f"{source.source} has no tokenizer.json, to which tokens could be added. Load it with "
            "AutoTokenizer and save it, which writes one."
        )


def _cut(out: Vocabulary, appended: Mapping[str, object]) -> Vocabulary:
    """A vocabulary without the rows after its last token."""
    rows = (row for token, row in out.tokens.items() if row < out.rows or token in appended)
    return replace(out, rows=1 + max(rows, default=-1))


def _padded(own: ModelRows, rows: int, size: int) -> ModelRows:
    """A model's rows with more of them, which are the mean of the others."""
    if size == rows:
        return own
    index = torch.arange(rows) if own.index is None else own.index
    lent = {**own.lent, **dict.fromkeys(range(rows, size), Lent("mean"))}
    return ModelRows(own.rows, torch.cat([index, torch.full((size - rows,), -1)]), lent)


def _donors(
    vocabularies: Mapping[str | None, Vocabulary],
    models: Mapping[str | None, Checkpoint],
    wanted: Mapping[str, TokenRow],
) -> dict[str, Lent]:
    """The row that each of these tokens shall have.

    Raises:
        CheckpointError: naming every token that the model it should be of lacks.
    """
    faults = Faults()
    found: dict[str, Lent] = {}
    for token, how in wanted.items():
        if how.model is None:
            found[token] = Lent("zero")
            continue
        name = how.model if how.model in models else None
        own = vocabularies[name]
        known = own.tokens.get(how.token or token, own.rows)
        row = known if how.token_id is None else how.token_id
        if not 0 <= row < own.rows:
            which = f"row {row}" if how.token_id is not None else f"token '{how.token or token}'"
            faults.add(
                f"tokenizer: tokens: '{token}' shall be {which} of {_label(name)}, which has none. "
                "Name another token or model."
            )
        found[token] = Lent(models[name], row)
    faults.raise_if_any(CheckpointError)
    return found


def _rows(
    out: Vocabulary,
    vocabularies: Mapping[str | None, Vocabulary],
    models: Mapping[str | None, Checkpoint],
    chosen: str | None,
    wanted: Mapping[str, TokenRow],
) -> dict[str | None, ModelRows]:
    """For each model, which of its rows stands for each row that comes out.

    Raises:
        CheckpointError: if no model has a row for some token, or not the one that is wanted.
    """
    tokens = [(token, row) for token, row in out.tokens.items() if row < out.rows]
    named = torch.zeros(out.rows, dtype=torch.bool)
    named[[row for _, row in tokens]] = True
    padding = ~named
    for own in vocabularies.values():
        blank = torch.zeros(out.rows, dtype=torch.bool)
        blank[: own.rows] = True
        blank[[row for row in own.tokens.values() if row < min(own.rows, out.rows)]] = False
        padding &= blank
    positions = torch.arange(out.rows)
    donors = _donors(vocabularies, models, wanted)
    found: dict[str | None, ModelRows] = {}
    for name, own in vocabularies.items():
        index = torch.where(padding, positions, -1)
        pairs = [(row, own.tokens[token]) for token, row in tokens if token in own.tokens]
        if pairs:
            targets, rows = torch.tensor(pairs).T
            inside = rows < own.rows
            index[targets[inside]] = rows[inside]
        if name == chosen:  # padding here, a token elsewhere: its own row is all there is
            own_rows = positions[: own.rows]
            blank = (index[: own.rows] < 0) & ~named[: own.rows]
            index[: own.rows] = torch.where(blank, own_rows, index[: own.rows])
        lent = {
            out.tokens[token]: donor
            for token, donor in donors.items()
            if index[out.tokens[token]] < 0 or wanted[token].force
        }
        index[[*lent]] = -1
        same = own.rows == out.rows and torch.equal(index, positions)
        found[name] = ModelRows(own.rows, None if same else index, lent)
    nowhere = torch.stack([m.present(0, out.rows) for m in found.values()]).any(dim=0).logical_not()
    if nowhere.any():
        raise CheckpointError(
            f"No model has a row for token {int(nowhere.nonzero()[0])} of {out.source}. "
            "Its tokenizer has more tokens than its embedding has rows: give the right one."
        )
    return found


_OF_TOKENIZER = re.compile(
    r"(tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt|bpe)|merges\.txt|.*\.(model|tiktoken|bpe|vocab)|tokenization_.*\.py"
    r"|chat_template\.(jinja|json)|additional_chat_templates/.*|generation_config\.json)"
)
_TOKEN_ROW = re.compile(r"\w+_token_id")


def merged_auxiliary_files(
    model: Checkpoint, vocabulary: MergedVocabulary | None, dtype: str | None
) -> dict[str, Path | bytes]:
    """The small files beside merged weights.

    Args:
        model: Whose files they are: the base, or the first expert where there is none.
        vocabulary: What comes out, with the tokenizer of its source; None: the model's own.
        dtype: What the weights come out in, such as 'float16'; None: the model's own.

    Returns:
        Relative file name to the file to copy, or to its content.

    Raises:
        CheckpointError: if a configuration is damaged.
    """
    files: dict[str, Path | bytes] = {**model.auxiliary_files}
    if vocabulary is not None:
        files = _with_vocabulary(vocabulary, model)
    config = files.get(CONFIG)
    if config is None:
        return files
    said = json.loads(config) if isinstance(config, bytes) else read_object(config)
    return files if dtype is None else files | {CONFIG: _text(with_dtype(said, dtype))}


def _with_vocabulary(vocabulary: MergedVocabulary, model: Checkpoint) -> dict[str, Path | bytes]:
    source = vocabulary.source
    files: dict[str, Path | bytes] = {
        name: path
        for name, path in model.auxiliary_files.items()
        if not _OF_TOKENIZER.fullmatch(name)
    }
    for name, path in source.auxiliary_files.items():
        if _OF_TOKENIZER.fullmatch(name):
            files[name] = path
    if CONFIG in files:
        own = read_object(model.auxiliary_files[CONFIG])
        other = (
            read_object(source.auxiliary_files[CONFIG]) if CONFIG in source.auxiliary_files else {}
        )
        files[CONFIG] = _text(_config(own, other, vocabulary.size))
    if vocabulary.appended:
        files |= _with_tokens(source.auxiliary_files, vocabulary.appended)
    return files


def _config(own: dict[str, Any], other: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A configuration with another vocabulary size, and the rows of special tokens of another."""
    config = dict(own)
    for key, value in other.items():
        if _TOKEN_ROW.fullmatch(key):
            config[key] = value
    if "vocab_size" in config:
        config["vocab_size"] = size
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _config(config["text_config"], other.get("text_config", {}), size)
    return config


def _with_tokens(
    auxiliary_files: Mapping[str, Path], appended: Mapping[str, Mapping[str, Any]]
) -> dict[str, Path | bytes]:
    """Tokenizer files with more added tokens."""
    files: dict[str, Path | bytes] = {}
    tokenizer = read_object(auxiliary_files["tokenizer.json"])
    tokenizer["added_tokens"] = [
        *(tokenizer.get("added_tokens") or []),
        *({**_MARKS, **said} for said in appended.values()),
    ]
    files["tokenizer.json"] = _text(tokenizer)
    if "added_tokens.json" in auxiliary_files:
        rows = {token: said["id"] for token, said in appended.items()}
        files["added_tokens.json"] = _text(read_object(auxiliary_files["added_tokens.json"]) | rows)
    if "tokenizer_config.json" in auxiliary_files:
        config = read_object(auxiliary_files["tokenizer_config.json"])
        if "added_tokens_decoder" in config:
            for said in appended.values():
                marks = {k: v for k, v in {**_MARKS, **said}.items() if k != "id"}
                config["added_tokens_decoder"][str(said["id"])] = marks
            files["tokenizer_config.json"] = _text(config)
    return files


_MARKS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
"""What tokenizer.json says of an added token of which nothing is known."""


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: if the file holds none.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object. Copy or download it again.")
    return content


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
