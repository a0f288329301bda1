"""A merge method's parameters as a recipe gives them: checked without a tensor, built for one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from personae.errors import Faults, MethodError, nearest
from personae.methods import MergeMethod, Parameters, build, flag_fault, percent_hint
from personae.recipe._faults import Fault, Place
from personae.recipe._values import (
    MISSING,
    always,
    evaluate,
    fault_in,
    filters_of,
    is_gradient,
    position,
    scalars_of,
    varies,
)
from personae.recipe.mergekit import default_hint


@dataclass(frozen=True)
class GivenParameters:
    """What is said of a method's parameters, for all experts and for each.

    Attributes:
        method: The method.
        common: Parameter to value, for all experts.
        own: The same for each expert, which goes before; empty if nothing is said of any.
        has_base: Whether task vectors are merged, or difference vectors.
    """

    method: type[MergeMethod]
    common: Mapping[str, Any]
    own: Sequence[Mapping[str, Any]]
    has_base: bool = True

    @cached_property
    def names(self) -> list[str]:
        """All parameters of which something is said."""
        return sorted({*self.common, *(name for own in self.own for name in own)})

    @cached_property
    def per_expert(self) -> frozenset[str]:
        """The method's parameters that take a value an expert."""
        fields = self.method.fields()
        return frozenset(n for n, field in fields.items() if _takes_tuple(field.annotation))

    def said_of(self, name: str) -> list[Any]:
        """All values a parameter is given, in the recipe or for an expert."""
        sources = (self.common, *self.own)
        return [source[name] for source in sources if name in source]

    def at(self, name: str, layers: int, experts: int, first: int | None = None) -> dict[str, Any]:
        """The scalar each parameter has at one tensor, or a tuple of one an expert.

        What no filter fits is not in it; there the method's default holds. Gradients begin at the
        layer `first`, as `position` says.

        Raises:
            MethodError: if no filter of a parameter fits and the method has no default.
        """
        t = position(name, layers, first)
        found: dict[str, Any] = {}
        for parameter in self.names:
            common = evaluate(self.common.get(parameter, MISSING), name, t)
            owns = [evaluate(own.get(parameter, MISSING), name, t) for own in self.own]
            values = [common if own is MISSING else own for own in owns] or [common] * experts
            if all(value is MISSING for value in values) and not self._is_required(parameter):
                continue
            values = [self._filled(parameter, value, name) for value in values]
            same = all(value == values[0] for value in values)
            found[parameter] = values[0] if same else tuple(values)
        return found

    def _is_required(self, parameter: str) -> bool:
        field = self.method.fields().get(parameter)
        return field is not None and field.is_required()

    def _filled(self, parameter: str, value: Any, name: str) -> Any:
        """A value, or the method's default where no filter fits.

        Raises:
            MethodError: if the method has none.
        """
        if value is not MISSING:
            return value
        if self._is_required(parameter):
            raise MethodError(
                f"{self.method.name}: no filter of {parameter} matches the tensor '{name}'. Add "
                "an entry without a filter, for all others."
            )
        return self.method.fields()[parameter].default

    def faults(self, experts: Sequence[str]) -> Iterator[Fault]:
        """Every fault that needs no tensor, placed in `parameters` and `expert_parameters`."""
        fields = self.method.fields()
        if self.own and len(self.own) != len(experts):
            text = f"Parameters are given for {len(self.own)} experts, but there are {len(experts)}"
            yield Fault(("expert_parameters",), f"{text}. Give each its own, or none.")
            return
        sound = True
        for source, place in self._sources():
            for name, value in source.items():
                for text in self._value_faults(name, value):
                    sound = False
                    yield Fault((*place, name), text)
        for name, field in fields.items():
            if field.is_required() and not self.said_of(name):
                place = ("parameters",) if self.common else ("method",)
                more = ""
                if self.method.conventions == "mergekit":
                    more = default_hint(self.method.name, name)
                yield Fault(place, f"{self.method.name} needs '{name}'. Give it.{more}")
                sound = False
        if sound and experts:
            spread = [*self._spread_faults(experts), *self._model_wide_faults()]
            spread += self._gaps()
            yield from spread or self._joint_faults(len(experts))

    def _sources(self) -> Iterator[tuple[Mapping[str, Any], Place]]:
        yield self.common, ("parameters",)
        for n, own in enumerate(self.own):
            yield own, ("expert_parameters", n)

    def _value_faults(self, name: str, value: Any) -> Iterator[str]:
        fields = self.method.fields()
        if name not in fields:
            known = nearest(name, fields) if fields else "It has none."
            yield f"{self.method.name} has no parameter '{name}'. {known}"
            return
        wrong = fault_in(value)
        if wrong:
            yield f"{name} = {value!r}: {wrong}."
            return
        adapter: TypeAdapter[Any] = TypeAdapter(
            fields[name].rebuild_annotation(), config=ConfigDict(allow_inf_nan=False)
        )
        for scalar in _probes(value):
            wrong = flag_fault(scalar, fields[name].annotation)
            if wrong:
                yield f"{self.method.name}: {name} = {scalar!r}: {wrong}."
                continue
            try:
                adapter.validate_python(scalar)
            except ValidationError as error:
                fault = error.errors()[0]
                message = fault["msg"].removesuffix(".") + "." + percent_hint(scalar, fault)
                yield f"{self.method.name}: {name} = {scalar!r}: {message}"

    def _spread_faults(self, experts: Sequence[str]) -> Iterator[Fault]:
        """What is said of some experts alone, or differs where it must not."""
        for name in self.names:
            having = [n for n, own in enumerate(self.own) if name in own]
            if not having:
                continue
            place = ("expert_parameters", having[0], name)
            # mergekit's method takes its default for the others.
            everywhere = self.method.conventions == "papers" or self._is_required(name)
            if everywhere and name not in self.common and len(having) < len(experts):
                without = next(expert for n, expert in enumerate(experts) if n not in having)
                yield Fault(
                    place,
                    f"{name} is given for {len(having)} of {len(experts)} experts, not for "
                    f"'{without}'. Give it for each, or one for all under 'parameters'.",
                )
            values = [own.get(name, self.common.get(name)) for own in self.own]
            if name not in self.per_expert and any(value != values[0] for value in values):
                yield Fault(
                    place,
                    f"{self.method.name} takes one {name} for all experts. "
                    "Give it under 'parameters'.",
                )

    def _joint_faults(self, experts: int) -> Iterator[Fault]:
        """Values that are sound one by one and wrong together, at tensors of every kind."""
        filters = [f for n in self.names for v in self.said_of(n) for f in filters_of(v)]
        found = Faults()
        for fragment in ("", *dict.fromkeys(filters)):
            for name in (fragment.replace("*", "x"), "1." + fragment.replace("*", "x")):
                try:
                    values = self.at(name, 2, experts)
                    built: Parameters = build(self.method, values)
                    built.check_experts(experts, found, has_base=self.has_base)
                except MethodError as error:
                    found.add(str(error))
        for text in found.messages:
            yield Fault(self._place_in(text), text)

    def _place_in(self, text: str) -> Place:
        """Where the first parameter that a text names stands; the method's place if none does."""
        named: list[tuple[int, Place]] = [
            (text.index(name), (*place, name))
            for source, place in self._sources()
            for name in source
            if name in text
        ]
        return min(named, key=lambda found: found[0], default=(0, ("method",)))[1]

    def _gaps(self) -> Iterator[Fault]:
        """Parameters without a default of which filters alone speak."""
        for name in filter(self._is_required, self.names):
            for n, own in enumerate(self.own or [{}]):
                said = [source[name] for source in (own, self.common) if name in source]
                if said and not any(map(always, said)):
                    yield Fault(
                        ("expert_parameters", n, name) if name in own else ("parameters", name),
                        f"{self.method.name} needs a {name} for every tensor, but there are only "
                        "entries with a filter. Add a last entry without 'filter' for all other "
                        "tensors.",
                    )

    def _model_wide_faults(self) -> Iterator[Fault]:
        """What differs from tensor to tensor although a pass over the whole model needs it."""
        scopes = {scalar for value in self.said_of("scope") for scalar in scalars_of(value)}
        covered = all(always(value) for value in self.said_of("scope"))
        if scopes == {"tensor"} and covered:
            return
        for source, place in self._sources():
            for name in self.method.model_wide:
                if name in source and varies(source[name]):
                    hint = ""
                    if "scope" in self.method.fields():
                        hint = ", or 'scope: tensor'"
                    yield Fault(
                        (*place, name),
                        f"{self.method.name} reads the whole model before it merges, so {name} "
                        f"cannot differ from tensor to tensor. Give one value{hint}.",
                    )


def _probes(value: Any) -> list[Any]:
    """Scalars to validate: those of the value, and what lies between those of a gradient."""
    found = list(scalars_of(value))
    gradients = [value] if is_gradient(value) else []
    if isinstance(value, list | dict) and not gradients:
        entries = [value] if isinstance(value, dict) else value
        gradients = [entry["value"] for entry in entries if is_gradient(entry["value"])]
    for points in gradients:
        found += [a + (b - a) / 3 for a, b in pairwise(points) if a != b]
    return list({repr(scalar): scalar for scalar in found}.values())


def _takes_tuple(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(map(_takes_tuple, get_args(annotation)))
