"""Changes that do not show in a merge are told, with the reason; and batch normalisation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from families import State, saved
from personae.commands.merge import merge
from personae.commands.merge_plan import plan_merge
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.family import chunks
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from toys import load

CANCELLED = "merged to exactly 0: trimmed, dropped or cancelled"
ROUNDED = "less than its dtype can tell"
ABSENT = "not in every expert in the base's shape"


def unmerged(method: str) -> str:
    return f"integers or statistics, which {method} does not merge"


def told(base: State, experts: Mapping[str, Any], out: Path, **settings: Any) -> dict[str, str]:
    """What a merge says came out as the base's; the output bears it out."""
    facts: dict[str, Any] = {}
    notes: list[str] = []
    work = Work(workers=1, fact=facts.__setitem__, note=notes.append)
    merge(base, experts, out, settings=MergeSettings(**settings), work=work)
    found, names = load(out), facts["unchanged"]
    for name, why in names.items():
        assert torch.equal(found[name], base[name].to(found[name].dtype))
        assert any(f"although experts differ ({why}): " in n and name in n for n in notes)
    return names


def cast(state: State, dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def opposed(dtype: torch.dtype) -> tuple[State, State, State]:
    """+1 and -1 in all of `odd` and of `one`, but +8 twice in the last entry of `one`."""
    base = {"w": torch.zeros(8, 4), "odd": torch.zeros(3, 2000), "one": torch.zeros(3, 2000)}
    base["still"] = torch.ones(2000)
    experts: list[State] = []
    for sign in (1, -1):
        state = {name: tensor + sign * (name in ("odd", "one")) for name, tensor in base.items()}
        state["w"] = torch.ones(8, 4)
        state["one"][2, 1999] = 8.0
        experts.append(cast(state, dtype))
    return cast(base, dtype), experts[0], experts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_changes_that_cancel(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, up, down = opposed(dtype)
    assert told(base, {"up": up, "down": down}, tmp_path / "out", method=method) == {
        "odd": CANCELLED
    }


def test_entries_that_the_majority_decides_do_show(tmp_path: Path) -> None:
    base, up, down = opposed(torch.float32)
    settings = {"method": "ties", "parameters": {"density": 1.0}}
    assert told(base, {"up": up, "down": down}, tmp_path / "out", **settings) == {}
    assert torch.equal(load(tmp_path / "out")["odd"], torch.ones(3, 2000))


def test_changes_that_are_trimmed(tmp_path: Path) -> None:
    base = {"w": torch.zeros(8, 4), "tiny": torch.zeros(4, 4)}
    x, y = ({"w": torch.full((8, 4), v), "tiny": torch.full((4, 4), 1e-3)} for v in (1.0, 2.0))
    names = told(base, {"x": x, "y": y}, tmp_path / "out", method="ties")
    assert names == {"tiny": CANCELLED}


def test_a_mean_that_is_rounded_away(tmp_path: Path) -> None:
    """Next to 256, bfloat16 has steps of 2: a third of one is none."""
    base = {"w": torch.zeros(8, 4), "large": torch.full((4, 4), 256.0)}
    others = base | {"w": torch.ones(8, 4)}
    x = {name: tensor.clone() for name, tensor in others.items()}
    x["large"][0, 0] = 258.0
    models = zip("xyz", (x, others, others), strict=True)
    experts = {name: cast(state, torch.bfloat16) for name, state in models}
    assert told(cast(base, torch.bfloat16), experts, tmp_path / "out") == {"large": ROUNDED}


@pytest.mark.parametrize("method", ["task_arithmetic", "wudi"])
def test_a_change_that_the_dtype_asked_for_cannot_hold(method: str, tmp_path: Path) -> None:
    base = {"w": torch.zeros(8, 4), "large": torch.full((4, 4), 256.0)}
    x = {"w": torch.ones(8, 4), "large": base["large"] + 2.0**-10 * torch.eye(4)}
    y = {"w": -2 * torch.eye(8, 4), "large": base["large"] - 2.0**-9 * torch.eye(4).flip(0)}
    settings = {"method": method, "dtype": "bfloat16"}
    assert told(base, {"x": x, "y": y}, tmp_path / "out", **settings) == {"large": ROUNDED}


def test_buffers_and_tensors_that_not_all_have(tmp_path: Path) -> None:
    base = {"w": torch.zeros(8, 4), "position_ids": torch.arange(4), "shape": torch.ones(4)}
    base |= {"h.attn.bias": torch.ones(1, 1, 2, 2), "same_ids": torch.arange(3), "s": torch.ones(2)}
    x = base | {"w": torch.ones(8, 4), "position_ids": torch.arange(4) + 1}
    y = base | {"w": torch.ones(8, 4), "h.attn.bias": torch.zeros(1, 1, 2, 2), "s": torch.zeros(2)}
    del x["h.attn.bias"]
    names = told(base, {"x": x, "y": y}, tmp_path / "out", method="ties", skip=("s",))
    assert names == {"h.attn.bias": ABSENT, "position_ids": unmerged("ties")}


def resnet_like(step: int) -> State:
    value = float(step)
    bn = {"bn.running_mean": torch.full((4,), value), "bn.running_var": torch.full((4,), 1 + value)}
    count = {"bn.num_batches_tracked": torch.tensor(step)}
    return {"conv.weight": torch.full((4, 3, 1, 1), value)} | bn | count


@pytest.mark.parametrize(
    ("settings", "mean"),
    [
        ({}, 4.0),  # of 2 and 6
        ({"expert_parameters": ({"weight": 3.0}, {"weight": 1.0})}, 3.0),
        ({"method": "task_arithmetic", "parameters": {"scale": 0.25}}, 2.0),  # half the base's 0
    ],
)
def test_batch_normalisation_is_averaged_by_weighted_means(settings, mean, tmp_path: Path) -> None:
    base, experts = resnet_like(0), {"x": resnet_like(2), "y": resnet_like(6)}
    names = told(base, experts, tmp_path / "out", **settings)
    found = load(tmp_path / "out")
    assert torch.equal(found["bn.running_mean"], torch.full((4,), mean))
    assert torch.equal(found["bn.running_var"], torch.full((4,), 1 + mean))
    method = settings.get("method", "average")
    assert names == {"bn.num_batches_tracked": unmerged(method)}
    notes = plan_merge(base, experts, MergeSettings(**settings)).notes
    assert any(
        "batch normalisation are averaged: bn.running_mean, bn.running_var" in n for n in notes
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ties"},
        {"method": "task_arithmetic"},  # 2 + 6 would be no mean
        {"method": "task_arithmetic", "expert_parameters": ({"weight": 1.0}, {"weight": -0.5})},
    ],
)
def test_batch_normalisation_stays_with_other_methods(settings, tmp_path: Path) -> None:
    base, experts = resnet_like(0), {"x": resnet_like(2), "y": resnet_like(6)}
    names = told(base, experts, tmp_path / "out", **settings)
    assert set(names) == {name for name in base if name.startswith("bn.")}
    notes = plan_merge(base, experts, MergeSettings(**settings)).notes
    assert any("batch normalisation are as in the base: bn.running_mean" in n for n in notes)


def test_batch_normalisation_without_a_base(tmp_path: Path) -> None:
    experts = {
        name: str(saved(resnet_like(s), tmp_path / name)) for name, s in (("x", 2), ("y", 6))
    }
    facts: dict[str, Any] = {}
    merge(None, experts, tmp_path / "out", work=Work(fact=facts.__setitem__))
    assert torch.equal(load(tmp_path / "out")["bn.running_var"], torch.full((4,), 5.0))
    assert facts["unchanged"] == {"bn.num_batches_tracked": unmerged("average")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_goes_on_tells_the_same(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each item: what earlier runs saw is told by the last."""
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 2000)
    monkeypatch.setattr(chunks, "ITEM_ENTRIES", 2000)
    base, up, down = opposed(dtype)
    paths = {name: saved(s, tmp_path / name) for name, s in (("b", base), ("u", up), ("d", down))}
    experts = {name: str(paths[name]) for name in "ud"}
    begun: list[int] = []

    def kill(_: str, done: int, __: int) -> None:
        begun.append(done)
        if len(begun) > 1:
            raise KeyboardInterrupt

    facts: dict[str, Any] = {}
    for _ in range(20):
        begun.clear()
        try:
            work = Work(workers=1, progress=kill, fact=facts.__setitem__)
            merge(str(paths["b"]), experts, tmp_path / "out", work=work)
        except KeyboardInterrupt:
            continue
        break
    assert facts["unchanged"] == {"odd": CANCELLED}
    assert torch.equal(load(tmp_path / "out")["one"], up["one"] * (up["one"] == 8))


def packed(base: State, expert: State, out: Path, **settings: Any) -> tuple[dict[str, str], State]:
    """What packing says is rebuilt as in the base, and what is rebuilt."""
    facts: dict[str, Any] = {}
    notes: list[str] = []
    work = Work(workers=1, fact=facts.__setitem__, note=notes.append)
    pack(base, {"x": expert}, out, settings=PackSettings(**settings), work=work)
    unpack(out, "x", out.with_name("rebuilt"), base=base)
    found, names = load(out.with_name("rebuilt")), facts["unchanged"][0]["x"]
    assert all(any("in the reference" in n and name in n for n in notes) for name in names)
    return names, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_that_the_base_s_dtype_cannot_tell(dtype: torch.dtype, tmp_path: Path) -> None:
    """Added to 16: 2^-7, where bfloat16 has steps of 2^-3; to 0 of `w` it does show."""
    base = cast({"big.weight": torch.full((8, 8), 16.0), "w.weight": torch.zeros(8, 8)}, dtype)
    pair = {"lora_A.weight": torch.full((1, 8), 2.0**-7), "lora_B.weight": torch.ones(8, 1)}
    factors = {f"{module}.{name}": t for module in ("big", "w") for name, t in pair.items()}
    factors |= {"big.alpha": torch.tensor(1.0), "w.alpha": torch.tensor(1.0)}
    names, found = packed(base, factors, tmp_path / "p", parameters={"rank_fraction": 1.0})
    why = "the decoded change is too small for its dtype"
    lost = dtype == torch.bfloat16
    assert names == ({"big.weight": why} if lost else {})
    assert torch.equal(found["big.weight"], base["big.weight"]) == lost
    assert not torch.equal(found["w.weight"], base["w.weight"])
    merged = told(base, {"x": factors, "y": factors}, tmp_path / "out")
    assert merged == ({"big.weight": ROUNDED} if lost else {})


def test_what_differs_by_the_expert_s_rounding_alone_is_not_told(tmp_path: Path) -> None:
    base = {"frozen": torch.full((8, 8), 1.001), "w": torch.zeros(8, 8)}
    expert = cast({"frozen": base["frozen"], "w": torch.eye(8)}, torch.bfloat16)
    for method in ("average", "wudi", "ties"):
        settings = {"method": method, "dtype": "bfloat16"}
        assert told(base, {"x": expert, "y": expert}, tmp_path / method, **settings) == {}
    names, _ = packed(base, expert, tmp_path / "p", parameters={"rank_fraction": 1.0})
    assert names == {}


def test_what_gets_no_rank_is_told(tmp_path: Path) -> None:
    base = {"small": torch.zeros(2, 2), "w": torch.zeros(64, 64)}
    expert = {"small": torch.eye(2), "w": torch.eye(64)}
    settings = {"parameters": {"rank_fraction": 0.1}}
    names, found = packed(base, expert, tmp_path / "p", **settings)
    assert names == {"small": "no rank, no entry or no bit was left for it"}
    assert torch.equal(found["small"], base["small"]) and not torch.equal(found["w"], base["w"])
