"""RegMean: the closed form, padding, stacked projections, Conv1D; RegMean++ block by block."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import pytest
import torch
from learned_toys import BUILDERS, Toys, assert_same, toys
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from personae import RegMean, regmean
from personae.errors import MethodError


class Alone(nn.Module):
    """One linear layer, and a head that is left alone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _closed_form(
    inputs: Iterable[Tensor], weights: Iterable[Tensor], shrink: float = 1.0
) -> Tensor:
    """Σ_n G_n Wᵀ = Σ_n G_n W_nᵀ in fp64, G_n the mean over tokens."""
    left, right = 0, 0
    for x, weight in zip(inputs, weights, strict=True):
        x = x.detach().double().reshape(-1, x.shape[-1])
        gram = x.T @ x / len(x)
        gram = shrink * gram + (1 - shrink) * gram.diag().diag()
        left, right = left + gram, right + gram @ weight.detach().double().T
    assert isinstance(left, Tensor) and isinstance(right, Tensor)
    return torch.linalg.solve(left, right).T


def _linear_family(build: Any) -> tuple[dict[str, nn.Module], dict[str, list[dict[str, Tensor]]]]:
    draws = torch.Generator().manual_seed(0)
    experts: dict[str, nn.Module] = {}
    for task in "ab":
        experts[task] = Alone(build())
        for own in experts[task].parameters():
            own.data = torch.randn(own.shape, generator=draws)
    batches = {
        task: [{"x": torch.randn(count, 4, generator=draws)} for count in (9, 20)] for task in "ab"
    }
    return experts, batches


