"""Methods inside methods: a registered one applied to what another makes of the task vectors."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from personae.methods._merge import Gathering, Measure, MergeMethod, Statistics
from personae.methods._parameters import Parameters
from personae.methods._registry import MERGE_METHODS, build, lookup
from personae.methods._site import Site

View = Callable[[Tensor, Any, Site], Tensor]
"""`view(task_vectors, parameters, site)`: what the inner method is given instead."""


class Rule:
    """A registered method with its parameters, to be applied inside another method."""

    def __init__(self, name: str, **settings: Any) -> None:
        """Look the method up by name and validate its settings."""
        self._method: MergeMethod = lookup(MERGE_METHODS, name)
        self._parameters: Parameters = build(self._method, settings)

    def gather(self, experts: int, view: View) -> Gathering:
        """The method's own looks, at what `view` makes of the task vectors."""
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
        """Merge what `view` made of the task vectors of this site."""
        site = replace(site, shape=tuple(seen.shape[1:]))
        return self._method.merge(seen, self._parameters, statistics, site)

    def _through(self, view: View, measure: Measure) -> Measure:
        def tally(vectors: Tensor, outer: Any, site: Site) -> Tensor:
            seen = view(vectors, outer, site)
            site = replace(site, shape=tuple(seen.shape[1:]))
            return measure.tally(seen, self._parameters, site)

        def applies(_: Any, site: Site) -> bool:
            return measure.applies(self._parameters, site)

        return measure._replace(tally=tally, applies=applies)
