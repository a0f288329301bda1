"""The parameters of a method by search on validation splits; the best ones as a recipe."""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from personae.errors import OutputError, RecipeError, nearest
from personae.evaluate.cache import Cache, default_cache
from personae.evaluate.comparison import Study
from personae.evaluate.merged import heads_of
from personae.evaluate.search import SAMPLERS, Choice, Search, Span, check_sampler, no_validation
from personae.evaluate.suite import Suite, read_suite
from personae.evaluate.tasks import Task
from personae.recipe import MergeSettings, PackSettings, merge_recipe_text, pack_recipe_text
from personae.run.work import Work
from personae.writers import atomic_file, require_folder

TRIALS = 30
"""Of a search that is not asked for another number; a grid tries all."""

Parameters = dict[str, Any]
_Score = Callable[[Sequence[Parameters]], list[float | None]]
"""The averages of some parameters; None for those that cannot be together."""


@dataclass(frozen=True)
class Trial:
    """Parameters that were tried.

    Attributes:
        parameters: Name to value, of those that are searched.
        scores: Task name to the score on its validation split, as a fraction.
    """

    parameters: Parameters
    scores: dict[str, float]

    @property
    def average(self) -> float:
        """Mean of the scores."""
        return fmean(self.scores.values())


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        trials: Each once, in the order in which they were tried; at least one.
        settings: Those of the best trial, with all that was not searched.
    """

    trials: Sequence[Trial]
    settings: MergeSettings | PackSettings

    @property
    def best(self) -> Trial:
        """The trial with the highest average; of several the first."""
        return _best(self.trials)


def tune_suite(
    suite: str | Path | Suite,
    out: str | Path | None = None,
    *,
    trials: int | None = None,
    sampler: str = "tpe",
    seed: int = 0,
    overwrite: bool = False,
    cache: str | Path | None = None,
    work: Work | None = None,
    report: Callable[[Trial], None] = lambda _: None,
) -> Tuned:
    """Search a method's parameters for the highest average on the tasks' validation splits.

    The same suite, sampler and seed give the same trials.

    Args:
        suite: A suite with a `search`, or its file.
        out: The file of a recipe with the best parameters; by default none is written.
        trials: How many; by default 30, of a grid all.
        sampler: `tpe` (each trial learns from those before it), `random`, or `grid` (every
            combination once).
        seed: Of the first two.
        overwrite: Whether a file at `out` is replaced.
        cache: Where answers are kept, so that an interrupted search goes on; by default in the
            user's cache.
        work: Workers, memory bound, device, progress.
        report: Told each trial as soon as it is known.

    Raises:
        PersonaeError: for anything wrong with suite or search, before work starts.
    """
    _check_options(trials, sampler, seed)
    if out is not None:
        _check_place(Path(out), overwrite)
    if sampler != "grid":
        _optuna()
    read = suite if isinstance(suite, Suite) else read_suite(suite)
    search = _search_of(read)
    check_sampler(search, sampler, trials)
    folder = default_cache() if cache is None else Path(cache)
    study = Study(
        read.base, read.experts, _validated(read), read.heads, Cache(folder), None, work or Work()
    )
    scoring = _Scoring(search, study, report)
    _propose(search.choices, sampler, trials or TRIALS, seed, scoring)
    found = scoring.trials()
    best = _best(found)
    tuned = Tuned(found, search.row(best.parameters))
    if out is not None:
        said = f"Best of {len(found)} trials of personae tune, sampler {sampler}, seed {seed}."
        text = f"# {said}\n# Validation: {_told(best)}\n{_recipe(read, tuned.settings, Path(out))}"
        with atomic_file(Path(out)) as partial:
            partial.write_text(text, "utf-8")
    return tuned


def _best(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=lambda trial: trial.average)


def _told(trial: Trial) -> str:
    scores = ", ".join(f"{task} {100 * score:.2f}" for task, score in trial.scores.items())
    return f"average {100 * trial.average:.2f} % ({scores})"


def named(parameters: Mapping[str, Any]) -> str:
    """Parameters in a line."""
    return " ".join(f"{name}={value}" for name, value in parameters.items())


def _check_options(trials: int | None, sampler: str, seed: int) -> None:
    if sampler not in SAMPLERS:
        raise RecipeError(f"Unknown sampler '{sampler}'. {nearest(sampler, SAMPLERS)}")
    if trials is not None and trials < 1:
        raise RecipeError(f"{trials} trials find nothing: give 1 or more.")
    if not 0 <= seed < 2**32:
        raise RecipeError(f"seed = {seed}: expected a number from 0 to {2**32 - 1}.")


def _check_place(out: Path, overwrite: bool) -> None:
    require_folder(out)
    if out.exists() and not overwrite:
        raise OutputError(f"'{out}' is there already. Choose another name, or --overwrite.")


def _search_of(suite: Suite) -> Search:
    """What is searched.

    Raises:
        RecipeError: if the suite does not say.
    """
    if suite.search is None:
        raise RecipeError(
            "The suite has no search. Say what to search: "
            "search: {merge: {method: ties}, parameters: {density: [0.1, 0.2]}}."
        )
    return suite.search


def _validated(suite: Suite) -> list[Task]:
    """The tasks with their validation splits in the place of what they are scored on.

    Raises:
        RecipeError: naming the tasks that have none.
    """
    found = [replace(t, test=t.validation) for t in suite.tasks if t.validation is not None]
    missing = [task.name for task in suite.tasks if task.validation is None]
    if missing:
        raise RecipeError(no_validation(missing))
    return found


class _Scoring:
    """Scores parameters, each once, and keeps what is found."""

    def __init__(self, search: Search, study: Study, report: Callable[[Trial], None]) -> None:
        self.found: dict[str, Trial] = {}
        self.refused = ""
        self._search, self._study, self._report = search, study, report

    def __call__(self, batch: Sequence[Parameters]) -> list[float | None]:
        """The averages of some parameters; codecs share what their packs have in common."""
        asked = {named(one): one for one in batch}
        rows = {
            name: self._search.row(one)
            for name, one in asked.items()
            if name not in self.found and self._can_be(one)
        }
        for name, answers in self._study.answered(rows):
            self.found[name] = Trial(asked[name], self._study.scores(answers))
            self._report(self.found[name])
        known = (self.found.get(named(one)) for one in batch)
        return [None if trial is None else trial.average for trial in known]

    def trials(self) -> list[Trial]:
        """What was found.

        Raises:
            RecipeError: if nothing was, naming why.
        """
        if not self.found:
            raise RecipeError(f"No parameters that were tried can be together: {self.refused}")
        return [*self.found.values()]

    def _can_be(self, parameters: Parameters) -> bool:
        fault = self._search.fault(parameters, [*self._study.experts])
        self.refused = self.refused or fault
        return not fault


def _propose(
    choices: Mapping[str, Choice], sampler: str, trials: int, seed: int, score: _Score
) -> None:
    """Let parameters be scored as a sampler proposes them.

    Those that do not depend on what was found before are proposed together.
    """
    if sampler == "grid":
        values = (choice for choice in choices.values() if not isinstance(choice, Span))
        score([dict(zip(choices, one, strict=True)) for one in product(*values)])
        return
    optuna = _optuna()
    with _quiet(optuna):
        made = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        study = optuna.create_study(direction="maximize", sampler=made[sampler](seed=seed))
        at_once = trials if sampler == "random" else 1
        for _ in range(0, trials, at_once):
            asked = [study.ask() for _ in range(at_once)]
            batch = [{name: _value(one, name, choices[name]) for name in choices} for one in asked]
            for one, average in zip(asked, score(batch), strict=True):
                failed = optuna.trial.TrialState.FAIL if average is None else None
                study.tell(one, average, state=failed)


def _value(trial: Any, name: str, choice: Choice) -> Any:
    """A value that a sampler proposes; numbers by their place, as they are in order."""
    if isinstance(choice, Span):
        return trial.suggest_float(name, *choice)
    if all(isinstance(value, int | float) for value in choice):
        return choice[trial.suggest_int(name, 0, len(choice) - 1)]
    return trial.suggest_categorical(name, choice)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise RecipeError("tune needs optuna: pip install 'personae[eval]'.") from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Generator[None]:
    """Say what was tried once, not in optuna's words too."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _recipe(suite: Suite, settings: MergeSettings | PackSettings, out: Path) -> str:
    """A recipe of just what was scored: heads are no part of it."""
    base = _shown(suite, suite.base, out)
    experts = {name: _shown(suite, model, out) for name, model in suite.experts.items()}
    if isinstance(settings, PackSettings):
        private = (*settings.private, *suite.heads)
        return pack_recipe_text(base, experts, settings.model_copy(update={"private": private}))
    skip = (*settings.skip, *suite.heads, *heads_of(suite.base, suite.experts))
    return merge_recipe_text(base, experts, settings.model_copy(update={"skip": skip}))


def _shown(suite: Suite, model: Path, out: Path) -> str:
    """A model as a recipe at `out` calls it."""
    if model in suite.fixed:
        return suite.fixed[model]
    place = Path(os.path.realpath(model.parent), model.name)
    return Path(os.path.relpath(place, os.path.realpath(out.parent))).as_posix()
