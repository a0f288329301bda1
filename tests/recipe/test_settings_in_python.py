"""Settings made in Python: what is wrong with them is our error, and all of it."""

from typing import Any

import pytest

from personae import MergeSettings, PackSettings
from personae.errors import RecipeError


@pytest.mark.parametrize(
    ("settings", "values", "told"),
    [
        (MergeSettings, {"methd": "ties", "conventions": "x"}, ("Unknown key 'methd'", "'x'")),
        (MergeSettings, {"skip": 3, "weights": 1}, ("skip = 3", "Unknown key 'weights'")),
        (PackSettings, {"vector": "x", "bugdet": 1}, ("vector = 'x'", "Did you mean 'budget'?")),
        (PackSettings, {"parameters": 3, "method": 4}, ("parameters = 3", "method = 4")),
    ],
)
def test_every_fault_is_told(settings: Any, values: dict[str, Any], told: tuple[str, ...]):
    with pytest.raises(RecipeError) as refused:
        settings(**values)
    assert len(refused.value.faults) == len(values)
    for text in told:
        assert text in str(refused.value)


def test_what_is_right_is_taken():
    assert PackSettings(method="dts", budget="1%").method == "dts"
    assert MergeSettings.model_validate({"method": "ties"}) == MergeSettings(method="ties")
