"""From a declared source to examples: columns of text, images and labels, split by split.

A source is a folder of files (jsonl, csv, parquet), one such file, an npz file, a folder of image
folders, a data set that `datasets` saved, or one of the hub.
"""

import csv
import gzip
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_validator

from personae._small_files import Unfit, open_regular, parse_json
from personae.checkpoints.opening import expanded, is_hub_id
from personae.errors import RecipeError, nearest
from personae.evaluate.tasks import Split
from personae.recipe._base import Strict

Column = Literal["text", "text_pair", "image", "label"]
Values = Sequence[Any] | np.ndarray
Columns = dict[str, Values]
"""A column's values by what it is; all of one length, and `label` always there."""

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_LONGEST_LINE = 2**26
_MOST_TIMES = 200
"""What compression gains of examples is less by far."""
_HARMLESS = 2**28
"""Bytes that may be held of a file of any size."""
_BYTES_A_ROW = 8


class Part(Strict):
    """Where the examples of a split come from, and which of them it takes.

    Splits of one source never overlap: those with a size take theirs in the order in which they are
    listed, and those without one have what is left.
    """

    source: str = Field(alias="from", min_length=1)
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    examples: Annotated[int, Field(gt=0)] | None = None
    seed: int = 0
    stratified: bool = True

    @model_validator(mode="after")
    def _one_size(self) -> "Part":
        if self.share is not None and self.examples is not None:
            raise ValueError("share and examples say the same: give one of them")
        return self


def _named(value: Any) -> Any:
    """A split's name alone is all of it."""
    return {"from": value} if isinstance(value, str) else value


class DataSettings(Strict):
    """What a suite says of a task's data."""

    source: str = Field(min_length=1)
    config: str | None = None
    revision: str | None = None
    splits: dict[Split, Annotated[Part, BeforeValidator(_named)]] = Field(
        default={"test": Part.model_validate({"from": "test"})}
    )
    columns: dict[Column, str] = Field(default={})


def read_splits(
    data: DataSettings, wanted: Sequence[Column], folder: Path, classes: Sequence[str] | None
) -> dict[str, Columns]:
    """The columns of every declared split, with labels as numbers.

    Args:
        data: What is declared.
        wanted: Columns that there must be, beside the label; `text_pair` only if it is declared.
        folder: From which relative paths count.
        classes: Their names, which labels may be; None where labels are numbers to predict.

    Raises:
        RecipeError: if something is missing, empty, or out of range; all that is wrong with one
            source at once.
    """
    read = _reader(data, folder, classes)
    columns = {name: data.columns.get(name, name) for name in (*wanted, "label")}
    sources: dict[str, list[Split]] = {}
    for split, part in data.splits.items():
        sources.setdefault(part.source, []).append(split)
    found: dict[str, Columns] = {}
    for source, splits in sources.items():
        try:
            whole = read(source, columns)
        except RecipeError:
            raise
        except Exception as error:  # zip, gzip, csv, parquet: many kinds, which mean the same here
            said = str(error) or type(error).__name__
            raise RecipeError(f"{_where(data, source)} cannot be read: {said}") from error
        _check_values(whole, _where(data, source))
        labels = _labels(whole["label"], classes, _where(data, source))
        whole["label"] = labels
        chosen = choose({split: data.splits[split] for split in splits}, labels)
        for split, rows in chosen.items():
            if not len(rows):
                raise RecipeError(
                    f"The split '{split}' of {_where(data, source)} is empty: {len(labels)} "
                    "examples are there. Take fewer for the others, or another source."
                )
            found[split] = {name: _rows(values, rows) for name, values in whole.items()}
    return found


def choose(parts: Mapping[Split, Part], labels: np.ndarray) -> dict[Split, np.ndarray]:
    """Which examples of one source each split has: positions, disjoint.

    Args:
        parts: Splits of the source, in the order in which they take.
        labels: Of all its examples.
    """
    left = np.ones(len(labels), bool)
    found: dict[Split, np.ndarray] = {}
    for split, part in sorted(parts.items(), key=lambda one: _is_rest(one[1])):
        if _is_rest(part):
            found[split] = np.flatnonzero(left)
            continue
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(part.seed))
        free = order.numpy()[left[order.numpy()]]
        size = part.examples or max(1, round((part.share or 0) * len(labels)))
        taken = _stratified(free, labels, size) if part.stratified else free[:size]
        left[taken] = False
        found[split] = taken
    return {split: found[split] for split in parts}


def _is_rest(part: Part) -> bool:
    return part.share is None and part.examples is None


