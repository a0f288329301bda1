"""LoRA factors without PEFT's configuration, as trainers of image models and state dicts have them.

The names of `lora_down`/`lora_up`, `lora.down`/`lora.up` or `lora_A`/`lora_B` tell which weight is
adapted, and a number beside them, `alpha`, how the product is scaled: by alpha / rank. With both
the file is an adapter as any other. Without, it is refused: factors are never merged one by one, as
the product of means is not the mean of products.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.adapter import Adapter
from personae.checkpoints.adapter_files import (
    CONFIG_FILE,
    Adapted,
    AdapterConfig,
    StoredPair,
    kept_pair,
)
from personae.checkpoints.adapter_fit import NAMES_DIFFER, is_transposed
from personae.checkpoints.adapter_ties import check_same
from personae.checkpoints.naming import shown
from personae.checkpoints.specs import empty_fault
from personae.errors import CheckpointError, Faults

_FACTOR = re.compile(
    r"(?P<module>.+)[._]lora[._](?P<embedding>embedding_)?(?P<side>down|up|A|B)(\.default)?(\.weight)?"
)
# What other kinds of adapters hold (LoHa, LoKr, Tucker's middle, DoRA, OFT).
_OTHER_KIND = re.compile(
    r"[._](hada_[wt]\d\w*|lokr_[wt]\d\w*|lora_mid|dora_scale|lora_magnitude_vector|oft_\w+)(\.|$)"
)
_ALPHA = ".alpha"


def holds_factors(names: Iterable[str]) -> bool:
    """Whether tensors of these names are factors of an adapter."""
    return any(_FACTOR.fullmatch(name) or _OTHER_KIND.search(name) for name in names)


def open_raw_lora(tensors: Checkpoint, base: Checkpoint | None) -> Adapter:
    """Fit factors to their base by names, shapes and the alphas stored beside them.

    Args:
        tensors: The factors as they are stored.
        base: The model they were trained on.

    Raises:
        CheckpointError: Base or scaling are not known, or they do not fit; every fault at once.
    """
    pairs, beside, faults = _sorted(tensors)
    empty = [name for name, spec in tensors.specs.items() if not spec.numel]
    if empty:
        faults.add(empty_fault(tensors.source, empty))
    stored = tensors.specs.keys() | tensors.tied.keys()
    unscaled = [pair.module for pair in pairs if f"{pair.module}{_ALPHA}" not in stored]
    if base is None:
        faults.add(
            f"{tensors.source} holds LoRA factors, not a model: give it as an expert of the model "
            "it was trained on."
        )
    if beside:
        faults.add(
            f"{tensors.source} holds LoRA factors beside other tensors: {shown(beside)}. Merge "
            "them into the weights (PEFT: merge_and_unload) and pass the result."
        )
    elif unscaled:
        faults.add(
            f"{tensors.source} holds LoRA factors but not how they are scaled: no alpha for "
            f"{shown(unscaled)}. Pass the adapter's directory if it has an {CONFIG_FILE} (with r "
            "and lora_alpha), save it with one, or merge it into its base and pass the result."
        )
    faults.raise_if_any(CheckpointError)
    assert base is not None
    names = (*base.specs, *base.tied)
    targets = _targets([pair.module for pair in pairs], names, tensors.source, faults)
    adapted: dict[str, Adapted] = {}
    for pair in pairs if targets else ():
        kept = base.tied.get(targets[pair.module], targets[pair.module])
        how = _fit(pair, kept, tensors, base.specs, faults)
        if kept in adapted:
            check_same(tensors, adapted[kept], how, faults)
        adapted[kept] = how
    faults.raise_if_any(CheckpointError)
    unsaid = AdapterConfig(peft_type="LORA", r=1, lora_alpha=1.0)  # each pair has its own scaling
    places = {name: (name,) for name in adapted}  # their own names are not those in memory
    return Adapter(tensors, base, adapted, {}, unsaid, places)


def _sorted(tensors: Checkpoint) -> tuple[list[StoredPair], list[str], Faults]:
    """Pairs by module, the names of what is neither a factor nor an alpha, and faults."""
    faults = Faults()
    sides: dict[str, dict[str, str]] = {}
    embeddings, others, beside = set[str](), list[str](), list[str]()
    for name in (*tensors.specs, *tensors.tied):
        found = _FACTOR.fullmatch(name)
        if _OTHER_KIND.search(name):
            others.append(name)
        elif found:
            side = {"down": "A", "up": "B"}.get(found["side"], found["side"])
            sides.setdefault(found["module"], {})[side] = name
            if found["embedding"]:
                embeddings.add(found["module"])
        elif not name.endswith(_ALPHA):
            beside.append(name)
    if others:
        faults.add(
            f"{tensors.source} is an adapter of another kind than plain LoRA: {shown(others)}. "
            "Merge it into its base with the tool that made it, and pass the result."
        )
    lone = [next(iter(both.values())) for both in sides.values() if len(both) != 2]
    if lone:
        faults.add(f"{tensors.source}: without its other factor: {shown(lone)}. Save it again.")
    pairs = [
        kept_pair(StoredPair(module, both["A"], both["B"], module in embeddings), tensors.tied)
        for module, both in sorted(sides.items())
        if len(both) == 2
    ]
    return pairs, beside, faults


def _targets(
    modules: Collection[str], names: Collection[str], where: str, faults: Faults
) -> dict[str, str]:
    """The base's weight for each module: the same name with dots as underscores, but one prefix."""
    weights = [name for name in names if name.endswith(".weight")]
    known = {_flat(name.removesuffix(".weight")): name for name in weights}
    wanted = {module: _flat(module) for module in modules}
    first = next(iter(wanted.values()))
    cut = ["", *(first[: at.end()] for at in re.finditer("_", first))]
    put = [name.removesuffix(first) for name in known if name.endswith(f"_{first}")]
    renamed = [{m: n.removeprefix(prefix) for m, n in wanted.items()} for prefix in cut]
    renamed += [{m: prefix + n for m, n in wanted.items()} for prefix in put]
    fitting = [names for names in renamed if known.keys() >= set(names.values())]
    fitting = fitting[:1] if fitting and fitting[0] is renamed[0] else fitting  # as they are
    if len(fitting) == 1 and len(known) == len(weights):
        return {module: known[name] for module, name in fitting[0].items()}
    best = max(renamed, key=lambda names: sum(name in known for name in names.values()))
    lost = [module for module, name in best.items() if name not in known]
    if lost:
        faults.add(
            f"{where} adapts modules that the base does not have: {shown(lost)}. {NAMES_DIFFER}"
        )
    else:
        faults.add(
            f"{where} matches the base in two ways. Rename its modules as the base has them."
        )
    return {}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _fit(
    pair: StoredPair,
    name: str,
    tensors: Checkpoint,
    specs: Mapping[str, TensorSpec],
    faults: Faults,
) -> Adapted:
    """Scaling and layout of one adapted weight, noting what does not fit."""
    a, b = tensors.specs[pair.a].shape, tensors.specs[pair.b].shape
    transposed = is_transposed(name, specs, a, b, embedding=pair.embedding, fan_in_fan_out=False)
    key = f"{pair.module}{_ALPHA}"
    key = tensors.tied.get(key, key)
    alpha = float(tensors.read(key)) if tensors.specs[key].numel == 1 else math.nan
    if transposed is None:
        faults.add(
            f"{tensors.source}: factors {a} and {b} of '{pair.module}' do not fit '{name}' of the "
            f"base, {specs[name].shape}. Pass the model it was trained on."
        )
    if not all(tensors.specs[side].is_floating for side in (pair.a, pair.b)):
        faults.add(
            f"{tensors.source}: the factors of '{pair.module}' are not floating-point numbers."
        )
    if not math.isfinite(alpha):
        faults.add(f"{tensors.source}: '{key}' is not a finite number. Save the adapter again.")
    return Adapted(pair, alpha / max(a[0] if a else 0, 1), bool(transposed))
