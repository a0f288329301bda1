"""A weighted sum of decoded deltas on the reference, tensor by tensor, as a lazy state dict.

θ̂ᵤ = θ_ref + Σ γₙ δ̂ₙ (DTS, arXiv 2512.01461, section on unseen tasks), one decoded delta at a time.
Heads are never mixed: they answer different questions.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints import Checkpoint
from personae.checkpoints.naming import shown
from personae.packs.reader import Pack
from personae.packs.weighting import Weighting, given
from personae.run import outline
from personae.run.outline import Outline
from personae.run.rebuilt import Rebuilt, held
from personae.run.reference import open_reference
from personae.run.work import Work


class Composed(Mapping):
    """A composed model as a lazy state dict: a tensor is composed when it is looked up.

    Names are those in checkpoint files, tied ones too. A class of transformers takes them as
    `from_pretrained(None, config=config, state_dict=dict(composed))`, a module that names its
    tensors likewise as `load_state_dict(dict(composed))`.

    Attributes:
        outline: Names, dtypes and small files of the result.
        weighting: The weight of each task.
        notes: What a person should know: what was not composed.
    """

    def __init__(
        self,
        reference: Checkpoint,
        rebuilt: Mapping[str, Rebuilt],
        weighting: Weighting,
        of: Outline,
    ) -> None:
        """Take what is there; reads no tensor."""
        self.outline = of
        self.weighting = weighting
        self._reference = reference
        self._parts = [
            (weight, rebuilt[name]) for name, weight in weighting.weights.items() if weight
        ]
        self.notes = [*weighting.notes, *_kept_apart(rebuilt, of)]

    @property
    def coded(self) -> set[str]:
        """Names of tensors to which a delta is added."""
        changed = {name for _, rebuilt in self._parts for name in rebuilt.record.tensors}
        names = self.outline.reference_names.items()
        return {name for name, ref_name in names if ref_name in changed}

    def compose(self, name: str) -> Tensor:
        """One tensor: fp32 if a delta was added, else of its own dtype."""
        ref_name = self.outline.reference_names.get(name)
        if ref_name is None:
            return self.outline.whole(name)
        total: Tensor | None = None
        for weight, rebuilt in self._parts:
            if ref_name not in rebuilt.record.tensors:
                continue  # as in the reference, or kept whole: nothing to add
            delta = rebuilt.delta(ref_name)
            total = delta.mul_(weight) if total is None else total.add_(delta, alpha=weight)
        tensor = self._reference.read(ref_name)
        if total is not None:
            tensor = held(total.add_(tensor), self.outline.specs[name].dtype)
        if name in self.outline.grown:
            tensor = torch.cat([tensor, self.outline.whole(name)])
        return tensor

    def cost(self, spec: TensorSpec) -> int:
        """Peak memory of composing one tensor: decoding one delta, and the sum so far."""
        ref_name = self.outline.reference_names.get(spec.name, "")
        most = max((rebuilt.cost(ref_name) for _, rebuilt in self._parts), default=0)
        return max(most, 2 * spec.nbytes) + 4 * spec.numel

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, in the dtype it is written in."""
        kept = self.outline.tied.get(name, name)
        return self.compose(kept).to(self.outline.specs[kept].dtype)

    def __iter__(self) -> Iterator[str]:
        """Every name, tied ones last."""
        yield from self.outline.specs
        yield from self.outline.tied

    def __len__(self) -> int:
        """Number of names."""
        return len(self.outline.specs) + len(self.outline.tied)

    def close(self) -> None:
        """Release the files of the reference and of the head."""
        self._reference.close()
        self.outline.close()


def open_composed(
    pack: str | Path,
    weights: Mapping[str, float] | Weighting,
    *,
    base: Any = None,
    head: str | Path | None = None,
    work: Work | None = None,
) -> Composed:
    """Compose lazily: a mapping of names to tensors that computes each when it is read.

    Args:
        pack: The pack's directory.
        weights: Task name to weight, or what `weigh` found; tasks not named count 0.
        base: Where the reference is, if not where the pack says.
        head: Whose head to attach: a task of the pack, or else a checkpoint (directory, hub id)
            of the same architecture. Without one the result is like the reference.
        work: Workers for checking the reference, device of the decoding.

    Raises:
        PersonaeError: if the pack, its reference, a weight or the head is not what it should be.
    """
    work = work or Work()
    device = work.torch_device
    opened = Pack(Path(pack))
    weighting = given(weights, opened.manifest, opened.directory)
    reference = open_reference(opened, base, work)
    needed = [name for name, weight in weighting.weights.items() if weight]
    if head in opened.manifest.tasks:
        needed.append(str(head))
    rebuilt = {name: Rebuilt(opened, name, reference, device) for name in dict.fromkeys(needed)}
    if head is None:
        of = outline.of_reference(reference)
    elif head in rebuilt:
        of = outline.of_task(opened, rebuilt[str(head)], str(head))
    else:
        refuse_task(opened, head)
        manifest = opened.manifest
        of = outline.of_checkpoint(reference, head, manifest.skip, manifest.private)
    return Composed(reference, rebuilt, weighting, of)


def refuse_task(pack: Pack, head: str | Path | None) -> None:
    """A word that is neither a task nor a path was meant to be a task.

    Raises:
        PackError: naming the nearest task.
    """
    if isinstance(head, str) and "/" not in head and not Path(head).exists():
        pack.task(head)


def _kept_apart(rebuilt: Mapping[str, Rebuilt], of: Outline) -> list[str]:
    """Say which tensors the weighted tasks keep whole, which are no part of the sum."""
    notes = [
        f"{name}: kept whole, so not composed: {shown(sorted(one.record.private))}"
        for name, one in rebuilt.items()
        if one.record.private and one.record.private.keys() - of.kept
    ]
    if notes and not of.kept:
        notes.append("the result has the reference's head, if any; --head attaches a task's")
    return notes
