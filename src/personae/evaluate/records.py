"""What one method scored and what it stores: plain records, and their JSON form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean


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
    """

    method: str
    scores: dict[str, float]
    average: float
    adr: float
    amr_paper: float
    amr_on_disk: float


def record(
    method: str,
    scores: Mapping[str, float],
    *,
    individual: Mapping[str, float],
    amr_paper: float,
    amr_on_disk: float,
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
        adr=100 * (best - average) / best,
        amr_paper=amr_paper,
        amr_on_disk=amr_on_disk,
    )


def records_to_json(records: Sequence[Record]) -> str:
    """Return the records as a JSON list, in their order, ending in a newline."""
    return json.dumps([asdict(one) for one in records], indent=2, ensure_ascii=False) + "\n"


def records_from_json(text: str) -> list[Record]:
    """Return the records that `records_to_json` wrote."""
    return [Record(**fields) for fields in json.loads(text)]
