"""Completions and chats: what `generate` of the unpacked checkpoint gives, whole and streamed."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from running import LONGEST, WORDS, Client, gpt2_pack, running, t5_pack
from transformers import GPT2LMHeadModel, T5ForConditionalGeneration

from personae import unpack

PROMPTS = ["w3 w4 w9", "w7", "w11 w12"]


class Unpacked:
    """Each task's own checkpoint, as transformers loads it."""

    def __init__(self, root: Path) -> None:
        packed = gpt2_pack(root)
        self.pack = packed
        self.models: dict[str, Any] = {
            task: GPT2LMHeadModel.from_pretrained(unpack(packed, task, root / "out" / task))
            for task in "ab"
        }

    def words(self, task: str, prompt: str, most: int) -> list[str]:
        """What it continues a prompt with, greedily, up to [END]."""
        tokens = torch.tensor([[WORDS.index(word) for word in prompt.split()]])
        made = self.models[task].generate(
            tokens, max_new_tokens=most, do_sample=False, pad_token_id=2
        )
        return [WORDS[n] for n in made[0, tokens.shape[1] :].tolist()]

    def text(self, task: str, prompt: str, most: int) -> str:
        """The text of it: special tokens are none."""
        special = WORDS[:3]
        return "".join(f" {w}" for w in self.words(task, prompt, most) if w not in special)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    return Unpacked(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module", params=["factored", "merged"])
def client(request: pytest.FixtureRequest, unpacked: Unpacked) -> Iterator[Client]:
    with running(unpacked.pack, mode=request.param) as found:
        yield found


def greedy(task: str, prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": task, "prompt": prompt, "temperature": 0, "max_tokens": 5} | more


def events(client: Client, path: str, body: dict[str, Any]) -> list[Any]:
    answer = client.send(path, body | {"stream": True})
    assert answer.status == 200 and "text/event-stream" in answer.headers["Content-Type"]
    *found, last = [e.removeprefix("data: ") for e in answer.body.split("\n\n") if e]
    assert last == "[DONE]"
    return [json.loads(text) for text in found]


@pytest.mark.parametrize("task", ["a", "b"])
def test_completions_are_what_generate_gives(client: Client, unpacked: Unpacked, task: str):
    got = client.ok("/v1/completions", greedy(task, PROMPTS))
    assert got["object"] == "text_completion" and got["model"] == task
    for place, (prompt, choice) in enumerate(zip(PROMPTS, got["choices"], strict=True)):
        assert choice["index"] == place
        assert choice["text"] == unpacked.text(task, prompt, 5)
        ended = "[END]" in unpacked.words(task, prompt, 5)
        assert choice["finish_reason"] == ("stop" if ended else "length")
    count = sum(len(unpacked.words(task, prompt, 5)) for prompt in PROMPTS)
    assert got["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": count,
        "total_tokens": 6 + count,
    }


def test_tasks_differ(unpacked: Unpacked):
    assert unpacked.text("a", PROMPTS[0], 5) != unpacked.text("b", PROMPTS[0], 5)


def test_prompts_may_be_tokens(client: Client, unpacked: Unpacked):
    tokens = [WORDS.index(word) for word in PROMPTS[0].split()]
    for prompt in (tokens, [tokens]):
        got = client.ok("/v1/completions", greedy("a", prompt))
        assert [c["text"] for c in got["choices"]] == [unpacked.text("a", PROMPTS[0], 5)]


def test_a_stream_is_the_same_text_in_pieces(client: Client, unpacked: Unpacked):
    found = events(
        client, "/v1/completions", greedy("a", PROMPTS, stream_options={"include_usage": True})
    )
    whole = client.ok("/v1/completions", greedy("a", PROMPTS))
    choices = [event["choices"][0] for event in found[:-1]]
    for place, choice in enumerate(whole["choices"]):
        own = [one for one in choices if one["index"] == place]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == [
            choice["finish_reason"]
        ]
        assert len(own) > 2
    assert found[-1]["choices"] == [] and found[-1]["usage"] == whole["usage"]


def test_chats_go_through_the_template(client: Client, unpacked: Unpacked):
    messages = [
        {"role": "user", "content": "w7 w8"},
        {"role": "assistant", "content": "w9"},
        {"role": "user", "content": [{"type": "text", "text": "w10"}]},
    ]
    body = {"model": "b", "messages": messages, "temperature": 0, "max_completion_tokens": 3}
    got = client.ok("/v1/chat/completions", body)
    expected = unpacked.text("b", "w3 w7 w8 w4 w9 w3 w10 w5", 3)
    assert got["object"] == "chat.completion"
    assert got["choices"][0]["message"] == {"role": "assistant", "content": expected}
    found = events(client, "/v1/chat/completions", body)
    assert {event["object"] for event in found} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in found]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == expected


def test_a_chat_ends_where_the_model_does(client: Client, unpacked: Unpacked):
    """Without a bound of its own."""
    messages = [{"role": "user", "content": "w7"}]
    got = client.ok("/v1/chat/completions", {"model": "a", "messages": messages, "temperature": 0})
    assert got["choices"][0]["message"]["content"] == unpacked.text("a", "w3 w7 w5", LONGEST - 3)


def test_a_text_ends_before_a_stop(client: Client, unpacked: Unpacked):
    whole = unpacked.text("a", PROMPTS[0], 5)
    stop = whole.split()[2]
    body = greedy("a", PROMPTS[0], stop=["nowhere", f" {stop}"])
    expected = whole[: whole.index(f" {stop}")]
    choice = client.ok("/v1/completions", body)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    pieces = events(client, "/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in pieces) == expected


def test_a_seed_repeats_what_is_drawn(client: Client):
    body = {"model": "a", "prompt": "w3", "seed": 5, "max_tokens": 8}
    texts = {client.ok("/v1/completions", body)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
    others = {
        client.ok("/v1/completions", body | {"seed": seed})["choices"][0]["text"]
        for seed in range(4)
    }
    assert len(others) > 1


def test_a_top_p_of_next_to_nothing_is_greedy(client: Client, unpacked: Unpacked):
    body = greedy("a", PROMPTS[0], temperature=1, top_p=1e-6)
    got = client.ok("/v1/completions", body)
    assert got["choices"][0]["text"] == unpacked.text("a", PROMPTS[0], 5)


def test_models_are_the_tasks(client: Client):
    listed = client.ok("/v1/models")["data"]
    assert [model["id"] for model in listed] == ["a", "b"]
    assert client.ok("/v1/models/b") == listed[1]
    assert listed[1]["max_model_len"] == LONGEST
    assert "Known: a, b" in client.refused(404, "/v1/models/zz")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": " ".join(["w3"] * 13)}, "has 13 tokens, and 5 shall follow.*takes 12 in all"),
        ({"max_tokens": 10}, "3 tokens, and 10 shall follow"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [1, 40]}, "Token 40 is none of the 40 tokens"),
        ({"prompt": [-1]}, "Token -1 is none"),
        ({"n": 2}, "n: Input should be 1"),
        ({"best_of": 2}, "best_of: Extra inputs are not permitted"),
        ({"temperature": 3}, "temperature: .*less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens: .*greater than or equal to 1"),
    ],
)
def test_what_is_refused(client: Client, change: dict[str, Any], text: str):
    body = greedy("a", PROMPTS[0]) | change
    assert re.search(text, client.refused(400, "/v1/completions", body))
    assert re.search(text, client.refused(400, "/v1/completions", body | {"stream": True}))


