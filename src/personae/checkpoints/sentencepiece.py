"""The pieces of a SentencePiece model file, read without its library.

The file is a message of protocol buffers: fields, each a key (number · 8 + type) and a value. Of
the model only field 1 counts, the pieces, each a message whose field 1 is the text. A piece's row
is its place. Fields of other numbers are passed over by their length.
"""

from collections.abc import Iterator
from pathlib import Path

from personae import _small_files as small_files

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_LONGEST_VARINT = 10


def read_pieces(path: Path) -> list[str]:
    """Texts of all pieces, in the order of their rows.

    Raises:
        ValueError: if it is no such file, or too large.
        OSError: if the system refuses.
    """
    content = memoryview(small_files.read_bytes(path))
    found = [_text(value) for number, value in _fields(content) if number == 1]
    if not found:
        raise ValueError("it has no pieces")
    return found


def _text(piece: memoryview) -> str:
    """The text of one piece.

    Raises:
        ValueError: if it has none, or no UTF-8.
    """
    for number, value in _fields(piece):
        if number == 1:
            return bytes(value).decode("utf-8")
    raise ValueError("a piece has no text")


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field that has a length, in order.

    Raises:
        ValueError: if it ends within a field, or has a type that is not known.
    """
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        kind = key & 7
        if kind == _VARINT:
            _, place = _varint(content, place)
            continue
        length = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind, -1)
        if kind == _LENGTH:
            length, place = _varint(content, place)
        if length < 0 or place + length > len(content):
            raise ValueError(f"byte {place} is within no field")
        if kind == _LENGTH:
            yield key >> 3, content[place : place + length]
        place += length


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first; and the place after it.

    Raises:
        ValueError: if it does not end.
    """
    value = 0
    for n, byte in enumerate(content[place : place + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * n)
        if byte < 0x80:
            return value, place + n + 1
    raise ValueError(f"the number at byte {place} does not end")
