"""Names: of tasks, and of tensors under wrappers, prefixes and patterns."""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import filter as fnfilter
from fnmatch import fnmatchcase
from pathlib import Path

from personae._types import TensorSpec
from personae.checkpoints.renames import by_canonical, canonical
from personae.errors import Faults

_WRAPPERS = ("module", "_orig_mod")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+@.+")
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Renaming:
    """How reference names become the expert's: one prefix added, removed or put for another.

    Attributes:
        add: Prefix put before a reference name.
        strip: Prefix removed from a reference name.
        plain: Reference names the rule does not apply to; the expert uses them as they are.
        given: Reference names to the expert's, where no prefix tells it: a model of another class
            may not load what the base's class does under the base's names.
        wrapper: Wrapper segments found in the expert's file and left out for good.
    """

    add: str = ""
    strip: str = ""
    plain: frozenset[str] = frozenset()
    given: Mapping[str, str] = field(default_factory=dict[str, str])
    wrapper: str = ""

    def expert_name(self, reference_name: str) -> str:
        """The expert's name (without wrapper) of a reference tensor."""
        if reference_name in self.given:
            return self.given[reference_name]
        if reference_name in self.plain:
            return reference_name
        return self.add + reference_name.removeprefix(self.strip)


def shown(names: Sequence[str]) -> str:
    """The first few names of a list, and how many there are in all."""
    listed = ", ".join(names[:_MOST_SHOWN])
    rest = len(names) - _MOST_SHOWN
    return f"{listed} and {rest} more" if rest > 0 else listed


def patterns(names: Collection[str], others: Collection[str]) -> str:
    """Few patterns, as YAML, that fit all of these names and none of the others.

    Examples:
        >>> patterns(["h.0.attn.bias", "h.1.attn.bias"], ["h.0.mlp.bias"])
        '["h.*.attn.bias"]'
        >>> patterns(["lm_head.weight", "lm_head.bias", "norm"], ["h.0.weight"])
        '["lm_head.*", "norm"]'
    """
    left, chosen = dict.fromkeys(names), list[str]()
    others = set(others) - left.keys()
    while left:
        covered = Counter(pattern for name in left for pattern in _patterns_of(name))
        # Of those that fit as many, the longest says most.
        ranked = sorted(covered, key=lambda pattern: (-covered[pattern], -len(pattern), pattern))
        best = next(p for p in ranked if p in left or not fnfilter(others, p))
        best = next(iter(left)) if covered[best] == 1 else best
        fitting = {best, *fnfilter(left, best)}
        left = {name: None for name in left if name not in fitting}
        chosen.append(best)
    return json.dumps(chosen, ensure_ascii=False)


def _patterns_of(name: str) -> set[str]:
    """A name, and what it has in common with others: its beginning, its end, all but numbers."""
    parts = name.split(".")
    cuts = range(1, len(parts))
    numberless = ".".join("*" if part.isdigit() else part for part in parts)
    beginnings = {".".join([*parts[:cut], "*"]) for cut in cuts}
    return {name, numberless, *beginnings, *(".".join(["*", *parts[cut:]]) for cut in cuts)}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor name fits one of the shell-style patterns (`*` also spans dots)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def left_out(names: Sequence[str], skip: Sequence[str], only: Sequence[str]) -> bool:
    """Whether a tensor, by any of its names, fits `skip`, or none of `only` if there is any."""
    if any(matches(name, skip) for name in names):
        return True
    return bool(only) and not any(matches(name, only) for name in names)


def name_of(model: str) -> str:
    """What an expert is called that is given no name: after its directory, file or hub id.

    Examples:
        >>> name_of("org/name@refs/pr/1"), name_of("runs/cola/model.safetensors")
        ('name', 'cola')
    """
    path = _without_revision(model)
    if path.suffix not in _WEIGHT_FILES:
        return path.name
    usual = ("model", "pytorch_model", "adapter_model")
    return path.parent.name if path.stem in usual else path.stem


