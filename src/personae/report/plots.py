"""Plots of analyses, by matplotlib (an extra): a panel a tensor."""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from personae.errors import RecipeError
from personae.methods.analyses import Findings
from personae.writers import atomic_file, require_folder

SUFFIXES = (".png", ".svg", ".pdf")
MOST_PANELS = 9
_COLUMNS = 3
BLUE, ORANGE, _GREY = "#3465a4", "#d9822b", "#777777"


def check(path: Path) -> None:
    """Find out, before anything is computed, whether a plot can be drawn.

    Raises:
        RecipeError: if matplotlib is not installed, or the suffix is none it is drawn as.
        OutputError: if no file can be written there.
    """
    if path.suffix not in SUFFIXES:
        raise RecipeError(f"A plot is drawn as {', '.join(SUFFIXES)}, not as '{path.name}'.")
    figure_module()
    require_folder(path)


def draw(found: dict[str, Any], path: Path) -> int:
    """Draw the findings of one analysis, of the first nine tensors.

    Args:
        found: As `analyse` returns them.
        path: Where to; replaced if it exists.

    Returns:
        How many tensors are left out.

    Raises:
        RecipeError: as `check` does.
        OutputError: if the file cannot be written.
    """
    check(path)
    shown = list(found["tensors"].items())[:MOST_PANELS]
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = figure_module().Figure(figsize=(4.6 * columns, 3.4 * rows + 0.7), layout="constrained")
    figure.suptitle(found["summary"].rstrip("."), fontsize=11)
    for number, (name, findings) in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(shortened(name), fontsize=8)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        _PANELS[found["analysis"]](axes, findings, found["experts"])
        if number == 1:
            for line in axes.legend(fontsize=7, frameon=False).get_lines():
                line.set_alpha(1)
    with atomic_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)
    return len(found["tensors"]) - len(shown)


def figure_module() -> Any:
    """Matplotlib's module of figures.

    Raises:
        RecipeError: if it is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise RecipeError("Plots need matplotlib: pip install 'personae[plots]'.") from error


def shortened(name: str) -> str:
    """A name that fits beside a plot."""
    return name if len(name) <= 48 else f"…{name[-47:]}"


def _sign_agreement(axes: Any, findings: Findings, _: Sequence[str]) -> None:
    places = range(len(findings))
    percent = {
        which: [100 * space[which] for space in findings.values()]
        for which in ("agreement", "random")
    }
    axes.bar([p - 0.2 for p in places], percent["agreement"], 0.38, color=BLUE, label="experts")
    axes.bar([p + 0.2 for p in places], percent["random"], 0.38, color="#cccccc", label="random")
    axes.set_xticks(list(places), list(findings))
    axes.set_ylim(50, 100)
    axes.set_ylabel("sign agreement (%)", fontsize=8)


def _dropped_percentage(axes: Any, findings: Findings, experts: Sequence[str]) -> None:
    for key, colour, label in (
        ("as_is", ORANGE, "as it is"),
        ("renormalised", BLUE, "renormalised"),
    ):
        for number, percent in enumerate(findings[key]["percent"]):
            axes.plot(
                range(1, len(percent) + 1),
                percent,
                color=colour,
                linewidth=0.8,
                alpha=max(0.4, 1 / len(experts)),
                label=f"{label}, each expert" if number == 0 else None,
            )
    axes.set_ylim(0, 100)
    axes.set_xlabel("basis vector, by falling σ", fontsize=8)
    axes.set_ylabel("entries dropped (%)", fontsize=8)


def _singular_value_bound(axes: Any, findings: Findings, experts: Sequence[str]) -> None:
    stack = findings["stack"]
    axes.plot(range(1, len(stack) + 1), stack, color="black", label="stack, σ(C)")
    for number, (_, copies) in enumerate(zip(experts, findings["copies"], strict=True)):
        places = range(1, len(copies) + 1)
        label = "√N σ(ΔW), each expert" if number == 0 else None
        axes.plot(places, copies, color=BLUE, linewidth=0.8, alpha=0.6, label=label)
        bound = [math.nan if b is None else b for b in findings["bound"][number]]
        label = "bound on their distance" if number == 0 else None
        axes.plot(places, bound, color=_GREY, linewidth=0.8, linestyle="--", alpha=0.6, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("i", fontsize=8)
    axes.set_ylabel("singular value", fontsize=8)


def _rank_drop(axes: Any, findings: Findings, _: Sequence[str]) -> None:
    drops = findings["rank_drop"]
    axes.plot(drops, findings["energy"], color=BLUE, marker="o", label="energy of the stack left")
    axes.plot(drops, findings["cosine"], color=ORANGE, marker="s", label="cosine to κ = 0")
    axes.plot(drops, findings["change"], color=_GREY, marker="^", label="relative change²")
    axes.set_ylim(0, None)
    axes.set_xlabel("directions dropped, κ", fontsize=8)


_PANELS: dict[str, Callable[[Any, Findings, Sequence[str]], None]] = {
    "sign_agreement": _sign_agreement,
    "dropped_percentage": _dropped_percentage,
    "singular_value_bound": _singular_value_bound,
    "rank_drop": _rank_drop,
}
