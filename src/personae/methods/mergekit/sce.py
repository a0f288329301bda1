"""`sce` of mergekit 0.1.5: where task vectors are small, all experts weigh the same.

That is where their mean squares add up to less than 1e-6, as in many a fine-tuned model.
"""

from typing import ClassVar

from personae.methods._merge import as_function
from personae.methods._registry import merge_method
from personae.methods.merge.sce import SCE as OURS


@merge_method(paper="arXiv:2408.07990", conventions="mergekit")
class SCE(OURS):
    """Keep the entries on which experts vary most, elect signs, average by squares what agrees."""

    least_squares: ClassVar = 1e-6


sce = as_function(SCE)
