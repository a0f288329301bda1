"""tune: a search finds what is best by construction, again in the same order, and writes it."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("optuna")

from personae import PackSettings, evaluate_suite, read_suite, tune_suite
from personae.commands.merge import merge
from personae.errors import OutputError, RecipeError
from personae.evaluate import comparison
from personae.evaluate.search import PRESETS
from personae.recipe import read_merge_recipe, read_recipe
from toy_suites import SUITE, sentence, toy_suite
from toys import load

BEST = 0.7
SPLITS = "splits: {test: test}"
SEARCHED = (
    SUITE.replace(SPLITS, "splits: {test: test, validation: validation}").replace(
        "metric: matthews", "metric: accuracy"
    )
    + """\
search:
  merge: {method: task_arithmetic}
  parameters:
    scale: {from: 0.1, to: 1.3, step: 0.2}
"""
)
RANGE = "{from: 0.1, to: 1.3, step: 0.2}"
TIES = """\
search:
  merge: {method: ties}
  parameters:
    scale: [0.5, 1.0, 1.5, 2.0]
    density: [0.2, 0.5, 0.8]
"""


def searching(text: str) -> str:
    return SEARCHED[: SEARCHED.index("search:")] + text


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    """Answers tell the scale: "low" below 0.6, "middle" up to 0.8, above it "high".

    Poolers are 0 but for one bias, 0 in the base and 1 in each expert, so that merged models have
    2 · scale there, whatever the text. The logits are three lines over its tanh, which cross at
    both bounds. All validation labels are "middle".
    """
    folder = tmp_path_factory.mktemp("family")
    toy_suite(folder)
    low, high = math.tanh(2 * 0.6), math.tanh(2 * 0.8)
    for name, prefix in (("base", ""), ("a", "bert."), ("b", "bert.")):
        state = load(folder / name)
        for part in ("weight", "bias"):
            state[f"{prefix}pooler.dense.{part}"].zero_()
        if name != "base":
            state["bert.pooler.dense.bias"][0] = 1.0
            state["classifier.weight"].zero_()[:, 0] = torch.tensor([0.0, 1.0, 2.0])
            state["classifier.bias"].copy_(torch.tensor([0.0, -low, -low - high]))
            rows = [{"text": sentence(n + 200), "label": 1} for n in range(12)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data" / name / "validation.jsonl").write_text(lines, "utf-8")
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def suite(family: Path):
    def write(text: str = SEARCHED) -> Path:
        (family / "suite.yaml").write_text(text, "utf-8")
        return family / "suite.yaml"

    return write


def test_a_grid_finds_what_is_best_by_construction(suite, family, cache, tmp_path):
    tuned = tune_suite(suite(), tmp_path / "out" / "tuned.yaml", sampler="grid", cache=cache)
    tried = [one.parameters["scale"] for one in tuned.trials]
    assert tried == [0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3]
    assert tuned.best.parameters == {"scale": BEST}
    assert [one.scores for one in tuned.trials] == [
        dict.fromkeys("ab", 1.0 if scale == BEST else 0.0) for scale in tried
    ]
    assert tuned.best.average == 1.0
    recipe = read_merge_recipe(tmp_path / "out" / "tuned.yaml")
    assert recipe.settings.parameters == {"scale": BEST} and list(recipe.experts) == ["a", "b"]
    merged = merge(recipe.base, recipe.experts, tmp_path / "merged", settings=recipe.settings)
    assert load(merged)["pooler.dense.bias"][0].item() == pytest.approx(2 * BEST)
    text = (tmp_path / "out" / "tuned.yaml").read_text("utf-8")
    assert "# Best of 7 trials of personae tune, sampler grid" in text
    assert "# Validation: average 100.00 % (a 100.00, b 100.00)" in text


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_gives_the_same_trials(suite, tmp_path, cache, sampler, monkeypatch):
    """The second run finds all that it asks for in the cache."""
    asked: list[str] = []
    making = comparison.merge
    monkeypatch.setattr(comparison, "merge", lambda *a, **k: (asked.append(""), making(*a, **k)))
    path = suite(searching(TIES))
    options = {"trials": 5, "sampler": sampler, "cache": cache}
    first = tune_suite(path, seed=1, **options)
    assert 2 <= len(first.trials) <= 5
    count = len(asked)
    assert tune_suite(path, seed=1, **options) == first and len(asked) == count
    assert [t.parameters for t in tune_suite(path, seed=2, **options).trials] != [
        t.parameters for t in first.trials
    ]


def test_an_interrupted_search_goes_on(suite, tmp_path, monkeypatch):
    made: list[dict] = []
    making = comparison.merge

    def counted(*arguments, settings, **rest):
        if len(made) == 2 and "stop" in flags:
            raise KeyboardInterrupt
        made.append(settings.parameters)
        return making(*arguments, settings=settings, **rest)

    monkeypatch.setattr(comparison, "merge", counted)
    flags = {"stop"}
    path = suite(SEARCHED.replace(RANGE, "[0.6, 0.2, 0.4]"))
    with pytest.raises(KeyboardInterrupt):
        tune_suite(path, sampler="grid", cache=tmp_path)
    flags.clear()
    tuned = tune_suite(path, sampler="grid", cache=tmp_path)
    assert [one["scale"] for one in made] == [0.2, 0.4, 0.6]
    assert [one.parameters["scale"] for one in tuned.trials] == [0.2, 0.4, 0.6]


def test_any_number_of_a_span_is_tried(suite, cache):
    path = suite(SEARCHED.replace(RANGE, "{from: 0.25, to: 0.75}"))
    tuned = tune_suite(path, trials=3, sampler="random", cache=cache)
    tried = [one.parameters["scale"] for one in tuned.trials]
    assert len({*tried}) == 3 and all(0.25 <= one <= 0.75 for one in tried)


def test_a_codec_is_tuned_with_one_decomposition_for_all(suite, family, tmp_path, monkeypatch):
    packs: list[int] = []
    packing = comparison.pack_many

    def counted(base, experts, many, **rest):
        packs.append(len(many))
        return packing(base, experts, many, **rest)

    monkeypatch.setattr(comparison, "pack_many", counted)
    text = "search: {pack: {method: dts}, parameters: {rank_fraction: [0.25, 0.5, 1.0]}}\n"
    out = family / "tuned" / "pack.yaml"
    tuned = tune_suite(suite(searching(text)), out, sampler="grid", cache=tmp_path)
    assert packs == [3] and len(tuned.trials) == 3
    recipe = read_recipe(out)
    assert recipe.settings == tuned.settings
    assert recipe.settings == PackSettings(parameters=tuned.best.parameters)
    said = yaml.safe_load(out.read_text("utf-8"))
    assert said["base_model"] == "../base" and said["models"][0] == {"model": "../a", "name": "a"}


def test_heads_and_all_else_that_stays_are_in_the_recipe(suite, family, cache, tmp_path):
    text = "search: {merge: {method: ties, skip: ['*.bias']}, parameters: {scale: [1.5]}}\n"
    path = suite(searching(text).replace("task_defaults", "heads: ['pooler.*']\ntask_defaults"))
    out = family / "heads.yaml"
    tune_suite(path, out, sampler="grid", cache=cache)
    said = yaml.safe_load(out.read_text("utf-8"))
    assert {"*.bias", "pooler.*"} <= {*said["skip"]}
    assert said["parameters"] == {"scale": 1.5} and said["base_model"] == "base"
    with pytest.raises(OutputError, match="is there already"):
        tune_suite(path, out, sampler="grid", cache=cache)
    tune_suite(path, out, sampler="grid", cache=cache, overwrite=True)


def test_the_presets_are_those_of_the_paper(suite):
    """DRM's appendix: scale 0.1 to 1.0 of task arithmetic; else 0.8 to 1.5 and density."""
    tenths = [n / 10 for n in range(1, 11)]
    ours = {"scale": [0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "density": tenths}
    for method, expected in (
        ("task_arithmetic", {"scale": tenths}),
        ("drm", ours),
        ("tsv_m", {"scale": ours["scale"]}),
    ):
        read = read_suite(
            suite(searching(f"search: {{merge: {{method: {method}}}, preset: drm-paper}}\n"))
        )
        assert read.search is not None
        assert {name: list(choice) for name, choice in read.search.choices.items()} == expected
    text = "search: {merge: {method: ties}, preset: drm-paper, parameters: {density: [0.3]}}\n"
    read = read_suite(suite(searching(text)))
    assert read.search is not None and read.search.choices["density"] == (0.3,)
    assert [*PRESETS] == ["drm-paper"]


def test_parameters_that_cannot_be_together_are_left_out(suite, cache):
    """della keeps entries with probabilities density ± epsilon / 2, which have to be in [0, 1]."""
    choices = "density: [0.05, 0.5], epsilon: [0.05, 0.9]"
    path = suite(searching(f"search: {{merge: {{method: della}}, parameters: {{{choices}}}}}\n"))
    tuned = tune_suite(path, sampler="grid", cache=cache)
    tried = [tuple(one.parameters.values()) for one in tuned.trials]
    assert tried == [(0.05, 0.05), (0.5, 0.05), (0.5, 0.9)]
    tuned = tune_suite(path, trials=6, sampler="tpe", cache=cache)
    assert (0.05, 0.9) not in [tuple(one.parameters.values()) for one in tuned.trials]
    never = searching(f"search: {{merge: {{method: della}}, parameters: {{{choices}}}}}\n")
    with pytest.raises(RecipeError, match="can be together: della"):
        tune_suite(suite(never.replace(", 0.5]", "]").replace("[0.05, 0.9]", "[0.9]")), trials=2)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("scale: {", "skale: {", "task_arithmetic has no parameter 'skale'. Did you mean 'scale'?"),
        (RANGE, "0.5", "scale = 0.5: expected a list of values, or {from, to, step}"),
        (RANGE, "[]", "scale = []: expected a list of values, or {from, to, step}"),
        (RANGE, "[[1]]", "scale = [1]: expected single values in the list"),
        (RANGE, "[high]", "scale = 'high'"),
        (RANGE, "{from: 0.1, too: 1}", "Unknown key 'too' of scale. Did you mean 'to'?"),
        (RANGE, "{from: 0.1}", "expected numbers from and to"),
        (RANGE, "{from: 0.1, to: much}", "expected numbers from and to"),
        (RANGE, "{from: 1, to: 0.1}", "scale goes from 1 to 0.1"),
        (RANGE, "{from: 0, to: 1, step: 0}", "expected a step above 0"),
        (RANGE, "{from: 0, to: 1, step: 1e-9}", "scale has 1,000,000,001 values"),
        ("method: task_arithmetic", "method: ties", None),
        ("method: task_arithmetic", "method: tees", "Unknown method 'tees'. Did you mean 'ties'?"),
        ("method: task_arithmetic", "parameters: {scale: 1}", "has no parameter 'scale'"),
        (
            "method: task_arithmetic",
            "method: ties, parameters: {scale: 1}",
            "scale is both searched and given a value",
        ),
        ("  merge: {method: task_arithmetic}\n", "", "give merge or pack"),
        ("search:\n", "search:\n  pack: {}\n", "give merge or pack"),
        ("search:\n", "search:\n  preset: drm\n", "Unknown preset 'drm'. Did you mean 'drm-pape"),
        ("search:\n", "search:\n  sampler: tpe\n", "Unknown key 'search.sampler'"),
        (f"  parameters:\n    scale: {RANGE}\n", "", "Nothing is searched. Give parameters"),
    ],
)
def test_what_is_refused_with_its_line(suite, old, new, told):
    assert old in SEARCHED
    path = suite(SEARCHED.replace(old, new))
    if told is None:
        read_suite(path)
        return
    with pytest.raises(RecipeError) as raised:
        read_suite(path)
    assert told in str(raised.value) and "line " in str(raised.value)


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ("density: [0.5, 5]", "density = 5"),
        ("density: {from: 0.5, to: 1.5}", "density = 1.5"),
        ("density: {from: 0, to: 1, step: 0.5}", "density = 0"),
        ("scope: [model, tensors]", "scope = 'tensors'"),
    ],
)
def test_values_out_of_range_are_refused_before_work(suite, parameters, told):
    text = f"search: {{merge: {{method: ties}}, parameters: {{{parameters}}}}}\n"
    with pytest.raises(RecipeError) as raised:
        read_suite(suite(searching(text)))
    assert told in str(raised.value)


