"""Generated texts in the shape of OpenAI's answers, whole and as streams."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from personae.serve.generating import Continuation


@dataclass(frozen=True)
class Shape:
    """How one answer is written.

    Attributes:
        model: The task that was asked.
        chat: Whether it is a message.
        identity: Its own name.
        created: Seconds since 1970.
    """

    model: str
    chat: bool
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, rows: Sequence[Continuation]) -> dict[str, Any]:
        """All rows, once they have ended."""
        choices: list[dict[str, Any]] = []
        for place, row in enumerate(rows):
            message = {"message": {"role": "assistant", "content": row.text}}
            content = message if self.chat else {"text": row.text}
            choices.append(_choice(place, content, row.finish))
        kind = "chat.completion" if self.chat else "text_completion"
        return self._about(kind) | {"choices": choices, "usage": usage(rows)}

    def first(self, place: int) -> dict[str, Any] | None:
        """What a stream of a row begins with, if with anything."""
        if not self.chat:
            return None
        return self._chunk(place, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, place: int, text: str) -> dict[str, Any]:
        """A piece of a row."""
        return self._chunk(place, {"delta": {"content": text}} if self.chat else {"text": text})

    def last(self, place: int, row: Continuation) -> dict[str, Any]:
        """What a stream of a row ends with."""
        return self._chunk(place, {"delta": {}} if self.chat else {"text": ""}, row.finish)

    def total(self, rows: Sequence[Continuation]) -> dict[str, Any]:
        """What a stream ends with where the number of tokens was asked for."""
        return self._about(self._streamed) | {"choices": [], "usage": usage(rows)}

    @property
    def _streamed(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, place: int, content: Any, finish: str | None = None) -> dict[str, Any]:
        return self._about(self._streamed) | {"choices": [_choice(place, content, finish)]}

    def _about(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.identity}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


def usage(rows: Sequence[Continuation]) -> dict[str, int]:
    """Numbers of tokens."""
    asked, generated = sum(len(row.prompt) for row in rows), sum(row.count for row in rows)
    return {
        "prompt_tokens": asked,
        "completion_tokens": generated,
        "total_tokens": asked + generated,
    }


def _choice(place: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": place, **content, "logprobs": None, "finish_reason": finish}
