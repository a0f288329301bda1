"""Methods on one family, side by side: every row made, scored on every task, and measured."""

import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from personae.commands.accounting import task_amr_percent
from personae.commands.merge import merge
from personae.commands.pack import pack_many
from personae.evaluate.cache import Cache, CachedRow, of_data, of_task
from personae.evaluate.evaluation import score
from personae.evaluate.intervals import bootstrap_interval
from personae.evaluate.learned import learn
from personae.evaluate.learning import LearnSettings
from personae.evaluate.measuring import measured
from personae.evaluate.merged import attach_head, heads_of
from personae.evaluate.metrics import Answers
from personae.evaluate.models import for_task, load_task_model
from personae.evaluate.predictions import predict
from personae.evaluate.records import Record, record
from personae.evaluate.rows import Row
from personae.evaluate.tasks import Task
from personae.packs.reader import Pack
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from personae.runtime.loading import load


def compare(
    base: Path,
    experts: Mapping[str, Path],
    tasks: Sequence[Task],
    rows: Mapping[str, Row],
    *,
    cache: Path | None = None,
    keep: Path | None = None,
    heads: Sequence[str] = (),
    work: Work | None = None,
    report: Callable[[Record], None] = lambda _: None,
) -> list[Record]:
    """Make every row, score it on every task under that task's own head, and measure it.

    At most one model is in memory, beside it the reference of a pack; of learned methods all
    experts. What is in the cache is not computed again.

    Args:
        base: The base's checkpoint directory.
        experts: Task name to the expert's checkpoint directory.
        tasks: What to score on.
        rows: Row name to what it is.
        cache: Where answers are kept; by default nowhere.
        keep: Where merged models and packs stay, under the names of their rows; by default they
            are removed once they are scored. Of learned methods nothing is written.
        heads: Patterns of tensors that are each expert's own, beside those of which the shapes
            tell it.
        work: Workers, memory bound, device, progress.
        report: Told each record as soon as it is known.

    Returns:
        A record a row, in the order of the rows. Both AMR are means over tasks.
    """
    with _folder(cache) as folder:
        study = Study(base, experts, tasks, tuple(heads), Cache(folder), keep, work or Work())
        individual = study.scores(study.answers("individual", "individual"))
        found: dict[str, Record] = {}
        for name, answers in study.answered(rows):
            found[name] = record(
                name,
                study.scores(answers),
                individual=individual,
                interval=study.interval(answers),
                **study.row(rows[name]).costs,
            )
            report(found[name])
    return [found[name] for name in rows]


def _together(rows: Mapping[str, Row]) -> list[list[str]]:
    """Row names, those together of which one decomposition of each delta serves all."""
    groups: dict[str, list[str]] = {}
    for name, row in rows.items():
        key = row.common().model_dump_json() if isinstance(row, PackSettings) else f"row {name}"
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _once(tell: Callable[[str], None]) -> Callable[[str], None]:
    told: set[str] = set()

    def note(text: str) -> None:
        if text not in told:
            told.add(text)
            tell(text)

    return note