def test_other_kinds_of_requests(client: Client):
    assert "Use /v1/completions" in client.refused(
        400, "/v1/predict", {"model": "a", "texts": ["w3"]}
    )
    assert "Known: a, b" in client.refused(404, "/v1/completions", greedy("zz", "w3"))


def test_encoder_decoders_answer_prompts(tmp_path: Path):
    """T5's rows are computed one task after another, which shows in the first batch alone."""
    packed = t5_pack(tmp_path)
    prompts = {"a": ["w3 w4 w9", "w7"], "b": ["w11 w12"]}
    with running(packed, max_batch=3, max_wait=60.0) as client:
        with ThreadPoolExecutor(2) as workers:
            got = workers.map(
                lambda task: client.ok("/v1/completions", greedy(task, prompts[task])), prompts
            )
            texts = {answer["model"]: [c["text"] for c in answer["choices"]] for answer in got}
    for task, asked in prompts.items():
        unpacked = unpack(packed, task, tmp_path / "out" / task)
        model: Any = T5ForConditionalGeneration.from_pretrained(unpacked)
        for prompt, text in zip(asked, texts[task], strict=True):
            tokens = torch.tensor([[WORDS.index(word) for word in prompt.split()]])
            made = model.generate(tokens, max_new_tokens=5, do_sample=False)[0].tolist()
            assert text == " ".join(WORDS[n] for n in made if n > 2)
