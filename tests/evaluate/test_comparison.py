"""A family's packs scored beside its experts, worked out again pack by pack."""

from statistics import fmean

import pytest

from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.evaluate import evaluate_checkpoint
from personae.evaluate.comparison import compare
from personae.packs.reader import Pack
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from toy_tasks import toy_text_family, toy_text_task

pytest.importorskip("transformers")
NAMES = ("a", "b", "u")
ROWS = {
    "DTS r=0.5": PackSettings(parameters={"rank_fraction": 0.5}),
    "DTS r=1": PackSettings(parameters={"rank_fraction": 1.0}),
    "SVD-diff": PackSettings(method="svd", vector="difference"),
    "TIES reference": PackSettings(method="bitdelta", vector="difference", reference="ties"),
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    family = toy_text_family(tmp_path_factory.mktemp("family"))
    tasks = [toy_text_task(name, seed) for seed, name in enumerate(NAMES)]
    packs, told = tmp_path_factory.mktemp("packs"), []
    records = compare(
        family / "base",
        {name: family / name for name in NAMES},
        tasks,
        {
            "individual": "individual",
            "weight averaging": MergeSettings(),
            "TIES": MergeSettings(method="ties"),
            **ROWS,
        },
        keep=packs,
        work=Work(workers=1),
        report=told.append,
    )
    assert told == records
    return family, tasks, packs, {one.method: one for one in records}


def test_rows_in_order(compared):
    assert list(compared[3]) == ["individual", "weight averaging", "TIES", *ROWS]


def test_individual_models_score_as_they_are(compared):
    family, tasks, _, records = compared
    scores = {task.name: evaluate_checkpoint(family / task.name, task) for task in tasks}
    assert records["individual"].scores == scores
    assert records["individual"].average == pytest.approx(fmean(scores.values()))
    assert records["individual"].adr == 0


def test_a_row_is_what_its_pack_alone_gives(compared, tmp_path):
    family, tasks, packs, records = compared
    experts = {name: family / name for name in NAMES}
    made = pack(family / "base", experts, tmp_path / "p", settings=ROWS["DTS r=1"])
    for task in tasks:
        rebuilt = unpack(made.directory, task.name, tmp_path / task.name)
        assert records["DTS r=1"].scores[task.name] == evaluate_checkpoint(rebuilt, task)
    assert (packs / "DTS-r=1").is_dir()
    assert 0 < records["DTS r=0.5"].amr_paper < records["DTS r=1"].amr_paper


def test_difference_vectors_from_the_average_are_packed_without_the_base(compared):
    # Heads have one shape in this family, and the base has none: beside it they are private.
    tasks = {row: Pack(compared[2] / row.replace(" ", "-")).manifest.tasks["a"] for row in ROWS}
    private = {row: "classifier.weight" in task.private for row, task in tasks.items()}
    assert private == {row: row != "SVD-diff" for row in ROWS}
