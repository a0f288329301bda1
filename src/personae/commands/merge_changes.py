"""What a merge of adapters changes of their base, tensor by tensor, without forming the model."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from personae.commands.merge_job import MergeJob
from personae.family.chunks import Chunk, Item
from personae.family.finite import converging, is_finite
from personae.family.joint_adapter import JointAdapter
from personae.methods import NotFinite, Statistics
from personae.run.changes import Changes, Factors
from personae.run.passes import passes_over_family, passes_over_tensor
from personae.run.work import Work


def of_merge(job: MergeJob, joint: JointAdapter, work: Work) -> Changes:
    """Take the passes of the method; then each delta is merged when it is asked for.

    Where the method is a sum of task vectors, the merged factors are theirs side by side: the sum
    of the products is a product again, of exactly the sum of the ranks.

    Raises:
        CheckpointError: naming every weight that is not finite.
    """
    merged = _Merged(job, joint, _statistics(job, joint, work), work.torch_device)
    specs = job.family.base.specs
    return Changes(
        specs=specs,
        compared={name: specs[name] for name in sorted(joint.tensors)},
        private=frozenset(),
        tied=job.family.base.tied,
        unchanged=lambda name: False,
        delta=merged.delta,
        factors=merged.factors,
        value=merged.value,
        cost=partial(merging_bytes, job),
        why_not_finite=merged.why_not_finite,
    )


def is_sum(job: MergeJob, name: str) -> bool:
    """Whether the merged delta of an adapted weight is a sum of the task vectors."""
    return name in job.merged and job.method_of(name).coefficients(job.stacks.experts) is not None


def merging_bytes(job: MergeJob, name: str) -> int:
    """Peak bytes of a merged delta, or of the value that it gives."""
    entries = job.family.base.specs[name].numel
    chunks, undivided = job.pieces[name]
    merging = max(job.chunk_cost(chunk, undivided) for chunk in chunks)
    in_factors = is_sum(job, name) and len(job.family.base.specs[name].shape) == 2
    return 8 * entries + (0 if in_factors else merging)


def _statistics(job: MergeJob, joint: JointAdapter, work: Work) -> Statistics | None:
    if not job.method.has_passes() or job.per_tensor:
        return None
    items = job.items_of(joint.tensors & job.merged)

    def cost(item: Item) -> int:
        return max(job.chunk_cost(chunk, item.whole) for chunk in item.chunks)

    return passes_over_family(job.method_of, job.stacks, items, cost, work, late=False)


@dataclass(frozen=True)
class _Merged:
    """The merged deltas of a family of adapters."""

    job: MergeJob
    joint: JointAdapter
    statistics: Statistics | None
    device: torch.device

    def factors(self, name: str) -> Factors | None:
        """Exact factors of a sum; None of any other."""
        if name not in self.joint.factors or not is_sum(self.job, name):
            return None
        own = self.job.stacks.factors(name)
        coefficients = self.job.method_of(name).coefficients(self.job.stacks.experts)
        if own is None or coefficients is None:
            return None
        pairs = [(c * left, right) for c, (left, right) in zip(coefficients, own, strict=True)]
        lefts, rights = zip(*pairs, strict=True)
        return torch.cat(lefts, dim=1), torch.cat(rights)

    def delta(self, name: str) -> Tensor:
        """The merged task vector, fp32; not finite where a model is not."""
        factors = self.factors(name)
        if factors is not None:
            return factors[0] @ factors[1]
        job, spec = self.job, self.job.family.base.specs[name]
        delta = torch.zeros(spec.shape)
        if name not in job.merged:
            return delta
        chunks, undivided = self.job.pieces[name]
        try:
            statistics = self.statistics
            if job.per_tensor:
                method = job.method_of(name)
                statistics = passes_over_tensor(method, job.stacks, chunks, late=False)
            for chunk in chunks:
                found = self._merge(chunk, statistics, undivided)
                if chunk.is_matrix:
                    delta[chunk.start] = found
                elif spec.shape:
                    delta[chunk.start : chunk.stop] = found
                else:
                    delta.copy_(found)
        except NotFinite:
            delta.fill_(torch.nan)
        return delta

    def value(self, name: str) -> Tensor:
        """The base's values with the merged task vector, in fp32; or as the base has them."""
        value = self.job.family.base.read(name)
        return value.float() + self.delta(name) if name in self.job.merged else value

    def why_not_finite(self, name: str) -> list[str]:
        """What to tell of a delta that is not finite."""
        return self.job.stacks.why_not_finite(self.job.pieces[name][0][0])

    def _merge(self, chunk: Chunk, statistics: Statistics | None, undivided: bool) -> Tensor:
        job = self.job
        method = job.method_of(chunk.spec.name)
        stack, site, expand, _ = job.stacks.given(method, chunk, undivided)
        if not is_finite(stack):
            raise NotFinite
        if not undivided:
            return method.apply(stack, statistics, site)
        with converging(chunk.spec.name):
            return expand(method.apply(stack.to(self.device), statistics, site).cpu())
