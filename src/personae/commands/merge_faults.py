"""What headers tell against merging a family, all at once."""

from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.naming import matches, patterns, shown
from personae.errors import Faults
from personae.family.alignment import Alignment
from personae.family.mean import MeanOf
from personae.family.misfits import reference_name, trained_apart
from personae.family.opened import Family
from personae.methods import MergeMethod
from personae.recipe import MergeSettings


def check_family(family: Family, settings: MergeSettings, faults: Faults) -> None:
    """Add everything in the headers that keeps the experts from being merged as settings say."""
    for name, expert in family.experts.items():
        _check_shapes(name, expert, family, faults)
        _check_dtypes(name, expert, family, settings, faults)
        _check_ties(name, expert, family, faults)
    if not family.has_base:
        _check_average(family, settings, faults)
    _check_adapters(family, settings.merge_method(), faults)
    if faults.messages:  # such as shapes that a mistyped 'skip' does not leave out
        for pattern in settings.unmatched(all_names(family)):
            faults.add(f"{pattern} matches no tensor; '*' matches any text.")


def all_names(family: Family) -> set[str]:
    """Every tensor name in the family, as the reference and as the experts' files have it."""
    checkpoints = (one.checkpoint for one in family.experts.values())
    names = family.base.specs.keys() | family.base.copies
    return names.union(*(checkpoint.specs for checkpoint in checkpoints))


def _check_shapes(name: str, expert: Alignment, family: Family, faults: Faults) -> None:
    if not family.has_base:
        return
    specs = family.base.specs
    odd = [(own, reference_name(own, expert, family.base)) for own in expert.private]
    for own, known in odd:
        has = expert.private_spec(own)
        if known and has.numel and specs[known].numel:  # empty ones are told of already
            wanted = specs[known]
            alike = has.shape == wanted.shape  # then one holds numbers and the other integers
            faults.add(
                f"Expert '{name}': tensor '{own}' is {has.dtype_name if alike else has.shape}, "
                f"the base's {wanted.dtype_name if alike else wanted.shape}. Tensors of different "
                f"{'kinds' if alike else 'shapes'} cannot be merged: leave it as in the base with "
                f"skip: ['{known}']."
            )
    for grown in expert.grown:
        faults.add(
            f"Expert '{name}': '{grown}' has {expert.spec(grown).shape[0]} rows, the base "
            f"{specs[grown].shape[0]}. Choose the vocabulary of the output: tokenizer_source."
        )


def _check_ties(name: str, expert: Alignment, family: Family, faults: Faults) -> None:
    """An output layer of its own beside a tied one has no place in the result, nor the reverse."""
    base, whose = family.base, "base" if family.has_base else "first expert"
    for own, kept in trained_apart(expert, base).items():
        faults.add(
            f"Expert '{name}': '{own}' was trained separately from '{kept}', to which the {whose} "
            "ties it: merged into one tensor, one training of the two would be lost. Give a "
            f"{whose} that is untied (tie_word_embeddings: false, '{own}' stored), and experts "
            "likewise."
        )
    for lacking in expert.absent:
        own = expert.renaming.expert_name(lacking)
        if own in expert.tied and base.specs[lacking].is_floating:
            faults.add(
                f"Expert '{name}' ties '{own}' to '{expert.tied[own]}', and the {whose} has both "
                "apart: its training of the two would not be merged. Save the expert untied "
                "(tie_word_embeddings: false, both stored)."
            )


def _check_dtypes(
    name: str, expert: Alignment, family: Family, settings: MergeSettings, faults: Faults
) -> None:
    """Experts of another dtype can be merged, once it is said what shall come out."""
    if settings.dtype is not None or adapter_of(expert.checkpoint):
        return
    whose = "the base's" if family.has_base else "the first expert's"
    for shared in expert.shared:
        found, wanted = expert.spec(shared).dtype_name, family.base.specs[shared].dtype_name
        if found != wanted:
            faults.add(
                f"Expert '{name}': '{shared}' is {found}, {whose} is {wanted}. Set the dtype of "
                f"the output: dtype: {wanted}."
            )
            return


def _check_average(family: Family, settings: MergeSettings, faults: Faults) -> None:
    """Without a base, what the experts do not share in one shape has nothing to stay as."""
    assert isinstance(family.base, MeanOf)
    for name, expert in family.experts.items():
        apart = trained_apart(expert, family.base)
        odd = [n for n in expert.private if not matches(n, settings.skip) and n not in apart]
        if odd:
            faults.add(
                f"Expert '{name}': {len(odd)} tensor(s) are missing from another expert, or have "
                f"another shape there: {shown(odd)}. Leave them as in the first with skip: "
                f"{patterns(odd, set(expert.own_specs) - {*odd})}, or give a base."
            )


def _check_adapters(family: Family, method: type[MergeMethod], faults: Faults) -> None:
    if method.needs != "adapters":
        return
    for name, expert in family.experts.items():
        if adapter_of(expert.checkpoint) is None:
            faults.add(
                f"Expert '{name}' is not a LoRA adapter, and {method.name} merges only those. "
                "Give its adapter directory, or another method (knots, tsv_m)."
            )
