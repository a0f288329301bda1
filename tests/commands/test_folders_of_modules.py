"""Models in several folders: merged, packed, rebuilt and composed whole."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import listing
from personae.commands.compose import compose
from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.recipe import MergeSettings, PackSettings
from toys import load, toy_bert, write_sharded

FILES = [
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "config.json",
    "model.safetensors",
    "modules.json",
]
EXACT = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
_ST = "sentence_transformers.models"
_POOLING = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
_DENSE = {
    "in_features": 16,
    "out_features": 8,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}


def _sentence_model(directory: Path, seed: int) -> Path:
    """A tiny BERT with the folders that sentence-transformers adds, as it writes them."""
    from transformers import BertModel

    BertModel.from_pretrained(toy_bert(directory / "bert", seed)).save_pretrained(directory)
    for file in (directory / "bert").iterdir():
        file.unlink()
    (directory / "bert").rmdir()
    kinds = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")
    said = [
        {"idx": n, "name": str(n), "path": path, "type": f"{_ST}.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(said))
    for (path, _), content in zip(kinds[1:], (_POOLING, _DENSE), strict=True):
        (directory / path).mkdir()
        (directory / path / "config.json").write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(seed)
    dense = {
        "linear.weight": torch.randn(8, 16, generator=generator),
        "linear.bias": torch.randn(8, generator=generator),
    }
    save_file(dense, directory / "2_Dense/model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sentences")
    for seed, name in enumerate(("base", "a", "b")):
        _sentence_model(root / name, seed)
    return root


def _files(directory: Path) -> list[str]:
    return [name for name, content in listing(directory).items() if content is not None]


def _dense(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "2_Dense/model.safetensors")


def test_merging(family, tmp_path):
    experts = {name: family / name for name in "ab"}
    merge(family / "base", experts, tmp_path / "out", settings=MergeSettings(method="ties"))
    out = merge(family / "base", experts, tmp_path / "out", overwrite=True)
    assert _files(out) == sorted([*FILES, "README.md"])
    for found, a, b in (
        (_dense(out), _dense(family / "a"), _dense(family / "b")),
        (load(out), load(family / "a"), load(family / "b")),
    ):
        assert found.keys() == a.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)


@pytest.mark.parametrize("vector", ["task", "difference"])
def test_packing_and_composing(family, tmp_path, vector):
    experts = {name: family / name for name in "ab"}
    settings = EXACT.model_copy(update={"vector": vector})
    made = pack(family / "base", experts, tmp_path / "p", settings=settings)
    out = unpack(made.directory, "a", tmp_path / "out")
    assert _files(out) == FILES
    mixed = compose(made.directory, {"a": 1.0}, tmp_path / "mixed")
    for found in (out, mixed):
        for name, tensor in _dense(family / "a").items():
            torch.testing.assert_close(_dense(found)[name], tensor, atol=1e-5, rtol=1e-4)
        assert not [name for name in load(found) if "linear" in name]


def test_a_plain_base_and_experts_with_modules(family, tmp_path):
    """What only the experts have is kept whole, and goes to its own folder again."""
    base = toy_bert(tmp_path / "base")
    skip = ("classifier*",)
    settings = EXACT.model_copy(update={"skip": skip})
    pack(base, {"a": family / "a"}, tmp_path / "p", settings=settings)
    out = unpack(tmp_path / "p", "a", tmp_path / "out")
    assert _files(out) == FILES
    assert all(torch.equal(t, _dense(family / "a")[n]) for n, t in _dense(out).items())


def test_shards_in_every_folder(family, tmp_path):
    experts = {name: family / name for name in "ab"}
    out = merge(family / "base", experts, tmp_path / "out", shard_bytes=400)
    index = json.loads((out / "2_Dense/model.safetensors.index.json").read_text())["weight_map"]
    assert index == {
        "linear.bias": "model-00001-of-00002.safetensors",
        "linear.weight": "model-00002-of-00002.safetensors",
    }
    whole = merge(family / "base", experts, tmp_path / "whole")
    assert load(out / "2_Dense").keys() == load(whole / "2_Dense").keys()
    again = merge(family / "base", {"x": out, "y": whole}, tmp_path / "again")  # both are read
    assert _files(again) == _files(whole)


def test_a_part_of_a_pipeline_keeps_the_name_of_its_weights(tmp_path):
    """`UNet2DConditionModel.from_pretrained` looks for that file alone."""
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        state = {"conv.weight": torch.randn(4, 4, generator=generator)}
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "diffusion_pytorch_model.safetensors")
        config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    experts = {name: tmp_path / name for name in "ab"}
    expected = ["config.json", "diffusion_pytorch_model.safetensors"]
    merged = merge(tmp_path / "base", experts, tmp_path / "merged")
    assert _files(merged) == ["README.md", *expected]
    pack(tmp_path / "base", experts, tmp_path / "p", settings=EXACT)
    assert _files(unpack(tmp_path / "p", "a", tmp_path / "out")) == expected
    sharded = {"diffusion_pytorch_model.safetensors.index.json", "config.json", "README.md"}
    for n in (1, 2):
        sharded.add(f"diffusion_pytorch_model-0000{n}-of-00002.safetensors")
    for seed, name in enumerate(("base2", "a2")):
        state = {n: torch.full((4, 4), float(seed)) for n in ("x", "y")}
        write_sharded(tmp_path / name, {"model.safetensors": state})
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    out = merge(tmp_path / "base2", {"a": tmp_path / "a2"}, tmp_path / "small", shard_bytes=64)
    assert set(_files(out)) == sharded


def test_sentence_transformers_loads_and_encodes(family, tmp_path):
    """With the library itself, where it is installed; the files are checked above in any case."""
    library = pytest.importorskip("sentence_transformers")
    for name in ("base", "a", "b"):
        (family / name / "vocab.txt").write_text(
            "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]) + "\n"
        )
        said = {"tokenizer_class": "BertTokenizer", "model_max_length": 12}
        (family / name / "tokenizer_config.json").write_text(json.dumps(said))
    expected = library.SentenceTransformer(str(family / "a"), device="cpu").encode(["a b c"])
    pack(family / "base", {"a": family / "a"}, tmp_path / "p", settings=EXACT)
    out = unpack(tmp_path / "p", "a", tmp_path / "out")
    found = library.SentenceTransformer(str(out), device="cpu").encode(["a b c"])
    assert found.shape == (1, 8)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-3)
