"""WEMoE (Tang et al. 2024): every MLP keeps all task vectors, and a router mixes them by sample.

All but the MLPs is task arithmetic. In each block a router of two layers says of every token how
much of each task vector its MLP takes; the mean over a sample's tokens (padding left out) is what
the whole sample takes: W(x) = W_0 + Σ g_n(x) τ_n. That is linear in W: each sample's mixture is
computed exactly, as W_0 x + Σ g_n τ_n x, whatever else is in its batch, and no weights are put
together. The routers are trained by the entropy of outputs; nothing else is.

Transductive: it sees the inputs that it is then scored on. An MLP is the linear layers of a
numbered block outside of attention, or those that `mlp` names. Departs from the original code in
one thing: the routers' last weights start at 0, so that they start as task arithmetic exactly.

Memory beside the experts: the merged model, N task vectors of the MLPs, and one task's backward
pass through them.
"""

import re
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from personae.errors import Faults, MethodError
from personae.methods._batches import (
    LABELS,
    Batch,
    endless,
    entropy,
    logits,
    rows,
    samples,
    token_mask,
)
from personae.methods._experts import Experts
from personae.methods._layers import LinearLayer, linear_layers, watched
from personae.methods._learned import LearnedRouting, as_learned_function
from personae.methods._registry import learned_method
from personae.methods._routed import RoutedModel

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")


@learned_method(paper="arXiv:2402.00433")
class WEMoE(LearnedRouting):
    """Mix the task vectors of each MLP by sample, with routers trained on the entropy of outputs.

    Without steps it is task arithmetic.
    """

    sees: ClassVar = "unlabelled test inputs (transductive)"
    needs_base: ClassVar = True

    scale: float = Field(
        default=0.3, description="Of task vectors, outside of MLPs and where routers start (λ)."
    )
    mlp: str | None = Field(
        default=None,
        description=(
            "Pattern of the modules that are an MLP's linear layers; none: those of numbered "
            "blocks outside of attention."
        ),
    )
    steps: int = Field(default=1000, ge=0, description="Steps of Adam; each sees a batch a task.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Of Adam.")
    deviation: float = Field(
        default=0.01, gt=0, description="Standard deviation of a router's first weights."
    )
    seed: int = Field(default=0, ge=0, description="Of the routers' first weights.")

    def faults(self, experts: Experts, scores: Mapping[str, Tensor], faults: Faults) -> None:
        """There must be MLPs."""
        if not self.layers(experts):
            named = "no linear layer is in a numbered block, outside of attention"
            if self.mlp is not None:
                named = f"no linear layer that is shared has a name with '{self.mlp}' in it"
            faults.add(f"{self.name} finds no MLP: {named}. Name those of yours by `mlp`.")

    def layers(self, experts: Experts) -> list[LinearLayer]:
        """The linear layers of MLPs."""

        def is_mlp(layer: LinearLayer) -> bool:
            if self.mlp is not None:
                return re.search(self.mlp, layer.module) is not None
            numbered = _NUMBERED.search(layer.module) is not None
            return numbered and _ATTENTION.search(layer.module) is None

        found = linear_layers(experts.first)
        return [
            layer
            for layer in found
            if layer.weight in experts.names and layer.rows is None and is_mlp(layer)
        ]

    def learn(self, experts: Experts) -> "GatedModel":
        """Train the routers.

        Raises:
            MethodError: The entropy is not a finite number.
        """
        gated = GatedModel(experts, self.layers(experts), self.scale, self.deviation, self.seed)
        optimiser = torch.optim.Adam(gated.routers.parameters(), lr=self.learning_rate)
        streams = {task: endless(batches) for task, batches in experts.batches.items()}
        for step in range(self.steps):
            optimiser.zero_grad()
            for task, stream in streams.items():
                batch = next(stream)
                with torch.enable_grad():
                    loss = entropy(gated.scores(task, batch), batch)
                if not loss.isfinite():
                    raise MethodError(
                        f"{self.name}: the entropy of '{task}' is {float(loss)} in step "
                        f"{step + 1}. Lower the learning rate, or look for values that overflow."
                    )
                loss.backward(inputs=[*gated.routers.parameters()])
            optimiser.step()
            experts.progress(step + 1, self.steps)
        gated.requires_grad_(False)
        return gated


