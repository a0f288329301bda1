"""Images of anybody, decoded within bounds."""

from collections.abc import Sequence
from io import BufferedReader, BytesIO
from typing import Any

from personae._small_files import Unfit

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is decoded; PIL knows more, of which some run other programs."""
LARGEST = 4096
"""The longest side that images are made."""
_SIDES = ("height", "width")
_MOST_PIXELS = 2**26
"""More than any camera has; 200 MB as bytes."""
_MOST_TIMES = 100
"""Models take squares: of a longer strip, made as high as they take it, nothing would be left."""


def read_image(source: BufferedReader | BytesIO, formats: Sequence[str] = FORMATS) -> Any:
    """An image of PIL, in red, green and blue.

    Args:
        source: An encoded image.
        formats: What it may be, as PIL calls it.

    Raises:
        Unfit: if it is none, or too large.
    """
    from PIL import Image

    try:
        with Image.open(source, formats=[*formats]) as opened:
            width, height = opened.size
            if not 0 < width * height <= _MOST_PIXELS:
                raise Unfit(f"has {width} x {height} pixels, and {_MOST_PIXELS:,} are read at most")
            if max(width, height) > _MOST_TIMES * min(width, height):
                raise Unfit(f"is a strip of {width} x {height} pixels, and no picture")
            return opened.convert("RGB")
    except Unfit:
        raise
    except Exception as error:  # PIL raises many kinds; all mean the same here
        said = (str(error).strip() or repr(error)).splitlines()[0]
        raise Unfit(f"is no image that can be read: {said}") from error


def check_sizes(processor: Any) -> None:
    """Refuse an image processor of transformers that makes images larger than any model takes.

    Raises:
        Unfit: naming the size.
    """
    for name in ("size", "crop_size", "pad_size"):
        said: Any = processor.to_dict().get(name)
        sides = [said.get(side) for side in _SIDES] if isinstance(said, dict) else [said]
        if any(isinstance(side, int | float) and not 0 < side <= LARGEST for side in sides):
            raise Unfit(f"its {name} is {said}, and images are made {LARGEST} at most")
