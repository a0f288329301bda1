"""An adapter whose modules its base stores in another layout: fused, stacked, or taken apart.

It is fitted to its base as that is laid out where the modules exist, and seen as the base is
stored: what a rule of transformers makes of adapted weights is made of their sums.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Float, Shaped
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.adapter import Adapter, fit_adapter
from personae.checkpoints.adapter_files import AdapterConfig, read_adapter_config
from personae.checkpoints.adapter_fit import NAMES_DIFFER
from personae.checkpoints.class_layouts import Layout, other_layouts
from personae.checkpoints.laid_out import Kept, LaidOut, Made
from personae.checkpoints.published_layouts import Renamed
from personae.checkpoints.specs import by_name, check_rows, no_such_tensor
from personae.checkpoints.tied import still_tied
from personae.errors import CheckpointError

_FP32_BYTES = 4


class AdapterLaidOut(Adapter):
    """An `Adapter` of a base in another layout, as the base is stored.

    Attributes:
        note: What a person should be told of it.
        kept_bytes: Memory that each thread holds beside what it reads, at most.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint, layout: Layout, view: LaidOut) -> None:
        """See an adapter of `view`, which is `base` in `layout`.

        Raises:
            CheckpointError: It stores whole, in another shape, what the base stores fused.
        """
        self._adapter, self._base, self._kept = adapter, base, Kept()
        self.source, self.revision, self.config = adapter.source, adapter.revision, adapter.config
        self.trained_on, self.model_class = adapter.trained_on, adapter.model_class
        self.factors_dtype, self.own_files = adapter.factors_dtype, adapter.own_files
        self.auxiliary_files = adapter.auxiliary_files
        self._made = {s.name: how for s, how in layout.back.items() if not isinstance(how, Renamed)}
        for how in self._made.values():
            odd = [n for n in how.used if adapter.specs[n].shape != view.specs[n].shape]
            if odd:
                raise CheckpointError(
                    f"{self.source} stores '{odd[0]}' whole, of shape {adapter.specs[odd[0]].shape}"
                    f", where the base has {view.specs[odd[0]].shape}. Pass the model it was "
                    "trained on."
                )
        # Names there of all that is stored as one tensor in both layouts.
        self._there = {
            name: layout.names.get(name, name) for name in base.specs if name not in self._made
        }
        own = {n: n for n in adapter.specs if n not in view.specs}  # heads that the base lacks
        self._there |= own
        stored = {there: name for name, there in self._there.items()}
        self.adapted = {stored[n]: how for n, how in adapter.adapted.items() if n in stored}
        self.whole = frozenset(stored[n] for n in adapter.whole if n in stored)
        self.places = {stored[n]: places for n, places in adapter.places.items() if n in stored}
        self.base_specs = base.specs
        found = [adapter.specs[there] for there in self._there.values()]
        self.specs: Mapping[str, TensorSpec] = by_name(
            [
                *(base.specs[name] for name in self._made),
                *(TensorSpec(stored[spec.name], spec.shape, spec.dtype) for spec in found),
            ]
        )
        self.tied = {dropped: kept for dropped, kept in base.tied.items() if dropped not in own}
        self.copies = still_tied(base.copies, self.tied)
        changed = [name for name in self._made if not self.same_as_base(name)]
        self.note = (
            f"adapts modules that the base stores otherwise; they are read as it stores them, "
            f"such as '{min(changed, default='')}'"
        )
        self.kept_bytes = view.kept_bytes + max(
            (_in_fp32(self._made[name], base.specs[name]) for name in changed), default=0
        )

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """Return one tensor, fp32 where adapted; see `Checkpoint.read`."""
        if name in self._made:
            return self.read_rows(name, 0, self.specs[name].shape[0])
        return self._adapter.read(self._name(name))

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "rows *rest"]:
        """Return rows `start:stop`, fp32 where adapted; see `Checkpoint.read_rows`."""
        how = self._made.get(name)
        if how is None:
            return self._adapter.read_rows(self._name(name), start, stop)
        check_rows(self.source, self.specs[name], start, stop)
        if self.same_as_base(name):
            return self._base.read_rows(name, start, stop)
        return how.read_rows(_InFp32(self._adapter), self._kept, start, stop)

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Those of the adapter, where a tensor is one in both layouts; see `Checkpoint.factors`."""
        return None if name in self._made else self._adapter.factors(self._there.get(name, name))

    def same_as_base(self, name: str) -> bool:
        """Whether the adapter touches nothing of the tensor."""
        how = self._made.get(name)
        if how is None:
            return self._adapter.same_as_base(self._there.get(name, name))
        return all(map(self._adapter.same_as_base, how.used))

    @property
    def stored_bytes(self) -> int:
        """Bytes of what the adapter stores itself."""
        return self._adapter.stored_bytes

    def rank(self, name: str) -> int:
        """Rank of the factors of a weight that is one tensor in both layouts."""
        return self._adapter.rank(self._there[name])

    def close(self) -> None:
        """Release the adapter's files; the base is its opener's."""
        self._adapter.close()

    def _name(self, name: str) -> str:
        if name not in self._there:
            no_such_tensor(self.source, name, self.specs)
        return self._there[name]


def open_adapter(tensors: Checkpoint, config_file: Path, base: Checkpoint) -> Adapter:
    """Fit an adapter to its base, from headers alone, in whatever layout the base has its modules.

    Args:
        tensors: The adapter's own stored tensors.
        config_file: Its `adapter_config.json`.
        base: The model it was trained on.

    Raises:
        CheckpointError: It is not plain LoRA, or does not fit the base; every fault at once.
    """
    config = read_adapter_config(config_file)
    try:
        return fit_adapter(tensors, config, base)
    except CheckpointError as error:
        told = error
    for layouts in other_layouts(base):
        try:
            return _fit_in(tensors, config, base, layouts)
        except CheckpointError as error:
            if NAMES_DIFFER in str(told) and NAMES_DIFFER not in str(error):
                told = error  # here its names fit: this is what is wrong with it
    raise told


def _fit_in(
    tensors: Checkpoint, config: AdapterConfig, base: Checkpoint, layouts: Sequence[Layout]
) -> Adapter:
    """The adapter by its names in a layout, as the base is stored.

    Raises:
        CheckpointError: It does not fit that.
    """
    models, views = [base], list[LaidOut]()
    for layout in layouts:
        views.append(layout.of(models[-1]))
        models.append(views[-1])
    adapter = fit_adapter(tensors, config, models[-1])
    for model, layout, view in zip(models[-2::-1], layouts[::-1], views[::-1], strict=True):
        adapter = AdapterLaidOut(adapter, model, layout, view)
    return adapter


def _in_fp32(how: Made, spec: TensorSpec) -> int:
    """What is kept of it, where sums are fp32."""
    return how.kept_bytes * max(1, _FP32_BYTES // spec.dtype.itemsize)


class _InFp32:
    """A model all of whose values are fp32, so that rules may put any of them together."""

    def __init__(self, model: Checkpoint) -> None:
        self._model = model
        self.source, self.revision, self.specs = model.source, model.revision, model.specs
        self.tied, self.copies = model.tied, model.copies
        self.auxiliary_files = model.auxiliary_files

    def read(self, name: str) -> Tensor:
        return self._model.read(name).float()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._model.read_rows(name, start, stop).float()

    def factors(self, name: str) -> None:
        del name

    def same_as_base(self, name: str) -> bool:
        return self._model.same_as_base(name)

    def close(self) -> None:
        self._model.close()
