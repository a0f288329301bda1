"""Fisher merging: per-sample squares by hand, the shortcut that is something else, regression."""

from copy import deepcopy

import pytest
import torch
from learned_toys import BUILDERS, assert_same, shared_of, toys
from torch import Tensor, nn

from personae import Fisher, fisher
from personae.errors import MethodError


def _by_hand(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Σ_x Σ_y p(y|x) (∂ log p(y|x) / ∂θ)² / S in fp64, one example and class after the other."""
    model, total, seen = deepcopy(model).double(), {}, 0
    for batch in batches:
        for n in range(len(next(iter(batch.values())))):
            one = {
                k: v[n : n + 1].double() if v.is_floating_point() else v[n : n + 1]
                for k, v in batch.items()
            }
            seen += 1
            output = model(**one)
            scores = getattr(output, "logits", output)
            for y in range(scores.shape[-1]):
                output = model(**one)
                log = getattr(output, "logits", output)[0].log_softmax(dim=-1)
                model.zero_grad()
                log[y].backward()
                for name, own in model.named_parameters():
                    if own.grad is not None:
                        total[name] = total.get(name, 0) + log[y].exp().detach() * own.grad**2
    return {name: one / seen for name, one in total.items()}


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.filterwarnings("error::UserWarning")
def test_it_is_the_average_weighted_by_squares_of_single_examples(kind: str, at_once: int):
    family = toys(kind)
    information = {
        task: _by_hand(one, family.batches[task]) for task, one in family.experts.items()
    }
    expected = {}
    for name in shared_of(family):
        own = {t: m.get_parameter(name).detach().double() for t, m in family.experts.items()}
        if name not in information["a"]:
            expected[name] = (own["a"] + own["b"]) / 2
            continue
        weights = {task: one[name].clamp(min=1e-6) for task, one in information.items()}
        total = sum(weights[task] * own[task] for task in own)
        expected[name] = total / sum(weights.values())
    method = Fisher(normalise=False, samples_at_once=at_once)
    assert_same(method(family.experts, family.batches), expected, 1e-3)


def test_normalised_each_experts_information_has_norm_one():
    family = toys()
    found = {}
    for task, model in family.experts.items():
        by_hand = {
            n: o for n, o in _by_hand(model, family.batches[task]).items() if "head" not in n
        }
        norm = torch.stack([one.square().sum() for one in by_hand.values()]).sum().sqrt()
        found[task] = {name: (one / norm).clamp(min=1e-6) for name, one in by_hand.items()}
    expected = {
        name: (
            2 * found["a"][name] * family.experts["a"].get_parameter(name).double()
            + found["b"][name] * family.experts["b"].get_parameter(name).double()
        )
        / (2 * found["a"][name] + found["b"][name])
        for name in found["a"]
    }
    assert_same(Fisher(weight=(2.0, 1.0))(family.experts, family.batches), expected, 1e-4)


def test_of_what_no_output_depends_on_a_sure_expert_weighs_no_more():
    """The first input is always 0; the labels of "a" are certain, so that its gradients are 0."""
    family = toys()
    batches = {
        task: [{"x": b["x"] * (torch.arange(5) > 0)} for b in bs]
        for task, bs in family.batches.items()
    }
    with torch.no_grad():
        family.experts["a"].get_parameter("head.weight").mul_(1e4)
        for task, value in (("a", 0.0), ("b", 1.0)):
            family.experts[task].get_parameter("first.weight")[:, 0] = value
    merged = fisher(family.experts, batches)
    assert merged["first.weight"][:, 0].tolist() == [0.5] * 8


def test_the_shortcut_depends_on_the_batch_size_and_the_diagonal_does_not():
    family = toys()
    single = {
        task: [{"x": row.unsqueeze(0)} for batch in batches for row in batch["x"]]
        for task, batches in family.batches.items()
    }
    exact = [Fisher()(family.experts, batches) for batches in (family.batches, single)]
    assert_same(exact[0], exact[1])
    method = Fisher(estimator="batch_shortcut")
    shortcut = [method(family.experts, batches) for batches in (family.batches, single)]
    name = "first.weight"
    assert not torch.allclose(shortcut[0][name], shortcut[1][name], rtol=1e-3)
    assert not torch.allclose(shortcut[1][name], exact[0][name], rtol=1e-3)


def test_labels_drawn_often_enough_give_the_expectation():
    family = toys(batches=1, samples=2)
    often = {
        task: [{"x": b["x"].repeat(2000, 1)} for b in bs] for task, bs in family.batches.items()
    }
    drawn = fisher(
        family.experts, often, estimator="sampled", examples=10_000, samples_at_once=1000
    )
    assert_same(drawn, Fisher()(family.experts, family.batches), 0.02)


def test_regression_squares_the_gradient_of_the_squared_error():
    family = toys(labels=(1,), batches=1)
    batch = family.batches["a"][0] | {"labels": torch.randn(4)}
    model = family.experts["a"]
    total = torch.zeros(8, 5)
    for x, label in zip(batch["x"], batch["labels"], strict=True):
        model.zero_grad()
        (model(x=x.unsqueeze(0)).squeeze() - label).square().backward()
        grad = model.get_parameter("first.weight").grad
        assert grad is not None
        total += grad**2
    other = deepcopy(model)
    with torch.no_grad():
        other.get_parameter("first.weight").zero_()
    found = Fisher(normalise=False, floor=1e-12)(
        {"a": model, "b": other},
        {"a": [batch], "b": [batch]},
        shared=["first.weight"],
    )
    of_other = torch.zeros(8, 5)
    for x, label in zip(batch["x"], batch["labels"], strict=True):
        other.zero_grad()
        (other(x=x.unsqueeze(0)).squeeze() - label).square().backward()
        grad = other.get_parameter("first.weight").grad
        assert grad is not None
        of_other += grad**2
    expected = total * model.get_parameter("first.weight").detach() / (total + of_other)
    torch.testing.assert_close(found["first.weight"], expected, rtol=1e-4, atol=1e-6)


def test_parameters_without_a_gradient_are_averaged():
    family = toys()
    for value, expert in zip((1.0, 4.0), family.experts.values(), strict=True):
        expert.register_parameter("unused", nn.Parameter(torch.full((2,), value)))
    merged = Fisher(weight=(1.0, 3.0))(family.experts, family.batches)
    assert merged["unused"].tolist() == [2.5, 2.5]


class Tagger(nn.Module):
    """Logits for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.table(input_ids))


