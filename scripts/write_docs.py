"""Write the generated parts of `docs/`: tables of methods, of their parameters, of options.

`make docs` runs it. A generated part lies between `<!-- generated: NAME -->` and `<!-- end -->`;
all else is written by hand. The stub `src/personae/__init__.pyi`, which gives public names their
types, is written too. A test compares all of them with what this script makes.
"""

import inspect
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

import personae
from personae import CODECS, LEARNED_METHODS, MERGE_METHODS
from personae.cli import app
from personae.cli.methods import _type

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
STUB = ROOT / "src" / "personae" / "__init__.pyi"


def files() -> dict[Path, str]:
    """Each page with a generated part, and the stub, as they should be."""
    return {STUB: stub(), **{path: _filled(path.read_text("utf-8")) for path in _with_parts()}}


def stub() -> str:
    """The public names, each imported from its home."""
    homes = sorted(personae._homes().items(), key=lambda pair: (pair[1], pair[0]))
    lines = [
        "# Written by scripts/write_docs.py, in its order.",
        "# ruff: noqa: I001",
        "",
        "__all__: list[str]",
        "__version__: str",
        "",
    ]
    for home, pairs in groupby(homes, key=lambda pair: pair[1]):
        lines += (f"from personae.{home} import {name} as {name}" for name, _ in pairs)
    return "\n".join(lines) + "\n"


def _with_parts() -> Iterator[Path]:
    return (p for p in sorted(DOCS.glob("*.md")) if "<!-- generated:" in p.read_text("utf-8"))


def _filled(page: str) -> str:
    def part(match: re.Match[str]) -> str:
        lines = "\n".join(PARTS[match[2]]()).strip("\n")
        return f"{match[1]}\n{lines}\n\n<!-- end -->"

    return re.sub(r"(<!-- generated: (\w+) -->\n).*?<!-- end -->", part, page, flags=re.DOTALL)


def merge_methods() -> Iterator[str]:
    """The merge methods, then the parameters of each."""
    return _methods("merge", {name: entry.__name__ for name, entry in MERGE_METHODS.items()})


def codecs() -> Iterator[str]:
    """The codecs, then the parameters of each."""
    return _methods("codec", {name: entry.__name__ for name, entry in CODECS.items()})


def learned_methods() -> Iterator[str]:
    """The learned methods and what they look at, then the parameters of each."""
    yield "| name | in Python | paper | looks at | result | what it does |"
    yield "|---|---|---|---|---|---|"
    for name, entry in sorted(LEARNED_METHODS.items()):
        result = "routed" if entry.routed else "one model"
        cells = (f"`{entry.__name__}`", _paper(entry.paper), entry.sees, result, entry.summary)
        yield f"| [`{name}`](#{name}) | {' | '.join(map(_cell, cells))} |"
    for name, entry in sorted(LEARNED_METHODS.items()):
        schema = entry.model_json_schema()["properties"]
        parameters = [
            {
                "name": key,
                "type": _type(schema[key]),
                "default": field.default,
                "description": field.description,
            }
            for key, field in entry.fields().items()
        ]
        yield from _section(name, entry.summary, parameters)


def _methods(kind: str, classes: dict[str, str]) -> Iterator[str]:
    found = [one for one in _told("methods", "--json") if one["kind"] == kind]
    described = sorted(found, key=lambda one: one["name"])
    yield from ("| name | in Python | paper | what it does |", "|---|---|---|---|")
    for one in described:
        name, summary = one["name"], _cell(one["summary"])
        yield f"| [`{name}`](#{name}) | `{classes[name]}` | {_paper(one['paper'])} | {summary} |"
    for one in described:
        parameters = _told("methods", one["name"], "--json")["parameters"]
        yield from _section(one["name"], one["summary"], parameters)


def _paper(paper: str) -> str:
    """A link to it."""
    kind, _, number = paper.partition(":")
    at = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind)
    return f"[{number}]({at}{number})" if at else f"[source]({paper})"


def _section(name: str, summary: str, parameters: list[dict[str, Any]]) -> Iterator[str]:
    """What a method does, and its parameters."""
    yield from ("", f"### `{name}`", "", summary, "")
    yield from ("| parameter | type | default | meaning |", "|---|---|---|---|")
    for parameter in parameters:
        cells = ("type", "default", "description")
        kind, default, meaning = (_cell(parameter[key]) for key in cells)
        yield f"| `{parameter['name']}` | {kind} | `{default}` | {meaning} |"


def options() -> Iterator[str]:
    """The arguments and options of each command."""
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for name, command in commands.items():
        yield from ("", f"### `personae {name}`", "")
        yield from ("| option | default | meaning |", "|---|---|---|")
        for parameter in command.params:
            yield f"| {_spelling(parameter)} | {_default(parameter)} | {_cell(parameter.help)} |"


def _spelling(parameter: Any) -> str:
    value = parameter.metavar or parameter.name.strip("_").upper()
    if parameter.param_type_name == "argument":
        return f"`{value}`"
    words = sorted(parameter.opts, key=len, reverse=True)
    if not parameter.is_flag:
        words[0] += f" {value}"
    return ", ".join(f"`{word}`" for word in words)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    shown = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    is_said = isinstance(shown, str | int | Path) and not isinstance(shown, bool)
    return f"`{shown}`" if is_said else ""


def functions() -> Iterator[str]:
    """What can be imported, but for methods and codecs."""
    known = {**MERGE_METHODS, **CODECS, **LEARNED_METHODS}
    methods = {*known, *(entry.__name__ for entry in known.values())}
    named = [name for name in personae.__all__ if name not in methods]
    public = {name: getattr(personae, name) for name in named}
    kinds = {
        "Functions": [name for name, one in public.items() if inspect.isfunction(one)],
        "Classes": [name for name, one in public.items() if inspect.isclass(one)],
    }
    for title, names in kinds.items():
        yield from (f"## {title}", "", "| name | meaning |", "|---|---|")
        for name in names:
            summary = (inspect.getdoc(public[name]) or "").split("\n")[0]
            yield f"| `{name}` | {_cell(summary)} |"
        yield ""


def _told(*words: str) -> Any:
    """What a command of the program prints as JSON."""
    return json.loads(CliRunner().invoke(app, words).stdout)


def _cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|")


PARTS = {
    "merge_methods": merge_methods,
    "codecs": codecs,
    "learned_methods": learned_methods,
    "options": options,
    "functions": functions,
}

if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, "utf-8")
        print(f"{path.relative_to(ROOT)} written")
