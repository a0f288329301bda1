"""The memory rates printed in the DTS paper, from shapes alone.

Figures: methods.md 3.1–3.4. Shapes in `tests/data`: what the reference code iterates over, for the
image encoders including the frozen text embedding, for the language models without the head.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from personae._types import TensorSpec
from personae.methods import Codec
from personae.methods.personalise.dts import DTS
from personae.methods.personalise.svd import SVD

DATA = Path(__file__).parents[1] / "data"
B32, L14 = "openclip_vit_b32_image_encoder", "openclip_vit_l14_image_encoder"


def _shapes(model: str) -> dict[str, tuple[int, ...]]:
    read = json.loads((DATA / f"{model}.json").read_text())
    return {name: tuple(shape) for name, shape in read.items()}


def _numel(model: str) -> int:
    return sum(math.prod(shape) for shape in _shapes(model).values())


def _amr(model: str, codec: Codec, rule: str = "counted") -> float:
    """Percent of one fp32 copy, block by block."""
    bits = 0
    for name, shape in _shapes(model).items():
        blocks = codec.blocks(TensorSpec(name, shape, torch.float32))
        sizes = [
            (*shape[: block.axis], block.stop - block.start, *shape[block.axis + 1 :])
            for block in blocks
        ]
        bits += sum(getattr(codec.bits(size), rule) for size in sizes or [shape])
    return 100 * bits / (32 * _numel(model))


@pytest.mark.parametrize(
    ("model", "numel"),
    [(B32, 113_448_705), (L14, 342_562_049), ("roberta_base", 124_055_040), ("gpt2", 124_439_808)],
)
def test_parameters_counted(model: str, numel: int):
    assert _numel(model) == numel


@pytest.mark.parametrize(
    ("model", "counted", "lean"),
    [
        (B32, 3.680, 2.457),
        (L14, 3.678, 2.455),
        ("roberta_base", 3.808, 2.543),
        ("gpt2", 3.489, 2.329),
    ],
)
def test_dts_at_default_rank(model: str, counted: float, lean: float):
    assert round(_amr(model, DTS()), 3) == counted
    assert round(_amr(model, DTS(), "counted_lean"), 3) == lean


def test_stored_is_the_lean_count_with_scales_and_padding():
    lean, stored = (_amr(B32, DTS(), rule) for rule in ("counted_lean", "stored"))
    assert 0 < stored - lean < 0.002  # percent points: 8 scales a matrix, 4 a vector


def test_without_decomposition_is_three_bits_an_element():
    # 100 · 3/32 = 9.375, but for the scalar, which keeps all its 32 bits
    assert round(_amr(B32, DTS(decomposition=False)), 3) == 9.375
    assert round(_amr(B32, DTS(decomposition=False), "counted_lean"), 2) == 6.25


def test_binarised():
    codec = DTS(thresholding=False)
    assert round(_amr(B32, codec), 3) == 2.457  # the papers count 2 bits for a sign
    assert round(_amr(B32, codec, "counted_lean"), 3) == 1.234


def test_without_scaling_costs_the_same():
    assert round(_amr(B32, DTS(scaling=False)), 3) == 3.680


@pytest.mark.parametrize(("model", "amr"), [(B32, 4.036), ("gpt2", 3.812)])
def test_split_qkv(model: str, amr: float):
    assert round(_amr(model, DTS(qkv="split")), 3) == amr


@pytest.mark.parametrize(
    ("model", "rank_fraction", "amr"),
    [
        (B32, 0.067, 0.976),
        (B32, 0.07, 1.005),
        (L14, 0.08, 0.990),
        (L14, 0.24, 2.941),
        ("roberta_base", 0.07, 0.8845),
        ("gpt2", 0.08, 0.932),
        ("gpt2", 0.45, 5.228),
        (B32, 1.0, 11.81),
    ],
)
def test_dts_at_other_ranks(model: str, rank_fraction: float, amr: float):
    digits = len(str(amr).split(".")[1])
    assert round(_amr(model, DTS(rank_fraction=rank_fraction)), max(digits, 2)) == amr


@pytest.mark.parametrize(
    ("model", "amr"), [(B32, 5.87), (L14, 4.08), ("roberta_base", 4.14), ("gpt2", 3.80)]
)
def test_svd_baseline(model: str, amr: float):
    assert round(_amr(model, SVD()), 2) == amr
    assert _amr(model, SVD(), "stored") == _amr(model, SVD())
