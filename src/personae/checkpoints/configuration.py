"""The config.json of a model, changed to describe tensors of other shapes and other heads.

Used where a model is written that has no configuration of its own (an adapter, a bare file of
weights), and so gets its base's; or whose own no longer fits, as some tensors are left as in the
base. What is written must load with the class that the model had.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from personae._types import TensorSpec
from personae.checkpoints.vocabulary import is_input_embedding, is_output_layer

CONFIG = "config.json"
TIED = "tie_word_embeddings"
"""Whether the output layer is the embedding; where a configuration is silent, it is."""

_HEADS = (
    r"(?:^|\.)(?P<head>(?:\w*_)?classifier|score|qa_outputs|classification_head|logits_proj"
    r"|sequence_summary)\."
)
_HEAD = re.compile(_HEADS + r"(?:(?P<part>\w+)\.)?weight$")
_LAST_PARTS = (None, "out_proj", "linear_out", "linear", "summary", "1", "dense")
"""What a head calls its last layer, the one with a row a label; the likeliest first."""

_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "score": "ForSequenceClassification",
    "classification_head": "ForSequenceClassification",
    "qa_outputs": "ForQuestionAnswering",
}
"""How classes end, by PEFT's task type and by the name of a head that leaves no doubt."""

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
"""PEFT's types of tasks, by how classes end."""

_ENDING = re.compile(r"(For[A-Z]\w*|(With)?LMHeadModel|DoubleHeadsModel|Model)$")
_EMBEDDING = re.compile(r"embed|wte|wpe|lm_head|shared\.weight|decoder\.(weight|bias)|predictions")
_POSITIONS = re.compile(r"(^|[._])(wpe|positions?)([._]|$)")
_POSITION_KEY = re.compile(r"max_\w*positions?(_embeddings)?|n_positions|n_ctx")
_OFFSETS = (0, 2)
"""Rows that position embeddings have beyond what the configuration says; two in BART and OPT."""


class _Head(NamedTuple):
    """The tensor of a head that has a row a label, what the head is called, and how many rows."""

    name: str
    kind: str
    labels: int


def is_head(name: str) -> bool:
    """Whether a tensor is by its name part of what answers a task, or of an output layer."""
    outside = not any(part.isdigit() for part in name.split("."))
    return outside and (re.search(_HEADS, name) is not None or is_output_layer(name))


def task_type_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's type of a model's task, by its class; None where it is none of PEFT's, or unknown."""
    found = class_of(config) or ""
    if found.endswith("ForConditionalGeneration"):  # models of vision and language are such, too
        return "SEQ_2_SEQ_LM" if config.get("is_encoder_decoder") else "CAUSAL_LM"
    return next((task for ending, task in _TASKS.items() if found.endswith(ending)), None)


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class that a configuration names; None if it names none, or several."""
    classes = config.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and len(classes) == 1 else None


def fit_config(
    config: Mapping[str, Any],
    described: Mapping[str, TensorSpec],
    written: Mapping[str, TensorSpec],
    model_class: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Change a configuration of one model so that it describes another of the same architecture.

    Args:
        config: What describes the one.
        described: The one's tensors, by the other's names.
        written: The other's tensors.
        model_class: The other's class, or PEFT's type of its task; None if nobody says.

    Returns:
        The configuration, and what was changed, a few words each. Nothing is if it fits already.
    """
    fitted, changes = dict(config), list[str]()
    unlike = {
        name: (described[name].shape, spec.shape)
        for name, spec in written.items()
        if name in described and described[name].shape != spec.shape
    }
    for name, rows in _rows(unlike):
        positions = _POSITIONS.search(name) is not None
        found = _set_rows(fitted, *rows, positions=positions)
        if not found and not positions:  # not said, as it is the class's default
            inner = fitted.get("text_config")
            place = fitted if not isinstance(inner, dict) else inner
            place["vocab_size"] = rows[1]
            found = ["vocab_size"]
        changes += [f"{key} {rows[1]}" for key in found]
    dtype = _main_dtype(written)
    if dtype != _main_dtype(described):
        fitted = with_dtype(fitted, dtype)
        changes += [dtype] if dtype in fitted.values() else []
    inputs = {spec.shape for name, spec in written.items() if is_input_embedding(name)}
    new = [name for name in written if name not in described and is_output_layer(name)]
    if fitted.get(TIED, True) and any(written[name].shape in inputs for name in new):
        fitted = _untied(fitted)
        changes.append(f"{TIED} false")
    head = _head(written)
    if head and (head.name not in described or head.name in unlike):
        changes += _set_labels(fitted, head.labels)
        changes += _set_class(fitted, head.kind, head.name not in described, model_class)
    return fitted, list(dict.fromkeys(changes))


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration, and those in it, with another dtype where it names one."""
    changed = {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}
    inner = {
        key: with_dtype(value, dtype)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict)
    }
    return config | changed | inner


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those in it that say, with an output layer apart from the embedding."""
    inner = {k: _untied(v) for k, v in config.items() if isinstance(v, dict) and TIED in v}
    return config | inner | {TIED: False}


