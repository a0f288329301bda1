"""The merge executor: values, bytes whatever the workers, resumption, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from families import State, as_many, listing, saved, small_base, tuned
from personae.commands.merge import merge
from personae.errors import BudgetError, CheckpointError, MethodError, OutputError, PersonaeError
from personae.family import chunks, deltas
from personae.methods import MERGE_METHODS, Site, build, lookup
from personae.recipe import MergeSettings
from personae.run.work import Work
from toys import load

EXPERTS = ("a", "b", "c")
FLOATING = ("conv.weight", "embed.weight", "layer.bias", "layer.weight", "scale")
runnable = pytest.mark.parametrize(
    "method", sorted(name for name, entry in MERGE_METHODS.items() if entry.needs != "adapters")
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts even tiny tensors: blocks of 50 entries, items of 90."""
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 50)
    monkeypatch.setattr(chunks, "ITEM_ENTRIES", 90)


def family(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[str, dict[str, str]]:
    """A base and three experts on disk."""
    base = small_base(dtype=dtype)
    experts = {name: tuned(base, seed) for seed, name in enumerate(EXPERTS, 1)}
    saved(base, folder / "base")
    for name, state in experts.items():
        saved(state, folder / name)
    return str(folder / "base"), {name: str(folder / name) for name in experts}


def expected(base: State, experts: list[State], method: str, **settings: Any) -> State:
    """Every tensor in memory at once, nothing cut."""
    entry = lookup(MERGE_METHODS, method)
    built = build(entry, settings)
    stacks = {
        name: torch.stack([e[name].float() - base[name].float() for e in experts])
        for name in FLOATING
    }
    sites = {name: Site(name, tuple(base[name].shape)) for name in FLOATING}
    statistics = None
    if entry.has_passes() and built.passes_over == "model":
        statistics = built.statistics([(sites[n], stacks[n]) for n in FLOATING])
    if entry.of_models() and entry.needs != "either":
        first = [base] if entry.needs == "models" else []
        models = {n: torch.stack([m[n].float() for m in (*first, *experts)]) for n in FLOATING}
        return base | {name: built.apply(models[name], site=sites[name]) for name in FLOATING}
    merged = {
        name: base[name].float() + built.apply(stacks[name], statistics, sites[name])
        for name in FLOATING
    }
    return base | merged


@runnable
@pytest.mark.usefixtures("small_chunks")
def test_values_are_those_of_the_method_on_whole_tensors(method: str, tmp_path: Path):
    base, experts = family(tmp_path)
    experts = as_many(MERGE_METHODS[method], experts)
    merge(base, experts, tmp_path / "out", settings=MergeSettings(method=method))
    found = load(tmp_path / "out")
    wanted = expected(load(Path(base)), [load(Path(e)) for e in experts.values()], method)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    if method != "model_stock":  # of experts at right angles that is the base
        assert not torch.equal(found["layer.weight"], load(Path(base))["layer.weight"])


@runnable
def test_heads_and_integer_buffers_are_untouched(method: str, tmp_path: Path):
    """Property 16, where experts differ in both: heads of 2, 3 and 4 classes, ids counted up."""
    base, experts = family(tmp_path)
    experts = as_many(MERGE_METHODS[method], experts)
    original = load(Path(base))
    merge(base, experts, tmp_path / "without", settings=MergeSettings(method=method))
    own: dict[str, str] = {}
    for n, (name, path) in enumerate(experts.items(), 1):
        state = load(Path(path))
        state["position_ids"] = state["position_ids"] + n
        state["classifier.weight"] = torch.full((1 + n, 8), float(n))
        saved(state, tmp_path / "own" / name)
        own[name] = str(tmp_path / "own" / name)
    merge(base, own, tmp_path / "out", settings=MergeSettings(method=method))
    found, without = load(tmp_path / "out"), load(tmp_path / "without")
    assert torch.equal(found["position_ids"], original["position_ids"])
    assert found.keys() == original.keys() and "classifier.weight" not in found
    assert all(torch.equal(found[name], without[name]) for name in FLOATING)


@runnable
@pytest.mark.usefixtures("small_chunks")
def test_workers_and_memory_change_no_byte(method: str, tmp_path: Path):
    base, experts = family(tmp_path, torch.bfloat16)
    experts = as_many(MERGE_METHODS[method], experts)
    for workers, memory in ((1, None), (3, None), (2, 1 << 20)):
        work = Work(workers=workers, memory=memory)
        settings = MergeSettings(method=method)
        merge(base, experts, tmp_path / f"{workers}", settings=settings, work=work)
    assert listing(tmp_path / "1") == listing(tmp_path / "3") == listing(tmp_path / "2")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("stage", ["pass", "merging"])
def test_a_run_killed_anywhere_goes_on(stage: str, scope: str, tmp_path: Path):
    base, experts = family(tmp_path)
    settings = MergeSettings(method="ties", parameters={"scope": scope})
    merge(base, experts, tmp_path / "whole", settings=settings)
    steps: list[tuple[str, int]] = []

    def kill(text: str, done: int, _: int) -> None:
        steps.append((text, done))
        if text.startswith(stage) and done == 2:
            raise KeyboardInterrupt

    broken = Work(workers=1, progress=kill)
    if scope == "tensor" and stage == "pass":
        pytest.skip("passes over one tensor are part of merging it")
    with pytest.raises(KeyboardInterrupt):
        merge(base, experts, tmp_path / "out", settings=settings, work=broken)
    assert not (tmp_path / "out").exists()
    assert (steps[0][1], [text for text, done in steps if not done]) == (0, _stages(steps))
    steps.clear()
    notes: list[str] = []
    again = Work(
        workers=1, progress=lambda text, done, _: steps.append((text, done)), note=notes.append
    )
    merge(base, experts, tmp_path / "out", settings=settings, work=again)
    told = [note for note in notes if note.startswith("going on with an interrupted run: 2 of ")]
    assert len(told) == (stage == "merging")
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()
    if stage == "merging":  # neither passes nor finished items are done again
        assert not any(text.startswith("pass") for text, _ in steps)
        assert [done for _, done in steps[:2]] == [2, 3]


def _stages(steps: list[tuple[str, int]]) -> list[str]:
    return list(dict.fromkeys(text for text, _ in steps))


@pytest.mark.usefixtures("small_chunks")
def test_changed_input_begins_anew(tmp_path: Path):
    base, experts = family(tmp_path)

    def kill(_: str, done: int, __: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, experts, tmp_path / "out", work=Work(workers=1, progress=kill))
    other = tuned(small_base(), 99)
    (tmp_path / "c" / "model.safetensors").unlink()
    (tmp_path / "c" / "config.json").unlink()
    (tmp_path / "c").rmdir()
    saved(other, tmp_path / "c")
    merge(base, experts, tmp_path / "out")
    merge(base, experts, tmp_path / "fresh")
    assert listing(tmp_path / "out") == listing(tmp_path / "fresh")


def test_tensors_left_alone_are_the_base_s_bytes(tmp_path: Path):
    base, experts = family(tmp_path, torch.bfloat16)
    settings = MergeSettings(skip=("embed.*",))
    merge(base, experts, tmp_path / "skip", settings=settings)
    settings = MergeSettings(only=("layer.*",))
    merge(base, experts, tmp_path / "only", settings=settings)
    original = load(Path(base))
    for out, changed in (("skip", {*FLOATING} - {"embed.weight"}), ("only", {"layer.bias"})):
        found = load(tmp_path / out)
        assert torch.equal(found["position_ids"], original["position_ids"])
        assert torch.equal(found["embed.weight"], original["embed.weight"])
        assert all(not torch.equal(found[name], original[name]) for name in changed - {"scale"})


def test_dtype_is_cast_once_at_the_end(tmp_path: Path):
    base, experts = family(tmp_path)
    merge(base, experts, tmp_path / "full")
    merge(base, experts, tmp_path / "half", settings=MergeSettings(dtype="bfloat16"))
    full, half = load(tmp_path / "full"), load(tmp_path / "half")
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in FLOATING)
    assert half["position_ids"].dtype == torch.int64


