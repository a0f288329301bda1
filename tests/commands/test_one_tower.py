"""Experts that are one tower of a base of two, such as a classifier of images of CLIP's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.errors import CheckpointError
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work

_WHOLE = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
_TOWER: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2},
}


def _family(family: str, class_name: str, vocabulary: int, folder: Path) -> tuple[Any, Path, Any]:
    """A base of two towers and two experts of one; the class, and folders."""
    import transformers

    names = ("Config", "Model", class_name)
    config_class, base_class, own = (getattr(transformers, family + name) for name in names)
    text = _TOWER | {"vocab_size": vocabulary, "max_position_embeddings": 16}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    vision = _TOWER | {"image_size": 16, "patch_size": 8}
    config = config_class(text_config=text, vision_config=vision, projection_dim=8, num_labels=3)
    part = config if class_name.startswith("For") else config.text_config
    part.projection_dim = part.projection_size = 8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base_class(config).save_pretrained(folder / "base")
        for name in "ab":
            expert = own(part)
            expert.load_state_dict(base_class(config).state_dict(), strict=False)
            expert.save_pretrained(folder / name)
    return own, folder / "base", {name: folder / name for name in "ab"}


@pytest.mark.parametrize("vocabulary", [20, 2000])  # the other tower smaller, and larger
@pytest.mark.parametrize(
    ("family", "class_name"),
    [
        ("Siglip", "ForImageClassification"),
        ("CLIP", "ForImageClassification"),
        ("CLIP", "TextModelWithProjection"),
    ],
)
def test_there_and_back(family: str, class_name: str, vocabulary: int, tmp_path: Path):
    own, base, experts = _family(family, class_name, vocabulary, tmp_path)
    notes = list[str]()
    work = Work(workers=1, note=notes.append)
    pack(base, experts, tmp_path / "p", settings=_WHOLE, work=work)
    other = "vision_model" if class_name.startswith("Text") else "text_model"
    assert any(f"{other}." in note and "will be missing" in note for note in notes)
    out = unpack(tmp_path / "p", "a", tmp_path / "out", work=work)
    found, info = own.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    expected = own.from_pretrained(experts["a"]).state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)


def test_a_merge_takes_the_pattern_that_its_refusal_gives(tmp_path: Path):
    import transformers

    _, base, experts = _family("Siglip", "ForImageClassification", 2000, tmp_path)
    average = MergeSettings(method="average")
    with pytest.raises(CheckpointError, match="text_model") as refused:
        merge(base, experts, tmp_path / "out", settings=average)
    (skip,) = {*re.findall(r"skip: (\[.*\])", str(refused.value))}
    notes = list[str]()
    settings = MergeSettings(method="average", skip=json.loads(skip))
    merge(base, experts, tmp_path / "out", settings=settings, work=Work(note=notes.append))
    assert any(re.search("left as in the base: .*text_model", note) for note in notes)
    assert any("not merged: classifier.bias, classifier.weight" in note for note in notes)
    whole: Any = transformers.SiglipModel
    found, info = whole.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    read = transformers.SiglipForImageClassification.from_pretrained
    a, b = (read(experts[name]).state_dict() for name in "ab")
    old = whole.from_pretrained(base).state_dict()
    for name, tensor in found.state_dict().items():
        expected = (a[name] + b[name]) / 2 if name in a else old[name]
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_a_tower_that_the_expert_s_class_has_is_not_missed(tmp_path: Path):
    """What a file lacks of its own class was lost: a shard, say."""
    _, base, experts = _family("Siglip", "ForImageClassification", 2000, tmp_path)
    (experts["a"] / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="'a' lacks 24 tensor"):
        pack(base, experts, tmp_path / "p", settings=_WHOLE)
