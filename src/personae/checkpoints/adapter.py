"""A PEFT LoRA adapter on top of its base, with its low-rank factors kept available."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.adapter_files import (
    CONFIG_FILE,
    Adapted,
    AdapterConfig,
    kept_pair,
    sort_stored,
)
from personae.checkpoints.adapter_fit import NAMES_DIFFER, find_rename, is_transposed
from personae.checkpoints.adapter_targets import (
    Parts,
    Shape,
    Target,
    find_targets,
    in_order,
    stack_is_crossed,
    ways_round,
)
from personae.checkpoints.adapter_ties import (
    check_grown,
    check_same,
    check_saved,
    tied_names,
    without_same,
)
from personae.checkpoints.folders import AuxiliaryFiles
from personae.checkpoints.layers import WithLayers
from personae.checkpoints.modules import WithModules
from personae.checkpoints.published_renames import published_renames
from personae.checkpoints.specs import by_name, check_rows, empty_fault, no_such_tensor
from personae.checkpoints.tied import WithCopies, still_tied
from personae.checkpoints.vocabulary_rows import WithRows
from personae.errors import CheckpointError, Faults

# Products are formed in whole blocks of rows, so that a row comes out the same however it is asked.
_BLOCK_ROWS = 256


class Adapter:
    """A `Checkpoint`: the base, with weights adapted and tensors replaced by an adapter.

    The merged weight is base + scaling * B @ A in fp32, as PEFT's `merge_and_unload` gives it. For
    a tied embedding that means every use of it is adapted, once: under `ensure_weight_tying` PEFT
    trains it so, but `merge_and_unload` adds the delta to it twice.

    Attributes:
        trained_on: What its configuration says it was trained on; None if it does not.
        model_class: The class it was trained with, or PEFT's type of its task, if it says one.
        config: What it says of itself.
        adapted: Name to how that weight is adapted.
        whole: Names of the tensors that it stores in full.
        places: Name of each of both to the names that the adapter itself has for it, as the model
            in memory has them: several of a tensor that is tied.
        factors_dtype: The widest dtype of its factors.
        base_specs: The base's own tensors.
        own_files: Names of the small files that are the adapter's own, not the base's.
    """

    def __init__(
        self,
        tensors: Checkpoint,
        base: Checkpoint,
        adapted: Mapping[str, Adapted],
        replaced: Mapping[str, str],
        config: AdapterConfig,
        places: Mapping[str, tuple[str, ...]],
    ) -> None:
        """Combine headers; `replaced` maps names to stored names. Use `fit_adapter`."""
        self.source = tensors.source
        self.config, self.adapted, self.places = config, adapted, places
        self.whole = frozenset(replaced)
        of_factors = [tensors.specs[how.pair.a].dtype for how in adapted.values()]
        self.factors_dtype = max(of_factors, key=lambda dtype: dtype.itemsize)
        self.trained_on = config.base_model_name_or_path
        self.model_class = config.model_class
        self.base_specs: Mapping[str, TensorSpec] = base.specs
        self.own_files = frozenset(tensors.auxiliary_files)
        self.revision = tensors.revision
        self.auxiliary_files: Mapping[str, Path] = AuxiliaryFiles(
            {*tensors.auxiliary_files, *base.auxiliary_files},
            lambda name: (tensors if name in tensors.auxiliary_files else base).auxiliary_files[
                name
            ],
        )
        stored = {
            name: TensorSpec(name, tensors.specs[key].shape, tensors.specs[key].dtype)
            for name, key in replaced.items()
        }
        self.specs: Mapping[str, TensorSpec] = by_name({**base.specs, **stored}.values())
        self.tied: Mapping[str, str] = {
            dropped: kept for dropped, kept in base.tied.items() if dropped not in stored
        }
        self.copies: Mapping[str, torch.dtype] = still_tied(base.copies, self.tied)
        self._tensors, self._base = tensors, base
        self._replaced = replaced

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """Return one tensor, fp32 where adapted; see `Checkpoint.read`.

        Raises:
            CheckpointError: No such tensor, or a file changed since it was opened.
        """
        holder, key = self._holder(name)
        stored = holder.read(key)
        return self._adapt(name, stored, 0) if name in self.adapted else stored

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "rows *rest"]:
        """Return rows `start:stop`, fp32 where adapted; see `Checkpoint.read_rows`.

        Raises:
            CheckpointError: No such tensor or rows, or a file changed since it was opened.
        """
        holder, key = self._holder(name)
        check_rows(self.source, self.specs[name], start, stop)
        stored = holder.read_rows(key, start, stop)
        return self._adapt(name, stored, start) if name in self.adapted else stored

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Return fp32 `(left, right)`, scaling and layout included; see `Checkpoint.factors`.

        None for convolutions (their product is a matrix only when flattened), for stacks of
        matrices, and where the adapter also stores a base weight of its own that is not the base's.

        Raises:
            CheckpointError: A file changed since it was opened.
        """
        if name not in self.adapted or len(self.specs[name].shape) != 2:
            return None
        if name in self._replaced:
            own, base = self._tensors.read(self._replaced[name]), self._base.read(name)
            if not torch.equal(own.float(), base.float()):
                return None
        return self._pair(name)

    def same_as_base(self, name: str) -> bool:
        """Whether the adapter does not touch the tensor."""
        return name in self.specs and name not in self.adapted and name not in self._replaced

    @property
    def stored_bytes(self) -> int:
        """Bytes of what it stores itself."""
        return sum(spec.nbytes for spec in self._tensors.specs.values())

    def rank(self, name: str) -> int:
        """Rank of the factors of an adapted weight, or of each matrix of a stack."""
        how = self.adapted[name]
        return self._tensors.specs[how.pair.a].shape[0] // (how.matrices or 1)

    def close(self) -> None:
        """Release the adapter's files; the base is its opener's."""
        self._tensors.close()

    def _holder(self, name: str) -> tuple[Checkpoint, str]:
        if name not in self.specs:
            no_such_tensor(self.source, name, self.specs)
        if name in self._replaced:
            return self._tensors, self._replaced[name]
        return self._base, name

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return fp32 (left, right) of the weight as a matrix (rows, the rest)."""
        how = self.adapted[name]
        a = self._tensors.read(how.pair.a).float().flatten(1)
        b = self._tensors.read(how.pair.b).float().flatten(1) * how.scaling
        return (a.T.contiguous(), b.T.contiguous()) if how.transposed else (b, a)

    def _adapt(self, name: str, stored: Tensor, start: int) -> Tensor:
        """Add the product's rows from `start` on to rows of the stored weight, in fp32."""
        if matrices := self.adapted[name].matrices:
            return self._adapt_stack(name, stored, start, matrices)
        left, right = self._pair(name)
        result = stored.to(torch.float32, copy=True)
        rows, stop = result.flatten(1), start + result.shape[0]
        for block in range(start - start % _BLOCK_ROWS, stop, _BLOCK_ROWS):
            product = left[block : block + _BLOCK_ROWS] @ right
            first, last = max(block, start), min(block + _BLOCK_ROWS, stop)
            rows[first - start : last - start] += product[first - block : last - block]
        return result

    def _adapt_stack(
        self, name: str, stored: Shaped[Tensor, "matrix rows columns"], start: int, matrices: int
    ) -> Float[Tensor, "matrix rows columns"]:
        """Add the products of the matrices from `start` on to matrices of the stored stack."""
        how = self.adapted[name]
        a = self._tensors.read(how.pair.a).float().unflatten(0, (matrices, -1))
        b = self._tensors.read(how.pair.b).float().unflatten(1, (-1, matrices)) * how.scaling
        result = stored.to(torch.float32, copy=True)
        for place, matrix in enumerate(result, start):
            product = b[:, :, place] @ a[place]
            matrix += product.T if how.transposed else product
        return result