def test_without_a_base_the_average_takes_its_place(tmp_path: Path):
    _, experts = family(tmp_path)
    mean = {
        name: torch.stack([load(Path(e))[name] for e in experts.values()]).mean(dim=0)
        for name in FLOATING
    }
    for method in ("average", "ties"):
        merge(None, experts, tmp_path / method, settings=MergeSettings(method=method))
    found = load(tmp_path / "average")
    assert all(torch.allclose(found[name], mean[name], atol=1e-7) for name in FLOATING)
    apart = (load(tmp_path / "ties")["layer.weight"] - mean["layer.weight"]).abs().max()
    assert apart > 1e-3


def test_shards_and_small_files(tmp_path: Path):
    base, experts = family(tmp_path)
    (Path(base) / "tokenizer.json").write_text("{}")
    merge(base, experts, tmp_path / "one")
    merge(base, experts, tmp_path / "many", shard_bytes=600)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert (tmp_path / "many/tokenizer.json").read_text() == "{}"


def test_every_weight_that_is_not_finite_is_named_and_nothing_written(tmp_path: Path):
    base, experts = family(tmp_path)
    for name, tensor in (("a", "layer.weight"), ("c", "embed.weight")):
        state = load(tmp_path / name)
        state[tensor][1, 2] = float("nan")
        folder = tmp_path / f"bad-{name}"
        experts[name] = str(saved(state, folder))
    for method in ("average", "ties"):
        with pytest.raises(CheckpointError, match=r"(?s)'a'.*'layer.weight'") as error:
            merge(base, experts, tmp_path / "out", settings=MergeSettings(method=method))
        assert "'c'" in str(error.value)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.partial").exists()


