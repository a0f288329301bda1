"""Ranks, sizes, losses and refusals of exports, on plain state dicts and in fp64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import State, listing, saved
from personae import DTS, SVD, TSVCompress, export, pack, unpack
from personae.errors import BudgetError, CheckpointError, OutputError, PersonaeError, RecipeError
from personae.methods import Codec
from personae.recipe import PackSettings
from personae.run.work import Work
from toys import load

WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."
LINEAR = ("layers.0.q.weight", "layers.0.up.weight", "layers.1.q.weight", "layers.1.up.weight")


def base_state() -> State:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "embed_tokens.weight": (30, 12),
        **{f"layers.{n}.q.weight": (12, 12) for n in (0, 1)},
        **{f"layers.{n}.q.bias": (12,) for n in (0, 1)},
        **{f"layers.{n}.up.weight": (20, 12) for n in (0, 1)},
        **{f"layers.{n}.norm.weight": (12,) for n in (0, 1)},
        "patches.weight": (12, 3, 2, 2),
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def tuned_state(skip: tuple[str, ...] = ()) -> State:
    """Deltas whose spectra fall off, otherwise for each; and a head that the base has not."""
    draw, state = torch.Generator().manual_seed(1), base_state()
    for place, (name, tensor) in enumerate(state.items()):
        noise = torch.randn(tensor.shape, generator=draw)
        if tensor.ndim == 2:
            noise *= torch.arange(1, tensor.shape[1] + 1) ** (-0.3 * (place % 4))
        state[name] = tensor if name in skip else tensor + 0.1 * noise
    return state | {"score.weight": torch.randn(3, 12, generator=draw)}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    saved(base_state(), tmp_path / "base")
    saved(tuned_state(), tmp_path / "expert")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exported(out: str = "out", source: Any = "expert", **options: Any) -> dict[str, Any]:
    """What is told of an export of the expert beside its base."""
    path = export(source, out, **{"base": "base", **options})
    return json.loads((path / "personae.json").read_text())


def deltas() -> dict[str, Tensor]:
    base, tuned = base_state(), tuned_state()
    return {name: tuned[name].double() - base[name].double() for name in base}


def product(out: str, name: str) -> Tensor:
    stored, module = load_file(Path(out) / WEIGHTS), name.removesuffix(".weight")
    a, b = (stored[f"{ROOT}{module}.lora_{side}.weight"].double() for side in "AB")
    return b @ a


def energy_rank(delta: Tensor, share: float) -> int:
    sums = torch.linalg.svdvals(delta).square().cumsum(0)
    return next(k + 1 for k, s in enumerate(sums) if s >= share * sums[-1])


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_energy_is_kept_by_the_smallest_rank(work: Path, share: float) -> None:
    wanted = {name: energy_rank(deltas()[name], share) for name in LINEAR}
    assert exported(energy=share)["rank"] == max(wanted.values())
    if len({*wanted.values()}) > 1:
        own = exported("own", energy=share, rank_pattern=True)["ranks"]
        assert own == {name.removesuffix(".weight"): rank for name, rank in wanted.items()}
    assert exported("few", energy=share, max_rank=2)["rank"] == min(2, max(wanted.values()))


@pytest.mark.parametrize(("dtype", "budget"), [("float32", 4000), ("float16", "2.5KB")])
def test_a_budget_is_used_up_but_for_one_rank(work: Path, dtype: str, budget: str | int) -> None:
    told = exported(budget=budget, dtype=dtype)
    most = 4000 if budget == 4000 else 2500
    size = (work / "out" / WEIGHTS).stat().st_size
    assert size == told["bytes"] <= most
    exported("more", rank=told["rank"] + 1, dtype=dtype)
    assert (work / "more" / WEIGHTS).stat().st_size > most
    assert {t.dtype for t in load_file(work / "out" / WEIGHTS).values()} == {getattr(torch, dtype)}
    with pytest.raises(BudgetError, match="an adapter of rank 1 takes 1,"):
        export("expert", "none", base="base", budget=100)


def test_what_is_told_is_what_is_lost(work: Path) -> None:
    """All in fp64: errors of factors as they are stored, shares of each kind, and the whole."""
    told = exported(rank=4, dtype="float16")
    found = deltas()
    energy = {name: float(delta.square().sum()) for name, delta in found.items()}
    missed = {n: float((found[n] - product("out", n)).square().sum()) for n in LINEAR}
    total, kept = sum(energy.values()), sum(energy[name] for name in LINEAR)
    assert told["relative_error"] == pytest.approx(sum(missed.values()) / kept, rel=1e-4)
    assert told["left_out"] == pytest.approx(1 - kept / total, rel=1e-6)
    assert told["lost"] == pytest.approx((total - kept + sum(missed.values())) / total, rel=1e-4)
    each = {name: missed[name] / energy[name] for name in LINEAR}
    assert told["relative_errors"] == pytest.approx(each, rel=1e-4)
    numbers = {name: delta.numel() for name, delta in found.items()} | {"score.weight": 36}
    of_kind = {
        "linear": LINEAR,
        "bias": ("layers.0.q.bias", "layers.1.q.bias"),
        "head": ("score.weight",),
        "embedding": ("embed_tokens.weight",),
        "norm": ("layers.0.norm.weight", "layers.1.norm.weight"),
        "convolution": ("patches.weight",),
    }
    rows = {row["kind"]: row for row in told["changed"]}
    assert rows.keys() == of_kind.keys()
    for kind, names in of_kind.items():
        share = sum(energy.get(name, 0.0) for name in names) / total
        assert rows[kind]["tensors"] == len(names)
        assert rows[kind]["norm_share"] == pytest.approx(share, rel=1e-5)
        of_all = sum(numbers[name] for name in names) / sum(numbers.values())
        assert rows[kind]["parameter_share"] == pytest.approx(of_all)
        assert rows[kind]["carried"] == ("factors" if kind == "linear" else "left out")
    assert set(told["left"]) == numbers.keys() - {*LINEAR}


@pytest.mark.parametrize("codec", [SVD(rank_fraction=0.3), DTS(), TSVCompress(tasks=3)], ids=str)
def test_factors_of_a_pack_are_used_as_they_are(work: Path, codec: Codec) -> None:
    """The product is what unpacking adds, at whatever rank the pack holds; fewer are LAPACK's."""
    pack("base", {"x": "expert"}, "p", codec)
    rebuilt = load(unpack("p", "x", "whole"))
    told = exported(source="p", task="x", base=None)
    assert told["rank"] == max(codec.rank((12, 12)), codec.rank((20, 12)))
    assert told["relative_error"] < 1e-10
    exported("few", "p", task="x", base=None, rank=2)
    for name in LINEAR:
        delta = rebuilt[name].double() - base_state()[name].double()
        torch.testing.assert_close(product("out", name), delta, rtol=1e-5, atol=1e-6)
        u, values, vh = torch.linalg.svd(delta, full_matrices=False)
        fewer = (u[:, :2] * values[:2]) @ vh[:2]
        torch.testing.assert_close(product("few", name), fewer, rtol=1e-4, atol=1e-5)