def fit_adapter(tensors: Checkpoint, config: AdapterConfig, base: Checkpoint) -> Adapter:
    """Fit an adapter to a base that has its modules, from headers alone.

    Args:
        tensors: The adapter's own stored tensors.
        config: What it says of itself.
        base: The model it was trained on.

    Raises:
        CheckpointError: It does not fit the base; every fault at once.
    """
    faults = Faults()
    empty = [name for name, spec in tensors.specs.items() if not spec.numel]
    if empty:
        faults.add(empty_fault(tensors.source, empty))
        faults.raise_if_any(CheckpointError)
    pairs, full = sort_stored([*tensors.specs, *tensors.tied], tensors.source, faults)
    pairs = [kept_pair(pair, tensors.tied) for pair in pairs]
    full = {name: tensors.tied.get(key, key) for name, key in full.items()}
    if not pairs:
        faults.add(f"{tensors.source} has no LoRA tensors (lora_A, lora_B).")
    where, parts = tensors.source, Parts(base)
    targets = find_targets(config, pairs, [*base.specs, *base.tied], where, faults)
    wanted = [target.name for target in targets]
    tied = tied_names([*wanted, *full], base)
    here = {**base.specs, **tied}
    rename = find_rename(wanted, here, where, faults, published_renames(base))
    replaced: dict[str, str] = {}
    for name, key in full.items():
        kept = tied.get(rename(name), rename(name))
        fault = _replacement_fault(config, tensors, key, name, base.specs.get(kept))
        if fault:
            faults.add(fault)
        replaced[rename(name)] = key
    replaced = without_same(replaced, tied, tensors, base)
    own = {name: tensors.specs[key] for name, key in replaced.items()}
    specs = {**base.specs, **own}
    places: dict[str, tuple[str, ...]] = {}
    for name in full:
        kept = rename(name) if rename(name) in replaced else tied.get(rename(name), rename(name))
        places[kept] = (*places.get(kept, ()), name)
    adapted: dict[str, Adapted] = {}

    def shapes(target: Target) -> tuple[Shape, Shape, Shape | None]:
        spec = specs.get(rename(target.name))
        a, b = tensors.specs[target.pair.a], tensors.specs[target.pair.b]
        return a.shape, b.shape, None if spec is None else spec.shape

    for target in in_order(targets, shapes, parts, where, faults):
        name = rename(target.name)
        kept = name if name in specs else tied.get(name, name)
        if kept in specs:
            places[kept] = (*dict.fromkeys((*places.get(kept, ()), target.name)),)
            how = _fit(config, tensors, target, kept, specs, parts, faults)
            if kept in adapted:
                check_same(tensors, adapted[kept], how, faults)
            adapted[kept] = how
    check_saved(config, tensors, [*map(rename, wanted)], replaced, tied, base, faults)
    check_grown(tensors, specs, base, faults)
    faults.raise_if_any(CheckpointError)
    return Adapter(tensors, base, adapted, replaced, config, places)


