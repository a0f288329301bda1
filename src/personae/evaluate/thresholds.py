"""The thresholds of TALL-masks, chosen for each task on its validation examples."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.errors import Faults, RecipeError
from personae.evaluate.evaluation import evaluate_checkpoint
from personae.evaluate.tasks import Task
from personae.recipe import PackSettings
from personae.run.work import Work

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)
"""Those the paper chooses from (arXiv:2405.07813)."""


def choose_thresholds(
    base: Path,
    experts: Mapping[str, Path],
    tasks: Sequence[Task],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    work: Work | None = None,
    report: Callable[[float, Mapping[str, float]], None] = lambda _, __: None,
) -> dict[str, float]:
    """Rebuild every expert at each threshold and keep, for each, that of its best score.

    Args:
        base: The base's checkpoint directory.
        experts: Task name to the expert's checkpoint directory; all are packed together.
        tasks: With validation examples, which neither experts are trained nor scored on.
        thresholds: To choose from; of equal scores the first wins.
        work: Workers, memory bound, progress.
        report: Told each threshold and its validation scores, as soon as they are known.

    Returns:
        Task name to threshold, as the codec's parameter `threshold` takes it.

    Raises:
        RecipeError: naming each task without validation examples.
        MethodError: for a threshold out of range.
    """
    faults = Faults()
    for task in tasks:
        if task.validation is None:
            faults.add(
                f"Task '{task.name}' has no validation examples. Give some (Task.validation), or "
                "its threshold."
            )
    faults.raise_if_any(RecipeError)
    scores: dict[float, dict[str, float]] = {}
    for threshold in thresholds:
        settings = PackSettings(method="tall_mask", parameters={"threshold": threshold})
        with tempfile.TemporaryDirectory() as folder:
            made = pack(base, experts, Path(folder) / "pack", settings=settings, work=work)
            scores[threshold] = {}
            for task in tasks:
                rebuilt = Path(folder) / task.name
                unpack(made.directory, task.name, rebuilt, base=base, work=work)
                assert task.validation is not None
                examined = replace(task, test=task.validation)
                scores[threshold][task.name] = evaluate_checkpoint(rebuilt, examined)
        report(threshold, scores[threshold])
    return {task.name: max(scores, key=lambda t: scores[t][task.name]) for task in tasks}
