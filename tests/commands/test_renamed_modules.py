"""Base and expert saved by different versions of transformers: merged, packed, rebuilt."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from personae.checkpoints import open_checkpoint
from personae.checkpoints.laid_out import LaidOut
from personae.checkpoints.published_layouts import with_layout_like
from personae.commands.merge import merge
from personae.commands.merge_plan import plan_merge
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from toys import WEIGHTS, load

_WORK = Work(workers=1)
_WHOLE = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
_TEXT: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "max_position_embeddings": 16},
}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_TEXT))


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(**_TEXT, num_key_value_heads=1)
    return Llava(LlavaConfig(text_config=text, vision_config=vision, image_token_index=39))


def _wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes: dict[str, Any] = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,)}
    positions: dict[str, Any] = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2Model(Wav2Vec2Config(**_TEXT, **sizes, **positions))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    )


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any]
    sizes = {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**_TEXT, **sizes))


def _aria() -> nn.Module:
    """Its experts are `fc1.weight` in files, `gate_up_proj` in memory: names with other ends."""
    from transformers import AriaTextConfig, AriaTextForCausalLM

    sizes: dict[str, Any] = {"num_key_value_heads": 1, "moe_num_experts": 3, "moe_topk": 2}
    return AriaTextForCausalLM(AriaTextConfig(**_TEXT, **sizes, moe_num_shared_experts=1))


def _gte() -> nn.Module:
    """Files hold q, k and v in one matrix, gate and up in another; models hold them apart."""
    from transformers import GteConfig, GteModel

    return GteModel(GteConfig(**_TEXT))


def _jina() -> nn.Module:
    from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

    return JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**_TEXT))


def _hrm() -> nn.Module:
    from transformers import HrmTextConfig, HrmTextModel

    heads: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
    return HrmTextModel(HrmTextConfig(**_TEXT, **heads))


def _older_bert(name: str) -> str:
    return re.sub(
        r"LayerNorm\.bias$", "LayerNorm.beta", re.sub(r"Norm\.weight$", "Norm.gamma", name)
    )


def _older_llava(name: str) -> str:
    name = re.sub(r"^lm_head", "language_model.lm_head", name)
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    return re.sub(r"^model\.(vision_tower|multi_modal)", r"\1", name)


def _newer_llava(name: str) -> str:
    name = re.sub(r"^language_model\.lm_head", "lm_head", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    return re.sub(r"^(vision_tower|multi_modal)", r"model.\1", name)


def _older_norm(name: str) -> str:
    name = name.replace("parametrizations.weight.original0", "weight_g")
    return name.replace("parametrizations.weight.original1", "weight_v")


_KINDS = {
    "bert": (_bert, _older_bert, lambda name: name),
    "llava": (_llava, _older_llava, _newer_llava),
    "wav2vec2": (_wav2vec2, _older_norm, lambda name: name),
    # Here transformers writes both itself: as hubs hold them, and as its models name them.
    "vit": (_vit, None, None),
    "mixtral": (_mixtral, None, None),
    "aria_text": (_aria, None, None),
    "gte": (_gte, None, None),
    "jina_embeddings_v3": (_jina, None, None),
    "hrm_text": (_hrm, None, None),
}


def _renamed(folder: Path, rename: Callable[[str], str]) -> None:
    save_file({rename(n): t for n, t in load(folder).items()}, folder / WEIGHTS, {"format": "pt"})


def _family(kind: str, folder: Path) -> type[Any]:
    """A base under the older names and an expert under the newer ones."""
    build, older, newer = _KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        model.save_pretrained(folder / "base")  # type: ignore[operator]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        as_hubs_do = newer is not None
        model.save_pretrained(folder / "tuned", save_original_format=as_hubs_do)  # type: ignore[operator]
    if older and newer:
        _renamed(folder / "base", older)
        _renamed(folder / "tuned", newer)
    elif load(folder / "base").keys() == load(folder / "tuned").keys():
        pytest.skip("this version of transformers has one name for each tensor")
    return type(model)


def _says(model_class: type[Any], folder: Path) -> Tensor:
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    if model.main_input_name == "input_values":
        inputs = {"input_values": torch.linspace(-1, 1, 64).reshape(1, 64).sin()}
    elif model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8).sin()}
    else:
        inputs = {"input_ids": torch.tensor([[5, 7, 3, 9, 11, 2]])}
    with torch.no_grad():
        return model.eval()(**inputs)[0]


@pytest.mark.parametrize("kind", _KINDS)
def test_one_expert_merged_whole_is_the_expert_under_the_base_s_names(kind: str, tmp_path: Path):
    loaded = _family(kind, tmp_path)
    settings = MergeSettings(method="task_arithmetic")
    merge(
        tmp_path / "base", {"x": tmp_path / "tuned"}, tmp_path / "m", settings=settings, work=_WORK
    )
    assert load(tmp_path / "m").keys() == load(tmp_path / "base").keys()
    expected = _says(loaded, tmp_path / "tuned")
    torch.testing.assert_close(_says(loaded, tmp_path / "m"), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(_says(loaded, tmp_path / "base"), expected, atol=1e-2)


@pytest.mark.parametrize("kind", _KINDS)
def test_what_is_rebuilt_says_what_the_expert_says(kind: str, tmp_path: Path):
    loaded = _family(kind, tmp_path)
    pack(tmp_path / "base", {"x": tmp_path / "tuned"}, tmp_path / "p", settings=_WHOLE, work=_WORK)
    out = unpack(tmp_path / "p", "x", tmp_path / "out", work=_WORK)
    expected = _says(loaded, tmp_path / "tuned")
    torch.testing.assert_close(_says(loaded, out), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["vit", "mixtral", "gte", "jina_embeddings_v3", "hrm_text"])
def test_a_base_in_the_new_names_and_an_expert_in_the_old_ones(kind: str, tmp_path: Path):
    loaded = _family(kind, tmp_path)
    base, expert = tmp_path / "tuned", tmp_path / "base"  # the other way round
    settings = MergeSettings(method="task_arithmetic")
    merge(base, {"x": expert}, tmp_path / "m", settings=settings, work=_WORK)
    assert load(tmp_path / "m").keys() == load(base).keys()
    expected = _says(loaded, expert)
    torch.testing.assert_close(_says(loaded, tmp_path / "m"), expected, atol=1e-5, rtol=1e-4)


def test_a_backbone_in_the_new_names_and_a_classifier_in_the_old_ones(tmp_path: Path):
    loaded = _family("vit", tmp_path)
    loaded.from_pretrained(tmp_path / "tuned").vit.save_pretrained(
        tmp_path / "backbone", save_original_format=False
    )
    pack(
        tmp_path / "backbone", {"x": tmp_path / "base"}, tmp_path / "p", settings=_WHOLE, work=_WORK
    )
    out = unpack(tmp_path / "p", "x", tmp_path / "out", work=_WORK)
    expected = _says(loaded, tmp_path / "base")
    torch.testing.assert_close(_says(loaded, out), expected, atol=1e-4, rtol=1e-3)


def _hyperclovax() -> tuple[type[Any], type[Any], Any]:
    """Loaders rename its projector under `model.` alone, which the backbone does not have."""
    import transformers

    text = _TEXT | {"num_key_value_heads": 1, "head_dim": 8}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    vision |= {"patch_size": 8, "out_hidden_size": 16}
    config = transformers.HyperCLOVAXVisionV2Config(text_config=text, vision_config=vision)
    return (
        transformers.HyperCLOVAXVisionV2ForConditionalGeneration,
        transformers.HyperCLOVAXVisionV2Model,
        config,
    )


@pytest.mark.parametrize("as_hubs_do", [True, False])
def test_a_backbone_keeps_names_that_no_prefix_tells(as_hubs_do: bool, tmp_path: Path):
    pytest.importorskip("transformers.models.hyperclovax_vision_v2")
    whole, backbone, config = _hyperclovax()
    whole(config).save_pretrained(tmp_path / "base")
    expert = backbone.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    expert.save_pretrained(tmp_path / "expert", save_original_format=as_hubs_do)
    pack(tmp_path / "base", {"x": tmp_path / "expert"}, tmp_path / "p", settings=_WHOLE, work=_WORK)
    content = json.loads((tmp_path / "p" / "pack.json").read_text())
    assert content["format_version"] == 2
    given = content["tasks"]["x"]["renaming"]["given"]
    assert given["model.vision_projector.weight"] == "projector.weight"
    out = unpack(tmp_path / "p", "x", tmp_path / "out", work=_WORK)
    found, info = backbone.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in expert.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


def test_an_adapter_that_names_the_old_modules_fits_a_newer_base(tmp_path: Path):
    _family("vit", tmp_path)
    pair = {"lora_A": torch.ones(1, 16), "lora_B": torch.arange(16.0).reshape(16, 1)}
    module = "base_model.model.vit.encoder.layer.0.attention.attention.query"
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"{module}.{factor}.weight": tensor for factor, tensor in pair.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["query"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    settings = MergeSettings(method="task_arithmetic")
    experts = {"x": tmp_path / "adapter"}
    merge(tmp_path / "tuned", experts, tmp_path / "m", settings=settings, work=_WORK)
    name = "vit.layers.0.attention.q_proj.weight"
    # 2 / 1 times B @ A: every entry of row i grows by 2 i.
    rows = torch.arange(0.0, 32.0, 2.0).reshape(16, 1).expand(16, 16)
    grown = load(tmp_path / "m")[name] - load(tmp_path / "tuned")[name]
    torch.testing.assert_close(grown, rows, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_names_the_new_modules_fits_an_older_base(tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model

    loaded = _family("llava", tmp_path)
    wanted = r".*language_model.*q_proj|.*multi_modal_projector.linear_1"
    config = LoraConfig(r=2, target_modules=wanted, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(loaded.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    merged: Any = PeftModel.from_pretrained(
        loaded.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(tmp_path / "expected")
    settings = MergeSettings(method="task_arithmetic")
    experts = {"x": tmp_path / "adapter"}
    merge(tmp_path / "base", experts, tmp_path / "m", settings=settings, work=_WORK)
    found, expected = _says(loaded, tmp_path / "m"), _says(loaded, tmp_path / "expected")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, _says(loaded, tmp_path / "base"), atol=1e-3)


@pytest.mark.parametrize("newer", [False, True])
def test_a_model_of_vision_and_language_on_its_language_model_keeps_its_names(newer, tmp_path):
    """Either prefix of the text model, of which the base has another class, is one its own has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    loaded = _family("llava", tmp_path)
    tuned = tmp_path / ("tuned" if newer else "base")
    text: Any = loaded.from_pretrained(tuned)
    language = LlamaForCausalLM(LlamaConfig(**_TEXT, num_key_value_heads=1))
    language.model.load_state_dict(text.model.language_model.state_dict())
    language.save_pretrained(tmp_path / "language")
    pack(tmp_path / "language", {"x": tuned}, tmp_path / "p", settings=_WHOLE, work=_WORK)
    out = unpack(tmp_path / "p", "x", tmp_path / "out", work=_WORK)
    assert load(out).keys() == load(tuned).keys()
    torch.testing.assert_close(_says(loaded, out), _says(loaded, tuned), atol=1e-4, rtol=1e-3)


