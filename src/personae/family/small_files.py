"""The small files beside an expert that is written: its own, and a config.json that fits it."""

import json
from collections.abc import Mapping
from pathlib import Path

from personae._types import TensorSpec
from personae.checkpoints import Checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.configuration import CONFIG, fit_config
from personae.family.alignment import Alignment
from personae.family.configurations import disagreements, said_by
from personae.family.vocabularies import read_object

GENERATION = "generation_config.json"


def small_files(
    expert: Alignment, reference: Checkpoint, written: Mapping[str, TensorSpec] | None = None
) -> tuple[dict[str, Path | bytes], list[str]]:
    """An expert's small files as they are to stand beside its tensors.

    Its own config.json is kept where it describes what is written. An adapter or a bare file gets
    its base's, and this is changed where tensors have other shapes, or a head is another.

    Args:
        expert: The expert, aligned.
        reference: What it was aligned with.
        written: What is written; by default the expert as a pack rebuilds it.

    Returns:
        Relative name to the file to copy, or to its content; and what a person should know.

    Raises:
        CheckpointError: if a configuration is damaged.
    """
    model = expert.checkpoint
    files: dict[str, Path | bytes] = {**model.auxiliary_files}
    path, described, whose = _configuration(expert, reference)
    if path is None:
        return files, []
    adapter = adapter_of(model)
    if written is None:
        written = expert.rebuilt_specs(reference.specs)
    config = read_object(path)
    model_class = adapter.model_class if adapter else None
    fitted, changes = fit_config(config, described, written, model_class)
    if fitted != config:
        files[CONFIG] = (json.dumps(fitted, indent=2, ensure_ascii=False) + "\n").encode()
        return files, [f"config.json is {whose}, changed to {', '.join(changes)}"]
    bare = CONFIG not in model.auxiliary_files and expert.private
    return files, ["has no config.json; rebuilt, it will have the base's"] if bare else []


def with_generation(
    files: Mapping[str, Path | bytes], models: Mapping[str, Checkpoint]
) -> tuple[dict[str, Path | bytes], list[str]]:
    """A merged model's small files with a generation_config.json, and whose it is if that matters.

    It stays the one that is there; where the model that gives the small files has none, it is that
    of the first model that has one.

    Args:
        files: Relative name to the file, or to its content.
        models: Name to model, of all that are merged.

    Raises:
        CheckpointError: if one is damaged.
    """
    having = {name: m for name, m in models.items() if GENERATION in m.auxiliary_files}
    found = dict(files)
    if not having:
        return found, []
    if GENERATION not in found:
        found[GENERATION] = next(iter(having.values())).auxiliary_files[GENERATION]
    taken = found[GENERATION]
    owners = [name for name, m in having.items() if m.auxiliary_files[GENERATION] == taken]
    unlike = disagreements(having, GENERATION)
    if not owners or not (unlike or GENERATION not in files):
        return found, []
    told = "; ".join(f"{key} {said_by(values)}" for key, values in unlike.items())
    others = f"; the models disagree: {told}" if told else ""
    return found, [f"{GENERATION} is that of {owners[0]}{others}"]


def _configuration(
    expert: Alignment, reference: Checkpoint
) -> tuple[Path | None, Mapping[str, TensorSpec], str]:
    """The config.json an expert goes by, the tensors it describes, and whose it is."""
    model, adapter = expert.checkpoint, adapter_of(expert.checkpoint)
    own = model.auxiliary_files.get(CONFIG)
    if adapter and CONFIG not in adapter.own_files:
        return own, adapter.base_specs, "the base's"
    if own is not None:
        return own, expert.own_specs, "its own"
    theirs = {expert.renaming.expert_name(name): spec for name, spec in reference.specs.items()}
    return reference.auxiliary_files.get(CONFIG), theirs, "the base's"
