"""Suites of images: a trained head, and CLIP's head made of class names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from personae import evaluate_suite
from personae.evaluate import load_model
from toy_suites import add_tokenizer
from toys import perturb, toy_vit

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
SUITE = """\
base_model: base
models: [{model: a}, {model: b}]
task_defaults:
  problem: PROBLEM
  classes: [w1, w2, w3]
  data: {source: d.npz, columns: {image: images, label: labels}}
tasks: [{name: a}, {name: b}]
methods: [individual, {name: average, merge: {}}, {name: DTS, pack: {}}]
"""


def suite(folder: Path, problem: str) -> Path:
    for seed, name in enumerate("ab", 1):
        perturb(folder / "base", folder / name, seed=seed, scale=0.2)
    np.savez(folder / "d.npz", images=IMAGES, labels=LABELS)
    (folder / "suite.yaml").write_text(SUITE.replace("PROBLEM", problem), "utf-8")
    return folder / "suite.yaml"


def pixels() -> torch.Tensor:
    return torch.from_numpy(IMAGES).movedim(-1, 1) / 127.5 - 1


def test_images_and_a_trained_head(tmp_path):
    toy_vit(tmp_path / "base")
    found = evaluate_suite(suite(tmp_path, "image_classification"), cache=tmp_path / "cache")
    for name in "ab":
        model = load_model(tmp_path / name, "AutoModelForImageClassification")
        with torch.inference_mode():
            answers = model(pixel_values=pixels()).logits.argmax(dim=1).numpy()
        assert found[0].scores[name] == (answers == LABELS).mean()
    assert [one.method for one in found] == ["individual", "average", "DTS"]


def test_clip_without_a_head(tmp_path):
    """Scores are those of the whole model on images and sentences, the text tower the base's."""
    from transformers import BertTokenizer, CLIPConfig, CLIPModel

    both = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    both["num_attention_heads"] = 2
    ends = {"vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 3}
    config = CLIPConfig(
        text_config=both | ends,
        vision_config=both | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base: Any = CLIPModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    add_tokenizer(tmp_path / "base")
    path = suite(tmp_path, "zero_shot")
    found = evaluate_suite(path, cache=tmp_path / "cache")
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "base")
    sentences = tokenizer([f"a photo of a w{n}." for n in (1, 2, 3)], return_tensors="pt")
    sentences.pop("token_type_ids", None)
    for name in "ab":
        model: Any = load_model(tmp_path / name, "CLIPModel")
        with torch.inference_mode():
            text = base.get_text_features(**sentences).pooler_output
            images = model.get_image_features(pixel_values=pixels()).pooler_output
            answers = (images @ (text / text.norm(dim=1, keepdim=True)).T).argmax(dim=1).numpy()
        assert found[0].scores[name] == (answers == LABELS).mean()
    assert len(found) == 3 and all(0 <= one.average <= 1 for one in found)


def test_learned_methods_know_parameters_by_the_names_in_files(tmp_path):
    """transformers 5 calls a ViT's layers otherwise than their files do."""
    toy_vit(tmp_path / "base")
    path = suite(tmp_path, "image_classification")
    methods = """\
methods:
  - {name: sum, merge: {method: task_arithmetic, parameters: {scale: 0.3}}}
  - {name: untrained, learn: {method: adamerging, parameters: {steps: 0}, data: {split: test}}}
"""
    path.write_text(path.read_text("utf-8").partition("methods:")[0] + methods, "utf-8")
    merged, learned = evaluate_suite(path, cache=tmp_path / "cache")
    assert merged.scores == learned.scores and learned.data