def _main_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """The dtype of most numbers, such as 'bfloat16'; '' if there are none."""
    counts = Counter[str]()
    for spec in specs.values():
        counts[spec.dtype_name] += spec.numel if spec.is_floating else 0
    return max(counts, key=counts.__getitem__, default="")


def _rows(unlike: Mapping[str, tuple[Any, Any]]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Embeddings and output layers that have more or fewer rows, with both numbers."""
    for name, (before, now) in unlike.items():
        if _EMBEDDING.search(name) and len(before) == len(now) > 0 and before[1:] == now[1:]:
            yield name, (before[0], now[0])


def _set_rows(config: dict[str, Any], before: int, now: int, *, positions: bool) -> list[str]:
    """Set every size that was the number of rows, in here and in configurations inside."""
    found: list[str] = []
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("_config") or "model_type" in value):
            inner = dict(value)
            found += _set_rows(inner, before, now, positions=positions)
            config[key] = inner
        elif positions:
            offset = next((o for o in _OFFSETS if value == before - o), None)
            if offset is not None and _POSITION_KEY.fullmatch(key):
                config[key] = now - offset
                found.append(key)
        elif key.endswith("vocab_size") and value in (before, now):
            config[key] = now
            found.append(key)
    return found


def _head(specs: Mapping[str, TensorSpec]) -> _Head | None:
    """The head of a model with labels; None if it has none."""
    found = [(m["part"], m["head"], name) for name in sorted(specs) if (m := _HEAD.search(name))]
    for part in _LAST_PARTS:
        for known, kind, name in found:
            if known == part and specs[name].shape:
                return _Head(name, kind, specs[name].shape[0])
    return None


def _set_labels(config: dict[str, Any], labels: int) -> list[str]:
    """Name so many labels, where the configuration names another number or none."""
    named = config.get("id2label")
    if len(named if isinstance(named, dict) else range(2)) == labels:  # two are the default
        return []
    config["id2label"] = {str(n): f"LABEL_{n}" for n in range(labels)}
    config["label2id"] = {f"LABEL_{n}": n for n in range(labels)}
    for key in config.keys() & {"num_labels", "_num_labels"}:
        config[key] = labels
    config.pop("problem_type", None)  # of the other's labels
    return [f"{labels} labels"]


def _set_class(config: dict[str, Any], kind: str, new: bool, model_class: str | None) -> list[str]:
    """Name the class, where another is named; leave it out where it cannot be told."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not new:
        return []
    ending = _CLASSES.get(model_class or "") or _CLASSES.get(kind, "")
    found = _ENDING.sub("", str(classes[0])) + ending if ending else ""
    if model_class and "For" in model_class:
        found = model_class
    if classes == [found]:
        return []
    if not found:
        del config["architectures"]
        return ["no architectures, as the class is not known"]
    config["architectures"] = [found]
    return [found]