@contextmanager
def _folder(cache: Path | None) -> Generator[Path]:
    if cache is not None:
        yield cache
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@dataclass
class Study:
    """A family, what it is scored on, and where answers are kept."""

    base: Path
    experts: Mapping[str, Path]
    tasks: Sequence[Task]
    own: tuple[str, ...]
    cache: Cache
    keep: Path | None
    work: Work

    def __post_init__(self) -> None:
        """Say once what every merge has to say of the family."""
        self.work = replace(self.work, note=_once(self.work.note))

    def answered(self, rows: Mapping[str, Row]) -> Iterator[tuple[str, dict[str, Answers]]]:
        """Make rows, and give the name of each with its answers as soon as they are known."""
        for group in _together(rows):
            self.make({name: rows[name] for name in group})
            for name in group:
                yield name, self.answers(name, rows[name])

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Patterns of tensors that are no part of a merge: those named, and those of any shape."""
        return (*self.own, *heads_of(self.base, self.experts))

    @cached_property
    def keys(self) -> dict[str, str]:
        """Digests of the tasks' examples."""
        return {task.name: of_task(task) for task in self.tasks}

    @cached_property
    def _inputs(self) -> list[Any]:
        models = {name: self.cache.of_model(path) for name, path in self.experts.items()}
        return [self.cache.of_model(self.base), list(models.items()), list(self.own)]

    def row(self, row: Row) -> CachedRow:
        """What is known of a row."""
        said = row if isinstance(row, str) else [type(row).__name__, row.model_dump(mode="json")]
        # Models of learned methods are made of data, too.
        seen = [of_data(row, self.tasks)] if isinstance(row, LearnSettings) else []
        return self.cache.row(self._inputs, said, *seen, str(self.work.torch_device))

    def scores(self, answers: Mapping[str, Answers]) -> dict[str, float]:
        """Task name to the score of the answers."""
        return {task.name: score(answers[task.name], task) for task in self.tasks}

    def interval(self, answers: Mapping[str, Answers]) -> tuple[float, float]:
        """The interval of the average."""
        labels = {task.name: task.test["labels"].numpy() for task in self.tasks}
        return bootstrap_interval(answers, labels, {task.name: task.metric for task in self.tasks})

    def make(self, group: Mapping[str, Row]) -> None:
        """Make the models of rows that share their work, but for those that need none any more."""
        missing: dict[str, MergeSettings | PackSettings] = {}
        for name, row in group.items():
            if isinstance(row, str):
                whole = 100.0 if row == "individual" else 0.0
                self.row(row).costs = _costs(whole, whole)
            elif isinstance(row, LearnSettings):
                continue  # made when it is asked, for it is never on disk
            elif self._is_missing(name, row):
                missing[name] = row
        if not missing:
            return
        outs = {name: self.place(name, row) for name, row in missing.items()}
        with measured() as taken:
            rates = self._made(missing, outs)
        for name, row in missing.items():
            self.row(row).costs = _costs(
                *rates[name],
                seconds=taken.seconds,
                peak_bytes=taken.peak_bytes,
                made_with=len(missing),
            )

    def _is_missing(self, name: str, row: Row) -> bool:
        """Whether a row's model has to be made: it was not, or is asked more than is known."""
        known, there = self.row(row), self.place(name, row).is_dir()
        answered = all(known.answers(key) is not None for key in self.keys.values())
        if not known.costs:
            return True
        return not (answered or there) if self.keep is None else not (answered and there)

    def place(self, name: str, row: Row) -> Path:
        """Where the model of a row is, or will be."""
        if self.keep is None:
            return self.row(row).model
        return self.keep / name.replace(" ", "-").replace("%", "-percent").replace("/", "-")

    def _made(
        self, rows: Mapping[str, MergeSettings | PackSettings], outs: Mapping[str, Path]
    ) -> dict[str, tuple[float, float]]:
        """Make the models of rows: one merge, or packs that share their decompositions.

        Returns:
            Row name to AMR, as the papers count it and on disk.
        """
        packs: dict[str | Path, PackSettings] = {}
        for name, row in rows.items():
            outs[name].parent.mkdir(parents=True, exist_ok=True)
            if isinstance(row, PackSettings):
                packs[outs[name]] = row.model_copy(update={"private": (*row.private, *self.own)})
                continue
            settings = row.model_copy(update={"skip": (*row.skip, *self.heads)})
            merge(
                self.base,
                self.experts,
                outs[name],
                settings=settings,
                overwrite=True,
                work=self.work,
            )
        if not packs:
            return dict.fromkeys(rows, (0.0, 0.0))
        # Packs of differences from the average need no base, so that shapes alone tell heads.
        base = None if next(iter(packs.values())).from_average else self.base
        made = pack_many(base, self.experts, packs, overwrite=True, work=self.work)
        return {name: _rates(pack) for name, pack in zip(rows, made, strict=True)}

    def answers(self, name: str, row: Row) -> dict[str, Answers]:
        """A row's answers to every task; its model is removed when all are known."""
        known = self.row(row)
        found: dict[str, Answers] = {}
        missing: list[Task] = []
        for task in self.tasks:
            answers = known.answers(self.keys[task.name])
            if answers is None:
                missing.append(task)
            else:
                found[task.name] = answers
        if missing:
            for task, model in self._models(name, row, missing):
                found[task.name] = predict(
                    model, task, task.test, work=self.work, stage=f"{name}: {task.name}"
                )
                known.keep(self.keys[task.name], found[task.name])
        shutil.rmtree(known.model, ignore_errors=True)
        return {task.name: found[task.name] for task in self.tasks}

    def _models(
        self, name: str, row: Row, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, nn.Module]]:
        """A row's model for each of some tasks, one in memory at a time."""
        device = self.work.torch_device
        if isinstance(row, LearnSettings):
            models = self._learned(name, row)
            yield from ((task, models[task.name]) for task in tasks)
            return
        if isinstance(row, PackSettings):
            pack = Pack(self.place(name, row))
            base = None if pack.reference_directory else self.base
            runtime = load(pack, base=base, device=device, dtype=torch.float32, work=self.work)
            for task in tasks:
                with runtime.activate(task.name) as model:
                    yield task, for_task(model, task)
            runtime.close()
            return
        for task in tasks:
            expert = self.experts[task.name]
            if row == "individual":
                yield task, load_task_model(expert, task).to(device)
                continue
            merged = self.base if row == "base" else self.place(name, row)
            skipped = () if isinstance(row, str) else row.skip
            with tempfile.TemporaryDirectory() as folder:
                directory = Path(folder)
                attach_head(self.base, merged, expert, directory, (*skipped, *self.heads))
                model = load_task_model(directory, task).to(device)
            yield task, model

    def _learned(self, name: str, row: LearnSettings) -> Mapping[str, nn.Module]:
        """The models of a learned method, a task each; one model is kept until it is scored."""
        known = self.row(row)
        with measured() as taken:
            learned = learn(
                self.base,
                self.experts,
                self.tasks,
                row,
                heads=self.heads,
                device=self.work.torch_device,
                kept=known.model / "merged.safetensors",
                progress=partial(self.work.progress, f"{name}: learning"),
            )
        if not known.costs:
            known.costs = _costs(
                learned.amr_paper,
                learned.amr_on_disk,
                seconds=taken.seconds,
                peak_bytes=taken.peak_bytes,
                data=row.seen(self.tasks),
            )
        return learned.models


def _costs(paper: float, on_disk: float, **taken: Any) -> dict[str, Any]:
    return {"amr_paper": paper, "amr_on_disk": on_disk, **taken}


def _rates(pack: Pack) -> tuple[float, float]:
    """AMR of a task, on average: as the papers count it, and on disk."""
    amr = [task_amr_percent(task, pack.manifest) for task in pack.manifest.tasks.values()]
    return fmean(one["amr_paper"] for one in amr), fmean(one["on_disk_native"] for one in amr)
