"""Sources: every kind gives the same examples; splits are disjoint and keep the classes' shares."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from personae.errors import RecipeError
from personae.evaluate.data import Column, DataSettings, Part, choose, read_splits
from personae.evaluate.images import ImageSettings, as_bytes
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
    as_read = as_bytes(found["image"], ImageSettings(size=3, fit="pad"))
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


def test_images_are_what_clip_s_own_processor_makes():
    transformers = pytest.importorskip("transformers")
    said = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    mean, std = [0.48, 0.45, 0.4], [0.26, 0.26, 0.27]
    processor = transformers.CLIPImageProcessorPil(**said, image_mean=mean, image_std=std)
    generator = np.random.default_rng(0)
    for height, width in ((8, 8), (20, 13), (11, 30)):
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = processor(image, return_tensors="pt")["pixel_values"]
        ours = as_bytes([image], ImageSettings(size=8, fit="crop"))
        found = Pixels(tuple(mean), tuple(std))(ours)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_what_a_model_s_files_say_of_images(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"image_size": 12}')
    assert ImageSettings().over(tmp_path).model_dump() == {
        "size": 12,
        "fit": "squash",
        "mean": 0.5,
        "std": 0.5,
    }
    said = {"size": {"shortest_edge": 9}, "crop_size": {"height": 8, "width": 8}}
    said |= {"do_center_crop": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    found = ImageSettings(std=0.5).over(tmp_path)
    assert (found.size, found.fit, found.mean, found.std) == (8, "crop", (0.1, 0.2, 0.3), 0.5)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(RecipeError, match="does not say how large its images are"):
        ImageSettings().over(tmp_path)


def test_padding_is_black_and_in_the_middle():
    image = np.full((2, 2), 200, np.uint8)
    found = as_bytes([image], ImageSettings(size=4, fit="pad"))
    wanted = torch.zeros(4, 4, dtype=torch.uint8)
    wanted[1:3, 1:3] = 200
    assert torch.equal(found, wanted.expand(1, 3, 4, 4))
    with pytest.raises(RecipeError, match="2x2 cannot be padded to 1x1"):
        as_bytes([image], ImageSettings(size=1, fit="pad"))
    with pytest.raises(RecipeError, match=r"bytes \(uint8\), not float64"):
        as_bytes([image / 2], ImageSettings(size=4, fit="pad"))


def test_what_is_no_data(tmp_path: Path):
    with pytest.raises(RecipeError, match="There is no data at "):
        read_splits(DataSettings(source="gone"), ["text"], tmp_path, CLASSES)
    (tmp_path / "a.xls").write_text("")
    with pytest.raises(RecipeError, match="of no known kind"):
        read_splits(DataSettings(source="a.xls"), ["text"], tmp_path, CLASSES)
    (tmp_path / "a.jsonl").write_text('{"text": ')
    with pytest.raises(RecipeError, match="cannot be read"):
        read_splits(DataSettings(source="a.jsonl"), ["text"], tmp_path, CLASSES)
