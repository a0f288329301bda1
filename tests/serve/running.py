"""A server on a free port in a thread of the test, packs for it, and a client."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from personae import DTS, pack
from personae.serve.app import build
from personae.serve.limits import Limits
from personae.serve.tasks import Loading, Tasks
from toys import perturb, toy_bert, toy_gpt2, toy_t5

WORDS = ["[PAD]", "[UNK]", "[END]", *(f"w{n}" for n in range(3, 40))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] == 'user' and 'w3' or 'w4' }} {{ m['content'] }} "
    "{% endfor %}w5"
)
LONGEST = 12


def tokenizer(directory: Path, template: str | None = None) -> None:
    """One token a word, as the toys have them: 40 in all, and room for 12."""
    words = {word: place for place, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[END]",
        model_max_length=LONGEST,
    )
    fast.chat_template = template
    fast.save_pretrained(directory)


def gpt2_pack(root: Path, tasks: str = "ab", scale: float = 0.3) -> Path:
    """A pack of causal models that end texts with [END]."""
    base = toy_gpt2(root / "base")
    for name in ("config.json", "generation_config.json"):
        file = base / name
        content = json.loads(file.read_text()) | {"eos_token_id": 2, "bos_token_id": 2}
        file.write_text(json.dumps(content))
    tokenizer(base, TEMPLATE)
    experts = {t: perturb(base, root / t, seed, scale) for seed, t in enumerate(tasks, 1)}
    return pack(base, experts, root / "pack", DTS(rank_fraction=1.0)).directory


def t5_pack(root: Path, scale: float = 0.3) -> Path:
    """A pack of encoder-decoders, which begin answers with [PAD]."""
    base = toy_t5(root / "base")
    for name in ("config.json", "generation_config.json"):
        file = base / name
        ends = {"eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
        file.write_text(json.dumps(json.loads(file.read_text()) | ends))
    tokenizer(base)
    experts = {t: perturb(base, root / t, seed, scale) for seed, t in enumerate("ab", 1)}
    return pack(base, experts, root / "pack", DTS(rank_fraction=1.0)).directory


def bert_pack(root: Path, scale: float = 0.3) -> Path:
    """A pack of classifiers: of three classes, of two, and of one value."""
    base = toy_bert(root / "base")
    tokenizer(base)
    experts: dict[str, Path] = {}
    for seed, (task, labels) in enumerate({"three": 3, "two": 2, "value": 1}.items(), 1):
        made = toy_bert(root / f"made-{task}", seed, num_labels=labels)
        experts[task] = perturb(made if labels != 3 else base, root / task, seed, scale)
        tokenizer(experts[task])
    return pack(base, experts, root / "pack", DTS(rank_fraction=1.0)).directory


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: Any
    headers: Any


class Client(NamedTuple):
    """Sends requests to a server."""

    port: int
    tasks: Tasks
    app: Any

    def send(self, path: str, body: Any = None, method: str | None = None) -> Answer:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data,
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, text, headers = response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            status, text, headers = error.code, error.read(), error.headers
        is_json = headers.get("Content-Type", "").startswith("application/json")
        return Answer(status, json.loads(text) if is_json else text.decode(), headers)

    def ok(self, path: str, body: Any = None, method: str | None = None) -> Any:
        answer = self.send(path, body, method)
        assert answer.status == 200, answer.body
        return answer.body

    def refused(self, status: int, path: str, body: Any = None, method: str | None = None) -> str:
        answer = self.send(path, body, method)
        assert answer.status == status, answer.body
        return answer.body["error"]["message"]


@contextmanager
def running(
    *packs: Path,
    mode: str = "factored",
    folder: Path | None = None,
    limits: Limits | None = None,
    **how: Any,
) -> Generator[Client]:
    """A server of these packs."""
    limits = limits or Limits()
    tasks = Tasks(Loading(mode=mode), folder=folder, tokens=limits.tokens)
    for path in packs:
        tasks.load(path)
    app = build(tasks, limits, **how)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Client(listener.getsockname()[1], tasks, app)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
