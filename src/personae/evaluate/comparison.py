"""Packs of one family, rebuilt and scored beside the individual models and their average."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from personae.commands.accounting import task_amr_percent
from personae.commands.pack import pack_many
from personae.commands.unpack import unpack
from personae.evaluate.evaluation import evaluate_checkpoint
from personae.evaluate.merged import evaluate_merge
from personae.evaluate.records import Record, record
from personae.evaluate.tasks import Task
from personae.packs.reader import Pack
from personae.recipe import MergeSettings, PackSettings, Vector
from personae.run.work import Work

RANK_FRACTION = 0.3
RANK_FRACTIONS = (0.05, 0.07, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BUDGETS = ("5%", "2%", "1%")

_METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DTS": ("dts", {"rank_fraction": RANK_FRACTION}),
    "SVD": ("svd", {}),
    "TSV-C": ("tsv_c", {}),
    "T-Switch": ("t_switch", {}),
    "T-Switch model": ("t_switch", {"scope": "model"}),
    "EMR": ("emr", {}),
    "TALL-Mask": ("tall_mask", {}),
    "BitDelta": ("bitdelta", {}),
    "BitDelta all": ("bitdelta", {"tensors": "all"}),
    "Delta-CoMe": ("delta_come", {}),
    "UltraDelta": ("ultradelta", {}),
    "Residual": ("residual", {}),
}
_ABLATIONS = {
    "no decomposition": "decomposition",
    "binarised": "thresholding",
    "no scaling": "scaling",
}


def dts_rows(
    rank_fraction: float = RANK_FRACTION, budgets: Sequence[str] = BUDGETS
) -> dict[str, PackSettings]:
    """DTS-T and DTS-D (relative to the average), at one rank fraction and under budgets on disk."""
    rows: dict[str, PackSettings] = {}
    vectors: dict[str, Vector] = {"DTS-T": "task", "DTS-D": "difference"}
    for codec, vector in vectors.items():
        at_rank = {"rank_fraction": rank_fraction}
        rows[f"{codec} r={rank_fraction:g}"] = PackSettings(vector=vector, parameters=at_rank)
        for budget in budgets:
            rows[f"{codec} {budget}"] = PackSettings(vector=vector, budget=budget)
    return rows


def merge_rows() -> dict[str, MergeSettings]:
    """The static methods that differ in kind, at the defaults of their papers; DRM both ways.

    Core Space is left out: it merges LoRA adapters alone.
    """
    rows = {
        "task arithmetic 0.3": MergeSettings(method="task_arithmetic", parameters={"scale": 0.3}),
        "TIES": MergeSettings(method="ties"),
        "DARE 0.2, scale 0.3": MergeSettings(
            method="dare", parameters={"density": 0.2, "scale": 0.3}
        ),
        "DARE-TIES": MergeSettings(method="dare_ties", parameters={"density": 0.2}),
        "Consensus 0.3": MergeSettings(method="consensus", parameters={"scale": 0.3}),
        "TSV-M": MergeSettings(method="tsv_m"),
        "Iso-C": MergeSettings(method="iso_c"),
        "Iso-CTS": MergeSettings(method="iso_cts"),
        "KnOTS-TIES": MergeSettings(method="knots"),
        "CART": MergeSettings(method="cart"),
        "WUDI": MergeSettings(method="wudi"),
        "DC-Merge": MergeSettings(method="dc_merge"),
        "ACE-Merging": MergeSettings(method="ace_merging"),
        "Model Stock": MergeSettings(method="model_stock"),
        "SCE": MergeSettings(method="sce"),
        "geometric median": MergeSettings(method="geometric_median"),
    }
    for letter, direction in (("H", "horizontal"), ("V", "vertical")):
        rows[f"DRM-{letter}"] = MergeSettings(method="drm", parameters={"direction": direction})
    return rows


def method_rows(thresholds: Mapping[str, float] | None = None) -> dict[str, PackSettings]:
    """Every personalised method at its defaults: on task vectors, and on difference vectors.

    DTS stands at the rank fraction of its paper's tables.

    Args:
        thresholds: Of TALL-masks, one a task, for a row of their own; see `choose_thresholds`.
    """
    rows: dict[str, PackSettings] = {}
    vectors: dict[str, Vector] = {"": "task", "-diff": "difference"}
    for suffix, vector in vectors.items():
        for title, (method, parameters) in _METHODS.items():
            rows[title + suffix] = PackSettings(
                method=method, parameters=dict(parameters), vector=vector
            )
            if method == "tall_mask" and vector == "task" and thresholds:
                rows["TALL-Mask chosen"] = PackSettings(
                    method=method, parameters={"threshold": dict(thresholds)}
                )
    return rows


def sweep_rows(
    rank_fractions: Sequence[float] = RANK_FRACTIONS,
    budgets: Sequence[str] = BUDGETS,
    vector: Vector = "task",
) -> dict[str, PackSettings]:
    """The DTS paper's ablations, sweep over ranks and budgets; one decomposition serves them all.

    Args:
        rank_fractions: Ranks of the sweep.
        budgets: On disk.
        vector: Of the deltas.
    """
    name = "DTS-T" if vector == "task" else "DTS-D"
    rows: dict[str, PackSettings] = {}
    for fraction in rank_fractions:
        at_rank = {"rank_fraction": fraction}
        rows[f"{name} r={fraction:g}"] = PackSettings(vector=vector, parameters=at_rank)
    for ablation, parameter in _ABLATIONS.items():
        without = {"rank_fraction": RANK_FRACTION, parameter: False}
        rows[f"{name} {ablation}"] = PackSettings(vector=vector, parameters=without)
    for budget in budgets:
        rows[f"{name} {budget}"] = PackSettings(vector=vector, budget=budget)
    return rows


def compare(
    base: Path,
    experts: Mapping[str, Path],
    tasks: Sequence[Task],
    rows: Mapping[str, PackSettings],
    directory: Path,
    *,
    merges: Mapping[str, MergeSettings] | None = None,
    work: Work,
    report: Callable[[Record], None] = lambda _: None,
) -> list[Record]:
    """Score the experts, merged models, and each expert rebuilt from each pack.

    Packs of difference vectors from the experts' average are made without the base, so that heads
    are told by their shapes alone.

    Args:
        base: The base's checkpoint directory.
        experts: Task name to the expert's checkpoint directory.
        tasks: What to score on.
        rows: Row name to the settings of its pack.
        directory: Where the packs go; a pack that is there is replaced.
        merges: Row name to the settings of a merged model, beside the weight average.
        work: Workers, memory bound, progress.
        report: Told each record as soon as it is known.

    Returns:
        A record a row, "individual" and "weight averaging" first. Both AMR are means over tasks.
    """
    individual = {task.name: evaluate_checkpoint(experts[task.name], task) for task in tasks}
    records: list[Record] = []

    def add(method: str, scores: Mapping[str, float], paper: float, on_disk: float) -> None:
        records.append(
            record(method, scores, individual=individual, amr_paper=paper, amr_on_disk=on_disk)
        )
        report(records[-1])

    add("individual", individual, 100.0, 100.0)
    for name, merging in ({"weight averaging": MergeSettings()} | dict(merges or {})).items():
        add(name, evaluate_merge(base, experts, tasks, merging, work=work), 0.0, 0.0)
    for group in _sharing_decompositions(rows):
        outs: dict[str | Path, PackSettings] = {
            directory / name.replace(" ", "-").replace("%", "-percent"): rows[name]
            for name in group
        }
        needed = None if rows[group[0]].from_average else base
        packs = pack_many(needed, experts, outs, overwrite=True, work=work)
        for name, pack in zip(group, packs, strict=True):
            amr = [task_amr_percent(task, pack.manifest) for task in pack.manifest.tasks.values()]
            add(
                name,
                _scores(pack, base, tasks, work),
                fmean(one["amr_paper"] for one in amr),
                fmean(one["on_disk_native"] for one in amr),
            )
    return records


def _sharing_decompositions(rows: Mapping[str, PackSettings]) -> list[list[str]]:
    """Row names grouped so that one decomposition of each delta serves a group."""
    groups: dict[str, list[str]] = {}
    for name, settings in rows.items():
        groups.setdefault(settings.common().model_dump_json(), []).append(name)
    return list(groups.values())


def _scores(pack: Pack, base: Path, tasks: Sequence[Task], work: Work) -> dict[str, float]:
    """Rebuild each expert into a temporary directory and score it."""
    scores: dict[str, float] = {}
    for task in tasks:
        with tempfile.TemporaryDirectory() as folder:
            rebuilt = Path(folder) / task.name
            source = None if pack.reference_directory else base
            unpack(pack.directory, task.name, rebuilt, base=source, work=work)
            scores[task.name] = evaluate_checkpoint(rebuilt, task)
    return scores
