"""Small files that cannot be read are told before the work, all of them, by every command."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from families import listing, saved, small_base, tuned
from personae import _small_files
from personae.commands.inspect import inspect
from personae.commands.merge import merge
from personae.commands.merge_plan import plan_merge
from personae.commands.pack import pack
from personae.commands.pack_plan import plan_pack
from personae.errors import CheckpointError
from personae.recipe import MergeSettings

BASE = small_base()
LINK, KIND, DENIED = (
    "is a link to what is not there. Copy or download it again.",
    "is no regular file. Copy or download it again.",
    "cannot be read: Permission denied. Check its permissions, or copy it again.",
)


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with two bad files, an expert with two, and one that may not be read."""
    base, law = saved(BASE, tmp_path / "base"), saved(tuned(BASE, 1), tmp_path / "law", None)
    (base / "vocab.txt").symlink_to("gone.txt")
    (base / "merges.txt").mkdir()
    os.mkfifo(law / "config.json")
    (law / "tokenizer.json").write_text("{}")
    true_open = os.open

    def guarded(path: Path, *options: int) -> int:
        if Path(path).name == "tokenizer.json":  # root may read all
            raise PermissionError(13, "Permission denied", str(path))
        return true_open(path, *options)

    monkeypatch.setattr(_small_files.os, "open", guarded)
    return tmp_path


@pytest.mark.parametrize(
    "work",
    [
        lambda base, experts, _: plan_merge(base, experts, MergeSettings()),
        lambda base, experts, _: plan_pack(base, experts),
        merge,
        pack,
    ],
    ids=["plan a merge", "plan a pack", "merge", "pack"],
)
def test_all_are_told_before_the_work(family: Path, work: Callable[..., object]):
    base, law = family / "base", family / "law"
    with pytest.raises(CheckpointError, match="4 faults") as caught:
        work(base, {"law": law}, family / "out")
    assert set(caught.value.faults) == {
        f"The base: {base}/vocab.txt {LINK}",
        f"The base: {base}/merges.txt {KIND}",
        f"Expert 'law': {law}/config.json {KIND}",
        f"Expert 'law': {law}/tokenizer.json {DENIED}",
    }
    assert sorted(path.name for path in family.iterdir()) == ["base", "law"]


def test_what_no_command_copies_may_be_broken(tmp_path: Path):
    base, law = saved(BASE, tmp_path / "base"), saved(tuned(BASE, 1), tmp_path / "law")
    (law / "README.md").symlink_to("gone.md")
    (law / "trainer_state.json").symlink_to("gone.json")
    (law / "runs").mkdir()
    merge(base, {"law": law}, tmp_path / "out")
    assert "README.md" in listing(tmp_path / "out")


def test_in_a_folder_of_a_module(tmp_path: Path):
    model = saved(BASE, tmp_path / "model")
    (model / "modules.json").write_text('[{"path": "1_Pooling", "type": "x.Pooling"}]')
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling/config.json").symlink_to("gone.json")
    with pytest.raises(CheckpointError, match=f"1_Pooling/config.json {LINK}"):
        inspect(str(model))
    (model / "modules.json").unlink()
    (model / "modules.json").mkdir()
    with pytest.raises(CheckpointError, match=f"modules.json {KIND}"):
        inspect(str(model))
