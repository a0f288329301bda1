"""`della_linear` of mergekit 0.1.5: entries dropped by rank, norms restored, added up.

Masks are those of `della`: results agree with mergekit's in distribution.
"""

from typing import ClassVar

from personae.methods._merge import as_function
from personae.methods._registry import merge_method
from personae.methods.mergekit._sparsified import DroppingByRank


@merge_method(paper="arXiv:2406.11617", conventions="mergekit")
class DELLALinear(DroppingByRank):
    """Drop entries by the rank of their magnitude, restore norms, add up the weighted rest."""

    elects: ClassVar = False


della_linear = as_function(DELLALinear)
