"""Rows of a comparison: what each one makes, and sets of them that have a name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from personae.evaluate.learning import LearnSettings
from personae.recipe import MergeSettings, PackSettings, Vector

Row = Literal["individual", "base"] | MergeSettings | PackSettings | LearnSettings
"""The experts as they are; the base, under each expert's head; a merged model; a pack; what a
method learned from data."""

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


_FIRST: Mapping[str, Row] = {"individual": "individual", "weight averaging": MergeSettings()}
"""What every table begins with."""


def demo_rows() -> dict[str, Row]:
    """The table of the demo: individual models, their average, and DTS as `dts_rows` has it."""
    return {**_FIRST, **dts_rows()}


def static_rows() -> dict[str, Row]:
    """The individual models, the average, and every static method as `merge_rows` has it."""
    return {**_FIRST, **merge_rows()}


def personalised_rows() -> dict[str, Row]:
    """The individual models, the average, and every codec as `method_rows` has it."""
    return {**_FIRST, **method_rows()}


PRESETS: Mapping[str, Callable[[], Mapping[str, Row]]] = {
    "static": static_rows,
    "personalised": personalised_rows,
    "dts": demo_rows,
    "sweep": lambda: {**_FIRST, **sweep_rows()},
}
"""Sets of rows that a suite can name."""
