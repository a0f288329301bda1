"""Runs killed at every rename and removal: nothing is lost, and the same command ends the work."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from families import listing, saved, small_base, tuned
from personae.commands.merge import merge
from personae.commands.pack import add_tasks, pack, pack_many, remove_task
from personae.errors import OutputError, PackError
from personae.recipe import MergeSettings, PackSettings
from personae.writers import atomic

BASE = small_base()
_KILLED = 9


@pytest.fixture
def family(tmp_path: Path) -> Path:
    saved(BASE, tmp_path / "base")
    for seed, name in enumerate("xyz", 1):
        saved(tuned(BASE, seed), tmp_path / name)
    return tmp_path


def _killed(run: Callable[[], Any], point: int) -> bool:
    """Run in a process that dies before its n-th rename or removal; False if it ended."""
    child = os.fork()
    if child == 0:
        left = [point]

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*given: Any, **options: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    os._exit(_KILLED)
                return call(*given, **options)

            return counting

        for owner, name in (
            (Path, "rename"),
            (Path, "replace"),
            (Path, "unlink"),
            (shutil, "rmtree"),
            (atomic, "_exchange"),
        ):
            setattr(owner, name, counted(getattr(owner, name)))
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, _KILLED)
    return code == _KILLED


def _until_it_ends(run: Callable[[], Any], reset: Callable[[], None], check: Callable[[], None]):
    """Kill the run at every point in turn, each time from the start, and end it by repeating it."""
    point = 1
    while True:
        reset()
        if not _killed(run, point):
            break
        run()
        check()
        point += 1
    assert point > 2  # there were points to die at
    check()


def test_merges(family):
    def run() -> None:
        merge(family / "base", {n: family / n for n in "xy"}, family / "out")

    run()
    whole = listing(family / "out")
    _until_it_ends(
        run,
        lambda: shutil.rmtree(family / "out"),
        lambda: _same(family, "out", whole),
    )


@pytest.mark.parametrize("exchange", [True, False])
def test_merges_that_overwrite_have_the_old_or_the_new(family, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    base, experts = family / "base", {n: family / n for n in "xy"}
    old, out = family / "old", family / "out"
    merge(base, experts, old)
    merge(base, experts, family / "new", settings=MergeSettings(method="ties"))
    kept, whole = listing(old), listing(family / "new")

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)

    point = 1
    while True:
        reset()
        killed = _killed(lambda: _ties(base, experts, out), point)
        if killed and exchange:  # no moment without a complete model under the name
            there = {k: v for k, v in listing(out).items() if k != ".journal"}
            assert there in (kept, whole)
        if not killed:
            break
        _ties(base, experts, out)
        _same(family, "out", whole)
        point += 1
    assert point > 2


def _ties(base: Path, experts: Any, out: Path) -> None:
    merge(base, experts, out, settings=MergeSettings(method="ties"), overwrite=True)


def test_sweeps(family):
    outs = {
        family / "many" / n: PackSettings(parameters={"rank_fraction": r})
        for n, r in (("a", 0.5), ("b", 0.2))
    }

    def run() -> None:
        pack_many(family / "base", {n: family / n for n in "xy"}, outs)

    run()
    whole = listing(family / "many")
    _until_it_ends(
        run, lambda: shutil.rmtree(family / "many"), lambda: _same(family, "many", whole)
    )


def test_adding_and_removing(family):
    pack(family / "base", {"x": family / "x"}, family / "one")
    pack(family / "base", {n: family / n for n in "xy"}, family / "two")
    one, two = listing(family / "one"), listing(family / "two")

    def start(name: str) -> None:
        shutil.rmtree(family / "p", ignore_errors=True)
        shutil.copytree(family / name, family / "p")

    def add() -> None:
        add_tasks(family / "p", {"y": family / "y"})

    def remove() -> None:
        with contextlib.suppress(PackError):  # all was removed before the kill
            remove_task(family / "p", "y")

    _until_it_ends(add, lambda: start("one"), lambda: _same(family, "p", two))
    _until_it_ends(
        remove,
        lambda: start("two"),
        lambda: _same(family, "p", one),
    )


def _same(family: Path, name: str, whole: dict[str, Any]) -> None:
    assert listing(family / name) == whole
    assert not [p for p in family.rglob(".*") if p.name.endswith((".partial", ".replaced"))]


def test_another_command_does_not_touch_what_a_killed_one_finished(family):
    base, out = family / "base", family / "out"
    merge(base, {n: family / n for n in "xy"}, out)
    (out / ".journal").write_text("another run\n")
    before = listing(out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        merge(base, {n: family / n for n in "xz"}, out)
    assert listing(out) == before


def test_files_that_a_task_cannot_leave_keep_its_record(family, monkeypatch):
    pack(family / "base", {n: family / n for n in "xy"}, family / "p")
    before = listing(family / "p")
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p).name != "tasks" and access(p, mode))
    with pytest.raises(OutputError, match="tasks refuses"):
        remove_task(family / "p", "y")
    assert listing(family / "p") == before


def test_an_input_replaced_with_size_and_time_kept_is_not_mixed_in(family):
    base, out = family / "base", family / "out"
    experts = {n: family / n for n in "xy"}
    with pytest.raises(KeyboardInterrupt):
        merge(base, experts, out, work=_stopping())
    place = family / "x" / "model.safetensors"
    times = place.stat()
    other = family / "z" / "model.safetensors"
    place.write_bytes(other.read_bytes())
    os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    merge(base, experts, out)
    merge(base, experts, family / "whole")
    assert (out / "model.safetensors").read_bytes() == (
        family / "whole" / "model.safetensors"
    ).read_bytes()


def _stopping() -> Any:
    from personae.run.work import Work

    def progress(_stage: str, done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    return Work(workers=1, progress=progress)