def test_a_whole_number_is_no_span(suite):
    text = "search: {merge: {method: dare}, parameters: {seed: {from: 1, to: 3}}}\n"
    with pytest.raises(RecipeError, match=r"seed = 1\.76\d*: Input should be a valid integer"):
        read_suite(suite(searching(text)))
    read = read_suite(suite(searching(text.replace("3}", "3, step: 1}"))))
    assert read.search is not None and read.search.choices["seed"] == (1, 2, 3)


def refused(path: Path, **options) -> str:
    with pytest.raises(RecipeError) as raised:
        tune_suite(path, cache=path.parent / "no cache", **options)
    assert not (path.parent / "no cache").exists()
    return str(raised.value)


def test_searches_that_cannot_be_are_refused_before_work(suite):
    assert "The suite has no search" in refused(suite(SEARCHED[: SEARCHED.index("search:")]))
    without = SEARCHED.replace(", validation: validation", "")
    told = refused(suite(without))
    assert "no validation split of a, b" in told and "validation: {from: train" in told
    assert "Did you mean 'tpe'?" in refused(suite(), sampler="tp")
    assert "give 1 or more" in refused(suite(), trials=0)
    assert "seed = -1: expected a number from 0" in refused(suite(), seed=-1)
    assert "leave the number of trials out" in refused(suite(), sampler="grid", trials=3)
    span = suite(SEARCHED.replace(RANGE, "{from: 0, to: 1}"))
    assert "scale: a grid needs a step" in refused(span, sampler="grid")
    fine = "{from: 0.001, to: 1, step: 0.001}"
    text = f"search: {{merge: {{method: ties}}, parameters: {{scale: {fine}, density: {fine}}}}}\n"
    told = refused(suite(searching(text)), sampler="grid")
    assert "The grid has 1,000,000 combinations; at most 10,000" in told


