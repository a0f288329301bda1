from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from personae.errors import CheckpointError
from personae.evaluate import (
    Task,
    evaluate_checkpoint,
    evaluate_merge,
    evaluate_model,
    load_model,
    save_model,
)
from personae.evaluate.merged import heads_of
from personae.evaluate.tasks import batches
from personae.recipe import MergeSettings
from toys import toy_bert

LABELS = torch.tensor([0, 1, 1, 0, 1])


def toy_task(values: torch.Tensor, metric: str = "accuracy") -> Task:
    examples = {"values": values, "labels": LABELS}
    return Task("toy", "none", metric, ("low", "high"), examples, examples)  # type: ignore[arg-type]


class Threshold(nn.Module):
    """Answers 1 where the value is positive."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.9)

    def forward(self, values: torch.Tensor):
        logits = self.dropout(self.slope * values)
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(logits), logits], dim=1))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 128])
def test_model_is_scored_on_every_example(batch_size: int):
    values = torch.tensor([-1.0, 2.0, -3.0, -4.0, 5.0])  # answers 0 1 0 0 1: four of five right
    model = Threshold().train()  # dropout would spoil the answers
    assert evaluate_model(model, toy_task(values), batch_size) == pytest.approx(0.8)
    # TP 2, FP 0, TN 2, FN 1: (2*2 - 0) / sqrt(2 * 3 * 2 * 3) = 4 / 6
    score = evaluate_model(model, toy_task(values, "matthews"), batch_size)
    assert score == pytest.approx(2 / 3)


def test_batches_group_and_cut_by_length():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    examples = {"attention_mask": mask, "input_ids": mask * 7, "labels": torch.arange(4)}
    cut = list(batches(examples, 2))
    assert [batch["labels"].tolist() for batch in cut] == [[1, 3], [2, 0]]
    assert [tuple(batch["input_ids"].shape) for batch in cut] == [(2, 2), (2, 4)]


def test_shuffled_batches_hold_every_example_once_and_repeat_by_seed():
    examples = {"labels": torch.arange(10)}

    def order(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([b["labels"] for b in batches(examples, 3, generator)]).tolist()

    assert sorted(order(0)) == list(range(10))
    assert order(0) == order(0) != order(1)


def bert(directory: Path, seed: int) -> Path:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=11,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
                max_position_embeddings=6,
            )
        )
    save_model(model, directory)
    return directory


def text_task(name: str) -> Task:
    ids = torch.arange(40).reshape(8, 5) % 11
    examples = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.arange(8) % 2,
    }
    return Task(
        name, "AutoModelForSequenceClassification", "accuracy", ("0", "1"), examples, examples
    )


def test_checkpoint_is_scored_as_its_model(tmp_path: Path):
    directory, task = bert(tmp_path / "a", seed=1), text_task("a")
    model = load_model(directory, task.model_class)
    with torch.no_grad():
        answers = model(input_ids=task.test["input_ids"]).logits.argmax(dim=1)
    expected = (answers == task.test["labels"]).float().mean().item()
    assert evaluate_checkpoint(directory, task) == pytest.approx(expected)


def test_missing_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no checkpoint directory at '.*gone'"):
        load_model(tmp_path / "gone", "AutoModel")


def test_merged_encoder_meets_each_own_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = bert(tmp_path / "base", seed=3)
    experts = {"a": bert(tmp_path / "a", seed=1), "b": bert(tmp_path / "b", seed=2)}
    seen: dict[str, dict[str, torch.Tensor]] = {}

    def scorer(model: nn.Module, task: Task, batch_size: int) -> float:
        seen[task.name] = {name: t.clone() for name, t in model.state_dict().items()}
        return 0.5

    monkeypatch.setattr("personae.evaluate.evaluation.evaluate_model", scorer)
    tasks = [text_task("a"), text_task("b")]
    scores = evaluate_merge(base, experts, tasks, MergeSettings(skip=("classifier.*",)))
    assert scores == {"a": 0.5, "b": 0.5}
    own = {
        name: load_model(path, "AutoModelForSequenceClassification").state_dict()
        for name, path in experts.items()
    }
    for name, tensor in seen["a"].items():
        if name.startswith("classifier"):
            assert torch.equal(tensor, own["a"][name])
            assert torch.equal(seen["b"][name], own["b"][name])
        else:
            torch.testing.assert_close(tensor, (own["a"][name] + own["b"][name]) / 2)
            assert torch.equal(tensor, seen["b"][name])


def test_heads_are_tensors_of_another_shape(tmp_path: Path):
    base = toy_bert(tmp_path / "base", seed=3)
    wider = toy_bert(tmp_path / "wider", seed=4, num_labels=5)
    assert heads_of(base, {"same": toy_bert(tmp_path / "same", seed=5)}) == ()
    assert heads_of(base, {"wider": wider}) == ("classifier.bias", "classifier.weight")
