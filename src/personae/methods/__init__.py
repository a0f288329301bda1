"""Every method, by importing every file: a new method is one file and nothing else."""

import importlib
import pkgutil

from personae.methods import merge, personalise
from personae.methods._registry import (
    CODECS,
    MERGE_METHODS,
    Bits,
    Block,
    Codec,
    CodecEntry,
    MergeMethod,
    Parameters,
    Pass,
    build,
    lookup,
)

for _package in (merge, personalise):
    for _module in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_module.name}")

__all__ = [
    "CODECS",
    "MERGE_METHODS",
    "Bits",
    "Block",
    "Codec",
    "CodecEntry",
    "MergeMethod",
    "Parameters",
    "Pass",
    "build",
    "lookup",
]
