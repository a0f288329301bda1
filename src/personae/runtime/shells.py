"""Models in memory around one set of weights: a shell for each class, the reference's in all.

A base without a head and experts with one, or experts of several classes, are modules of several
classes. Each is built once, by the class of `transformers` that its configuration names (or is the
module that was given), and holds the very tensors of the reference that the others hold.

Names in files are not always those in memory. `transformers` itself says which is which: the
parameter that has the memory of a tensor it was given is that tensor.
"""

import copy
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from personae._quiet import quiet_transformers
from personae._types import TensorSpec
from personae.checkpoints import Checkpoint
from personae.checkpoints.built import bounded, build_module
from personae.checkpoints.class_fit import check_loaded, check_size
from personae.checkpoints.configuration import class_of
from personae.checkpoints.naming import shown
from personae.checkpoints.published_renames import Renames, published_renames
from personae.errors import CheckpointError, Faults, nearest
from personae.run import outline
from personae.run.outline import Outline
from personae.runtime.variants import GENERATION, small_file

Places = Mapping[str, Sequence[Tensor]]


class Unit(NamedTuple):
    """A tensor in memory as the module that computes with it has it.

    Attributes:
        module: The module.
        name: What it calls the tensor.
    """

    module: nn.Module
    name: str


@dataclass
class Shell:
    """A module whose shared tensors are the reference's.

    Attributes:
        module: The module.
        places: A name in checkpoint files to the tensors that it is in memory.
        at_rest: Of each of these names what it is while no task is active.
        units: The id of a tensor in memory to the modules that compute with it.
        apart: Whether rows of several tasks have to be computed one task after another.
        strays: Ids of tensors that the model reads without calling the modules that have them;
            None as long as it was not watched.
    """

    module: nn.Module
    places: Mapping[str, tuple[Tensor, ...]]
    at_rest: Mapping[str, Tensor]
    units: Mapping[int, tuple[Unit, ...]] = field(init=False)
    apart: bool = False
    strays: set[int] | None = None

    def __post_init__(self) -> None:
        """Find the modules."""
        found: dict[int, list[Unit]] = {}
        for module in _computing(self.module):
            # Attention reads the tensors of the layer in it without calling that.
            inner = isinstance(module, nn.MultiheadAttention)
            for kind in (module.named_parameters, module.named_buffers):
                for name, tensor in kind(recurse=inner, remove_duplicate=False):
                    found.setdefault(id(tensor), []).append(Unit(module, name))
        self.units = {one: tuple(units) for one, units in found.items()}

    @property
    def widths(self) -> set[int]:
        """Widths of what norms and linear layers take."""
        found = {tuple(p.shape) for n, p in self.module.named_parameters() if n.endswith("weight")}
        norms = {shape[0] for shape in found if len(shape) == 1}
        linear = {
            module.in_features for module in self.module.modules() if isinstance(module, nn.Linear)
        }
        return norms | linear

    def view(self, of: Outline) -> nn.Module:
        """The same module with the configuration of one model of its class, such as its labels."""
        config = _config(small_file(of))
        if config is None or not hasattr(self.module, "config"):
            return self.module
        seen = copy.copy(self.module)
        attributes = seen.__dict__
        attributes.pop("forward", None)
        attributes["config"] = config
        if "num_labels" in attributes:
            attributes["num_labels"] = config.num_labels
        generation = small_file(of, GENERATION)
        if generation and "generation_config" in attributes:
            transformers = importlib.import_module("transformers")
            attributes["generation_config"] = transformers.GenerationConfig.from_dict(generation)
        return seen

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Let tensors be these, by their names in files."""
        for name, value in values.items():
            for place in self.places[name]:
                place.data = value.to(place.device, place.dtype)


class Shells:
    """All shells of one runtime, each built when it is first asked for."""

    def __init__(
        self,
        reference: Checkpoint,
        model: nn.Module | None,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        """Take what is there; reads no tensor.

        Args:
            reference: The reference, each tensor once.
            model: The module to use for every model; None to build them.
            device: Where the tensors go.
            dtype: What floating tensors are in memory; None for the most frequent one of the
                reference, or for what they are in the module given.
        """
        self.of_reference = outline.of_reference(reference)
        self._reference, self._device = reference, device
        self._dtype = dtype or _main_dtype(reference.specs.values())
        self._model = model if model is None or dtype is None else model.to(dtype)
        self._shared: dict[tuple[str, torch.dtype], Tensor] = {}
        self._found: dict[str, Shell] = {}
        self._bare: nn.Module | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the reference in memory."""
        if self._model is not None:
            return sum(
                tensor.nbytes for tensor in {id(t): t for _, t in _tensors(self._model)}.values()
            )
        return sum(
            spec.numel * (self._dtype if spec.is_floating else spec.dtype).itemsize
            for spec in self._reference.specs.values()
        )

    def shell(self, of: Outline) -> Shell:
        """The shell for a model like this.

        Raises:
            CheckpointError: if its class is not known, or the module given has not its tensors.
        """
        key = self._key(of)
        if key not in self._found:
            if key == self._key(self.of_reference):  # which has values where tasks have their own
                of = self.of_reference
            module, places = self._built(of) if self._model is None else self._given(of)
            self._found[key] = self._shell(of, module, places)
        return self._found[key]

    def bare(self) -> nn.Module:
        """The reference's module.

        Raises:
            CheckpointError: if its class is not known.
        """
        if self._model is not None:
            return self._model
        if self._bare is None:
            self._bare = self.shell(self.of_reference).view(self.of_reference)
        return self._bare

    def _key(self, of: Outline) -> str:
        """Equal for models whose modules differ in nothing but tensors and the outermost's labels.

        The keys that all configurations have say what a model answers, not how it computes.
        """
        names = sorted([*of.specs, *of.copies])
        content = small_file(of)
        config = _config(content)
        if self._model is not None or config is None:
            return json.dumps(names)
        common = importlib.import_module("transformers").PretrainedConfig()
        computes = type(config)().to_dict().keys() - common.to_dict().keys()
        said = {key: value for key, value in config.to_dict().items() if key in computes}
        return json.dumps([class_of(content), said, names], sort_keys=True, default=str)

    def _built(self, of: Outline) -> tuple[nn.Module, Places]:
        """A module built by transformers.

        Raises:
            CheckpointError: if that does not know the class, or makes other tensors of those here,
            or of another shape, or needs some that are not here.
        """
        content = small_file(of)
        config, class_name = _config(content), class_of(content)
        bare = build_module(content, class_name)
        if config is None or bare is None:
            raise CheckpointError(
                f"transformers cannot build '{class_name}', which the configuration of "
                f"{self._reference.source} or of a task names. Install transformers, mend that "
                "configuration, or give the module with model=."
            )
        check_size(bare, of.specs)
        marks = {name: self._mark(of, name) for name in of.specs}
        try:
            with quiet_transformers():
                module, told = type(bare).from_pretrained(
                    None,
                    config=config,
                    state_dict=marks | {name: marks[of.tied[name]] for name in of.copies},
                    dtype=self._dtype,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers raises many kinds; all mean the same here
            said = (str(error).strip() or repr(error)).splitlines()[0]
            raise CheckpointError(f"transformers cannot build {class_name}: {said}") from error
        check_loaded(type(bare), told, of.specs)
        known = {mark.data_ptr(): name for name, mark in marks.items() if mark.numel()}
        places: dict[str, list[Tensor]] = {}
        for name, tensor in _tensors(module):
            called = known.get(tensor.data_ptr(), name)  # one that was cast keeps its name
            if called in marks and not any(tensor is one for one in places.get(called, ())):
                places.setdefault(called, []).append(tensor)
        lost = marks.keys() - places.keys() - {*told["unexpected_keys"]}
        # What older versions stored, such as GPT-2's causal masks, is left out without a word.
        of_old = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
        lost = {name for name in lost if not any(re.search(one, name) for one in of_old)}
        if lost:
            raise CheckpointError(
                f"{class_name} of transformers makes other tensors of {shown(sorted(lost))}, such "
                "as one of several. Unpack the task, or give a module that names them likewise "
                "with model=."
            )
        return module, places

    def _mark(self, of: Outline, name: str) -> Tensor:
        """A tensor to be known by its memory: the reference's own, or one without values."""
        spec, ref_name = of.specs[name], of.reference_names.get(name)
        dtype = self._dtype if spec.is_floating else spec.dtype
        if ref_name is not None and name not in of.grown:
            shared = self._read(ref_name, dtype)
            if shared.device.type == "cpu":
                return shared
        return torch.empty(spec.shape, dtype=dtype)

    def _given(self, of: Outline) -> tuple[nn.Module, Places]:
        """The module given.

        Raises:
            CheckpointError: naming every tensor that it lacks.
        """
        assert self._model is not None
        here = dict(_tensors(self._model))
        renames: Sequence[Renames] = ()
        if any(name not in here for name in of.specs):
            renames = [*published_renames(self._reference)]
        places: dict[str, list[Tensor]] = {}
        faults = Faults()
        for name, spec in of.specs.items():
            called = (name, *(rename(name) for rename in renames), *_ties(of, name))
            place = next((one for one in called if one in here), None)
            if place is not None:
                places[name] = [here[place]]
            elif spec.is_floating:
                faults.add(
                    f"{type(self._model).__name__}, given as model=, has no tensor '{name}'. "
                    f"{nearest(name, here)} Give the module that the experts are of."
                )
        faults.raise_if_any(CheckpointError)
        return self._model, places

    def _shell(self, of: Outline, module: nn.Module, places: Places) -> Shell:
        at_rest: dict[str, Tensor] = {}
        for name, tensors in places.items():
            ref_name, dtype = of.reference_names.get(name), tensors[0].dtype
            if ref_name is not None and name not in of.grown:
                at_rest[name] = self._read(ref_name, dtype)
            elif self._model is not None:
                at_rest[name] = tensors[0].data
            else:  # what only tasks have is nothing without one
                nothing = torch.tensor(torch.nan if dtype.is_floating_point else 0, dtype=dtype)
                at_rest[name] = nothing.to(self._device).expand(of.specs[name].shape)
        shell = Shell(module, {name: tuple(found) for name, found in places.items()}, at_rest)
        module.requires_grad_(False)
        for name, found in places.items():
            for place in found:
                place.data = at_rest[name]
        module.to(self._device)  # what no file holds
        return shell

    def _read(self, ref_name: str, dtype: torch.dtype) -> Tensor:
        if (ref_name, dtype) not in self._shared:
            read = self._reference.read(ref_name).to(self._device, dtype)
            self._shared[ref_name, dtype] = read
        return self._shared[ref_name, dtype]


def _computing(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those inside it, each once, without those that it does not call."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [] if isinstance(one, nn.MultiheadAttention) else one.children()


def _config(content: Mapping[str, Any]) -> Any:
    """The configuration as transformers has it; None without one, or without transformers."""
    try:
        auto = importlib.import_module("transformers").AutoConfig
        with quiet_transformers(), bounded(content):
            config = auto.for_model(**content) if "model_type" in content else None
        return config if config is None or config.to_dict() else None
    except Exception:  # many kinds; all mean that it cannot tell
        return None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _ties(of: Outline, name: str) -> list[str]:
    return [other for other, kept in of.tied.items() if kept == name]


def _main_dtype(specs: Iterable[TensorSpec]) -> torch.dtype:
    """The dtype of most numbers."""
    counts = Counter[torch.dtype]()
    for spec in specs:
        counts[spec.dtype] += spec.numel if spec.is_floating else 0
    return max(counts, key=counts.__getitem__, default=torch.float32)
