"""Merges state dicts in memory: the same methods on the same task vectors, without a file."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from personae.commands.merge_job import open_to_merge, prepare, settings_for
from personae.errors import CheckpointError, Faults
from personae.family.chunks import whole, whole_or_matrices
from personae.family.finite import converging
from personae.methods import DeltaBlocks, Entrywise, MergeMethod, Site, Statistics, joined
from personae.recipe import MergeSettings
from personae.run.work import quiet_numbers
from personae.writers import cast

StateDict = Mapping[str, Tensor]


def merge_state_dicts(
    base: StateDict | None,
    experts: Sequence[StateDict] | Mapping[str, StateDict],
    method: MergeMethod,
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Merge models that are in memory.

    All task vectors are held at once, in fp32. For models on disk, `merge` streams.

    Args:
        base: The base; None for difference vectors, which are relative to the experts' average.
        experts: The fine-tuned models, in order; with names if errors shall name them.
        method: The method with its parameters.
        skip: Patterns of tensors left as in the base.
        only: Patterns of tensors merged, if not all.

    Returns:
        The merged model: the base's names, shapes and dtypes.

    Raises:
        PersonaeError: Models do not fit each other, or hold values that are not finite; all faults
            at once.

    Examples:
        >>> import torch
        >>> from personae import Average, merge_state_dicts
        >>> base = {"layer.weight": torch.zeros(2, 2)}
        >>> experts = [{"layer.weight": torch.ones(2, 2)}, {"layer.weight": 3 * torch.ones(2, 2)}]
        >>> merge_state_dicts(base, experts, Average())["layer.weight"].tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    named = experts
    if not isinstance(named, Mapping):
        named = {str(number): state for number, state in enumerate(named, 1)}
    settings = MergeSettings.of(method, len(named), skip=tuple(skip), only=tuple(only))
    settings = settings_for(base, settings)
    with quiet_numbers(), open_to_merge(base, named, settings) as family:
        job, faults = prepare(family, settings), Faults()
        specs = {spec.name: spec for spec in job.specs}
        chunks = [p for name in sorted(job.merged) for p in whole_or_matrices(specs[name])]
        read = [(chunk, *job.stacks.read(chunk)) for chunk in chunks]
        for chunk, stack, reference in read:
            for fault in job.stacks.faults(stack, chunk, reference):
                faults.add(fault)
        faults.raise_if_any(CheckpointError)
        if job.stacks.needs_models(method):
            read = [
                (chunk, torch.stack(job.stacks.models(method, stack, reference)), torch.zeros(()))
                for chunk, stack, reference in read
            ]
        statistics = None
        if method.has_passes() and method.passes_over == "model":
            seen = [(job.stacks.site(chunk), stack) for chunk, stack, _ in read]
            statistics = method.statistics(seen)
        result = {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype)
            if spec.name in job.merged
            else job.stacks.reference(whole(spec)).to(spec.dtype, copy=True)
            for spec in job.specs
        }
        for chunk, stack, reference in read:
            with converging(chunk.spec.name):
                value = _merged(method, stack, reference, statistics, job.stacks.site(chunk))
            rows = cast(value, specs[chunk.spec.name], computed=True)
            if chunk.is_whole:
                result[chunk.spec.name] = rows
            else:
                result[chunk.spec.name][chunk.start] = rows
    return result


def _merged(
    method: MergeMethod,
    stack: Tensor,
    reference: Tensor,
    statistics: Statistics | None,
    site: Site,
) -> Tensor:
    """The merged values; a method of entries is told of the reference, as it is of files."""
    if not isinstance(method, Entrywise) or method.of_models():
        return method.apply(stack, statistics, site) + reference
    if statistics is None:
        statistics = method.statistics([(site, stack)])
    blocks = DeltaBlocks(list(stack), reference, are_deltas=True).in_rows(method.row_entries(site))
    return joined(method.merge_blocks(blocks, statistics, site), stack) + reference
