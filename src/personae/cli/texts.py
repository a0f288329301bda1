"""Texts that say what a task is about, as options give them."""

from collections.abc import Sequence
from pathlib import Path

from personae._small_files import read_text
from personae.errors import Faults, RecipeError

FORMS = "class names separated by commas, a sentence, or @FILE with one text per line"
_SENTENCE_ENDS = (".", "!", "?")


def texts_from(values: Sequence[str], option: str) -> tuple[str, ...]:
    """Read class names or descriptions, in order.

    A value is `@FILE`, one text a line; or a sentence, told by the mark it ends with, which is one
    text; or class names with commas between.

    Raises:
        RecipeError: naming each file that cannot be read and each value without a text.
    """
    faults = Faults()
    found: list[str] = []
    for value in values:
        texts = _pieces(value.strip(), option, faults)
        if not texts:
            faults.add(f"{option} {value}: there is no text in it. Give {FORMS}.")
        found += texts
    faults.raise_if_any(RecipeError)
    return tuple(found)


def described(pairs: Sequence[str], option: str = "--describe") -> dict[str, tuple[str, ...]]:
    """`NAME=TEXT` values as texts by name; what is said of one name twice adds up.

    Raises:
        RecipeError: listing each value of another form, and each file that cannot be read.
    """
    faults = Faults()
    by_name: dict[str, list[str]] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if not name or not text.strip():
            faults.add(f"{option} {pair}: write NAME=TEXT, where TEXT is {FORMS}.")
        by_name.setdefault(name, []).append(text)
    faults.raise_if_any(RecipeError)
    return {name: texts_from(values, f"{option} {name}") for name, values in by_name.items()}


def weights_from(values: Sequence[str]) -> dict[str, float]:
    """`NAME=NUMBER` pairs with commas between, of one value or several, as numbers by name.

    Raises:
        RecipeError: listing each pair of another form and each name given twice.
    """
    faults = Faults()
    weights: dict[str, float] = {}
    for pair in (piece.strip() for value in values for piece in value.split(",")):
        name, _, number = pair.partition("=")
        try:
            weight = float(number)
        except ValueError:
            faults.add(f"--weights {pair}: write NAME=NUMBER pairs separated by commas.")
            continue
        if name in weights:
            faults.add(f"--weights: two are for '{name}'. Give one weight per task.")
        weights[name] = weight
    faults.raise_if_any(RecipeError)
    return weights


def _pieces(value: str, option: str, faults: Faults) -> list[str]:
    if value.startswith("@"):
        try:
            lines = read_text(Path(value[1:])).splitlines()
        except (OSError, ValueError) as error:
            faults.add(f"{option} {value}: the file cannot be read ({error}).")
            return ["unread"]
        return [line.strip() for line in lines if line.strip()]
    if value.endswith(_SENTENCE_ENDS):
        return [value]
    return [piece.strip() for piece in value.split(",") if piece.strip()]
