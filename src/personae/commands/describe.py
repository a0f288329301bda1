"""What the tasks of a pack are about: said by whoever packs, or read from a config's labels."""

import re
from collections.abc import Mapping
from pathlib import Path

from personae._small_files import read_json
from personae._types import Characteristics
from personae.commands.packed import Pack
from personae.errors import Faults, PackError, RecipeError, nearest
from personae.packs.writer import PackWriter
from personae.writers import locked

_NO_NAME = re.compile(r"LABEL_\d+")


def describe(pack_directory: str | Path, characteristics: Characteristics) -> Pack:
    """Set or replace the descriptions of tasks in a pack; nothing is coded again.

    Args:
        pack_directory: The pack.
        characteristics: Task name to class names, or to a description.

    Returns:
        The pack, opened.

    Raises:
        PackError: if the pack has no task of a name.
        RecipeError: if a task is given no text.
    """
    texts = checked(characteristics)
    with locked(Pack(Path(pack_directory)).directory):
        opened = Pack(Path(pack_directory))
        faults = Faults()
        for name in texts:
            if name not in opened.manifest.tasks:
                hint = nearest(name, opened.manifest.tasks)
                faults.add(f"{opened.directory} has no task '{name}'. {hint}")
        faults.raise_if_any(PackError)
        PackWriter(opened.directory, opened.manifest).describe(texts)
    return Pack(opened.directory)


def checked(
    characteristics: Characteristics, experts: Mapping[str, object] | None = None
) -> dict[str, tuple[str, ...]]:
    """Texts by task name: none of them empty, each task one of `experts` if these are given.

    Raises:
        RecipeError: naming every task without a text, and every name that is no expert's.
    """
    faults = Faults()
    texts: dict[str, tuple[str, ...]] = {}
    for name, said in characteristics.items():
        texts[name] = (said,) if isinstance(said, str) else tuple(said)
        if not texts[name] or not all(text.strip() for text in texts[name]):
            faults.add(f"The description of '{name}' is empty. Give class names, or a sentence.")
        if experts is not None and name not in experts:
            faults.add(f"There is no expert '{name}' to describe. {nearest(name, experts)}")
    faults.raise_if_any(RecipeError)
    return texts


def class_names(auxiliary_files: Mapping[str, Path]) -> tuple[str, ...]:
    """Class names from `id2label` of a config.json, in label order; none if LABEL_0 and so on."""
    if "config.json" not in auxiliary_files:
        return ()
    try:
        labels = read_json(auxiliary_files["config.json"])["id2label"]
        names = [str(labels[key]) for key in sorted(labels, key=int)]
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()
    if not all(name.strip() for name in names) or any(map(_NO_NAME.fullmatch, names)):
        return ()
    return tuple(names)
