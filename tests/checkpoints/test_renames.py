"""Names of one tensor in several versions."""

import json
from pathlib import Path

import pytest
import torch

from families import saved
from personae.checkpoints import open_checkpoint
from personae.checkpoints.published_renames import _reading, renames_of
from personae.checkpoints.renames import by_canonical, canonical
from personae.errors import CheckpointError
from personae.family.align import Alignment, align


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("LayerNorm.beta", "LayerNorm.bias"),
        ("conv.weight_g", "conv.parametrizations.weight.original0"),
        ("conv.weight_v", "conv.parametrizations.weight.original1"),
        ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("language_model.model.layers.0.q.weight", "model.language_model.layers.0.q.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("visual.blocks.0.q.weight", "model.visual.blocks.0.q.weight"),
        ("model.layers.0.q.weight", "model.language_model.layers.0.q.weight"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
    ],
)
def test_old_and_new_names_meet(old: str, new: str):
    assert canonical(old) == canonical(new)


@pytest.mark.parametrize("name", ["layer_scale.gamma", "norm.beta", "h.0.weight_gate", "model"])
def test_other_names_stay(name: str):
    assert canonical(name) == name


def test_names_that_meet_within_one_model_are_left_alone():
    names = ["model.norm.weight", "language_model.norm.weight", "model.head.weight"]
    assert by_canonical(names) == {"head.weight": "model.head.weight"}


def _aligned(base: dict[str, int], expert: dict[str, int]) -> Alignment:
    """Vectors of these lengths."""
    here, there = ({n: torch.zeros(k) for n, k in names.items()} for names in (base, expert))
    return align(open_checkpoint(here), {"x": open_checkpoint(there)})["x"]


def test_a_prefix_and_a_version_at_once():
    base = {"enc.LayerNorm.gamma": 3, "enc.q.weight": 4}
    expert = {"bert.enc.LayerNorm.weight": 3, "bert.enc.q.weight": 4, "classifier.bias": 2}
    found = _aligned(base, expert)
    assert found.shared == ("enc.LayerNorm.gamma", "enc.q.weight")
    assert found.files["enc.LayerNorm.gamma"] == "bert.enc.LayerNorm.weight"
    assert (found.renaming.add, found.private) == ("bert.", ("classifier.bias",))


def test_both_names_in_one_expert_are_two_tensors():
    base = {"LayerNorm.weight": 3, "q.weight": 4}
    found = _aligned(base, {"LayerNorm.weight": 3, "LayerNorm.gamma": 3, "q.weight": 4})
    assert found.files["LayerNorm.weight"] == "LayerNorm.weight"
    assert found.private == ("LayerNorm.gamma",)


def test_published_rules_of_a_model_in_another_one_and_names_with_another_end(tmp_path: Path):
    pytest.importorskip("transformers", "5.0")
    base = {
        "language_model.model.layers.0.mlp.experts.fc1.weight": torch.zeros(2, 3, 4),
        "language_model.model.norm.weight": torch.zeros(3),
        "vision_tower.norm.weight": torch.zeros(5),
    }
    path = saved(base, tmp_path / "base")
    config = {"model_type": "aria", "text_config": {"model_type": "aria_text"}}
    (path / "config.json").write_text(json.dumps(config))
    expert = {
        "model.language_model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 3, 4),
        "model.language_model.norm.weight": torch.zeros(3),
        "model.vision_tower.norm.weight": torch.zeros(5),
    }
    found = align(open_checkpoint(path), {"x": open_checkpoint(expert)})["x"]
    assert dict(found.files) == dict(zip(base, expert, strict=True))


def test_a_new_name_that_holds_the_old_one_stays():
    """As of A.X-K1, whose `post_mlp_layernorm` is in `mlp.` since."""
    loading = pytest.importorskip("transformers.core_model_loading")
    read = _reading(loading.WeightRenaming("post_norm", "mlp.post_norm"))
    assert read("h.0.post_norm.weight") == "h.0.mlp.post_norm.weight"
    assert read("h.0.mlp.post_norm.weight") == "h.0.mlp.post_norm.weight"
    assert read("h.0.norm.weight") == "h.0.norm.weight"


def test_an_old_name_that_holds_the_new_one_is_read():
    """As of HY-V4, where a part of names was left out."""
    loading = pytest.importorskip("transformers.core_model_loading")
    read = _reading(loading.WeightRenaming(r"\.hc_pre\.hc_", ".hc_"))
    assert read("h.0.hc_pre.hc_base") == "h.0.hc_base"
    assert read("h.0.hc_base") == "h.0.hc_base"


def test_rules_of_inner_models_leave_alone_what_an_outer_one_converts():
    """As of Mistral Large 4: rows of the vision model are permuted, those of the text model not."""
    loading = pytest.importorskip("transformers.core_model_loading")
    outer = loading.WeightConverter("vision.wq", "vision.q_proj", [loading.PermuteForRope()])
    inner = loading.WeightRenaming("wq", "q_proj")
    whole = next(renames_of([[outer], [inner]]))
    assert whole("vision.wq.weight") == "vision.wq.weight"
    assert whole("text.wq.weight") == "text.q_proj.weight"


@pytest.mark.parametrize("own", ["h.0.mlp.conv.weight", "h.0.mlp.gate_up"])
def test_other_tensors_in_the_same_layers_are_no_reason_to_skip(own: str):
    base = {"h.0.q.weight": 9, "h.0.mlp.a_conv.weight": 3, "h.0.mlp.b_conv.weight": 3}
    with pytest.raises(CheckpointError, match=f"'{own}'.*version of transformers") as e:
        _aligned(base, {"h.0.q.weight": 9, own: 6})
    assert "skip" not in str(e.value)


def test_nor_are_those_in_layers_of_another_name():
    """As of GTE: `encoder.layer` with one matrix for q, k, v, and `layers` with three."""
    base = {"encoder.layer.0.LayerNorm.gamma": 3, "encoder.layer.0.qkv.weight": 9}
    expert = {"layer.0.LayerNorm.weight": 3, "layer.0.q.weight": 4}
    with pytest.raises(CheckpointError, match=r"'layer.0.q.weight'.*version of transformers") as e:
        _aligned(base, expert)
    assert "skip" not in str(e.value)


def test_names_that_cannot_be_matched_are_laid_to_versions_without_the_advice_to_skip():
    base = {"q.weight": 4, "old.norm.weight": 3}
    with pytest.raises(
        CheckpointError, match=r"'new.norm.weight'.*'old.norm.weight'.*version"
    ) as e:
        _aligned(base, {"q.weight": 4, "new.norm.weight": 3})
    assert "skip" not in str(e.value)


@pytest.mark.parametrize(
    "passed_over",
    [
        "layers.0.self_attn.rotary_emb.inv_freq",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ],
)
def test_what_loaders_pass_over_may_be_absent(passed_over: str):
    assert _aligned({"q.weight": 4, passed_over: 3}, {"q.weight": 4}).absent == (passed_over,)
    assert _aligned({"q.weight": 4}, {"q.weight": 4, passed_over: 3}).shared == ("q.weight",)


def test_a_bias_of_attention_is_no_mask():
    with pytest.raises(CheckpointError, match="lacks 1 tensor"):
        _aligned({"q.weight": 4, "attention.bias": 3}, {"q.weight": 4})
