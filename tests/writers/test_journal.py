"""Whose work lies in an unfinished output: kept for the same run, cleared for every other."""

from pathlib import Path

import pytest

from personae.errors import CheckpointError, OutputError
from personae.writers import JOURNAL, Journal, journal, note, resume


def test_the_same_run_finds_its_note_and_files(tmp_path: Path):
    assert resume(tmp_path, "run 1") is None
    note(tmp_path, "run 1", "beside run 2")
    (tmp_path / "made").mkdir()
    (tmp_path / "made/file").write_text("kept")
    assert resume(tmp_path, "run 1") == "beside run 2\n"
    assert (tmp_path / "made/file").read_text() == "kept"


@pytest.mark.parametrize("found", ["run 2\n", "run 1 and more\n", "run 1", ""])
def test_every_other_run_begins_anew(found: str, tmp_path: Path):
    """A first line that was cut short is another's, too."""
    (tmp_path / JOURNAL).write_text(found)
    (tmp_path / "made").mkdir()
    (tmp_path / "file").write_text("another's")
    assert resume(tmp_path, "run 1") is None
    assert list(tmp_path.iterdir()) == []


def test_steps_come_back_with_what_they_told(tmp_path: Path):
    with Journal(tmp_path, "run 1") as begun:
        begun.add(3, "+.0")
        begun.add(1)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write("2 cut sho")
    with Journal(tmp_path, "run 1") as again:
        assert again.done == {1: "", 3: "+.0"}
        again.add(2, "+")
    with Journal(tmp_path, "run 1") as again:
        assert again.done == {1: "", 2: "+", 3: "+.0"}
    with Journal(tmp_path, "run 2") as other:
        assert other.done == {}


def test_what_is_no_step_in_a_damaged_note_is_passed_over(tmp_path: Path):
    with Journal(tmp_path, "run 1") as begun:
        begun.add(3, "+")
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b"\xff\xfe\n-4 x\n\n5\n")
    with Journal(tmp_path, "run 1") as again:
        assert again.done == {3: "+", 5: ""}
    (tmp_path / JOURNAL).write_bytes(b"\xff" * 99)
    with Journal(tmp_path, "run 1") as anew:
        assert anew.done == {}


def test_steps_are_lost_with_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a process wrote may not have been on disk yet when the machine stopped."""
    boot = tmp_path / "boot_id"
    boot.write_text("first\n")
    monkeypatch.setattr(journal, "_BOOT", boot)
    out = tmp_path / "out"
    out.mkdir()
    with Journal(out, "run") as begun:
        begun.add(0)
    with Journal(out, "run") as again:
        assert list(again.done) == [0]
    boot.write_text("second\n")
    with Journal(out, "run") as anew:
        assert anew.done == {}


@pytest.mark.parametrize(("error", "stays"), [(OutputError, True), (CheckpointError, False)])
def test_work_stays_unless_the_inputs_are_at_fault(error: type, stays: bool, tmp_path: Path):
    with pytest.raises(error), Journal(tmp_path, "run") as begun:
        begun.add(0)
        raise error("no")
    assert (tmp_path / JOURNAL).exists() == stays
