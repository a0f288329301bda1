"""Thresholds of TALL-masks by validation score, worked out again with models in memory."""

from dataclasses import replace

import pytest

from personae.errors import RecipeError
from personae.evaluate import choose_thresholds, evaluate_model, load_model
from personae.evaluate.rows import method_rows
from personae.evaluate.thresholds import THRESHOLDS
from toy_tasks import toy_text_family, toy_text_task

pytest.importorskip("transformers")
NAMES = ("a", "b", "u")


def test_the_best_on_validation_wins(tmp_path):
    family = toy_text_family(tmp_path)
    experts = {name: family / name for name in NAMES}
    for path in experts.values():
        (path / "training.json").write_text("{}")  # comes along, and hinders nothing
    # The test examples have other labels: they must not be looked at.
    tasks = [
        replace(toy_text_task(name, seed), validation=toy_text_task(name, 10 + seed).test)
        for seed, name in enumerate(NAMES)
    ]
    told = {}
    chosen = choose_thresholds(
        family / "base", experts, tasks, report=lambda t, scores: told.update({t: dict(scores)})
    )
    assert tuple(told) == THRESHOLDS

    base = load_model(family / "base", "AutoModel").state_dict()
    states = {n: load_model(p, "AutoModel").state_dict() for n, p in experts.items()}
    for seed, task in enumerate(tasks):
        validation = replace(task, test=toy_text_task(task.name, 10 + seed).test)
        scores = []
        for threshold in THRESHOLDS:
            model = load_model(experts[task.name], task.model_class)
            state = model.base_model.state_dict()  # pyright: ignore
            for name, tensor in base.items():
                # methods.md 5.5: m_n = |τ_n| > λ |τ − τ_n|, θ = θ₀ + m_n τ
                own = states[task.name][name] - tensor
                total = sum(states[n][name] - tensor for n in NAMES)
                state[name] = tensor + total * (own.abs() > threshold * (total - own).abs())
            model.base_model.load_state_dict(state)  # pyright: ignore
            scores.append(evaluate_model(model, validation))
        assert [told[t][task.name] for t in THRESHOLDS] == pytest.approx(scores, abs=1 / 60)
        best = max(told[t][task.name] for t in THRESHOLDS)
        assert chosen[task.name] == next(t for t in THRESHOLDS if told[t][task.name] == best)
    assert len({told[t]["a"] for t in THRESHOLDS}) > 1
    row = method_rows(chosen)["TALL-Mask chosen"]
    assert row.codec().for_task("b").model_dump()["threshold"] == chosen["b"]


def test_tasks_without_validation_examples_are_named(tmp_path):
    tasks = [toy_text_task(name, 0) for name in "ab"]
    with pytest.raises(RecipeError, match=r"(?s)2 faults.*'a' has no validation.*'b' has no"):
        choose_thresholds(tmp_path, {}, tasks)
