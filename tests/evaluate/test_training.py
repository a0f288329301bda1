import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from personae.demo.training import complete_directory, joined, train
from personae.evaluate import Task

FAMILIES = Path(__file__).parents[2] / "benchmarks" / "families"


def load_common():
    spec = importlib.util.spec_from_file_location("families_common", FAMILIES / "common.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


common = load_common()


class Stub(nn.Module):
    """A linear encoder with a head: the least that `train` and `evaluate_model` take."""

    def __init__(self):
        super().__init__()
        self.base_model = nn.Linear(2, 2, bias=False)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.base_model.weight.copy_(torch.eye(2))
            self.head.weight.fill_(0.1)
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None):
        logits = self.head(self.base_model(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def stub_task(name: str) -> Task:
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    examples = {"x": x, "labels": (x[:, 0] > x[:, 1]).long()}
    return Task(name, "none", "accuracy", ("below", "above"), examples, examples)


def trained(seed: int = 0) -> Stub:
    model = Stub()
    before = torch.get_rng_state()
    train(model, stub_task("a").train, epochs=20, learning_rate=0.1, batch_size=8, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    return model


def test_training_learns_and_repeats_without_touching_the_global_random_state():
    one, again, other = trained(), trained(), trained(seed=1)
    assert torch.equal(one.base_model.weight, again.base_model.weight)
    assert not torch.equal(one.base_model.weight, other.base_model.weight)
    task = stub_task("a")
    assert common.evaluate_model(Stub(), task) < 0.7 < 0.95 < common.evaluate_model(one, task)


def test_what_no_example_touches_stays_as_it_was():
    model = Stub()
    examples = {"x": torch.tensor([[1.0, 0.0], [2.0, 0.0]]), "labels": torch.tensor([0, 1])}
    train(model, examples, epochs=3, learning_rate=0.1)
    assert torch.equal(model.base_model.weight[:, 1], torch.tensor([0.0, 1.0]))
    assert not torch.equal(model.base_model.weight[:, 0], torch.tensor([1.0, 0.0]))


def test_interrupted_family_goes_on_with_the_next_unfinished_expert(tmp_path: Path):
    tasks = [stub_task(name) for name in ("a", "b", "c")]
    trained_names: list[str] = []

    def expert(task: Task) -> nn.Module:
        trained_names.append(task.name)
        return Stub()

    def broken_save(model: nn.Module, directory: Path) -> None:
        (directory / "weights").write_text("half")
        if trained_names[-1] == "b":
            raise KeyboardInterrupt

    def save(model: nn.Module, directory: Path) -> None:
        (directory / "weights").write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        common.train_experts(tasks, tmp_path, expert, broken_save)
    assert trained_names == ["a", "b"]
    assert (tmp_path / "a" / "training.json").is_file()
    assert not (tmp_path / "b").exists()

    common.train_experts(tasks, tmp_path, expert, save)
    assert trained_names == ["a", "b", "b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert (tmp_path / "b" / "weights").read_text() == "whole"


def test_directory_appears_when_complete(tmp_path: Path):
    target = tmp_path / "deep" / "model"
    with complete_directory(target) as partial:
        (partial / "file").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert list(target.parent.iterdir()) == [target]


def test_joined_tasks_number_all_classes():
    tasks = [stub_task("a"), stub_task("b")]  # two classes each: the second's become 2 and 3
    labels = joined(tasks)["labels"]
    assert torch.equal(labels[:40], tasks[0].train["labels"])
    assert torch.equal(labels[40:], tasks[1].train["labels"] + 2)
