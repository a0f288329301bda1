"""Images as bytes of one size, as a model's own image processor makes them, or as a suite says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from personae._images import LARGEST, check_sizes, read_image
from personae._quiet import quiet_transformers
from personae._small_files import Unfit, open_regular, read_json
from personae.errors import RecipeError
from personae.evaluate.tasks import Pixels
from personae.recipe._base import Strict

_BICUBIC = 3
"""PIL's number."""
_UNSAID = 0.5
"""Mean and deviation that make bytes numbers from -1 to 1."""

Fit = Callable[[Any], np.ndarray]
"""From an image of PIL to bytes of shape (3, height, width)."""


class ImageSettings(Strict):
    """How images become what a model takes.

    Where neither size nor fit is given, they are what the image processor in the model's files
    makes of them. Without one, images are squashed to the size in its config.json and made -1 to 1.
    """

    size: int | None = Field(default=None, gt=0, le=LARGEST)
    fit: Literal["crop", "squash", "pad"] | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None

    def over(self, model: Path) -> "Preprocessing":
        """These, and for what is not said what a model's files say.

        Raises:
            RecipeError: if neither says the size, or the image processor cannot be built.
        """
        processor = _processor(model)
        pixels = Pixels((_UNSAID,), (_UNSAID,)) if processor is None else _pixels(processor)
        mean = pixels.mean if self.mean is None else _numbers(self.mean)
        std = pixels.std if self.std is None else _numbers(self.std)
        if processor is not None and self.size is None and self.fit is None:
            return Preprocessing(_by(processor), Pixels(mean, std))
        size = self.size or _size(model)
        if size is None:
            raise RecipeError(
                f"{model} does not say how large its images are. Give a size: image: {{size: 224}}."
            )
        return Preprocessing(_to(size, self.fit or "squash"), Pixels(mean, std))


@dataclass(frozen=True)
class Preprocessing:
    """How images become what a model takes, in two steps.

    Attributes:
        fit: Makes bytes of one image.
        pixels: What becomes of the bytes.
    """

    fit: Fit
    pixels: Pixels

    def as_bytes(self, images: Sequence[Any] | np.ndarray) -> Tensor:
        """Images as bytes of shape (example, 3, height, width); grey ones three times.

        Args:
            images: Arrays (height, width) or (height, width, 3) of bytes, paths, or PIL images.

        Raises:
            RecipeError: if one is no image, or they come out in several sizes.
        """
        found: Tensor | None = None
        for n, image in enumerate(images):
            array = self.fit(_opened(image))
            if found is None:
                found = torch.empty(len(images), *array.shape, dtype=torch.uint8)
            if found.shape[1:] != array.shape:
                raise RecipeError(
                    f"Images come out of the model's image processor as {[*found.shape[1:]]} and "
                    f"as {[*array.shape]}. Give one size: image: {{size: 224}}."
                )
            found[n] = torch.tensor(array)
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8) if found is None else found


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _processor(model: Path) -> Any:
    """The image processor of a model's files, by transformers; None without one.

    Raises:
        RecipeError: if it cannot be built.
    """
    if not (model / "preprocessor_config.json").is_file():
        return None
    import transformers

    try:
        with quiet_transformers():
            processor = transformers.AutoImageProcessor.from_pretrained(
                model, trust_remote_code=False, local_files_only=True
            )
            check_sizes(processor)
            return processor
    except Exception as error:  # transformers raises many kinds; all mean the same here
        said = (str(error).strip() or repr(error)).splitlines()[0]
        raise RecipeError(
            f"The image processor of {model} cannot be built: {said} Mend its "
            "preprocessor_config.json, or remove it and give size, mean and std under image."
        ) from error


def _pixels(processor: Any) -> Pixels:
    """What an image processor makes of bytes, as (x / 255 - mean) / std."""
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (0.0,), (1.0,)
    if processor.do_normalize:
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return Pixels(tuple(one / scale for one in mean), tuple(one / scale for one in std))


def _by(processor: Any) -> Fit:
    """What an image processor does up to the bytes."""

    def fit(image: Any) -> np.ndarray:
        try:
            made = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        except Exception as error:
            said = (str(error).strip() or repr(error)).splitlines()[0]
            raise RecipeError(f"The model's image processor fails: {said}") from error
        array = np.asarray(made["pixel_values"])[0]
        return array if array.dtype == np.uint8 else array.round().clip(0, 255).astype(np.uint8)

    return fit


def _to(size: int, how: str) -> Fit:
    return lambda image: np.asarray(_fitted(image, size, how)).transpose(2, 0, 1)


def _size(model: Path) -> int | None:
    """How large config.json says a model's images are."""
    try:
        config = read_json(model / "config.json")
    except (OSError, Unfit):
        return None
    said: list[Any] = [config, config.get("vision_config")] if isinstance(config, dict) else []
    sizes = [one.get("image_size") for one in said if isinstance(one, dict)]
    return next((n for n in sizes if isinstance(n, int) and 0 < n <= LARGEST), None)


def _opened(image: Any) -> Any:
    """An image of PIL, of a file or an array.

    Raises:
        RecipeError: if it is none.
    """
    if isinstance(image, str | Path):
        try:
            with open_regular(Path(image)) as file:
                return read_image(file)
        except (OSError, Unfit) as error:
            said = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else error
            raise RecipeError(f"The image '{image}' {said}.") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (_is_flat(image.shape) and image.size):
            raise RecipeError(
                f"Images must be bytes (uint8), not {image.dtype}, of shape (height, width) or "
                f"(height, width, 3), and one is of shape {[*image.shape]}."
            )
        from PIL import Image

        image = Image.fromarray(image)
    try:
        return image.convert("RGB")
    except (OSError, AttributeError, TypeError) as error:
        raise RecipeError(f"{image!r:.80} is no image: {error}.") from error


def _is_flat(shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape is grey, or in red, green and blue (and clear)."""
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))


def _fitted(image: Any, size: int, fit: str) -> Any:
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
