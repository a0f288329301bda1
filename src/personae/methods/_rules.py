"""Methods inside methods: one applied to what another makes of the task vectors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from personae.methods._merge import Gathering, Measure, MergeMethod
from personae.methods._site import Site

View = Callable[[Tensor, Any, Site], tuple[Tensor, Site]]
"""`view(task_vectors, outer, site)`: what the inner method is given instead, and where."""


def looks_through(inner: MergeMethod, experts: int, view: View | None = None) -> Gathering:
    """The looks of an inner method, at what `view` makes of the task vectors, or at themselves."""
    looks = inner.gather(experts)
    try:
        measure = next(looks)
        while True:
            measure = looks.send((yield _through(inner, view, measure)))
    except StopIteration as done:
        return done.value


def _through(inner: MergeMethod, view: View | None, measure: Measure) -> Measure:
    """The measure, with the inner method's parameters, of what is seen; nothing waits for it."""

    def tally(vectors: Tensor, outer: Any, site: Site) -> Tensor:
        if view is not None:  # a sample is one of the rows seen: the view needs all there are
            vectors, site = view(vectors, outer, site)
            vectors = inner.sampled(vectors, measure.sample)
        return measure.tally(vectors, inner, site)

    def applies(_: Any, site: Site) -> bool:
        return measure.applies(inner, site)

    sample = measure.sample if view is None else 1
    return measure._replace(tally=tally, applies=applies, sample=sample, late=False)
