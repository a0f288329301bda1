"""One door to every reader: `open_checkpoint`."""

import logging
import os
import re
from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.adapted_model import AdaptedModel, split_adapter
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.adapter_files import CONFIG_FILE
from personae.checkpoints.adapter_laid_out import open_adapter
from personae.checkpoints.folders import Folder, local_folder, lone_file
from personae.checkpoints.layouts import laid_out_like
from personae.checkpoints.memory import InMemory
from personae.checkpoints.modules import MODULES, WithModules, module_folders
from personae.checkpoints.pickles import open_pickles
from personae.checkpoints.quantised import check_not_quantised
from personae.checkpoints.raw_lora import holds_factors, open_raw_lora
from personae.checkpoints.safetensors_files import open_safetensors
from personae.errors import CheckpointError, Faults, nearest

_log = logging.getLogger(__name__)
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
_TRAINING_STATE = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state")
_FULL_MODEL = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
)
_FULL_MODEL_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_PIPELINE = "model_index.json"
_MOST_LOOKED_AT = 200  # of what stands beside a path that is not there
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def open_checkpoint(
    source: str | Path | nn.Module | Mapping[str, Tensor] | Checkpoint,
    *,
    base: Checkpoint | None = None,
    as_stored: bool = False,
) -> Checkpoint:
    """Open any checkpoint for lazy reading. Only headers are read.

    Args:
        source: A directory or file (safetensors or pickled state dict), a hub id
            `org/name[@revision]`, a module, or a mapping of names to tensors; or a model with an
            adapter merged into it, `MODEL+ADAPTER`. A path that exists is never taken for another.
            What is open already is seen as any other.
        base: What an adapter sits on. A full checkpoint of a mixture of experts is read in its
            layout, one tensor an expert or stacks of all.
        as_stored: Opens an adapter as the tensors it stores; it needs no base then.

    Raises:
        CheckpointError: There is no such checkpoint, or it cannot be read; every fault at once.
    """
    opened = _open(source, base, as_stored)
    if as_stored:
        return opened
    check_not_quantised(opened)
    if holds_factors(opened.specs):
        return open_raw_lora(opened, base)
    return opened if base is None else laid_out_like(base, opened)


def _open(
    source: str | Path | nn.Module | Mapping[str, Tensor] | Checkpoint,
    base: Checkpoint | None,
    as_stored: bool,
) -> Checkpoint:
    """Open whatever it is; see `open_checkpoint`.

    Raises:
        CheckpointError: There is no such checkpoint, or it cannot be read; every fault at once.
    """
    if isinstance(source, nn.Module | Mapping):
        return InMemory(source)
    if isinstance(source, Checkpoint):
        return source
    text, path = str(source), expanded(source)
    if path.is_dir():
        return _open_folder(local_folder(path, text), base, as_stored)
    if path.name in _ADAPTER and path.is_file() and (path.parent / CONFIG_FILE).is_file():
        folder = local_folder(path.parent, str(path.parent))
        return _open_adapter(_readable(folder), base, as_stored)
    if path.is_file():
        return _open_file(lone_file(path, text), path.name)
    if is_hub_id(source):
        from personae.checkpoints.hub import hub_folder  # its library takes a while to load

        return _open_folder(hub_folder(text), base, as_stored)
    both = split_adapter(text, is_model)
    if both:
        return open_adapted(text, *both)
    raise CheckpointError(_no_such_path(text, path))


def expanded(source: str | Path) -> Path:
    """A path, with a user's folder in the place of `~`.

    Raises:
        CheckpointError: There is no such user.
    """
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{source}: there is no such user. Write the path out.") from error


def adapter_config_file(source: Any) -> Path | None:
    """Where the configuration of an adapter lies that `open_checkpoint` opens; None without one.

    Raises:
        CheckpointError: The hub does not answer, or refuses; or there is no such user.
    """
    if not isinstance(source, str | Path):
        return None
    path = expanded(source)
    folder = path.parent if path.name in _ADAPTER else path
    if folder.is_dir():
        found = local_folder(folder, str(source))
    elif is_hub_id(source):
        from personae.checkpoints.hub import hub_folder

        found = hub_folder(str(source))
    else:
        return None
    return found.locate(CONFIG_FILE) if CONFIG_FILE in found.names else None


