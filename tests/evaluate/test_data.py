"""Sources: every kind gives the same examples; splits are disjoint and keep the classes' shares."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personae.errors import RecipeError
from personae.evaluate.data import Column, DataSettings, Part, choose, read_splits
from personae.evaluate.images import ImageSettings
from personae.evaluate.tasks import Pixels

CLASSES = ["no", "yes"]
ROWS = [{"sentence": f"text {n}", "other": f"pair {n}", "label": n % 2} for n in range(6)]
COLUMNS = {"text": "sentence", "text_pair": "other"}


def write(folder: Path, kind: str) -> str:
    """The rows in a folder; returns what the split is called there."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "jsonl":
        (folder / "test.jsonl").write_text(lines)
    elif kind == "jsonl.gz":
        with gzip.open(folder / "test.jsonl.gz", "wt") as file:
            file.write(lines)
    elif kind == "csv":
        with (folder / "test.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["sentence", "other", "label"])
            writer.writeheader()
            writer.writerows(row | {"label": CLASSES[row["label"]]} for row in ROWS)
    else:
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_list(ROWS)
        if kind == "parquet":
            made.to_parquet(str(folder / "test.parquet"))
        else:
            datasets.DatasetDict({"test": made}).save_to_disk(str(folder))
    return "test"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet", "saved"])
def test_every_kind_of_source_gives_the_same(tmp_path: Path, kind: str):
    split = write(tmp_path, kind)
    data = DataSettings.model_validate(
        {"source": ".", "columns": COLUMNS, "splits": {"test": split}}
    )
    found = read_splits(data, ["text", "text_pair"], tmp_path, CLASSES)["test"]
    assert list(found["text"]) == [row["sentence"] for row in ROWS]
    assert list(found["text_pair"]) == [row["other"] for row in ROWS]
    assert list(found["label"]) == [0, 1, 0, 1, 0, 1]


def test_arrays_are_named_after_the_split(tmp_path: Path):
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    np.savez(tmp_path / "d.npz", test_images=images, test_labels=np.array([1, 0]))
    columns: dict[Column, str] = {"image": "{split}_images", "label": "{split}_labels"}
    data = DataSettings(source="d.npz", columns=columns)
    found = read_splits(data, ["image"], tmp_path, CLASSES)["test"]
    assert np.array_equal(np.asarray(found["image"]), images)
    assert list(found["label"]) == [1, 0]
    with pytest.raises(RecipeError, match=r"no column 'test_x' for the image"):
        columns["image"] = "{split}_x"
        wrong = DataSettings(source="d.npz", columns=columns)
        read_splits(wrong, ["image"], tmp_path, CLASSES)


def test_folders_of_images_are_labelled_by_their_names(tmp_path: Path):
    from PIL import Image

    for name, grey in (("yes", 9), ("no", 7)):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("L", (3, 3), grey).save(tmp_path / "test" / name / "0.png")
    found = read_splits(DataSettings(source="."), ["image"], tmp_path, CLASSES)["test"]
    assert list(found["label"]) == [0, 1]
    as_read = padded(3, *found["image"])
    assert as_read[0].unique().tolist() == [7] and as_read[1].unique().tolist() == [9]


def test_numbers_are_labels_where_no_classes_are(tmp_path: Path):
    (tmp_path / "t.csv").write_text("text,label\na,1.5\nb,-2\n")
    found = read_splits(DataSettings(source="t.csv"), ["text"], tmp_path, None)["test"]
    assert list(found["label"]) == [1.5, -2.0]
    (tmp_path / "t.csv").write_text("text,label\na,high\n")
    with pytest.raises(RecipeError, match=r"labels must be numbers here.*high"):
        read_splits(DataSettings(source="t.csv"), ["text"], tmp_path, None)


def part(**said) -> Part:
    return Part.model_validate({"from": "all", **said})


def test_splits_of_one_source_are_disjoint_and_keep_the_shares_of_classes():
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    parts = {"train": part(), "validation": part(share=0.2), "test": part(examples=10, seed=1)}
    found = choose(parts, labels)  # type: ignore[arg-type]
    assert list(found) == ["train", "validation", "test"]
    assert np.bincount(labels[found["validation"]]).tolist() == [12, 6, 2]
    assert np.bincount(labels[found["test"]]).tolist() == [6, 3, 1]
    assert sorted(np.concatenate([*found.values()]).tolist()) == list(range(100))
    again = choose(parts, labels)  # type: ignore[arg-type]
    assert all(np.array_equal(found[split], again[split]) for split in found)
    other = choose(parts | {"validation": part(share=0.2, seed=7)}, labels)  # type: ignore[arg-type]
    assert not np.array_equal(found["validation"], other["validation"])


def test_an_unstratified_part_is_the_first_of_the_order():
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3)).tolist()
    parts = {"train": part(examples=20, seed=3, stratified=False)}
    parts["test"] = part(examples=5, seed=3, stratified=False)
    found = choose(parts, np.arange(50) % 2)  # type: ignore[arg-type]
    assert found["train"].tolist() == order[:20] and found["test"].tolist() == order[20:25]


