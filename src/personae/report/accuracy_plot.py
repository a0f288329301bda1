"""The plot of an evaluation: what methods score, over what they store."""

import io
from collections.abc import Sequence
from typing import Any

from personae.evaluate.records import Record
from personae.report.plots import BLUE, ORANGE, figure_module, shortened

_BESIDE: dict[str, Any] = {"textcoords": "offset points"}


def accuracy_over_size(records: Sequence[Record]) -> str:
    """The average of each method over what a task costs on disk, as SVG to be put into a page.

    Methods that store nothing stand at the left edge, beside an axis that is logarithmic beyond.

    Raises:
        RecipeError: if matplotlib is not installed.
    """
    figure = figure_module().Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for one in records:
        average, low, high = 100 * one.average, *(one.interval or (one.average, one.average))
        bars = [[max(0.0, average - 100 * low)], [max(0.0, 100 * high - average)]]
        colour = ORANGE if one.amr_on_disk == 0 else BLUE
        place = [one.amr_on_disk], [average]
        axes.errorbar(*place, bars, fmt="o", color=colour, markersize=4, elinewidth=0.6)
        # A name is text, whatever dollars it has.
        shown = shortened(one.method).replace("$", r"\$")
        axes.annotate(shown, (place[0][0], average), (5, 2), fontsize=7, **_BESIDE)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(left=-0.02)
    axes.set_xlabel("additional memory a task, bytes on disk in % of the shared model")
    axes.set_ylabel("average score (%)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue().partition("<svg")[1] + drawn.getvalue().partition("<svg")[2]
