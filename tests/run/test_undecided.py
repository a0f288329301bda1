"""Entries on which no sign wins: merged at once, decided by the majority once all have voted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from families import State, listing, saved
from personae._types import TensorSpec
from personae.commands.merge import merge
from personae.commands.merge_plan import plan_merge
from personae.errors import OutputError
from personae.family import chunks
from personae.methods import MERGE_METHODS, DeltaBlocks, Site, Undecided, build, lookup
from personae.recipe import MergeSettings
from personae.run import undecided
from personae.run.work import Work
from personae.writers import CheckpointWriter
from toys import load

LATE = sorted(name for name, method in MERGE_METHODS.items() if method.can_decide_late)
ALL_VOTE: dict[str, dict[str, Any]] = {
    "breadcrumbs_ties": {"density": 1.0, "gamma": 0.0},
    "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "ties": {"density": 1.0},
}
"""Parameters by which no entry is dropped."""
# Two experts of integer task vectors: most entries that both change cancel. `balance` entries of
# the first and of the third tensor, changed by both alike, make the majority.
BASE: State = {
    "a.weight": torch.arange(60.0).reshape(6, 10),
    "b.bias": torch.ones(7),
    "c.weight": torch.zeros(40),
    "scale": torch.tensor(2.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks to a tensor, several tensors to an item, several files to what it leaves."""
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 20)
    monkeypatch.setattr(chunks, "ITEM_ENTRIES", 50)
    monkeypatch.setattr(undecided, "FILE_ENTRIES", 3)


def experts_of(balance: int) -> list[State]:
    draw = torch.Generator().manual_seed(0)
    first = {name: torch.zeros_like(tensor) for name, tensor in BASE.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in BASE.items()}
    for name in ("a.weight", "b.bias"):
        change = torch.randint(-2, 3, BASE[name].shape, generator=draw).float()
        first[name], second[name] = change, -change
    first["scale"], second["scale"] = torch.tensor(3.0), torch.tensor(-3.0)
    sign = float((balance > 0) - (balance < 0))
    for name in ("a.weight", "c.weight"):
        first[name].view(-1)[: abs(balance)] = second[name].view(-1)[: abs(balance)] = sign
    return [{name: BASE[name] + change[name] for name in BASE} for change in (first, second)]


def family(folder: Path, balance: int) -> tuple[str, dict[str, str]]:
    saved(BASE, folder / "base")
    paths = {name: folder / name for name in ("one", "two")}
    for path, state in zip(paths.values(), experts_of(balance), strict=True):
        saved(state, path)
    return str(folder / "base"), {name: str(path) for name, path in paths.items()}


def whole(method: str, balance: int, settings: dict[str, Any]) -> State:
    """All of the model in memory, its majority looked for first."""
    entry = lookup(MERGE_METHODS, method)
    built = build(entry, settings)
    states = experts_of(balance)
    stacks = {
        name: (
            Site(name, tuple(BASE[name].shape)),
            torch.stack([s[name] - BASE[name] for s in states]),
        )
        for name in BASE
    }
    statistics = None
    if settings.get("scope") == "model":
        statistics = built.statistics(stacks.values())
        assert int(statistics["majority"]) == (balance > 0) - (balance < 0)
    return {
        name: BASE[name] + built.apply(stack, statistics, site)
        for name, (site, stack) in stacks.items()
    }


def test_which_methods_decide_late():
    assert [*ALL_VOTE] == LATE


@pytest.mark.parametrize("method", LATE)
def test_by_hand(method: str):
    # Trimmed by nothing. Entries: 2 - 2, 5 + 1, 1 - 4, 0: undecided, +, -, nobody votes.
    # Votes + 1 - 1 = 0. The first is 0 so far; with +, it is 2; with -, it is -2.
    stack = torch.tensor([[2.0, 5.0, 1.0, 0.0], [-2.0, 1.0, -4.0, 0.0]])
    entry, told = lookup(MERGE_METHODS, method), Undecided()
    zeros, largest = torch.zeros(2), torch.full((2,), torch.inf)
    statistics = {"thresholds": zeros, "lowest": zeros, "highest": largest}
    built = build(entry, {**ALL_VOTE[method], "scale": 3.0})
    merged = built.apply(stack, statistics, Site("x", (4,)), told)
    assert merged.tolist() == [0.0, 3 * 3.0, 3 * -4.0, 0.0]
    assert (told.votes, told.places.tolist()) == (0, [0])
    assert (told.positive.tolist(), told.negative.tolist()) == ([3 * 2.0], [3 * -2.0])


