"""What a PEFT LoRA adapter says: its configuration, and which stored tensor is for what.

Rules (scaling, patterns, names of stored tensors) are those of PEFT's LoRA,
https://huggingface.co/docs/peft/package_reference/lora
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from personae._small_files import Unfit, read_json
from personae.errors import CheckpointError, Faults

CONFIG_FILE = "adapter_config.json"

_ROOT = "base_model.model."
_PAIRED = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?"
)
# Layers PEFT wraps around a module whose own tensors it stores.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
_AROUND = re.compile(r"\.base_layer(?=$|\.base_layer)")
# Each of these changes what the stored tensors mean, so that base + left @ right would be wrong.
_NOT_STATIC_LORA = (
    "use_dora",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "megatron_config",
)
# Alpha is divided by the rank.
Rank = Annotated[int, Field(ge=1, le=1 << 30)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]
# Patterns come from anybody, and matching tries every choice that one leaves with every other.
_LONGEST_PATTERN, _MOST_GROUPS, _MOST_REPEATS = 500, 3, 2
_LITERAL = re.compile(r"\\.|\[\^?\]?[^\]]*\]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterConfig(BaseModel):
    """The fields of `adapter_config.json` that decide the merged weight."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    bias: str = "none"
    r: Rank
    lora_alpha: Alpha
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    init_lora_weights: bool | str | None = True
    peft_version: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None

    @property
    def model_class(self) -> str | None:
        """The class that was adapted, or PEFT's type of its task; None if neither is said."""
        return self.task_type or (self.auto_mapping or {}).get("base_model_class")

    def rank(self, target: str) -> int:
        """Return the rank of a module that was adapted, or of a parameter by its whole name."""
        return _matched(self.rank_pattern, target, self.r)

    def scaling(self, target: str) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA."""
        rank = self.rank(target)
        divisor = math.sqrt(rank) if self.use_rslora else rank
        return _matched(self.alpha_pattern, target, self.lora_alpha) / divisor

    def parameters_of(self, module: str) -> list[str]:
        """What PEFT was told to adapt of a module's own parameters; none if it adapts modules."""
        parts = module.split(".")
        ends = [".".join(parts[first:]) for first in range(len(parts) + 1)]
        return sorted({name for end in ends for name in self._parameters.get(end, ())})

    @cached_property
    def _parameters(self) -> dict[str, list[str]]:
        """Names of parameters by how the module that they are in ends; '' for any."""
        found: dict[str, list[str]] = {}
        for name in self.target_parameters or ():
            module, _, parameter = name.rpartition(".")
            found.setdefault(module, []).append(parameter)
        return found

    def saves(self, module: str) -> bool:
        """Whether a module was trained and stored in full, by itself or inside one that was.

        PEFT goes by how names end: `classifier` also saves DistilBERT's `pre_classifier`.
        """
        return any(f"{name}." in f"{module}." for name in self.modules_to_save or ())


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read `adapter_config.json`, refusing every kind of adapter that is not plain LoRA.

    Raises:
        CheckpointError: It is damaged or not plain LoRA; every fault at once.
    """
    faults = Faults()
    content: Any = None
    config: AdapterConfig | None = None
    try:
        content = read_json(path)
        config = AdapterConfig.model_validate(content)
    except ValidationError as error:
        for problem in error.errors():
            field = ".".join(map(str, problem["loc"]))
            if field == "peft_type" and problem["type"] != "missing":
                faults.add(
                    f"{path}: 'peft_type' is {problem['input']!r}. Only LoRA adapters are read; "
                    "merge any other into its base with PEFT and pass the result."
                )
            elif problem["type"] == "missing":
                faults.add(f"{path}: '{field}' is missing. Copy it again, or write what it was.")
            else:
                why = problem["msg"].removeprefix("Value error, ")
                faults.add(f"{path}: '{field}' is {problem['input']!r}: {why}. Copy it again.")
    except Unfit as error:
        raise CheckpointError(f"{path} {error}. Copy or download it again.") from error
    fields: dict[str, Any] = content if isinstance(content, dict) else {}
    for field in _NOT_STATIC_LORA:
        if fields.get(field):
            faults.add(
                f"{path}: '{field}' is {fields[field]!r}, which is not plain LoRA. Merge the "
                "adapter into its base with PEFT and pass the result; where an adapter is wanted, "
                "make one of that: personae export MODEL --base BASE --out DIR."
            )
    if config is not None and config.init_lora_weights not in _HARMLESS_INITS:
        faults.add(
            f"{path}: 'init_lora_weights' is {config.init_lora_weights!r}, which also changes the "
            "base's weights. Convert it to plain LoRA with PEFT, or merge it and pass the result."
        )
    faults.raise_if_any(CheckpointError)
    assert config is not None
    return config


@dataclass(frozen=True)
class StoredPair:
    """The stored names of one module's A and B.

    Attributes:
        module: The module.
        a: Name of A.
        b: Name of B.
        embedding: Whether they are of an embedding.
        inside: How many other pairs of the module are around this one: PEFT wraps a module once
            for each of its parameters that it adapts, the first of them first.
    """

    module: str
    a: str
    b: str
    embedding: bool
    inside: int = 0


@dataclass(frozen=True)
class Adapted:
    """How one weight is adapted: scaling * B @ A, transposed where the base stores (in, out).

    Attributes:
        pair: A and B. Of a stack of matrices, A is that of each below the other, (matrix rank, in);
            of B, (out, rank matrix), the matrix is the inner one of the two.
        scaling: Multiplier of the product.
        transposed: Whether it is transposed.
        matrices: How many there are in a stack; None if the weight is none.
    """

    pair: StoredPair
    scaling: float
    transposed: bool
    matrices: int | None = None


def kept_pair(pair: StoredPair, tied: Mapping[str, str]) -> StoredPair:
    """The pair by the names that are stored: modules may share a factor, which is kept once."""
    return replace(pair, a=tied.get(pair.a, pair.a), b=tied.get(pair.b, pair.b))


def sort_stored(
    stored: Collection[str], where: str, faults: Faults
) -> tuple[list[StoredPair], dict[str, str]]:
    """Tell LoRA pairs from tensors stored in full.

    Args:
        stored: Names in the adapter's weights file.
        where: That file, for texts.
        faults: Where unknown and unpaired tensors are noted.

    Returns:
        The pairs by module, and full tensors as model name to stored name. A wrapped module's
        untouched original is left out.
    """
    sides: dict[tuple[str, bool], dict[str, str]] = {}
    full: dict[str, str] = {}
    for key in sorted(stored):
        name = key.removeprefix(_ROOT)
        paired = _PAIRED.fullmatch(name)
        if paired:
            sides.setdefault((paired["module"], bool(paired["embedding"])), {})[paired["side"]] = (
                key
            )
        elif ".lora_" in name or "token_adapter" in name:
            faults.add(f"{where}: '{key}' is not part of plain LoRA. Merge the adapter with PEFT.")
        elif ".original_module." not in name:
            full[_WRAPPED.sub("", name)] = key
    pairs = [
        StoredPair(
            _WRAPPED.sub("", f"{module}.")[:-1],
            both["A"],
            both["B"],
            embedding,
            len(_AROUND.findall(module)),
        )
        for (module, embedding), both in sorted(sides.items())
        if len(both) == 2
    ]
    for (module, _), both in sorted(sides.items()):
        if len(both) != 2:
            faults.add(f"{where}: '{module}' has only lora_{'/'.join(both)}. Save it again.")
    return pairs, full


def _matched(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that the end of the module's name matches.

    Raises:
        CheckpointError: A pattern is not a regular expression.
    """
    for key, value in (pattern or {}).items():
        if _compiled(key).match(module):
            return value
    return default


@lru_cache(1 << 14)
def _compiled(key: str) -> re.Pattern[str]:
    """A pattern of ends of modules' names.

    Raises:
        CheckpointError: It is not a regular expression, or one that may take for ever.
    """
    bare = _LITERAL.sub("x", key)
    choices = Counter(bare)
    repeats = sum(choices[letter] for letter in "*+{")
    if (
        len(key) > _LONGEST_PATTERN
        or _REPEATED_GROUP.search(bare)
        or repeats > _MOST_REPEATS
        or choices["("] > _MOST_GROUPS
        or choices["?"] > 2 * _MOST_GROUPS
    ):
        raise CheckpointError(
            f"{CONFIG_FILE}: the pattern {key[:80]!r} may take too long to match: expected at most "
            f"{_LONGEST_PATTERN} characters, {_MOST_GROUPS} groups and {_MOST_REPEATS} repeats, "
            "and no group repeated. List the modules by name."
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{CONFIG_FILE}: the pattern {key!r} is not a regular expression ({error})."
        ) from error
