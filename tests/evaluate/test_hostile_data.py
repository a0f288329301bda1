"""Data of anybody: damaged, endless or far larger than it seems, it is refused in a sentence."""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hostile import within_bounds
from personae.errors import CheckpointError, RecipeError
from personae.evaluate.data import DataSettings, read_splits
from personae.evaluate.images import ImageSettings

CLASSES = ["no", "yes"]
ROW = '{"text": "a", "label": 0}\n'
TEXTS: dict[str, tuple[str, bytes, str]] = {
    "nested": ("a.jsonl", b'{"text": ' + b"[" * 100_000, "nested deeper"),
    "long number": (
        "a.jsonl",
        b'{"text": "a", "label": ' + b"9" * 5000 + b"}",
        "Exceeds the limit",
    ),
    "half a character": ("a.jsonl", b'{"text": "\\ud800", "label": 0}', "half a character"),
    "no text": ("a.jsonl", b'{"text": 3, "label": 0}', "3 stands in the place of a text"),
    "a list": ("a.jsonl", b"[1]", "in the place of an example"),
    "no UTF-8": ("a.jsonl", b"\xff\xfe", "cannot be read"),
    "infinite": ("a.jsonl", b'{"text": "a", "label": 1e999}', "labels 'inf' are outside"),
    "open quote": ("a.csv", b'text,label\n"' + b"a" * 200_000, "field larger than"),
    "no gzip": ("a.jsonl.gz", b"PK", "cannot be read"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(ROW.encode() * 99)[:-9], "cannot be read"),
    "odd gzip": ("a.jsonl.gz", gzip.compress(ROW.encode())[:10] + b"\xff" * 9, "cannot be read"),
    "gzip bomb": ("a.jsonl.gz", gzip.compress(b" " * 2**26 + ROW.encode()), "longer than"),
    "parquet": ("a.parquet", b"PAR1" * 9, "cannot be read"),
}


def read(folder: Path, source: str, classes: list[str] | None = CLASSES, **said: Any) -> Any:
    data = DataSettings.model_validate({"source": source, **said})
    return read_splits(data, ["text"], folder, classes)


@pytest.mark.parametrize("case", TEXTS)
def test_a_damaged_text(tmp_path: Path, case: str):
    name, content, said = TEXTS[case]
    (tmp_path / name).write_bytes(content)
    with within_bounds(), pytest.raises(RecipeError, match=said):
        read(tmp_path, name)


def test_a_text_that_is_far_more_than_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(ROW.encode() * 100_000))
    assert len(read(tmp_path, "a.jsonl.gz")["test"]["text"]) == 100_000
    monkeypatch.setattr("personae.evaluate.data._HARMLESS", 2**16)
    with pytest.raises(RecipeError, match=r"a.jsonl.gz, test cannot be read: it would take .* 200"):
        read(tmp_path, "a.jsonl.gz")


@pytest.mark.parametrize("name", ["test.jsonl", "test.csv", "test.parquet"])
def test_a_pipe_in_the_place_of_a_file(tmp_path: Path, name: str):
    os.mkfifo(tmp_path / name)
    with pytest.raises(RecipeError, match="is no regular file"):
        read(tmp_path, ".")


def test_labels_that_are_no_finite_numbers(tmp_path: Path):
    for label in ("1e39", "NaN", "-Infinity", "9" * 400):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "label": {label}}}')
        with pytest.raises(RecipeError, match=r"not finite|too large|whole number"):
            read(tmp_path, "a.jsonl", None)


