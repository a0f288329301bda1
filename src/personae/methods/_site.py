"""Where a method is: which tensor it is given, of which class, and which entries of it."""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

TensorClass = Literal["linear", "embedding", "conv", "vector", "scalar"]
"""Classes that methods tell apart (methods.md 0.2): weights of linear layers, other tables of two
axes, three axes and more, one axis, none."""

_EMBEDDING = re.compile(
    r"embed|wte|wpe|lm_head|(^|\.)shared\.weight|relative_attention_bias|decoder\.weight"
    r"|(^|\.)(text_projection|visual_projection|proj)(\.weight)?$"
)
# CLIP's `proj`, beside which lies no layer; `attn.proj.weight` and the like are linear layers.
_LAYER_PROJECTION = re.compile(r"\.\w*(attn|attention|mlp)\w*\.proj\.weight$")
_STACKED = {"in_proj_weight", "c_attn", "qkv", "qkv_proj", "Wqkv"}


# Fused experts are a tensor (expert, out, in), or (expert, in, out), right below `experts`, or the
# two of Granite's and JetMoE's parallel experts. Experts with numbers have tensors of their own.
_EXPERTS = re.compile(r"experts\.(?!\d)(?!.*conv)|(^|\.)(input|output)_linear(\.weight)?$")


class Block(NamedTuple):
    """A slice of one tensor that is worked on by itself: `start:stop` along `axis`."""

    axis: int
    start: int
    stop: int

    def shape_in(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape in a tensor of this shape.

        One of several slices along the first of three axes is a matrix.
        """
        if not shape:
            return ()
        length = self.stop - self.start
        if len(shape) == 3 and self.axis == 0 and length == 1 < shape[0]:
            return shape[1:]
        return (*shape[: self.axis], length, *shape[self.axis + 1 :])


@dataclass(frozen=True, slots=True)
class Site:
    """The tensor a method is given, or the rows of it.

    Attributes:
        name: The reference's name of the tensor.
        shape: Shape of the whole tensor.
        start: Flat index, in the whole tensor, of the first entry given. Not 0 only for methods
            that are entry-wise there.
        transposed: Whether a matrix is stored (in, out), as GPT-2's Conv1D is.
        cores: Whether a method that needs adapters is given a matrix in the bases of all their
            factors (`MergeMethod.in_bases`), and not as it is.
    """

    name: str
    shape: tuple[int, ...]
    start: int = 0
    transposed: bool = False
    cores: bool = False

    @property
    def row_entries(self) -> int:
        """Entries of a row, along the last axis of the tensor as it is stored; of a vector all."""
        return self.shape[-1] if self.shape else 1

    @property
    def kind(self) -> TensorClass:
        """The class of the tensor."""
        return tensor_class(self.name, self.shape)

    def stacked_qkv(self) -> tuple[Block, ...]:
        """Three blocks for a fused Q, K, V weight, none for any other tensor.

        Fused weights are known by name (`in_proj_weight`, `c_attn`, `qkv`, `qkv_proj`, `Wqkv`) and
        by one dimension being three times the other: rows, or columns for the transposed Conv1D
        of GPT-2. `query_key_value` (GPT-NeoX, BLOOM, Falcon) interleaves heads and stays whole;
        so do grouped-query layouts.
        """
        return stacked_qkv(self.name, self.shape)


def stacked_qkv(name: str, shape: tuple[int, ...]) -> tuple[Block, ...]:
    """See `Site.stacked_qkv`."""
    if len(shape) != 2 or not _STACKED & {*name.split(".")}:
        return ()
    for axis, width, other in ((0, *shape), (1, *reversed(shape))):
        if width == 3 * other:
            return tuple(Block(axis, n * other, (n + 1) * other) for n in range(3))
    return ()


def stacked_matrices(name: str, shape: tuple[int, ...]) -> tuple[Block, ...]:
    """A block for each matrix of a stack of experts, none for any other tensor.

    By name and shape alone, which a convolution's kernel (out, in, width) does not meet; every
    codec and every method for matrices sees these matrices and not the stack.
    """
    if len(shape) != 3 or shape[0] < 2 or not _EXPERTS.search(name):
        return ()
    return tuple(Block(0, n, n + 1) for n in range(shape[0]))


def has_matrices(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix, or a stack of them."""
    return len(shape) == 2 or bool(stacked_matrices(name, shape))


def is_projection(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is an attention or MLP matrix: a linear layer inside a numbered block.

    Poolers and heads stand outside the blocks.
    """
    return tensor_class(name, shape) == "linear" and any(p.isdigit() for p in name.split("."))


def tensor_class(name: str, shape: tuple[int, ...]) -> TensorClass:
    """The class of a tensor, by its name and shape."""
    if len(shape) < 2:
        return "vector" if shape else "scalar"
    if len(shape) > 2:
        return "linear" if stacked_matrices(name, shape) else "conv"
    if _EMBEDDING.search(name) and not _LAYER_PROJECTION.search(name):
        return "embedding"
    return "linear"
