"""Routers: features of samples to the weight of each task, sample by sample."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from personae.errors import MethodError
from personae.methods._features import Pool
from personae.methods._method import Parameters

Choice = Literal["mix", "pick"]
"""Tasks by their share of the votes, or the one that has most (the first of these)."""


class Voting(Parameters):
    """How the examples nearest to a sample say which tasks it is of (Auto-Switch)."""

    name: ClassVar = "router"

    neighbours: int = Field(
        default=10,
        ge=1,
        le=2**53,
        description="Examples that vote (the paper takes 5 for RoBERTa).",
    )
    mode: Choice = Field(
        default="mix", description="Tasks by their share of the votes, or the one that has most."
    )
    examples: int = Field(default=100, ge=1, description="Examples of each task that are kept.")
    pool: Pool = Field(
        default="first", description="Which states count: the mean of all tokens, or the first."
    )


@runtime_checkable
class Router(Protocol):
    """Features to weights; a module, whose `state_dict` is what it learned.

    Attributes:
        tasks: The tasks that it weighs, in order.
    """

    tasks: tuple[str, ...]

    def weights(self, features: Float[Tensor, "sample dim"]) -> Float[Tensor, "sample task"]:
        """The weight of each task for each sample."""
        ...


class NearestNeighbours(nn.Module):
    """The tasks of the examples that are nearest, by Euclidean distance.

    Attributes:
        tasks: The tasks, in order.
    """

    def __init__(
        self,
        examples: Mapping[str, Float[Tensor, "_ dim"]],
        neighbours: int = 10,
        mode: Choice = "mix",
    ) -> None:
        """Keep the features of a few examples a task.

        Args:
            examples: Task to features.
            neighbours: How many vote; fewer where there are not as many examples.
            mode: A task's share of the votes, or 1 for the task that has most (the first of these).

        Raises:
            MethodError: A feature is not finite.
        """
        super().__init__()
        self.tasks = tuple(examples)
        self.mode = mode
        known = torch.cat([*examples.values()])
        odd = [task for task, one in examples.items() if not one.isfinite().all()]
        if odd:
            raise MethodError(
                f"Features of {', '.join(odd)} are NaN or infinite. Repair the model or the inputs."
            )
        self.neighbours = min(neighbours, len(known))
        owners = [torch.full((len(one),), n) for n, one in enumerate(examples.values())]
        self.register_buffer("examples", known)
        self.register_buffer("owners", torch.cat(owners).to(known.device))

    def weights(self, features: Float[Tensor, "sample dim"]) -> Float[Tensor, "sample task"]:
        """The share of each task among a sample's neighbours."""
        known, owners = self.get_buffer("examples"), self.get_buffer("owners")
        # Row by row in fp64: what a sample is given must not depend on those beside it.
        known = known.double()
        distances = [(known - one.double()).square().sum(dim=1) for one in features]
        order = torch.stack(distances).argsort(dim=1, stable=True)[:, : self.neighbours]
        votes = nn.functional.one_hot(owners[order], len(self.tasks)).sum(dim=1).float()
        if self.mode == "pick":
            return nn.functional.one_hot(votes.argmax(dim=1), len(self.tasks)).float()
        return votes / self.neighbours


class Perceptron(nn.Module):
    """Twin-Merging's router: d → 2d → 2d → task, softmax.

    Attributes:
        tasks: The tasks, in order.
    """

    def __init__(self, tasks: tuple[str, ...], width: int) -> None:
        """A router that has learned nothing."""
        super().__init__()
        self.tasks = tasks

        def hidden(inputs: int) -> list[nn.Module]:
            norm, act = nn.BatchNorm1d(2 * width), nn.LeakyReLU()
            return [nn.Linear(inputs, 2 * width), norm, act, nn.Dropout(0.5)]

        self.layers = nn.Sequential(
            *hidden(width), *hidden(2 * width), nn.Linear(2 * width, len(tasks))
        )

    def fit(
        self,
        examples: Mapping[str, Float[Tensor, "_ dim"]],
        *,
        epochs: int,
        batch_size: int,
        learning_rate: float,
    ) -> None:
        """Learn to tell the tasks apart by Adam; batches are drawn by torch's generator.

        Raises:
            MethodError: There is one example in all, of which no batch can be normalised.
        """
        given = torch.cat([*examples.values()])
        labels = torch.cat([torch.full((len(one),), n) for n, one in enumerate(examples.values())])
        if len(given) < 2:
            raise MethodError("The router has one example to learn from. Give at least 2.")
        optimiser = torch.optim.Adam(self.parameters(), lr=learning_rate)
        self.train()
        with torch.enable_grad():
            for _ in range(epochs):
                order = torch.randperm(len(given))
                for some in order.tensor_split(max(len(given) // batch_size, 1)):
                    loss = nn.functional.cross_entropy(self.layers(given[some]), labels[some])
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
        self.eval()
        self.requires_grad_(False)

    def weights(self, features: Float[Tensor, "sample dim"]) -> Float[Tensor, "sample task"]:
        """Softmax of what it says."""
        return self.layers(features).softmax(dim=-1)
