"""How much each packed task counts for a task that has no expert (DTS, arXiv 2512.01461, eq. 8)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from personae._types import in_range
from personae.errors import Faults, MethodError, PackError, RecipeError, nearest
from personae.ops.similarity import cosines, mean_embedding, ratio_weights, softmax_weights
from personae.packs.manifest import Manifest
from personae.packs.reader import Pack

GAMMAS = ("ratio", "softmax")
TEMPERATURE = 0.1
"""Of softmax weights by default: a cosine higher by 0.1 then counts e times as much."""


@runtime_checkable
class TextEncoder(Protocol):
    """Texts to embeddings, one row each, of any length but 0.

    Attributes:
        name: What it is called, for the record.
        template: What each text is put into, at `{}`.
    """

    name: str
    template: str

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: shape (text, dim), floating."""
        ...


@dataclass(frozen=True)
class Weighting:
    """The weight γ of each task, and how it was found.

    Attributes:
        weights: Task name to weight, in the pack's order.
        gamma: `ratio` or `softmax` of the cosines, or `given`.
        temperature: Of the softmax.
        cosines: Task name to cosine with what was asked for; None if weights were given.
        like: What was asked for.
        encoder: What embedded the texts.
        template: What each text was put into.
    """

    weights: dict[str, float]
    gamma: str = "given"
    temperature: float | None = None
    cosines: dict[str, float] | None = None
    like: tuple[str, ...] = ()
    encoder: str | None = None
    template: str | None = None

    @property
    def notes(self) -> list[str]:
        """What a person should be told, a line each."""
        negative = [name for name, cosine in (self.cosines or {}).items() if cosine < 0]
        if negative and self.gamma == "ratio":
            return [f"cosines below 0 count as 0 in a ratio: {', '.join(negative)}"]
        total = sum(self.weights.values())  # infinite where fsum would overflow
        if self.gamma == "given" and abs(total - 1) > 1e-6:
            return [f"the weights sum to {total:g}, not to 1"]
        return []

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def weighable(
    pack: Pack, like: Sequence[str], *, gamma: str = "ratio", temperature: float | None = None
) -> dict[str, tuple[str, ...]]:
    """Check all that `weigh` refuses before it embeds a text, so that no encoder is loaded in vain.

    Returns:
        Task name to the texts that say what it is about.

    Raises:
        PackError: naming every task without any.
        RecipeError: if there is no text to be like, or an option is none of those.
    """
    faults = Faults()
    if not like or not all(text.strip() for text in like):
        faults.add(
            "The text that the task should be like is missing or empty. Give class names, "
            "or a sentence."
        )
    if gamma not in GAMMAS:
        faults.add(f"Unknown gamma '{gamma}'. {nearest(gamma, GAMMAS)}")
    elif gamma != "softmax" and temperature is not None:
        faults.add("A temperature belongs to gamma softmax; the ratio has none.")
    if temperature is not None and not 0 < temperature < math.inf:
        faults.add(
            f"A temperature of {temperature:g} gives no weights. Give one above 0, such as 0.1."
        )
    faults.raise_if_any(RecipeError)
    tasks = pack.manifest.tasks
    silent = [name for name, record in tasks.items() if not record.characteristics]
    if not tasks:
        raise PackError(f"{pack.directory} has no task. Add one: personae pack --add --expert.")
    if silent:
        fix = " ".join(f"--describe {name}=TEXT" for name in silent[:3])
        raise PackError(
            f"{pack.directory} does not say what these tasks are about: {', '.join(silent)}. Say "
            f"it: personae pack --out {pack.directory} {fix} (class names separated by commas, a "
            "sentence, or @FILE). Or give --weights."
        )
    return {name: record.characteristics for name, record in tasks.items()}


def weigh(
    pack: str | Path | Pack,
    like: Sequence[str],
    encoder: TextEncoder,
    *,
    gamma: str = "ratio",
    temperature: float | None = None,
) -> Weighting:
    """Weigh the tasks of a pack by how similar their texts are to those of an unseen task.

    E is the mean over a task's texts of their item embeddings; γₙ comes from cos(Eᵤ, Eₙ).

    Args:
        pack: The pack; every task of it has characteristics (`describe`).
        like: Class names or descriptions of the unseen task.
        encoder: Embeds all texts.
        gamma: `ratio`, eq. 8 with negative cosines as 0, or `softmax`.
        temperature: Of the softmax; `TEMPERATURE` if not given.

    Raises:
        PackError: if a task has no characteristics.
        RecipeError: if there is no text, or an option is none of those.
        MethodError: if the cosines make no weights.
    """
    opened = pack if isinstance(pack, Pack) else Pack(Path(pack))
    described = weighable(opened, like, gamma=gamma, temperature=temperature)
    embedded = [mean_embedding(encoder(texts)) for texts in (like, *described.values())]
    found = cosines(embedded[0], torch.stack(embedded[1:]))
    known = dict(zip(described, found.tolist(), strict=True))
    heat = (temperature or TEMPERATURE) if gamma == "softmax" else None
    try:
        shares = ratio_weights(found) if heat is None else softmax_weights(found, heat)
    except MethodError as error:
        listed = ", ".join(f"{name} {cosine:.3f}" for name, cosine in known.items())
        raise MethodError(f"{error} Cosines: {listed}.") from error
    return Weighting(
        weights=dict(zip(described, shares.tolist(), strict=True)),
        gamma=gamma,
        temperature=heat,
        cosines=known,
        like=tuple(like),
        encoder=encoder.name,
        template=encoder.template,
    )


def given(weights: Mapping[str, float] | Weighting, manifest: Manifest, where: Path) -> Weighting:
    """Check weights against the tasks of a pack, and put them into its order.

    Raises:
        PackError: naming every task the pack does not have.
        RecipeError: if a weight is beyond float32's range, or all are 0.
    """
    weighting = weights if isinstance(weights, Weighting) else Weighting(dict(weights))
    faults = Faults()
    for name in weighting.weights:
        if name not in manifest.tasks:
            faults.add(f"{where} has no task '{name}'. {nearest(name, manifest.tasks)}")
    faults.raise_if_any(PackError)
    for name, value in weighting.weights.items():
        if not in_range(value):
            faults.add(
                f"The weight of '{name}' is {value}. Give a finite number, within float32's range."
            )
    if not any(weighting.weights.values()):
        faults.add(
            "No task has a weight other than 0, so the result would be the reference. "
            f"Weigh one of: {', '.join(manifest.tasks)}."
        )
    faults.raise_if_any(RecipeError)
    ordered = {n: weighting.weights[n] for n in manifest.tasks if n in weighting.weights}
    return replace(weighting, weights=ordered)
