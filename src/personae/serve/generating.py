"""Rows that are continued, of several tasks at once; each ends where its request says."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from personae.runtime.generating import padding_of
from personae.serve.predicting import check_tokens
from personae.serve.preprocessing import Tokenizer, padded
from personae.serve.refusals import Refusal
from personae.serve.scheduler import Job
from personae.serve.tasks import ServedTask

_INCOMPLETE = "\ufffd"
"""What letters are decoded to of which tokens are still to come."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; requests of equal sampling are computed at once.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: Share of probability that is drawn from.
        seed: Makes draws repeatable: such a row is computed by itself.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """For `generate` of transformers."""
        if self.temperature == 0:
            return {"do_sample": False}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"do_sample": True} | drawn


@dataclass(eq=False, kw_only=True)
class Continuation(Job):
    """A prompt, and what has been generated after it.

    Attributes:
        served: Its task.
        prompt: Its tokens.
        most: Most tokens that follow.
        stop: Texts before which it ends.
        sampling: How tokens are drawn.
        emit: Given each new piece of text, in the thread that computes.
        text: What follows the prompt, so far.
        count: Tokens of that.
        finish: Why it ended: stop or length.
    """

    served: ServedTask
    prompt: Sequence[int]
    most: int
    stop: Sequence[str]
    sampling: Sampling
    emit: Callable[[str], None] | None = None
    text: str = ""
    count: int = 0
    finish: str | None = None
    _emitted: int = field(default=0, repr=False)

    def update(self, tokens: list[int]) -> bool:
        """Take all that is generated so far; whether no more is wanted."""
        if self.finish is not None or self.cancelled:
            return True
        self.count = len(tokens)
        if tokens[-1] in _ends(self.served.model):
            tokens, self.finish = tokens[:-1], "stop"
        elif len(tokens) >= self.most:
            self.finish = "length"
        if self.finish or self.stop or self.emit:
            self._read(tokens)
        return self.finish is not None

    def _read(self, tokens: Sequence[int]) -> None:
        """Decode, look for the end, and hand out what cannot change any more."""
        assert self.served.tokenizer is not None
        prompt = () if self.served.model.config.is_encoder_decoder else self.prompt
        self.text = self.served.tokenizer.following(tokens, prompt)
        found = [at for stop in self.stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.finish = self.text[: min(found)], "stop"
        settled = len(self.text)
        if self.finish is None:
            settled -= max([_begun(self.text, stop) for stop in self.stop], default=0)
            if self.text.endswith(_INCOMPLETE):
                settled = min(settled, len(self.text.rstrip(_INCOMPLETE)))
        if self.emit and settled > self._emitted:
            self.begun = True
            self.emit(self.text[self._emitted : settled])
            self._emitted = settled


def continuation(
    served: ServedTask,
    prompt: Sequence[int],
    most: int | None,
    stop: Sequence[str],
    sampling: Sampling,
    param: str,
) -> Continuation:
    """A prompt to be continued.

    Args:
        served: Its task.
        prompt: Its tokens.
        most: Most tokens that follow; by default as many as the model takes.
        stop: Texts before which it ends.
        sampling: How tokens are drawn.
        param: The field that the prompt is from.

    Raises:
        Refusal: if prompt and continuation have more tokens than the model takes.
    """
    check_tokens(served, prompt, param)
    rest = served.tokens - len(prompt)
    if rest < (most or 1):
        wanted = "" if most is None else f", and {most} shall follow"
        raise Refusal(
            f"The prompt has {len(prompt)} tokens{wanted}; task '{served.name}' takes "
            f"{served.tokens} in all. Shorten the prompt, or ask for less.",
            param=param,
            code="context_length_exceeded",
        )
    defaults = json.dumps(served.model.generation_config.to_dict(), sort_keys=True, default=str)
    key = object() if sampling.seed is not None else (*served.key, sampling, defaults)
    return Continuation(
        key=key,
        task=served.name,
        compute=compute_continuations,
        served=served,
        prompt=prompt,
        most=rest if most is None else most,
        stop=stop,
        sampling=sampling,
    )


def prompt_tokens(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> Sequence[int]:
    """The tokens of a prompt, which may be tokens already."""
    return tokenizer.encode(prompt)["input_ids"] if isinstance(prompt, str) else prompt


def compute_continuations(rows: Sequence[Continuation]) -> Sequence[Continuation]:
    """Generate until every row has ended."""
    # As the runtime computes them: rows of a task follow each other.
    ordered = sorted(rows, key=lambda row: row.served.task)
    first = ordered[0].served
    runtime, model, sampling = first.runtime, first.model, ordered[0].sampling
    is_apart = model.config.is_encoder_decoder  # the answer does not begin with the prompt
    fill = padding_of(model)
    inputs = padded([{"input_ids": row.prompt} for row in ordered], fill, left=not is_apart)
    inputs = {name: one.to(model.device) for name, one in inputs.items()}
    start = 1 if is_apart else inputs["input_ids"].shape[1]

    def ended(generated: Tensor, *_: Any, **__: Any) -> Tensor:
        task = runtime.task  # None where several are computed at once, all of them then
        own = [row for row in ordered if task in (None, row.served.task)]
        tokens = generated[:, start:].tolist()
        done = [row.update(found) for row, found in zip(own, tokens, strict=True)]
        return torch.tensor(done, device=generated.device)

    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    runtime.generate(
        **inputs,
        tasks=[row.served.task for row in ordered],
        max_new_tokens=max(row.most for row in ordered),
        pad_token_id=fill,
        num_beams=1,
        stopping_criteria=[ended],
        **sampling.options(),
    )
    return rows


def _ends(model: Any) -> Sequence[int]:
    """Tokens that end a text."""
    told = model.generation_config.eos_token_id
    return told if isinstance(told, list) else [told]


def _begun(text: str, stop: str) -> int:
    """How much of the end of a text may be the beginning of another."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
