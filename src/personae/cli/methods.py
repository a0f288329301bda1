"""personae methods: every method, its parameters, its paper."""

from typing import Annotated, Any

import typer

from personae.cli import console, options
from personae.methods import (
    CODECS,
    LEARNED_METHODS,
    MERGE_METHODS,
    Codec,
    LearnedMethod,
    MergeMethod,
    lookup,
)
from personae.recipe import refuse_mergekit_alone

Entry = type[Codec] | type[MergeMethod] | type[LearnedMethod]


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its parameters.")] = None,
    json: options.Json = False,
) -> None:
    """List every method, or describe one with its parameters and defaults."""
    known: dict[str, Entry] = {**MERGE_METHODS, **CODECS, **LEARNED_METHODS}
    if name:
        refuse_mergekit_alone(name)
    chosen = [lookup(known, name)] if name else list(known.values())
    described = [_describe(entry) for entry in chosen]
    if json:
        console.facts(described[0] if name else described)
        return
    columns = ["method", "kind", "paper", "summary"]
    rows = [[d["name"], d["kind"], d["paper"], _told(d)] for d in described]
    console.table("", columns, rows, left=4)
    if name:
        rows = [
            [p["name"], p["type"], str(p["default"]), p["description"]]
            for p in described[0]["parameters"]
        ]
        console.out.print()
        console.table("parameters", ["name", "type", "default", "meaning"], rows, left=4)


def _told(described: dict[str, Any]) -> str:
    """The summary, and what a learned method sees."""
    sees = f" Sees {described['sees']}." if described["sees"] else ""
    return described["summary"] + sees


def _kind(entry: Entry) -> str:
    if issubclass(entry, LearnedMethod):
        return "learned"
    return "codec" if issubclass(entry, Codec) else "merge"


def _describe(entry: Entry) -> dict[str, Any]:
    schema = entry.model_json_schema()["properties"]
    return {
        "name": entry.name,
        "kind": _kind(entry),
        "sees": entry.sees if issubclass(entry, LearnedMethod) else None,
        "paper": entry.paper,
        "summary": entry.summary,
        "parameters": [
            {
                "name": key,
                "type": _type(schema[key]),
                "default": field.default,
                "description": field.description or "",
            }
            for key, field in entry.fields().items()
        ],
    }


def _type(schema: dict[str, Any]) -> str:
    """A parameter's type and range as a person writes it."""
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(_type(option) for option in schema["anyOf"])
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [(sign, schema[key]) for key, sign in signs.items() if key in schema]
    limits = [f"{sign} {n if isinstance(n, int) else f'{n:g}'}" for sign, n in bounds]
    kind = {"null": "none", "boolean": "true | false"}.get(schema["type"])
    return " ".join([kind or str(schema["type"]), *limits])
