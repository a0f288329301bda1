"""A folder of checkpoint files, on this machine or on the hub, as far as opening needs it."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personae._small_files import Unfit, check_readable, read_json
from personae.checkpoints.headers import Header, read_header
from personae.errors import CheckpointError, Faults

_AUXILIARY_ENDINGS = (
    *(".json", ".txt", ".model", ".py", ".jinja", ".tiktoken", ".bpe", ".vocab", ".spm", ".codes"),
)
_NOT_AUXILIARY = {
    "adapter_config.json",
    "all_results.json",
    "eval_results.json",
    "personae.json",
    "requirements.txt",
    "train_results.json",
    "trainer_state.json",
    "training_args.json",
}
_log = logging.getLogger(__name__)
_LONGEST_NAME = 200
_TEMPLATES = "additional_chat_templates"

# Unsubscripted at run time: checkers of a subscripted type look an item up, which may download it.
if TYPE_CHECKING:
    _PathByName = Mapping[str, Path]
else:
    _PathByName = Mapping


@dataclass(frozen=True)
class Folder:
    """Files by name, and how to get at them.

    Attributes:
        source: What the user wrote.
        names: The files in it, subfolders included, as relative POSIX paths.
        locate: File name to its path on this machine, which may download it.
        header: Safetensors file name to its header and faults, without its tensors.
        revision: The hub commit; None for a local folder.
        is_local: Whether its files are here, so that looking at one downloads nothing.
    """

    source: str
    names: frozenset[str]
    locate: Callable[[str], Path]
    header: Callable[[str], tuple[Header, list[str]]]
    revision: str | None = None
    is_local: bool = True

    @property
    def auxiliary_files(self) -> "AuxiliaryFiles":
        """The small files beside the weights."""
        return AuxiliaryFiles(filter(is_auxiliary_file, self.names), self.locate)

    def inside(self, name: str) -> "Folder":
        """The folder of that name in this one; without files if it is not there."""
        prefix = f"{name}/"
        return Folder(
            self.where(name),
            frozenset(n.removeprefix(prefix) for n in self.names if n.startswith(prefix)),
            lambda file: self.locate(prefix + file),
            lambda file: self.header(prefix + file),
            self.revision,
            self.is_local,
        )

    def check_auxiliary_files(self, faults: Faults) -> None:
        """Add a fault for each small file here that cannot be read: work may end with its copy."""
        for name, path in self.auxiliary_files.items() if self.is_local else ():
            try:
                check_readable(path)
            except Unfit as error:
                faults.add(f"{self.where(name)} {error}. Copy or download it again.")
            except OSError as error:
                faults.add(
                    f"{self.where(name)} cannot be read: {error.strerror}. Check its permissions, "
                    "or copy it again."
                )

    def where(self, file: str) -> str:
        """Name a file for a text."""
        return f"{self.source}/{file}"

    def has(self, file: str, index: str, faults: Faults) -> bool:
        """Whether a file the index names is there; if not, note it."""
        if file not in self.names:
            faults.add(f"{self.where(index)} names {file}, which is not there. Fetch it too.")
        return file in self.names


class AuxiliaryFiles(_PathByName):
    """Relative file name to path; looking one up may download it."""

    def __init__(self, names: Iterable[str], locate: Callable[[str], Path]) -> None:
        """List the names, locate none."""
        self._names = {name: name for name in sorted(names)}
        self._locate = locate

    def __getitem__(self, name: str) -> Path:
        """Return the path of one file."""
        return self._locate(self._names[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, sorted."""
        return iter(self._names)

    def __len__(self) -> int:
        """Count the files."""
        return len(self._names)


def is_auxiliary_file(name: str) -> bool:
    """Whether a file belongs beside the weights: configuration, tokenizer, processor, code.

    Indexes, what training leaves behind and the README (each output gets its own) do not.
    """
    folder, _, file = name.rpartition("/")
    return (
        folder in ("", _TEMPLATES)
        and file.endswith(_AUXILIARY_ENDINGS)
        and not file.endswith(".index.json")
        and file not in _NOT_AUXILIARY
        and name.isprintable()
        and len(name.encode()) <= _LONGEST_NAME
    )


def local_folder(directory: Path, source: str, revision: str | None = None) -> Folder:
    """Describe a directory; files down to one subfolder count.

    So does what is in the place of a small file, be it a broken link: it is not passed over.

    Raises:
        OSError: It may not be read.
    """
    found = [*directory.iterdir(), *directory.glob("*/*")]  # glob takes a refusal for emptiness
    return Folder(
        source,
        frozenset(
            path.relative_to(directory).as_posix()
            for path in found
            if path.is_file() or is_auxiliary_file(path.name)
        ),
        lambda file: directory / file,
        lambda file: read_header(directory / file),
        revision,
    )


def lone_file(path: Path, source: str) -> Folder:
    """Describe a folder of one file, whatever else lies beside it."""
    return Folder(source, frozenset({path.name}), lambda _: path, lambda _: read_header(path))


def read_weight_map(folder: Folder, index: str) -> dict[str, str]:
    """Return tensor name to file name from a shard index.

    Raises:
        CheckpointError: It is not JSON with a `weight_map`, or names files outside the folder.
    """
    try:
        content: Any = read_json(folder.locate(index))
        weight_map = {str(name): str(file) for name, file in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f": it {error}" if isinstance(error, Unfit) else ""
        raise CheckpointError(
            f"{folder.where(index)} is not a shard index (JSON with a 'weight_map'){reason}. "
            "Copy or download it again."
        ) from error
    outside = sorted({f for f in weight_map.values() if Path(f).is_absolute() or ".." in f})
    if outside:
        raise CheckpointError(
            f"{folder.where(index)} names files outside its folder: {', '.join(outside)}."
        )
    return weight_map


def warn_of_absent(index: str, shard: str, names: Collection[str]) -> None:
    """Say which tensors an index places in a shard that lacks them, as loaders pass over them."""
    if names:
        listed = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
        _log.warning(
            "%s lists tensors that are not in %s; they are ignored: %s", index, shard, listed
        )