def test_logits_of_tokens_take_labels_drawn_for_each_and_no_padding():
    draws = torch.Generator().manual_seed(0)
    experts: dict[str, nn.Module] = {"a": Tagger(), "b": Tagger()}
    for own in [own for model in experts.values() for own in model.parameters()]:
        own.data = 0.5 * torch.randn(own.shape, generator=draws)
    ids, mask = (
        torch.tensor([[1, 2, 0, 0], [3, 3, 1, 0]]),
        torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]),
    )
    weights = {}
    for task, model in experts.items():  # by hand: Σ over tokens and classes
        table, total = model.get_parameter("table.weight"), torch.zeros(5, 4)
        for token in ids[mask.bool()].tolist():
            log = (model.get_submodule("head")(table[token])).log_softmax(dim=0)
            for y in range(3):
                grad = torch.autograd.grad(log[y], table, retain_graph=True)[0]
                total += log[y].exp().detach() * grad**2
        weights[task] = (total / 2).clamp(min=1e-6)
    own = [model.get_parameter("table.weight").detach() for model in experts.values()]
    expected = (weights["a"] * own[0] + weights["b"] * own[1]) / (weights["a"] + weights["b"])
    batch = {"input_ids": ids.repeat(1000, 1), "attention_mask": mask.repeat(1000, 1)}
    found = fisher(
        experts,
        {"a": [batch], "b": [batch]},
        shared=["table.weight"],
        estimator="sampled",
        examples=2000,
        samples_at_once=500,
        normalise=False,
    )
    torch.testing.assert_close(found["table.weight"], expected, rtol=0.1, atol=0.05)
    with pytest.raises(MethodError, match=r"logits for each token.*\n.*estimator sampled"):
        fisher(experts, {"a": [batch], "b": [batch]})


def test_a_regression_without_labels_is_told_before_work():
    family = toys(labels=(1, 3))
    with pytest.raises(MethodError, match=r"'a' has one output, a regression.*no `labels`"):
        Fisher()(family.experts, family.batches)


def test_weights_that_give_no_average_are_refused():
    family = toys()
    with pytest.raises(MethodError, match=r"weight = .* gives no average"):
        Fisher(weight=(0.0, 0.0))(family.experts, family.batches)
