"""Verification: checksums, the reference's fingerprint, and the error against an original."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

import torch

from personae.checkpoints import Checkpoint, open_checkpoint
from personae.errors import Faults, PackError, WorkError, nearest
from personae.family.align import align
from personae.family.deltas import Deltas
from personae.ops.sums import squared_norm
from personae.packs.manifest import Manifest
from personae.packs.reader import Pack
from personae.run.costs import delta_bytes
from personae.run.rebuilt import Rebuilt
from personae.run.reference import open_reference
from personae.run.scan import fingerprint
from personae.run.work import Work

_SLACK = 1e-3
"""Relative difference allowed between a recorded and a measured error (sums in another order)."""


@dataclass(frozen=True)
class Verified:
    """What was checked of one task.

    Attributes:
        recorded_error: Relative squared error in pack.json.
        measured_error: The same measured against an original; None if none was given.
        same_original: Whether that original's weights are those that were packed.
    """

    recorded_error: float
    measured_error: float | None = None
    same_original: bool | None = None


def verify(
    pack: str | Path,
    *,
    against: Mapping[str, Any] | None = None,
    base: Any = None,
    work: Work | None = None,
) -> dict[str, Verified]:
    """Check every checksum of a pack; with originals, also what is rebuilt.

    Args:
        pack: The pack's directory.
        against: Task name to the original checkpoint.
        base: Where the reference is, if not where the pack says.
        work: Workers, memory bound, device of the decoding, progress.

    Returns:
        Task name to what was found.

    Raises:
        PackError: listing every damaged or missing file, and a router's that does not fit its
            record; a foreign reference.
        WorkError: listing every task whose original is another model than the one packed, or
            whose measured error is not the recorded one.
    """
    work = work or Work()
    device = work.torch_device
    opened = Pack(Path(pack))
    faults = Faults()
    opened.check_shared(faults)
    opened.check_router(faults)
    for task in opened.manifest.tasks:
        opened.check_task(task, faults)
    for task in against or {}:
        if task not in opened.manifest.tasks:
            faults.add(f"{pack} has no task '{task}'. {nearest(task, opened.manifest.tasks)}")
    faults.raise_if_any(PackError)
    verified = {
        name: Verified(record.relative_error) for name, record in opened.manifest.tasks.items()
    }
    if against or base is not None or opened.reference_directory is not None:
        with closing(open_reference(opened, base, work)) as reference:
            for task, source in (against or {}).items():
                rebuilt = Rebuilt(opened, task, reference, device)
                seen = rebuilt.reference if rebuilt.codes(reference.copies) else reference
                verified[task] = _verify(rebuilt, seen, task, source, opened.manifest, work, faults)
    faults.raise_if_any(WorkError)
    return verified


def _verify(
    rebuilt: Rebuilt,
    reference: Checkpoint,
    task: str,
    source: Any,
    manifest: Manifest,
    work: Work,
    faults: Faults,
) -> Verified:
    """Compare one task with the model it was made from."""
    from_base = manifest.reference.kind == "base"  # an adapter sits on nothing else
    with closing(open_checkpoint(source, base=reference if from_base else None)) as original:
        found = align(
            reference,
            {task: original},
            skip=manifest.skip,
            private=manifest.private,
            spared=rebuilt.record.spared,
            may_lack_parts=True,
        )
        return _compare(rebuilt, Deltas(found[task], reference, from_base), work, faults)


def _compare(rebuilt: Rebuilt, deltas: Deltas, work: Work, faults: Faults) -> Verified:
    """Measure ‖τ − τ̂‖² / ‖τ‖² over the shared tensors, and exactness of the private ones."""
    original = deltas.alignment

    def measure(name: str) -> tuple[float, float]:
        delta = deltas.read(name)
        decoded = rebuilt.delta(name)
        return squared_norm(torch.sub(delta, decoded, out=decoded)), squared_norm(delta)

    lost, energy = list[float](), list[float]()  # summed exactly: they come in any order
    for _, (error, norm) in work.map(
        original.shared,
        measure,
        cost=lambda name: (
            original.kept_bytes
            + delta_bytes(rebuilt.reference.specs[name].numel)
            + rebuilt.cost(name)
        ),
        stage=f"comparing {original.name}",
    ):
        lost.append(error)
        energy.append(norm)
    measured = fsum(lost) / fsum(energy) if any(energy) else 0.0
    recorded = rebuilt.record.relative_error
    label = f"Expert '{original.name}'"
    found = fingerprint(original.checkpoint, label, work, faults, names=list(original.taken))
    same = found == rebuilt.record.fingerprint
    if not same:
        faults.add(
            f"Task '{original.name}': {original.checkpoint.source} is not the model that was "
            f"packed: its fingerprint is {found}, the packed one's {rebuilt.record.fingerprint}. "
            f"Its relative error is {measured:.4g}, recorded is {recorded:.4g}."
        )
    if same and abs(measured - recorded) > _SLACK * max(recorded, 1e-6):
        faults.add(
            f"Task '{original.name}': rebuilt with relative error {measured:.6g}, recorded is "
            f"{recorded:.6g}. Pack the task again and report this."
        )
    for name, raw in original.private_files.items() if same else ():
        kept = rebuilt.read(name) if name in rebuilt.specs else None
        if kept is None or not torch.equal(kept, original.checkpoint.read(raw)):
            faults.add(f"Task '{original.name}': private tensor '{name}' is not the original's.")
    return Verified(recorded, measured, same)
