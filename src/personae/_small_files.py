"""Reads small text files (configurations, indexes, recipes) within bounds.

They come from anybody, and each is read whole, so none may hang, fill the memory, or nest so deep
that whoever walks it runs out of stack: a regular file, of bounded size, of bounded depth, in text
that every file name and terminal can hold. What breaks a bound is an `Unfit`, whose text is the end
of a sentence that begins with the file's name.
"""

import json
import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

MOST_TEXT = 256 * 2**20
"""Bytes of a JSON or text file: eight times the largest tokenizer.json seen."""
MOST_YAML = 2**20
"""Bytes of a YAML file, ten times the longest recipe seen: PyYAML is slow."""
_DEEPEST = 64
_MOST_DOCUMENTS = 100
_LARGEST = 2**1024
"""Beyond the range of float64: what is larger cannot be converted, nor always be told."""
_CHUNK = 2**20

# libyaml is ten times as fast, where PyYAML was built with it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Unfit(ValueError):
    """A small file breaks a bound, or is not of its format."""


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """A regular file of bounded size, whole.

    Raises:
        Unfit: if it is no regular file (a pipe would hang, a device never end), or is too large.
        OSError: if the system refuses.
    """
    with open_regular(path) as file:
        content = bytearray()
        while chunk := file.read(_CHUNK):  # not by its size: files of the system say 0
            content += chunk
            if len(content) > most:
                raise Unfit(f"is larger than {most:,} bytes")
    return bytes(content)


def check_readable(path: Path) -> None:
    """Open a small file and read none of it.

    Raises:
        Unfit: if it is no regular file, or a link to nothing.
        OSError: if the system refuses.
    """
    if path.is_symlink() and not path.exists():
        raise Unfit("is a link to what is not there")
    open_regular(path).close()


def open_regular(path: Path) -> BufferedReader:
    """A regular file, open for reading, of whatever size.

    Raises:
        Unfit: if it is no regular file.
        OSError: if the system refuses.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Unfit("is no regular file")
    return os.fdopen(handle, "rb")


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """A regular file of bounded size, as UTF-8.

    Raises:
        Unfit: as `read_bytes`, or if it is no UTF-8.
        OSError: if the system refuses.
    """
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unfit(f"is no UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON file within bounds.

    Raises:
        Unfit: if it is none, or breaks a bound.
        OSError: if the system refuses.
    """
    return parse_json(read_bytes(path), pairs)


def parse_json(
    text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """JSON within bounds.

    Args:
        text: UTF-8 if bytes.
        pairs: Builds an object from its pairs; by default a dict.

    Raises:
        Unfit: if it is none, nests too deep, or holds text that no file name can.
    """
    try:
        content = json.loads(text, object_pairs_hook=pairs)
        check_bounds(content)
        return content
    except Unfit:
        raise
    except RecursionError:
        raise Unfit(f"is nested deeper than {_DEEPEST} levels") from None
    except MemoryError:  # empty lists take twenty times their text
        raise Unfit("takes more memory to read than there is") from None
    except ValueError as error:  # no UTF-8 and numbers of thousands of digits, too
        raise Unfit(f"is no JSON ({error})") from error


def parse_yaml(text: str) -> yaml.Node | None:
    """YAML within bounds, as nodes with their lines; None if there is nothing in it.

    Raises:
        Unfit: as `parse_documents`, or if it has several documents.
    """
    nodes = parse_documents(text)
    if len(nodes) > 1:
        raise Unfit(f"holds {len(nodes)} documents (parted by ---), and not one")
    return nodes[0] if nodes else None


def parse_documents(text: str) -> list[yaml.Node]:
    """The documents of a YAML file within bounds, without empty ones.

    Aliases are refused: few lines of them stand for more nodes than a machine can hold.

    Raises:
        Unfit: if it is none, nests too deep, has aliases, or too many documents.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise Unfit(f"has an alias in line {line} (*{event.anchor}): write its value out")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise Unfit(f"is nested deeper than {_DEEPEST} levels")
        nodes = [node for node in yaml.compose_all(text, Loader=_Loader) if not _is_empty(node)]
    except yaml.YAMLError as error:
        raise Unfit(f"is no valid YAML: {_without_place(error)}") from error
    if len(nodes) > _MOST_DOCUMENTS:
        raise Unfit(
            f"holds {len(nodes)} documents (parted by ---), and {_MOST_DOCUMENTS} are read at most"
        )
    return nodes


def _is_empty(node: yaml.Node | None) -> bool:
    return node is None or (isinstance(node, yaml.ScalarNode) and not node.value)


def value_of(node: yaml.Node) -> Any:
    """What a YAML node stands for, in plain values.

    Raises:
        Unfit: if a value is not what its tag says, such as a date of month 99.
    """
    loader = yaml.SafeLoader("")
    try:
        content = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise Unfit(f"is no valid YAML: {_without_place(error)}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML trusts a tag that is written out: !!bool x is a KeyError.
        raise Unfit(f"holds a value that is none: {error}") from error
    finally:
        loader.dispose()
    check_bounds(content)
    return content


def parse_yaml_value(text: str) -> Any:
    """A short YAML text, such as that of an option, as a plain value.

    Raises:
        Unfit: if it is none, or breaks a bound.
    """
    node = parse_yaml(text)
    return None if node is None else value_of(node)


def _without_place(error: Exception) -> str:
    """What YAML says is wrong, without its name for texts."""
    text = str(error)
    for name in ("<unicode string>", "<byte string>", "<file>"):
        text = text.replace(f'in "{name}", ', "")
    return text


def check_bounds(content: Any) -> None:
    """Check depth, text and numbers of parsed content, without recursion.

    Raises:
        Unfit: if a bound is broken.
    """
    level = [content]
    for _ in range(_DEEPEST + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.keys()
                inner += value.values()
            elif isinstance(value, list | tuple | set):
                inner += value
            elif isinstance(value, str) and not value.isascii():
                _check_text(value)
            elif isinstance(value, int) and not -_LARGEST < value < _LARGEST:
                raise Unfit("holds a whole number of more than 308 digits")
        if not inner:
            return
        level = inner
    raise Unfit(f"is nested deeper than {_DEEPEST} levels")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unfit(f"holds half a character (an unpaired surrogate): {text[:40]!a}") from error
