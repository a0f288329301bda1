"""Suites: what they say is done, what is wrong with them is said at once, work is done once."""

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from personae import MergeSettings, PackSettings, evaluate_suite, read_suite
from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.errors import RecipeError
from personae.evaluate import comparison, evaluate_checkpoint
from personae.evaluate.merged import attach_head
from toy_suites import CLASSES, SUITE, sentence, toy_suite
from toys import load


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    toy_suite(folder)
    return folder


@pytest.fixture
def suite(family: Path):
    """Writes a suite beside the family."""

    def write(text: str) -> Path:
        path = family / "suite.yaml"
        path.write_text(text, "utf-8")
        return path

    return write


def test_what_a_suite_says(suite, family):
    read = read_suite(suite(SUITE))
    assert list(read.experts) == ["a", "b"] and read.base == family / "base"
    assert read.rows["TIES"] == MergeSettings(method="ties", parameters={"density": 0.5})
    assert read.rows["DTS"] == PackSettings(parameters={"rank_fraction": 0.5})
    first, second = read.tasks
    assert (first.metric, second.metric) == ("accuracy", "matthews")
    assert first.classes == tuple(CLASSES)
    assert first.test["labels"].tolist() == [n % 3 for n in range(24)]
    # [CLS] is 2, [SEP] 3, w0 5; of sentence(0), that is w1 w2 w3
    assert sentence(0) == "w1 w2 w3"
    assert first.test["input_ids"][0].tolist() == [2, 6, 7, 8, 3, 0, 0, 0]


def test_each_row_is_what_its_own_command_makes(suite, family, tmp_path):
    records = {one.method: one for one in evaluate_suite(suite(SUITE), cache=tmp_path / "cache")}
    read = read_suite(family / "suite.yaml")
    experts, rows = dict(read.experts), cast("dict[str, Any]", read.rows)
    merged = merge(read.base, experts, tmp_path / "m", settings=rows["TIES"])
    made = pack(read.base, experts, tmp_path / "p", settings=rows["DTS"])
    for task in read.tasks:
        individual = evaluate_checkpoint(experts[task.name], task)
        assert records["individual"].scores[task.name] == individual
        for name, model in (("base", read.base), ("TIES", merged)):
            (tmp_path / name / task.name).mkdir(parents=True)
            attach_head(read.base, model, experts[task.name], tmp_path / name / task.name)
            score = evaluate_checkpoint(tmp_path / name / task.name, task)
            assert records[name].scores[task.name] == score
        rebuilt = unpack(made.directory, task.name, tmp_path / f"u-{task.name}")
        assert records["DTS"].scores[task.name] == evaluate_checkpoint(rebuilt, task)
    amr = made.tasks["a"].amr.on_disk + made.tasks["b"].amr.on_disk
    assert records["DTS"].amr_on_disk == pytest.approx(amr / 2)
    assert records["TIES"].amr_on_disk == 0 and records["individual"].amr_paper == 100
    for one in records.values():
        low, high = one.interval or (1, 0)
        assert low <= one.average <= high
    assert records["TIES"].seconds and records["individual"].seconds is None
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_nothing_is_computed_twice(suite, tmp_path, monkeypatch):
    """Interrupted before the sixth of eight predictions; the second run does these three alone."""
    asked: list[str] = []
    predict = comparison.predict

    def counted(model, task, examples, *, work, stage):
        if len(asked) == 5 and "stop" in flags:
            raise KeyboardInterrupt
        asked.append(stage)
        return predict(model, task, examples, work=work, stage=stage)

    merges: list[int] = []
    merging = comparison.merge
    monkeypatch.setattr(comparison, "predict", counted)
    monkeypatch.setattr(comparison, "merge", lambda *a, **k: (merges.append(1), merging(*a, **k)))
    flags = {"stop"}
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(suite(SUITE), cache=tmp_path)
    assert asked[-1] == "TIES: a" and len(merges) == 1
    flags.clear()
    records = evaluate_suite(suite(SUITE), cache=tmp_path)
    assert asked[5:] == ["TIES: b", "DTS: a", "DTS: b"]
    assert len(merges) == 1  # the model was there still
    assert evaluate_suite(suite(SUITE), cache=tmp_path) == records and len(asked) == 8
    # Another metric needs no other answers; other parameters do.
    evaluate_suite(suite(SUITE.replace("matthews", "accuracy")), cache=tmp_path)
    assert len(asked) == 8
    evaluate_suite(suite(SUITE.replace("density: 0.5", "density: 0.3")), cache=tmp_path)
    assert asked[8:] == ["TIES: a", "TIES: b"]


