"""Analyses of a family's task vectors: linear layers, one at a time, within a memory bound."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from personae.checkpoints.naming import matches
from personae.errors import CheckpointError, Faults, MethodError, RecipeError, nearest
from personae.family.chunks import Chunk, whole_or_matrices
from personae.family.deltas import Stacks
from personae.family.opened import open_family
from personae.methods import Parameters, build
from personae.methods.analyses import ANALYSES, Analysis, Findings
from personae.run.work import Work

BYTES_PER_ENTRY = 64
"""Peak bytes an entry of the stack: stack, its joint SVD, what is pruned of both."""


def analyse(
    base: Any,
    experts: Mapping[str, Any],
    analysis: str,
    *,
    tensors: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
    work: Work | None = None,
) -> dict[str, Any]:
    """Run one analysis of the DRM paper over linear layers of a family.

    Args:
        base: Path, hub id, module or mapping of the base; None: difference vectors.
        experts: Name to path, hub id, module or mapping.
        analysis: Its name, a key of `ANALYSES`.
        tensors: Patterns of tensor names; all linear layers where none is given.
        parameters: The analysis's parameters.
        skip: Patterns of tensors to leave out.
        work: Workers, memory bound, progress.

    Returns:
        Plain values that print as JSON: `analysis`, `summary`, `parameters`, `experts`, and
        `tensors`, name to findings.

    Raises:
        MethodError: for an unknown analysis or parameter, or a value out of range.
        RecipeError: if no linear layer is meant, or there is no expert.
        CheckpointError: for what cannot be read, does not fit, or is not finite.
        BudgetError: if the memory bound is below the largest item.
    """
    work = work or Work()
    if analysis not in ANALYSES:
        raise MethodError(f"Unknown analysis '{analysis}'. {nearest(analysis, ANALYSES)}")
    chosen = ANALYSES[analysis]
    built = build(chosen.parameters, parameters or {})
    with open_family(base, experts, skip=skip) as family:
        for expert in family.experts.values():
            for note in expert.naming_notes:
                work.note(note)
        for note in family.base_notes:
            work.note(note)
        stacks = Stacks(family)
        specs = family.base.specs
        names = [name for name in stacks.names if not _left_out(name, tensors)]
        chunks = [chunk for name in names for chunk in whole_or_matrices(specs[name])]
        chunks = [p for p in chunks if stacks.site(p).kind == "linear" and p.numel]
        if not chunks:
            raise RecipeError(
                f"No linear layer that every expert has matches {', '.join(tensors)}; '*' matches "
                "any text. `personae inspect BASE --tensors` lists the names."
                if tensors
                else "The experts share no linear layer, and analyses use linear layers only."
            )
        found: dict[str, Findings] = {}
        faults = Faults()
        for chunk, (findings, wrong) in work.map(
            chunks,
            partial(_analyse, chosen, built, stacks),
            cost=lambda chunk: BYTES_PER_ENTRY * stacks.experts * chunk.numel + 8 * chunk.numel,
            stage=f"analysing ({analysis})",
        ):
            for fault in wrong:
                faults.add(fault)
            name = chunk.spec.name
            found[f"{name}[{chunk.start}]" if chunk.is_matrix else name] = findings
        faults.raise_if_any(CheckpointError)
    return {
        "analysis": analysis,
        "summary": chosen.summary,
        "parameters": built.model_dump(mode="json"),
        "experts": list(experts),
        "tensors": dict(sorted(found.items())),
    }


def _left_out(name: str, patterns: Sequence[str]) -> bool:
    return bool(patterns) and not matches(name, patterns)


def _analyse(
    analysis: Analysis, parameters: Parameters, stacks: Stacks, chunk: Chunk
) -> tuple[Findings, list[str]]:
    """Findings of one tensor, stored (in, out) or not; and what is not finite in it."""
    stack, _ = stacks.read(chunk)
    faults = stacks.faults(stack, chunk)
    if faults:
        return {}, faults
    stack = stack.mT if stacks.site(chunk).transposed else stack
    return analysis.function(stack, **dict(parameters)), []