def open_adapted(text: str, model: str | Checkpoint, adapter: str) -> AdaptedModel:
    """Open a model and an adapter of it as one.

    Args:
        text: What both together are called.
        model: The model.
        adapter: What stands after the `+`.

    Raises:
        CheckpointError: There is no such model or adapter, or what stands after the `+` is none.
    """
    beneath = open_checkpoint(model)
    merged = open_checkpoint(adapter, base=beneath)
    if adapter_of(merged) is None:
        raise CheckpointError(
            f"{text}: '{adapter}' is a whole model, and after a '+' stands an adapter of "
            f"'{beneath.source}'. Give the whole model alone."
        )
    return AdaptedModel(text, merged, beneath)


def is_model(text: str, folder: Path = Path()) -> bool:
    """Whether text is a path that exists from a folder, or looks like a hub id."""
    path = folder / text
    try:
        exists = path.expanduser().exists()
    except (OSError, RuntimeError):  # names may be too long, users unknown
        exists = False
    return exists or is_hub_id(text, folder)


def _open_folder(folder: Folder, base: Checkpoint | None, as_stored: bool) -> Checkpoint:
    """Open a model, with the weights in folders that it names.

    Raises:
        CheckpointError: It holds no weights, folders that it names are not there, or small files
            cannot be read.
    """
    inside = module_folders(_readable(folder))
    if not inside:
        return _open_model(folder, base, as_stored)
    modules = {
        name: _open_model(sub, None, as_stored) for name, sub in inside.items() if _has_weights(sub)
    }
    outer = _open_model(folder, base, as_stored) if _has_weights(folder) or not modules else None
    return WithModules(folder, outer, modules, inside)


def _readable(folder: Folder) -> Folder:
    """The folder, whose small files can be read.

    Raises:
        CheckpointError: naming each that cannot.
    """
    faults = Faults()
    folder.check_auxiliary_files(faults)
    faults.raise_if_any(CheckpointError)
    return folder


def _has_weights(folder: Folder) -> bool:
    """Whether a folder holds weights itself, not only in folders of its own."""
    return any(
        "/" not in name and (name.endswith(".safetensors") or _is_weights_pickle(name))
        for name in folder.names
    )


def _open_model(folder: Folder, base: Checkpoint | None, as_stored: bool) -> Checkpoint:
    """Open what a folder holds: a full model before an adapter, safetensors before pickles.

    Raises:
        CheckpointError: It holds no weights, an adapter without a base, or several candidates.
    """
    names = folder.names
    if whole := [name for name in _FULL_MODEL if name in names]:
        if len(whole) > 1:
            _log.warning("%s is read, not %s beside it", folder.where(whole[0]), *whole[1:2])
        return open_safetensors(folder, whole[0])
    if CONFIG_FILE in names:
        return _open_adapter(folder, base, as_stored)
    for file in (name for name in _FULL_MODEL_PICKLED if name in names):
        return open_pickles(folder, file)
    pickles = sorted(name for name in names if _is_weights_pickle(name))
    if len(pickles) == 1:
        return open_pickles(folder, pickles[0])
    if _PIPELINE in names:
        parts = sorted({name.split("/")[0] for name in names if name.endswith("/config.json")})
        raise CheckpointError(
            f"{folder.source} is a pipeline of several models. Pass the folder of one, on this "
            f"machine: {', '.join(map(folder.where, parts)) or 'none of them has a config.json'}."
        )
    if factors := [name for name in _ADAPTER if name in names]:
        raise CheckpointError(
            f"{folder.source} has {factors[0]} but no {CONFIG_FILE}, which says how its factors "
            "are scaled. Copy that file too, or save the adapter again."
        )
    others = pickles or sorted(name for name in names if name.endswith(".safetensors"))
    found = (
        f"It has {_some(others)}: pass the file you mean."
        if others
        else f"It holds {_some(names)}."
    )
    raise CheckpointError(
        f"{folder.source} has none of {', '.join((*_FULL_MODEL[:2], CONFIG_FILE))} or "
        f"{', '.join(_FULL_MODEL_PICKLED)}. {found}"
    )