def test_headers_tell_shapes_and_dtypes_all_at_once(tmp_path: Path):
    base, experts = family(tmp_path)
    state = tuned(small_base(), 5)
    state["layer.bias"] = torch.zeros(9)
    experts["a"] = str(saved(state, tmp_path / "odd"))
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()}
    half["layer.bias"] = torch.zeros(16).bfloat16()
    experts["b"] = str(saved(half, tmp_path / "half"))
    with pytest.raises(CheckpointError) as error:
        merge(base, experts, tmp_path / "out")
    text = str(error.value)
    assert "'layer.bias' is (9,), the base's (16,)" in text
    assert "bfloat16" in text and "dtype: float32" in text
    experts.pop("a")
    merge(base, experts, tmp_path / "out", settings=MergeSettings(dtype="float32"))


def test_a_memory_bound_below_the_largest_item_names_what_is_needed(tmp_path: Path):
    base, experts = family(tmp_path)
    with pytest.raises(BudgetError, match=r"--memory \d+MiB or more"):
        merge(base, experts, tmp_path / "out", work=Work(memory=1000))


def test_a_method_that_needs_a_base_says_so(tmp_path: Path):
    needy = [name for name, entry in MERGE_METHODS.items() if entry.needs in ("base", "adapters")]
    _, experts = family(tmp_path)
    for method in needy:
        with pytest.raises(PersonaeError, match="base"):
            merge(None, experts, tmp_path / "out", settings=MergeSettings(method=method))


def test_outputs_that_exist_stay(tmp_path: Path):
    base, experts = family(tmp_path)
    merge(base, experts, tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        merge(base, experts, tmp_path / "out")
    with pytest.raises(OutputError, match="overlap"):
        merge(base, experts, tmp_path / "a" / "inside")
    merge(base, experts, tmp_path / "out", overwrite=True)


def test_unknown_method(tmp_path: Path):
    base, experts = family(tmp_path)
    with pytest.raises((MethodError, PersonaeError), match="Did you mean 'average'"):
        merge(base, experts, tmp_path / "out", settings=MergeSettings(method="averge"))


def test_an_average_in_16_bits_needs_no_base_and_keeps_what_did_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, experts = family(tmp_path, torch.bfloat16)
    states = [load(Path(e)) for e in experts.values()]
    same = {**states[0], "layer.weight": load(Path(base))["layer.weight"]}
    for name, state in zip(EXPERTS, states, strict=True):
        state["layer.weight"] = same["layer.weight"]
        experts[name] = str(saved(state, tmp_path / f"again-{name}"))
    asked: list[str] = []
    read = deltas.Stacks.read
    monkeypatch.setattr(
        deltas.Stacks, "read", lambda self, chunk, **how: asked.append("") or read(self, chunk)
    )
    merge(base, experts, tmp_path / "out")
    found = load(tmp_path / "out")
    assert not asked
    assert torch.equal(found["layer.weight"], same["layer.weight"])
    mean = torch.stack([s["embed.weight"].float() for s in states]).mean(dim=0)
    assert torch.equal(found["embed.weight"], mean.bfloat16())


def test_what_is_read_anew_does_not_show_in_what_was_merged_before(tmp_path: Path):
    """Stacks are reused: chunks of other sizes follow each other on one thread."""
    base, experts = family(tmp_path)
    merge(base, experts, tmp_path / "one", work=Work(workers=1))
    merged, reference = load(tmp_path / "one"), load(Path(base))
    for name in FLOATING:
        vectors = [load(Path(e))[name] - reference[name] for e in experts.values()]
        mean = reference[name] + torch.stack(vectors).mean(dim=0)
        torch.testing.assert_close(merged[name], mean)
