"""personae tune: its table, its JSON, and a recipe that personae merge takes as it is."""

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("optuna")

from personae.cli import app
from toy_suites import SUITE, toy_suite
from toys import load

SPLITS = "splits: {test: test, validation: {from: train, examples: 12}}"
SEARCH = """\
search:
  merge: {method: task_arithmetic}
  parameters: {scale: [0.0, 2.0]}
"""


def run(*words: object):
    return CliRunner().invoke(app, [*map(str, words)])


def test_the_recipe_merges_what_was_best(tmp_path):
    suite = toy_suite(tmp_path, SUITE.replace("splits: {test: test}", SPLITS) + SEARCH)
    words = ("tune", suite, "--sampler", "grid", "--cache", tmp_path / "cache")
    out = tmp_path / "recipes" / "tuned.yaml"
    done = run(*words, "--out", out)
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "2 best of 2 trials" in done.stdout and "scale" in done.stdout
    told = json.loads(run(*words, "--json").stdout)
    assert told["method"] == "task_arithmetic" and told["recipe"] is None
    averages = [one["average"] for one in told["trials"]]
    assert averages == sorted(averages, reverse=True)
    for one in told["trials"]:
        assert one["average"] == pytest.approx(sum(one["scores"].values()) / 2)
    scale = told["trials"][0]["parameters"]["scale"]
    done = run("merge", out, tmp_path / "merged")
    assert done.exit_code == 0, (done.stderr, done.exception)
    base, merged = load(tmp_path / "base"), load(tmp_path / "merged")
    experts = [load(tmp_path / name) for name in "ab"]
    for name, values in base.items():
        deltas = sum(one[f"bert.{name}"].double() - values.double() for one in experts)
        expected = (values.double() + scale * deltas).float()
        assert torch.allclose(merged[name], expected, atol=1e-5)
    again = run(*words, "--out", out)
    assert again.exit_code == 2 and "is there already" in again.stderr
    assert run(*words, "--out", out, "--overwrite").exit_code == 0


def test_what_is_wrong_is_refused(tmp_path):
    done = run("tune", tmp_path / "gone.yaml", "--sampler", "tpee")
    assert done.exit_code == 2 and "Did you mean 'tpe'?" in done.stderr
    done = run("tune", tmp_path / "gone.yaml")
    assert done.exit_code == 2 and "gone.yaml cannot be read" in done.stderr
