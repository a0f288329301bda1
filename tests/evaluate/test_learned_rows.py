"""Learned methods in suites: scored as merges are, what they saw is said, faults before work."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from personae import evaluate_suite, read_suite
from personae.errors import RecipeError
from personae.evaluate import comparison
from personae.report.table import markdown
from toy_suites import SUITE, toy_suite

ROWS = """\
  - {name: sum, merge: {method: task_arithmetic, parameters: {scale: 0.3}}}
  - {name: Ada, learn: {method: adamerging, parameters: {steps: 0}, data: {split: test}}}
  - {name: Fisher, learn: {method: fisher, data: {split: train, examples: 6}}}
  - {name: RegMean, learn: {method: regmean, data: {split: test, examples: 6}}}
  - {name: Twin, learn: {method: twin_merging, parameters: {epochs: 1}, data: {split: train}}}
"""
TEXT = SUITE[: SUITE.index("  - base\n")].replace("{test: test}", "{train: train, test: test}")


def test_learned_rows(tmp_path, monkeypatch):
    path = toy_suite(tmp_path, TEXT + ROWS)
    found = evaluate_suite(path, cache=tmp_path / "cache")
    of = {one.method: one for one in found}
    assert of["Ada"].scores == of["sum"].scores  # 0 steps: task arithmetic
    assert of["Ada"].data == ("unlabelled test inputs (transductive): 24 a task of the split test")
    assert of["Fisher"].data == "unlabelled training inputs: 6 a task of the split train"
    assert of["RegMean"].data.endswith("6 a task of the split test (transductive)")
    assert of["sum"].data == "" and of["Ada"].amr_on_disk == of["RegMean"].amr_paper == 0
    assert of["Twin"].amr_on_disk > 0 and of["Twin"].amr_paper > 0
    assert all(of[name].seconds for name in ("Ada", "Fisher", "RegMean", "Twin"))
    table = markdown(found)
    assert "| sees |" in table and of["Fisher"].data in table
    monkeypatch.setattr(comparison, "learn", None)  # nothing is learned twice
    assert evaluate_suite(path, cache=tmp_path / "cache") == found


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("method: regmean", "method: regmaen", "Did you mean 'regmean'?"),
        ("steps: 0", "step: 0", "Did you mean 'steps'?"),
        ("split: train, examples: 6", "split: validation", "There is no data for a method"),
        ("split: train, examples: 6", "split: trian", "line 14"),
        ("examples: 6", "exmples: 6", "Did you mean 'examples'?"),
        ("  - name: b\n    metric: matthews\n", "", "and there is none of b"),
    ],
)
def test_what_is_refused(tmp_path, old, new, told):
    assert old in TEXT + ROWS
    with pytest.raises(RecipeError) as raised:
        read_suite(toy_suite(tmp_path, (TEXT + ROWS).replace(old, new)))
    assert told in str(raised.value) and "line " in str(raised.value)
