"""The bodies of requests. Fields that would be without effect are refused by name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from personae._small_files import check_bounds
from personae.serve.generating import Sampling


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _is_bounded(cls, content: Any) -> Any:
        """Check texts and depth: tokenizers and answers take no halves of characters."""
        check_bounds(content)
        return content


class PredictRequest(_Request):
    """Of /v1/predict: texts (or pairs of texts), or images (base64, or nested lists of pixels)."""

    model: str
    texts: list[str | tuple[str, str]] | None = Field(None, min_length=1)
    images: list[str | list[Any]] | None = Field(None, min_length=1)
    truncate: bool = False
    pooling: Literal["mean", "first", "pooler"] | None = None


class LoadRequest(_Request):
    """Of POST /v1/tasks: a pack in the folder of packs, and which of its tasks."""

    pack: str = Field(min_length=1)
    name: str | None = Field(None, min_length=1)
    tasks: list[str] | None = Field(None, min_length=1)


class StreamOptions(_Request):
    """What a stream tells beside the text."""

    include_usage: bool = False


class _Generation(_Request):
    """What both kinds of generation take, as OpenAI names it."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: str | list[str] | None = Field(None, max_length=16)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    user: str | None = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_p, self.seed)

    @property
    def stops(self) -> list[str]:
        """Texts before which to end."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Generation):
    """Of /v1/completions: one prompt or several, as texts or as tokens."""

    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    max_tokens: int | None = Field(16, ge=1)
    echo: Literal[False] = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class TextPart(_Request):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """What one side said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatRequest(_Generation):
    """Of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