def test_codecs_without_factors_are_decomposed(work: Path) -> None:
    from personae import BitDelta

    pack("base", {"x": "expert"}, "p", BitDelta())
    assert exported(source="p", task="x", base=None)["rank"] == 32
    delta = load(unpack("p", "x", "whole"))[LINEAR[1]].double() - base_state()[LINEAR[1]].double()
    torch.testing.assert_close(product("out", LINEAR[1]), delta, rtol=1e-4, atol=1e-5)


def test_a_difference_pack_is_for_its_merged_model(work: Path) -> None:
    saved(tuned_state(skip=("layers.0.q.weight",)), work / "other")
    pack(
        "base",
        {"x": "expert", "y": "other"},
        "p",
        settings=PackSettings.of(SVD(rank_fraction=0.5), vector="difference"),
    )
    exported(source="p", task="x", base=None)
    config = json.loads((work / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "p/reference"


def test_layers_that_did_not_change_are_not_in_the_file(work: Path) -> None:
    """So no name ends in `up` alone: one of the two is not adapted."""
    saved(tuned_state(skip=("layers.1.up.weight",)), work / "partly")
    told = exported(source="partly", rank=2)
    modules = {name.partition(".lora_")[0] for name in load_file(work / "out" / WEIGHTS)}
    assert modules == {f"{ROOT}layers.{name}" for name in ("0.q", "1.q", "0.up")}
    assert told["target_modules"] == ["layers.0.up", "q"]


def test_kinds_that_are_saved_whole(work: Path) -> None:
    told = exported(rank=2, save_modules=["norm", "head"], skip=["layers.1.*"], dtype="float16")
    stored = load_file(work / "out" / WEIGHTS)
    whole = {name.removeprefix(ROOT) for name in stored if ".lora_" not in name}
    assert whole == {"layers.0.norm.weight", "score.weight"}
    assert told["modules_to_save"] == ["layers.0.norm", "score"]
    wanted = tuned_state()["score.weight"].half()
    assert torch.equal(stored[f"{ROOT}score.weight"], wanted)
    assert "layers.1.q.weight" in told["left"]


def test_the_configuration_and_the_card(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personae.commands.export_report._VLLM_RANKS", (8, 16))
    config = json.dumps({"architectures": ["ToyForSequenceClassification"]})
    for folder in ("base", "expert"):
        (work / folder / "config.json").write_text(config)
    told = exported(rank=12, base_name="org/base")
    written = json.loads((work / "out/adapter_config.json").read_text())
    assert {key: written[key] for key in ("peft_type", "task_type", "bias", "revision")} == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "bias": "none",
        "revision": None,
    }
    assert written["base_model_name_or_path"] == "org/base"
    assert written["modules_to_save"] == ["score"] == told["modules_to_save"]
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (12, 12, False)
    card = (work / "out/README.md").read_text()
    assert "base_model: org/base" in card and "| embedding | 1 |" in card
    assert "vLLM needs --max-lora-rank 16 (its default is 8)" in card


def test_workers_and_memory_do_not_change_a_byte(work: Path) -> None:
    exported("a", rank=3)
    exported("b", rank=3, work=Work(workers=3, memory=1 << 20))
    assert listing(work / "a") == listing(work / "b")
    with pytest.raises(BudgetError, match="The largest tensor needs"):
        exported("c", rank=3, work=Work(memory=1000))
    assert not (work / "c").exists()


def test_an_export_is_replaced_and_a_trained_adapter_is_not(work: Path) -> None:
    exported(rank=2)
    assert exported(rank=3, overwrite=True)["rank"] == 3
    (work / "out/personae.json").unlink()
    with pytest.raises(OutputError, match=r"not replaced: adapter_model\.safetensors"):
        exported(rank=2, overwrite=True)


def test_to_hf_is_unpacking(work: Path) -> None:
    pack("base", {"x": "expert"}, "p", SVD())
    unpack("p", "x", "a")
    export("p", "b", task="x", to="hf")
    assert listing(work / "a") == listing(work / "b")


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ranks": (
        dict(rank=0, energy=1.5, max_rank=4, dtype="int8", save_modules=["nrom"]),
        [
            "6 faults",
            "one of rank, energy",
            "rank is 0",
            "energy is 1.5",
            "dtype 'int8'",
            "Did you mean 'norm'?",
        ],
    ),
    "no base": (dict(base=None, task="x"), ["2 faults", "no task 'x'", "give the base"]),
    "no size": (dict(budget="many"), ["'many' is no size"]),
    "hf": (dict(to="hf", rank=3, dtype="float16"), ["Leave out ranks, dtype", "of a pack"]),
    "a pack without a task": (dict(source="p"), ["say which task", "It has x"]),
    "another task": (dict(source="p", task="xx"), ["no task 'xx'", "Did you mean 'x'?"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_are_refused_before_anything_is_read(work: Path, case: str) -> None:
    if "pack" in case or case == "another task":
        pack("base", {"x": "expert"}, "p", SVD())
    options, texts = REFUSED[case]
    with pytest.raises(RecipeError) as refused:
        exported(**options)
    assert all(text in str(refused.value) for text in texts), refused.value
    assert not (work / "out").exists()


def test_models_that_give_no_adapter(work: Path) -> None:
    saved(base_state(), work / "same")
    moved = base_state()
    moved["layers.0.norm.weight"] = moved["layers.0.norm.weight"] + 1
    saved(moved, work / "norms")
    broken = tuned_state()
    broken["layers.0.q.weight"][0, 0] = float("nan")
    saved(broken, work / "broken")
    saved({"other.weight": torch.ones(4, 4)}, work / "foreign")
    narrow = {name: tensor[..., :6].clone() for name, tensor in tuned_state().items()}
    saved(narrow, work / "narrow")
    faults = {
        "same": "same equals the base",
        "norms": "No linear layer of norms changed",
        "broken": "1 value(s) that are NaN",
        "foreign": "foreign",
        "narrow": "narrow",
    }
    for source, text in faults.items():
        with pytest.raises(CheckpointError) as refused:
            exported(source=source)
        assert text in str(refused.value), source
        assert not (work / "out").exists()


def test_a_pack_of_another_base_is_refused(work: Path) -> None:
    pack("base", {"x": "expert"}, "p", SVD())
    with pytest.raises(PersonaeError, match="is not the reference this pack was made from"):
        exported(source="p", task="x", base="expert")


@pytest.mark.parametrize("options", [{}, {"rank_pattern": True}])
def test_a_rank_that_no_matrix_has_is_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("personae.commands.export.measure", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(RecipeError, match="rank is 10,000, and no matrix has more than 12 dir"):
        exported(rank=10_000, **options)


def test_ranks_that_engines_do_not_load_are_noted(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr("personae.commands.export_report._VLLM_RANKS", (4, 8))
    exported(rank=9, work=Work(note=notes.append))
    assert any("above what vLLM loads (8)" in note for note in notes)
    notes.clear()
    exported("own", energy=0.9, rank_pattern=True, work=Work(note=notes.append))
    assert any("llama.cpp scales such adapters wrongly" in note for note in notes)


def test_a_dora_adapter_is_refused(work: Path) -> None:
    (work / "dora").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True}
    (work / "dora/adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"{ROOT}layers.0.q.lora_{side}.weight": torch.ones(shape)
        for side, shape in {"A": (2, 12), "B": (12, 2)}.items()
    }
    save_file(tensors, work / "dora" / WEIGHTS)
    with pytest.raises(CheckpointError, match="'use_dora' is True, which is not plain LoRA"):
        exported(source="dora")


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            "layers.0.up",
            r"'layers\.0\.up' do not fit .*\(20, 12\)\. Pass the model the adapter was trained on",
        ),
        ("layers.7.q", r"Expert 'other': .*layers\.7\.q.*trained on"),
    ],
    ids=["other shapes", "other names"],
)
def test_an_adapter_of_another_base_is_refused(work: Path, module: str, text: str) -> None:
    (work / "other").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]}
    (work / "other/adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"{ROOT}{module}.lora_{side}.weight": torch.ones(shape)
        for side, shape in {"A": (2, 12), "B": (12, 2)}.items()
    }
    save_file(tensors, work / "other" / WEIGHTS)
    with pytest.raises(CheckpointError, match=text):
        exported(source="other")
    assert not (work / "out").exists()
