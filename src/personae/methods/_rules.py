"""Methods inside methods: a registered one applied to what another makes of the task vectors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from personae.methods._merge import Gathering, Measure, MergeMethod, Statistics, one_row_in
from personae.methods._parameters import Parameters
from personae.methods._registry import MERGE_METHODS, build, lookup
from personae.methods._site import Site

View = Callable[[Tensor, Any, Site], tuple[Tensor, Site]]
"""`view(task_vectors, parameters, site)`: what the inner method is given instead, and where."""


class Rule:
    """A registered method with its parameters, to be applied inside another method."""

    def __init__(self, name: str, **settings: Any) -> None:
        """Look the method up by name and validate its settings."""
        self._method: MergeMethod = lookup(MERGE_METHODS, name)
        self._parameters: Parameters = build(self._method, settings)

    def gather(self, experts: int, view: View | None = None) -> Gathering:
        """The method's own looks, at what `view` makes of the task vectors, or at themselves."""
        if self._method.gather is None:
            return {}
        looks = self._method.gather(self._parameters, experts)
        try:
            measure = next(looks)
            while True:
                measure = looks.send((yield self._through(view, measure)))
        except StopIteration as done:
            return done.value

    def merge(self, seen: Tensor, statistics: Statistics | None, site: Site) -> Tensor:
        """Merge what a view made of the task vectors; without statistics, by looks at it alone."""
        return self._method.merge(seen, self._parameters, statistics, site)

    def _through(self, view: View | None, measure: Measure) -> Measure:
        """The measure, with the method's own parameters, of what is seen; nothing waits for it."""

        def tally(vectors: Tensor, outer: Any, site: Site) -> Tensor:
            if view is not None:  # a sample is one of the rows seen: the view needs all there are
                vectors, site = view(vectors, outer, site)
                vectors = one_row_in(measure.sample, vectors)
            return measure.tally(vectors, self._parameters, site)

        def applies(_: Any, site: Site) -> bool:
            return measure.applies(self._parameters, site)

        sample = measure.sample if view is None else 1
        return measure._replace(tally=tally, applies=applies, sample=sample, late=False)
