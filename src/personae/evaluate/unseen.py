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

from personae.errors import RecipeError, nearest
from personae.evaluate.evaluation import evaluate_checkpoint
from personae.evaluate.heads import score_with_head
from personae.evaluate.records import Record, record
from personae.evaluate.tasks import Task
from personae.execute.accounting import task_amr_percent
from personae.execute.compose import compose
from personae.execute.merge import merge
from personae.execute.pack import pack_many
from personae.execute.weighting import TextEncoder, Weighting, weigh
from personae.execute.work import Work
from personae.methods import CODECS, MERGE_METHODS
from personae.packs.reader import Pack
from personae.recipe import MergeSettings, PackSettings

EQUAL = "equal weights"
SAME = "same weighting"


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
    """The static methods that need nothing but full checkpoints, at their own defaults."""
    named = {"average": "weight averaging", "task_arithmetic": "task arithmetic", "ties": "TIES"}
    named |= {"dare_ties": "DARE-TIES", "drm": "DRM"}
    return {
        label: MergeSettings(method=method)
        for method, label in named.items()
        if method in MERGE_METHODS
    }


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
        f"{label}, {SAME}": PackSettings(method=method)
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
    inputs = {task.name: experts[task.name] for task in seen}
    individual = {task.name: evaluate_checkpoint(experts[task.name], task) for task in unseen}
    records: list[Record] = []

    def add(method: str, scores: Mapping[str, float], amr: Sequence[dict[str, float]] = ()) -> None:
        rates = [fmean(one[rule] for one in amr) if amr else 0.0 for rule in _RULES]
        if method == "individual":
            rates = [100.0, 100.0]
        row = record(
            method, scores, individual=individual, amr_counted=rates[0], amr_on_disk=rates[1]
        )
        records.append(row)
        report(row)

    def whole(checkpoint: Path) -> dict[str, float]:
        return {t.name: score_with_head(checkpoint, experts[t.name], t) for t in unseen}

    add("individual", individual)
    add("pre-trained (SVD, T-Switch)", whole(base))
    for name, settings in statics.items():
        merged = merge(
            base, inputs, directory / _file_name(name), settings=settings, overwrite=True, work=work
        )
        add(name, whole(merged))
    weightings: dict[str, Weighting] = {}
    for name, pack in _packed(base, inputs, seen, packs, directory, work):
        source = None if pack.reference_directory else base
        amr = [task_amr_percent(task) for task in pack.manifest.tasks.values()]
        if pack.manifest.method == "emr":
            add("EMR (unified, no mask)", _unified(pack, base, experts, unseen), amr)
        if not weightings:  # every pack has the same tasks, and they are about the same
            weightings = {
                task.name: weigh(pack, task.classes, encoder, gamma=gamma, temperature=temperature)
                for task in unseen
            }
        scores = {
            task.name: _composed(pack, weightings[task.name].weights, source, experts, task, work)
            for task in unseen
        }
        add(name, scores, amr)
        if name.startswith("DTS") and "*" not in name:
            even = {task.name: 1 / len(seen) for task in seen}
            scores = {t.name: _composed(pack, even, source, experts, t, work) for t in unseen}
            add(f"{name}, {EQUAL}", scores, amr)
    return Unseen(records, weightings)


_RULES = ("counted", "on_disk_native")


def _unified(
    pack: Pack, base: Path, experts: Mapping[str, Path], unseen: Sequence[Task]
) -> dict[str, float]:
    """Scores of θ₀ + τ_uni: EMR without mask and rescaler."""
    shared = pack.open_shared()
    assert shared is not None, "an EMR pack has a unified vector"
    return {t.name: score_with_head(base, experts[t.name], t, shared.read) for t in unseen}


def _composed(
    pack: Pack,
    weights: Mapping[str, float],
    base: Path | None,
    experts: Mapping[str, Path],
    task: Task,
    work: Work,
) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / task.name
        compose(pack.directory, weights, out, base=base, head=experts[task.name], work=work)
        return evaluate_checkpoint(out, task)


def _packed(
    base: Path,
    experts: Mapping[str, Path],
    seen: Sequence[Task],
    rows: Mapping[str, PackSettings],
    directory: Path,
    work: Work,
) -> list[tuple[str, Pack]]:
    """The seen tasks packed for each row, those that differ in rank alone together."""
    groups: dict[str, list[str]] = {}
    for name, settings in rows.items():
        groups.setdefault(settings.without_rank().model_dump_json(), []).append(name)
    made: dict[str, Pack] = {}
    for group in groups.values():
        outs: dict[str | Path, PackSettings] = {
            directory / _file_name(name): rows[name] for name in group
        }
        about = {task.name: task.classes for task in seen}
        packs = pack_many(base, experts, outs, characteristics=about, overwrite=True, work=work)
        made |= dict(zip(group, packs, strict=True))
    return [(name, made[name]) for name in rows]


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