def test_no_such_user(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such user"):
        read(tmp_path, "~nosuchuser/x")


# Arrays


def member(array: np.ndarray | None, header: str = "", body: bytes = b"") -> bytes:
    """What npz holds: an array, or a header of one's own."""
    file = io.BytesIO()
    if array is not None:
        np.save(file, array)
        return file.getvalue()
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def shaped(shape: str, dtype: str = "|u1") -> bytes:
    return member(None, f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}")


LABELS = member(np.array([0]))
ARRAYS: dict[str, tuple[bytes, bytes, str]] = {
    "more than it holds": (shaped("(10**12,)".replace("10**12", str(10**12))), LABELS, "read"),
    "beyond any memory": (shaped(f"({2**62}, 8)"), LABELS, "cannot be read"),
    "objects": (shaped("(1,)", "|O"), LABELS, "cannot be read"),
    "a pickle": (pickle.dumps([1]), LABELS, "images is one value"),
    "one value": (member(np.array(3)), LABELS, "images is one value, and no list"),
    "lengths": (member(np.zeros((2, 4, 4), np.uint8)), LABELS, "image 2, label 1"),
    "nothing": (b"", LABELS, "images is one value"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_damaged_arrays(tmp_path: Path, case: str):
    images, labels, said = ARRAYS[case]
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("images.npy", images)
        file.writestr("labels.npy", labels)
    with within_bounds(), pytest.raises(RecipeError, match=said):
        read_arrays(tmp_path)


def read_arrays(folder: Path) -> Any:
    said = {"source": "a.npz", "columns": {"image": "images", "label": "labels"}}
    return read_splits(DataSettings.model_validate(said), ["image"], folder, CLASSES)


def test_arrays_that_are_far_more_than_their_file(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("images.npy", "w") as images:
            images.write(shaped(f"({2**29},)"))
            for _ in range(2**9):
                images.write(bytes(2**20))
        file.writestr("labels.npy", LABELS)
    with within_bounds(), pytest.raises(RecipeError, match=r"it would take 536,871,\d+ bytes"):
        read_arrays(tmp_path)


def test_no_zip_file(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_arrays(tmp_path)


# Images


def encoded(width: int, height: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("1" if kind == "PNG" else "RGB", (width, height)).save(file, kind)
    return file.getvalue()


IMAGES: dict[str, tuple[bytes, str]] = {
    "bomb": (encoded(9000, 9000), "9000 x 9000 pixels, and 67,108,864 are read at most"),
    "strip": (encoded(1, 30_000), "is a strip of 1 x 30000 pixels"),
    "cut": (encoded(9, 9)[:-20], "is no image that can be read"),
    "odd": (encoded(9, 9).replace(b"IDAT", b"IDA\xff"), "is no image that can be read"),
    "empty": (b"", "is no image that can be read"),
    "program": (encoded(9, 9, "EPS"), "is no image that can be read"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_a_damaged_image(tmp_path: Path, case: str):
    content, said = IMAGES[case]
    (tmp_path / "a.png").write_bytes(content)
    made = ImageSettings(size=8, fit="crop").over(tmp_path)
    with within_bounds(), pytest.raises(RecipeError, match=said):
        made.as_bytes([tmp_path / "a.png"])


def test_a_pipe_in_the_place_of_an_image(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(RecipeError, match=r"a\.png' is no regular file"):
        ImageSettings(size=8).over(tmp_path).as_bytes([tmp_path / "a.png"])


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 4, 7), (4,), (2, 2, 2, 2)])
def test_arrays_that_are_no_images(shape: tuple[int, ...]):
    with pytest.raises(RecipeError, match=r"(?i)image"):
        ImageSettings(size=8).over(Path()).as_bytes([np.zeros(shape, np.uint8)])


def test_a_processor_of_images_larger_than_any_model_takes(tmp_path: Path):
    said = {"image_processor_type": "ViTImageProcessor", "size": {"height": 10**6, "width": 10**6}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(RecipeError, match="images are made 4096 at most"):
        ImageSettings().over(tmp_path)


@pytest.mark.parametrize("config", ["[]", '{"vision_config": 3}', '{"image_size": 1000000000}'])
def test_a_configuration_that_says_no_size(tmp_path: Path, config: str):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RecipeError, match="does not say how large its images are"):
        ImageSettings().over(tmp_path)
