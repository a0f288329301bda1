"""Interrupted, killed and refused runs: nothing half-made under the final name, nothing redone."""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from families import listing, small_base, tuned
from personae.commands.pack import pack, pack_many
from personae.commands.unpack import unpack
from personae.errors import OutputError
from personae.methods.codecs.dts import DTS
from personae.recipe import PackSettings
from personae.run.work import Work
from toys import load

BASE = small_base()
EXPERTS = {name: tuned(BASE, seed) for seed, name in enumerate("xyz", 1)}
# embed, layer.weight, layer.bias, conv and scale: DTS encodes each once an expert
TENSORS = 5


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the deltas encoded so far."""
    shapes: list[tuple[int, ...]] = []
    encode = DTS.encode

    def counting(self: DTS, delta: torch.Tensor, *given: Any) -> Mapping[str, torch.Tensor]:
        shapes.append(tuple(delta.shape))
        return encode(self, delta, *given)

    monkeypatch.setattr(DTS, "encode", counting)
    return shapes


def _stop_at(stage: str) -> Callable[[str, int, int], None]:
    """Progress that is interrupted at the first report of a stage."""

    def progress(now: str, _done: int, _total: int) -> None:
        if now == stage:
            raise KeyboardInterrupt

    return progress


def _interrupted(out: Path, stage: str, settings: PackSettings | None = None) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(BASE, EXPERTS, out, settings=settings, work=Work(progress=_stop_at(stage)))


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, encoded):
    pack(BASE, EXPERTS, tmp_path / "whole")
    encoded.clear()
    _interrupted(tmp_path / "p", "packing y")
    assert not (tmp_path / "p").exists()
    assert (tmp_path / ".p.partial/tasks/x.safetensors").is_file()
    encoded.clear()
    pack(BASE, EXPERTS, tmp_path / "p")
    assert len(encoded) == 2 * TENSORS  # y and z, not x
    assert listing(tmp_path / "p") == listing(tmp_path / "whole")
    assert not (tmp_path / ".p.partial").exists()


def test_what_was_interrupted_while_reading_left_nothing(tmp_path):
    _interrupted(tmp_path / "p", "reading the family")
    assert list(tmp_path.iterdir()) == []


def test_other_settings_start_anew(tmp_path, encoded):
    half = PackSettings(parameters={"rank_fraction": 0.5})
    _interrupted(tmp_path / "p", "packing y")
    encoded.clear()
    pack(BASE, EXPERTS, tmp_path / "p", settings=half)
    assert len(encoded) == 3 * TENSORS
    pack(BASE, EXPERTS, tmp_path / "whole", settings=half)
    assert listing(tmp_path / "p") == listing(tmp_path / "whole")


def test_another_expert_of_the_same_name_starts_anew(tmp_path):
    _interrupted(tmp_path / "p", "packing y")
    others = EXPERTS | {"x": tuned(BASE, 9)}
    pack(BASE, others, tmp_path / "p")
    pack(BASE, others, tmp_path / "whole")
    assert listing(tmp_path / "p") == listing(tmp_path / "whole")


def test_the_order_of_the_experts_is_that_of_the_last_run(tmp_path):
    _interrupted(tmp_path / "p", "packing y")
    turned = dict(reversed(EXPERTS.items()))
    made = pack(BASE, turned, tmp_path / "p")
    assert list(made.manifest.tasks) == ["z", "y", "x"]


@pytest.mark.parametrize("stage", ["merging (average)", "packing x", "packing z"])
def test_a_difference_pack_goes_on_too(tmp_path, stage):
    settings = PackSettings(vector="difference")
    pack(BASE, EXPERTS, tmp_path / "whole", settings=settings)
    _interrupted(tmp_path / "p", stage, settings)
    assert not (tmp_path / "p").exists()
    pack(BASE, EXPERTS, tmp_path / "p", settings=settings)
    assert listing(tmp_path / "p") == listing(tmp_path / "whole")


def test_a_sweep_killed_between_its_packs_goes_on_with_the_same_bytes(tmp_path, monkeypatch):
    asked = {n: PackSettings(parameters={"rank_fraction": r}) for n, r in (("a", 0.5), ("b", 0.2))}
    pack_many(BASE, EXPERTS, {tmp_path / "whole" / n: s for n, s in asked.items()})
    from personae.packs.writer import PackWriter

    add = PackWriter.add_task

    def killed(self: PackWriter, name: str, *rest: Any, **about: Any) -> None:
        if name == "y" and self.directory.name == ".b.partial":
            raise KeyboardInterrupt
        add(self, name, *rest, **about)

    monkeypatch.setattr(PackWriter, "add_task", killed)
    outs = {tmp_path / "many" / n: s for n, s in asked.items()}
    with pytest.raises(KeyboardInterrupt):
        pack_many(BASE, EXPERTS, outs)
    monkeypatch.setattr(PackWriter, "add_task", add)
    pack_many(BASE, EXPERTS, outs)
    assert listing(tmp_path / "many") == listing(tmp_path / "whole")


def test_an_interrupted_unpack_leaves_nothing(tmp_path):
    pack(BASE, EXPERTS, tmp_path / "p")
    before = listing(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work = Work(progress=_stop_at("unpacking x"))
        unpack(tmp_path / "p", "x", tmp_path / "out", base=BASE, work=work)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("rebuild", [False, True])
def test_an_existing_output_is_refused(tmp_path, rebuild):
    made = pack(BASE, EXPERTS, tmp_path / "p")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    for out, message in (("out", "exists and is not empty"), ("file", "is a file")):
        with pytest.raises(OutputError, match=message):
            if rebuild:
                unpack(made.directory, "x", tmp_path / out, base=BASE)
            else:
                pack(BASE, EXPERTS, tmp_path / out)
    assert listing(tmp_path) == before


def test_an_empty_directory_is_no_obstacle(tmp_path):
    (tmp_path / "p").mkdir()
    assert list(pack(BASE, EXPERTS, tmp_path / "p").manifest.tasks) == ["x", "y", "z"]


def test_overwriting_keeps_the_old_until_the_new_is_whole(tmp_path):
    pack(BASE, EXPERTS, tmp_path / "p")
    before = listing(tmp_path / "p")
    half = PackSettings(parameters={"rank_fraction": 0.5})

    def watch(stage: str, _done: int, _total: int) -> None:
        assert listing(tmp_path / "p") == before
        if stage == "packing z":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(
            BASE, EXPERTS, tmp_path / "p", settings=half, overwrite=True, work=Work(progress=watch)
        )
    assert listing(tmp_path / "p") == before
    made = pack(BASE, EXPERTS, tmp_path / "p", settings=half, overwrite=True)
    assert made.manifest.parameters == {"rank_fraction": 0.5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def test_a_disk_without_the_room_is_refused_beforehand(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"it needs [\d,]+ bytes and the disk has 1,000 free"):
        pack(BASE, EXPERTS, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(tmp_path, monkeypatch):
    pack(BASE, EXPERTS, tmp_path / "p")
    before = listing(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="No space left"):
        patched.setattr(os, "pwrite", full)
        unpack(tmp_path / "p", "x", tmp_path / "out", base=BASE)
    assert listing(tmp_path) == before


def test_a_disk_that_fills_up_while_packing_leaves_no_pack_and_keeps_what_is_done(
    tmp_path, monkeypatch, encoded
):
    """As where it hurts: in the writer of task files, after the first is on disk."""
    from personae.packs import writer

    write = writer.write_task_file

    def full(path: Path, *rest: Any) -> None:
        if "y.safetensors" in path.name:
            path.write_bytes(b"begun")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *rest)

    monkeypatch.setattr(writer, "write_task_file", full)
    with pytest.raises(OutputError, match=r"y.safetensors.*No space left.*Free some space"):
        pack(BASE, EXPERTS, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    tasks = sorted(path.name for path in (tmp_path / ".p.partial/tasks").iterdir())
    assert tasks == ["x.safetensors"]
    monkeypatch.setattr(writer, "write_task_file", write)
    encoded.clear()
    pack(BASE, EXPERTS, tmp_path / "p")
    assert len(encoded) == 2 * TENSORS


def test_what_coding_overshoots_is_held_to_what_fp16_holds(tmp_path):
    base = {"w": torch.full((8, 8), 60000.0, dtype=torch.float16)}
    generator = torch.Generator().manual_seed(0)
    noise = 4000 * torch.rand(8, 8, generator=generator)
    expert = {"w": (base["w"].float() + noise).to(torch.float16)}
    # One triplet of a nearly constant delta overshoots 65504 where noise was largest.
    pack(base, {"x": expert}, tmp_path / "p", settings=PackSettings(parameters={"scaling": False}))
    unpack(tmp_path / "p", "x", tmp_path / "out", base=base)
    assert load_file(tmp_path / "out/model.safetensors")["w"].max() == 65504


def test_a_rebuilt_expert_is_read_back_whole_after_all_that(tmp_path):
    _interrupted(tmp_path / "p", "packing z")
    pack(BASE, EXPERTS, tmp_path / "p")
    unpack(tmp_path / "p", "z", tmp_path / "z", base=BASE)
    assert torch.equal(load(tmp_path / "z")["scale"], EXPERTS["z"]["scale"])