def _fit(
    config: AdapterConfig,
    tensors: Checkpoint,
    target: Target,
    name: str,
    specs: Mapping[str, TensorSpec],
    parts: Parts,
    faults: Faults,
) -> Adapted:
    """Find scaling and layout of one adapted weight, noting what does not fit."""
    pair, matrices = target.pair, None
    a, b = tensors.specs[pair.a].shape, tensors.specs[pair.b].shape
    shape = specs[name].shape
    if target.of_parameter:  # its product has the layout of the parameter, in whatever module
        ways = ways_round(a, b, shape)
        transposed = stack_is_crossed(target, config, ways, parts) if any(ways) else None
        matrices = shape[0] if len(shape) == 3 else None
    else:
        ways = None
        transposed = is_transposed(
            name,
            specs,
            a,
            b,
            embedding=pair.embedding,
            fan_in_fan_out=config.fan_in_fan_out,
        )
    if not all(tensors.specs[key].is_floating for key in (pair.a, pair.b)):
        faults.add(
            f"{tensors.source}: the factors of '{pair.module}' are not floating-point numbers. "
            "Save the adapter again, as float32 or bfloat16."
        )
    rank = a[0] // (matrices or 1) if a else 0
    if transposed is None and ways and all(ways):
        faults.add(
            f"{tensors.source}: the matrices of '{name}' are square, {shape}, and which side of "
            "them A is of depends on the version of PEFT, and of the class of the base: its "
            f"{CONFIG_FILE} does not say one since 0.19.1, or transformers does not know the "
            "class. Merge the adapter into its base with PEFT and pass the result."
        )
    elif transposed is None:
        faults.add(
            f"{tensors.source}: A {a} and B {b} of '{pair.module}' do not fit '{name}' of the "
            f"base, {shape}. Pass the model the adapter was trained on."
        )
    elif rank != config.rank(target.key):
        faults.add(
            f"{tensors.source}: '{pair.a}' has rank {rank}, but {CONFIG_FILE} says "
            f"{config.rank(target.key)}, so its scaling is unknown. Save the adapter again."
        )
    return Adapted(pair, config.scaling(target.key), bool(transposed), matrices)


def _replacement_fault(
    config: AdapterConfig, tensors: Checkpoint, key: str, name: str, spec: TensorSpec | None
) -> str | None:
    """Say why a tensor stored in full cannot take a base tensor's place, or None if it can."""
    module = name.rpartition(".")[0]
    if config.saves(module):
        return None  # a head of another size is what modules_to_save is for
    if spec is None:
        return (
            f"{tensors.source}: '{key}' is not a LoRA tensor, not in a module of modules_to_save, "
            f"and not in the base. {NAMES_DIFFER}"
        )
    found = tensors.specs[key].shape
    # An embedding may have grown: other rows, same width.
    if found != spec.shape and not (len(found) == 2 and found[1:] == spec.shape[1:]):
        return (
            f"{tensors.source}: '{key}' has shape {found}, '{spec.name}' of the base {spec.shape}. "
            "Pass the model the adapter was trained on."
        )
    return None


def adapter_of(checkpoint: Checkpoint) -> Adapter | None:
    """The checkpoint if it is an adapter, whatever it is seen through; else None."""
    model = seen_through(checkpoint)
    return model if isinstance(model, Adapter) else None


def seen_through(checkpoint: Checkpoint) -> Checkpoint | None:
    """What a checkpoint is inside, where it is seen through others."""
    model: Checkpoint | None = checkpoint
    while isinstance(model, WithRows | WithModules | WithCopies | WithLayers):
        model = model.model
    return model
