"""Models as checkpoint directories: refused before any work, or written complete."""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae._small_files import read_json
from personae._types import TensorSpec
from personae.checkpoints.modules import weight_layout
from personae.checkpoints.naming import shown
from personae.errors import OutputError
from personae.packs.fingerprint import sha256_file
from personae.packs.manifest import MANIFEST_NAME, REFERENCE, TASKS
from personae.run.work import Work
from personae.writers import (
    JOURNAL,
    CheckpointWriter,
    output_directory,
    require_place,
    require_space,
    with_copies,
    write_auxiliary_files,
)

_OURS = re.compile(
    r"(?!adapter_)[^/]+\.safetensors(\.index\.json)?|pack\.json|README\.md|personae\.json"
    r"|config\.json|[^/]*_config\.json|config_[^/]*\.json|generation_config\.json|modules\.json"
    r"|tokenizer[^/]*\.json|special_tokens_map\.json|added_tokens\.json|normalizer\.json"
    r"|vocab[^/]*\.(json|txt|bpe)|merges[^/]*\.txt|chat_template\.(json|jinja)"
    r"|[^/]+\.(jinja|model|tiktoken|bpe|vocab|spm|codes)|additional_chat_templates/[^/]+\.jinja"
)
"""The files a command may have written at the top of a model or pack."""

RECORD_NAME = "personae.json"
"""What an output was made of, beside its weights, where it can be made again from that."""


def foreign_files(out: Path) -> list[str]:
    """Names in a directory that no command of this package writes, folders with a '/' at the end.

    Small files that a model came with count as foreign where their names do not tell what they
    are: whoever wrote `results.json` beside a model wants to keep it. A pack records those that it
    has from its experts.
    """
    modules = _read_small(out / "modules.json", list)
    folders = {str(m["path"]) for m in modules if isinstance(m, dict) and m.get("path")}
    types = _read_small(out / "router_config.json", dict).get("types")
    folders |= types.keys() if isinstance(types, dict) else set()
    is_pack = (out / MANIFEST_NAME).is_file()
    exported = _read_small(out / RECORD_NAME, dict).get("kind") == "adapter"
    code = json.dumps([_read_small(out / name, dict) for name in _WITH_CODE])
    recorded = _recorded(_read_small(out / MANIFEST_NAME, dict))
    foreign: list[str] = []
    for place in sorted(out.rglob("*")):
        name = place.relative_to(out).as_posix()
        inner = name
        if is_pack and name.startswith(f"{TASKS}/"):
            inner = name.split("/", 2)[2] if name.count("/") > 1 else name.split("/")[1]
        elif is_pack and name.startswith(f"{REFERENCE}/"):
            inner = name.partition("/")[2]
        elif name.partition("/")[0] in folders:
            inner = name.partition("/")[2] or name
        if place.is_dir() and not place.is_symlink():
            if any(place.iterdir()):
                continue  # its files tell
            foreign.append(f"{name}/")
        elif exported and name == "adapter_model.safetensors":
            continue  # one that was trained has no record of how it was made
        elif name in recorded and place.is_file() and sha256_file(place) == recorded[name]:
            continue
        elif not (_OURS.fullmatch(inner) or name == JOURNAL or _is_code(inner, code)):
            foreign.append(name)
    return foreign


def _recorded(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the small files that a pack's manifest, maybe a damaged one, says it holds."""
    found: dict[str, str] = {}
    with suppress(AttributeError, KeyError, TypeError):
        for task, record in manifest["tasks"].items():
            for name, file in record["companions"].items():
                folder = REFERENCE if file["stored_in"] == "reference" else f"{TASKS}/{task}"
                found[f"{folder}/{name}"] = file["sha256"]
    return found


def _is_code(name: str, configurations: str) -> bool:
    """Whether a configuration names this file as code of the model."""
    return name.endswith(".py") and f"{name.removesuffix('.py')}." in configurations


_WITH_CODE = ("config.json", "tokenizer_config.json")


def _read_small(path: Path, kind: type[Any]) -> Any:
    """A JSON file's content, or an empty one where it is missing, damaged or of another kind."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return kind()
    return content if isinstance(content, kind) else kind()


def check_output(out: Path, overwrite: bool, inputs: Sequence[Any] = ()) -> None:
    """Refuse an output that exists, or that would replace what is read, before any work.

    Args:
        out: The output directory, absolute.
        overwrite: Whether a directory that holds something may be replaced.
        inputs: Sources of the run; those that are no local path do not matter.

    Raises:
        OutputError: if `out` is a file, a directory that holds something, or is, contains or lies
            inside an input.
    """
    for source in inputs:
        if not isinstance(source, str | Path) or not os.path.exists(source):  # noqa: PTH110 - names may be too long
            continue
        read, written = Path(source).resolve(), out.resolve()
        if read == written or read in written.parents or written in read.parents:
            raise OutputError(
                f"'{out}' and the input '{source}' overlap: writing one would damage the other. "
                "Choose another output."
            )
    require_place(out)
    # With a note of its run it is complete: the same command ends it, another is refused then.
    ended = (out / JOURNAL).is_file()
    if out.is_dir() and any(out.iterdir()) and not overwrite and not ended:
        raise OutputError(
            f"'{out}' exists and is not empty. Choose another name, or give --overwrite."
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"'{out}' is a file. Choose another name.")
    if not out.is_dir():
        return
    foreign = foreign_files(out)
    if foreign and not (out / MANIFEST_NAME).exists() and not any(out.glob("*.safetensors")):
        raise OutputError(
            f"'{out}' holds neither a pack nor a model, so it is not replaced. Choose another "
            "name, or empty it by hand."
        )
    if foreign:
        raise OutputError(
            f"'{out}' also holds files that personae does not write, so it is not replaced: "
            f"{shown(foreign)}. Move them elsewhere, or choose another name."
        )


def write_model(
    out: Path,
    specs: Sequence[TensorSpec],
    read: Callable[[str], Tensor],
    *,
    tied: Mapping[str, str],
    copies: Mapping[str, torch.dtype],
    computed: Collection[str],
    auxiliary_files: Mapping[str, Path | bytes],
    cost: Callable[[TensorSpec], int],
    overwrite: bool,
    shard_bytes: int,
    stage: str,
    work: Work,
) -> None:
    """Write a model tensor by tensor, as each is computed.

    Args:
        out: The directory to make.
        specs: What is written, in order.
        read: Computes a tensor by its name; cast to its spec's dtype as it is written.
        tied: Further names to those of the tensors they share.
        copies: Those of them under which the tensor is written again, each with its dtype.
        computed: Names of the tensors that are computed, not copied: they must be finite.
        auxiliary_files: Relative name to small file, or to its content.
        cost: Peak bytes of computing one tensor.
        overwrite: Whether a directory that holds something may be replaced.
        shard_bytes: Most bytes in one weight file.
        stage: What progress calls it.
        work: Workers, memory, progress.

    Raises:
        OutputError: if the disk refuses, or has too little space.
    """
    written = with_copies(specs, tied, copies)
    require_space(out, sum(spec.nbytes for spec in written))
    layout = weight_layout(auxiliary_files)
    with (
        output_directory(out, overwrite=overwrite) as partial,
        CheckpointWriter(
            partial,
            specs,
            shard_bytes=shard_bytes,
            tied=tied,
            copies=copies,
            computed=computed,
            **layout._asdict(),
        ) as writer,
    ):
        write_auxiliary_files(auxiliary_files, partial)
        work.each(
            specs, lambda spec: writer.write(spec.name, read(spec.name)), cost=cost, stage=stage
        )
