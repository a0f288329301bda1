"""A model read in the layout of its base, where versions of transformers lay out tensors apart."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.class_layouts import Layout, class_told_by
from personae.checkpoints.expert_layouts import with_experts_like
from personae.checkpoints.laid_out import Kept, LaidOut, Made
from personae.checkpoints.published_layouts import (
    Renamed,
    in_layer,
    laid_out_note,
    unmet,
    with_layout_like,
)
from personae.checkpoints.published_renames import published_renames
from personae.checkpoints.renames import canonical


def laid_out_like(base: Checkpoint, model: Checkpoint) -> Checkpoint:
    """A full model as its base is stored; the model itself where that is no other way.

    Rules that speak of one model in another are told apart by the class of the base, which is
    built only where other rules leave tensors in layers that do not meet.

    Raises:
        CheckpointError: A config.json is damaged.
    """
    found = with_layout_like(base, with_experts_like(base, model))
    left = _apart(base, found, in_layers=found is model)
    if not left:
        return found
    by_class = _with_class_layout_like(base, model)
    return by_class if by_class is not None and _apart(base, by_class) < left else found


def _apart(base: Checkpoint, model: Checkpoint, *, in_layers: bool = False) -> int:
    """How many tensors of the base a model lacks, where it has others; or 0 if none is in a layer.

    Heads differ without another layout, and the numbers of layers.
    """
    theirs, ours = unmet(base, model)
    if not (theirs and ours) or (in_layers and not _both_in_layers(theirs, ours)):
        return 0
    theirs, ours = unmet(base, model, [canonical, *published_renames(base, model)])
    if in_layers and not _both_in_layers(theirs, ours):
        return 0
    return len(theirs) if ours else 0


def _both_in_layers(theirs: set[str], ours: set[str]) -> bool:
    return any(map(in_layer, theirs)) and any(map(in_layer, ours))


def _with_class_layout_like(base: Checkpoint, model: Checkpoint) -> Checkpoint | None:
    """The model by way of what both are in memory; None where nothing is to be laid out."""
    told = class_told_by(base)
    theirs, ours = (None if told is None else told.in_memory(one) for one in (base, model))
    if theirs is None or ours is None:
        return None
    made = dict(_made(base, theirs, model, ours))
    if all(isinstance(how, Renamed) for how in made.values()):
        return None
    called = {theirs.names.get(name, name): name for name in (*base.specs, *base.tied)}

    def as_base(name: str) -> str:
        there = ours.names.get(name, name)
        return called.get(there, name)

    tied = {as_base(dropped): as_base(kept) for dropped, kept in model.tied.items()}
    return LaidOut(model, made, laid_out_note(made), tied)


def _made(
    base: Checkpoint, theirs: Layout, model: Checkpoint, ours: Layout
) -> Iterator[tuple[TensorSpec, Made]]:
    """What of the base is made of tensors that the model calls or lays out otherwise."""
    wanted, view = theirs.of(base), ours.of(model)
    in_memory = {spec.name: how for spec, how in ours.there.items()}
    of_base = {spec.name: how for spec, how in theirs.back.items()}
    for name in base.specs:
        how = of_base.get(name, Renamed(name))
        if any(used not in view.specs for used in how.used):
            continue
        sources = [view.specs[used] for used in how.used]
        if isinstance(how, Renamed):
            (one,) = sources
            own = in_memory.get(one.name, Renamed(one.name))
            if own != Renamed(name):
                yield TensorSpec(name, one.shape, one.dtype), own
        elif all(wanted.specs[spec.name].shape == spec.shape for spec in sources):
            stored = [in_memory.get(spec.name, Renamed(spec.name)) for spec in sources]
            used = tuple(dict.fromkeys(n for one in stored for n in one.used))
            spec = TensorSpec(name, base.specs[name].shape, sources[0].dtype)
            wider = -(-spec.dtype.itemsize // base.specs[name].dtype.itemsize)
            kept = view.kept_bytes + wider * how.kept_bytes
            yield spec, _Through(view, how, used, kept)


@dataclass(frozen=True)
class _Through:
    """What is made of a model in another layout.

    Attributes:
        view: The model in that layout.
        how: How it is made of tensors there.
        used: The stored ones that those are made of.
        kept_bytes: Memory of what a thread keeps of both.
    """

    view: Checkpoint
    how: Made
    used: tuple[str, ...]
    kept_bytes: int

    def read_rows(self, model: Checkpoint, keep: Kept, start: int, stop: int) -> Tensor:
        del model
        return self.how.read_rows(self.view, keep, start, stop)
