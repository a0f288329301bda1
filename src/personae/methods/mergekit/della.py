"""`della` of mergekit 0.1.5: entries dropped by rank, norms restored, signs elected, averaged.

Its epsilon is half of that of the paper and of `della` here. Masks are those of `della`: results
agree with mergekit's in distribution. mergekit ranks convolutions and stacks along their second
axis; here rows lie along the last one.
"""

from pydantic import Field

from personae.methods._merge import as_function
from personae.methods._registry import merge_method
from personae.methods.mergekit._sparsified import DroppingByRank


@merge_method(paper="arXiv:2406.11617", conventions="mergekit")
class DELLA(DroppingByRank):
    """Drop entries by the rank of their magnitude, restore norms, average by weight what agrees."""

    normalize: bool = Field(
        default=True, description="Whether to divide by the sum of the weights that agree."
    )


della = as_function(DELLA)