@pytest.mark.parametrize("shrink", [1.0, 0.7])
@pytest.mark.parametrize("inputs", ["expert", "merged"])
def test_one_layer_is_the_closed_form(shrink: float, inputs: str):
    experts, batches = _linear_family(lambda: nn.Linear(4, 3))
    method = RegMean(shrink=shrink, ridge=1e-12, inputs=inputs)  # pyright: ignore[reportArgumentType]
    merged = method(experts, batches, shared=["body.weight", "body.bias"])
    data = [torch.cat([batch["x"] for batch in batches[task]]) for task in "ab"]
    own = [experts[task].get_parameter("body.weight") for task in "ab"]
    biases = [experts[task].get_parameter("body.bias").detach() for task in "ab"]
    torch.testing.assert_close(
        merged["body.weight"].double(), _closed_form(data, own, shrink), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(merged["body.bias"], (biases[0] + biases[1]) / 2)


def test_few_examples_pull_to_the_average_and_not_to_zero():
    experts, batches = _linear_family(lambda: nn.Linear(4, 3))
    merged = regmean(experts, batches, shared=["body.weight"], examples=1, shrink=1.0)
    own = [experts[task].get_parameter("body.weight").detach().double() for task in "ab"]
    both = torch.stack([batches[task][0]["x"][0] for task in "ab"]).double()
    unseen = torch.linalg.svd(both)[2][2:]  # directions that neither task has
    torch.testing.assert_close(
        merged["body.weight"].double() @ unseen.T,
        (own[0] + own[1]) / 2 @ unseen.T,
        rtol=1e-4,
        atol=1e-4,
    )


def test_conv1d_is_the_linear_layer_transposed():
    linear, batches = _linear_family(lambda: nn.Linear(4, 3))
    conv: dict[str, nn.Module] = {}
    for task, model in linear.items():
        conv[task] = Alone(Conv1D(3, 4))
        state = dict(model.state_dict())
        state["body.weight"] = state["body.weight"].T.clone()
        conv[task].load_state_dict(state)
    straight = regmean(linear, batches, shared=["body.weight"])["body.weight"]
    transposed = regmean(conv, batches, shared=["body.weight"])["body.weight"]
    torch.testing.assert_close(transposed, straight.T)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("inputs", ["expert", "merged"])
def test_padding_changes_nothing(kind: str, inputs: str):
    family = toys(kind)
    longer = {
        task: [
            {name: nn.functional.pad(one, (0, 3)) for name, one in batch.items()}
            for batch in batches
        ]
        for task, batches in family.batches.items()
    }
    method = RegMean(inputs=inputs)  # pyright: ignore[reportArgumentType]
    found = method(family.experts, family.batches, family.base)
    assert_same(method(family.experts, longer, family.base), found, 1e-4)


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_linear_layer_moves_and_all_else_is_the_average(kind: str):
    family = toys(kind, noise=0.3)
    merged = regmean(family.experts, family.batches, family.base)
    linear = {
        f"{name}.weight"
        for name, module in family.base.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    for name, value in merged.items():
        own = [one.get_parameter(name).detach() for one in family.experts.values()]
        is_average = torch.allclose(value, (own[0] + own[1]) / 2, atol=1e-6)
        assert is_average != (name in linear), name


class Attending(nn.Module):
    """A stack of PyTorch's own layers, with stacked projections, and a head."""

    def __init__(self, labels: int, batch_first: bool = True) -> None:
        super().__init__()
        one = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.stack = nn.TransformerEncoder(one, 2, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(8, labels), batch_first

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        given = x if self.batch_first else x.transpose(0, 1)
        states = self.stack(given, src_key_padding_mask=attention_mask == 0)
        states = states if self.batch_first else states.transpose(0, 1)
        return self.head(states[:, 0])


def _attending(batch_first: bool = True) -> Toys:
    draws = torch.Generator().manual_seed(3)
    models: list[nn.Module] = [Attending(n, batch_first).eval() for n in (7, 3, 4)]
    for own in [own for model in models for own in model.parameters()]:
        own.data = 0.5 * torch.randn(own.shape, generator=draws)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    given = {
        task: [{"x": torch.randn(3, 5, 8, generator=draws), "attention_mask": mask}] * 4
        for task in "ab"
    }
    return Toys(models[0], {"a": models[1], "b": models[2]}, given)


@pytest.mark.parametrize("batch_first", [True, False])
def test_stacked_projections_are_solved_for_what_attention_is_given(batch_first: bool):
    """Also its output projection, which PyTorch never calls: from single heads by hand."""
    family = _attending(batch_first)
    own, mixed, seen = [], [], []
    for task, model in family.experts.items():
        batch = family.batches[task][0]
        mask, x = batch["attention_mask"].bool(), batch["x"]
        attention = model.get_submodule("stack.layers.0.self_attn")
        assert isinstance(attention, nn.MultiheadAttention)
        own.append(attention)
        q, k, v = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(
            3, dim=-1
        )
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = q[..., h] @ k[..., h].transpose(1, 2) / 2
            scores = scores.masked_fill(~mask[:, None, :], -torch.inf)
            heads.append(scores.softmax(dim=-1) @ v[..., h])
        mixed.append(torch.cat(heads, dim=-1)[mask])
        seen.append(x[mask])
    method = RegMean(shrink=1.0, ridge=1e-12)
    merged = method(family.experts, family.batches, family.base)
    prefix = "stack.layers.0.self_attn."
    torch.testing.assert_close(
        merged[prefix + "in_proj_weight"].double(),
        _closed_form(seen, [one.in_proj_weight for one in own]),
        rtol=1e-3,
        atol=1e-3,
    )
    torch.testing.assert_close(
        merged[prefix + "out_proj.weight"].double(),
        _closed_form(mixed, [one.out_proj.weight for one in own]),
        rtol=1e-3,
        atol=1e-3,
    )


def test_regmean_plus_plus_solves_a_block_for_what_merged_blocks_give_it():
    family = toys(batches=4)
    names = ["first.weight", "first.bias", "second.weight", "second.bias"]
    method = RegMean(inputs="merged", shrink=1.0, ridge=1e-12)
    merged = method(family.experts, family.batches, shared=names)
    data = {t: torch.cat([b["x"] for b in bs]) for t, bs in family.batches.items()}
    experts = family.experts.values()
    first = _closed_form(data.values(), [one.get_parameter("first.weight") for one in experts])
    bias = sum(one.get_parameter("first.bias").detach().double() for one in experts) / 2
    hidden = [torch.tanh(x.double() @ first.T + bias) for x in data.values()]
    second = _closed_form(hidden, [one.get_parameter("second.weight") for one in experts])
    torch.testing.assert_close(merged["first.weight"].double(), first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged["second.weight"].double(), second, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", BUILDERS)
def test_regmean_plus_plus_is_something_else_where_there_are_blocks(kind: str):
    family = toys(kind, noise=0.3)
    plain = regmean(family.experts, family.batches, family.base)
    other = regmean(family.experts, family.batches, family.base, inputs="merged")
    differ = [name for name in plain if not torch.allclose(plain[name], other[name], atol=1e-5)]
    assert differ


def test_a_layer_that_no_expert_runs_is_averaged():
    family = toys()
    for number, expert in enumerate(family.experts.values()):
        spare = nn.Linear(2, 2)
        nn.init.constant_(spare.weight, number)
        nn.init.constant_(spare.bias, number)
        expert.add_module("spare", spare)
    merged = regmean(family.experts, family.batches)
    assert merged["spare.weight"].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_inputs_that_are_no_numbers_are_told():
    family = toys()
    family.batches["b"][1]["x"][:] = torch.nan
    before = deepcopy(family.experts["a"].state_dict())
    with pytest.raises(MethodError, match=r"inputs of first.weight are NaN .* task 'b'"):
        regmean(family.experts, family.batches)
    assert_same(dict(family.experts["a"].state_dict()), dict(before))
