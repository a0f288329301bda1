"""YAML with line numbers: what a recipe says, and where it says it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from personae._small_files import MOST_YAML, Unfit, parse_documents, read_text, value_of
from personae.errors import RecipeError, listing
from personae.recipe._faults import Fault, Place

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Document:
    """A recipe's content, with the line of everything in it.

    Attributes:
        path: The file.
        text: All of it.
        content: The mapping in it.
        lines: Place to line, counted from 1.
        faults: Keys that are there twice.
        kind: What errors call the file.
    """

    path: Path
    text: str
    content: dict[str, Any]
    lines: Mapping[Place, int]
    faults: tuple[Fault, ...]
    kind: str = "recipe"

    def line(self, place: Place) -> int | None:
        """The line of a place, or of the nearest one around it that has one."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place)

    def refusal(
        self,
        faults: Sequence[Fault],
        others: Sequence[tuple["Document", Sequence[Fault]]] = (),
    ) -> RecipeError:
        """One error that lists faults in the order of the file, each with its line.

        Args:
            faults: Of this document.
            others: Other documents of the file, with theirs.
        """
        found = [(self, faults), *others]
        by_line = sorted(((d.line(f.place) or 0), f.text) for d, own in found for f in own)
        texts = [f"line {line}: {text}" if line else text for line, text in by_line]
        texts = list(dict.fromkeys(texts))
        if len(texts) == 1:
            return RecipeError(f"The {self.kind} {self.path} is wrong: {texts[0]}")
        head = f"The {self.kind} {self.path} is wrong in {len(texts)} places:"
        return listing(RecipeError, head, texts)


def read_document(path: Path, kind: str = "recipe") -> Document:
    """Read a YAML mapping.

    Args:
        path: The file.
        kind: What errors call it.

    Raises:
        RecipeError: if the file cannot be read, is no YAML, or holds something else, or several.
    """
    documents = read_documents(path, kind)
    if len(documents) > 1:
        raise RecipeError(
            f"The {kind} {path} holds {len(documents)} documents (parted by ---). Only personae "
            "merge and plan take several: give each a file of its own."
        )
    return documents[0]


def read_documents(path: Path, kind: str = "recipe") -> list[Document]:
    """Read the YAML mappings of a file, parted by `---`; at least one.

    Args:
        path: The file.
        kind: What errors call it.

    Raises:
        RecipeError: if the file cannot be read, is no YAML, or holds something else.
    """
    if path.is_dir():
        raise RecipeError(
            f"The {kind} {path} is a directory, not a YAML file. A model is given by its option "
            "(--base, --expert), or named in a recipe."
        )
    try:
        text = read_text(path, MOST_YAML)
        nodes = parse_documents(text)
        for node in nodes:
            _name_keys(node)
        contents = [value_of(node) for node in nodes]
    except OSError as error:
        raise RecipeError(f"The {kind} {path} cannot be read: {error.strerror}.") from error
    except Unfit as error:
        raise RecipeError(f"The {kind} {path} {error}.") from error
    if not contents or not all(isinstance(content, dict) for content in contents):
        raise RecipeError(f"The {kind} {path} holds no settings; see recipes/ for examples.")
    return [
        replace(_document(path, text, node, content), kind=kind)
        for node, content in zip(nodes, contents, strict=True)
    ]


def _name_keys(node: yaml.Node) -> None:
    """Make every key the text that stands there: `1`, `yes` and nothing at all name keys too."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _name_keys(item)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                key.tag = _TEXT
            _name_keys(value)


def _document(path: Path, text: str, node: yaml.Node, content: dict[str, Any]) -> Document:
    lines: dict[Place, int] = {}
    faults: list[Fault] = []
    _walk(node, (), lines, faults)
    return Document(path, text, content, lines, tuple(faults))


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int], faults: list[Fault]) -> None:
    """Note the lines of all that is in a node."""
    if isinstance(node, yaml.SequenceNode):
        for n, item in enumerate(node.value):
            lines[*place, n] = item.start_mark.line + 1
            _walk(item, (*place, n), lines, faults)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                text = f"'{'.'.join(map(str, inner))}' is there twice, in line {lines[inner]} too."
                # Placed by a key of its own: the line of the second one.
                lines[*inner, "again"] = line
                faults.append(Fault((*inner, "again"), f"{text} Keep one."))
                continue
            lines[inner] = line
            _walk(value, inner, lines, faults)
