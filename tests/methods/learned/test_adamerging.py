"""AdaMerging: where it starts, what it does to the entropy, which coefficients it learns."""

from collections.abc import Mapping

import pytest
import torch
from learned_toys import BUILDERS, Toys, arithmetic, assert_same, shared_of, toys
from torch import Tensor
from torch.func import functional_call

from personae import AdaMerging, adamerging, ties
from personae.errors import MethodError


def _entropy(family: Toys, merged: Mapping[str, Tensor]) -> float:
    total = 0.0
    for task, model in family.experts.items():
        batch = family.batches[task][0]
        output = functional_call(model, dict(merged), (), batch)
        p = getattr(output, "logits", output).double().softmax(dim=-1)
        total += float(-(p * p.log()).sum(dim=-1).mean())
    return total


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("coefficients", ["task", "tensor"])
def test_without_steps_it_is_task_arithmetic(kind: str, coefficients: str):
    family = toys(kind, noise=0.3)
    method = AdaMerging(coefficients=coefficients, steps=0, initial=0.4)  # pyright: ignore[reportArgumentType]
    assert_same(method(family.experts, family.batches, family.base), arithmetic(family, 0.4))


@pytest.mark.parametrize("kind", ["plain", "bert", "gpt2"])
def test_the_entropy_falls(kind: str):
    family = toys(kind, noise=0.5, batches=1)
    found = [
        _entropy(
            family,
            adamerging(
                family.experts, family.batches, family.base, steps=steps, learning_rate=0.02
            ),
        )
        for steps in (0, 10, 40)
    ]
    assert found[0] > found[1] > found[2]


def test_a_step_of_adam_goes_against_the_gradient_of_the_entropy():
    """The first step of Adam is the learning rate, against the sign of the gradient."""
    family = toys(noise=0.5, batches=1)
    names = shared_of(family)
    start = torch.full((2, len(names)), 0.3, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for task, model in family.experts.items():
        merged = {}
        for column, name in enumerate(names):
            base = family.base.get_parameter(name).detach().double()
            each = [m.get_parameter(name).detach().double() - base for m in family.experts.values()]
            merged[name] = base + sum(start[n, column] * v for n, v in enumerate(each))
        head = {n: p.detach().double() for n, p in model.named_parameters() if n not in names}
        x = family.batches[task][0]["x"].double()
        p = functional_call(model, {**merged, **head}, (x,)).softmax(dim=-1)
        total = total - (p * p.log()).sum(dim=-1).mean()
    total.backward()
    assert start.grad is not None
    after = 0.3 - 0.01 * start.grad.sign()
    expected = {}
    for column, name in enumerate(names):
        base = family.base.get_parameter(name).detach().double()
        each = [m.get_parameter(name).detach().double() - base for m in family.experts.values()]
        expected[name] = base + sum(after[n, column] * v for n, v in enumerate(each))
    found = AdaMerging(steps=1, learning_rate=0.01)(family.experts, family.batches, family.base)
    assert_same(found, expected, 1e-4)


def test_with_ties_it_starts_from_what_ties_sums():
    family = toys(noise=0.3)
    names = shared_of(family)
    flat = torch.stack(
        [
            torch.cat(
                [
                    (m.get_parameter(n) - family.base.get_parameter(n)).detach().flatten()
                    for n in names
                ]
            )
            for m in family.experts.values()
        ]
    )
    total = ties(flat, density=0.3, reduce="sum")
    base = torch.cat([family.base.get_parameter(n).detach().flatten() for n in names])
    method = AdaMerging(vectors="ties", density=0.3, steps=0, initial=0.5)
    found = method(family.experts, family.batches, family.base)
    whole = torch.cat([found[n].flatten() for n in names])
    torch.testing.assert_close(whole, base + 0.5 * total)


def test_clamped_coefficients_beyond_one_count_as_one():
    family = toys()
    method = AdaMerging(steps=0, initial=1.5)
    assert_same(method(family.experts, family.batches, family.base), arithmetic(family, 1.0))
    free = AdaMerging(steps=0, initial=1.5, clamp=False)
    assert_same(free(family.experts, family.batches, family.base), arithmetic(family, 1.5))


def test_a_later_batch_whose_entropy_is_no_number_is_told():
    family = toys()
    family.batches["b"][1]["x"][:] = torch.nan
    with pytest.raises(MethodError, match="the entropy of 'b' is nan in step 2"):
        AdaMerging(steps=3)(family.experts, family.batches, family.base)
