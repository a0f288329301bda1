"""Writes a model for a task without an expert as an ordinary checkpoint directory."""

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from personae._version import __version__
from personae.commands.unpack import note_code
from personae.packs.fingerprint import sha256_file
from personae.packs.manifest import MANIFEST_NAME
from personae.packs.reader import Pack
from personae.packs.weighting import Weighting
from personae.run.composed import open_composed, refuse_task
from personae.run.output import RECORD_NAME, check_output, write_model
from personae.run.work import Work
from personae.writers import SHARD_BYTES


def compose(
    pack: str | Path,
    weights: Mapping[str, float] | Weighting,
    out: str | Path,
    *,
    base: Any = None,
    head: str | Path | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    work: Work | None = None,
) -> Path:
    """Write the composed model as a checkpoint directory that `transformers` loads.

    Args:
        pack: The pack's directory.
        weights: Task name to weight, or what `weigh` found; tasks not named count 0.
        out: Directory to write; must not exist, or be empty.
        base: Where the reference is, if not where the pack says.
        head: Whose head to attach; see `open_composed`.
        overwrite: Replace `out` if it exists.
        shard_bytes: Most bytes in one weight file.
        work: Workers, memory bound, device of the decoding, progress.

    Returns:
        The directory written; `personae.json` in it says what it was made of.

    Raises:
        PersonaeError: if the pack, its reference, a weight or the output is not what it should be.
    """
    work = work or Work()
    assert work.torch_device  # refused before anything is read
    out = Path(out).absolute()
    opened = Pack(Path(pack))
    inputs = [opened.directory, opened.reference_source(base)]
    if head not in opened.manifest.tasks:
        refuse_task(opened, head)
        inputs.append(head)
    check_output(out, overwrite, inputs=inputs)
    with closing(open_composed(pack, weights, base=base, head=head, work=work)) as composed:
        for text in composed.notes:
            work.note(text)
        note_code(opened, composed.outline.auxiliary_files(), work)
        made_of = json.dumps(_about(opened, composed.weighting, head), indent=2, ensure_ascii=False)
        files: dict[str, Path | bytes] = {**composed.outline.auxiliary_files()}
        files[RECORD_NAME] = (made_of + "\n").encode()
        write_model(
            out,
            list(composed.outline.specs.values()),
            composed.compose,
            tied=composed.outline.tied,
            copies=composed.outline.copies,
            computed=composed.coded,
            auxiliary_files=files,
            cost=composed.cost,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
            stage="composing",
            work=work,
        )
    return out


def _about(pack: Pack, weighting: Weighting, head: str | Path | None) -> dict[str, Any]:
    """What a composed checkpoint was made of, as plain values."""
    return {
        "kind": "composed",
        "tool_version": __version__,
        "pack": str(pack.directory),
        "pack_sha256": sha256_file(pack.directory / MANIFEST_NAME),
        "reference": pack.manifest.reference.fingerprint,
        "head": None if head is None else str(head),
        **weighting.to_json(),
    }
