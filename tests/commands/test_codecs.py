"""Every codec through packs: what is shared, what is not coded, adding, removing, workers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from families import State, listing, small_base, tuned
from personae.commands.inspect import inspect
from personae.commands.pack import add_tasks, pack, pack_many, remove_task
from personae.commands.unpack import unpack
from personae.commands.verify import verify
from personae.errors import MethodError
from personae.methods import CODECS, Codec, Context, Site, decode_block, encode_block
from personae.packs.reader import Pack
from personae.recipe import PackSettings
from personae.run.work import Work
from toys import load

BASE = small_base() | {
    "layers.0.attn.weight": torch.zeros(40, 30),
    "layers.0.frozen.weight": torch.ones(6, 5),
}
CHANGED = [name for name in BASE if name != "layers.0.frozen.weight"]
EXPERTS = {name: tuned(BASE, seed, names=CHANGED) for seed, name in enumerate("xyz", 1)}
SETTINGS = {name: PackSettings(method=name) for name in CODECS} | {
    "t_switch, model": PackSettings(method="t_switch", parameters={"scope": "model"}),
    "emr, means": PackSettings(method="emr", parameters={"rescaler": "tensor_means"}),
    "tall, by task": PackSettings(
        method="tall_mask", parameters={"threshold": {"x": 0.2, "y": 0.3, "z": 0.6}}
    ),
    "bitdelta, all": PackSettings(method="bitdelta", parameters={"tensors": "all"}),
    "bitdelta, skip": PackSettings(method="bitdelta", parameters={"rest": "skip"}),
    "ultradelta, all": PackSettings(
        method="ultradelta", parameters={"tensors": "all", "density": 0.3}
    ),
}
each = pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))


def _expected(
    settings: PackSettings, experts: dict[str, State], reference: State
) -> dict[str, State]:
    """What is rebuilt, computed with whole models in memory."""
    codec = settings.codec()
    names = [n for n, tensor in reference.items() if tensor.is_floating_point()]
    deltas = {t: {n: e[n] - reference[n] for n in names} for t, e in experts.items()}
    coded = [n for n in names if codec.treats(_spec(n, reference)) == "code"]
    shared: dict[str, Any] = {}
    if codec.shares:
        shared = {n: codec.share([own[n] for own in deltas.values()]) for n in coded}
    contexts = {
        task: {n: Context(Site(n, tuple(reference[n].shape)), task, shared.get(n)) for n in names}
        for task in experts
    }
    found = {}
    for task, own in deltas.items():
        changed = [n for n in sorted(coded) if own[n].any()]
        blocks = [(own[n], contexts[task][n]) for n in changed]
        found[task] = codec.for_task(task).statistics(blocks) if blocks else {}
    codec = codec.for_family(list(found.values()))
    return {
        task: experts[task]
        | {
            n: reference[n] + _coded(codec.for_task(task), n, delta, contexts[task][n], found[task])
            for n, delta in own.items()
        }
        for task, own in deltas.items()
    }


def _spec(name: str, reference: State) -> Any:
    from personae._types import TensorSpec

    return TensorSpec(name, tuple(reference[name].shape), torch.float32)


def _coded(codec: Codec, name: str, delta: Any, context: Context, found: Any) -> Any:
    shape = tuple(delta.shape)
    treatment = codec.treats(_spec(name, {name: delta}))
    context = Context(context.site, context.task, context.shared, found)
    parts = encode_block(codec, treatment, delta, None, context)
    return decode_block(codec, parts, shape, context.shared)


@each
@pytest.mark.parametrize("vector", ["task", "difference"])
def test_rebuilt_is_what_whole_models_in_memory_give(settings, vector, tmp_path):
    settings = settings.model_copy(update={"vector": vector})
    made = pack(BASE, EXPERTS, tmp_path / "p", settings=settings)
    reference = BASE if made.reference_directory is None else load(made.reference_directory)
    expected = _expected(settings, EXPERTS, reference)
    for task in EXPERTS:
        rebuilt = load(unpack(tmp_path / "p", task, tmp_path / task, base=_base(made)))
        for name, tensor in expected[task].items():
            torch.testing.assert_close(rebuilt[name], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(rebuilt["layers.0.frozen.weight"], BASE["layers.0.frozen.weight"])
        assert "layers.0.frozen.weight" not in made.task(task).tensors
    verify(tmp_path / "p", against=EXPERTS, base=_base(made))


def _base(made: Pack) -> State | None:
    return BASE if made.reference_directory is None else None


@each
def test_workers_change_no_byte(settings, tmp_path):
    for workers in (1, 3):
        pack(BASE, EXPERTS, tmp_path / str(workers), settings=settings, work=Work(workers=workers))
    assert listing(tmp_path / "1") == listing(tmp_path / "3")


@each
def test_a_task_that_is_added_leaves_the_others_as_they_are(settings, tmp_path):
    two = {name: EXPERTS[name] for name in "xy"}
    pack(BASE, two, tmp_path / "p", settings=settings)
    before = listing(tmp_path / "p")
    told: list[str] = []
    made = add_tasks(tmp_path / "p", {"z": EXPERTS["z"]}, base=BASE, work=Work(note=told.append))
    after = listing(tmp_path / "p")
    assert {n: after[n] for n in before if n != "pack.json"} == {
        n: data for n, data in before.items() if n != "pack.json"
    }
    assert verify(tmp_path / "p", against=EXPERTS, base=BASE)["z"].same_original is True
    shares = settings.codec().shares
    assert any("already share" in text for text in told) == shares
    for name in settings.codec().of_family:
        values = {json.dumps(task.parameters[name]) for task in made.manifest.tasks.values()}
        assert len(values) == 1 and values != {"null"}
    assert list(remove_task(tmp_path / "p", "x").manifest.tasks) == ["y", "z"]
    unpack(tmp_path / "p", "z", tmp_path / "z", base=BASE)


@pytest.mark.parametrize("method", ["emr", "tall_mask", "t_switch", "ultradelta", "tsv_c"])
def test_an_interrupted_run_gives_the_same_bytes(method, tmp_path):
    settings = PackSettings(method=method, parameters={})
    pack(BASE, EXPERTS, tmp_path / "whole", settings=settings)

    def stop(now: str, _done: int, _total: int) -> None:
        if now == "packing y":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(BASE, EXPERTS, tmp_path / "p", settings=settings, work=Work(progress=stop))
    pack(BASE, EXPERTS, tmp_path / "p", settings=settings)
    assert listing(tmp_path / "p") == listing(tmp_path / "whole")


def test_one_expert_alone_comes_back_from_emr_and_tall(tmp_path):
    """methods.md 10.1: masks are all ones where the delta is not zero, and λ = 1."""
    for method in ("emr", "tall_mask"):
        pack(BASE, {"x": EXPERTS["x"]}, tmp_path / method, settings=PackSettings(method=method))
        rebuilt = load(unpack(tmp_path / method, "x", tmp_path / f"{method}-x", base=BASE))
        for name, tensor in EXPERTS["x"].items():
            torch.testing.assert_close(rebuilt[name], tensor, rtol=0, atol=0)


def test_copies_come_back_from_emr(tmp_path):
    copies = {name: EXPERTS["x"] for name in "abc"}
    pack(BASE, copies, tmp_path / "p", settings=PackSettings(method="emr"))
    rebuilt = load(unpack(tmp_path / "p", "b", tmp_path / "b", base=BASE))
    for name, tensor in EXPERTS["x"].items():
        assert torch.equal(rebuilt[name], tensor)


def test_order_of_experts_does_not_matter_to_what_is_shared(tmp_path):
    for method in ("emr", "tall_mask"):
        settings = PackSettings(method=method)
        pack(BASE, EXPERTS, tmp_path / f"{method}1", settings=settings)
        backwards = dict(reversed(EXPERTS.items()))
        pack(BASE, backwards, tmp_path / f"{method}2", settings=settings)
        one, other = (load_shared(tmp_path / f"{method}{n}") for n in (1, 2))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def load_shared(directory: Path) -> State:
    shared = Pack(directory).open_shared()
    assert shared is not None
    names = Pack(directory).manifest.shared.tensors  # pyright: ignore[reportOptionalMemberAccess]
    return {name: shared.read(name) for name in names}  # pyright: ignore[reportReturnType]


@each
def test_measured_bytes_are_those_recorded_and_no_more_than_planned(settings, tmp_path):
    from personae.commands.pack_plan import plan_pack

    planned = plan_pack(BASE, EXPERTS, settings)
    made = pack(BASE, EXPERTS, tmp_path / "p", settings=settings)
    for name, record in made.manifest.tasks.items():
        raw = (tmp_path / "p" / record.file).read_bytes()
        assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + record.coded_bytes
        coded = planned.tasks[name].coded
        assert record.coded_bytes <= coded.bytes + coded.mask_bytes
    files = [p for p in (tmp_path / "p").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= planned.bytes_out
    if made.manifest.shared:
        shapes = made.manifest.shared.tensors
        assert shapes == {name: tuple(BASE[name].shape) for name in _floating()}


def _floating() -> list[str]:
    return [name for name in CHANGED if BASE[name].is_floating_point()]


def test_what_is_not_coded_is_told(tmp_path):
    told: list[str] = []
    work = Work(note=told.append)
    pack(BASE, EXPERTS, tmp_path / "exact", settings=SETTINGS["bitdelta"], work=work)
    assert "x: not coded, kept exact: conv.weight, embed.weight, layer.bias, layer.weight" in told
    pack(BASE, EXPERTS, tmp_path / "skip", settings=SETTINGS["bitdelta, skip"], work=work)
    left = "x: left as in the reference: conv.weight, embed.weight, layer.bias, layer.weight, scale"
    (found,) = [text for text in told if text.startswith(left)]
    tensors = Pack(tmp_path / "skip").task("x").tensors.values()
    lost = sum(tensor.energy for tensor in tensors if tensor.treatment == "skipped")
    share = 100 * lost / sum(tensor.energy for tensor in tensors)
    assert found == f"{left} (5 in all, {share:.2g} % of the squared norm of the delta)"
    for name, treatment in (("exact", "exact"), ("skip", "skipped")):
        task = inspect(tmp_path / name)["tasks"]["x"]
        found = {key: tensor["treatment"] for key, tensor in task["tensors"].items()}
        assert found.pop("layers.0.attn.weight") == "coded"
        assert set(found.values()) == {treatment}
    rebuilt = load(unpack(tmp_path / "exact", "x", tmp_path / "x", base=BASE))
    torch.testing.assert_close(rebuilt["embed.weight"], EXPERTS["x"]["embed.weight"])
    rebuilt = load(unpack(tmp_path / "skip", "x", tmp_path / "y", base=BASE))
    assert torch.equal(rebuilt["embed.weight"], BASE["embed.weight"])


def test_a_threshold_for_each_task_or_none_at_all(tmp_path):
    settings = PackSettings(method="tall_mask", parameters={"threshold": {"x": 0.3, "y": 0.3}})
    with pytest.raises(MethodError, match="threshold has no value for task 'z', only for x, y"):
        pack(BASE, EXPERTS, tmp_path / "p", settings=settings)
    assert list(tmp_path.iterdir()) == []
    made = pack(BASE, EXPERTS, tmp_path / "q", settings=SETTINGS["tall, by task"])
    used = {name: task.parameters["threshold"] for name, task in made.manifest.tasks.items()}
    assert used == {"x": 0.2, "y": 0.3, "z": 0.6}


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("tall_mask", {"threshold": 0}, "threshold"),
        ("tall_mask", {"threshold": {"x": -1}}, "threshold"),
        ("t_switch", {"density": 0}, "density = 0"),
        ("t_switch", {"density": 1.5}, "density = 1.5"),
        ("t_switch", {"densty": 0.5}, "Did you mean 'density'"),
        ("emr", {"rescaler": "local"}, "rescaler"),
        ("bitdelta", {"tensors": "some"}, "tensors"),
        ("delta_come", {"bands": [[0, 8]]}, "bands"),
        ("delta_come", {"rest_bits": 9}, "rest_bits"),
        ("ultradelta", {"density": 0.01}, "step must be below density"),
        ("tsv_c", {"tasks": 0}, "tasks = 0"),
    ],
)
def test_what_cannot_be_is_refused(method, parameters, message):
    with pytest.raises(MethodError, match=message):
        PackSettings(method=method, parameters=parameters).codec()


def test_a_budget_needs_a_rank(tmp_path):
    settings = PackSettings(method="emr", budget="5%")
    with pytest.raises(MethodError, match="no parameter that a budget could set"):
        pack(BASE, EXPERTS, tmp_path / "p", settings=settings)


def test_ablations_share_one_decomposition(tmp_path, monkeypatch):
    from personae.methods.codecs.dts import DTS

    count, decompose = [0], DTS.decompose

    def counting(self: DTS, *given: Any) -> Any:
        count[0] += 1
        return decompose(self, *given)

    monkeypatch.setattr(DTS, "decompose", counting)
    ablations: dict[str, dict[str, Any]] = {
        "full": {},
        "small": {"rank_fraction": 0.1},
        "binarised": {"thresholding": False},
        "unscaled": {"scaling": False},
        "flat": {"decomposition": False},
    }
    outs: dict[Any, PackSettings] = {
        tmp_path / name: PackSettings(parameters=parameters)
        for name, parameters in ablations.items()
    }
    made = pack_many(BASE, {"x": EXPERTS["x"]}, outs, work=Work(workers=1))
    assert count[0] == 3  # embed, layer and attn are matrices
    for name, one in zip(ablations, made, strict=True):
        alone = pack(
            BASE, {"x": EXPERTS["x"]}, tmp_path / f"{name} alone", settings=outs[tmp_path / name]
        )
        assert one.task("x").coded_bytes == alone.task("x").coded_bytes
        assert one.task("x").relative_error == pytest.approx(
            alone.task("x").relative_error, rel=1e-3
        )
