"""What is known already: answers and costs, under what they were made from.

A key is a digest of the weights that went in, of the settings, of the examples, of this package's
own code and of the libraries that compute. So a run that was interrupted goes on where it stopped,
suites that have rows in common share them, and whatever changes is computed anew.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

import personae
from personae._small_files import Unfit, read_json
from personae.evaluate.learning import LearnSettings
from personae.evaluate.metrics import Answers
from personae.evaluate.tasks import Task
from personae.packs.fingerprint import tensor_digest
from personae.writers import atomic_file

_CHUNK = 1 << 24
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def default_cache() -> Path:
    """Where what is known is kept, unless another place is named."""
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "personae" / "eval"


def digest(*parts: Any) -> str:
    """A short name for plain values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


@once
def code_version() -> str:
    """A digest of this package's sources, and the versions of what computes."""
    import transformers

    state = xxhash.xxh3_128()
    for path in sorted(Path(personae.__file__).parent.rglob("*.py")):
        state.update(path.read_bytes())
    return digest(state.hexdigest(), torch.__version__, transformers.__version__, np.__version__)


class Cache:
    """A folder of rows, each with its costs and its answers to every task."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, which need not exist."""
        self.folder = folder
        self._hashes: dict[str, str] | None = None

    def row(self, *parts: Any) -> "CachedRow":
        """The row of a method, by all that it is made from."""
        return CachedRow(self.folder / "rows" / digest(code_version(), *parts))

    def of_model(self, model: Path) -> str:
        """A digest of a checkpoint: weights, and configuration.

        Weights that were hashed before are known by path, size and time of change.
        """
        found: dict[str, str] = {}
        files = [model] if model.is_file() else sorted(model.iterdir())
        for file in files:
            if file.suffix in _WEIGHTS or file.name in ("config.json", "adapter_config.json"):
                found[file.name] = self._hash(file)
        return digest(found)

    def _hash(self, file: Path) -> str:
        known, path = self._known(), file.resolve()
        stat = path.stat()
        key = f"{path} {stat.st_size} {stat.st_mtime_ns}"
        if key not in known:
            state = xxhash.xxh3_128()
            with path.open("rb") as opened:
                while chunk := opened.read(_CHUNK):
                    state.update(chunk)
            known[key] = state.hexdigest()
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._hashes_file) as partial:
                partial.write_text(json.dumps(known), "utf-8")
        return known[key]

    @property
    def _hashes_file(self) -> Path:
        return self.folder / "hashes.json"

    def _known(self) -> dict[str, str]:
        if self._hashes is None:
            self._hashes = _content(self._hashes_file)
        return self._hashes


class CachedRow:
    """One row: `made.json`, a file of answers a task, and, while it is under way, its model."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, which need not exist."""
        self.folder = folder
        self.model = folder / "model"

    @property
    def costs(self) -> dict[str, Any]:
        """What making it took and what it stores; empty if it was not made yet."""
        return _content(self.folder / "made.json")

    @costs.setter
    def costs(self, costs: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / "made.json") as partial:
            partial.write_text(json.dumps(costs), "utf-8")

    def answers(self, task: str) -> Answers | None:
        """Its answers to a task, by the task's digest; None if there are none yet."""
        try:
            return np.load(self.folder / f"{task}.npy", allow_pickle=False)
        except (OSError, ValueError):
            return None

    def keep(self, task: str, answers: Answers) -> None:
        """Keep its answers to a task."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            atomic_file(self.folder / f"{task}.npy") as partial,
            partial.open("wb") as file,
        ):
            np.save(file, answers, allow_pickle=False)


def of_task(task: Task) -> str:
    """A digest of what a model is asked, under which head; the metric changes no answer."""
    examples = {name: tensor_digest(values) for name, values in task.test.items()}
    pixels = task.pixels and str(task.pixels)
    return digest(task.name, task.model_class, examples, pixels, _head(task))


def of_data(settings: LearnSettings, tasks: Sequence[Task]) -> str:
    """A digest of the examples that a learned method sees, and of the models that it runs."""
    seen = {task.name: _digests(settings.examples_of(task)) for task in tasks}
    return digest(seen, [(task.model_class, str(task.pixels), _head(task)) for task in tasks])


def _head(task: Task) -> Any:
    """A digest of the head of a model that has none."""
    return task.zero_shot and [
        tensor_digest(task.zero_shot.embeddings),
        task.zero_shot.scale,
        _digests(task.zero_shot.projection.state_dict()),
    ]


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in tensors.items()}


def _content(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty if there is none, or none that can be read."""
    try:
        content = read_json(path)
    except (OSError, Unfit):
        return {}
    return content if isinstance(content, dict) else {}
