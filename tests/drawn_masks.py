"""Masks drawn by NumPy, whose generator the compiled loops take up: what DARE has to keep."""

import hashlib
from typing import Any

import numpy as np
import pytest


def keep_mask(
    kept: int, start: int, count: int, *, seed: int, name: str, expert: int
) -> np.ndarray:
    """Keep entries `start` to `start + count` whose 16-bit number is below `kept`."""
    return drawn_numbers(start, count, seed=seed, name=name, expert=expert) < kept


def drawn_numbers(start: int, count: int, *, seed: int, name: str, expert: int) -> np.ndarray:
    """The 16-bit numbers of entries `start` to `start + count`."""
    digest = hashlib.sha256(f"{seed}/{expert}/{name}".encode()).digest()
    words = np.random.PCG64(int.from_bytes(digest, "little")).random_raw((start + count + 3) // 4)
    return words.astype("<u8").view("<u2")[start : start + count]


def give_masks(monkeypatch: pytest.MonkeyPatch, masks: list[list[int]]) -> None:
    """Let every tensor have these masks, one an expert, in place of drawn ones."""

    class Given:
        def __init__(self, *, expert: int, **_: Any) -> None:
            self.mask = np.array(masks[expert], np.float32)

        def at(self, start: int, count: int) -> tuple[np.ndarray, int]:
            return self.mask[start : start + count], 0

    def drop(row: np.ndarray, mask: np.ndarray, _: int, __: int, factor: float) -> None:
        row *= mask * factor

    monkeypatch.setattr("personae.methods._dropping.Draws", Given)
    monkeypatch.setattr("personae.kernels.drop", drop)
