"""Models of a text and a vision model, each with rules of its own, in either layout.

What transformers itself writes in the one layout is the oracle for a file in the other one.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from personae.checkpoints import open_checkpoint
from personae.checkpoints.layouts import laid_out_like
from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.errors import CheckpointError
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from toys import load

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.conversion_mapping")
_WORK = Work(workers=1)
_SIZES: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2},
}
_TEXT: dict[str, Any] = {**_SIZES, "vocab_size": 40, "max_position_embeddings": 32}
_LATENT: dict[str, Any] = {
    **{"num_key_value_heads": 2, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    **{"v_head_dim": 8, "first_k_dense_replace": 1, "moe_intermediate_size": 12},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2},
}
_IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4}


def _tips() -> tuple[str, dict[str, Any]]:
    vision = {**_SIZES, **_IMAGE}
    del vision["intermediate_size"]
    return "Tipsv2Model", {"text_config": _TEXT, "vision_config": vision}


def _step() -> tuple[str, dict[str, Any]]:
    text = {
        **_TEXT,
        **{"num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 12},
        **{"n_routed_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2},
        **{"share_expert_dim": 12, "pad_token_id": 0, "mlp_layer_types": ["dense", "sparse"]},
        "layer_types": ["full_attention", "full_attention"],
    }
    vision = {**_SIZES, **_IMAGE, "mlp_ratio": 1.5}
    own = {"text_config": text, "vision_config": vision, "image_token_id": 39}
    return "Step3p7ForConditionalGeneration", own


def _mistral() -> tuple[str, dict[str, Any]]:
    index = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2, "head_dim": 4}
    vision = {"model_type": "pixtral", **_SIZES, **_IMAGE, "head_dim": 8}
    own = {"text_config": {**_TEXT, **_LATENT, **index}, "vision_config": vision}
    return "MistralLarge4ForConditionalGeneration", own


def _kimi() -> tuple[str, dict[str, Any]]:
    text = {"model_type": "deepseek_v3", **_TEXT, **_LATENT, "n_group": 1, "topk_group": 1}
    text["q_lora_rank"] = 8
    vision = {**_SIZES, "patch_size": 4}
    vision |= {"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2}
    tokens = {"image_token_id": 39, "video_token_id": 38}
    tokens |= {"vision_start_token_id": 37, "vision_end_token_id": 36}
    own = {"text_config": text, "vision_config": vision, "projection_hidden_size": 16, **tokens}
    return "Kimi_K25ForConditionalGeneration", own


_KINDS = {"tipsv2": _tips, "step3p7": _step, "mistral_large4": _mistral, "kimi_k25": _kimi}


def _family(told: Callable[[], tuple[str, dict[str, Any]]], folder: Path) -> type[Any]:
    """A base and an expert, each in both layouts: `X on hubs` and `X in memory`."""
    name, sizes = told()
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    model_class = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = model_class(model_class.config_class(**sizes))
        for which in ("base", "expert"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
            for place, as_hubs_do in (("on hubs", True), ("in memory", False)):
                out = folder / f"{which} {place}"
                model.save_pretrained(out, save_original_format=as_hubs_do)  # type: ignore[operator]
    return model_class


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("whole", "apart"), [("on hubs", "in memory"), ("in memory", "on hubs")])
@pytest.mark.parametrize("kind", _KINDS)
def test_either_layout_read_as_the_other_one(
    kind: str, whole: str, apart: str, tmp_path: Path
) -> None:
    _family(_KINDS[kind], tmp_path)
    base = open_checkpoint(tmp_path / f"base {whole}")
    found = laid_out_like(base, open_checkpoint(tmp_path / f"expert {apart}"))
    expected = load(tmp_path / f"expert {whole}")
    assert load(tmp_path / f"expert {apart}").keys() != expected.keys()
    assert {name: spec.shape for name, spec in found.specs.items()} == {
        name: spec.shape for name, spec in base.specs.items()
    }
    for name in found.specs:
        assert torch.equal(found.read(name), expected[name]), name
        if found.specs[name].shape[:1] > (2,):
            assert torch.equal(found.read_rows(name, 1, 3), expected[name][1:3]), name


@pytest.mark.filterwarnings("ignore")
def test_what_is_merged_and_rebuilt_loads(tmp_path: Path) -> None:
    loaded = _family(_step, tmp_path)
    base, expert = tmp_path / "base on hubs", tmp_path / "expert in memory"
    expected = loaded.from_pretrained(expert).state_dict()
    settings = MergeSettings(method="task_arithmetic")
    merge(base, {"x": expert}, tmp_path / "m", settings=settings, work=_WORK)
    whole = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
    pack(base, {"x": expert}, tmp_path / "p", settings=whole, work=_WORK)
    for out in (tmp_path / "m", unpack(tmp_path / "p", "x", tmp_path / "out", work=_WORK)):
        model, info = loaded.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_fewer_experts_is_refused(tmp_path: Path) -> None:
    _family(_step, tmp_path)
    name, sizes = _step()
    few = {**sizes["text_config"], "n_routed_experts": 2, "num_local_experts": 2}
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**{**sizes, "text_config": few}))
    shutil.rmtree(tmp_path / "expert in memory")
    model.save_pretrained(tmp_path / "expert in memory", save_original_format=False)
    given = {"x": tmp_path / "expert in memory"}
    with pytest.raises(CheckpointError, match="Expert 'x'"):
        merge(tmp_path / "base on hubs", given, tmp_path / "m", work=_WORK)
