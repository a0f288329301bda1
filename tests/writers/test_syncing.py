"""Files reach the disk while they are written; what the disk says then is not lost."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from personae._types import TensorSpec
from personae.errors import OutputError
from personae.writers import CheckpointWriter, syncing
from personae.writers.syncing import Syncing


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The files that were synced, in order; of 100 bytes the disk is told."""
    found: list[int] = []
    monkeypatch.setattr(syncing, "_AT_ONCE", 100)
    monkeypatch.setattr(os, "fsync", found.append)
    return found


def test_all_files_are_synced_at_the_end(tmp_path: Path, synced: list[int]) -> None:
    with (tmp_path / "a").open("wb") as a, (tmp_path / "b").open("wb") as b:
        begun = Syncing([a, b])
        begun.wrote(99)
        assert synced == []
        begun.finish()
        assert synced == [a.fileno(), b.fileno()]


def test_files_are_synced_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = threading.Event()
    monkeypatch.setattr(syncing, "_AT_ONCE", 100)
    monkeypatch.setattr(os, "fsync", lambda _: early.set())
    with (tmp_path / "a").open("wb") as file:
        begun = Syncing([file])
        begun.wrote(60)
        begun.wrote(60)
        assert early.wait(10), "nothing was synced before the end"
        begun.finish()


def test_an_error_between_is_told_at_the_next_write_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells a file's error once: a later sync of the same file succeeds."""
    errors, refused = [OSError(errno.ENOSPC, "No space left on device")], threading.Event()

    def sync(_: int) -> None:
        if errors:
            refused.set()
            raise errors.pop()

    monkeypatch.setattr(syncing, "_AT_ONCE", 100)
    monkeypatch.setattr(os, "fsync", sync)
    with (tmp_path / "a").open("wb") as file:
        begun = Syncing([file])
        begun.wrote(100)
        assert refused.wait(10)
        begun.stop()
        for told in (lambda: begun.wrote(1), begun.finish):
            with pytest.raises(OutputError, match=r"Cannot write '.*a': No space left.* Free some"):
                told()


def test_a_writer_that_fails_leaves_no_thread(
    tmp_path: Path, synced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TensorSpec("w", (100, 2), torch.float32)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, [spec]) as writer:
        writer.write("w", torch.ones(100, 2))
        raise KeyboardInterrupt
    assert all(thread.name != "personae-sync" for thread in threading.enumerate())
