"""What the model card of a merge tells, taken from the family and the settings."""

from importlib.metadata import version
from typing import Any

from personae._version import __version__
from personae.family.opened import Family
from personae.recipe import MergeSettings, merge_recipe_text
from personae.writers.model_card import CardFacts, Source, model_card


def merge_card(family: Family, settings: MergeSettings, recipe: str | None = None) -> str:
    """The README of a merged model.

    It depends on what is merged and how alone, so that a merge done again writes the same bytes.

    Args:
        family: Base and experts.
        settings: How they are merged.
        recipe: The recipe's text; by default one is written from the settings.
    """
    method = settings.merge_method()
    base = Source("base", family.base.source, family.base.revision) if family.has_base else None
    owns = settings.expert_parameters or ({},) * len(family.experts)
    experts = [
        Source(name, expert.checkpoint.source, expert.checkpoint.revision, own)
        for (name, expert), own in zip(family.experts.items(), owns, strict=True)
    ]
    places = {expert.name: expert.place for expert in experts}
    facts = CardFacts(
        title=f"{', '.join(places)}: merged by {method.name}",
        method=method.name,
        summary=method.summary,
        paper=method.paper,
        conventions=method.conventions,
        parameters=_parameters(settings),
        base=base,
        experts=experts,
        recipe=recipe or merge_recipe_text(base.place if base else None, places, settings),
        versions={"personae": __version__, "torch": version("torch")},
        dtype=settings.dtype or "",
        tokenizer=settings.tokenizer_source or "",
    )
    return model_card(facts)


def _parameters(settings: MergeSettings) -> dict[str, Any]:
    """Every parameter that is not each expert's own, with its default where nothing is said."""
    own = {name for expert in settings.expert_parameters for name in expert}
    return {
        name: settings.parameters.get(name, field.default)
        for name, field in settings.merge_method().fields().items()
        if name in settings.parameters or name not in own
    }
