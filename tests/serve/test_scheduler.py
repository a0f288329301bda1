"""Rows that wait become batches: which ones, how many, and what becomes of those that fail."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from personae.serve.refusals import Refusal
from personae.serve.scheduler import Job, Scheduler


class Recorder:
    """Notes batches; computes none before it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go, self.begun = threading.Event(), threading.Event()

    def compute(self, jobs: Sequence[Job]) -> list[str]:
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append([job.task for job in jobs])
        return [f"{job.task}!" for job in jobs]

    def job(self, task: str, key: Any = "k") -> Job:
        return Job(key=key, task=task, compute=self.compute)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def scheduler(recorder: Recorder) -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def make(max_wait: float = 0.0, **how: Any) -> Scheduler:
        made.append(Scheduler(max_wait=max_wait, **how))
        return made[-1]

    yield make
    recorder.go.set()
    for one in made:
        one.close()


def held(made: Scheduler, recorder: Recorder) -> Job:
    """A job that is computed, and keeps the thread until the recorder is let go."""
    first = recorder.job("first", key="first")
    made.submit([first])
    assert recorder.begun.wait(30)
    return first


def test_rows_of_equal_keys_are_computed_at_once(
    scheduler: Callable[..., Scheduler], recorder: Recorder
):
    made = scheduler(max_batch=3)
    held(made, recorder)
    jobs = [recorder.job(task, key) for task, key in zip("abcdefg", "kkqkqkk", strict=True)]
    made.submit(jobs[:2])
    made.submit(jobs[2:])
    assert made.waiting == 7
    recorder.go.set()
    assert [job.future.result(30) for job in jobs] == [f"{task}!" for task in "abcdefg"]
    assert recorder.batches == [["first"], ["a", "b", "d"], ["c", "e"], ["f", "g"]]


def test_the_oldest_waits_for_others(scheduler: Callable[..., Scheduler], recorder: Recorder):
    recorder.go.set()
    made = scheduler(max_batch=2, max_wait=60.0)
    jobs = [recorder.job(task) for task in "ab"]
    made.submit(jobs[:1])
    made.submit(jobs[1:])  # a full batch waits no longer
    assert [job.future.result(30) for job in jobs] == ["a!", "b!"]
    assert recorder.batches == [["a", "b"]]


def test_a_full_queue_takes_all_rows_of_a_request_or_none(
    scheduler: Callable[..., Scheduler], recorder: Recorder
):
    made = scheduler(max_queue=2)
    held(made, recorder)
    made.submit([recorder.job("a")])
    with pytest.raises(Refusal, match="1 rows wait already, of 2 that may") as caught:
        made.submit([recorder.job("b"), recorder.job("c")])
    assert caught.value.status == 503 and caught.value.headers == {"Retry-After": "1"}
    with pytest.raises(Refusal, match="has 3 rows; 2 may wait at most") as caught:
        made.submit([recorder.job("b")] * 3)
    assert caught.value.status == 413
    assert made.waiting == 1
    made.submit([recorder.job("d")])


def test_what_is_cancelled_is_not_computed(scheduler: Callable[..., Scheduler], recorder: Recorder):
    made = scheduler()
    held(made, recorder)
    jobs = [recorder.job(task) for task in "abc"]
    made.submit(jobs)
    jobs[1].cancel()
    recorder.go.set()
    assert jobs[2].future.result(30) == "c!"
    assert recorder.batches == [["first"], ["a", "c"]]


def test_tasks_that_fail_together_are_computed_apart(scheduler: Callable[..., Scheduler]):
    seen: list[str] = []

    def compute(jobs: Sequence[Job]) -> list[str]:
        tasks = "".join(job.task for job in jobs)
        seen.append(tasks)
        if "b" in tasks:
            raise ValueError("b is bad")
        return [*tasks]

    made = scheduler(max_wait=60.0, max_batch=5)
    jobs = [Job(key=0, task=task, compute=compute) for task in "abcba"]
    made.submit(jobs)
    assert [jobs[n].future.result(30) for n in (0, 2, 4)] == ["a", "c", "a"]
    for n in (1, 3):
        with pytest.raises(ValueError, match="b is bad"):
            jobs[n].future.result(30)
    assert seen == ["abcba", "aa", "bb", "c"]
    made.submit(more := [Job(key=0, task="a", compute=compute) for _ in range(5)])
    assert more[0].future.result(30) == "a" and made.alive


def test_answers_that_have_begun_are_not_begun_again(scheduler: Callable[..., Scheduler]):
    count = 0

    def compute(jobs: Sequence[Job]) -> list[str]:
        nonlocal count
        count += 1
        jobs[0].begun = True
        raise ValueError("in the middle")

    jobs = [Job(key=0, task=task, compute=compute) for task in "ab"]
    scheduler(max_wait=60.0, max_batch=2).submit(jobs)
    for job in jobs:
        with pytest.raises(ValueError, match="in the middle"):
            job.future.result(30)
    assert count == 1


def test_the_end(scheduler: Callable[..., Scheduler], recorder: Recorder):
    made = scheduler()
    first = held(made, recorder)
    waiting = recorder.job("a")
    made.submit([waiting])
    closing = threading.Thread(target=made.close)
    closing.start()
    with pytest.raises(Refusal, match="stopping"):
        waiting.future.result(30)
    assert first.cancelled  # which ends what generates
    recorder.go.set()
    closing.join(30)
    assert not made.alive and recorder.batches == [["first"]]
    with pytest.raises(Refusal, match="stopping"):
        made.submit([recorder.job("b")])