def test_without_a_base_a_mixture_is_laid_out_as_the_first(tmp_path):
    loaded = _family("mixtral", tmp_path)
    given = {"apart": tmp_path / "base", "stacked": tmp_path / "tuned"}
    merge(None, given, tmp_path / "m", settings=MergeSettings(method="average"), work=_WORK)
    merged = loaded.from_pretrained(tmp_path / "m")
    assert load(tmp_path / "m").keys() == load(tmp_path / "base").keys()
    models = [loaded.from_pretrained(folder).state_dict() for folder in given.values()]
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, (models[0][name] + models[1][name]) / 2)
    settings = _WHOLE.model_copy(update={"vector": "difference"})
    pack(None, given, tmp_path / "p", settings=settings, work=_WORK)
    for task, folder in given.items():
        out = unpack(tmp_path / "p", task, tmp_path / task, work=_WORK)
        torch.testing.assert_close(_says(loaded, out), _says(loaded, folder), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("fused", ["base", "tuned"])
@pytest.mark.parametrize("kind", ["gte", "hrm_text"])
def test_a_plan_counts_what_a_worker_keeps_of_a_fused_group(kind: str, fused: str, tmp_path: Path):
    """All of the largest group, as its rows are asked for a few at a time, and a copy of it.

    What is fused is a tensor that the one file has and the other has not: it is its group.
    """
    _family(kind, tmp_path)
    base, tuned = (tmp_path / name for name in ("base", "tuned"))
    group = max(load(base)[name].nbytes for name in load(base).keys() - load(tuned).keys())
    if fused == "tuned":
        base, tuned = tuned, base
    alike = shutil.copytree(base, tmp_path / "alike")
    largest = {
        expert: plan_merge(base, {"a": expert, "b": expert}, work=_WORK).largest
        for expert in (alike, tuned)
    }
    assert largest[tuned] - largest[alike] == 2 * (2 * group)  # of each of two experts

    read = with_layout_like(open_checkpoint(base), open_checkpoint(tuned))
    assert isinstance(read, LaidOut)
    held = 0
    for name in read.specs.keys() - open_checkpoint(tuned).specs.keys():
        read.read_rows(name, 0, 1)
        kept: dict[str, Tensor] = read._kept._last.value
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in kept.values()}
        held = max(held, sum(storage.nbytes() for storage in storages.values()))
    assert held == group