def padded(size: int, *images: Any) -> torch.Tensor:
    return ImageSettings(size=size, fit="pad").over(Path("nowhere")).as_bytes(images)


PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {"size": {"shortest_edge": 9}, "crop_size": {"height": 8, "width": 8}},
    "ViTImageProcessor": {"size": {"height": 8, "width": 8}, "resample": 2},  # not bicubic
    "SiglipImageProcessor": {"size": {"height": 8, "width": 8}, "do_normalize": False},
    "BitImageProcessor": {"size": {"shortest_edge": 8}, "rescale_factor": 0.5, "crop_size": 8},
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_images_are_what_the_model_s_own_processor_makes(tmp_path: Path, kind: str):
    transformers = pytest.importorskip("transformers")
    said = {"image_processor_type": kind, "image_mean": [0.48, 0.45, 0.4], **PROCESSORS[kind]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    ours = ImageSettings().over(tmp_path)
    generator = np.random.default_rng(0)
    for height, width in ((8, 8), (20, 13), (11, 30)):
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = processor(image, return_tensors="pt")["pixel_values"]
        found = ours.pixels(ours.as_bytes([image]))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_a_crop_is_clip_s():
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    )
    ours = ImageSettings(size=8, fit="crop").over(Path("nowhere"))
    generator = np.random.default_rng(0)
    for height, width in ((20, 13), (11, 30)):
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        made = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        assert torch.equal(ours.as_bytes([image]), made["pixel_values"])


def test_what_a_model_s_files_say_of_images(tmp_path: Path):
    image = np.full((3, 5), 200, np.uint8)
    (tmp_path / "config.json").write_text('{"image_size": 12}')
    found = ImageSettings(mean=0.1).over(tmp_path)
    assert found.as_bytes([image]).shape == (1, 3, 12, 12)
    assert found.pixels == Pixels((0.1,), (0.5,))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match="does not say how large its images are"):
        ImageSettings().over(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Gone"}')
    with pytest.raises(RecipeError, match=r"image processor of .* cannot be built"):
        ImageSettings().over(tmp_path)
    said = {"image_processor_type": "ViTImageProcessor", "do_resize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(RecipeError, match=r"as \[3, 3, 5\] and as \[3, 5, 3\]"):
        ImageSettings().over(tmp_path).as_bytes([image, image.T])


def test_padding_is_black_and_in_the_middle():
    image = np.full((2, 2), 200, np.uint8)
    found = padded(4, image)
    wanted = torch.zeros(4, 4, dtype=torch.uint8)
    wanted[1:3, 1:3] = 200
    assert torch.equal(found, wanted.expand(1, 3, 4, 4))
    with pytest.raises(RecipeError, match="2x2 cannot be padded to 1x1"):
        padded(1, image)
    with pytest.raises(RecipeError, match=r"bytes \(uint8\), not float64"):
        padded(4, image / 2)


def test_what_is_no_data(tmp_path: Path):
    with pytest.raises(RecipeError, match="There is no data at "):
        read_splits(DataSettings(source="gone"), ["text"], tmp_path, CLASSES)
    (tmp_path / "a.xls").write_text("")
    with pytest.raises(RecipeError, match="of no known kind"):
        read_splits(DataSettings(source="a.xls"), ["text"], tmp_path, CLASSES)
    (tmp_path / "a.jsonl").write_text('{"text": ')
    with pytest.raises(RecipeError, match="cannot be read"):
        read_splits(DataSettings(source="a.jsonl"), ["text"], tmp_path, CLASSES)
