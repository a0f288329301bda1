"""personae: merge fine-tuned models into one, or pack them: one shared model plus a little each."""

import importlib
from functools import cache

from personae._version import __version__ as __version__

# Names are looked up when first used: `import personae` alone costs nothing, not even `re` or
# `typing`, so that the command line hears Ctrl-C soon. Types are in the stub beside this file,
# which `make docs` writes.
_HOMES = {
    "open_checkpoint": "checkpoints",
    "analyse": "commands.analyse",
    "check": "commands.check",
    "compose": "commands.compose",
    "open_composed": "run.composed",
    "describe": "commands.describe",
    "diff": "commands.diff",
    "export": "commands.export",
    "inspect": "commands.inspect",
    "merge": "commands.merge",
    "plan_merge": "commands.merge_plan",
    "add_tasks": "commands.pack",
    "pack": "commands.pack",
    "pack_many": "commands.pack",
    "remove_task": "commands.pack",
    "plan_pack": "commands.pack_plan",
    "plan_shapes": "commands.pack_plan",
    "AMR": "commands.packed",
    "LazyExpert": "commands.packed",
    "Pack": "commands.packed",
    "PackedTask": "commands.packed",
    "merge_state_dicts": "commands.state_dicts",
    "unpack": "commands.unpack",
    "verify": "commands.verify",
    "OutputChange": "evaluate.outputs",
    "output_change": "evaluate.outputs",
    "Suite": "evaluate.suite",
    "evaluate_suite": "evaluate.suite_records",
    "read_suite": "evaluate.suite",
    "Trial": "evaluate.tuning",
    "Tuned": "evaluate.tuning",
    "tune_suite": "evaluate.tuning",
    "Weighting": "packs.weighting",
    "weigh": "packs.weighting",
    "text_encoder": "encoders",
    "BudgetError": "errors",
    "CheckpointError": "errors",
    "MethodError": "errors",
    "OutputError": "errors",
    "PackError": "errors",
    "PersonaeError": "errors",
    "RecipeError": "errors",
    "CODECS": "methods",
    "Codec": "methods",
    "LEARNED_METHODS": "methods",
    "LearnedMethod": "methods",
    "MERGE_METHODS": "methods",
    "MergeMethod": "methods",
    "RoutedModel": "methods",
    "MergeSettings": "recipe",
    "PackSettings": "recipe",
    "Work": "run.work",
    "Runtime": "runtime.loaded",
    "load": "runtime.loading",
}
_METHOD = r"(?ms)^@(?:merge_method|codec|learned_method)\(.*?^class (\w+)|^(\w+) = as_\w*function\("


@cache
def _homes() -> dict[str, str]:
    """The module of each public name; those of methods and codecs are read from their files."""
    import re
    from pathlib import Path

    found: dict[str, str] = {}
    for kind in ("merge", "codecs", "learned"):
        for path in sorted(Path(__file__).parent.glob(f"methods/{kind}/[!_]*.py")):
            for cls, function in re.findall(_METHOD, path.read_text("utf-8")):
                found[cls or function] = f"methods.{kind}.{path.stem}"
    return found | _HOMES


def __getattr__(name: str) -> object:
    """Import a public name from its home.

    Raises:
        AttributeError: if there is no such name.
    """
    if name == "__all__":
        return __dir__()
    if name not in _homes():
        raise AttributeError(f"module 'personae' has no attribute '{name}'")
    return getattr(importlib.import_module(f"personae.{_homes()[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*_homes(), "__version__"])
