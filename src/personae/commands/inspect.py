"""What a checkpoint or a pack holds, as plain values."""

from pathlib import Path
from typing import Any

from personae.checkpoints import open_checkpoint
from personae.commands.accounting import task_amr_percent
from personae.packs.manifest import MANIFEST_NAME, TaskRecord
from personae.packs.reader import Pack


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe a pack, or a checkpoint (a directory, file or hub id), from headers alone.

    Returns:
        Plain values that print as JSON. For a pack, per task: `bytes` (of its file),
        `private_bytes`, `auxiliary_bytes`, `amr_percent` by rule, `relative_error`
        (‖τ − τ̂‖² / ‖τ‖² over changed tensors) and per tensor whether it is coded, kept exact or
        skipped, shape, rank, bytes and error. What all tasks share is told once, as `shared`; an
        AMR has a task's share of it. `router` tells how tasks are found for samples, if they are;
        no AMR counts it.

    Raises:
        PersonaeError: if it is neither, or cannot be read.
    """
    if (Path(path) / MANIFEST_NAME).is_file():
        return inspect_pack(Pack(Path(path)))
    return inspect_checkpoint(str(path))


def inspect_pack(pack: Pack) -> dict[str, Any]:
    """Describe a pack from pack.json; see `inspect`."""
    manifest = pack.manifest
    return {
        "kind": "pack",
        "path": str(pack.directory),
        "format_version": manifest.format_version,
        "tool_version": manifest.tool_version,
        "manifest_bytes": (pack.directory / MANIFEST_NAME).stat().st_size,
        "method": manifest.method,
        "parameters": manifest.parameters,
        "budget": manifest.budget,
        "counting": manifest.counting,
        "vector": manifest.vector,
        "reference": manifest.reference.model_dump(mode="json"),
        "shared": _shared(pack),
        "router": _router(pack),
        "tasks": {name: _task(pack, name, record) for name, record in manifest.tasks.items()},
    }


def inspect_checkpoint(source: str) -> dict[str, Any]:
    """Describe a checkpoint (an adapter as it is stored) from its headers: totals, every tensor."""
    checkpoint = open_checkpoint(source, as_stored=True)
    specs = checkpoint.specs.values()
    return {
        "kind": "checkpoint",
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "parameters": sum(spec.numel for spec in specs if spec.is_floating),
        "bytes": sum(spec.nbytes for spec in specs),
        "tied": dict(checkpoint.tied),
        "auxiliary_files": sorted(checkpoint.auxiliary_files),
        "tensors": {
            spec.name: {
                "shape": list(spec.shape),
                "dtype": spec.dtype_name,
                "bytes": spec.nbytes,
            }
            for spec in specs
        },
    }


def _shared(pack: Pack) -> dict[str, Any] | None:
    record, tasks = pack.manifest.shared, len(pack.manifest.tasks)
    if record is None:
        return None
    share = record.bytes / tasks if tasks else None
    return {"bytes": record.bytes, "bytes_per_task": share, "tensors": len(record.tensors)}


def _router(pack: Pack) -> dict[str, Any] | None:
    record = pack.manifest.router
    if record is None:
        return None
    told = record.model_dump(mode="json", exclude={"file", "sha256"})
    return told | {"unrouted": list(pack.manifest.unrouted)}


def _task(pack: Pack, name: str, record: TaskRecord) -> dict[str, Any]:
    own = [
        pack.auxiliary_file(name, relative)
        for relative, auxiliary_file in record.companions.items()
        if auxiliary_file.stored_in == "task"
    ]
    return {
        "source": record.source,
        "revision": record.revision,
        "parameters": record.parameters,
        "rank_fraction": record.parameters.get("rank_fraction"),
        "bytes": record.bytes,
        "coded_bytes": record.coded_bytes,
        "private_bytes": record.private_bytes,
        "auxiliary_bytes": sum(path.stat().st_size for path in own if path.is_file()),
        "amr_percent": task_amr_percent(record, pack.manifest),
        "relative_error": record.relative_error,
        "left": record.left,
        "characteristics": list(record.characteristics),
        "private": {key: value.model_dump(mode="json") for key, value in record.private.items()},
        "tensors": {
            key: {
                "treatment": tensor.treatment,
                "shape": list(tensor.shape),
                "rank": tensor.rank,
                "bytes": tensor.bytes,
                "relative_error": tensor.relative_error,
            }
            for key, tensor in record.tensors.items()
        },
    }
