"""Static methods on a family: one merged encoder, each task's own head, a record a method."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from personae.checkpoints import open_checkpoint
from personae.checkpoints.modules import weight_layout
from personae.checkpoints.tied import each_once
from personae.commands.merge import merge
from personae.evaluate.evaluation import evaluate_checkpoint
from personae.evaluate.tasks import Task
from personae.family.align import align
from personae.recipe import MergeSettings
from personae.run.work import Work
from personae.writers import CheckpointWriter, write_auxiliary_files


def evaluate_merge(
    base: Path,
    experts: Mapping[str, Path],
    tasks: Sequence[Task],
    settings: MergeSettings,
    *,
    work: Work | None = None,
) -> dict[str, float]:
    """Merge all experts into a temporary directory and score the result on every task.

    Heads are no part of the merge: tensors of which an expert has another shape stay as in the
    base, and every task is scored with its own.

    Args:
        base: The base's checkpoint directory.
        experts: Task name to the expert's checkpoint directory; all are merged, in this order.
        tasks: What to score on.
        settings: How to merge.
        work: Workers, memory bound, progress.

    Returns:
        Task name to score.
    """
    heads = heads_of(base, experts)
    settings = settings.model_copy(update={"skip": (*settings.skip, *heads)})
    with tempfile.TemporaryDirectory() as folder:
        merged = merge(base, experts, Path(folder) / "merged", settings=settings, work=work)
        return {
            task.name: score_merged(base, merged, experts[task.name], task, settings.skip)
            for task in tasks
        }


def score_merged(
    base: Path, merged: Path, expert: Path, task: Task, heads: Sequence[str] = ()
) -> float:
    """Score a merged encoder with the head of one expert; see `attach_head`."""
    with tempfile.TemporaryDirectory() as folder:
        attach_head(base, merged, expert, Path(folder), heads)
        return evaluate_checkpoint(Path(folder), task)


def attach_head(
    base: Path, merged: Path, expert: Path, directory: Path, heads: Sequence[str] = ()
) -> None:
    """Write an expert's checkpoint with the merged values of what it shares with the base.

    Args:
        base: The base's checkpoint directory.
        merged: A checkpoint with the base's names.
        expert: The expert's checkpoint directory, whose configuration and head are taken.
        directory: An empty directory.
        heads: Patterns of tensors that stay the expert's, beside those of another shape.
    """
    reference, values = each_once(open_checkpoint(base)), open_checkpoint(merged)
    opened = {"expert": open_checkpoint(expert, base=reference)}
    own = align(reference, opened, private=heads)["expert"]
    shared = {own.files[name]: name for name in own.shared}
    specs, tied, copies = own.checkpoint.specs, own.checkpoint.tied, own.checkpoint.copies
    layout = weight_layout(own.checkpoint.auxiliary_files)._asdict()
    with CheckpointWriter(directory, specs.values(), tied=tied, copies=copies, **layout) as writer:
        for raw in specs:
            source, name = (values, shared[raw]) if raw in shared else (own.checkpoint, raw)
            writer.write(raw, source.read(name))
    write_auxiliary_files(own.checkpoint.auxiliary_files, directory)


def heads_of(base: Path, experts: Mapping[str, Path]) -> tuple[str, ...]:
    """Names of the base's tensors of which some expert has another shape."""
    reference = each_once(open_checkpoint(base))
    opened = {name: open_checkpoint(path, base=reference) for name, path in experts.items()}
    aligned = align(reference, opened)
    shared = set(reference.specs).intersection(*({*a.shared, *a.buffers} for a in aligned.values()))
    return tuple(name for name in reference.specs if name not in shared)
