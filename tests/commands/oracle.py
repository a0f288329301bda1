"""What packing and unpacking shall give, the plain way: whole models, one tensor after another."""

import torch
from torch import Tensor

from families import State
from personae._types import TensorSpec
from personae.methods import Codec


def coded(codec: Codec, name: str, delta: Tensor) -> Tensor:
    """Encode and decode one dense delta, block by block."""
    spec = TensorSpec(name, tuple(delta.shape), torch.float32)
    result = torch.zeros(delta.shape)
    for axis, start, stop in codec.blocks(spec) if delta.ndim else ():
        chunk = delta.narrow(axis, start, stop - start).contiguous()
        decoded = codec.decode(codec.encode(chunk), tuple(chunk.shape))
        result.narrow(axis, start, stop - start).copy_(decoded)
    return result if delta.ndim else codec.decode(codec.encode(delta), ())


def rebuilt(codec: Codec, reference: State, expert: State) -> State:
    """The expert as it comes back; both have the same names and shapes."""
    result: State = {}
    for name, own in expert.items():
        if not own.is_floating_point():
            result[name] = own
            continue
        delta = own.float() - reference[name].float()
        changed = bool(delta.any())
        result[name] = reference[name].float() + coded(codec, name, delta)
        result[name] = (result[name] if changed else reference[name]).to(own.dtype)
    return result


def assert_same(found: State, expected: State) -> None:
    """Equal names, dtypes, shapes and values, to the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
