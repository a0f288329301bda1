"""A full model read in the layout of another one: some tensors are made of those it stores."""

import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.specs import by_name, check_rows, no_such_tensor
from personae.checkpoints.tied import still_tied


@runtime_checkable
class Made(Protocol):
    """How one tensor is made of others."""

    @property
    def used(self) -> Collection[str]:
        """Names of the stored tensors that it takes the place of."""
        ...

    @property
    def kept_bytes(self) -> int:
        """Memory of what a thread keeps of it between reads, and of making that, at most."""
        ...

    def read_rows(self, model: Checkpoint, keep: "Kept", start: int, stop: int) -> Tensor:
        """Rows `start:stop` of it, from what `model` stores."""
        ...


class Kept:
    """What this thread made last, as rows are asked for a few at a time."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._last = threading.local()

    def __call__(self, key: object, make: Callable[[], Any]) -> Any:
        """What goes by this key, made anew only where the last one was another."""
        if getattr(self._last, "key", None) != key:
            self._last.key = self._last.value = None
            self._last.value = make()
            self._last.key = key
        return self._last.value


class LaidOut:
    """A `Checkpoint` some of whose tensors are made of stored ones; all else is as stored.

    Attributes:
        note: What a person should be told of it.
        kept_bytes: Memory that each thread holds beside what it reads, at most.
    """

    def __init__(
        self,
        model: Checkpoint,
        made: Mapping[TensorSpec, Made],
        note: str,
        tied: Mapping[str, str] | None = None,
    ) -> None:
        """Take the place of the tensors that others are made of.

        Args:
            model: What stores them.
            made: The tensors that are made, and how.
            note: What a person should be told of it.
            tied: Dropped name to kept name, where they are not the model's own.
        """
        self._model, self._kept = model, Kept()
        self._made = {spec.name: how for spec, how in made.items()}
        self.note = note
        self.kept_bytes = max((how.kept_bytes for how in made.values()), default=0)
        used = {name for how in made.values() for name in how.used}
        kept = [spec for name, spec in model.specs.items() if name not in used]
        self.source, self.revision = model.source, model.revision
        self.specs: Mapping[str, TensorSpec] = by_name([*kept, *made])
        left = {dropped: kept for dropped, kept in model.tied.items() if kept not in used}
        self.tied: Mapping[str, str] = left if tied is None else tied
        self.copies: Mapping[str, torch.dtype] = still_tied(model.copies, self.tied)
        self.auxiliary_files: Mapping[str, Path] = model.auxiliary_files

    def read(self, name: str) -> Tensor:
        """Return one tensor; see `Checkpoint.read`."""
        if name in self._made:
            return self.read_rows(name, 0, self.specs[name].shape[0])
        return self._model.read(self._stored(name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start:stop`; see `Checkpoint.read_rows`."""
        how = self._made.get(name)
        if how is None:
            return self._model.read_rows(self._stored(name), start, stop)
        check_rows(self.source, self.specs[name], start, stop)
        return how.read_rows(self._model, self._kept, start, stop)

    def factors(self, name: str) -> None:
        """None: it is no adapter."""
        del name

    def same_as_base(self, name: str) -> bool:
        """False: it is no adapter."""
        del name
        return False

    def close(self) -> None:
        """Release the model's files."""
        self._model.close()

    def _stored(self, name: str) -> str:
        return name if name in self.specs else no_such_tensor(self.source, name, self.specs)
