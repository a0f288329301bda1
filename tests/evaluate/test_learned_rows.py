"""Learned methods in suites: scored as merges are, what they saw is said, faults before work."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from personae import Work, evaluate_suite, read_suite
from personae.errors import RecipeError
from personae.evaluate import comparison
from personae.evaluate.predictions import predict
from personae.methods.learned.regmean import RegMean
from personae.report.table import markdown
from toy_suites import SUITE, toy_suite

ROWS = """\
  - {name: sum, merge: {method: task_arithmetic, parameters: {scale: 0.3}}}
  - {name: Ada, learn: {method: adamerging, parameters: {steps: 0}, data: {split: test}}}
  - {name: Fisher, learn: {method: fisher, data: {split: train, examples: 6}}}
  - {name: RegMean, learn: {method: regmean, data: {split: test, examples: 6}}}
  - {name: Twin, learn: {method: twin_merging, parameters: {epochs: 1}, data: {split: train}}}
  - {name: Auto, learn: {method: auto_switch, data: {split: train}}}
  - {name: WE, learn: {method: wemoe, parameters: {steps: 0}, data: {split: test}}}
"""
TEXT = SUITE[: SUITE.index("  - base\n")].replace("{test: test}", "{train: train, test: test}")


def test_learned_rows(tmp_path, monkeypatch):
    path = toy_suite(tmp_path, TEXT + ROWS)
    found = evaluate_suite(path, cache=tmp_path / "cache")
    of = {one.method: one for one in found}
    assert of["Ada"].scores == of["WE"].scores == of["sum"].scores  # 0 steps: task arithmetic
    assert of["Ada"].data == ("unlabelled test inputs (transductive): 24 a task of the split test")
    assert of["Fisher"].data == "unlabelled training inputs: 6 a task of the split train"
    assert of["RegMean"].data.endswith("6 a task of the split test (transductive)")
    assert of["sum"].data == "" and of["Ada"].amr_on_disk == of["RegMean"].amr_paper == 0
    routed = ("Twin", "Auto", "WE")
    assert all(of[name].amr_on_disk > 0 and of[name].amr_paper > 0 for name in routed)
    assert all(of[name].seconds for name in ("Ada", "Fisher", "RegMean", *routed))
    table = markdown(found)
    assert "| sees |" in table and of["Fisher"].data in table
    monkeypatch.setattr(comparison, "learn", None)  # nothing is learned twice
    assert evaluate_suite(path, cache=tmp_path / "cache") == found


def test_an_interrupted_row_is_not_learned_again(tmp_path, monkeypatch):
    suite = "".join(line for line in ROWS.splitlines(keepends=True) if "name: RegMean" in line)
    path, asked = toy_suite(tmp_path, TEXT + suite), []

    def interrupted(*given, stage, work, **rest):
        asked.append(stage)
        if stage == "RegMean: b":
            raise KeyboardInterrupt
        return predict(*given, stage=stage, work=work, **rest)

    told: list[tuple[str, int, int]] = []
    work = Work(progress=lambda *step: told.append(step))
    monkeypatch.setattr(comparison, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(path, cache=tmp_path / "cache", work=work)
    assert ("RegMean: learning", 2, 2) in told
    monkeypatch.setattr(comparison, "predict", predict)
    kept = [*(tmp_path / "cache").rglob("merged.safetensors")]
    assert len(kept) == 1
    monkeypatch.setattr(RegMean, "learn", None)
    of = {one.method: one for one in evaluate_suite(path, cache=tmp_path / "cache")}
    assert of["RegMean"].data and of["RegMean"].seconds
    assert not kept[0].exists()
    monkeypatch.undo()
    anew = {one.method: one for one in evaluate_suite(path, cache=tmp_path / "anew")}
    assert anew["RegMean"].scores == of["RegMean"].scores


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
