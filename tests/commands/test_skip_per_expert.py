"""In a mixed family `skip` leaves a tensor out of the experts that lack it, and of these alone."""

import json
from pathlib import Path

import pytest
import torch

from families import State, saved, small_base, tuned
from personae.commands.merge import merge
from personae.commands.pack import add_tasks, pack
from personae.commands.pack_plan import plan_pack
from personae.commands.unpack import unpack
from personae.commands.verify import verify
from personae.errors import PackError
from personae.packs.manifest import MANIFEST_NAME, checksum
from personae.packs.reader import Pack
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from toys import load

HEAD = {"lm_head.weight": torch.linspace(-1, 1, 20 * 16).reshape(20, 16)}
BASE = small_base() | HEAD
TUNED = tuned(BASE, 1)
LACKING = {name: tensor for name, tensor in tuned(BASE, 2).items() if name not in HEAD}
OTHER = tuned(BASE, 3) | {"lm_head.weight": torch.ones(3, 16)}
SKIP = ("lm_head.*",)


def settings(method: str = "svd", **more: object) -> PackSettings:
    whole = {"rank_fraction": 1.0} if method in ("svd", "dts") else {}
    return PackSettings.model_validate(
        {"method": method, "parameters": whole, "skip": SKIP, **more}
    )


def rebuilt(folder: Path, task: str, base: object) -> State:
    return load(unpack(folder, task, folder.parent / f"{folder.name}-{task}", base=base))


def test_what_one_expert_lacks_is_coded_in_the_others(tmp_path: Path):
    notes: list[str] = []
    base = saved(BASE, tmp_path / "base")
    experts = {"tuned": TUNED, "lacking": LACKING, "other": OTHER}
    made = pack(base, experts, tmp_path / "p", settings=settings(), work=Work(note=notes.append))
    told = "coded although 'skip' matches them, because only other experts lack them"
    assert f"tuned: {told}: lm_head.weight" in notes
    assert sum(told in note for note in notes) == 1
    assert f"tuned: {told}: lm_head.weight" in plan_pack(base, experts, settings()).notes
    spared = {name: task.spared for name, task in made.manifest.tasks.items()}
    assert spared == {"tuned": ("lm_head.weight",), "lacking": (), "other": ()}
    out = rebuilt(tmp_path / "p", "tuned", base)
    torch.testing.assert_close(out["lm_head.weight"], TUNED["lm_head.weight"])
    assert not rebuilt(tmp_path / "p", "lacking", base).keys() & HEAD.keys()
    assert torch.equal(rebuilt(tmp_path / "p", "other", base)["lm_head.weight"], *HEAD.values())
    verify(tmp_path / "p", base=base, against=experts)


@pytest.mark.parametrize("experts", [{"a": TUNED}, {"a": TUNED, "b": tuned(BASE, 4)}])
def test_what_all_have_is_skipped_in_all(tmp_path: Path, experts: dict[str, State]):
    pack(BASE, experts, tmp_path / "p", settings=settings())
    manifest = json.loads((tmp_path / "p" / MANIFEST_NAME).read_text())
    assert all("spared" not in task for task in manifest["tasks"].values())
    assert manifest["format_version"] == 1
    assert torch.equal(rebuilt(tmp_path / "p", "a", BASE)["lm_head.weight"], *HEAD.values())


@pytest.mark.parametrize("method", ["emr", "tall_mask", "t_switch", "dts"])
def test_with_every_way_to_share(tmp_path: Path, method: str):
    """What is shared of a tensor is made from those that have it: here of one, so it is exact."""
    experts = {"tuned": TUNED, "lacking": LACKING}
    pack(BASE, experts, tmp_path / "p", settings=settings(method))
    found = rebuilt(tmp_path / "p", "tuned", BASE)["lm_head.weight"]
    before = (TUNED["lm_head.weight"] - HEAD["lm_head.weight"]).norm()
    assert (TUNED["lm_head.weight"] - found).norm() < 0.9 * before
    verify(tmp_path / "p", base=BASE, against=experts)


def test_difference_vectors(tmp_path: Path):
    base, experts = saved(BASE, tmp_path / "base"), {"tuned": TUNED, "lacking": LACKING}
    pack(base, experts, tmp_path / "p", settings=settings(vector="difference"))
    reference = load(tmp_path / "p/reference")
    assert torch.equal(reference["lm_head.weight"], *HEAD.values())
    out = rebuilt(tmp_path / "p", "tuned", None)
    torch.testing.assert_close(out["lm_head.weight"], TUNED["lm_head.weight"])
    verify(tmp_path / "p", against=experts)


@pytest.mark.parametrize("first", [{"lacking": LACKING}, {"lacking": LACKING, "x": TUNED}])
def test_a_task_that_is_added_to_one_that_lacks_it(tmp_path: Path, first: dict[str, State]):
    added = tuned(BASE, 5)
    pack(BASE, first, tmp_path / "p", settings=settings())
    add_tasks(tmp_path / "p", {"added": added}, base=BASE)
    out = rebuilt(tmp_path / "p", "added", BASE)
    torch.testing.assert_close(out["lm_head.weight"], added["lm_head.weight"])
    assert Pack(tmp_path / "p").task("added").spared == ("lm_head.weight",)


def test_buffers_that_loaders_make_need_no_code(tmp_path: Path):
    mask = {"h.0.attn.bias": torch.ones(1, 1, 6, 6).tril()}
    experts = {"a": TUNED | mask, "b": TUNED | {"layer.bias": torch.ones(16)}}
    made = pack(BASE | mask, experts, tmp_path / "p", settings=settings(skip=("*.attn.bias",)))
    assert [task.spared for task in made.manifest.tasks.values()] == [(), ()]


@pytest.mark.parametrize(
    ("spared", "told"),
    [
        (["lm_head.weight", "lm_head.weight"], "spared names a tensor twice"),
        (["nothing"], "the reference has no 'nothing'"),
        ([1], "tasks.tuned.spared.0: Input should be a valid string"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, spared: list[object], told: str):
    pack(BASE, {"tuned": TUNED, "lacking": LACKING}, tmp_path / "p", settings=settings())
    path = tmp_path / "p" / MANIFEST_NAME
    content = json.loads(path.read_text())
    del content["checksum"]
    content["tasks"]["tuned"]["spared"] = spared
    path.write_text(json.dumps(content | {"checksum": checksum(content)}))
    with pytest.raises(PackError, match=told):
        unpack(tmp_path / "p", "tuned", tmp_path / "out", base=BASE)


def test_a_tensor_is_absent_or_spared(tmp_path: Path):
    pack(BASE, {"tuned": TUNED, "lacking": LACKING}, tmp_path / "p", settings=settings())
    path = tmp_path / "p" / MANIFEST_NAME
    content = json.loads(path.read_text())
    assert content["format_version"] == 2
    del content["checksum"]
    content["tasks"]["lacking"]["spared"] = ["lm_head.weight"]
    path.write_text(json.dumps(content | {"checksum": checksum(content)}))
    with pytest.raises(PackError, match=r"'lm_head.weight' is absent, and yet told of"):
        Pack(tmp_path / "p")


def test_a_merge_leaves_it_as_in_the_base_and_says_so(tmp_path: Path):
    notes: list[str] = []
    experts = {"tuned": TUNED, "lacking": LACKING}
    merge(
        BASE,
        experts,
        tmp_path / "m",
        settings=MergeSettings(skip=SKIP),
        work=Work(note=notes.append),
    )
    assert torch.equal(load(tmp_path / "m")["lm_head.weight"], *HEAD.values())
    assert "left as in the base: lm_head.weight" in notes
