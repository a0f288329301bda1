"""Adapters whose class is another than their base's: rebuilt, they hold what that class has.

A classifier of images has one of two towers, one of tokens no pooler; and a backbone may stand
under names, with a prefix and without, that its files have in older versions.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work

_WHOLE = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
_WORK = Work(workers=1)
_SIZES: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2},
}
_IMAGES: dict[str, Any] = _SIZES | {"image_size": 16, "patch_size": 8}
_TEXTS: dict[str, Any] = _SIZES | {"vocab_size": 40, "max_position_embeddings": 16}
_TOWERS: dict[str, Any] = {
    "vision_config": _IMAGES,
    "text_config": _TEXTS | {"bos_token_id": 0, "eos_token_id": 1, "projection_size": 8},
    "projection_dim": 8,
}
_KINDS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "CLIPModel": ("clip", "CLIPForImageClassification", _TOWERS, "q_proj"),
    "SiglipModel": ("siglip", "SiglipForImageClassification", _TOWERS, "q_proj"),
    "ViTModel": ("vit", "ViTForImageClassification", _IMAGES, "q_proj"),
    "ViTForMaskedImageModeling": (
        *("vit", "ViTForImageClassification", _IMAGES | {"encoder_stride": 8}, "q_proj"),
    ),
    "Dinov2Model": ("dinov2", "Dinov2ForImageClassification", _IMAGES, "q_proj"),
    "BertModel": ("bert", "BertForTokenClassification", _TEXTS, "query"),
    "BertForPreTraining": ("bert", "BertForTokenClassification", _TEXTS, "query"),
    "Wav2Vec2Model": (
        "wav2vec2",
        "Wav2Vec2ForSequenceClassification",
        _SIZES
        | {"vocab_size": 40, "conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,)}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        "q_proj",
    ),
}


def _adapter(base: Path, own: Any, target: str, labels: int, folder: Path) -> dict[str, Tensor]:
    """A LoRA of a class on a base of another one, saved; the tensors PEFT merges it to."""
    from peft import LoraConfig, get_peft_model

    model = own.from_pretrained(base, num_labels=labels)
    lora = LoraConfig(r=2, target_modules=[target], modules_to_save=["classifier", "projector"])
    tuned: Any = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    return tuned.merge_and_unload().state_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", _KINDS)
def test_packed_rebuilt_and_merged(base: str, tmp_path: Path):
    import transformers

    model_type, class_name, sizes, target = _KINDS[base]
    own, of_base = (getattr(transformers, name) for name in (class_name, base))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **sizes)
        of_base(config).save_pretrained(tmp_path / "base")
        expected = {
            name: _adapter(tmp_path / "base", own, target, labels, tmp_path / name)
            for name, labels in (("a", 3), ("b", 5))
        }
    experts = {name: tmp_path / name for name in expected}
    pack(tmp_path / "base", experts, tmp_path / "p", settings=_WHOLE, work=_WORK)
    for name, tensors in expected.items():
        out = unpack(tmp_path / "p", name, tmp_path / f"out-{name}", work=_WORK)
        found, info = own.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        assert found.state_dict().keys() == tensors.keys()
        for key, tensor in found.state_dict().items():
            torch.testing.assert_close(tensor, tensors[key], atol=1e-5, rtol=1e-4)

    average = MergeSettings(method="average")
    merge(tmp_path / "base", experts, tmp_path / "merged", settings=average, work=_WORK)
    found, info = of_base.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    before = of_base.from_pretrained(tmp_path / "base").state_dict()
    changed = 0
    for key, tensor in found.state_dict().items():
        in_own = f"{own.base_model_prefix}.{key}"  # of the backbone alone, if that is the base
        in_own = in_own if in_own in expected["a"] else key
        wanted = before[key]
        if in_own in expected["a"]:
            wanted = (expected["a"][in_own] + expected["b"][in_own]) / 2
        torch.testing.assert_close(tensor, wanted, atol=1e-6, rtol=1e-5)
        changed += not torch.equal(tensor, before[key])
    assert changed == 1  # the one adapted weight of the one layer
