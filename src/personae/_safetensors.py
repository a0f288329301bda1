"""Opens safetensors files under any name; the library's own opening takes UTF-8 paths alone."""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from personae._small_files import Unfit, open_regular


def open_safetensors(path: Path) -> Any:
    """A lazy handle of a file, as `safetensors.safe_open` gives it.

    Raises:
        SafetensorError: if it is no such file.
        OSError: if the system refuses.
    """
    with _named(path) as name:
        return safe_open(name, framework="pt")


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        SafetensorError: if it is no such file.
        OSError: if the system refuses.
    """
    with _named(path) as name:
        return safetensors.torch.load_file(name)


@contextmanager
def _named(path: Path) -> Generator[str]:
    """A name in UTF-8 under which a file can be opened: its own, or that of a handle of it.

    Raises:
        OSError: if it is no regular file, or the system refuses.
    """
    try:
        file = open_regular(path)
    except Unfit as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        file.close()
        yield str(path)
