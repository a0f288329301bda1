"""Where the models of a recipe are: relative paths count from the folder the recipe is in."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from personae.checkpoints.adapted_model import split_adapter
from personae.checkpoints.opening import absence, is_hub_id, is_model
from personae.errors import CheckpointError
from personae.recipe._faults import Fault, Place


@dataclass(frozen=True)
class Places:
    """Places the models of a recipe.

    Attributes:
        recipe: The recipe's path.
        names: Names of models that are merged before; they are no paths.
    """

    recipe: Path
    names: Collection[str] = ()

    def of(self, model: str, place: Place, faults: list[Fault], absent: list[Fault]) -> str:
        """Where a model is opened; the name of one that is merged before stays as it is.

        Args:
            model: What the recipe says.
            place: Where it says so.
            faults: Gets one where the path exists from the working directory instead.
            absent: Gets one where nothing is there.
        """
        if model.partition("+")[0] in self.names:
            return model
        found = placed(model, place, self.recipe, faults)
        try:
            is_wrong = any(fault.place == place for fault in faults)  # or a stand-in of what is
            text = None if is_wrong else absence(found)
        except CheckpointError as error:
            text = str(error)
        if text:
            absent.append(Fault(place, text))
        return found


def placed(model: str, place: Place, recipe: Path, faults: list[Fault]) -> str:
    """A model of a recipe as it is opened from the working directory.

    Absolute paths, and hub ids where there is no such folder, stay as they are. Of a model with an
    adapter, `MODEL+ADAPTER`, each is placed.

    Args:
        model: What the recipe says.
        place: Where it says so.
        recipe: The recipe's path.
        faults: Gets one where the path exists from the working directory instead.
    """
    folder, path = recipe.parent, Path(model)
    if folder == Path():
        return model
    if not _exists(folder / path):
        both = split_adapter(model, lambda one: is_model(one, folder) or is_model(one))
        if both:
            return "+".join(placed(one, place, recipe, faults) for one in both)
    if path.is_absolute() or model.startswith("~"):
        return model
    if _exists(folder / path):
        return str(folder / path)
    if _exists(path):
        text = (
            f"'{model}' is not in the recipe's folder ({folder}), from which its paths count, but "
            f"in the working directory. Write '{os.path.relpath(path, folder)}'."
        )
        faults.append(Fault(place, text))
    return model if is_hub_id(model, folder) else str(folder / path)


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - names may be too long
