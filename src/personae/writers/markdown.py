"""Markdown in which nothing that comes from outside is markup."""

import re
from typing import Any


def table(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def plain_value(content: Any) -> str:
    """A plain value, as it is written in a recipe."""
    text = str(content).lower() if isinstance(content, bool) else str(content)
    return code(text)


def code(text: str) -> str:
    """Text in backticks, more of them than it has; in a table a bar would end the cell."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    line = " ".join(text.split()).replace("|", "\\|")
    return f"{fence}{pad}{line}{pad}{fence}"


def fenced(text: str, language: str) -> str:
    """A block of code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def inline(text: str) -> str:
    """Text in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))