@pytest.mark.parametrize("balance", [-9, 0, 9])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("method", LATE)
def test_the_result_is_that_of_looking_first(
    method: str, scope: str, reduce: str, balance: int, tmp_path: Path
):
    settings = {**ALL_VOTE[method], "reduce": reduce, "scale": 0.5}
    if "scope" in MERGE_METHODS[method].fields():
        settings["scope"] = scope
    elif scope == "model":
        pytest.skip("its majority is that of each tensor")
    base, experts = family(tmp_path, balance)
    for workers in (1, 3):
        merge(
            base,
            experts,
            tmp_path / str(workers),
            settings=MergeSettings(method=method, parameters=settings, dtype="bfloat16"),
            work=Work(workers=workers),
        )
    found = load(tmp_path / "1")
    for name, tensor in whole(method, balance, settings).items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    assert listing(tmp_path / "1") == listing(tmp_path / "3")
    assert sorted(listing(tmp_path / "1")) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("killed_at", ["merging", "deciding", "decided"])
def test_a_run_killed_before_it_decides_goes_on(
    killed_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, experts = family(tmp_path, -9)
    settings = MergeSettings(method="ties", parameters={"density": 1.0})
    merge(base, experts, tmp_path / "whole", settings=settings)

    def kill(stage: str, done: int, _: int) -> None:
        if stage.startswith(killed_at) and done == 2:
            raise KeyboardInterrupt

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if killed_at == "decided":
            patch.setattr("personae.commands.merge.write_auxiliary_files", killed)
        merge(
            base, experts, tmp_path / "out", settings=settings, work=Work(workers=1, progress=kill)
        )
    assert not (tmp_path / "out").exists()
    stages: list[str] = []
    again = Work(workers=1, progress=lambda stage, *_: stages.append(stage))
    merge(base, experts, tmp_path / "out", settings=settings, work=again)
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")
    assert any(stage.startswith("deciding") for stage in stages) == (killed_at != "decided")


@pytest.mark.parametrize("damage", ["lost", "cut short", "of an earlier version"])
@pytest.mark.parametrize("file", ["0.safetensors", "0-1.safetensors"])
def test_an_item_whose_undecided_entries_are_gone_is_merged_again(
    damage: str, file: str, tmp_path: Path
):
    base, experts = family(tmp_path, -9)
    settings = MergeSettings(method="ties", parameters={"density": 1.0})
    merge(base, experts, tmp_path / "whole", settings=settings)

    def kill(stage: str, done: int, _: int) -> None:
        if stage.startswith("merging") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work = Work(workers=1, progress=kill)
        merge(base, experts, tmp_path / "out", settings=settings, work=work)
    folder = tmp_path / ".out.partial" / ".undecided"
    assert (folder / file).exists()
    if damage == "lost":
        (folder / file).unlink()
    elif damage == "cut short":
        (folder / file).write_bytes((folder / file).read_bytes()[:20])
    else:  # its files had no number of full files in them
        save_file({"votes": torch.tensor(7)}, folder / "0.safetensors")
    merge(base, experts, tmp_path / "out", settings=settings)
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_the_disk_space_is_planned_and_asked_for(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, experts = family(tmp_path, -9)
    settings = MergeSettings(method="ties", parameters={"density": 1.0, "scope": scope})
    planned = plan_merge(base, experts, settings, Work(workers=1))
    # 12 bytes an entry of all 60 + 7 + 40 + 1, or of the largest tensor; and what headers take.
    entries = 60 + 7 + 40 + 1 if scope == "model" else 60
    assert 12 * entries < planned.undecided_bytes < 12 * entries + 4096 * 8
    found: list[int] = []

    def look(stage: str, *_: object) -> None:
        files = tmp_path.glob(".out.partial/.undecided/*")
        found.append(sum(path.stat().st_size for path in files))

    merge(base, experts, tmp_path / "out", settings=settings, work=Work(workers=1, progress=look))
    assert scope == "tensor" or 0 < max(found) <= planned.undecided_bytes
    free, notes = planned.bytes_out + planned.undecided_bytes - 1, list[str]()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    work = Work(workers=1, note=notes.append)
    merge(base, experts, tmp_path / "tight", settings=settings, work=work)
    assert any(f"take up to {planned.undecided_bytes:,} bytes more" in note for note in notes)
    free = planned.bytes_out - 1
    with pytest.raises(OutputError, match=f"it needs {planned.bytes_out:,} bytes"):
        merge(base, experts, tmp_path / "again", settings=settings, work=Work(workers=1))


def test_two_workers_decide_two_tensors_at_a_time(tmp_path: Path):
    base, experts = family(tmp_path, -9)
    settings = MergeSettings(method="ties", parameters={"scope": "tensor"})
    one, two, eight = (
        plan_merge(base, experts, settings, Work(workers=n)).undecided_bytes for n in (1, 2, 8)
    )
    assert one < two < eight
    average = plan_merge(base, experts, MergeSettings(), Work(workers=8))
    assert average.undecided_bytes == 0


def test_what_the_other_sign_would_make_need_not_fit_the_dtype(tmp_path: Path):
    # fp16 ends at 65504. The first entry is 60000 + 1.5 * 5472 = 68208 or, as - has the majority,
    # 60000 - 8208 = 51792, in fp16 51808 or 51776.
    saved({"w": torch.tensor([60000.0, 0, 0])}, tmp_path / "base")
    experts = {"one": [5472.0, -1, -1], "two": [-5472.0, -1, -1]}
    for name, change in experts.items():
        saved({"w": torch.tensor([60000.0, 0, 0]) + torch.tensor(change)}, tmp_path / name)
    merge(
        str(tmp_path / "base"),
        {name: str(tmp_path / name) for name in experts},
        tmp_path / "out",
        settings=MergeSettings(
            method="ties", parameters={"density": 1.0, "scale": 1.5}, dtype="float16"
        ),
    )
    assert load(tmp_path / "out")["w"].tolist() == [float(torch.tensor(51792.0).half()), -1.5, -1.5]


def test_what_is_left_open_goes_to_files_as_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # 20 entries a chunk, all undecided, with 25 to a file: 0-24, 25-49, and 10 that wait at last.
    monkeypatch.setattr(undecided, "FILE_ENTRIES", 25)
    spec = TensorSpec("w", (3, 20), torch.float32)
    item = chunks.Item(0, tuple(chunks.Chunk(spec, row, row + 1) for row in range(3)), whole=False)
    left_open = undecided.UndecidedEntries(tmp_path, per_tensor=False).of(item)
    for chunk in item.chunks:
        reference = torch.full((1, 20), 10.0 * chunk.start)
        blocks = DeltaBlocks([reference, reference], reference)
        told = left_open.of(chunk, blocks, torch.float32)
        for _ in blocks:
            told.votes += 5
            some = np.full(20, 2, np.float32)
            assert told.add(np.arange(20), some, -some) == 1  # + has the majority so far
        told.done()
        assert told.count == 20
    # 36 bytes for each entry that waits, in the buffer and in what is written of it: 25; 48 for
    # each of a block on its way there: all 60, as they are fewer than a block.
    assert undecided.waiting_bytes(item) == 36 * 25 + 48 * 60
    left_open.keep()
    written = {path.stem: load_file(path) for path in (tmp_path / ".undecided").iterdir()}
    assert {
        stem: [(key, len(kept[key])) for key in kept if key.startswith("entries")]
        for stem, kept in written.items()
    } == {
        "0-0": [("entries/0/w", 25)],
        "0-1": [("entries/25/w", 25)],
        "0": [("entries/50/w", 10)],
    }
    assert int(written["0"]["votes"]) == 15 and int(written["0"]["full_files"]) == 2
    assert written["0-1"]["entries/25/w"].tolist() == list(range(25))
    # They are written as + makes them: what waits is what - makes of them, and what neither does.
    assert written["0-1"]["neither/25/w"].tolist() == [10.0] * 15 + [20.0] * 10
    assert written["0-1"]["negative/25/w"].tolist() == [8.0] * 15 + [18.0] * 10
    assert written["0"]["negative/50/w"].tolist() == [18.0] * 10
    assert not any(key.startswith("positive") for kept in written.values() for key in kept)


def test_the_guess_is_the_majority_so_far_where_both_signs_fit(tmp_path: Path):
    spec = TensorSpec("w", (4, 2), torch.float16)
    item = chunks.Item(0, tuple(chunks.Chunk(spec, row, row + 1) for row in range(4)), whole=False)
    entries = undecided.UndecidedEntries(tmp_path, per_tensor=False)
    # Row, votes, what + and - make of an entry beside the base's 60000: fp16 ends at 65504.
    steps = [(0, -3, 2.0, -1), (1, 2, 2.0, -1), (2, 2, 2.0, 1), (3, -9, 6000.0, 0)]
    for row, votes, change, guess in steps:
        left_open = entries.of(item)  # each time another item's, of the same model
        reference = torch.full((1, 2), 60000.0)
        blocks = DeltaBlocks([reference], reference)
        told = left_open.of(item.chunks[row], blocks, torch.float16)
        for _ in blocks:
            told.votes += votes
            some = np.full(1, change, np.float32)
            assert told.add(np.array([1]), some, -some) == guess
        told.done()
        left_open.keep()
    waiting = load_file(tmp_path / ".undecided" / "0.safetensors")
    assert waiting["positive/7/w"].tolist() == [66000]
    assert waiting["negative/7/w"].tolist() == [54000]
    of_a_tensor = undecided.UndecidedEntries(tmp_path, per_tensor=True)
    of_a_tensor.of(item).count_votes(-5)
    assert of_a_tensor.of(item).guess(0) == 1  # another item's tensor


def test_only_wrong_guesses_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # One expert's changes are the other's negative, but for nine entries of the first tensor, which
    # is written first, and nine of the last: all guesses have their sign.
    replaced: list[str] = []
    write = CheckpointWriter.replace

    def note(self: CheckpointWriter, name: str, *rest: Any) -> None:
        replaced.append(name)
        write(self, name, *rest)

    monkeypatch.setattr(CheckpointWriter, "replace", note)
    base, experts = family(tmp_path, 9)
    settings = MergeSettings(method="ties", parameters={"density": 1.0})
    work = Work(workers=1)
    merge(base, experts, tmp_path / "right", settings=settings, work=work)
    assert not replaced
    base, experts = family(tmp_path / "even", 0)  # nobody has the majority, though + is guessed
    merge(base, experts, tmp_path / "wrong", settings=settings, work=work)
    assert {*replaced} == {"a.weight", "b.bias", "scale"}


def test_entries_that_32_bits_do_not_reach_begin_anew(monkeypatch: pytest.MonkeyPatch):
    """A tensor of more than 2^31 entries: each place is told from one that is near enough."""
    monkeypatch.setattr(undecided, "FILE_ENTRIES", 25)
    waiting, far = undecided.Waiting(), 2**31
    values = np.ones((2, 2), np.float32)
    for places in ([0, 9], [far - 1, far + 1], [far + 5, far + 6], [3, 4]):
        waiting.add("w", 1, np.array(places), values)
    waiting.add("v", 1, np.array([5, 6]), values)
    waiting.add("v", -1, np.array([7, 8]), values)
    told = {k: t.tolist() for k, t in waiting.tensors().items() if k.startswith("entries")}
    assert told == {
        "entries/0/w": [0, 9],
        f"entries/{far - 1}/w": [0, 2, 6, 7],
        "entries/3/w": [0, 1],
        "entries/5/v": [0, 1],
        "entries/7/v": [0, 1],
    }


def test_one_expert_is_never_outvoted(tmp_path: Path):
    base, experts = family(tmp_path, 9)
    plan = plan_merge(base, {"one": experts["one"]}, MergeSettings(method="ties"))
    assert plan.passes == 1


@pytest.mark.parametrize(
    ("method", "settings", "has_base", "passes"),
    [
        ("ties", {}, True, 1),
        ("ties", {"scope": "tensor"}, True, 1),
        ("dare_ties", {"scope": "tensor"}, True, 0),
        ("ties", {"elect": "count"}, True, 2),
        ("ties", {}, False, 2),  # two difference vectors cancel everywhere
        ("dare_ties", {}, True, 0),
        ("dare_ties", {"elect": "count"}, True, 1),
        ("average", {}, True, 0),
    ],
)
def test_the_pass_is_spared_where_few_entries_wait_for_it(
    method: str, settings: dict[str, Any], has_base: bool, passes: int, tmp_path: Path
):
    base, experts = family(tmp_path, 9)
    asked = MergeSettings(method=method, parameters=settings)
    plan = plan_merge(base if has_base else None, experts, asked)
    assert plan.passes == passes
    stages: list[str] = []
    work = Work(workers=1, progress=lambda stage, *_: stages.append(stage))
    merge(base if has_base else None, experts, tmp_path / "out", settings=asked, work=work)
    taken = any(stage.endswith(": majority") for stage in stages)
    assert taken == ("elect" in settings or not has_base)
