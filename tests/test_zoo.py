"""Many architectures at toy size: packed, rebuilt and merged, each loads and says what it should.

Every family is a base and two experts, one of them with a head of three labels.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work

pytestmark = pytest.mark.slow

EXACT = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SMALL | {"num_key_value_heads": 1}
_BART = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    **{"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 2},
    **{"decoder_start_token_id": 2, "bos_token_id": 1, "forced_eos_token_id": None},
}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
_T5 |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
_IMAGE = {k: v for k, v in _SMALL.items() if "token" not in k and k != "vocab_size"}
_IMAGE |= {"image_size": 16, "patch_size": 8}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_MOE |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


class Kind(NamedTuple):
    """How to build a family: the class of the base, that of the head, and the sizes."""

    base: str
    head: str
    sizes: dict[str, Any]
    lacks: tuple[str, ...] = ()

    @property
    def skip(self) -> tuple[str, ...]:
        """What the model with the head has not."""
        lm_heads = ("lm_head*", "embed_out*", "final_logits_bias", "vocab_*")
        return self.lacks if self.base == "AutoModel" else lm_heads


def _text(*lacks: str, **sizes: Any) -> Kind:
    return Kind("AutoModel", "AutoModelForSequenceClassification", _SMALL | sizes, lacks)


def _causal(**sizes: Any) -> Kind:
    return Kind("AutoModelForCausalLM", "AutoModelForSequenceClassification", _GROUPED | sizes)


def _image(*lacks: str, **sizes: Any) -> Kind:
    return Kind("AutoModel", "AutoModelForImageClassification", _IMAGE | sizes, lacks)


ZOO = {
    "albert": _text(embedding_size=8),
    "bert": _text(),
    "camembert": _text("pooler*", max_position_embeddings=34),
    "convbert": _text(embedding_size=16, head_ratio=1),
    "deberta": _text(relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": _text(relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "distilbert": Kind(
        "AutoModelForMaskedLM",
        "AutoModelForSequenceClassification",
        _SMALL | {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    ),
    "electra": _text(embedding_size=8),
    "ernie": _text(),
    "layoutlm": _text(),
    "modernbert": _text(sep_token_id=3, cls_token_id=1),
    "mpnet": _text("pooler*"),
    "roberta": _text("pooler*", max_position_embeddings=34),
    "roformer": _text(embedding_size=16),
    "xlm-roberta": _text("pooler*", max_position_embeddings=34),
    "xlnet": Kind(
        "AutoModel",
        "AutoModelForSequenceClassification",
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 40},
    ),
    "bloom": _causal(n_head=2),
    "falcon": _causal(),
    "gemma": _causal(head_dim=8),
    "gemma2": _causal(head_dim=8, query_pre_attn_scalar=8),
    "gpt2": _causal(),
    "gpt_neo": _causal(attention_types=[[["global", "local"], 1]], window_size=4),
    "gpt_neox": _causal(),
    "gptj": _causal(rotary_dim=4),
    "llama": _causal(),
    "mistral": _causal(),
    "mixtral": _causal(**_MOE),
    "opt": _causal(ffn_dim=32, word_embed_proj_dim=16),
    "phi": _causal(),
    "phi3": _causal(),
    "qwen2": _causal(),
    "qwen2_moe": _causal(**_MOE),
    "qwen3": _causal(head_dim=8, tie_word_embeddings=True),
    "stablelm": _causal(),
    "starcoder2": _causal(),
    "bart": Kind("AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification", _BART),
    "mbart": Kind("AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification", _BART),
    "mt5": Kind("AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification", _T5),
    "t5": Kind("AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification", _T5),
    "beit": _image(),
    "convnext": _image(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "deit": _image("pooler*"),
    "dinov2": _image(),
    "resnet": _image(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "swin": _image(
        patch_size=2, embed_dim=8, depths=[1, 1], window_size=4, num_attention_heads=[1, 2]
    ),
    "vit": _image("pooler*"),
}


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _noise(model: nn.Module, seed: int) -> None:
    """Another value for every weight: nothing is as it was, no norm or bias trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def _family(kind: Kind, model_type: str, folder: Path) -> None:
    config = _class("AutoConfig").for_model(model_type, **kind.sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = _class(kind.base).from_config(config)
        _noise(base, 1)
        base.save_pretrained(folder / "base")
        _noise(base, 2)
        # Under the names and in the layout of transformers 5, the base as hubs hold it.
        base.save_pretrained(folder / "tuned", save_original_format=False)
        head = _class(kind.head).from_pretrained(folder / "base", num_labels=3)
    _noise(head, 3)
    head.save_pretrained(folder / "head")


def _loaded(name: str, folder: Path) -> nn.Module:
    """The model as whoever uses it loads it: nothing missing, unexpected or of another shape."""
    model, info = _class(name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def _says(model: nn.Module) -> Tensor:
    if model.main_input_name == "pixel_values":  # type: ignore[comparison-overlap]
        image = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
        inputs = {"pixel_values": image}
    else:
        inputs = {"input_ids": torch.tensor([[5, 7, 3, 9, 11, 2]])}
    if "ConditionalGeneration" in type(model).__name__:
        inputs["decoder_input_ids"] = torch.tensor([[0, 4, 6]])
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("model_type", ZOO)
def test_there_and_back(model_type: str, tmp_path: Path) -> None:
    kind = ZOO[model_type]
    _family(kind, model_type, tmp_path)
    experts = {name: tmp_path / name for name in ("tuned", "head")}
    work = Work(workers=1)
    pack(tmp_path / "base", experts, tmp_path / "p", settings=EXACT, work=work)
    for name, loader in (("tuned", kind.base), ("head", kind.head)):
        out = unpack(tmp_path / "p", name, tmp_path / f"out-{name}", work=work)
        found, expected = _says(_loaded(loader, out)), _says(_loaded(loader, tmp_path / name))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    base = _says(_loaded(kind.base, tmp_path / "base"))
    for method in ("ties", "drm"):
        out = tmp_path / method
        settings = MergeSettings(method=method, skip=kind.skip)
        merge(tmp_path / "base", experts, out, settings=settings, work=work)
        merged = _says(_loaded(kind.base, out))
        assert merged.isfinite().all() and not torch.allclose(merged, base)
