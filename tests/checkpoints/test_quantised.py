"""Quantised checkpoints by the layouts that quantisers write, and buffers that are none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from families import small_base, tuned
from personae.checkpoints import open_checkpoint
from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj"
half, single = torch.float16, torch.float32
i8, u8, i16, i32, i64 = torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64
f8 = torch.float8_e4m3fn

# A linear layer of 32 x 16, as each quantiser stores it: name to shape and dtype.
LAYOUTS = {
    "hqq": {"W_q": ((256, 1), u8), "scale": ((8, 1), half), "zero": ((8, 1), half),
            "nbits": ((1,), i32), "shape": ((2,), i32)},
    "quanto": {"weight._data": ((32, 16), i8), "weight._scale": ((32, 1), half)},
    "quanto-int4": {"weight._data": ((16, 16), u8), "weight._scale": ((32, 1), half),
                    "weight._shift": ((32, 1), half)},
    "aqlm": {"codes": ((32, 2, 1), i16), "codebooks": ((1, 64, 1, 8), half),
             "scales": ((32, 1, 1, 1), half)},
    "torchao": {"_weight_qdata": ((32, 16), i8), "_weight_scale": ((32, 1), half)},
    "torchao-older": {"weight:_data": ((32, 16), i8), "weight:_scale": ((32, 1), half)},
    "bitsandbytes-4": {"weight": ((256, 1), u8), "weight.absmax": ((8,), single),
                       "weight.quant_map": ((16,), single)},
    "bitsandbytes-8": {"weight": ((32, 16), i8), "SCB": ((32,), single)},
    "gptq": {"qweight": ((2, 32), i32), "qzeros": ((1, 4), i32), "scales": ((1, 32), half),
             "g_idx": ((16,), i32)},
    "awq": {"qweight": ((16, 4), i32), "qzeros": ((1, 4), i32), "scales": ((1, 32), half)},
    "compressed-tensors": {"weight_packed": ((32, 2), i32), "weight_scale": ((32, 1), half),
                           "weight_shape": ((2,), i64)},
    "fp8": {"weight": ((32, 16), f8), "weight_scale_inv": ((1, 1), single)},
    "quip": {"Qidxs": ((32, 2), i64), "SU": ((16,), half), "SV": ((32,), half)},
}  # fmt: skip


def stored(layout: str, folder: Path, config: object = None) -> Path:
    state = {"model.norm.weight": torch.ones(16), f"{Q}.bias": torch.ones(32)}
    for name, (shape, dtype) in LAYOUTS[layout].items():
        state[f"{Q}.{name}"] = torch.ones(shape).to(dtype)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_refused_by_what_lies_beside_them(layout: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(codes|float8).*(?i:dequanti[sz]e)"):
        open_checkpoint(stored(layout, tmp_path / "m"))
    as_stored = open_checkpoint(tmp_path / "m", as_stored=True) if layout in _OWN_NAMES else None
    assert as_stored is None or f"{Q}.bias" in as_stored.specs


_OWN_NAMES = {"hqq", "quanto", "aqlm", "torchao"}


def test_a_family_that_is_quantised_alike_is_refused(tmp_path: Path) -> None:
    """All names and shapes agree: averages of scales beside the base's codes would come out."""
    paths = {name: str(stored("aqlm", tmp_path / name)) for name in "bxy"}
    experts = {name: paths[name] for name in "xy"}
    for do in (merge, pack):
        with pytest.raises(CheckpointError, match=r"'x': .* is quantised: '.*q_proj\.codes'"):
            do(paths["b"], experts, tmp_path / "out")


def test_codes_of_which_config_alone_tells(tmp_path: Path) -> None:
    """No name says scale; integers that are no known buffer, and a quantiser's name, do."""
    state = {f"{Q}.packed": torch.ones(64, dtype=i32), f"{Q}.grid": torch.ones(4)}
    open_checkpoint(state)
    save_file(state, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "newest"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"packed' holds int32 codes \(.*quantiser 'newest'"):
        open_checkpoint(tmp_path)


def test_known_buffers_are_no_codes() -> None:
    """Swin-like, GPT-2-like, BERT-like, batch normalisation, and a counter at the root."""
    open_checkpoint(
        {
            "layers.0.attn.relative_position_index": torch.zeros(49, 49, dtype=i64),
            "layers.0.attn.logit_scale": torch.ones(3, 1, 1),
            "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=u8),
            "h.0.attn.scale": torch.ones(1),
            "embeddings.position_ids": torch.zeros(1, 8, dtype=i64),
            "embeddings.scale": torch.ones(1),
            "bn.num_batches_tracked": torch.tensor(3),
            "bn.scale": torch.ones(4),
            "steps": torch.zeros(1, 1, dtype=i64),
            "logit_scale": torch.tensor(1.0),
        }
    )


def test_plain_weights_are_taken_whatever_config_asks_for_at_loading(tmp_path: Path) -> None:
    """As after merging QLoRA, or as the bfloat16 master of a 1.58-bit model is published."""
    base = small_base()
    save_file(base, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    from personae.commands.merge_plan import plan_merge
    from personae.recipe import MergeSettings

    plan = plan_merge(str(tmp_path), {"x": tuned(base, 1)}, MergeSettings())
    told = "names the quantiser 'bitsandbytes', but its weights are plain numbers"
    assert any(told in note for note in plan.notes)
