"""Exports a task of a pack, or a fine-tuned model, as a LoRA adapter that engines load.

What a linear layer changed is approximated by two factors (truncated SVD); where a codec or an
adapter holds factors already, these are used. What a LoRA adapter cannot carry is saved whole on
request or left out, and in either case measured.
"""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from personae._types import TensorSpec
from personae._version import __version__
from personae.checkpoints.naming import matches, shown
from personae.commands import export_report
from personae.commands.export_ranks import DEFAULT, check_rank, choose_ranks
from personae.commands.export_report import Source
from personae.commands.export_sources import open_model, open_task
from personae.commands.unpack import unpack
from personae.errors import CheckpointError, Faults, PackError, RecipeError, nearest
from personae.family.carried import SAVEABLE, Carried, carry, target_names
from personae.ops.layout import transposed_weights
from personae.packs.manifest import MANIFEST_NAME
from personae.packs.reader import Pack
from personae.recipe import Ranks, ranks_asked
from personae.run.extract import Measured, as_matrix, measure, write_adapter
from personae.run.output import RECORD_NAME, check_output
from personae.run.work import Work
from personae.writers import output_directory, require_space
from personae.writers.adapter import CONFIG, AdapterSpec, AdapterWriter, adapter_config

DTYPES = ("float32", "float16", "bfloat16")
ALL = "all"
"""In the place of kinds of modules to save: every one that can be."""


def export(
    source: Any,
    out: str | Path,
    *,
    task: str | None = None,
    base: Any = None,
    to: Literal["peft", "hf"] = "peft",
    rank: int | None = None,
    energy: float | None = None,
    budget: str | int | None = None,
    max_rank: int | None = None,
    rank_pattern: bool = False,
    save_modules: Sequence[str] = (),
    skip: Sequence[str] = (),
    dtype: str | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
    work: Work | None = None,
) -> Path:
    """Write a LoRA adapter that PEFT and the engines that serve adapters load.

    Without `rank`, `energy` or `budget`, factors that the pack or adapter holds are kept as they
    are, and others have rank 32.

    Args:
        source: A pack's directory; or path, hub id, module or state dict of a fine-tuned model or
            adapter.
        out: Directory to write; must not exist, or be empty.
        task: Which expert of a pack.
        base: The model that the other one was fine-tuned from; of a pack, where its reference is,
            if not where the pack says.
        to: `peft`; or `hf` for a task of a pack as an ordinary checkpoint, as `unpack` writes it.
        rank: Rank of every module.
        energy: In place of a rank: the share of each module's squared norm to keep, up to 1.
        budget: In place of a rank: most bytes of the weights file, such as "50MB".
        max_rank: Bound on the ranks that are chosen.
        rank_pattern: Gives each module its own rank (`rank_pattern`), which not every engine reads
            right; by default there is one, with zeros where less is needed.
        save_modules: Kinds of modules to save whole where they changed: `head`, `embedding`,
            `norm`, `convolution`, `experts`, `other`; or `all`.
        skip: Patterns of tensors to leave out.
        dtype: `float32`, `float16` or `bfloat16`; by default the base's, if it is one of these.
        base_name: What the adapter says it is for, if not where the base was found.
        overwrite: Replace `out` if it exists.
        work: Workers, memory bound, device of the decompositions, progress.

    Returns:
        The directory written; `personae.json` in it tells what was kept and what was not.

    Raises:
        PersonaeError: for anything wrong with the input, all faults at once, before work starts
            (but for values that are not finite, which only reading finds).
    """
    work, out = work or Work(), Path(out).absolute()
    assert work.torch_device  # refused before anything is read
    pack = _pack(source)
    faults = Faults()
    asked, wrong = ranks_asked(rank, energy, budget, max_rank, rank_pattern)
    for fault in wrong:
        faults.add(fault.text)
    kinds = _kinds(save_modules, faults)
    if dtype is not None and dtype not in DTYPES:
        faults.add(f"Unknown dtype '{dtype}'. {nearest(dtype, DTYPES)}")
    _check_source(source, pack, task, base, to, faults)
    if to == "hf":
        of_adapters = {
            "save_modules": save_modules,
            "skip": skip,
            "dtype": dtype,
            "base_name": base_name,
        }
        unused = ["ranks"] if asked != Ranks() else []
        unused += [name for name, value in of_adapters.items() if value]
        if unused:
            faults.add(f"Leave out {', '.join(unused)}: 'hf' writes the expert as it is packed.")
    faults.raise_if_any(RecipeError)
    if to == "hf":
        assert task is not None
        return unpack(source, task, out, base=base, overwrite=overwrite, work=work)
    inputs = [source, base] if pack is None else [pack.directory, pack.reference_source(base)]
    check_output(out, overwrite, inputs=inputs)
    with _open(pack, source, task, base, work) as opened:
        linear = _linear(opened, skip)
        check_rank(asked, (as_matrix(opened.changes.compared[name].shape) for name in linear))
        found = measure(opened.changes, linear, spectra=energy is not None, work=work)
        measured = {name: seen for name, seen in found.items() if seen.energy}
        carried = _carried(opened, measured, kinds, skip)
        spec, ranks = _spec(opened, measured, carried, asked, dtype)
        require_space(out, spec.nbytes)
        told_notes = export_report.notes(opened, carried, spec)
        for text in told_notes:
            work.note(text)
        targets = target_names(spec.ranks, opened.model.modules)
        transposed = transposed_weights(opened.model.specs)
        with output_directory(out, overwrite=overwrite) as partial:
            with AdapterWriter(partial, spec) as writer:
                lost = write_adapter(
                    opened.changes, carried, ranks, transposed, spec.dtype, writer, work
                )
            config = adapter_config(
                spec,
                targets,
                base=base_name or opened.base,
                revision=None if base_name else opened.revision,
                task_type=opened.task_type,
                model_class=opened.model_class,
                transposed=not transposed.isdisjoint(carried.factors),
                saved=carried.saved,
            )
            (partial / CONFIG).write_bytes(config)
            told = export_report.report(opened, measured, carried, spec, targets, lost)
            card = export_report.card(opened, base_name or opened.base, told, told_notes)
            (partial / "README.md").write_text(card, encoding="utf-8")
            (partial / RECORD_NAME).write_text(_record(opened, task, told), encoding="utf-8")
    for name, fact in told.items():
        work.fact(name, fact)
    return out


