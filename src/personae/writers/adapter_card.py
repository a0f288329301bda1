"""The README of an adapter: what it is for, what it keeps of the model, and what it does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from personae.writers.markdown import code, fenced, inline, table


@dataclass(frozen=True)
class AdapterFacts:
    """What the card of an adapter tells.

    Attributes:
        title: What it is called.
        made: How it was made, as the end of a sentence, in Markdown.
        base: Path or hub id of the model it is for.
        hub_id: The same, if it is on the hub.
        rank: The rank, in words.
        dtype: Of its factors.
        summary: What it keeps, in a sentence.
        rows: A table of what changed, and of how it is carried; the first row is its head.
        notes: What a user should know.
        recipe: The recipe that it was merged by, if it was.
        versions: Package to version.
    """

    title: str
    made: str
    base: str
    hub_id: str | None
    rank: str
    dtype: str
    summary: str
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    versions: Mapping[str, str]
    recipe: str = ""


def adapter_card(facts: AdapterFacts) -> str:
    """The text of README.md, with the front matter that the hub reads."""
    use = (
        "from peft import PeftModel\n\n"
        f"model = PeftModel.from_pretrained(base, {facts.title!r})  # base: the model named above"
    )
    parts = [
        _front_matter(facts),
        f"# {inline(facts.title)}",
        f"A LoRA adapter of {facts.rank} ({facts.dtype}) for {code(facts.base)}, {facts.made}. "
        f"{facts.summary}",
        fenced(use, "python"),
        "## What it carries",
        table([list(row) for row in facts.rows]),
    ]
    if facts.notes:
        parts += ["## Notes", "\n".join(f"* {inline(note)}" for note in facts.notes)]
    if facts.recipe:
        parts += ["## Recipe", fenced(facts.recipe.rstrip("\n"), "yaml")]
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return "\n\n".join([*parts, f"Made with {versions}."]) + "\n"


def _front_matter(facts: AdapterFacts) -> str:
    tags = ["lora", "personae"]
    content: dict[str, Any] = {"library_name": "peft", "tags": tags}
    if facts.hub_id:
        tags.insert(0, f"base_model:adapter:{facts.hub_id}")
        content = {"base_model": facts.hub_id, **content}
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"
