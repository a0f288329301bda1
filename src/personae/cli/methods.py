"""personae methods: every method, its parameters, its paper."""

from typing import Annotated, Any

import typer

from personae.cli import console, options
from personae.methods import CODECS, MERGE_METHODS, Codec, MergeMethod, lookup
from personae.recipe import refuse_mergekit_alone


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its parameters.")] = None,
    json: options.Json = False,
) -> None:
    """List every method, or describe one with its parameters and defaults."""
    known: dict[str, type[Codec] | type[MergeMethod]] = {**MERGE_METHODS, **CODECS}
    if name:
        refuse_mergekit_alone(name)
    chosen = [lookup(known, name)] if name else list(known.values())
    described = [_describe(entry) for entry in chosen]
    if json:
        console.facts(described[0] if name else described)
        return
    columns = ["method", "kind", "paper", "summary"]
    rows = [[d["name"], d["kind"], d["paper"], d["summary"]] for d in described]
    console.table("", columns, rows, left=4)
    if name:
        rows = [
            [p["name"], p["type"], str(p["default"]), p["description"]]
            for p in described[0]["parameters"]
        ]
        console.out.print()
        console.table("parameters", ["name", "type", "default", "meaning"], rows, left=4)


def _describe(entry: type[Codec] | type[MergeMethod]) -> dict[str, Any]:
    schema = entry.model_json_schema()["properties"]
    return {
        "name": entry.name,
        "kind": "codec" if issubclass(entry, Codec) else "merge",
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
    limits = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    kind = {"null": "none", "boolean": "true | false"}.get(schema["type"])
    return " ".join([kind or str(schema["type"]), *limits])
