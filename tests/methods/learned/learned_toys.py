"""Toy families of models that run: a base, experts with heads of their own, and batches."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

WIDTH = 8
_TEXT: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
}


class Toys(NamedTuple):
    """A base, experts and batches, by task."""

    base: nn.Module
    experts: dict[str, nn.Module]
    batches: dict[str, list[dict[str, Tensor]]]


class Plain(nn.Module):
    """Two linear layers and a head; takes `x`."""

    def __init__(self, labels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def _labelled(config: Any, labels: int) -> Any:
    config.num_labels = labels
    return config


def _bert(labels: int) -> nn.Module:
    return BertForSequenceClassification(_labelled(BertConfig(**_TEXT), labels))


def _roberta(labels: int) -> nn.Module:
    return RobertaForSequenceClassification(_labelled(RobertaConfig(**_TEXT), labels))


def _gpt2(labels: int) -> nn.Module:
    config = GPT2Config(vocab_size=20, n_positions=10, n_embd=WIDTH, n_layer=2, n_head=2)
    config.pad_token_id = 0
    return GPT2ForSequenceClassification(_labelled(config, labels))


def _vit(labels: int) -> nn.Module:
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
    )
    return ViTForImageClassification(_labelled(config, labels))


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "plain": Plain,
    "bert": _bert,
    "roberta": _roberta,
    "gpt2": _gpt2,
    "vit": _vit,
}


def batch_for(kind: str, count: int, draws: torch.Generator) -> dict[str, Tensor]:
    """Inputs; of texts about half have padding at the end."""
    if kind == "plain":
        return {"x": torch.randn(count, 5, generator=draws)}
    if kind == "vit":
        return {"pixel_values": torch.randn(count, 3, 8, 8, generator=draws)}
    lengths = torch.randint(3, 7, (count, 1), generator=draws)
    mask = (torch.arange(6) < lengths).long()
    ids = torch.randint(2, 20, (count, 6), generator=draws)
    return {"input_ids": ids * mask, "attention_mask": mask}


def toys(
    kind: str = "plain",
    labels: tuple[int, ...] = (3, 4),
    *,
    noise: float = 0.1,
    batches: int = 2,
    samples: int = 4,
    seed: int = 0,
) -> Toys:
    """A family with tasks a, b, …, of so many classes; experts are the base plus noise."""
    draws = torch.Generator().manual_seed(seed)

    def noisy(model: nn.Module, scale: float) -> nn.Module:
        with torch.no_grad():
            for own in model.parameters():
                own += scale * torch.randn(own.shape, generator=draws)
        return model.eval()

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = {count: BUILDERS[kind](count) for count in {7, *labels}}
    base = noisy(built[7], 0.3)
    body = base.state_dict()
    experts: dict[str, nn.Module] = {}
    for task, count in zip("abcdefgh", labels, strict=False):
        expert = deepcopy(built[count])
        own = expert.state_dict()
        expert.load_state_dict(
            {
                name: body[name] if name in body and body[name].shape == one.shape else one
                for name, one in own.items()
            }
        )
        experts[task] = noisy(expert, noise)
    given = {task: [batch_for(kind, samples, draws) for _ in range(batches)] for task in experts}
    return Toys(base, experts, given)


def shared_of(family: Toys) -> list[str]:
    """Names that are not of heads."""
    body = dict(family.base.named_parameters())
    return [
        name
        for name, own in body.items()
        if all(one.get_parameter(name).shape == own.shape for one in family.experts.values())
    ]


def arithmetic(family: Toys, scale: float) -> dict[str, Tensor]:
    """Task arithmetic in fp64."""
    found = {}
    for name in shared_of(family):
        base = family.base.get_parameter(name).detach().double()
        each = [one.get_parameter(name).detach().double() - base for one in family.experts.values()]
        found[name] = base + scale * torch.stack(each).sum(dim=0)
    return found


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """The same names and values."""
    assert found.keys() == expected.keys()
    for name, one in found.items():
        torch.testing.assert_close(
            one.double(), expected[name].double(), rtol=tolerance, atol=tolerance, msg=name
        )
