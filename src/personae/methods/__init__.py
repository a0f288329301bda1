"""Every method, by importing every file: a new method is one file and nothing else."""

import importlib
import pkgutil

from personae.methods import codecs, learned, merge, mergekit
from personae.methods._batches import Batch, limited
from personae.methods._blocks import block_bits, block_layout, decode_block, encode_block, misfits
from personae.methods._codec import Bits, Codec, Context, Treatment, decompose_touched
from personae.methods._deltas import (
    BLOCK,
    INFINITY,
    ROUNDS_TO_INFINITY,
    DeltaBlocks,
    NotFinite,
    as_stored,
    joined,
    stored_bytes,
)
from personae.methods._entries import MOST_TOLD, Undecided
from personae.methods._experts import Experts, Weights
from personae.methods._features import Pool, features
from personae.methods._learned import LearnedMerge, LearnedMethod, LearnedRouting
from personae.methods._merge import (
    Entrywise,
    Factors,
    Given,
    MergeMethod,
)
from personae.methods._method import (
    Parameters,
    Pass,
    Passes,
    Statistics,
    flag_fault,
    numbers,
    percent_hint,
    scalars,
    statistics_of,
)
from personae.methods._registry import (
    ALIASES,
    CODECS,
    LEARNED_METHODS,
    MERGE_METHODS,
    MERGEKIT_METHODS,
    METHODS_BY_CONVENTIONS,
    Conventions,
    build,
    lookup,
)
from personae.methods._routed import MixedModel, RoutedModel
from personae.methods._routers import Choice, NearestNeighbours, Voting
from personae.methods._site import Block, Site, has_matrices, stacked_matrices

for _package in (codecs, learned, merge, mergekit):
    for _module in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_module.name}")

__all__ = [
    "ALIASES",
    "BLOCK",
    "CODECS",
    "INFINITY",
    "LEARNED_METHODS",
    "MERGEKIT_METHODS",
    "MERGE_METHODS",
    "METHODS_BY_CONVENTIONS",
    "MOST_TOLD",
    "ROUNDS_TO_INFINITY",
    "Batch",
    "Bits",
    "Block",
    "Choice",
    "Codec",
    "Context",
    "Conventions",
    "DeltaBlocks",
    "Entrywise",
    "Experts",
    "Factors",
    "Given",
    "LearnedMerge",
    "LearnedMethod",
    "LearnedRouting",
    "MergeMethod",
    "MixedModel",
    "NearestNeighbours",
    "NotFinite",
    "Parameters",
    "Pass",
    "Passes",
    "Pool",
    "RoutedModel",
    "Site",
    "Statistics",
    "Treatment",
    "Undecided",
    "Voting",
    "Weights",
    "as_stored",
    "block_bits",
    "block_layout",
    "build",
    "decode_block",
    "decompose_touched",
    "encode_block",
    "features",
    "flag_fault",
    "has_matrices",
    "joined",
    "limited",
    "lookup",
    "misfits",
    "numbers",
    "percent_hint",
    "scalars",
    "stacked_matrices",
    "statistics_of",
    "stored_bytes",
]
