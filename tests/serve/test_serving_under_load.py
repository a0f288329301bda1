"""What goes on at the same time: many clients, tasks that come and go, packs that vanish."""

import gc
import http.client
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from running import Client, bert_pack, gpt2_pack, running

from personae.serve.limits import Limits
from personae.serve.scheduler import Scheduler


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two packs, of classifiers and of causal models."""
    root = tmp_path_factory.mktemp("packs")
    (root / "packs").mkdir()
    shutil.move(bert_pack(root / "bert"), root / "packs" / "bert")
    shutil.move(gpt2_pack(root / "gpt2"), root / "packs" / "gpt2")
    return root / "packs"


@pytest.fixture(scope="module")
def client(packs: Path) -> Iterator[Client]:
    """A server of one pack that may load the other."""
    with running(packs / "bert", folder=packs) as found:
        yield found


def predicted(client: Client, task: str, text: str) -> Any:
    return client.ok("/v1/predict", {"model": task, "texts": [text]})["data"][0]


def completed(client: Client, task: str, prompt: str) -> Any:
    body = {"model": task, "prompt": prompt, "temperature": 0, "max_tokens": 4}
    return client.ok("/v1/completions", body)["choices"][0]["text"]


def close_to(found: Any, right: Any) -> bool:
    if isinstance(right, dict):
        return all(close_to(found[key], value) for key, value in right.items())
    if isinstance(right, list):
        return all(map(close_to, found, right))
    return found == (pytest.approx(right, abs=1e-5) if isinstance(right, float) else right)


@pytest.mark.parametrize(("mode", "each"), [("factored", 20), ("merged", 5)])
def test_no_request_is_lost_and_each_gets_its_own_answer(packs: Path, mode: str, each: int):
    """Of eight clients that ask five tasks of two models at the same time."""
    asks: list[tuple[Callable[[Client, str, str], Any], str]] = [
        *((predicted, task) for task in ("three", "two", "value")),
        *((completed, task) for task in "ab"),
    ]
    texts = [f"w{n} w{n + 1} w{n + 2}"[: 4 + 3 * (n % 3)].strip() for n in range(10, 16)]
    with running(packs / "bert", packs / "gpt2", mode=mode) as client:
        right = {(t, text): ask(client, t, text) for ask, t in asks for text in texts}

        def one(worker: int) -> list[bool]:
            found: list[bool] = []
            for turn in range(each):
                ask, task = asks[(worker + turn) % len(asks)]
                text = texts[(3 * worker + turn) % len(texts)]
                found.append(close_to(ask(client, task, text), right[task, text]))
            return found

        with ThreadPoolExecutor(8) as workers:
            assert [all(found) for found in workers.map(one, range(8))] == [True] * 8
        metrics = client.ok("/metrics")
    rows = [line for line in metrics.splitlines() if line.startswith("personae_rows_total")]
    assert sum(float(line.split()[-1]) for line in rows) == 8 * each + len(right)
    assert 'personae_requests_total{endpoint="/v1/predict",status="200"}' in metrics


def test_tasks_of_one_batch(packs: Path, monkeypatch: pytest.MonkeyPatch):
    """Requests that arrive together are computed together, whatever their tasks."""
    batches: list[set[str]] = []
    inner = Scheduler._compute

    def noted(self: Scheduler, jobs: Any) -> None:
        batches.append({job.task for job in jobs})
        inner(self, jobs)

    monkeypatch.setattr(Scheduler, "_compute", noted)
    with running(packs / "bert", max_batch=2, max_wait=60.0) as client:
        with ThreadPoolExecutor(2) as workers:
            answers = workers.map(lambda task: predicted(client, task, "w3"), ("two", "three"))
            assert [len(answer["scores"]) for answer in answers] == [2, 3]
    assert batches == [{"two", "three"}]


def test_tasks_and_packs_come_and_go(packs: Path):
    with running(packs / "bert", folder=packs) as client:
        before = predicted(client, "two", "w3 w4")
        stop, wrong = threading.Event(), list[Any]()

        def asking() -> None:
            while not stop.is_set():
                answer = predicted(client, "two", "w3 w4")
                if not close_to(answer, before):
                    wrong.append(answer)

        thread = threading.Thread(target=asking)
        thread.start()
        loaded = client.ok("/v1/tasks", {"pack": "gpt2", "name": "text"})
        assert [task["id"] for task in loaded["data"]] == [
            *("three", "two", "value"),
            *("text/a", "text/b"),
        ]
        assert completed(client, "text/a", "w7")
        assert client.ok("/v1/models/text/a")["root"] == "text"
        gone = client.ok("/v1/tasks/text/a", method="DELETE")
        assert gone == {"id": "text/a", "object": "task", "deleted": True}
        assert "no task 'text/a'" in client.refused(404, "/v1/models/text/a")
        again = client.ok("/v1/tasks", {"pack": "gpt2", "name": "text", "tasks": ["a"]})
        assert again["data"][-1]["id"] == "text/a"
        for task in "ab":
            client.ok(f"/v1/tasks/text/{task}", method="DELETE")
        stop.set()
        thread.join()
        assert wrong == []
        assert [task["id"] for task in client.ok("/v1/tasks")["data"]] == ["three", "two", "value"]


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (400, {"pack": "nothing"}, "pack.json"),
        (403, {"pack": "../bert"}, "not in the folder of packs"),
        (403, {"pack": "."}, "not in the folder of packs"),
        (400, {"pack": "\0"}, "is no file name"),
        (400, {"pack": "a" * 5000}, "File name too long"),
        (403, {"pack": "/etc"}, "not in the folder of packs"),
        (400, {"pack": "gpt2", "tasks": ["a", "c"]}, "no task 'c'"),
        (400, {"pack": "bert", "tasks": ["two"]}, "'two' is served already, of pack 'bert'"),
        (400, {"pack": "gpt2", "name": "bert"}, "called 'bert' is served already"),
        (400, {"pack": 3}, "pack: Input should be a valid string"),
    ],
)
def test_what_cannot_be_loaded(client: Client, status: int, body: Any, text: str):
    assert text in client.refused(status, "/v1/tasks", body)
    assert predicted(client, "two", "w3")


def test_a_pack_without_tasks_leaves_the_memory(packs: Path):
    with running(packs / "bert", packs / "gpt2", folder=packs) as client:
        assert completed(client, "a", "w7")
        runtime = weakref.ref(client.tasks["a"].runtime)
        for task in "ab":
            assert runtime() is not None
            client.ok(f"/v1/tasks/{task}", method="DELETE")
        assert predicted(client, "two", "w3")
        gc.collect()  # the last request may have ended after the task was unloaded
        assert runtime() is None


def test_without_a_folder_requests_change_nothing(packs: Path):
    with running(packs / "bert") as client:
        assert "--packs FOLDER" in client.refused(403, "/v1/tasks", {"pack": "gpt2"})
        assert "--packs FOLDER" in client.refused(403, "/v1/tasks/two", method="DELETE")
        assert predicted(client, "two", "w3")


@pytest.mark.parametrize("mode", ["factored", "merged"])
def test_a_pack_that_is_deleted_goes_on(packs: Path, tmp_path: Path, mode: str):
    shutil.copytree(packs / "bert", tmp_path / "bert")
    with running(packs / "bert", mode=mode) as client:
        right = [predicted(client, task, "w3 w4") for task in ("two", "three")]
    with running(tmp_path / "bert", mode=mode) as client:
        shutil.rmtree(tmp_path / "bert")
        assert [predicted(client, task, "w3 w4") for task in ("two", "three")] == right


def test_a_task_that_fails_is_an_error_of_its_requests_alone(
    packs: Path, monkeypatch: pytest.MonkeyPatch
):
    with running(packs / "bert", max_batch=2, max_wait=60.0) as client:
        runtime = client.tasks["two"].runtime
        paths = runtime._catalogue.paths

        def damaged(task: str) -> Any:
            if task == "two":
                raise OSError("the disk is gone")
            return paths(task)

        monkeypatch.setattr(runtime._catalogue, "paths", damaged)
        body = {"texts": ["w3 w4"]}
        with ThreadPoolExecutor(2) as workers:
            bad, good = workers.map(
                lambda task: client.send("/v1/predict", body | {"model": task}), ("two", "three")
            )
        assert bad.status == 500 and "the disk is gone" in bad.body["error"]["message"]
        assert bad.body["error"]["type"] == "server_error"
        assert good.status == 200 and client.ok("/health")["status"] == "ok"


def test_bodies_that_are_no_requests(packs: Path):
    with running(packs / "bert", limits=Limits(body_bytes=500)) as client:
        send = client.refused
        assert "not JSON" in send(400, "/v1/predict", b'{"model": "two"')
        assert "model: Field required" in send(400, "/v1/predict", {"texts": ["a"]})
        assert "the body: " in send(400, "/v1/predict", b"[]")
        assert "no task 'tow'. Did you mean 'two'?" in send(
            404, "/v1/predict", {"model": "tow", "texts": ["a"]}
        )
        assert "Not Found" in send(404, "/v1/nothing")
        assert "Method Not Allowed" in send(405, "/v1/predict")
        assert "larger than 500 bytes" in send(413, "/v1/predict", b" " * 501)
        assert "Use /v1/predict" in send(400, "/v1/completions", {"model": "two", "prompt": "a"})
        chat = {"model": "two", "messages": [{"role": "user", "content": "a"}]}
        assert "Use /v1/predict" in send(400, "/v1/chat/completions", chat)
        chunked = http.client.HTTPConnection("127.0.0.1", client.port)
        pieces = iter([b" " * 300] * 3)
        headers = {"Content-Type": "application/json"}
        chunked.request("POST", "/v1/predict", pieces, headers, encode_chunked=True)
        assert chunked.getresponse().status == 413
        chunked.close()
        assert predicted(client, "two", "w3")


class Held:
    """Keeps the thread that computes until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        inner = Scheduler._compute

        def slow(this: Scheduler, jobs: Any) -> None:
            self.begun.set()
            assert self.go.wait(30)
            inner(this, jobs)

        monkeypatch.setattr(Scheduler, "_compute", slow)


