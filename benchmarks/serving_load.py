"""The server under load on loopback: requests of eight tasks mixed, beside those of one.

    python benchmarks/serving_load.py                                  # BERT-base's shapes
    python benchmarks/serving_load.py --width 64 --layers 2 --requests 200   # a smoke test

`--clients` threads send `--requests` requests of one text each, over connections that stay open,
to one server of a pack of `--tasks` LoRA experts of a classifier with random weights. In `one task`
all name the same task, in `mixed` each the next one. Both run in turns, `--repeats` times, after a
round that warms up; rates are medians. Every answer is compared with the one that the same text
had before the load: `lost` counts requests without their own answer. Clients and server share the
cores of this machine, and both runs pay for it.
"""

import argparse
import http.client
import json
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from personae import SVD, pack
from personae.serve.app import build
from personae.serve.tasks import Loading, Tasks
from serving import make_family
from setting import machine, show

WORDS = 1000
TOLERANCE = 1e-3
"""Of scores: rows of other batches are rounded otherwise."""


def add_tokenizer(directory: Path) -> None:
    """One token a word."""
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{n}": n + 2 for n in range(WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(directory)


def ask(connection: http.client.HTTPConnection, task: str, text: str) -> dict[str, float] | None:
    """The scores of a text; None where there was no answer."""
    body = json.dumps({"model": task, "texts": [text]})
    connection.request("POST", "/v1/predict", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    return answer["data"][0]["scores"] if response.status == 200 else None


def is_same(found: dict[str, float] | None, right: dict[str, float] | None) -> bool:
    """Whether an answer is the right one."""
    if found is None or right is None:
        return False
    return all(abs(found[label] - share) < TOLERANCE for label, share in right.items())


class Load:
    """Requests of several clients at the same time."""

    def __init__(self, port: int, texts: Sequence[str], options: argparse.Namespace) -> None:
        """Take where the server is, and what to ask."""
        self._port, self._texts, self._options = port, texts, options
        self._right: dict[tuple[str, str], dict[str, float] | None] = {}

    def learn(self, tasks: Sequence[str]) -> None:
        """Note the right answers, asked for one by one."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        for task in tasks:
            for text in self._texts:
                self._right[task, text] = ask(connection, task, text)

    def run(self, tasks: Sequence[str]) -> tuple[float, list[float], int]:
        """Requests a second, seconds of each, and how many were lost."""
        each = self._options.requests // self._options.clients

        def client(number: int) -> list[tuple[float, bool]]:
            connection = http.client.HTTPConnection("127.0.0.1", self._port)
            found: list[tuple[float, bool]] = []
            for turn in range(each):
                task = tasks[(number + turn) % len(tasks)]
                text = self._texts[(7 * number + turn) % len(self._texts)]
                began = time.perf_counter()
                answer = ask(connection, task, text)
                seconds = time.perf_counter() - began
                found.append((seconds, is_same(answer, self._right[task, text])))
            return found

        began = time.perf_counter()
        with ThreadPoolExecutor(self._options.clients) as clients:
            answers = [
                one for own in clients.map(client, range(self._options.clients)) for one in own
            ]
        rate = len(answers) / (time.perf_counter() - began)
        lost = self._options.clients * each - sum(right for _, right in answers)
        return rate, [seconds for seconds, _ in answers], lost


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Load the server with one task, and with all."""
    base, adapters = make_family(folder, options)
    add_tokenizer(base)
    packed = pack(base, adapters, folder / "pack", SVD(rank_fraction=options.rank / options.width))
    tasks = Tasks(Loading(cache="4GB"))
    tasks.load(packed.directory)
    listener = socket.create_server(("127.0.0.1", 0))
    app = build(tasks, max_batch=options.max_batch, max_wait=options.max_wait_ms / 1000)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    texts = [" ".join(f"w{(31 * n + k) % WORDS}" for k in range(options.tokens)) for n in range(16)]
    load = Load(listener.getsockname()[1], texts, options)
    names = [task.name for task in tasks]
    load.learn(names)
    ways = {"one task": names[:1], "mixed": names}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    lost = dict.fromkeys(ways, 0)
    for turn in range(options.repeats + 1):
        for way, asked in ways.items():
            rate, took, without = load.run(asked)
            lost[way] += without
            if turn:  # the first round only warms up
                rates[way].append(rate)
                seconds[way] += took
    server.should_exit = True
    thread.join()
    alone = statistics.median(rates["one task"])
    return [
        {
            "way": way,
            "tasks": len(asked),
            "requests_a_second": statistics.median(rates[way]),
            "of_one_task": statistics.median(rates[way]) / alone,
            "p50_ms": 1000 * statistics.median(seconds[way]),
            "p99_ms": 1000 * statistics.quantiles(seconds[way], n=100)[98],
            "lost": lost[way],
        }
        for way, asked in ways.items()
    ]


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=320, help="of each run")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-wait-ms", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return
    show(f"{options.clients} clients, {options.requests} requests a run", rows)


if __name__ == "__main__":
    main()
