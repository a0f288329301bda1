"""One thread that owns the models: rows that wait become batches.

The oldest row waits a few milliseconds for others that can be computed with it, then all of them
are. While a batch is computed the next one gathers, so that under load nothing waits on purpose.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from personae.serve.refusals import Refusal


@dataclass(eq=False, kw_only=True)
class Job:
    """One row of a request.

    Attributes:
        key: Rows of equal keys can be computed at once.
        task: Its task; where rows of several tasks fail at once, each task's are computed again.
        compute: Computes rows of one key, and gives an answer for each.
        future: Its answer.
        cancelled: Whether nobody waits for the answer any more.
        begun: Whether a part of the answer was given already.
    """

    key: Hashable
    task: str
    compute: Callable[[Sequence[Any]], Sequence[Any]]
    future: Future[Any] = field(default_factory=Future[Any])
    cancelled: bool = False
    begun: bool = False
    since: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        """Say that nobody waits for the answer."""
        self.cancelled = True
        self.future.cancel()


class Scheduler:
    """Computes jobs of equal keys in batches, in its own thread."""

    def __init__(
        self,
        *,
        max_batch: int = 32,
        max_wait: float = 0.005,
        max_queue: int = 256,
        observe: Callable[[Sequence[Job]], None] = lambda _: None,
    ) -> None:
        """Begin to wait for jobs.

        Args:
            max_batch: Most rows computed at once.
            max_wait: Seconds that a row waits for others.
            max_queue: Most rows that wait.
            observe: Told each batch before it is computed.
        """
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait, max_queue
        self._observe = observe
        self._waiting: list[Job] = []
        self._computed: Sequence[Job] = ()
        self._arrived = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="personae-scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether jobs are computed."""
        return self._thread.is_alive() and not self._closed

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait: all of them, or none.

        Raises:
            Refusal: if more would wait than may, or the server is stopping.
        """
        with self._arrived:
            if self._closed:
                raise Refusal("The server is stopping.", 503, "stopping")
            self.check_count(len(jobs))
            if len(self._waiting) + len(jobs) > self._max_queue:
                raise Refusal(
                    f"{len(self._waiting)} rows wait already, of {self._max_queue} that may. "
                    "Send the request again later.",
                    503,
                    "queue_full",
                )
            self._waiting += jobs
            self._arrived.notify()

    def check_count(self, rows: int) -> None:
        """Refuse a request before its rows are looked at.

        Raises:
            Refusal: if it has more than may ever wait.
        """
        if rows > self._max_queue:
            raise Refusal(
                f"The request has {rows} rows; {self._max_queue} may wait at most. Send them in "
                "several requests.",
                413,
                "too_many_rows",
            )

    def close(self) -> None:
        """Refuse what waits, give up what is computed, and end."""
        with self._arrived:
            self._closed = True
            for job in self._computed:
                job.cancelled = True
            for job in self._waiting:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(Refusal("The server is stopping.", 503, "stopping"))
            self._waiting.clear()
            self._arrived.notify()
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            if batch:
                self._observe(batch)
                self._compute(batch)
            self._computed = batch = ()  # keeps no model of a pack that was unloaded

    def _next(self) -> Sequence[Job] | None:
        """The next batch, once it is due; None at the end."""
        with self._arrived:
            while not self._closed:
                self._waiting = [job for job in self._waiting if not job.cancelled]
                if not self._waiting:
                    self._arrived.wait()
                    continue
                oldest = self._waiting[0]
                batch = [job for job in self._waiting if job.key == oldest.key][: self._max_batch]
                rest = oldest.since + self._max_wait - time.monotonic()
                if len(batch) < self._max_batch and rest > 0:
                    self._arrived.wait(rest)
                    continue
                taken = {id(job) for job in batch}
                self._waiting = [job for job in self._waiting if id(job) not in taken]
                self._computed = [job for job in batch if job.future.set_running_or_notify_cancel()]
                return self._computed
        return None

    def _compute(self, jobs: Sequence[Job]) -> None:
        """Compute some; where several tasks fail at once, each task's are computed alone."""
        try:
            answers = jobs[0].compute(jobs)
        except Exception as error:  # whatever it is, it is these requests' alone
            tasks = dict.fromkeys(job.task for job in jobs)
            if len(tasks) == 1 or any(job.begun for job in jobs):
                for job in jobs:
                    job.future.set_exception(error)
                return
            for task in tasks:
                self._compute([job for job in jobs if job.task == task])
        else:
            for job, answer in zip(jobs, answers, strict=True):
                job.future.set_result(answer)
