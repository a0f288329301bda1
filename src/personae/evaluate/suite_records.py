"""A suite's records: what is to be tuned is tuned, then all is made, scored and measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from personae.evaluate.cache import default_cache
from personae.evaluate.comparison import compare
from personae.evaluate.learning import counted
from personae.evaluate.records import Record
from personae.evaluate.rows import Row
from personae.evaluate.search import Tune
from personae.evaluate.suite import Suite, read_suite
from personae.evaluate.tuning import named, tune_suite
from personae.run.work import Work


def evaluate_suite(
    suite: str | Path | Suite,
    *,
    cache: str | Path | None = None,
    work: Work | None = None,
    report: Callable[[Record], None] = lambda _: None,
) -> list[Record]:
    """Make, score and measure every method of a suite on every task; see `compare`.

    Args:
        suite: The suite, or its file.
        cache: Where answers are kept, so that an interrupted run goes on and suites share rows; by
            default in the user's cache.
        work: Workers, memory bound, device, progress.
        report: Told each record as soon as it is known.

    Returns:
        A record a row, in the order of the suite; rows that are to be tuned are tuned before.

    Raises:
        PersonaeError: for anything wrong with the suite, all faults at once, before work starts.
    """
    read = suite if isinstance(suite, Suite) else read_suite(suite)
    folder = default_cache() if cache is None else Path(cache)
    rows, found = _tuned(read, folder, work)

    def complete(one: Record) -> Record:
        return replace(one, data=found.get(one.method, one.data))

    records = compare(
        read.base,
        read.experts,
        read.tasks,
        rows,
        cache=folder,
        heads=read.heads,
        work=work,
        report=lambda one: report(complete(one)),
    )
    return [complete(one) for one in records]


def _tuned(suite: Suite, cache: Path, work: Work | None) -> tuple[dict[str, Row], dict[str, str]]:
    """The rows with what was found in the place of what is to be tuned.

    Returns:
        Name to row, and of those that were tuned name to what was looked at and what was found.
    """
    rows: dict[str, Row] = {}
    told: dict[str, str] = {}
    for name, row in suite.rows.items():
        if not isinstance(row, Tune):
            rows[name] = row
            continue
        tuned = tune_suite(
            replace(suite, search=row.search),
            trials=row.trials,
            sampler=row.sampler,
            seed=row.seed,
            cache=cache,
            work=work,
        )
        rows[name] = tuned.settings
        sizes = counted(len(one.validation["labels"]) for one in suite.tasks if one.validation)
        told[name] = (
            f"labels: {sizes} a task of the split validation; best of {len(tuned.trials)} trials: "
            f"{named(tuned.best.parameters)}"
        )
    return rows, told