def test_other_weights_are_other_models(family, tmp_path):
    shutil.copytree(family, tmp_path / "f")
    (tmp_path / "f/suite.yaml").write_text(SUITE, "utf-8")
    first = evaluate_suite(tmp_path / "f/suite.yaml", cache=tmp_path / "cache")
    from safetensors.torch import save_file

    file = tmp_path / "f/a/model.safetensors"
    state = load(tmp_path / "f/a")
    state["classifier.bias"] = torch.tensor([0.0, 1000.0, 0.0])
    save_file(state, file, metadata={"format": "pt"})
    again = evaluate_suite(tmp_path / "f/suite.yaml", cache=tmp_path / "cache")
    assert again[0].scores["a"] == pytest.approx(8 / 24)  # always "middle"
    assert again[0].scores["b"] == first[0].scores["b"]


def faults(path: Path) -> str:
    with pytest.raises(RecipeError) as raised:
        read_suite(path)
    return str(raised.value)


def test_every_fault_at_once_with_its_line(suite):
    text = SUITE.replace("method: ties", "method: tees").replace("metric: matthews", "metric: f2")
    text = text.replace("- individual", "- individual\n  - {preset: statik}")
    told = faults(suite(text.replace("  - name: a\n", "  - name: c\n")))
    assert told.startswith("The suite ") and "is wrong in 4 places" in told
    assert "line 7: There is no model 'c' whose task this could be." in told
    assert "line 8: Task 'b': Unknown metric 'f2'. Did you mean 'f1'?" in told
    assert "line 12: Unknown preset 'statik'. Did you mean 'static'?" in told
    assert "line 15: Unknown method 'tees'. Did you mean 'ties'?" in told


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("splits: {test: test}", "splits: {test: nowhere}", "There is no 'nowhere' in "),
        ("splits: {test: test}", "columns: {text: tekst}", "no column 'tekst' for the text"),
        ("splits: {test: test}", "splits: {train: train}", "No split named test"),
        ("[low, middle, high]", "[low, high]", "has 3 outputs, and there are 2 classes"),
        ("[low, middle, high]", "[low, middle, low]", "Two classes are named 'low'"),
        ("metric: matthews", "metric: pearson", "pearson scores numbers"),
        ("metric: matthews", "metric: f1", "f1 is of two classes, and there are 3"),
        ("metric: matthews", "model_class: AutoModelForSequenzClassification", "no class"),
        ("metric: matthews", "problem: text_regression", "3 outputs, and a number is one output"),
        ("{model: b}", "{model: gone}", "There is no checkpoint directory at "),
        ("rank_fraction: 0.5", "rank_fraktion: 0.5", "Did you mean 'rank_fraction'?"),
        ("density: 0.5", "density: 5", "density"),
        ("- individual", "- indivdual", "methods.0"),
        ("name: TIES", "name: base", "Two methods are named 'base'"),
        ("merge: {", "base: true\n    merge: {", "a method is one of"),
        ("tasks:\n", "taks:\n", "Did you mean 'tasks'?"),
    ],
)
def test_what_is_refused(suite, old, new, told):
    assert old in SUITE
    found = faults(suite(SUITE.replace(old, new)))
    assert told in found and "line " in found


def test_labels_beyond_the_head_are_refused(suite, family):
    data = family / "data" / "wide"
    data.mkdir(exist_ok=True)
    (data / "test.jsonl").write_text('{"text": "w1", "label": 3}\n{"text": "w1", "label": "hi"}\n')
    told = faults(suite(SUITE.replace('"data/{name}"', "data/wide")))
    assert "labels '3', 'hi' are outside the range of the head, which has 3 classes" in told
    (data / "test.jsonl").write_text("")
    told = faults(suite(SUITE.replace('"data/{name}"', "data/wide")))
    assert "The split 'test' of data/wide, test is empty" in told


def test_what_the_hub_does_not_give_is_named(suite):
    """HF_HUB_OFFLINE is set in tests."""
    hub = SUITE.replace('source: "data/{name}"', "source: nyu-mll/glue, config: cola")
    told = faults(suite(hub))
    assert "The data set nyu-mll/glue (cola), split 'test', cannot be had" in told
    assert "datasets.load_dataset('nyu-mll/glue', 'cola')" in told
    told = faults(suite(SUITE.replace("{model: b}", "{model: some-org/some-model, name: b}")))
    assert "hf download some-org/some-model" in told
