"""Merges LoRA adapters into one: what they change is merged, and written as factors again.

Sums of task vectors are exact, as the factors side by side are those of the sum. Whatever another
method gives is approximated (truncated SVD) at a rank, and what that loses is measured. The base is
read where adapters store tensors whole, and nowhere else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from personae._types import TensorSpec, dtype_name
from personae._version import __version__
from personae.checkpoints.opening import is_hub_id
from personae.commands import export_report
from personae.commands.export_ranks import check_rank, choose_ranks
from personae.commands.export_report import Source
from personae.commands.merge_changes import is_sum, merging_bytes, of_merge
from personae.commands.merge_job import MergeJob
from personae.errors import CheckpointError
from personae.family.carried import Carried, Model, describe
from personae.family.joint_adapter import join
from personae.recipe import MergePart, merge_recipe_text
from personae.run.changes import Changes
from personae.run.extract import Measured, as_matrix, extracting_bytes, measure, write_adapter
from personae.run.output import RECORD_NAME
from personae.run.work import Work
from personae.writers import output_directory, require_space
from personae.writers.adapter import CONFIG, AdapterSpec, AdapterWriter, adapter_config
from personae.writers.adapter_card import AdapterFacts, adapter_card
from personae.writers.markdown import code


@dataclass(frozen=True)
class AdapterPlan:
    """The adapter that a merge writes.

    Attributes:
        rank: Its rank, the largest if there are several; with `energy`, at most.
        modules: Number of modules that it adapts.
        whole: Number of tensors that it stores whole.
        exact: Whether factors are the sum's own, so that nothing is lost but by rounding.
        dtype: What it is stored in.
        bytes: Of the weights file; with `energy`, at most.
    """

    rank: int
    modules: int
    whole: int
    exact: bool
    dtype: str
    bytes: int


class AdapterMerge:
    """A merge whose experts are adapters, and that writes one: all of it that headers tell."""

    def __init__(self, part: MergePart, job: MergeJob) -> None:
        """Work out what is written.

        Raises:
            CheckpointError: if nothing is left to adapt.
            RecipeError: if a rank is asked for that no matrix has.
        """
        settings = part.settings
        self.part, self.job = part, job
        self.joint = join(job.family, settings.skip, settings.only)
        if not self.joint.factors:
            raise CheckpointError(
                "The adapters adapt nothing that is not left out by 'skip' and 'only', so there "
                "is no adapter to write."
            )
        shapes = (job.family.base.specs[name].shape for name in self.joint.factors)
        check_rank(settings.ranks(), map(as_matrix, shapes))

    def plan(self) -> AdapterPlan:
        """What is written, from headers.

        Raises:
            BudgetError: if the budget is below what rank 1 takes.
        """
        spec = self.spec(self.ranks())
        most = self._most()
        return AdapterPlan(
            rank=max(spec.ranks.values()),
            modules=len(spec.shapes),
            whole=len(spec.whole),
            exact=all(
                is_sum(self.job, name) and spec.ranks[module] >= most[name]
                for name, module in self.joint.factors.items()
            ),
            dtype=dtype_name(spec.dtype),
            bytes=spec.nbytes,
        )

    def costs(self) -> list[int]:
        """Peak bytes of each tensor: merging it, and its factors."""
        specs, ranks = self.job.family.base.specs, self.ranks()
        return [
            merging_bytes(self.job, name)
            + (extracting_bytes(specs[name].shape, ranks[name]) if name in ranks else 0)
            for name in self.joint.tensors
        ]

    def ranks(self, measured: Mapping[str, Measured] | None = None) -> dict[str, int]:
        """The rank of each tensor; those that `energy` asks for are known once it is measured.

        Raises:
            BudgetError: if the budget is below what rank 1 takes.
        """
        asked, most = self.part.settings.ranks(), self._most()
        sums = {name: is_sum(self.job, name) for name in self.joint.factors}
        usual = {n: most[n] if sums[n] else min(self.joint.rank, most[n]) for n in sums}
        if asked.energy is not None:
            usual = most
        energies = {n: measured[n].energies for n in usual} if measured else None
        return choose_ranks(asked, usual, most, lambda ranks: self.spec(ranks).nbytes, energies)

    def spec(self, ranks: Mapping[str, int]) -> AdapterSpec:
        """What is stored at given ranks."""
        joint, specs = self.joint, self.job.family.base.specs
        dtype = self.part.settings.dtype
        chosen = getattr(torch, dtype) if dtype else joint.dtype
        shapes = {name: specs[name].shape for name in joint.factors}
        return AdapterSpec(
            {
                joint.factors[name]: shape[::-1] if name in joint.transposed else shape
                for name, shape in shapes.items()
            },
            {joint.factors[name]: ranks[name] for name in shapes},
            chosen,
            [
                TensorSpec(place, own.shape, chosen if own.is_floating else own.dtype)
                for place, name in joint.whole.items()
                for own in [specs[name]]
            ],
            frozenset(joint.factors[name] for name in joint.embeddings),
        )

    def _most(self) -> dict[str, int]:
        """The rank of each tensor that loses nothing."""
        found: dict[str, int] = {}
        for name in self.joint.factors:
            side = min(as_matrix(self.job.family.base.specs[name].shape))
            found[name] = min(self.joint.ranks[name], side) if is_sum(self.job, name) else side
        return found


def write_merged_adapter(
    merge: AdapterMerge, out: Path, *, overwrite: bool, recipe: str | None, work: Work
) -> Path:
    """Merge adapters into a directory that PEFT loads.

    Args:
        merge: What is merged.
        out: Where to.
        overwrite: Replace `out` if it exists.
        recipe: The recipe's text for the card; by default written from the settings.
        work: Workers, memory bound, device of the decompositions, progress.

    Returns:
        The directory written; `personae.json` in it tells what was kept and what was not.

    Raises:
        PersonaeError: for what is wrong with the values or the disk.
    """
    job, joint, asked = merge.job, merge.joint, merge.part.settings.ranks()
    require_space(out, merge.plan().bytes if asked.energy is None else 0)
    changes = of_merge(job, joint, work)
    spectra = asked.energy is not None
    measured = measure(changes, [*joint.factors], spectra=spectra, work=work)
    ranks = merge.ranks(measured)
    spec = merge.spec(ranks)
    require_space(out, spec.nbytes)
    carried = Carried(joint.factors, joint.whole, joint.saved, ())
    source = _source(merge, changes)
    notes = export_report.notes(source, carried, spec)
    for text in notes:
        work.note(text)
    with output_directory(out, overwrite=overwrite) as partial:
        with AdapterWriter(partial, spec) as writer:
            lost = write_adapter(
                changes, carried, ranks, joint.transposed, spec.dtype, writer, work
            )
        config = adapter_config(
            spec,
            joint.targets,
            base=source.base,
            revision=source.revision,
            task_type=joint.task_type,
            model_class=joint.model_class if joint.task_type is None else None,
            transposed=not (joint.transposed - joint.embeddings).isdisjoint(joint.factors),
            saved=joint.saved,
            bias=joint.bias,
        )
        (partial / CONFIG).write_bytes(config)
        told = export_report.report(source, measured, carried, spec, joint.targets, lost)
        card = _card(out.name, merge, source, told, notes, recipe)
        (partial / "README.md").write_text(card, encoding="utf-8")
        (partial / RECORD_NAME).write_text(_record(merge, source, told), encoding="utf-8")
    work.fact("adapter", told)
    return out


def _source(merge: AdapterMerge, changes: Changes) -> Source:
    """The merge as what an adapter is made from, for reports."""
    family, joint = merge.job.family, merge.joint
    model: Model = describe(family.base.specs, (), tied=family.base.tied, says_tied=False)
    names = ", ".join(family.experts)
    return Source(
        name=names,
        place=names,
        changes=changes,
        model=replace(model, places={**model.places, **joint.factors}),
        base=joint.base or family.base.source,
        revision=joint.revision if joint.base else family.base.revision,
        task_type=joint.task_type,
        model_class=joint.model_class,
    )


def _card(
    title: str,
    merge: AdapterMerge,
    source: Source,
    told: Mapping[str, Any],
    notes: Sequence[str],
    recipe: str | None,
) -> str:
    settings, family = merge.part.settings, merge.job.family
    base = None if merge.part.base is None else family.base.source
    places = {name: expert.checkpoint.source for name, expert in family.experts.items()}
    name = source.base.partition("@")[0]
    made = f"merged by {code(settings.merge_method().name)} from the adapters "
    facts = AdapterFacts(
        title=title,
        made=made + ", ".join(code(place) for place in places.values()),
        base=source.base,
        hub_id=name if is_hub_id(name) else None,
        rank=f"rank {told['rank']}" if not told["ranks"] else f"ranks up to {told['rank']}",
        dtype=told["dtype"],
        summary=export_report.summary(told),
        rows=export_report.rows(told),
        notes=[*notes],
        versions={"personae": __version__, "torch": version("torch")},
        recipe=recipe or merge_recipe_text(base, places, settings),
    )
    return adapter_card(facts)


def _record(merge: AdapterMerge, source: Source, told: Mapping[str, Any]) -> str:
    content = {
        "kind": "adapter",
        "tool_version": __version__,
        "method": merge.part.settings.method,
        "experts": [e.checkpoint.source for e in merge.job.family.experts.values()],
        "base": source.base,
        "revision": source.revision,
        **told,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