def _stratified(free: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """So many of these examples, of each class as large a share; numbers are not classes."""
    if labels.dtype.kind == "f" or size >= len(free):
        return free[:size]
    kinds, counts = np.unique(labels[free], return_counts=True)
    exact = size * counts / counts.sum()
    quotas = np.floor(exact).astype(int)
    missing = size - quotas.sum()
    quotas[np.argsort(-(exact - quotas), kind="stable")[:missing]] += 1  # largest remainders
    most = dict(zip(kinds.tolist(), quotas.tolist(), strict=True))
    kept: list[int] = []
    for row in free.tolist():
        kind = labels[row].item()
        if most[kind] > 0:
            most[kind] -= 1
            kept.append(row)
    return np.array(kept, np.int64)


def _labels(values: Values, classes: Sequence[str] | None, where: str) -> np.ndarray:
    """Labels as class numbers, or as numbers to predict.

    Raises:
        RecipeError: if some are neither.
    """
    if classes is None:
        try:
            numbers = np.array([float(value) for value in values])
        except (TypeError, ValueError, OverflowError) as error:
            raise RecipeError(f"{where}: labels must be numbers here: {error}.") from error
        if not (abs(numbers) <= np.finfo(np.float32).max).all():
            raise RecipeError(f"{where}: a label is not finite, or beyond the range of float32.")
        return numbers.astype(np.float32)
    names = {name: n for n, name in enumerate(classes)}
    found: list[int] = []
    odd: dict[Any, None] = {}
    for value in values:
        number = names.get(value) if isinstance(value, str) else None
        if number is None:
            try:
                number = int(value) if float(value) == int(value) else -1
            except (TypeError, ValueError, OverflowError):
                number = -1
        if not 0 <= number < len(classes):
            odd[value if isinstance(value, str) else str(value)] = None
        found.append(number)
    if odd:
        shown = ", ".join(repr(one) for one in list(odd)[:5])
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise RecipeError(
            f"{where}: labels {shown}{more} are outside the range of the head, which has "
            f"{len(classes)} classes: numbers 0 to {len(classes) - 1}, or their names."
        )
    return np.array(found, np.int64)


def _check_values(columns: Columns, where: str) -> None:
    """Refuse columns of several lengths, and texts that are none.

    Raises:
        RecipeError: naming them.
    """
    for name in ("text", "text_pair"):
        odd = next((one for one in columns.get(name, ()) if not isinstance(one, str)), None)
        if odd is not None:
            raise RecipeError(f"{where}: {odd!r:.40} stands in the place of a text.")
    lengths = {name: len(values) for name, values in columns.items()}
    if len({*lengths.values()}) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise RecipeError(f"{where}: columns are of several lengths: {told}.")


def _rows(values: Values, rows: np.ndarray) -> Values:
    return values[rows] if isinstance(values, np.ndarray) else [values[n] for n in rows.tolist()]


Read = Callable[[str, Mapping[str, str]], Columns]
"""From the name of a source's part, and of the columns wanted, to these."""


def _reader(data: DataSettings, folder: Path, classes: Sequence[str] | None) -> Read:
    """How this source is read, by what there is.

    Raises:
        RecipeError: if there is no such source.
        CheckpointError: if there is no such user.
    """
    path = folder / expanded(data.source)
    if path.suffix == ".npz" and path.is_file():
        return _Npz(path)
    if path.is_file():
        return lambda _, columns: _read_file(path, columns)
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return _Saved(path)
        return _Folder(path, classes)
    if is_hub_id(data.source, folder):
        return _Hub(data)
    raise RecipeError(
        f"There is no data at '{path}'. Give a folder, a file, or a data set of the hub (org/name)."
    )


@dataclass(frozen=True)
class _Npz:
    """Arrays of a file; {split} in a column's name stands for the split's."""

    path: Path

    def __call__(self, source: str, columns: Mapping[str, str]) -> Columns:
        with (
            open_regular(self.path) as file,
            zipfile.ZipFile(file) as zipped,
            np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays,
        ):
            named = {kind: name.replace("{split}", source) for kind, name in columns.items()}
            _check_columns(str(self.path), named, arrays.files)
            sizes = {one.filename.removesuffix(".npy"): one.file_size for one in zipped.infolist()}
            _check_expansion(file, sum(sizes[name] for name in named.values()))
            found: Columns = {kind: arrays[name] for kind, name in named.items()}
        single = [named[kind] for kind, values in found.items() if not np.ndim(values)]
        if single:
            raise RecipeError(f"{self.path}: {', '.join(single)} is one value, and no list.")
        return found


@dataclass(frozen=True)
class _Folder:
    """Files of a folder, or folders of images in it: SPLIT/CLASS/FILE."""

    path: Path
    classes: Sequence[str] | None

    def __call__(self, source: str, columns: Mapping[str, str]) -> Columns:
        inner = self.path / source
        if inner.is_dir() and "image" in columns:
            return self._images(inner)
        if not inner.is_file():
            same = [one for one in self.path.iterdir() if one.name.split(".")[0] == source]
            if len(same) != 1:
                there = [one.name for one in self.path.iterdir()]
                raise RecipeError(
                    f"There is no '{source}' in {self.path}. {nearest(source, there)}"
                )
            inner = same[0]
        return _read_file(inner, columns)

    def _images(self, folder: Path) -> Columns:
        names = sorted(one.name for one in folder.iterdir() if one.is_dir())
        files = [
            (file, name)
            for name in names
            for file in sorted((folder / name).iterdir())
            if file.suffix.lower() in IMAGES
        ]
        return {"image": [file for file, _ in files], "label": [name for _, name in files]}


def _read_file(path: Path, columns: Mapping[str, str]) -> Columns:
    """Columns of a file whose kind its name tells.

    Raises:
        RecipeError: if it tells none, or columns are missing.
    """
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        return _read_parquet(path, columns)
    if suffix not in (".jsonl", ".json", ".csv", ".tsv"):
        raise RecipeError(
            f"{path} is of no known kind. Give .jsonl, .csv, .tsv (also .gz), .parquet or .npz."
        )
    lines = _lines(path)
    if suffix in (".csv", ".tsv"):
        rows: Iterable[Any] = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
    else:
        rows = (parse_json(line) for line in lines if line.strip())
    return _columns_of(str(path), rows, columns)


def _read_parquet(path: Path, columns: Mapping[str, str]) -> Columns:
    import pyarrow.parquet as parquet

    with open_regular(path) as file:
        opened = parquet.ParquetFile(file)
        _check_columns(str(path), columns, opened.schema_arrow.names)
        _check_expansion(file, _BYTES_A_ROW * opened.metadata.num_rows)
        table = opened.read(columns=[*columns.values()])
        return {kind: table[name].to_pylist() for kind, name in columns.items()}


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text, which may be compressed.

    Raises:
        Unfit: if one is too long, or all are far more than the file.
    """
    with open_regular(path) as file:
        content: Any = gzip.open(file) if path.suffix == ".gz" else file
        with io.TextIOWrapper(content, encoding="utf-8", newline="") as lines:
            size = 0
            while line := lines.readline(_LONGEST_LINE + 1):
                size += len(line)
                if len(line) > _LONGEST_LINE:
                    raise Unfit(f"a line is longer than {_LONGEST_LINE:,} characters")
                _check_expansion(file, size)
                yield line


def _check_expansion(file: BufferedReader, nbytes: int) -> None:
    """Refuse what takes far more memory than its file says.

    Raises:
        Unfit: if it does.
    """
    if nbytes > max(_MOST_TIMES * os.fstat(file.fileno()).st_size, _HARMLESS):
        raise Unfit(f"it would take {nbytes:,} bytes or more, {_MOST_TIMES} times its file's")


def _columns_of(where: str, rows: Iterable[Any], columns: Mapping[str, str]) -> Columns:
    found: dict[str, list[Any]] = {kind: [] for kind in columns}
    for row in rows:
        if not isinstance(row, dict):
            raise RecipeError(f"{where} holds {row!r:.40} in the place of an example.")
        if any(row.get(name) is None for name in columns.values()):
            _check_columns(where, columns, [n for n, value in row.items() if value is not None])
        for kind, name in columns.items():
            found[kind].append(row[name])
    return {**found}


@dataclass(frozen=True)
class _Saved:
    """A data set that `datasets` saved."""

    path: Path

    def __call__(self, source: str, columns: Mapping[str, str]) -> Columns:
        loaded: Any = _datasets().load_from_disk(str(self.path))
        if isinstance(loaded, dict):
            if source not in loaded:
                raise RecipeError(f"{self.path} has no split '{source}'. {nearest(source, loaded)}")
            loaded = loaded[source]
        return _of_dataset(str(self.path), loaded, columns)


@dataclass(frozen=True)
class _Hub:
    """A data set of the hub, or of its cache."""

    data: DataSettings

    def __call__(self, source: str, columns: Mapping[str, str]) -> Columns:
        data, datasets = self.data, _datasets()
        named = f"{data.source}{f' ({data.config})' if data.config else ''}"
        try:
            loaded = datasets.load_dataset(
                data.source, data.config, split=source, revision=data.revision
            )
        except Exception as error:
            raise RecipeError(
                f"The data set {named}, split '{source}', cannot be had: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__} Fetch it "
                f"where there is a network (datasets.load_dataset('{data.source}'"
                f"{f', {data.config!r}' if data.config else ''})), or give a folder that "
                "save_to_disk wrote."
            ) from error
        return _of_dataset(named, loaded, columns)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            "Data sets of the hub need the datasets library: pip install 'personae[eval]'."
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _of_dataset(where: str, loaded: Any, columns: Mapping[str, str]) -> Columns:
    _check_columns(where, columns, loaded.column_names)
    return {kind: list(loaded[name]) for kind, name in columns.items()}


def _check_columns(where: str, columns: Mapping[str, str], there: Iterable[str]) -> None:
    """Refuse a source without these columns, with all that are missing.

    Raises:
        RecipeError: naming them.
    """
    there = list(there)
    missing = {kind: name for kind, name in columns.items() if name not in there}
    if missing:
        told = " ".join(
            f"There is no column '{name}' for the {kind}. {nearest(name, there)}"
            for kind, name in missing.items()
        )
        raise RecipeError(
            f"{where}: {told} Map it under columns, as in {{{next(iter(missing))}: …}}."
        )


def _where(data: DataSettings, source: str) -> str:
    return data.source if data.source.endswith(source) else f"{data.source}, {source}"
