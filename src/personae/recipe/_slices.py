"""`slices` and `modules` of a merge recipe, as the recipes of one family each.

A slice takes some layers of each of its sources and merges them; the slices, in their order, are
the layers of the output. So each is a recipe in itself, whose `models` are its sources: a *part*.
Here the file is taken apart into these, and what is found wrong in a part is told of the place in
the file that it came from.

What holds where (mergekit 0.1.5): a parameter of a source goes before that of its slice, this
before that of its module, and this before that of the recipe; where no filter of one fits, the next
is asked. A gradient runs over the layers of each slice, from 0 in its first to 1 in its last. What
comes before the layers is merged with the first slice, what comes after them with the last. A slice
may have a `base_model` and (here alone) a `merge_method` of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from personae.family.layers import Layers, Span
from personae.methods import METHODS_BY_CONVENTIONS
from personae.recipe._base import Strict
from personae.recipe._faults import Fault, Place, validated
from personae.recipe._merge_family import Family
from personae.recipe._values import Values, always

_ONE_OF = ("models", "slices", "modules")
_SLICED = ("slices", "modules")


class _Source(Strict):
    model: str = Field(min_length=1)
    layer_range: tuple[int, int] | None = None
    name: str | None = None
    parameters: Values = Field(default={})


class _Slice(Strict):
    sources: list[_Source] = Field(default=[])
    base_model: Annotated[str, Field(min_length=1)] | None = None
    merge_method: str | None = None
    parameters: Values = Field(default={})
    residual_weight: float | None = None


class _Module(Strict):
    slices: list[_Slice] | None = None
    models: list[_Source] | None = None
    parameters: Values = Field(default={})


class _Sliced(Strict):
    slices: list[_Slice] | None = None
    modules: dict[str, _Module] | None = None


SLICE_KEYS: Mapping[str, Sequence[str]] = {
    "slices": (*_Slice.model_fields,),
    "sources": (*_Source.model_fields,),
}
"""The keys that are read in slices and their sources."""

_NESTED: dict[str, type[Strict]] = {
    "slices": _Slice,
    "sources": _Source,
    "models": _Source,
    "modules": _Module,
}


@dataclass(frozen=True)
class Part:
    """A part of a recipe as a recipe of its own.

    Attributes:
        content: It, in the shape of a recipe with `models`.
        places: Where in the file its parts stand, where that is elsewhere.
        spans: The layers of each model; empty where whole models are merged.
        layers: What they are in the output; None where whole models are merged.
    """

    content: dict[str, Any]
    places: Mapping[Place, Place] = field(default_factory=dict)
    spans: Sequence[Span | None] = ()
    layers: Layers | None = None

    def in_file(self, fault: Fault) -> Fault:
        """The same, placed in the file."""
        place = fault.place
        for length in range(len(place), 0, -1):
            if place[:length] in self.places:
                return Fault((*self.places[place[:length]], *place[length:]), fault.text)
        return fault

    def layers_of(self, family: Family, faults: list[Fault]) -> Layers | None:
        """Which layers are taken of the models of a family that was read of this part.

        A base that is no source is taken by the layers that all sources are taken by.
        """
        if self.layers is None:
            return None
        experts = tuple(self.spans[n] for n, _ in family.entries)
        models = [model["model"] for model in self.content["models"]]
        base = None
        if family.base is not None:
            own = [
                span for span, model in zip(self.spans, models, strict=True) if model == family.base
            ]
            spans = {*own} or {*experts}
            base = next(iter(spans), None)
            if len(spans) > 1 and own:
                text = "The base stands twice among the sources. Keep one of both."
                faults.append(Fault(("models",), text))
            elif len(spans) > 1:
                text = (
                    f"The base '{family.base}' is not among the sources, and these are of unlike "
                    "layers. List it too, with the layer_range that they are compared with."
                )
                faults.append(Fault(("models",), text))
        return Layers(
            experts,
            base,
            self.layers.first,
            self.layers.module,
            self.layers.before,
            self.layers.after,
        )


def is_sliced(content: Mapping[str, Any]) -> bool:
    """Whether a recipe takes models apart."""
    return any(content.get(key) is not None for key in _SLICED)


def without_slices(content: Mapping[str, Any]) -> dict[str, Any]:
    """All else that a recipe says."""
    return {key: value for key, value in content.items() if key not in _SLICED}


def parts_of(content: Mapping[str, Any], faults: list[Fault], remarks: list[str]) -> list[Part]:
    """The parts of a recipe, in the order of the output; the recipe itself if it has no slices.

    Args:
        content: What the file says.
        faults: Gets what is wrong with slices and modules.
        remarks: Gets what a person should know.
    """
    if not is_sliced(content):
        return [Part(dict(content))]
    given = [key for key in _ONE_OF if content.get(key) is not None]
    if len(given) > 1:
        text = f"'{given[0]}' and '{given[1]}' both say what is merged. Keep one."
        faults.append(Fault((given[1],), text))
        return [Part({key: v for key, v in content.items() if key not in given[1:]})]
    sliced = validated({key: content[key] for key in given}, _Sliced, _NESTED, faults)
    if sliced is None:
        return []
    if not any(content[key] for key in given):
        faults.append(Fault((given[0],), f"'{given[0]}' is empty: list what is merged."))
        return []
    common = {key: value for key, value in content.items() if key not in _ONE_OF}
    if any(s.residual_weight is not None for _, s in _slices_of(sliced)):
        remarks.append("residual_weight has no effect, as in mergekit 0.1.5.")
    found = [
        part for module in _modules_of(sliced) for part in _parts_of_module(module, common, faults)
    ]
    return found


class _Place(NamedTuple):
    """A module, with where it stands.

    Attributes:
        name: Of the module; None where the recipe names none.
        place: In the file.
        said: What is said of it.
        is_first: Whether it is the first of the modules.
        is_last: Whether it is the last of them.
    """

    name: str | None
    place: Place
    said: _Module
    is_first: bool
    is_last: bool


def _modules_of(sliced: _Sliced) -> Iterator[_Place]:
    if sliced.slices is not None:
        yield _Place(None, (), _Module(slices=sliced.slices), True, True)
    modules = sliced.modules or {}
    for n, (name, module) in enumerate(modules.items()):
        yield _Place(name, ("modules", name), module, n == 0, n == len(modules) - 1)


def _slices_of(sliced: _Sliced) -> Iterator[tuple[Place, _Slice]]:
    for module in _modules_of(sliced):
        for n, one in enumerate(module.said.slices or ()):
            yield (*module.place, "slices", n), one


def _parts_of_module(
    module: _Place, common: Mapping[str, Any], faults: list[Fault]
) -> Iterator[Part]:
    said = module.said
    if (said.slices is None) == (said.models is None):
        text = f"A module has 'slices' or 'models'; '{module.name}' has both or none."
        faults.append(Fault(module.place, text))
        return
    if said.models is not None:
        whole = _Slice(sources=said.models)
        yield _part(whole, (*module.place, "models"), module.place, module, common, 0, True, True)
        return
    first, slices = 0, said.slices or []
    if not slices:
        text = "'slices' is empty: list what is merged."
        faults.append(Fault((*module.place, "slices"), text))
    for n, one in enumerate(slices):
        place = (*module.place, "slices", n)
        length = _length(one, place, faults)
        ends = n == 0, n == len(slices) - 1
        if one.sources:
            yield _part(one, (*place, "sources"), place, module, common, first, *ends)
        first += length


def _length(one: _Slice, place: Place, faults: list[Fault]) -> int:
    """How many layers a slice has; faults of its ranges."""
    lengths: dict[int, str] = {}
    if not one.sources:
        faults.append(Fault(place, "A slice takes layers of models: list them under 'sources'."))
    for n, source in enumerate(one.sources):
        where = (*place, "sources", n, "layer_range")
        if source.layer_range is None:
            text = (
                "A source of a slice needs 'layer_range': its first layer, and the one after its "
                "last."
            )
            faults.append(Fault(where[:-1], text))
            continue
        start, stop = source.layer_range
        if not 0 <= start < stop:
            text = (
                f"layer_range [{start}, {stop}] holds no layers: they are counted from 0, and the "
                "second number is the one after the last."
            )
            faults.append(Fault(where, text))
            continue
        lengths.setdefault(stop - start, f"'{source.model}' [{start}, {stop}]")
    if len(lengths) > 1:
        told = ", ".join(f"{count} of {source}" for count, source in lengths.items())
        text = f"The sources of a slice have as many layers each; here there are {told}."
        faults.append(Fault((*place, "sources"), text))
    return next(iter(lengths), 0)


def _part(
    one: _Slice,
    sources: Place,
    place: Place,
    module: _Place,
    common: Mapping[str, Any],
    first: int,
    is_first: bool,
    is_last: bool,
) -> Part:
    """A slice as a recipe with `models`."""
    content = dict(common)
    places: dict[Place, Place] = {("models",): sources}
    for key in ("base_model", "merge_method"):
        value = getattr(one, key)
        if value is not None:
            content[key] = value
            places[key,] = (*place, key)
    content["parameters"] = common.get("parameters")
    if one.merge_method is not None:
        content["parameters"] = _of_method(
            content["parameters"], one.merge_method, str(common.get("merge_method"))
        )
    for outer, said in ((module.place, module.said), (place, one)):
        if said.parameters:
            content["parameters"] = _over(said.parameters, content["parameters"])
            for name in said.parameters:
                places["parameters", name] = (*outer, "parameters", name)
    content["models"] = [
        source.model_dump(exclude={"layer_range"}, exclude_defaults=True) for source in one.sources
    ]
    layers = Layers(
        (),
        None,
        first,
        module.name,
        ("model" if module.is_first else "module") if is_first else "none",
        ("model" if module.is_last else "module") if is_last else "none",
    )
    return Part(content, places, [source.layer_range for source in one.sources], layers)


def _over(inner: Mapping[str, Any], outer: Any) -> dict[str, Any]:
    """Parameters where inner ones go before outer ones, which fill what no filter fits."""
    if not isinstance(outer, dict):
        return dict(inner)
    found = dict(outer)
    for name, value in inner.items():
        filtered = name in outer and isinstance(value, list | dict) and not always(value)
        found[name] = [*_entries(value), *_entries(outer[name])] if filtered else value
    return found


def _entries(value: Any) -> list[Any]:
    """A value as entries with filters."""
    if isinstance(value, dict):
        return [value]
    is_filtered = isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
    return value if is_filtered else [{"value": value}]


def _of_method(parameters: Any, method: str, common: str) -> Any:
    """The recipe's parameters without those of its method that a slice's own method lacks."""
    if not isinstance(parameters, dict):
        return parameters
    own, others = _fields(method), _fields(common)
    return {name: v for name, v in parameters.items() if name in own or name not in others}


def _fields(method: str) -> set[str]:
    """The parameters of all methods of a name."""
    found = (methods.get(method) for methods in METHODS_BY_CONVENTIONS.values())
    return {name for cls in found if cls is not None for name in cls.fields()}
