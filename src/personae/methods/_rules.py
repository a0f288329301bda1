"""Methods inside methods: one applied to what another makes of the task vectors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from personae.methods._merge import MergeMethod
from personae.methods._method import Pass, Passes
from personae.methods._site import Site

View = Callable[[Tensor, Any, Site], tuple[Tensor, Site]]
"""`view(task_vectors, outer, site)`: what the inner method is given instead, and where."""


def passes_through(inner: MergeMethod, experts: int, view: View | None = None) -> Passes:
    """The passes of an inner method, over what `view` makes of task vectors, or over themselves."""
    passes = inner.passes(experts)
    try:
        one = next(passes)
        while True:
            one = passes.send((yield _through(inner, view, one)))
    except StopIteration as done:
        return done.value


def _through(inner: MergeMethod, view: View | None, one: Pass) -> Pass:
    """The pass, with the inner method's parameters, over what is seen; nothing waits for it."""

    def term(vectors: Tensor, outer: Any, site: Site) -> Tensor:
        if view is not None:  # a sample is one of the rows seen: the view needs all there are
            vectors, site = view(vectors, outer, site)
            vectors = inner.sampled(vectors, one.sample)
        return one.term(vectors, inner, site)

    def applies(_: Any, site: Site) -> bool:
        return one.applies(inner, site)

    sample = one.sample if view is None else 1
    return one._replace(term=term, applies=applies, sample=sample, late=False)
