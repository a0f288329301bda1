"""The small files of a merged model, whose vocabulary or dtype may be another than the base's."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.configuration import CONFIG, with_dtype
from personae.checkpoints.vocabulary import read_json
from personae.errors import CheckpointError
from personae.family.vocabularies import MergedVocabulary

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