class GatedModel(RoutedModel):
    """A merged model whose MLPs add their task vectors by what their router says of a sample.

    Attributes:
        blocks: The blocks with an MLP, in order.
        routers: One each.
        vectors: Parameters of MLPs to their task vectors.
    """

    def __init__(
        self,
        experts: Experts,
        layers: list[LinearLayer],
        scale: float,
        deviation: float,
        seed: int,
    ) -> None:
        """Put together what the experts share, and routers that have learned nothing."""
        reference, names = experts.added(scale), dict(experts.first.named_parameters())
        modules = dict(experts.first.named_modules())
        assert experts.base is not None
        biases: dict[LinearLayer, str] = {}
        for layer in layers:
            bias = getattr(modules[layer.module], "bias", None)
            found = [name for name, own in names.items() if own is bias and name in reference]
            if found:
                biases[layer] = found[0]
        inside = [*(layer.weight for layer in layers), *biases.values()]
        for name in inside:
            reference[name] = experts.base[name].to(reference[name])
        super().__init__(experts, reference)
        self.vectors = {name: experts.task_vectors(name) for name in inside}
        self._biases, self._axes = biases, _sample_axes(experts, layers)
        self._first: dict[str, LinearLayer] = {}
        for layer in self._axes:
            self._first.setdefault(layer.block, layer)
        self.blocks, tasks = tuple(self._first), len(experts.models)
        widths = [len(layer.matrix(names[layer.weight])) for layer in self._first.values()]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            routers = [_router(width, tasks, scale, deviation) for width in widths]
        self.routers = nn.ModuleList(routers).to(experts.device)

    def scores(self, head: str, batch: Batch) -> Float[Tensor, "sample *token output"]:
        """See `RoutedModel.forward`."""
        with self._mixing(batch):
            return self.run(head, batch, self.reference)

    @contextmanager
    def _mixing(self, batch: Batch) -> Generator[None]:
        """While it lasts, MLPs add their task vectors; gates are found where a block begins."""
        modules, gates = dict(self.model.named_modules()), dict[str, Tensor]()
        routers = dict(zip(self.blocks, self.routers, strict=True))

        def hook_of(layer: LinearLayer) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                given = _by_sample(args[0], samples(batch), self._axes[layer])
                if self._first[layer.block] == layer:
                    gates[layer.block] = _gates(routers[layer.block], given, batch)
                added = self._added(layer, given, gates[layer.block])
                return output + _as_given(added, output, self._axes[layer])

            return hook

        with ExitStack() as stack:
            for layer in self._axes:
                handle = modules[layer.module].register_forward_hook(hook_of(layer))
                stack.callback(handle.remove)
            yield

    def _added(
        self,
        layer: LinearLayer,
        given: Float[Tensor, "sample token in"],
        gates: Float[Tensor, "sample task"],
    ) -> Float[Tensor, "sample token out"]:
        """Σ g_n (τ_n x + the task vector of the bias)."""
        total: Tensor | float = 0.0
        for n, vector in enumerate(self.vectors[layer.weight]):
            one = given @ layer.matrix(vector).to(given.dtype)
            if layer in self._biases:
                one = one + self.vectors[self._biases[layer]][n].to(given.dtype)
            total = total + gates[:, n, None, None].to(given.dtype) * one
        assert isinstance(total, Tensor)
        return total

    def stored(self) -> dict[str, Any]:
        """With the task vectors of MLPs."""
        return {**super().stored(), "vectors": self.vectors}

    def restore(self, stored: dict[str, Any]) -> None:
        """With the task vectors of MLPs."""
        super().restore(stored)
        self.vectors = stored["vectors"]


def _router(width: int, tasks: int, scale: float, deviation: float) -> nn.Module:
    first, last = nn.Linear(width, width), nn.Linear(width, tasks)
    nn.init.normal_(first.weight, std=deviation)
    nn.init.zeros_(first.bias)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, scale)
    return nn.Sequential(first, nn.ReLU(), last)


def _gates(
    router: nn.Module, given: Float[Tensor, "sample token in"], batch: Batch
) -> Float[Tensor, "sample task"]:
    """Mean over a sample's tokens of what a router says of each."""
    each = router(given.float())
    mask = token_mask(batch, tuple(each.shape[:2]))
    if mask is None:
        return each.mean(dim=1)
    shares = mask.to(each).unsqueeze(-1)
    return (each * shares).sum(dim=1) / shares.sum(dim=1).clamp(min=1)


def _sample_axes(experts: Experts, layers: list[LinearLayer]) -> dict[LinearLayer, int]:
    """The layers in the order in which they run, and the axis of samples of what each is given.

    It is the axis that is longer for two samples than for one: OpenCLIP puts tokens first.
    """
    task, model = next(iter(experts.models.items()))
    batch = next(iter(experts.batches[task]))
    shapes: list[dict[LinearLayer, tuple[int, ...]]] = []
    for which in ([0], [0, 0]):
        seen: dict[LinearLayer, tuple[int, ...]] = {}

        def given(layer: LinearLayer, inputs: Tensor, seen: Any = seen) -> None:
            seen[layer] = tuple(inputs.shape)

        some = {n: one for n, one in batch.items() if n != LABELS}
        with watched(model, layers, given):
            logits(model, {**some, **rows(some, torch.tensor(which))})
        shapes.append(seen)
    return {
        layer: next((n for n, size in enumerate(one) if shapes[1][layer][n] != size), 0)
        for layer, one in shapes[0].items()
    }


def _by_sample(given: Tensor, count: int, axis: int) -> Float[Tensor, "sample token in"]:
    """What a layer is given, sample by sample."""
    return given.movedim(axis, 0).reshape(count, -1, given.shape[-1])


def _as_given(
    added: Float[Tensor, "sample token out"], output: Tensor, axis: int
) -> Float[Tensor, "..."]:
    """The inverse, for what the layer gives."""
    return added.reshape(output.movedim(axis, 0).shape).movedim(0, axis)


wemoe = as_learned_function(WEMoE)