def _without_revision(model: str) -> Path:
    return Path(model.partition("@")[0] if _HUB_ID.fullmatch(model) else model)


def labels(models: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """What models are called that are given no name: as `name_of` says, but no two alike.

    Those of one name get as many more parts of their paths as tell most of them apart, and a number
    where nothing does.

    Args:
        models: Paths and hub ids.
        taken: Names that are given to others.

    Examples:
        >>> labels(["cola/checkpoint-500", "sst2/checkpoint-500", "org/mnli"])
        ['cola/checkpoint-500', 'sst2/checkpoint-500', 'mnli']
        >>> labels(["org/mnli", "org/mnli"])
        ['mnli', 'mnli #2']
    """
    longer = [_longer_names(model) for model in models]
    used, found = set(taken), list[str]()
    for own in longer:
        group = [other for other in longer if other[0] == own[0]]

        def distinct(parts: int, group: Sequence[Sequence[str]] = group) -> int:
            return len({*(_at(other, parts) for other in group), *taken})

        label = whole = _at(own, max(range(max(map(len, group))), key=distinct))
        again = 1
        while label in used:
            again += 1
            label = f"{whole} #{again}"
        used.add(label)
        found.append(label)
    return found


def _longer_names(model: str) -> list[str]:
    """A model's name, the same after more and more of its folders, and all that was written."""
    path, name = _without_revision(model), name_of(model)
    folders = path.relative_to(path.anchor).parts[::-1]
    above = folders[folders.index(name) + 1 :] if name in folders else folders[1:]
    names = ["/".join([*above[:n][::-1], name]) for n in range(len(above) + 1)]
    return [name for name in (*names, model) if name]


def _at(names: Sequence[str], parts: int) -> str:
    return names[min(parts, len(names) - 1)]


def is_safe_name(name: str) -> bool:
    """Whether a task name is a file name on every system, apart from the task file of another."""
    return bool(_SAFE_NAME.fullmatch(name)) and not name.endswith((".", ".safetensors"))


def check_names(names: Iterable[str], faults: Faults) -> None:
    """Add a fault for each task name that is taken twice or unsafe as a file name somewhere."""
    seen = set[str]()
    for name in names:
        if not is_safe_name(name):
            faults.add(
                f"'{name}' is not a safe file name for a task. Use letters, digits, '.', '_' and "
                "'-', beginning with a letter or digit, at most 100 characters."
            )
        if name.lower() in seen:
            faults.add(
                f"Two experts are named '{name}' (case is ignored). Give each its own name: "
                "--expert NAME=PATH."
            )
        seen.add(name.lower())


def find_names(
    reference: Mapping[str, TensorSpec],
    expert: Collection[str],
    renames: Sequence[Callable[[str], str]] = (canonical,),
) -> tuple[Callable[[str], str], Renaming]:
    """How the expert's names are to be read so that most of the reference is found in them.

    Tried in this order: as they are, without wrappers, and without wrappers where the reference
    has them too (they then take the reference's). A prefix that is a wrapper counts as worse.
    Each is tried also across versions: what another version calls otherwise takes the name that
    the reference has for it. `renames` are ways to give both one name.

    Returns:
        Raw name to name without wrapper, and the renaming from reference names to the latter.
    """
    wrapped = {without_wrapper(name): name for name in reference}

    def as_is(name: str) -> str:
        return name

    def like_reference(name: str) -> str:
        return wrapped.get(without_wrapper(name), without_wrapper(name))

    best, best_score = (as_is, Renaming()), (-1, False)
    for unwrapped in (as_is, without_wrapper, like_reference):
        names = {unwrapped(name) for name in expert}
        tries: list[tuple[Callable[[str], str], Renaming]]
        tries = [(unwrapped, _find_renaming(reference, names))]
        for rename in renames:
            own, rule = _across_versions(reference, names, rename)
            tries.append((lambda name, u=unwrapped, own=own: own.get(u(name), u(name)), rule))
        for plain, rule in tries:
            names = {plain(name) for name in expert}
            if len(names) < len(expert):  # it would merge two tensors
                continue
            matched = sum(rule.expert_name(name) in names for name in reference)
            score = (matched, without_wrapper(rule.add + "x") == rule.add + "x")
            if score > best_score:
                wrapper = _wrappers(expert) if unwrapped is without_wrapper else ""
                best, best_score = (plain, replace(rule, wrapper=wrapper)), score
    return best


def _across_versions(
    reference: Collection[str], expert: Collection[str], rename: Callable[[str], str]
) -> tuple[dict[str, str], Renaming]:
    """Expert names to those they take from the reference, and the prefix between the two."""
    known, own = by_canonical(reference, rename), by_canonical(expert, rename)
    found = _find_renaming(known, own)
    rule = replace(found, plain=frozenset(known[short] for short in found.plain))
    pairs = ((name, found.expert_name(short)) for short, name in known.items())
    return {own[short]: rule.expert_name(name) for name, short in pairs if short in own}, rule


def _wrappers(names: Iterable[str]) -> str:
    found = {s for name in names for n, s in enumerate(name.split(".")) if _is_wrapper(s, n)}
    return ".".join(w for w in _WRAPPERS if w in found)


def without_wrapper(name: str) -> str:
    """A tensor name without wrapper segments."""
    return ".".join(s for n, s in enumerate(name.split(".")) if not _is_wrapper(s, n))


def _is_wrapper(segment: str, position: int) -> bool:
    # torch.compile may wrap any submodule; DataParallel only the root.
    return segment == "_orig_mod" or (segment == "module" and position <= 1)


def _find_renaming(reference: Collection[str], expert: Collection[str]) -> Renaming:
    """The one change of prefix that makes most names agree; none if names agree as they are.

    Modules are wrapped in others: from the outside (`bert.`), or where a model of vision and
    language has a text model (`model.`) between its own modules (`model.language_model.`).
    """
    adds, strips = _wrapped_in(expert, reference), _wrapped_in(reference, expert)
    as_is = sum(name in expert for name in reference)
    most_added, most_stripped = max(adds.values(), default=0), max(strips.values(), default=0)
    add = strip = ""
    if most_added > max(as_is, most_stripped):
        strip, add = _likeliest(adds)
    elif most_stripped > as_is:
        add, strip = _likeliest(strips)
    rule = Renaming(add=add, strip=strip)
    plain = frozenset(
        name
        for name in reference
        if (rule.expert_name(name) not in expert and name in expert)
        or (add and not name.startswith(strip))
    )
    return Renaming(add=add, strip=strip, plain=plain)


def _wrapped_in(
    long_names: Collection[str], short_names: Collection[str]
) -> Counter[tuple[str, str]]:
    """Prefixes of short names and what stands for them in long ones, with how often they do."""
    found = Counter[tuple[str, str]]()
    for name in long_names:
        segments = name.split(".")
        for cut in range(1, min(3, len(segments) - 1) + 1):
            for start in range(cut):
                outer, between = segments[:start], segments[start:cut]
                if outer and not set(_WRAPPERS).isdisjoint(between):
                    continue  # no module of a model
                if ".".join([*outer, *segments[cut:]]) in short_names:
                    prefix = "".join(f"{segment}." for segment in outer)
                    found[prefix, prefix + ".".join(between) + "."] += 1
    return found


def _likeliest(prefixes: Counter[tuple[str, str]]) -> tuple[str, str]:
    """The pair found most often; of several, one from the outside."""
    return max(prefixes, key=lambda pair: (prefixes[pair], not pair[0], pair))


def module_of(name: str) -> str:
    """The module that a tensor, or a module, lies in: its name without the last part."""
    return name.rpartition(".")[0]


def modules_around(module: str) -> Iterator[str]:
    """A module's name, and those of the modules around it."""
    while module:
        yield module
        module = module_of(module)
