"""What settings of merging and packing have in common: their faults are our error, all at once."""

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from personae.errors import RecipeError
from personae.recipe._base import Strict
from personae.recipe._faults import faults_in


class Settings(Strict):
    """Frozen, and what is wrong with them is a `RecipeError` from the validation's own error."""

    if not TYPE_CHECKING:  # there each class has the arguments that its fields say

        def __init__(self, **values: Any) -> None:
            """Take what is given.

            Raises:
                RecipeError: naming unknown settings and values that cannot be.
            """
            try:
                super().__init__(**values)
            except ValidationError as error:
                texts = dict.fromkeys(fault.text for fault in faults_in(error, type(self), {}))
                raised = RecipeError(" ".join(texts))
                raised.faults = tuple(texts)
                raise raised from error