def test_a_full_queue(packs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(packs / "bert", limits=Limits(queue=1), max_wait=0.0) as client:
        held = Held(monkeypatch)
        with ThreadPoolExecutor(2) as workers:
            first = workers.submit(predicted, client, "two", "w3")
            assert held.begun.wait(30)
            second = workers.submit(predicted, client, "two", "w4")
            while client.ok("/health")["waiting"] < 1:
                pass
            refused = client.send("/v1/predict", {"model": "two", "texts": ["w5"]})
            assert refused.status == 503 and refused.headers["Retry-After"] == "1"
            text = client.refused(413, "/v1/predict", {"model": "two", "texts": ["w5", "w6"]})
            assert "has 2 rows; 1 may wait" in text
            held.go.set()
            assert first.result(30) and second.result(30)


def test_what_takes_too_long(packs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(packs / "gpt2", limits=Limits(seconds=0.2), max_wait=0.0) as client:
        held = Held(monkeypatch)
        body = {"model": "a", "prompt": "w3", "temperature": 0, "max_tokens": 2}
        assert "no answer within 0.2 s" in client.refused(504, "/v1/completions", body)
        streamed = client.send("/v1/completions", body | {"stream": True})
        assert streamed.status == 200
        error = json.loads(streamed.body.strip().removeprefix("data: "))["error"]
        assert error["code"] == "timeout"
        held.go.set()


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave(packs: Path, monkeypatch: pytest.MonkeyPatch, stream: bool):
    """What they asked for is computed no more."""
    computed: list[int] = []
    with running(packs / "gpt2", max_wait=0.0) as client:
        held = Held(monkeypatch)
        watched = Scheduler._compute

        def noted(this: Scheduler, jobs: Any) -> None:
            computed.append(len(jobs))
            watched(this, jobs)

        monkeypatch.setattr(Scheduler, "_compute", noted)
        body = {"model": "a", "prompt": "w3", "temperature": 0, "max_tokens": 2}
        with ThreadPoolExecutor(1) as workers:
            first = workers.submit(client.ok, "/v1/completions", body)
            assert held.begun.wait(30)
            leaving = http.client.HTTPConnection("127.0.0.1", client.port)
            headers = {"Content-Type": "application/json"}
            text = json.dumps(body | {"stream": stream})
            leaving.request("POST", "/v1/completions", text, headers)
            while client.ok("/health")["waiting"] < 1:
                pass
            leaving.close()
            jobs = client.app.state.server.scheduler._waiting
            while not all(job.cancelled for job in jobs):
                pass
            held.go.set()
            assert first.result(30)
        assert client.ok("/v1/completions", body) and computed == [1, 1]
