"""personae: merge fine-tuned models into one, or pack them into one model plus a little each."""

import importlib
from typing import TYPE_CHECKING, Any

from personae._version import __version__

if TYPE_CHECKING:
    from personae.checkpoints import open_checkpoint
    from personae.encoders import text_encoder
    from personae.errors import PersonaeError
    from personae.execute.analyse import analyse
    from personae.execute.compose import compose, open_composed
    from personae.execute.describe import describe
    from personae.execute.inspect import inspect
    from personae.execute.merge import merge
    from personae.execute.merge_plan import plan_merge
    from personae.execute.pack import add_tasks, pack, pack_many, remove_task
    from personae.execute.pack_plan import plan_pack, plan_shapes
    from personae.execute.unpack import unpack
    from personae.execute.verify import verify
    from personae.execute.weighting import Weighting, weigh
    from personae.execute.work import Work
    from personae.methods import CODECS, MERGE_METHODS
    from personae.recipe import MergeSettings, PackSettings

# Names are looked up when first used: `import personae` alone costs nothing.
_HOMES = {
    "CODECS": "methods",
    "MERGE_METHODS": "methods",
    "MergeSettings": "recipe",
    "PackSettings": "recipe",
    "PersonaeError": "errors",
    "Work": "execute.work",
    "Weighting": "execute.weighting",
    "add_tasks": "execute.pack",
    "analyse": "execute.analyse",
    "compose": "execute.compose",
    "describe": "execute.describe",
    "inspect": "execute.inspect",
    "merge": "execute.merge",
    "open_checkpoint": "checkpoints",
    "open_composed": "execute.compose",
    "pack": "execute.pack",
    "pack_many": "execute.pack",
    "plan_merge": "execute.merge_plan",
    "plan_pack": "execute.pack_plan",
    "plan_shapes": "execute.pack_plan",
    "remove_task": "execute.pack",
    "text_encoder": "encoders",
    "unpack": "execute.unpack",
    "verify": "execute.verify",
    "weigh": "execute.weighting",
}

__all__ = [
    "CODECS",
    "MERGE_METHODS",
    "MergeSettings",
    "PackSettings",
    "PersonaeError",
    "Weighting",
    "Work",
    "__version__",
    "add_tasks",
    "analyse",
    "compose",
    "describe",
    "inspect",
    "merge",
    "open_checkpoint",
    "open_composed",
    "pack",
    "pack_many",
    "plan_merge",
    "plan_pack",
    "plan_shapes",
    "remove_task",
    "text_encoder",
    "unpack",
    "verify",
    "weigh",
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
