"""personae: merge fine-tuned models into one, or pack them into one model plus a little each."""

import importlib
from typing import TYPE_CHECKING, Any

from personae._version import __version__

if TYPE_CHECKING:
    from personae.checkpoints import open_checkpoint
    from personae.commands.analyse import analyse
    from personae.commands.compose import compose, open_composed
    from personae.commands.describe import describe
    from personae.commands.inspect import inspect
    from personae.commands.merge import merge
    from personae.commands.merge_plan import plan_merge
    from personae.commands.pack import add_tasks, pack, pack_many, remove_task
    from personae.commands.pack_plan import plan_pack, plan_shapes
    from personae.commands.packed import AMR, LazyExpert, Pack, PackedTask
    from personae.commands.state_dicts import merge_state_dicts
    from personae.commands.unpack import unpack
    from personae.commands.verify import verify
    from personae.commands.weighting import Weighting, weigh
    from personae.encoders import text_encoder
    from personae.errors import (
        BudgetError,
        CheckpointError,
        MethodError,
        OutputError,
        PackError,
        PersonaeError,
        RecipeError,
    )
    from personae.methods import CODECS, MERGE_METHODS, Codec, MergeMethod
    from personae.methods.codecs.bitdelta import BitDelta
    from personae.methods.codecs.delta_come import DeltaCoMe
    from personae.methods.codecs.dts import DTS
    from personae.methods.codecs.emr import EMR
    from personae.methods.codecs.svd import SVD
    from personae.methods.codecs.t_switch import TSwitch
    from personae.methods.codecs.tall_mask import TALLMask
    from personae.methods.codecs.tsv_c import TSVCompress
    from personae.methods.codecs.ultradelta import UltraDelta
    from personae.methods.merge.average import Average, average
    from personae.methods.merge.cart import CART, cart
    from personae.methods.merge.consensus import Consensus, consensus
    from personae.methods.merge.core_space import CoreSpace, core_space
    from personae.methods.merge.dare import DARE, dare
    from personae.methods.merge.dare_ties import DARETIES, dare_ties
    from personae.methods.merge.drm import DRM, drm
    from personae.methods.merge.iso_c import IsoC, iso_c
    from personae.methods.merge.iso_cts import IsoCTS, iso_cts
    from personae.methods.merge.karcher import Karcher, karcher
    from personae.methods.merge.knots import KnOTS, knots
    from personae.methods.merge.model_stock import ModelStock, model_stock
    from personae.methods.merge.slerp import SLERP, slerp
    from personae.methods.merge.task_arithmetic import TaskArithmetic, task_arithmetic
    from personae.methods.merge.ties import TIES, ties
    from personae.methods.merge.tsv_m import TSVM, tsv_m
    from personae.methods.merge.wudi import WUDI, wudi
    from personae.recipe import MergeSettings, PackSettings
    from personae.run.work import Work

