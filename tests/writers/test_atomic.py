"""Outputs that are there completely or not at all."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from personae.errors import OutputError
from personae.writers import (
    atomic_file,
    output_directory,
    output_errors,
    require_folder,
    require_space,
)


def entries(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_file_appears_at_the_end_only(tmp_path: Path):
    target = tmp_path / "new" / "pack.json"
    with atomic_file(target) as partial:
        partial.write_text("x")
        assert partial.parent == target.parent
        assert not target.exists()
    assert entries(tmp_path) == ["new", "new/pack.json"]
    assert target.read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_file_that_failed_leaves_the_old_one(tmp_path: Path, error: type[BaseException]):
    target = tmp_path / "pack.json"
    target.write_text("old")
    with pytest.raises(error), atomic_file(target) as partial:
        partial.write_text("new")
        raise error
    assert entries(tmp_path) == ["pack.json"]
    assert target.read_text() == "old"


def test_directory_appears_at_the_end_only(tmp_path: Path):
    target = tmp_path / "a" / "b"
    with output_directory(target, overwrite=False) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("x")
        assert partial == tmp_path / "a" / ".b.partial"
        assert not target.exists()
    assert entries(tmp_path) == ["a", "a/b", "a/b/sub", "a/b/sub/x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_directory_that_failed_leaves_nothing(
    tmp_path: Path, error: type[BaseException], overwrite: bool
):
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(error), output_directory(target, overwrite=overwrite) as partial:
        (partial / "x").touch()
        raise error
    assert entries(tmp_path) == (["out", "out/old"] if overwrite else [])


def test_full_directory_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with (
        pytest.raises(OutputError, match=r"out' exists and is not empty.*overwrite"),
        output_directory(tmp_path / "out", overwrite=False),
    ):
        pytest.fail("the work began")
    assert entries(tmp_path) == ["out", "out/old"]


def test_full_directory_is_replaced_when_asked(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with output_directory(tmp_path / "out", overwrite=True) as partial:
        (partial / "new").touch()
        assert (tmp_path / "out" / "old").exists()
    assert entries(tmp_path) == ["out", "out/new"]


def test_empty_directory_and_remains_of_a_killed_run_are_fine(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial" / "sub").mkdir(parents=True)
    (tmp_path / ".out.partial" / "sub" / "stale").touch()
    with output_directory(tmp_path / "out", overwrite=False) as partial:
        assert entries(partial) == []
        (partial / "x").touch()
    assert entries(tmp_path) == ["out", "out/x"]


def test_a_resumed_run_finds_what_was_finished(tmp_path: Path):
    with (
        pytest.raises(KeyboardInterrupt),
        output_directory(tmp_path / "out", overwrite=False, note=".note") as partial,
    ):
        (partial / "tasks").mkdir()
        (partial / "tasks" / "finished").touch()
        (partial / "tasks" / ".begun.123.partial").touch()  # as a kill leaves it
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()
    with output_directory(tmp_path / "out", overwrite=False, note=".note") as partial:
        assert entries(partial) == ["tasks", "tasks/finished"]
    assert entries(tmp_path) == ["out", "out/tasks", "out/tasks/finished"]


def test_a_refused_resumable_run_leaves_no_trace(tmp_path: Path):
    (tmp_path / "out").touch()
    with (
        pytest.raises(OutputError, match="it is a file"),
        output_directory(tmp_path / "out", overwrite=True, note=".note"),
    ):
        pytest.fail("the work began")
    assert entries(tmp_path) == ["out"]


def test_a_swap_killed_half_way_is_undone(tmp_path: Path):
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "old").touch()
    with (
        pytest.raises(OutputError, match="exists and is not empty"),
        output_directory(tmp_path / "out", overwrite=False),
    ):
        pytest.fail("the work began")
    assert entries(tmp_path) == ["out", "out/old"]


def test_two_runs_at_once_are_refused(tmp_path: Path):
    with output_directory(tmp_path / "out", overwrite=False) as partial:
        (partial / "x").touch()
        with (
            pytest.raises(OutputError, match="Another run is writing"),
            output_directory(tmp_path / "out", overwrite=True),
        ):
            pytest.fail("the work began")
    assert entries(tmp_path) == ["out", "out/x"]


def test_works_where_locks_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with output_directory(tmp_path / "out", overwrite=False):
        pass
    assert entries(tmp_path) == ["out"]


def test_a_file_in_the_way(tmp_path: Path):
    (tmp_path / "out").touch()
    for target, text in [("out", "it is a file"), ("out/deeper", "choose another name")]:
        with (
            pytest.raises(OutputError, match=text),
            output_directory(tmp_path / target, overwrite=True),
        ):
            pytest.fail("the work began")
    assert entries(tmp_path) == ["out"]


def test_a_mount_point_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    with (
        pytest.raises(OutputError, match=r"is a mount point\. Name a folder inside it"),
        output_directory(tmp_path / "out", overwrite=True),
    ):
        pytest.fail("the work began")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_the_system_refuses_says_what_to_do(tmp_path: Path, code: int):
    text = rf"Cannot write '{tmp_path}': {os.strerror(code)}\. \w+"
    with pytest.raises(OutputError, match=text), output_errors(tmp_path):
        raise OSError(code, os.strerror(code))


def test_a_full_disk_inside_the_block_is_named_but_a_refused_read_is_not(tmp_path: Path):
    with (
        pytest.raises(OutputError, match="No space left"),
        output_directory(tmp_path / "out", overwrite=False),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), output_directory(tmp_path / "out", overwrite=False):
        raise PermissionError(errno.EACCES, "an input")
    assert entries(tmp_path) == []


def test_require_space(tmp_path: Path):
    require_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(OutputError, match=r"needs 1,000,000,000,000,000,000 bytes .* free\. Free"):
        require_space(tmp_path / "x", 10**18)


def test_a_folder_above_that_is_a_file_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=rf"{tmp_path}/file\)\. A file of that name exists"),
        output_directory(tmp_path / "file" / "out", overwrite=False),
    ):
        pytest.fail("the work began")
    with pytest.raises(OutputError, match=rf"{tmp_path}/file is a file"):
        require_folder(tmp_path / "file" / "deeper" / "x")
    with pytest.raises(OutputError, match="it is a folder"):
        require_folder(tmp_path)
    require_folder(tmp_path / "not" / "yet" / "there")


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match=f"{tmp_path} refuses. Write to a folder you may"):
        require_folder(tmp_path / "x")