def _open_adapter(folder: Folder, base: Checkpoint | None, as_stored: bool) -> Checkpoint:
    file = next((name for name in _ADAPTER if name in folder.names), None)
    if file is None:
        raise CheckpointError(
            f"{folder.source} has {CONFIG_FILE} but neither {' nor '.join(_ADAPTER)}. "
            "Complete the copy, or save the adapter again."
        )
    if base is None and not as_stored:
        raise CheckpointError(
            f"{folder.source} is a PEFT adapter and needs the model it was trained on. "
            f"Pass that as the base, or both together: MODEL+{folder.source}."
        )
    tensors = (
        open_safetensors(folder, file)
        if file.endswith(".safetensors")
        else open_pickles(folder, file)
    )
    if base is None or as_stored:
        return tensors
    return open_adapter(tensors, folder.locate(CONFIG_FILE), base)


def _open_file(folder: Folder, name: str) -> Checkpoint:
    """Open a single file by its ending.

    Raises:
        CheckpointError: The ending is unknown, or the file cannot be read.
    """
    if name.endswith(".safetensors"):
        return open_safetensors(folder, name)
    if name.endswith(_PICKLE_ENDINGS):
        return open_pickles(folder, name)
    raise CheckpointError(
        f"{folder.source} is not a known kind of checkpoint. Pass a directory, or a file ending "
        f"in .safetensors, {', '.join(_PICKLE_ENDINGS)}."
    )


def _is_weights_pickle(name: str) -> bool:
    return name.endswith(_PICKLE_ENDINGS) and "/" not in name and not _TRAINING_STATE.match(name)


def is_hub_id(source: Any, folder: Path = Path()) -> bool:
    """Whether text looks like `org/name[@revision]`, and not like a mistyped path in a folder."""
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        return False
    is_file_name = source.endswith((".safetensors", ".json", *_PICKLE_ENDINGS))
    return not is_file_name and not (folder / source.split("/")[0]).is_dir()


def absence(source: str) -> str | None:
    """What is to be said of a model that is not on this machine; None if it is, or may be a hub's.

    Raises:
        CheckpointError: There is no such user as a path names.
    """
    both = (source,) if is_model(source) else split_adapter(source, is_model)
    return None if both else _no_such_path(source, expanded(source))


def _no_such_path(text: str, path: Path) -> str:
    if os.path.exists(path):  # noqa: PTH110 - names may be too long
        return f"{text} is no regular file, and no directory. Copy or download it again."
    there = [name for name in _names_in(path.parent) if _may_be_model(path.parent / name)]
    if there:
        hint = nearest(path.name, there)
    elif os.path.isdir(path.parent):  # noqa: PTH112
        hint = f"There is no model in {path.parent}."
    else:
        hint = f"Nor is there a directory {path.parent}."
    return (
        f"{text}: no such file or directory. {hint} Models on the hub are written "
        "org/name or org/name@revision."
    )


def _may_be_model(path: Path) -> bool:
    """Whether a path is that of a model, by the names of files alone."""
    if path.suffix == ".safetensors" or _is_weights_pickle(path.name):
        return True
    known = {*_FULL_MODEL, *_FULL_MODEL_PICKLED, *_ADAPTER, _PIPELINE, MODULES}
    return not known.isdisjoint(_names_in(path))


def _names_in(folder: Path) -> list[str]:
    """The first names in a folder; none of what is no folder, or may not be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, _MOST_LOOKED_AT)]
    except OSError:
        return []


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return (", ".join(listed[:10]) or "nothing") + more
