"""The same exam for every registered codec."""

import pytest
import torch

from personae._types import SVD, Parts, TensorSpec
from personae.methods import (
    CODECS,
    Codec,
    block_bits,
    block_layout,
    decode_block,
    encode_block,
    misfits,
)
from pretend_device import DEVICE, PretendDevice

MATRICES = [(80, 100), (300, 70), (70, 300), (1, 50), (50, 1)]
SHAPES = [(), (1,), (7,), *MATRICES, (6, 3, 2, 2), (4, 5, 9)]
MATRIX = (80, 100)
NAME = "layers.0.mlp.weight"
SIZED_BY_VALUES = {"t_switch", "ultradelta", "residual"}
SPARSE = {"ultradelta", "residual"}
"""Keep so little that a small tensor, or a row of it, may lose everything."""

pytestmark = pytest.mark.parametrize("name", sorted(CODECS))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def _codec(name: str) -> Codec:
    return CODECS[name]()


def _round_trip(codec: Codec, delta: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Parts of the only delta of the only expert, and what is decoded from them."""
    treatment = codec.treats(TensorSpec(NAME, tuple(delta.shape), torch.float32))
    context = codec.alone(delta) if treatment == "code" else None
    parts = encode_block(codec, treatment, delta, None, context)
    shared = context.shared if context else None
    return parts, decode_block(codec, parts, tuple(delta.shape), shared)


def _delta(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _bits(parts: Parts) -> int:
    return 8 * sum(part.numel() * part.element_size() for part in parts.values())


def _same(one: Parts, other: Parts) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@each_shape
def test_shape_and_dtype_kept_and_finite(name: str, shape: tuple[int, ...]):
    delta = _delta(shape)
    before = delta.clone()
    _, decoded = _round_trip(_codec(name), delta)
    assert decoded.shape == shape
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()
    assert torch.equal(delta, before), "the input was written to"


@each_shape
def test_parts_are_flat_and_do_not_share_memory(name: str, shape: tuple[int, ...]):
    delta = _delta(shape)
    parts, decoded = _round_trip(_codec(name), delta)
    copies = {part: tensor.clone() for part, tensor in parts.items()}
    delta.fill_(1e6)
    decoded.fill_(1e6)
    assert _same(parts, copies)
    assert all(tensor.ndim == 1 for tensor in parts.values())
    assert {tensor.dtype for tensor in parts.values()} <= {
        torch.uint8,
        torch.int32,
        torch.bfloat16,
        torch.float16,
        torch.float32,
    }


@each_shape
def test_stored_bits_are_the_bytes_of_the_parts(name: str, shape: tuple[int, ...]):
    codec = _codec(name)
    treatment = codec.treats(TensorSpec(NAME, shape, torch.float32))
    parts, _ = _round_trip(codec, _delta(shape))
    declared = block_bits(codec, treatment, shape).stored
    assert _bits(parts) <= declared
    assert _bits(parts) == declared or name in SIZED_BY_VALUES


@each_shape
def test_parts_are_those_declared(name: str, shape: tuple[int, ...]):
    codec = _codec(name).for_family([{}, {}]).for_task("x")
    for zeros in (slice(0), slice(1), slice(1, 2), slice(1, -1, 3)):
        delta = _delta(shape)
        delta.view(-1)[zeros] = 0
        _check_declared(codec, shape, _round_trip(codec, delta)[0])
    if len(shape) > 1:
        delta = _delta(shape)
        delta[1:] = 0
        _check_declared(codec, shape, _round_trip(codec, delta)[0])


def _check_declared(codec: Codec, shape: tuple[int, ...], parts: Parts) -> None:
    """The parts are as the layout says, and nothing beyond it passes."""
    lengths = {part: len(values) for part, values in parts.items()}
    rank = lengths.get("singular_values") if parts else 0
    assert misfits(codec, lengths, shape, rank) == []
    layout = block_layout(codec, parts, shape, rank)
    assert all(layout[part].dtype == values.dtype for part, values in parts.items())
    for part in lengths:
        beyond = lengths | {part: layout[part].most + 1}
        missing = {name: length for name, length in lengths.items() if name != part}
        assert misfits(codec, beyond, shape, rank) != []
        assert not missing or layout[part].optional or misfits(codec, missing, shape, rank) != []
        assert misfits(codec, lengths | {"foreign": 1}, shape, rank) != []
    if "singular_values" in lengths:
        assert misfits(codec, lengths | {"singular_values": 2_000_000}, shape, 2_000_000) != []
        assert misfits(codec, lengths, shape, None) != []


@each_shape
def test_same_bytes_again_and_no_global_randomness(name: str, shape: tuple[int, ...]):
    codec, delta = _codec(name), _delta(shape)
    state = torch.random.get_rng_state()
    parts, decoded = _round_trip(codec, delta)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    again, decoded_again = _round_trip(codec, delta.clone())
    assert _same(parts, again)
    assert torch.equal(decoded, decoded_again)
    torch.random.set_rng_state(state)


@each_shape
def test_decoding_needs_nothing_but_parts_and_what_is_shared(name: str, shape: tuple[int, ...]):
    """Parameters that matter only to encoding may be lost: decode with the default ones."""
    codec, delta = _codec(name).for_family([{}, {}]).for_task("x"), _delta(shape)
    if codec.treats(TensorSpec(NAME, shape, torch.float32)) != "code":
        pytest.skip("not coded")
    context = codec.alone(delta)
    parts = codec.encode(delta, None, context)
    decoded = codec.decode(parts, shape, context.shared)
    assert torch.equal(_codec(name).decode(parts, shape, context.shared), decoded)


@each_shape
def test_zero_delta_has_no_parts_and_decodes_to_zero(name: str, shape: tuple[int, ...]):
    parts, decoded = _round_trip(_codec(name), torch.zeros(shape))
    assert parts == {}
    assert torch.equal(decoded, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)], ids=str)
def test_empty_tensor(name: str, shape: tuple[int, ...]):
    codec = _codec(name)
    assert codec.encode(torch.zeros(shape)) == {}
    assert codec.decode({}, shape).shape == shape
    assert codec.bits(shape).stored == 0
    assert codec.zero_bits(shape) == 0


@pytest.mark.parametrize("shape", [(80, 100), (300, 70)], ids=str)
def test_untouched_rows_stay_exactly_zero(name: str, shape: tuple[int, ...]):
    delta = _delta(shape)
    untouched = torch.arange(shape[0]) % 3 != 1
    delta[untouched] = 0
    _, decoded = _round_trip(_codec(name), delta)
    assert not decoded[untouched].any()
    assert decoded[~untouched].any(dim=1).all() or name in SPARSE


@each_shape
def test_exact_zeros_cost_no_more_than_declared(name: str, shape: tuple[int, ...]):
    codec, delta = _codec(name), _delta(shape)
    delta.reshape(-1)[::3] = 0
    if len(shape) == 2 and min(shape) > 1:
        delta[::5] = 0
        delta[:, ::7] = 0
    treatment = codec.treats(TensorSpec(NAME, shape, torch.float32))
    parts, _ = _round_trip(codec, delta)
    zeros = codec.zero_bits(shape) if treatment == "code" else 0
    assert _bits(parts) <= block_bits(codec, treatment, shape).stored + zeros


@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in MATRICES], ids=str)
def test_exact_zeros_of_what_is_no_matrix_stay_zero(name: str, shape: tuple[int, ...]):
    delta = _delta(shape)
    delta.view(-1)[::2] = 0
    _, decoded = _round_trip(_codec(name), delta)
    assert not decoded.view(-1)[::2].any()


@pytest.mark.parametrize("size", [1e-20, 1e-38, 1e-42])
@each_shape
def test_tiny_values_give_no_nan(name: str, shape: tuple[int, ...], size: float):
    _, decoded = _round_trip(_codec(name), size * _delta(shape))
    assert decoded.isfinite().all()


def test_rank_is_capped_at_the_numerical_rank(name: str):
    codec = _codec(name)
    if not codec.rank(MATRIX):
        pytest.skip("codes without a decomposition")
    # Integers from 1 to 5, so that the product is exactly of rank 1.
    left = torch.arange(80.0)[:, None] % 5 + 1
    right = torch.arange(100.0)[None] % 4 + 1
    parts = codec.encode(left @ right)
    assert _bits(parts) == codec.bits(MATRIX, rank=1).stored


def test_a_decomposition_of_rank_zero_leaves_nothing(name: str):
    codec = _codec(name)
    if not codec.rank(MATRIX):
        pytest.skip("codes without a decomposition")
    none = SVD(torch.zeros(80, 0), torch.zeros(0), torch.zeros(0, 100))
    assert codec.encode(_delta(MATRIX), none) == {}


def test_a_larger_decomposition_serves_a_smaller_rank(name: str):
    codec, delta = _codec(name), _delta(MATRIX)
    rank = codec.rank(MATRIX)
    if not rank:
        pytest.skip("codes without a decomposition")
    own = codec.decompose(delta, rank)
    assert own.singular_values.shape == (rank,)
    more = SVD(
        torch.cat([own.u, _delta((80, 5), 1)], dim=1),
        torch.cat([own.singular_values, torch.full((5,), 1e-3)]),
        torch.cat([own.vh, _delta((5, 100), 2)]),
    )
    assert _same(codec.encode(delta, own), codec.encode(delta))
    assert _same(codec.encode(delta, more), codec.encode(delta, own))


def test_bits_at_the_default_rank(name: str):
    codec = _codec(name)
    for shape in SHAPES:
        if codec.treats(TensorSpec(NAME, shape, torch.float32)) == "code":
            assert codec.bits(shape, rank=codec.rank(shape)) == codec.bits(shape)


@each_shape
def test_computes_on_the_device_of_its_input(name: str, shape: tuple[int, ...]):
    codec, delta = _codec(name), _delta(shape)
    if delta.ndim == 2:
        delta[0] = 0
    elif delta.ndim:
        delta.view(-1)[0] = 0
    parts, here = _round_trip(codec, delta)
    with PretendDevice():
        there, decoded = _round_trip(codec, delta.to(DEVICE))
        assert all(part.device == DEVICE for part in there.values())
        assert not there or decoded.device == DEVICE  # without parts nothing says where
        there, decoded = {part: tensor.cpu() for part, tensor in there.items()}, decoded.cpu()
    assert _same(there, parts)
    assert torch.equal(decoded, here)


def test_an_entry_can_be_listed(name: str):
    entry = CODECS[name]
    assert entry.summary.endswith(".")
    assert entry.paper.startswith("arXiv:")
    for parameter, field in entry.fields().items():
        assert field.description, f"{name}.{parameter} has no description"


@each_shape
def test_triplets_are_factors_of_what_is_decoded(name: str, shape: tuple[int, ...]):
    delta = _delta(shape)
    if len(shape) > 1:
        delta[0] = 0  # a row that did not change
    parts, decoded = _round_trip(_codec(name), delta)
    found = _codec(name).triplets(parts, shape)
    if found is None:
        assert name not in {"dts", "svd", "tsv_c", "delta_come"} or "singular_values" not in parts
        return
    product = (found.u.double() * found.singular_values.double()) @ found.vh.double()
    torch.testing.assert_close(product.float(), decoded.flatten(1), rtol=1e-4, atol=1e-5)
    stored = {part: values.clone() for part, values in parts.items()}
    for vectors in (found.u, found.vh):  # which are the caller's to overwrite
        vectors.mul_(2)
    assert _same(parts, stored)
