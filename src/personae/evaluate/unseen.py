"""Tasks held out of a family: what each method offers a task for which it has no expert.

Protocols of the DTS paper (arXiv 2512.01461; methods.md 7.2): a static method offers its merged
model; EMR the unified vector without a mask; SVD and T-Switch the pre-trained model; DTS the
composed one, and, in the "same weighting" rows, so do the others. Every model is made from seen
tasks alone, the merged references of DTS-D too. As published, the unseen task's own fine-tuned
head is attached, so that the setting is not free of labels.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from personae.checkpoints import open_checkpoint
from personae.checkpoints.tied import each_once
from personae.commands.accounting import task_amr_percent
from personae.commands.compose import compose
from personae.commands.merge import merge
from personae.commands.pack import pack_many
from personae.errors import RecipeError, nearest
from personae.evaluate.evaluation import evaluate_checkpoint
from personae.evaluate.merged import heads_of, score_merged
from personae.evaluate.records import Record, record
from personae.evaluate.rows import merge_rows
from personae.evaluate.tasks import Task
from personae.methods import CODECS
from personae.packs.reader import Pack
from personae.packs.weighting import TextEncoder, Weighting, weigh
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from personae.writers import CheckpointWriter, output_directory


@dataclass(frozen=True)
class Unseen:
    """What came out.

    Attributes:
        records: A row a method; scores on the held-out tasks alone.
        weightings: Held-out task to the weights of the seen ones.
    """

    records: list[Record]
    weightings: dict[str, Weighting]


def static_rows() -> dict[str, MergeSettings]:
    """The average, and every static method of the family tables as it is there."""
    return {"weight averaging": MergeSettings()} | merge_rows()


def packed_rows(rank_fraction: float = 0.3, budget: str = "1%") -> dict[str, PackSettings]:
    """DTS at one rank fraction and starred, and the codecs of the "same weighting" rows."""
    at_rank = {"rank_fraction": rank_fraction}
    others = {"emr": "EMR", "t_switch": "T-Switch", "svd": "SVD"}
    return {
        f"DTS-T r={rank_fraction:g}": PackSettings(parameters=at_rank),
        f"DTS-T* {budget}": PackSettings(budget=budget),
        f"DTS-D r={rank_fraction:g}": PackSettings(parameters=at_rank, vector="difference"),
        f"DTS-D* {budget}": PackSettings(budget=budget, vector="difference"),
    } | {
        f"{label}, same weighting": PackSettings(method=method)
        for method, label in others.items()
        if method in CODECS
    }


def compare_unseen(
    base: Path,
    experts: Mapping[str, Path],
    tasks: Sequence[Task],
    hold_out: Sequence[str],
    encoder: TextEncoder,
    directory: Path,
    *,
    statics: Mapping[str, MergeSettings],
    packs: Mapping[str, PackSettings],
    gamma: str = "ratio",
    temperature: float | None = None,
    work: Work,
    report: Callable[[Record], None] = lambda _: None,
) -> Unseen:
    """Score every method on tasks it has not seen; their class names are all it is told.

    Args:
        base: The base's checkpoint directory.
        experts: Task name to the expert's checkpoint directory, the held-out ones too.
        tasks: All tasks, seen and unseen.
        hold_out: Names of the unseen tasks.
        encoder: Embeds class names.
        directory: Where merged models and packs go; what is there is replaced.
        statics: Row name to a static merge.
        packs: Row name to the settings of a pack, to be composed from.
        gamma: See `weigh`.
        temperature: See `weigh`.
        work: Workers, memory bound, progress.
        report: Told each record as soon as it is known.

    Raises:
        RecipeError: if what is held out is no task, all of them, or none.
    """
    seen, unseen = _split(tasks, hold_out)
    held = _HeldOut(base, experts, seen, unseen, heads_of(base, experts), directory, work)
    individual = {task.name: evaluate_checkpoint(experts[task.name], task) for task in unseen}
    records: list[Record] = []

    def add(method: str, scores: Mapping[str, float], paper: float, on_disk: float) -> None:
        rates = {"amr_paper": paper, "amr_on_disk": on_disk}
        records.append(record(method, scores, individual=individual, **rates))
        report(records[-1])

    add("individual", individual, 100.0, 100.0)
    add("pre-trained (SVD, T-Switch)", held.scores_of(base), 0.0, 0.0)
    for name, settings in statics.items():
        add(name, held.scores_of(held.merged(name, settings)), 0.0, 0.0)
    weightings: dict[str, Weighting] = {}
    for name, pack in held.packed(packs).items():
        amr = [task_amr_percent(task, pack.manifest) for task in pack.manifest.tasks.values()]
        rates = fmean(one["amr_paper"] for one in amr), fmean(one["on_disk_native"] for one in amr)
        if pack.manifest.method == "emr":
            add("EMR (unified, no mask)", held.scores_of(held.unified(name, pack)), *rates)
        # Every pack has the same tasks, and they are about the same.
        weightings = weightings or {
            task.name: weigh(pack, task.classes, encoder, gamma=gamma, temperature=temperature)
            for task in unseen
        }
        weights = {task: one.weights for task, one in weightings.items()}
        add(name, held.scores_composed(pack, weights), *rates)
        if pack.manifest.method == "dts" and pack.manifest.budget is None:
            even = {held_out: {task.name: 1 / len(seen) for task in seen} for held_out in weights}
            add(f"{name}, equal weights", held.scores_composed(pack, even), *rates)
    return Unseen(records, weightings)


@dataclass(frozen=True)
class _HeldOut:
    """A family of which some tasks are held out, and models made of the others."""

    base: Path
    experts: Mapping[str, Path]
    seen: Sequence[Task]
    unseen: Sequence[Task]
    heads: tuple[str, ...]
    directory: Path
    work: Work

    @property
    def _inputs(self) -> dict[str, Path]:
        return {task.name: self.experts[task.name] for task in self.seen}

    def merged(self, row: str, settings: MergeSettings) -> Path:
        """The seen experts merged, all but what any task has of its own."""
        apart = settings.model_copy(update={"skip": (*settings.skip, *self.heads)})
        out = self.directory / _file_name(row)
        return merge(self.base, self._inputs, out, settings=apart, overwrite=True, work=self.work)

    def packed(self, rows: Mapping[str, PackSettings]) -> dict[str, Pack]:
        """The seen experts packed for each row, those that differ in rank alone together."""
        groups: dict[str, list[str]] = {}
        for row, settings in rows.items():
            groups.setdefault(settings.without_rank().model_dump_json(), []).append(row)
        made: dict[str, Pack] = {}
        for group in groups.values():
            outs: dict[str | Path, PackSettings] = {
                self.directory / _file_name(row): rows[row].model_copy(
                    update={"private": (*rows[row].private, *self.heads)}
                )
                for row in group
            }
            packs = pack_many(
                self.base,
                self._inputs,
                outs,
                characteristics={task.name: task.classes for task in self.seen},
                overwrite=True,
                work=self.work,
            )
            made |= dict(zip(group, packs, strict=True))
        return {row: made[row] for row in rows}

    def unified(self, row: str, pack: Pack) -> Path:
        """What an EMR pack's tasks share, added to the base: no mask, no rescaler."""
        shared, base = pack.open_shared(), each_once(open_checkpoint(self.base))
        assert shared is not None, "an EMR pack has a unified vector"
        out = self.directory / _file_name(f"{row} unified")
        with (
            output_directory(out, overwrite=True) as partial,
            CheckpointWriter(
                partial, base.specs.values(), tied=base.tied, copies=base.copies
            ) as writer,
        ):
            for name in base.specs:
                tensor, vector = base.read(name), shared.read(name)
                writer.write(name, tensor if vector is None else tensor.float() + vector)
        return out

    def scores_of(self, checkpoint: Path) -> dict[str, float]:
        """Scores of one model under each unseen task's head."""
        return {
            t.name: score_merged(self.base, checkpoint, self.experts[t.name], t, self.heads)
            for t in self.unseen
        }

    def scores_composed(
        self, pack: Pack, weights: Mapping[str, Mapping[str, float]]
    ) -> dict[str, float]:
        """Scores of the model composed for each unseen task, by its weights, under its head."""
        scores: dict[str, float] = {}
        for task in self.unseen:
            with tempfile.TemporaryDirectory() as folder:
                out = compose(
                    pack.directory,
                    weights[task.name],
                    Path(folder) / task.name,
                    base=None if pack.reference_directory else self.base,
                    head=self.experts[task.name],
                    work=self.work,
                )
                scores[task.name] = evaluate_checkpoint(out, task)
        return scores


def _split(tasks: Sequence[Task], hold_out: Sequence[str]) -> tuple[list[Task], list[Task]]:
    """Seen and unseen tasks.

    Raises:
        RecipeError: if what is held out is no task, all of them, or none.
    """
    names = [task.name for task in tasks]
    unknown = [name for name in hold_out if name not in names]
    if unknown:
        raise RecipeError(
            f"There is no task '{unknown[0]}' to hold out. {nearest(unknown[0], names)}"
        )
    seen = [task for task in tasks if task.name not in hold_out]
    unseen = [task for task in tasks if task.name in hold_out]
    if not seen or not unseen:
        raise RecipeError(
            f"{len(unseen)} of {len(tasks)} tasks are held out. Hold out at least one, and not all."
        )
    return seen, unseen


def _file_name(row: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in ".=-" else "-" for letter in row)
    return kept.replace("--", "-").strip("-")
