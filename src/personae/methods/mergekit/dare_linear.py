"""`dare_linear` of mergekit 0.1.5: entries dropped at random, norms restored, added up.

mergekit draws its masks from one global generator in the order of the work; here they are those of
`dare`, so that results agree in distribution, not entry by entry.
"""

from typing import ClassVar

from personae.methods._merge import as_function
from personae.methods._registry import merge_method
from personae.methods.mergekit._sparsified import Dropping


@merge_method(paper="arXiv:2311.03099", conventions="mergekit")
class DARELinear(Dropping):
    """Drop entries at random, restore each tensor's norm, add up the weighted task vectors."""

    elects: ClassVar = False


dare_linear = as_function(DARELinear)
