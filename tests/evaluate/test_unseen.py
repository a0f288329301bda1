"""Held-out tasks: who is asked for what, worked out again with models in memory."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import listing
from personae.commands.unpack import unpack
from personae.errors import RecipeError
from personae.evaluate import evaluate_checkpoint, evaluate_model, load_model
from personae.evaluate.unseen import compare_unseen, packed_rows, static_rows
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from toy_tasks import NAMES, toy_text_family, toy_text_task
from toys import load, perturb, toy_bert

pytest.importorskip("transformers")
SETTINGS = {
    "DTS-T r=0.5": PackSettings(parameters={"rank_fraction": 0.5}),
    "DTS-D r=0.5": PackSettings(parameters={"rank_fraction": 0.5}, vector="difference"),
    "EMR, same weighting": PackSettings(method="emr"),
}


class OneIsNear:
    """Texts of 'a' and 'u' are alike, and so are those of 'b' and 'v'; nothing else is."""

    name = "near"
    template = "{}"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[1.0, 0.0] if text[0] in "au" else [0.0, 1.0] for text in texts])


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_text_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def found(family, tmp_path_factory):
    tasks = [toy_text_task(name, seed) for seed, name in enumerate(NAMES)]
    return compare_unseen(
        family / "base",
        {name: family / name for name in NAMES},
        tasks,
        ["u", "v"],
        OneIsNear(),
        tmp_path_factory.mktemp("unseen"),
        statics={"weight averaging": MergeSettings(), "TIES": MergeSettings(method="ties")},
        packs=SETTINGS,
        work=Work(workers=1),
    )


def _with_encoder_of(family: Path, encoder: Path | dict[str, Tensor], name: str) -> float:
    """The score of a task's own head on another encoder, put together in memory."""
    task = toy_text_task(name, NAMES.index(name))
    model = load_model(family / name, task.model_class)
    state = encoder if isinstance(encoder, dict) else load_model(encoder, "AutoModel").state_dict()
    model.base_model.load_state_dict(state, strict=False)  # pyright: ignore
    return evaluate_model(model, task)


def test_rows_and_tasks(found):
    assert [one.method for one in found.records] == [
        "individual",
        "pre-trained (SVD, T-Switch)",
        "weight averaging",
        "TIES",
        "DTS-T r=0.5",
        "DTS-T r=0.5, equal weights",
        "DTS-D r=0.5",
        "DTS-D r=0.5, equal weights",
        "EMR (unified, no mask)",
        "EMR, same weighting",
    ]
    assert all(set(one.scores) == {"u", "v"} for one in found.records)
    rates = {one.method: one.amr_paper for one in found.records}
    assert rates["individual"] == 100 and rates["weight averaging"] == 0
    assert 0 < rates["DTS-T r=0.5"] < 100


def test_weights_come_from_class_names(found):
    assert found.weightings["u"].weights == pytest.approx({"a": 1, "b": 0})
    assert found.weightings["v"].weights == pytest.approx({"a": 0, "b": 1})
    assert found.weightings["u"].like == ("u0", "u1", "u2")


def test_what_is_scored(found, family, tmp_path):
    score = {one.method: one.scores for one in found.records}
    for name in "uv":
        task = toy_text_task(name, NAMES.index(name))
        assert score["individual"][name] == evaluate_checkpoint(family / name, task)
        assert score["pre-trained (SVD, T-Switch)"][name] == _with_encoder_of(
            family, family / "base", name
        )
    seen = [load_model(family / name, "AutoModel").state_dict() for name in "ab"]
    mean = {key: (seen[0][key] + seen[1][key]) / 2 for key in seen[0]}
    assert score["weight averaging"]["u"] == _with_encoder_of(family, mean, "u")
    base = load_model(family / "base", "AutoModel").state_dict()
    unified = {key: base[key] + _elected(base[key], [s[key] for s in seen]) for key in base}
    assert score["EMR (unified, no mask)"]["u"] == _with_encoder_of(family, unified, "u")


def _elected(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """EMR's unified vector (methods.md 5.4): of the sign of the sum, the largest magnitude."""
    vectors = torch.stack([expert - base for expert in experts])
    sign = torch.where(vectors.sum(dim=0) > 0, 1.0, -1.0)
    return sign * (vectors * sign).clamp(min=0).amax(dim=0)


def test_composed_rows_are_those_of_the_nearesttoy_text_task(family, found, tmp_path):
    from personae.commands.pack import pack

    experts = {name: family / name for name in "ab"}  # none of what is held out
    for row, settings in SETTINGS.items():
        made = pack(family / "base", experts, tmp_path / row, settings=settings)
        unpack(made.directory, "a", tmp_path / f"{row}-a", base=None)
        scores = next(one.scores for one in found.records if one.method == row)
        assert scores["u"] == _with_encoder_of(family, tmp_path / f"{row}-a", "u")


@pytest.mark.parametrize(
    ("hold_out", "text"),
    [(["x"], "no task 'x' to hold out"), ([], "0 of 2"), (["u", "a"], "2 of 2")],
)
def test_what_can_be_held_out(family, tmp_path, hold_out, text):
    tasks = [toy_text_task("a", 0), toy_text_task("u", 1)]
    with pytest.raises(RecipeError, match=text):
        compare_unseen(
            family / "base",
            {name: family / name for name in "au"},
            tasks,
            hold_out,
            OneIsNear(),
            tmp_path / "out",
            statics={},
            packs={},
            work=Work(workers=1),
        )
    assert listing(tmp_path) == {}


def test_heads_of_another_shape_than_the_base_s_are_left_out_of_merges(tmp_path):
    # The base has a head over five classes, one expert over five of its own, the others over three.
    for seed, (name, classes) in enumerate([("base", 5), ("a", 3), ("b", 5), ("u", 3)]):
        whole = toy_bert(tmp_path / f"whole-{name}", num_labels=classes)
        perturb(whole, tmp_path / name, seed=seed, scale=0.3)
    tasks = [toy_text_task(name, seed) for seed, name in enumerate("abu")]
    found = compare_unseen(
        tmp_path / "base",
        {name: tmp_path / name for name in "abu"},
        tasks,
        ["u"],
        OneIsNear(),
        tmp_path / "out",
        statics={"weight averaging": MergeSettings()},
        packs={"DTS-T": SETTINGS["DTS-T r=0.5"]},
        work=Work(workers=1),
    )
    assert [one.method for one in found.records][2:] == [
        "weight averaging",
        "DTS-T",
        "DTS-T, equal weights",
    ]
    base, merged = load(tmp_path / "base"), load(tmp_path / "out/weight-averaging")
    assert torch.equal(merged["classifier.weight"], base["classifier.weight"])
    biases = [load(tmp_path / name)["bert.pooler.dense.bias"] for name in "ab"]
    torch.testing.assert_close(merged["bert.pooler.dense.bias"], (biases[0] + biases[1]) / 2)


def test_the_rows_of_the_benchmark_are_settings_that_hold():
    assert static_rows()["weight averaging"].method == "average"
    rows = packed_rows()
    assert rows["DTS-D* 1%"].vector == "difference" and rows["DTS-D* 1%"].budget == "1%"
    for settings in rows.values():
        settings.codec()