def base_of(source: Any, base: Any = None) -> Any:
    """What an export of a source is relative to: the base, or of a pack its reference.

    Raises:
        PackError: if the pack is damaged.
    """
    pack = _pack(source)
    return base if pack is None else pack.reference_source(base)


def _pack(source: Any) -> Pack | None:
    """The pack, if it is one.

    Raises:
        PackError: if it is damaged.
    """
    is_pack = isinstance(source, str | Path) and (Path(source) / MANIFEST_NAME).is_file()
    return Pack(Path(source)) if is_pack else None


def _kinds(save_modules: Sequence[str], faults: Faults) -> set[str]:
    known = (*SAVEABLE, ALL)
    for kind in save_modules:
        if kind not in known:
            faults.add(f"save_modules: there is no kind '{kind}'. {nearest(kind, known)}")
    return {*SAVEABLE} if ALL in save_modules else {*save_modules}


def _check_source(
    source: Any, pack: Pack | None, task: str | None, base: Any, to: str, faults: Faults
) -> None:
    """Add faults of a source, a task and a base that do not go together."""
    source = source if isinstance(source, str | Path) else "The model"
    if to not in ("peft", "hf"):
        faults.add(f"There is no format '{to}'. {nearest(to, ('peft', 'hf'))}")
    if pack is not None and task is None:
        faults.add(f"{source} is a pack: say which task. It has {', '.join(pack.manifest.tasks)}.")
    if pack is not None and task is not None:
        try:
            pack.task(task)
        except PackError as error:
            faults.take(error)
    if pack is None and task is not None:
        faults.add(f"{source} is no pack, so it has no task '{task}'. Leave the task out.")
    if pack is None and base is None:
        faults.add(f"{source} is no pack: give the base that it was fine-tuned from (--base).")
    if pack is None and to == "hf":
        faults.add(
            f"'hf' rebuilds a task of a pack, and {source} is none: it is a model already, or an "
            "adapter. Leave the format out to write an adapter."
        )


