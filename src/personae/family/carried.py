"""How a LoRA adapter can carry what an expert changed: as factors, as whole modules, or not at all.

Factors are for linear layers. A module that has none inside can be saved whole (`modules_to_save`),
which PEFT reads and engines mostly refuse. What remains is left out: biases of linear layers, and
whatever nobody asked for.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from personae._types import TensorSpec
from personae.checkpoints.built import BuiltModel
from personae.checkpoints.configuration import is_head
from personae.checkpoints.naming import matches, module_of, modules_around
from personae.checkpoints.published_renames import Renames
from personae.checkpoints.vocabulary import is_input_embedding
from personae.methods import Site, stacked_matrices

Kind = Literal["linear", "bias", "head", "embedding", "norm", "convolution", "experts", "other"]
"""Of a tensor: the weight or the bias of a linear layer, or part of another kind of module."""

SAVEABLE = tuple(kind for kind in get_args(Kind) if kind not in ("linear", "bias"))

_OF_NORMS = ("gamma", "beta", "running_mean", "running_var")
_ROOT = "base_model.model."
HEADS_OF = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT expects to be saved whole, by the type of the task: without them it fails."""


@dataclass(frozen=True)
class Model:
    """What is known of the model that an adapter is for.

    Attributes:
        specs: The expert's tensors, by its own names.
        kinds: Kind of each.
        places: Name of each as the model has it in memory.
        modules: Names of all modules in memory.
        aliases: Further names in memory of tensors that are tied.
        tied_unknown: Embeddings that are tied to an output layer whose name is not known.
        strange: Modules of linear layers that the class, where it is known, does not have.
    """

    specs: Mapping[str, TensorSpec]
    kinds: Mapping[str, Kind]
    places: Mapping[str, str]
    modules: frozenset[str]
    aliases: Mapping[str, Sequence[str]]
    tied_unknown: frozenset[str]
    strange: tuple[str, ...] = ()

    def module(self, name: str) -> str:
        """The module in memory that a tensor belongs to; '' if it is the model itself."""
        return module_of(self.places[name])


@dataclass(frozen=True)
class Carried:
    """What an adapter carries.

    Attributes:
        factors: Tensor to the name of its module.
        whole: Name in memory to the tensor that is stored whole under it.
        saved: Names for `modules_to_save`.
        left: What changed and is not carried.
    """

    factors: Mapping[str, str]
    whole: Mapping[str, str]
    saved: tuple[str, ...]
    left: tuple[str, ...]


def describe(
    specs: Mapping[str, TensorSpec],
    private: Collection[str],
    *,
    tied: Mapping[str, str],
    says_tied: bool,
    built: BuiltModel | None = None,
    renames: Sequence[Renames] = (),
) -> Model:
    """Sort the tensors of an expert.

    Args:
        specs: Its tensors, by its own names.
        private: Those that the reference does not have, or in another shape.
        tied: Further names of tensors to those in `specs`.
        says_tied: Whether the output layer is the embedding.
        built: The model in memory, where transformers can tell.
        renames: How names in files become names in memory.
    """
    known = built or BuiltModel()
    places = {name: _place(name, known, renames) for name in specs}
    aliases = {
        name: sorted(
            known.shared.get(place, frozenset()) - {place}
            or {other for other, kept in tied.items() if kept == name}
        )
        for name, place in places.items()
    }
    kinds: dict[str, Kind] = {
        name: "head" if name in private else _kind(name, specs, known.linear, places[name], built)
        for name in specs
    }
    for name in kinds:
        if kinds[name] == "linear" and aliases[name]:  # factors on one of its modules are too few
            kinds[name] = "other"
    paths = {path for place in places.values() for path in modules_around(module_of(place))}
    unknown = {
        name
        for name in specs
        if says_tied and built is None and is_input_embedding(name) and not aliases[name]
    }
    linear = [module_of(places[name]) for name, kind in sorted(kinds.items()) if kind == "linear"]
    has_output = any(kind == "head" for kind in kinds.values())
    return Model(
        specs,
        kinds,
        places,
        frozenset(paths | known.modules),
        aliases,
        frozenset() if has_output else frozenset(unknown),
        tuple(module for module in linear if built and module not in built.modules),
    )