# Names are looked up when first used: `import personae` alone costs nothing.
_HOMES = {
    "CODECS": "methods",
    "MERGE_METHODS": "methods",
    "MergeSettings": "recipe",
    "PackSettings": "recipe",
    "PersonaeError": "errors",
    "Average": "methods.merge.average",
    "average": "methods.merge.average",
    "CART": "methods.merge.cart",
    "cart": "methods.merge.cart",
    "Consensus": "methods.merge.consensus",
    "consensus": "methods.merge.consensus",
    "CoreSpace": "methods.merge.core_space",
    "core_space": "methods.merge.core_space",
    "DARE": "methods.merge.dare",
    "dare": "methods.merge.dare",
    "DARETIES": "methods.merge.dare_ties",
    "dare_ties": "methods.merge.dare_ties",
    "DRM": "methods.merge.drm",
    "drm": "methods.merge.drm",
    "IsoC": "methods.merge.iso_c",
    "iso_c": "methods.merge.iso_c",
    "IsoCTS": "methods.merge.iso_cts",
    "iso_cts": "methods.merge.iso_cts",
    "KnOTS": "methods.merge.knots",
    "SLERP": "methods.merge.slerp",
    "slerp": "methods.merge.slerp",
    "ModelStock": "methods.merge.model_stock",
    "model_stock": "methods.merge.model_stock",
    "Karcher": "methods.merge.karcher",
    "karcher": "methods.merge.karcher",
    "knots": "methods.merge.knots",
    "TaskArithmetic": "methods.merge.task_arithmetic",
    "task_arithmetic": "methods.merge.task_arithmetic",
    "TIES": "methods.merge.ties",
    "ties": "methods.merge.ties",
    "TSVM": "methods.merge.tsv_m",
    "tsv_m": "methods.merge.tsv_m",
    "WUDI": "methods.merge.wudi",
    "wudi": "methods.merge.wudi",
    "BitDelta": "methods.codecs.bitdelta",
    "DeltaCoMe": "methods.codecs.delta_come",
    "DTS": "methods.codecs.dts",
    "EMR": "methods.codecs.emr",
    "SVD": "methods.codecs.svd",
    "TSwitch": "methods.codecs.t_switch",
    "TALLMask": "methods.codecs.tall_mask",
    "TSVCompress": "methods.codecs.tsv_c",
    "UltraDelta": "methods.codecs.ultradelta",
    "BudgetError": "errors",
    "CheckpointError": "errors",
    "MethodError": "errors",
    "OutputError": "errors",
    "PackError": "errors",
    "RecipeError": "errors",
    "Codec": "methods",
    "MergeMethod": "methods",
    "merge_state_dicts": "commands.state_dicts",
    "AMR": "commands.packed",
    "LazyExpert": "commands.packed",
    "Pack": "commands.packed",
    "PackedTask": "commands.packed",
    "Work": "run.work",
    "Weighting": "commands.weighting",
    "add_tasks": "commands.pack",
    "analyse": "commands.analyse",
    "compose": "commands.compose",
    "describe": "commands.describe",
    "inspect": "commands.inspect",
    "merge": "commands.merge",
    "open_checkpoint": "checkpoints",
    "open_composed": "commands.compose",
    "pack": "commands.pack",
    "pack_many": "commands.pack",
    "plan_merge": "commands.merge_plan",
    "plan_pack": "commands.pack_plan",
    "plan_shapes": "commands.pack_plan",
    "remove_task": "commands.pack",
    "text_encoder": "encoders",
    "unpack": "commands.unpack",
    "verify": "commands.verify",
    "weigh": "commands.weighting",
}

__all__ = [
    "AMR",
    "CART",
    "CODECS",
    "DARE",
    "DARETIES",
    "DRM",
    "DTS",
    "EMR",
    "MERGE_METHODS",
    "SLERP",
    "SVD",
    "TIES",
    "TSVM",
    "WUDI",
    "Average",
    "BitDelta",
    "BudgetError",
    "CheckpointError",
    "Codec",
    "Consensus",
    "CoreSpace",
    "DeltaCoMe",
    "IsoC",
    "IsoCTS",
    "Karcher",
    "KnOTS",
    "LazyExpert",
    "MergeMethod",
    "MergeSettings",
    "MethodError",
    "ModelStock",
    "OutputError",
    "Pack",
    "PackError",
    "PackSettings",
    "PackedTask",
    "PersonaeError",
    "RecipeError",
    "TALLMask",
    "TSVCompress",
    "TSwitch",
    "TaskArithmetic",
    "UltraDelta",
    "Weighting",
    "Work",
    "__version__",
    "add_tasks",
    "analyse",
    "average",
    "cart",
    "compose",
    "consensus",
    "core_space",
    "dare",
    "dare_ties",
    "describe",
    "drm",
    "inspect",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "merge",
    "merge_state_dicts",
    "model_stock",
    "open_checkpoint",
    "open_composed",
    "pack",
    "pack_many",
    "plan_merge",
    "plan_pack",
    "plan_shapes",
    "remove_task",
    "slerp",
    "task_arithmetic",
    "text_encoder",
    "ties",
    "tsv_m",
    "unpack",
    "verify",
    "weigh",
    "wudi",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home.

    Raises:
        AttributeError: if there is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'personae' has no attribute '{name}'")
    return getattr(importlib.import_module(f"personae.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
