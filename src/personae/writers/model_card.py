"""The README of a merged model: what it is made of, how, and how to make it again."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from personae.writers.markdown import code, fenced, inline, plain_value, table


@dataclass(frozen=True)
class Source:
    """A model that went in.

    Attributes:
        name: Its name in the recipe; 'base' for the base.
        place: Where it was, as the user wrote it: a path or a hub id.
        revision: The hub commit; None for a local model.
        parameters: What the recipe says of it alone.
    """

    name: str
    place: str
    revision: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """Its id on the hub; None for a local model."""
        return self.place.split("@")[0] if self.revision else None


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells.

    Attributes:
        title: The model's name.
        method: The merge method.
        summary: What it does, in a sentence.
        paper: Where it is from: 'arXiv:…' or a title.
        conventions: Whose algorithm the name means.
        parameters: The method's parameters, for all tensors and experts.
        base: The base; None for difference vectors.
        experts: In recipe order.
        recipe: YAML from which the merge can be run again.
        versions: Package to version.
        dtype: Of the weights.
        tokenizer: Whose tokenizer it has.
        notes: What a user of the model should know.
        layers: Of layers that slices choose: their numbers, what they are of, and the method.
    """

    title: str
    method: str
    summary: str
    paper: str
    conventions: str
    parameters: Mapping[str, Any]
    base: Source | None
    experts: Sequence[Source]
    recipe: str
    versions: Mapping[str, str]
    dtype: str = ""
    tokenizer: str = ""
    notes: Sequence[str] = ()
    layers: Sequence[tuple[str, str, str]] = ()


def model_card(facts: CardFacts) -> str:
    """The text of README.md, with the front matter that the hub reads."""
    parts = [
        _front_matter(facts),
        f"# {facts.title}",
        _what_it_is(facts),
        "## Models",
        _models(facts),
        "## Method",
        _method(facts),
        *_layers(facts),
        "## Recipe",
        f"Written to a file, `personae merge FILE.yaml OUT` runs it again.\n\n"
        f"{fenced(facts.recipe.strip(), 'yaml')}",
    ]
    if facts.notes:
        parts += ["## Notes", "\n".join(f"* {inline(note)}" for note in facts.notes)]
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return "\n\n".join([*parts, f"Made with {versions}."]) + "\n"


def _front_matter(facts: CardFacts) -> str:
    models = [*([facts.base] if facts.base else []), *facts.experts]
    ids = list(dict.fromkeys(m.hub_id for m in models if m.hub_id))
    content: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "personae"]}
    if ids:
        content = {"base_model": ids, **content}
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _what_it_is(facts: CardFacts) -> str:
    count = len(facts.experts)
    experts = f"{count} models" if count > 1 else "one model"
    base = f"their base {code(facts.base.place)}" if facts.base else "their average"
    text = f"A merge of {experts} by **{facts.method}**, relative to {base}."
    if len({method for *_, method in facts.layers}) > 1 or len(facts.layers) > 1:
        text = f"A model made of layers of {experts}."
    if facts.dtype:
        text += f" Weights are {facts.dtype}."
    if facts.tokenizer:
        text += f" The tokenizer is that of {inline(facts.tokenizer)}."
    return text


def _models(facts: CardFacts) -> str:
    rows = [["model", "from", "revision", "parameters"]]
    for model in [*([facts.base] if facts.base else []), *facts.experts]:
        own = ", ".join(
            f"{name} = {plain_value(value)}" for name, value in model.parameters.items()
        )
        revision = code(model.revision) if model.revision else "local"
        rows.append([inline(model.name), code(model.place), revision, own])
    return table(rows)


def _layers(facts: CardFacts) -> list[str]:
    if not facts.layers:
        return []
    rows = [["layers", "of the models' layers", "method"]]
    rows += [[inline(text) for text in row] for row in facts.layers]
    return ["## Layers", table(rows)]


def _method(facts: CardFacts) -> str:
    found = re.fullmatch(r"(arXiv|doi):(\S+)", facts.paper)
    at = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
    paper = f"[{facts.paper}]({at[found[1]]}{found[2]})" if found else inline(facts.paper)
    of = "" if facts.conventions == "papers" else f" (as {facts.conventions} means it)"
    text = f"{facts.method}{of}: {inline(facts.summary)} {paper}"
    if not facts.parameters:
        return text
    rows = [[code(name), plain_value(value)] for name, value in facts.parameters.items()]
    return f"{text}\n\n{table([['parameter', 'value'], *rows])}"
