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
from personae.commands.pack_plan import plan_shapes
from personae.errors import RecipeError
from personae.family.architecture import specs_of_shapes
from personae.methods import Codec
from personae.methods.codecs.delta_come import DeltaCoMe
from personae.methods.codecs.dts import DTS
from personae.methods.codecs.svd import SVD
from personae.recipe import PackSettings

DATA = Path(__file__).parents[1] / "data"
B32, L14 = "openclip_vit_b32_image_encoder", "openclip_vit_l14_image_encoder"


def _shapes(model: str) -> dict[str, tuple[int, ...]]:
    read = json.loads((DATA / f"{model}.json").read_text())
    return {name: tuple(shape) for name, shape in read.items()}


def _numel(model: str) -> int:
    return sum(math.prod(shape) for shape in _shapes(model).values())


def _amr(model: str, codec: Codec, rule: str = "paper") -> float:
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
    ("model", "paper", "lean"),
    [
        (B32, 3.680, 2.457),
        (L14, 3.678, 2.455),
        ("roberta_base", 3.808, 2.543),
        ("gpt2", 3.489, 2.329),
    ],
)
def test_dts_at_default_rank(model: str, paper: float, lean: float):
    assert round(_amr(model, DTS()), 3) == paper
    assert round(_amr(model, DTS(), "paper_lean"), 3) == lean


def test_stored_is_the_lean_count_with_scales_and_padding():
    lean, stored = (_amr(B32, DTS(), rule) for rule in ("paper_lean", "stored"))
    assert 0 < stored - lean < 0.002  # percent points: 8 scales a matrix, 4 a vector


def test_without_decomposition_is_three_bits_an_element():
    # 100 · 3/32 = 9.375, but for the scalar, which keeps all its 32 bits
    assert round(_amr(B32, DTS(decomposition=False)), 3) == 9.375
    assert round(_amr(B32, DTS(decomposition=False), "paper_lean"), 2) == 6.25


def test_binarised():
    codec = DTS(thresholding=False)
    assert round(_amr(B32, codec), 3) == 2.457  # the papers count 2 bits for a sign
    assert round(_amr(B32, codec, "paper_lean"), 3) == 1.234


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


def _planned(model: str, method: str, tasks: int | None = None, **parameters: object) -> float:
    settings = PackSettings(method=method, parameters=parameters)
    return plan_shapes(specs_of_shapes(_shapes(model)), settings, tasks).amr_percent["amr_paper"]


@pytest.mark.parametrize("method", ["emr", "tall_mask"])
@pytest.mark.parametrize("model", [B32, L14, "roberta_base", "gpt2"])
def test_a_mask_and_a_share_of_one_vector(model: str, method: str):
    assert _planned(model, method, 8) == 100 / 8 + 100 / 32 == 15.625
    assert _planned(model, method, 7) == pytest.approx(100 / 7 + 100 / 32, rel=1e-12)  # 17.41


@pytest.mark.parametrize("model", [B32, L14, "roberta_base", "gpt2"])
def test_t_switch_is_two_bits_an_element(model: str):
    # The temperature of CLIP, a scalar, keeps its 32 bits: 30/32 of 1e-6 percent.
    assert _planned(model, "t_switch") == pytest.approx(6.25, abs=1e-6)
    assert _planned(model, "t_switch", scope="model") == pytest.approx(6.25, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "amr"), [(B32, 5.87), (L14, 4.08), ("roberta_base", 4.14), ("gpt2", 3.80)]
)
def test_svd_baseline_as_planned(model: str, amr: float):
    assert round(_planned(model, "svd"), 2) == amr


def test_bitdelta_is_a_bit_for_matrices_and_exact_elsewhere():
    shapes = _shapes("roberta_base")
    coded = sum(math.prod(s) for n, s in shapes.items() if ".layer." in n and len(s) == 2)
    whole = _numel("roberta_base")
    expected = 100 * (coded + 32 * (whole - coded)) / (32 * whole)
    assert _planned("roberta_base", "bitdelta") == pytest.approx(expected)
    assert _planned("roberta_base", "bitdelta", tensors="all") == pytest.approx(100 / 32)


def test_tsv_c_keeps_its_share_of_the_directions():
    # k (m + d + 1) numbers of m d, k = ⌊min / N⌋: 25 % and a little of a square matrix at N = 8
    square = {"layers.0.mlp.weight": (768, 768)}
    settings = PackSettings(method="tsv_c")
    planned = plan_shapes(specs_of_shapes(square), settings, 8)
    assert planned.amr_percent["amr_paper"] == pytest.approx(100 * 96 * 1537 / 768**2)
    with pytest.raises(RecipeError, match=r"depends on the number of tasks. Give it: --tasks N"):
        plan_shapes(specs_of_shapes(square), settings)


def test_delta_come_is_a_bit_a_weight():
    # 4096 x 4096: room for 2048 bits a pair of entries. 2·8 + 32·3 = 112, (2048 − 112) / 2 = 968
    codec = DeltaCoMe()
    assert codec.rank((4096, 4096)) == 2 + 32 + 968
    bits = codec.bits((4096, 4096))
    assert bits.paper == 2048 * 8192 + 32 * 1002 == 4096**2 + 32 * 1002
    assert 100 * bits.paper / (16 * 4096**2) == pytest.approx(100 / 16, abs=0.02)  # of fp16


def test_ultradelta_at_three_percent():
    # 132 times smaller than fp32, as reported for B/32, is 0.76 %
    assert _planned(B32, "ultradelta") == pytest.approx(0.77, abs=0.01)
    amr = _planned("roberta_base", "ultradelta")
    assert 0.6 < amr < 0.8  # embeddings, a third of the model, are left out
    one = plan_shapes(
        specs_of_shapes({"layers.0.w": (1024, 1024)}), PackSettings(method="ultradelta")
    )
    assert one.amr_percent["amr_paper"] == pytest.approx(
        1.0, abs=0.05
    )  # 0.2 + 4 · 0.03 bits an element
