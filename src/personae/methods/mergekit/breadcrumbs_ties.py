"""`breadcrumbs_ties` of mergekit 0.1.5: the largest and smallest entries of each tensor dropped.

As there, density 1 keeps all, and fewer of the largest are dropped where density asks for them. Of
entries that tie with the last one kept, all are, where there a sort picks.
"""

from personae.methods._merge import as_function
from personae.methods._registry import merge_method
from personae.methods.mergekit._sparsified import BetweenOutliers


@merge_method(paper="arXiv:2312.06795", conventions="mergekit")
class BreadcrumbsTIES(BetweenOutliers):
    """Drop the largest and the smallest entries of each tensor, elect signs, add up what agrees."""


breadcrumbs_ties = as_function(BreadcrumbsTIES)
