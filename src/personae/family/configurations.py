"""What the configurations of a family disagree in: what tensors of one shape may mean besides.

Shapes tell sizes apart, but not how many heads a projection holds, how positions turn, or which
activation follows. Under other numbers of heads the same rows are other things, which is a fault;
of all else a person is told. Of keys that only some models name nothing is said: versions of
transformers write more of them or fewer.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from personae.checkpoints import Checkpoint
from personae.checkpoints.configuration import CONFIG
from personae.errors import Faults
from personae.family.alignment import Alignment
from personae.family.vocabularies import read_object

_HEADS = re.compile(r"(^|[._])n?heads?(_|$)|(^|\.)d_(kv|head)$")
_ATTENTION = re.compile("att", re.IGNORECASE)
# Names and versions; sizes, layers and dtypes, which headers and recipes tell; labels and classes,
# which are the heads' own; what training alone uses, or only says how a result is given.
_OF_NO_WEIGHT = re.compile(
    r"(^|\.)(_.*|transformers_version|architectures|auto_map|(torch_)?dtype|vocab_size"
    r"|num_hidden_layers|n_layers?|num_layers|layer_types"
    r"|(id2label|label2id|task_specific_params)\..*|num_labels|problem_type|finetuning_task"
    r"|.*drop(out|_rate|_path_rate)?|.*_dropout_.*|initializer_.*|.*_aux_loss_coef"
    r"|gradient_checkpointing|use_cache|return_dict|output_\w+)$"
)
_SCALING = "rope_scaling"
_LONGEST = 60


def disagreements(
    models: Mapping[str, Checkpoint], file: str = CONFIG
) -> dict[str, dict[str, Any]]:
    """The keys of a small file of which models say different things.

    Args:
        models: Name to model.
        file: A JSON file beside their weights; models without it say nothing.

    Returns:
        Key, with dots between levels, to what each model says that names it.

    Raises:
        CheckpointError: if a file is damaged.
    """
    contents = {
        name: dict(_flat(_in_one_form(read_object(model.auxiliary_files[file]))))
        for name, model in models.items()
        if file in model.auxiliary_files
    }
    found: dict[str, dict[str, Any]] = {}
    for key in sorted({key for content in contents.values() for key in content}):
        # A model that names no scaling does not scale; any other key has a default nobody knows.
        by_silence = _SCALING in key.split(".")
        said = {
            name: content.get(key)
            for name, content in contents.items()
            if key in content or by_silence
        }
        first = next(iter(said.values()))
        if any(value != first for value in said.values()) and not _OF_NO_WEIGHT.search(key):
            found[key] = said
    return found


def changed_keys(one: Checkpoint, other: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Every key of config.json of which two models say different things, and what they say.

    Null where one does not name it, as where it names null. Nothing if one has no config.json.

    Raises:
        CheckpointError: if a configuration is damaged.
    """
    paths = [model.auxiliary_files.get(CONFIG) for model in (one, other)]
    a, b = (dict(_flat(read_object(path))) if path else {} for path in paths)
    keys = sorted(a.keys() | b.keys()) if all(paths) else []
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def said_by(values: Mapping[str, Any]) -> str:
    """What each model says, as text: `10000.0 (base, x), 500000.0 (y)`."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        text = "none" if value is None else json.dumps(value, ensure_ascii=False)
        text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
        names.setdefault(text, []).append(name)
    return ", ".join(f"{text} ({', '.join(who)})" for text, who in names.items())


def is_number_of_heads(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a key of a configuration counts heads, or says how large one is."""
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values.values())
    return whole and _HEADS.search(key) is not None


def check_heads(
    models: Mapping[str, Checkpoint], experts: Mapping[str, Alignment], faults: Faults
) -> None:
    """Refuse attention weights of models that have other numbers of heads.

    Args:
        models: Name to model.
        experts: What is merged of them.
        faults: Where faults are added.

    Raises:
        CheckpointError: if a configuration is damaged.
    """
    if not any(_ATTENTION.search(name) for one in experts.values() for name in one.shared):
        return
    unlike = [
        f"{key} is {said_by(values)}"
        for key, values in disagreements(models).items()
        if is_number_of_heads(key, values)
    ]
    if unlike:
        faults.add(
            f"The models' heads are not the same, so that tensors of one shape hold different "
            f"things: {'; '.join(unlike)}. Merge models of one architecture, correct a config.json "
            "that is wrong, or leave attention as it is with 'skip'."
        )


def _in_one_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with positions as transformers 4 writes them: what 5 writes, too."""
    found = {k: _in_one_form(v) if isinstance(v, dict) else v for k, v in config.items()}
    rope = found.pop("rope_parameters", None)
    if isinstance(rope, dict):
        if "rope_theta" in rope:
            found["rope_theta"] = rope.pop("rope_theta")
        found[_SCALING] = rope
    if isinstance(scaling := found.get(_SCALING), dict):
        kind = scaling.pop("type", None) or scaling.pop("rope_type", "default")
        found[_SCALING] = {} if kind == "default" else {**scaling, "rope_type": kind}
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots between levels; null stands for a default, as silence does."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value
