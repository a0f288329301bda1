"""Which tensors a method for matrices is for; the rest it averages or leaves at the base."""

from typing import Any, Literal

from personae.methods._merge import Side
from personae.methods._site import Site

Tensors = Literal["matrices", "linear"]
"""`matrices`: every tensor of two axes but CLIP's `text_projection`, which the papers' codes pass
over; `linear`: the weights of linear layers alone."""


def is_matrix(tensors: Tensors, site: Site) -> bool:
    """Whether a method for `tensors` treats this one as a matrix."""
    if tensors == "linear":
        return site.kind == "linear"
    return len(site.shape) == 2 and "text_projection" not in site.name


def not_matrix(parameters: Any, site: Site) -> bool:
    """Entry-wise on all but the tensors that the parameter `tensors` names."""
    return not is_matrix(parameters.tensors, site)


def from_both_sides(_: Any, __: Site) -> Side:
    """Turning rows or columns of all task vectors turns the result; so it does for their mean."""
    return "both"
