"""Images as bytes of one size: what a model's own image processor does, up to the bytes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from personae._small_files import Unfit, read_json
from personae.errors import RecipeError
from personae.evaluate.tasks import Pixels
from personae.recipe._base import Strict

_BICUBIC = 3
"""PIL's number, which preprocessor_config.json uses too."""


class ImageSettings(Strict):
    """How images become what a model takes.

    What is not said is what the model's `preprocessor_config.json` says; without one, images are
    squashed to the size in its config.json and made -1 to 1.
    """

    size: int | None = Field(default=None, gt=0)
    fit: Literal["crop", "squash", "pad"] | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None

    def over(self, model: Path) -> "ImageSettings":
        """These, with what is not said taken from a model's files.

        Raises:
            RecipeError: if neither says the size.
        """
        told: dict[str, Any] = {**_processor(model), **self.model_dump(exclude_none=True)}
        told = {"fit": "squash", "mean": 0.5, "std": 0.5, **told}
        if "size" not in told:
            raise RecipeError(
                f"{model} does not say how large its images are. Give a size: image: {{size: 224}}."
            )
        return ImageSettings(**told)

    @property
    def pixels(self) -> Pixels:
        """What becomes of the bytes."""
        return Pixels(_numbers(self.mean), _numbers(self.std))


def _numbers(value: float | tuple[float, ...] | None) -> tuple[float, ...]:
    assert value is not None
    return value if isinstance(value, tuple) else (value,)


def _processor(model: Path) -> dict[str, Any]:
    """What a model's files say of its images."""
    told: dict[str, Any] = {}
    config = _content(model / "config.json")
    size = config.get("image_size") or (config.get("vision_config") or {}).get("image_size")
    if isinstance(size, int):
        told["size"] = size
    said = _content(model / "preprocessor_config.json")
    if not said:
        return told
    size, crop = said.get("size"), said.get("crop_size")
    cropped = said.get("do_center_crop", crop is not None)
    for given in (crop, size) if cropped else (size, crop):
        found = _side(given)
        if found:
            told["size"] = found
            break
    told["fit"] = "crop" if cropped else "squash"
    for key in ("mean", "std"):
        if said.get(f"image_{key}") is not None:
            told[key] = tuple(said[f"image_{key}"])
    return told


def _side(given: Any) -> int | None:
    if isinstance(given, int):
        return given
    if isinstance(given, dict):
        return given.get("height") or given.get("shortest_edge")
    return None


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = read_json(path) if path.is_file() else {}
    except (OSError, Unfit, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def as_bytes(images: Sequence[Any] | np.ndarray, settings: ImageSettings) -> Tensor:
    """Images as bytes of shape (example, 3, size, size); grey ones three times.

    Args:
        images: Arrays (height, width) or (height, width, 3) of bytes, paths, or PIL images.
        settings: Complete, as `ImageSettings.over` gives them.

    Raises:
        RecipeError: if one is no image, or larger than what it is padded to.
    """
    assert settings.size is not None
    found = np.empty((len(images), 3, settings.size, settings.size), np.uint8)
    for n, image in enumerate(images):
        array = np.asarray(_fitted(_opened(image), settings.size, settings.fit))
        found[n] = array.transpose(2, 0, 1)
    return torch.from_numpy(found)


def _opened(image: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(image, str | Path):
            with Image.open(image) as opened:
                return opened.convert("RGB")
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8:
                raise RecipeError(f"Images must be bytes (uint8), not {image.dtype}.")
            return Image.fromarray(image).convert("RGB")
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, AttributeError, TypeError) as error:
        raise RecipeError(f"{image!r:.80} is no image: {error}.") from error


def _fitted(image: Any, size: int, fit: str | None) -> Any:
    """An image of PIL made square: cropped in its middle, squashed, or padded with black.

    Raises:
        RecipeError: if it is too large to be padded.
    """
    from PIL import Image

    width, height = image.size
    if fit == "pad":
        if max(width, height) > size:
            raise RecipeError(
                f"An image of {width}x{height} cannot be padded to {size}x{size}. Write another "
                "size, or fit: crop."
            )
        whole = Image.new("RGB", (size, size))
        whole.paste(image, ((size - width) // 2, (size - height) // 2))
        return whole
    if fit == "squash":
        return image.resize((size, size), _BICUBIC)
    shorter = min(width, height)  # its longer side is cut off, as transformers rounds it
    image = image.resize((int(size * width / shorter), int(size * height / shorter)), _BICUBIC)
    left, top = (image.size[0] - size) // 2, (image.size[1] - size) // 2
    return image.crop((left, top, left + size, top + size))
