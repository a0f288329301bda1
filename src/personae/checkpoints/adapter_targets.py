"""Which weight each pair of factors is for: a module's, or a parameter that PEFT was told of.

PEFT's `target_parameters` names parameters instead of modules, as the stacked experts of a mixture
are. The file then names the module alone, once for each parameter of it, one wrapped in the other:
`experts.base_layer.lora_A` is of the parameter that the module has first, `experts.lora_A` of the
next one. See `ParamWrapper` in PEFT's `tuners/lora/layer.py`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.adapter_files import AdapterConfig, StoredPair
from personae.checkpoints.built import BuiltModel, build
from personae.checkpoints.configuration import CONFIG, class_of
from personae.checkpoints.modules import read_auxiliary_file
from personae.errors import Faults

_MOST_NESTED = 6
_SINCE = (0, 19, 1)
"""The first version of PEFT that takes stacks for (experts, out, in) unless a class says else."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A pair of factors, and what it is for.

    Attributes:
        pair: The factors.
        name: The weight, as the adapter calls it.
        key: What PEFT looks up in its patterns: a module, or a parameter's whole name.
    """

    pair: StoredPair
    name: str
    key: str

    @property
    def of_parameter(self) -> bool:
        """Whether PEFT adapts the parameter, in whatever module it is."""
        return self.key == self.name


def find_targets(
    config: AdapterConfig,
    pairs: Sequence[StoredPair],
    known: Iterable[str],
    where: str,
    faults: Faults,
) -> list[Target]:
    """What each pair is for; of several in one module, which is which is open (see `in_order`).

    Args:
        config: What the adapter says of itself.
        pairs: Its factors.
        known: Names of the base, which need not be alike in their beginnings.
        where: The adapter, for texts.
        faults: Where modules with more pairs than parameters are noted, or fewer.
    """
    modules: dict[str, list[StoredPair]] = {}
    for pair in pairs:
        modules.setdefault(pair.module, []).append(pair)
    ends = {".".join(name.split(".")[-2:]) for name in known}
    targets: list[Target] = []
    for module, own in modules.items():
        named = config.parameters_of(module)
        held = [name for name in named if f"{module.rpartition('.')[2]}.{name}" in ends]
        if len(named) > len(own):
            named = held
        listed = config.target_parameters or ()
        # A name without a module is of every module that has such a parameter, and of no other.
        named = [name for name in named if name in held or name not in listed]
        if not named and len(own) == 1:
            targets.append(Target(own[0], f"{module}.weight", module))
        elif len(named) == len(own):
            inner_first = sorted(own, key=lambda pair: -pair.inside)
            names = [f"{module}.{name}" for name in named]
            targets += map(Target, inner_first, names, names)
        else:
            faults.add(
                f"{where} adapts {len(own)} parameters of '{module}', and target_parameters names "
                f"{len(named)} of it that the base may have: {', '.join(named) or 'none'}. Name "
                "in target_parameters those that it adapts."
            )
    return targets


class Parts:
    """What transformers tells of the modules of a base; asked only when needed, as it is slow."""

    def __init__(self, base: Checkpoint) -> None:
        """Take the base; builds nothing."""
        self._base = base
        self._built: BuiltModel | None = None
        self._asked = False

    @property
    def built(self) -> BuiltModel | None:
        """The base's class; None where transformers does not know it.

        Raises:
            CheckpointError: The config.json is damaged.
        """
        if not self._asked:
            config = read_auxiliary_file(self._base.auxiliary_files, CONFIG)
            if isinstance(config, dict):
                self._built = build(config, class_of(config))
            self._asked = True
        return self._built

    def parameters_in(self, module: str) -> list[str]:
        """Names of a module's own parameters, in its order; none where that is not known."""
        names = () if self.built is None else self.built.parameters
        found = [n.rpartition(".") for n in names]
        return [last for around, _, last in found if _alike(around, module)]

    def holds_in_out(self, module: str) -> bool | None:
        """Whether a module holds stacks of (in, out) matrices; None where that is not known."""
        if self.built is None or not any(_alike(name, module) for name in self.built.modules):
            return None
        return any(_alike(name, module) for name in self.built.stacked_in_out)


def _alike(one: str, other: str) -> bool:
    """Whether two names of modules differ in a prefix at most."""
    return bool(one) and (f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}"))


def in_order(
    targets: Sequence[Target],
    shapes: Callable[[Target], tuple[Shape, Shape, Shape | None]],
    base: Parts,
    where: str,
    faults: Faults,
) -> list[Target]:
    """Targets with the parameters of each module given to its pairs.

    Shapes tell which is which, or else the order in which transformers has them in the module.

    Args:
        targets: As `find_targets` gives them.
        shapes: Of A, of B, and of the weight; None where the base lacks that.
        base: What is known of the base.
        where: The adapter, for texts.
        faults: Where pairs are noted of which nothing tells for which parameter they are.
    """
    modules: dict[str, list[Target]] = {}
    for target in targets:
        modules.setdefault(target.pair.module, []).append(target)
    found: list[Target] = []
    for module, own in modules.items():
        if len(own) == 1 or len(own) > _MOST_NESTED:
            found += own
            continue
        ways = [
            [Target(t.pair, n, n) for t, n in zip(own, names, strict=True)]
            for names in permutations([target.name for target in own])
        ]
        fitting = [way for way in ways if all(map(_fits, map(shapes, way)))]
        if len(fitting) > 1:
            order = base.parameters_in(module)
            fitting = [way for way in fitting if [t.name.split(".")[-1] for t in way] == order]
        if not fitting and any(all(map(_fits, map(shapes, way))) for way in ways):
            faults.add(
                f"{where} adapts several parameters of '{module}' that are alike, and transformers "
                "does not tell which comes first. Merge the adapter into its base with PEFT and "
                "pass the result."
            )
        found += fitting[0] if fitting else own
    return found


def _fits(shapes: tuple[Shape, Shape, Shape | None]) -> bool:
    a, b, weight = shapes
    return weight is None or any(ways_round(a, b, weight))


def ways_round(a: Shape, b: Shape, weight: Shape) -> tuple[bool, bool]:
    """Whether factors fit a parameter as (…, out, in), and whether as (matrix, in, out).

    Args:
        a: Shape of A, (matrix * rank, in).
        b: Shape of B, (out, rank * matrix).
        weight: Shape of the parameter, a matrix or a stack of them.
    """
    if len(a) != 2 or len(b) != 2 or len(weight) not in (2, 3) or a[0] != b[1]:
        return False, False
    *stack, rows, columns = weight
    matrices = stack[0] if stack else 1
    if a[0] % max(matrices, 1):
        return False, False
    straight, crossed = (b[0], a[1]) == (rows, columns), (a[1], b[0]) == (rows, columns)
    return straight, crossed and matrices > 1


def stack_is_crossed(
    target: Target, config: AdapterConfig, ways: tuple[bool, bool], base: Parts
) -> bool | None:
    """Whether the product of a stack is transposed; None where nothing tells.

    Where matrices are square, it goes by the class, as PEFT does it: before 0.19.1 it took stacks
    otherwise, and which version an adapter is of only its configuration tells.

    Raises:
        CheckpointError: The base's config.json is damaged.
    """
    straight, crossed = ways
    if not (straight and crossed):
        return crossed
    if _version(config.peft_version) < _SINCE:
        return None
    return base.holds_in_out(target.pair.module)


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d{1,9}", text or "")[:3]))
