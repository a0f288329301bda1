"""`dare_ties` of mergekit 0.1.5: entries dropped at random, norms restored, what agrees added up.

It adds what agrees, where `ties` there and `dare_ties` here take a mean. Masks are those of `dare`
(mergekit's come from one global generator in the order of the work): results agree in distribution.
"""

from personae.methods._merge import as_function
from personae.methods._registry import merge_method
from personae.methods.mergekit._sparsified import Dropping


@merge_method(paper="arXiv:2311.03099", conventions="mergekit")
class DARETIES(Dropping):
    """Drop entries at random, restore each tensor's norm, elect signs, add up what agrees."""


dare_ties = as_function(DARETIES)
