"""Tokenizers of a few letters, models with them, and their vocabularies as one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from families import saved
from personae.checkpoints import open_checkpoint
from personae.family.vocabularies import (
    MergedVocabulary,
    VocabularyChoice,
    merge_vocabularies,
)

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
    base: Path | None, source: str | None, more: Mapping[str, Any] = {}, **experts: Path
) -> tuple[MergedVocabulary | None, Any]:
    opened = {name: open_checkpoint(str(path)) for name, path in experts.items()}
    reference = open_checkpoint(str(base)) if base else None
    choice = VocabularyChoice(source, **more)
    return merge_vocabularies(reference, opened, choice), (reference, opened)