def carry(
    model: Model,
    changed: Collection[str],
    save: Collection[str],
    task_type: str | None,
    skip: Sequence[str] = (),
) -> Carried:
    """Decide how each tensor that changed is carried.

    Args:
        model: The model.
        changed: Names of the tensors that the expert has otherwise than its reference.
        save: Kinds of tensors whose modules are to be saved whole.
        task_type: PEFT's type of the task.
        skip: Patterns of names that are left out.
    """
    taken = [name for name in sorted(changed) if not matches(name, skip)]
    heads = [head for head in HEADS_OF.get(task_type or "", ()) if _matching(model, head)]
    forced = {module for head in heads for module in _matching(model, head)}
    factors = {
        name: model.module(name)
        for name in taken
        if model.kinds[name] == "linear" and not _inside(model.module(name), forced)
    }
    wanted: set[str] = set()
    for name in taken:
        modules = {module_of(place) for place in (model.places[name], *model.aliases[name])}
        asked = model.kinds[name] in save and name not in model.tied_unknown
        if asked and all(_is_saveable(model, module, factors.values()) for module in modules):
            wanted |= modules
    outer = {module for module in wanted if not _inside(module, (wanted | forced) - {module})}
    saved = forced | outer
    stored = {
        place: name
        for name in model.specs
        for place in (model.places[name], *model.aliases[name])
        if _inside(module_of(place), saved)
    }
    whole = {*stored.values()}
    return Carried(
        factors=factors,
        whole=dict(sorted(stored.items())),
        saved=(*heads, *sorted(outer)),
        left=tuple(sorted(name for name in changed if name not in factors and name not in whole)),
    )


def target_names(adapted: Collection[str], modules: Collection[str]) -> list[str]:
    """Names for `target_modules` that match these modules and no others.

    The last part of a name, as adapters mostly have it, where every module that ends so is adapted;
    else the whole name.
    """
    adapted = {*adapted}
    loose = {last_part(module) for module in modules if module not in adapted}
    return sorted({m if last_part(m) in loose else last_part(m) for m in adapted})


def _kind(
    name: str,
    specs: Mapping[str, TensorSpec],
    linear: Collection[str],
    place: str,
    built: BuiltModel | None,
) -> Kind:
    shape, (module, _, last) = specs[name].shape, name.rpartition(".")
    if is_head(name):
        return "head"
    if stacked_matrices(name, shape):
        return "experts"
    if last == "weight" and len(shape) == 2:
        told = built is not None and module_of(place) in built.modules
        is_linear = module_of(place) in linear if told else Site(name, shape).kind == "linear"
        return "linear" if is_linear else "embedding"
    if last == "bias" and f"{module}.weight" in specs:
        of_weight = _kind(f"{module}.weight", specs, linear, place, built)
        return "bias" if of_weight == "linear" else of_weight
    if last == "weight":
        return "convolution" if len(shape) > 2 else "norm"
    return "norm" if len(shape) == 1 and last in _OF_NORMS else "other"


def _place(name: str, built: BuiltModel, renames: Sequence[Renames]) -> str:
    """The name in memory: as in the file, unless only another one has a module there."""
    for place in (name, *(rename(name) for rename in renames)):
        if module_of(place) in built.modules:
            return place
    return name


def _is_saveable(model: Model, module: str, adapted: Collection[str]) -> bool:
    """Whether a module can be saved whole, and PEFT, which goes by endings, takes it alone."""
    if not module or any(_inside(inner, {module}) for inner in adapted):
        return False
    return _matching(model, module) == {module}


def _matching(model: Model, ending: str) -> set[str]:
    """The modules that PEFT takes an entry of `modules_to_save` for."""
    return {module for module in model.modules if module and (_ROOT + module).endswith(ending)}


def _inside(module: str, outer: Collection[str]) -> bool:
    """Whether a module is one of these, or in one."""
    return any(path in outer for path in modules_around(module))


def last_part(module: str) -> str:
    """What a module is called in the one it lies in."""
    return module.rpartition(".")[2]