@contextmanager
def _open(
    pack: Pack | None, source: Any, task: str | None, base: Any, work: Work
) -> Generator[Source]:
    if pack is None:
        with open_model(source, base) as opened:
            yield opened
        return
    assert task is not None
    with open_task(pack, task, base, work) as opened:
        yield opened


def _linear(source: Source, skip: Sequence[str]) -> list[str]:
    """Names of the weights that factors can be for.

    Raises:
        CheckpointError: if there are none.
    """
    compared, kinds = source.changes.compared, source.model.kinds
    found = [n for n in compared if kinds[n] == "linear" and not matches(n, skip)]
    if not found:
        raise CheckpointError(
            f"{source.place} has no linear layer that the base has too, so there is nothing for a "
            f"LoRA adapter. It has {shown(sorted(compared) or sorted(kinds))}."
        )
    return found


def _carried(
    source: Source, measured: dict[str, Measured], kinds: set[str], skip: Sequence[str]
) -> Carried:
    """How what changed is carried.

    Raises:
        CheckpointError: if nothing changed, or nothing that factors are for.
    """
    if not measured and not source.changes.private:
        raise CheckpointError(
            f"{source.place} equals the base: all {len(source.changes.compared)} shared tensors "
            "are the same. Give the fine-tuned model."
        )
    changed = {*measured, *source.changes.private}
    carried = carry(source.model, changed, kinds, source.task_type, skip)
    if not carried.factors:
        raise CheckpointError(
            f"No linear layer of {source.place} changed, so there is nothing for a LoRA adapter; "
            f"what changed: {shown(sorted(changed))}. Write the model itself."
        )
    return carried


def _spec(
    source: Source,
    measured: dict[str, Measured],
    carried: Carried,
    asked: Ranks,
    dtype: str | None,
) -> tuple[AdapterSpec, dict[str, int]]:
    """What is stored, and the rank of each tensor."""
    specs, transposed = source.changes.compared, transposed_weights(source.model.specs)
    shapes: dict[str, tuple[int, int]] = {}
    for name in carried.factors:
        rows, columns = specs[name].shape
        shapes[name] = (columns, rows) if name in transposed else (rows, columns)
    chosen = getattr(torch, dtype) if dtype else _main_dtype(list(specs.values()))
    whole = [
        TensorSpec(place, own.shape, chosen if own.is_floating else own.dtype)
        for place, name in carried.whole.items()
        for own in [source.model.specs[name]]
    ]
    modules = carried.factors

    def spec_of(ranks: dict[str, int]) -> AdapterSpec:
        return AdapterSpec(
            {modules[name]: shape for name, shape in shapes.items()},
            {modules[name]: rank for name, rank in ranks.items()},
            chosen,
            whole,
        )

    held = {name: measured[name].held for name in shapes}
    ranks = choose_ranks(
        asked,
        {name: DEFAULT if rank is None else max(rank, 1) for name, rank in held.items()},
        {name: min(held[name] or min(shape), *shape) for name, shape in shapes.items()},
        lambda ranks: spec_of(dict(ranks)).nbytes,
        {name: measured[name].energies for name in shapes},
    )
    return spec_of(ranks), ranks


def _main_dtype(specs: Sequence[TensorSpec]) -> torch.dtype:
    """What most numbers of the base are stored in, if an adapter can be, else fp32."""
    known = [getattr(torch, name) for name in DTYPES]
    counts = {dtype: sum(s.numel for s in specs if s.dtype == dtype) for dtype in known}
    return max(known, key=lambda dtype: counts[dtype])


def _record(source: Source, task: str | None, told: dict[str, Any]) -> str:
    content = {
        "kind": "adapter",
        "tool_version": __version__,
        "source": source.place,
        "task": task,
        "base": source.base,
        "revision": source.revision,
        **told,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
