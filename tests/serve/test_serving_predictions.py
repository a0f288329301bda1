"""Predictions of texts and images: what the unpacked checkpoint says, through transformers."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from running import WORDS, Client, bert_pack, running, tokenizer
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    BertModel,
    ViTForImageClassification,
    ViTImageProcessor,
)

from personae import DTS, pack, unpack
from toys import perturb, toy_bert, toy_vit

TEXTS: list[Any] = ["w3 w4 w9", "w7", ["w11 w12", "w3"]]


def own_logits(model: Any, text: Any) -> torch.Tensor:
    words = " ".join([text] if isinstance(text, str) else text).split()
    with torch.no_grad():
        return model(torch.tensor([[WORDS.index(word) for word in words]])).logits[0]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_pack(tmp_path_factory.mktemp("classifiers"))


@pytest.fixture(scope="module")
def client(packed: Path) -> Iterator[Client]:
    with running(packed) as found:
        yield found


@pytest.mark.parametrize("mode", ["factored", "merged"])
def test_labels_and_values_are_those_of_the_checkpoint(packed: Path, mode: str, tmp_path: Path):
    with running(packed, mode=mode) as client:
        for task in ("three", "two", "value"):
            unpacked = unpack(packed, task, tmp_path / task)
            model: Any = BertForSequenceClassification.from_pretrained(unpacked)
            got = client.ok("/v1/predict", {"model": task, "texts": TEXTS})["data"]
            for place, (text, answer) in enumerate(zip(TEXTS, got, strict=True)):
                expected = own_logits(model, text)
                assert answer["index"] == place
                if task == "value":
                    assert answer["values"] == pytest.approx(expected.tolist(), abs=1e-5)
                    continue
                shares = dict(
                    zip(model.config.id2label.values(), expected.softmax(0).tolist(), strict=True)
                )
                assert answer["scores"] == pytest.approx(shares, abs=1e-5)
                assert answer["label"] == max(shares, key=shares.__getitem__)
                assert answer["score"] == max(answer["scores"].values())


def test_what_tasks_are(client: Client):
    told = {task["id"]: task for task in client.ok("/v1/tasks")["data"]}
    assert {name: task["kind"] for name, task in told.items()} == {
        "three": "classification",
        "two": "classification",
        "value": "regression",
    }
    assert told["two"]["labels"] == ["LABEL_0", "LABEL_1"] and told["two"]["max_tokens"] == 12


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"texts": []}, "texts: .*at least 1 item"),
        ({"texts": None}, 'takes "texts"'),
        ({"images": ["AA=="]}, 'takes "texts", and nothing else'),
        ({"texts": ["w3 " * 13]}, "13 tokens; task 'two' takes 12.*truncate"),
        ({"texts": [""]}, "no tokens"),
        ({"pooling": "mean"}, "gives no embeddings"),
        ({"text": ["w3"]}, "text: Extra inputs"),
        ({"texts": ["\ud800"]}, "holds half a character"),
        ({"images": json.loads("[" * 80 + "]" * 80)}, "nested deeper than 64 levels"),
    ],
)
def test_what_is_refused_of_texts(client: Client, change: dict[str, Any], text: str):
    body = {"model": "two", "texts": ["w3"]} | change
    assert re.search(text, client.refused(400, "/v1/predict", body))
    assert client.ok("/v1/predict", {"model": "two", "texts": ["w3"]})


def test_long_texts_are_cut_off_on_request(client: Client):
    ask = {"model": "two", "texts": ["w3 w4 w5 w6 w7 w8 " * 3], "truncate": True}
    short = {"model": "two", "texts": ["w3 w4 w5 w6 w7 w8 " * 2]}
    cut, whole = (client.ok("/v1/predict", body)["data"][0] for body in (ask, short))
    assert cut["scores"] == pytest.approx(whole["scores"])


def test_embeddings_by_each_pooling(tmp_path: Path):
    BertModel.from_pretrained(toy_bert(tmp_path / "made")).save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    experts = {t: perturb(tmp_path / "base", tmp_path / t, n, 0.3) for n, t in enumerate("ab", 1)}
    packed = pack(tmp_path / "base", experts, tmp_path / "pack", DTS(rank_fraction=1.0)).directory
    with running(packed) as client:
        assert {task["kind"] for task in client.ok("/v1/tasks")["data"]} == {"embedding"}
        for task in "ab":
            model = AutoModel.from_pretrained(unpack(packed, task, tmp_path / f"out-{task}"))
            with torch.no_grad():
                output = model(torch.tensor([[3, 4, 9]]))
            hidden = output.last_hidden_state[0]
            expected = {
                None: hidden.mean(0),
                "mean": hidden.mean(0),
                "first": hidden[0],
                "pooler": output.pooler_output[0],
            }
            for pooling, vector in expected.items():
                body = {"model": task, "texts": ["w3 w4 w9", "w5"], "pooling": pooling}
                got = client.ok("/v1/predict", body)["data"][0]["embedding"]
                assert got == pytest.approx(vector.tolist(), abs=1e-5)


def image(color: tuple[int, int, int], kind: str = "PNG") -> tuple[Image.Image, str]:
    made, file = Image.new("RGB", (20, 10), color), io.BytesIO()
    made.save(file, kind)
    return made, base64.b64encode(file.getvalue()).decode()


def black(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    base = toy_vit(root / "base")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(base)
    experts = {t: perturb(base, root / t, seed, 0.3) for seed, t in enumerate("ab", 1)}
    return pack(base, experts, root / "pack", DTS(rank_fraction=1.0)).directory


@pytest.fixture(scope="module")
def gallery(pictures: Path) -> Iterator[Client]:
    with running(pictures) as found:
        yield found


def test_images_as_files_and_as_pixels(gallery: Client, pictures: Path, tmp_path: Path):
    (red, red_text), (blue, blue_text) = image((250, 0, 9)), image((3, 5, 200))
    for task in "ab":
        unpacked = unpack(pictures, task, tmp_path / task)
        model = ViTForImageClassification.from_pretrained(unpacked)
        pixels = ViTImageProcessor.from_pretrained(unpacked)([red, blue], return_tensors="pt")
        with torch.no_grad():
            expected = model(**pixels).logits.softmax(-1).tolist()
        images = [red_text, f"data:image/png;base64,{blue_text}"]
        for given in (images, pixels["pixel_values"].tolist()):
            got = gallery.ok("/v1/predict", {"model": task, "images": given})["data"]
            for answer, shares in zip(got, expected, strict=True):
                assert [*answer["scores"].values()] == pytest.approx(shares, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("no base64!", "cannot be read"),
        (base64.b64encode(b"no image").decode(), "cannot be read: .* Give the base64 of a file of"),
        ([[1.0, 2.0], [3.0]], "neither base64 nor nested lists"),
        ([[1.0, 2.0]], r"has shape \[1, 2\]; the model takes \[3, 8, 8\]"),
        ([[["a"]]], "neither base64 nor nested lists"),
        ([[[10**400]]], "holds a whole number of more than 308 digits"),
        (black(9000, 9000), "9000 x 9000 pixels, and 67,108,864 are read at most"),
        (black(1, 3000), "a strip of 1 x 3000 pixels"),
    ],
)
def test_what_is_no_image(gallery: Client, given: Any, text: str):
    body = {"model": "a", "images": [given]}
    assert re.search(text, gallery.refused(400, "/v1/predict", body))


def test_too_many_images_are_refused_before_they_are_looked_at(gallery: Client):
    text = gallery.refused(413, "/v1/predict", {"model": "a", "images": ["x"] * 257})
    assert "The request has 257 rows; 256 may wait at most" in text


def test_without_an_image_processor_pixels_alone_are_taken(tmp_path: Path):
    base = toy_vit(tmp_path / "base")
    expert = perturb(base, tmp_path / "a", 1, 0.3)
    packed = pack(base, {"a": expert}, tmp_path / "pack", DTS(rank_fraction=1.0)).directory
    with running(packed) as client:
        text = client.refused(400, "/v1/predict", {"model": "a", "images": [image((1, 2, 3))[1]]})
        assert "no preprocessor_config.json" in text
        zeros = torch.zeros(3, 8, 8).tolist()
        assert client.ok("/v1/predict", {"model": "a", "images": [zeros]})


def test_classifiers_without_a_padding_token(tmp_path: Path):
    """Rows are computed one by one: the model would not find where a padded text ends."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    assert json.loads((tmp_path / "base/config.json").read_text()).get("pad_token_id") is None
    expert = perturb(tmp_path / "base", tmp_path / "a", 1, 0.3)
    packed = pack(tmp_path / "base", {"a": expert}, tmp_path / "p", DTS(rank_fraction=1.0))
    unpacked = unpack(packed.directory, "a", tmp_path / "out")
    model = GPT2ForSequenceClassification.from_pretrained(unpacked)
    with running(packed.directory) as client:
        got = client.ok("/v1/predict", {"model": "a", "texts": TEXTS})["data"]
    for text, answer in zip(TEXTS, got, strict=True):
        shares = own_logits(model, text).softmax(0).tolist()
        assert [*answer["scores"].values()] == pytest.approx(shares, abs=1e-5)
