"""Matrices for tests of methods that decompose them."""

import numpy as np
import torch
from torch import Tensor

from personae.methods import MERGE_METHODS, Site, build

Array = np.ndarray
Factors = list[tuple[Tensor, Tensor]]


def diagonal(*rows: list[float]) -> Tensor:
    """Stacked diagonal matrices, one a row."""
    return torch.stack([torch.tensor(row).diag() for row in rows])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapters(experts: int, out: int, into: int, rank: int, seed: int = 0) -> Factors:
    """LoRA factors of as many experts."""
    lefts, rights = gaussian(experts, out, rank, seed=seed), gaussian(experts, rank, into, seed=9)
    return list(zip(lefts, rights, strict=True))


def products(factors: Factors) -> Tensor:
    return torch.stack([left @ right for left, right in factors])


def merge_factors(method: str, factors: Factors, name: str = "a.weight", **settings) -> Tensor:
    """Merge one tensor given as factors."""
    entry = MERGE_METHODS[method]
    site = Site(name, (factors[0][0].shape[0], factors[0][1].shape[1]))
    return build(entry, settings).merge_factors(factors, site=site)


def polar(matrix: Array) -> Array:
    """U Vᵀ by LAPACK; for matrices of full rank."""
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def leading(matrix: Array, rank: int) -> tuple[Array, Array, Array]:
    """The leading singular triplets by LAPACK."""
    u, values, vh = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], values[:rank], vh[:rank]
