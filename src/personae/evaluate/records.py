"""What one method scored and what it stores: plain records, and their JSON form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One method's line of an accuracy–size table.

    Attributes:
        method: What the line is called.
        scores: Task name to score, as a fraction.
        average: Mean of the scores.
        adr: Accuracy drop rate against the individual models, in percent.
        amr_paper: Additional memory rate per task by the papers' rule, in percent.
        amr_on_disk: Bytes of one task's file over the bytes of the reference, in percent.
        seconds: What making it took; None if that was not measured.
        peak_bytes: Memory it took meanwhile, above what was held before; None as for seconds.
        made_with: How many rows were made at once, of whose common work both are.
        interval: Ends of the interval of the average, as fractions; None if there is none.
        data: The data that the method saw beside the models; empty for none.
    """

    method: str
    scores: dict[str, float]
    average: float
    adr: float
    amr_paper: float
    amr_on_disk: float
    seconds: float | None = None
    peak_bytes: int | None = None
    made_with: int = 1
    interval: tuple[float, float] | None = None
    data: str = ""


def record(
    method: str,
    scores: Mapping[str, float],
    *,
    individual: Mapping[str, float],
    amr_paper: float,
    amr_on_disk: float,
    **rest: Any,
) -> Record:
    """Compute average and ADR and return the record.

    ADR = 100 (A_ind - A) / A_ind, where A_ind and A are the *task-averaged* scores of the
    individual experts and of the method: a ratio of averages, not an average of ratios.

    Args:
        method: What the line is called.
        scores: Task name to score, as a fraction.
        individual: The same of the individual experts, on the same tasks.
        amr_paper: See `Record`.
        amr_on_disk: See `Record`.
        **rest: The other attributes of `Record`.

    Raises:
        ValueError: if the two cover different tasks.
    """
    if scores.keys() != individual.keys():
        raise ValueError(
            f"'{method}' was scored on {sorted(scores)}, the individual experts on "
            f"{sorted(individual)}; ADR compares averages over the same tasks."
        )
    average, best = fmean(scores.values()), fmean(individual.values())
    return Record(
        method=method,
        scores=dict(scores),
        average=average,
        # There is nothing to lose where the experts themselves score 0.
        adr=100 * (best - average) / best if best else 0.0,
        amr_paper=amr_paper,
        amr_on_disk=amr_on_disk,
        **rest,
    )


def records_to_json(records: Sequence[Record]) -> str:
    """Return the records as a JSON list, in their order, ending in a newline."""
    return json.dumps([asdict(one) for one in records], indent=2, ensure_ascii=False) + "\n"


def records_from_json(text: str) -> list[Record]:
    """Return the records that `records_to_json` wrote."""
    found: list[dict[str, Any]] = json.loads(text)
    for fields in found:
        if fields.get("interval") is not None:
            fields["interval"] = tuple(fields["interval"])
    return [Record(**fields) for fields in found]
