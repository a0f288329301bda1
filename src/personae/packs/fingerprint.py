"""Fingerprints of weights: the same values under the same names give the same text.

Independent of sharding and of the order of tensors in a file. XXH3 (128 bits) rather than a
cryptographic hash: it guards against the wrong base, not against an adversary, and runs faster
than memory, so that checking a base costs no more than reading it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from personae._small_files import open_regular


class Digest:
    """Digest of one tensor's dtype, shape and bytes, which come a block of rows after the other."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Begin with what a header says."""
        self._state = xxhash.xxh3_128(f"{dtype} {tuple(shape)}".encode())

    def update(self, rows: Tensor) -> None:
        """Take the next rows, or all of them."""
        flat = rows.detach().contiguous().flatten()
        if flat.numel():
            self._state.update(flat.view(torch.uint8).numpy().data)

    def text(self) -> str:
        """Of all that was taken."""
        return self._state.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """The digest of a tensor that is there."""
    digest = Digest(tensor.dtype, tensor.shape)
    digest.update(tensor)
    return digest.text()


def combine(digests: Mapping[str, str]) -> str:
    """Fingerprint of a model from the digests of its tensors by name."""
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return "xxh3:" + xxhash.xxh3_128_hexdigest(lines.encode())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text.

    Raises:
        Unfit: if it is no regular file.
        OSError: if the system refuses.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
