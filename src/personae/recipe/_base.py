"""What both kinds of recipes are made of."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Vector = Literal["task", "difference"]
Dtype = Literal["float32", "float16", "bfloat16"]


class Strict(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