def test_a_missing_extra_is_named(suite, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'personae[eval]'" in refused(suite())


def test_a_suite_with_a_search_is_evaluated_as_one_without(suite, tmp_path):
    text = SEARCHED.replace("  - base\n", "")
    records = evaluate_suite(suite(text), cache=tmp_path)
    assert [one.method for one in records] == ["individual", "TIES", "DTS"]


ROW = f"{{merge: {{method: task_arithmetic}}, parameters: {{scale: {RANGE}}}, sampler: grid}}"


def with_row(row: str) -> str:
    text = SEARCHED[: SEARCHED.index("search:")].replace("  - base\n", "")
    fixed = f"{{method: task_arithmetic, parameters: {{scale: {BEST}}}}}"
    return text + f"  - {{name: best, merge: {fixed}}}\n  - tune: {row}\n"


def test_a_row_is_tuned_before_it_is_scored(suite, cache):
    found = evaluate_suite(suite(with_row(ROW)), cache=cache)
    of = {one.method: one for one in found}
    assert [*of][-1] == "task_arithmetic tuned"
    assert of["task_arithmetic tuned"].scores == of["best"].scores
    assert of["task_arithmetic tuned"].data == (
        f"labels: 12 a task of the split validation; best of 7 trials: scale={BEST}"
    )
    assert of["best"].data == ""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("sampler: grid", "sampler: gird", "tune.sampler = 'gird'"),
        ("sampler: grid", "trials: 0", "tune.trials = 0"),
        ("sampler: grid", "sampler: grid, trials: 3", "leave the number of trials out"),
        (RANGE, "{from: 0, to: 1}", "scale: a grid needs a step"),
        ("scale: {", "skale: {", "has no parameter 'skale'"),
        (", validation: validation", "", "no validation split of a, b"),
    ],
)
def test_rows_that_cannot_be_tuned_are_refused_with_their_line(suite, old, new, told):
    text = with_row(ROW)
    assert old in text
    with pytest.raises(RecipeError) as raised:
        read_suite(suite(text.replace(old, new)))
    assert told in str(raised.value) and "line " in str(raised.value)
