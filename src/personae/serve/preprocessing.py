"""What requests give, as a model takes it: tokens of texts, pixels of images.

Tokenizers and image processors are built by `transformers` from the small files of a checkpoint
alone: no code of a model's author runs, and nothing is downloaded.
"""

import base64
import importlib
import io
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae._images import check_sizes, read_image
from personae._quiet import quiet_transformers
from personae.errors import CheckpointError
from personae.serve.refusals import Refusal

_READ = (".json", ".jinja", ".txt", ".model")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_decoding = threading.Lock()
"""Images are decoded one at a time: a large one takes hundreds of megabytes."""
_CONTEXT = 4
"""Tokens of a prompt that are decoded with what follows: letters may lie across the border."""


class Tokenizer:
    """A tokenizer that several threads may use."""

    def __init__(self, files: Mapping[str, Path | bytes], whose: str) -> None:
        """Build it.

        Args:
            files: The small files of a checkpoint.
            whose: What an error names.

        Raises:
            CheckpointError: if there is none among them.
        """
        missing = (
            f"{whose} has no tokenizer. Put the tokenizer's files (tokenizer.json, "
            "tokenizer_config.json, …) beside the reference."
        )
        try:
            self._inner = _built("AutoTokenizer", files)
        except Exception as error:  # transformers raises many kinds; all mean the same here
            raise CheckpointError(f"{missing} transformers says: {_first_line(error)}") from error
        if not self._inner.get_vocab().keys() - self._inner.all_special_tokens:
            raise CheckpointError(missing)  # where files are missing one without words is built
        self.longest = self._inner.model_max_length
        self._lock = threading.Lock()

    def encode(
        self, text: str, pair: str | None = None, most: int | None = None
    ) -> dict[str, list[int]]:
        """What a model takes for a text, or for two, by name; cut off after `most` tokens."""
        with self._lock:
            return dict(self._inner(text, pair, truncation=most is not None, max_length=most))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation that the model is to continue.

        Raises:
            Refusal: if there is no template for conversations, or it refuses these messages.
        """
        if not self._inner.chat_template:
            raise Refusal(
                "The tokenizer has no chat template. Use /v1/completions, or pack a tokenizer with "
                "a chat_template.",
                param="messages",
            )
        try:
            with self._lock:
                text = self._inner.apply_chat_template(
                    [*messages], tokenize=False, add_generation_prompt=True
                )
                return self._inner(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # templates are programs of their own
            raise Refusal(
                f"The chat template refuses these messages: {_first_line(error)}", param="messages"
            ) from error

    def following(self, tokens: Sequence[int], prompt: Sequence[int]) -> str:
        """The text of tokens that follow others."""
        before = [*prompt[-_CONTEXT:]]
        start, whole = self._decode(before), self._decode([*before, *tokens])
        return whole[len(start) :] if whole.startswith(start) else self._decode(tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        with self._lock:
            return self._inner.decode(
                [*tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )


class ImageProcessor:
    """Pixels of images, as one model takes them."""

    def __init__(self, files: Mapping[str, Path | bytes], config: Any) -> None:
        """Build the image processor, if there is one among the files.

        Args:
            files: The small files of a checkpoint.
            config: The model's configuration.

        Raises:
            CheckpointError: if it is damaged, or of a kind that transformers does not know.
        """
        self._inner: Any = None
        size = getattr(config, "image_size", None)
        self._shape = (
            getattr(config, "num_channels", 3),
            *(size if isinstance(size, list | tuple) else (size, size)),
        )
        if "preprocessor_config.json" in files:
            try:
                self._inner = _built("AutoImageProcessor", files)
                check_sizes(self._inner)
            except Exception as error:
                raise CheckpointError(
                    f"The image processor cannot be built: {_first_line(error)}"
                ) from error

    def pixels(self, image: str | list[Any]) -> Tensor:
        """Pixels as the model takes them: of an encoded image, or given as they are.

        Raises:
            Refusal: if it is no image.
        """
        found = self._decoded(image) if isinstance(image, str) else _as_tensor(image)
        wanted = [n if n is not None else "any" for n in self._shape]
        fits = found.ndim == 3 and all(
            n in (None, own) for n, own in zip(self._shape, found.shape, strict=True)
        )
        if not fits:
            raise Refusal(
                f"An image has shape {[*found.shape]}; the model takes {wanted} (channels, height, "
                "width).",
                param="images",
            )
        if not found.isfinite().all():
            raise Refusal("An image has numbers that are not finite.", param="images")
        return found

    def _decoded(self, text: str) -> Tensor:
        if self._inner is None:
            raise Refusal(
                "The model has no preprocessor_config.json: give pixels as nested lists (channels, "
                "height, width), normalised as the model takes them.",
                param="images",
            )
        try:
            data = base64.b64decode(text.partition("base64,")[2] or text, validate=True)
            with _decoding:
                image = read_image(io.BytesIO(data), IMAGE_FORMATS)
                return self._inner(image, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:  # of base64, too
            raise Refusal(
                f"An image cannot be read: {_first_line(error)}. Give the base64 of a file of "
                f"{', '.join(IMAGE_FORMATS)}.",
                param="images",
            ) from error


def padded(
    rows: Sequence[Mapping[str, Sequence[int]]], fill: int, *, left: bool = False
) -> dict[str, Tensor]:
    """Rows of tokens as tensors, with a mask.

    Args:
        rows: Of each row what the model takes, by name.
        fill: Token that short rows are filled up with.
        left: Whether they are filled up at their beginning.
    """
    width = max(len(row["input_ids"]) for row in rows)

    def filled(values: Sequence[int], value: int) -> list[int]:
        more = [value] * (width - len(values))
        return [*more, *values] if left else [*values, *more]

    whole = [{"attention_mask": [1] * len(row["input_ids"])} | {**row} for row in rows]
    return {
        name: torch.tensor([filled(row[name], fill if name == "input_ids" else 0) for row in whole])
        for name in whole[0]
    }


def _built(auto_class: str, files: Mapping[str, Path | bytes]) -> Any:
    """Let transformers build something of small files, in a folder that has nothing else."""
    transformers = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory(prefix="personae-") as folder, quiet_transformers():
        for name, content in files.items():
            if name.endswith(_READ) and "/" not in name:
                data = content if isinstance(content, bytes) else content.read_bytes()
                (Path(folder) / name).write_bytes(data)
        loader = getattr(transformers, auto_class)
        return loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _as_tensor(values: list[Any]) -> Tensor:
    try:
        return torch.tensor(values, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise Refusal(
            "An image is neither base64 nor nested lists of numbers (channels, height, width).",
            param="images",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
