"""Which tensors a method for matrices is for; the rest it averages or leaves at the base."""

from typing import Literal

from personae.methods._site import Site

Tensors = Literal["matrices", "linear"]
"""`matrices`: every tensor of two axes but CLIP's `text_projection`, which the papers' codes pass
over; `linear`: the weights of linear layers alone."""


def is_matrix(tensors: Tensors, site: Site) -> bool:
    """Whether a method for `tensors` treats this one as a matrix."""
    if tensors == "linear":
        return site.kind == "linear"
    return len(site.shape) == 2 and "text_projection" not in site.name
