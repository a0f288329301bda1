"""Difference vectors where nobody has the base: the reference is the average of the experts."""

import pytest
import torch

from families import State, saved, small_base, tuned
from personae.commands.pack import add_tasks, pack
from personae.commands.pack_plan import plan_pack
from personae.commands.unpack import unpack
from personae.commands.verify import verify
from personae.errors import CheckpointError, RecipeError
from personae.methods import CODECS
from personae.recipe import PackSettings
from toys import load

BASE = small_base() | {"layers.0.attn.weight": torch.zeros(40, 30)}


def _experts() -> dict[str, State]:
    """Three experts with heads of their own, two of one shape and one of another."""
    experts = {name: tuned(BASE, seed) for seed, name in enumerate("xyz", 1)}
    for number, (name, expert) in enumerate(experts.items(), 2):
        experts[name] = expert | {"head.weight": torch.full((number, 16), float(number))}
    experts["z"]["only.z"] = torch.arange(4.0)
    return experts


EXPERTS = _experts()
DIFFERENCE = PackSettings(vector="difference")


@pytest.mark.parametrize("method", sorted(CODECS))
def test_every_codec_packs_difference_vectors(method, tmp_path):
    settings = PackSettings(method=method, vector="difference")
    made = pack(None, EXPERTS, tmp_path / "p", settings=settings)
    merged = load(tmp_path / "p/reference")
    assert merged.keys() == BASE.keys()
    for name in merged:
        if merged[name].is_floating_point():
            mean = sum(expert[name] for expert in EXPERTS.values()) / 3
            torch.testing.assert_close(merged[name], mean, rtol=1e-5, atol=1e-7)
    for task, expert in EXPERTS.items():
        assert "head.weight" in made.task(task).private
        rebuilt = load(unpack(tmp_path / "p", task, tmp_path / task))
        assert rebuilt.keys() == expert.keys()
        assert torch.equal(rebuilt["head.weight"], expert["head.weight"])
    assert list(made.task("z").private) == ["head.weight", "only.z"]
    assert made.manifest.reference.method == "average"
    verify(tmp_path / "p", against=EXPERTS)


def test_the_same_as_with_a_base_up_to_rounding(tmp_path):
    plain = {name: {k: e[k] for k in BASE} for name, e in EXPERTS.items()}
    for base, name in ((None, "without"), (BASE, "with")):
        settings = PackSettings(
            vector="difference", parameters={"decomposition": False, "thresholding": False}
        )
        pack(base, plain, tmp_path / name, settings=settings)
        unpack(tmp_path / name, "y", tmp_path / f"{name}-y")
    one, other = load(tmp_path / "without-y"), load(tmp_path / "with-y")
    for name in BASE:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_task_vectors_need_a_base(tmp_path):
    with pytest.raises(RecipeError, match="Task vectors need the base: give it"):
        pack(None, EXPERTS, tmp_path / "p")
    settings = PackSettings(vector="difference", reference="wudi")
    with pytest.raises(RecipeError, match="wudi merges task vectors, which need the base"):
        pack(None, EXPERTS, tmp_path / "p", settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_one_expert_is_its_own_average(tmp_path):
    lone = {"x": {name: EXPERTS["x"][name] for name in BASE}}
    with pytest.raises(RecipeError, match="A single expert equals its own average"):
        pack(None, lone, tmp_path / "p", settings=DIFFERENCE)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("method", "names", "told"),
    [
        ("tall_mask", "xyz", "keeps that average for every task"),
        ("emr", "xy", "keeps half of each vector"),
        ("emr", "xyz", ""),
        ("dts", "xy", ""),
    ],
)
def test_a_codec_that_loses_its_point_there_says_so(method, names, told):
    experts = {name: EXPERTS[name] for name in names}
    settings = PackSettings(method=method, vector="difference")
    notes = "".join(plan_pack(None, experts, settings).notes)
    against_ties = plan_pack(BASE, experts, settings.model_copy(update={"reference": "ties"})).notes
    assert told in notes
    assert ("keeps" in notes) == bool(told)
    assert not any("keeps" in note for note in against_ties)


def test_tall_mask_rebuilds_the_average(tmp_path):
    settings = PackSettings(method="tall_mask", vector="difference")
    pack(None, EXPERTS, tmp_path / "p", settings=settings)
    merged = load(tmp_path / "p/reference")
    rebuilt = load(unpack(tmp_path / "p", "x", tmp_path / "x"))
    for name in merged:
        torch.testing.assert_close(rebuilt[name], merged[name], rtol=1e-5, atol=1e-6)


def test_values_that_are_not_finite_are_told(tmp_path):
    bad = EXPERTS | {"y": EXPERTS["y"] | {"layer.bias": torch.full((16,), torch.nan)}}
    with pytest.raises(CheckpointError, match=r"Expert 'y': tensor 'layer.bias' holds 16 value"):
        pack(None, bad, tmp_path / "p", settings=DIFFERENCE)


def test_a_task_is_added_to_such_a_pack(tmp_path):
    two = {name: EXPERTS[name] for name in "xy"}
    pack(None, two, tmp_path / "p", settings=DIFFERENCE)
    add_tasks(tmp_path / "p", {"z": EXPERTS["z"]})
    verify(tmp_path / "p", against=EXPERTS)


def test_directories_and_a_plan(tmp_path):
    sources = {n: str(saved(e, tmp_path / n, f'{{"of": "{n}"}}')) for n, e in EXPERTS.items()}
    planned = plan_pack(None, sources, DIFFERENCE)
    pack(None, sources, tmp_path / "p", settings=DIFFERENCE)
    files = [path for path in (tmp_path / "p").rglob("*.safetensors")]
    assert sum(path.stat().st_size for path in files) <= planned.bytes_out
    assert (tmp_path / "p/reference/config.json").read_text() == '{"of": "x"}'
    rebuilt = unpack(tmp_path / "p", "y", tmp_path / "out")
    assert (rebuilt / "config.json").read_text() == '{"of": "y"}'
