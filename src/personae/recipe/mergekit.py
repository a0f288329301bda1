"""What mergekit means by a recipe: whose algorithm a file means, and what is not read of it.

A file without a key of personae's own that mergekit could read is one of mergekit's: its methods
are mergekit's, and what mergekit passes over in it is passed over, with a note each. Facts are
those of mergekit 0.1.5.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from personae.errors import MethodError, nearest
from personae.methods import ALIASES, MERGE_METHODS, METHODS_BY_CONVENTIONS, Conventions
from personae.recipe._faults import Fault, Place

_ARITHMETIC = ("weight", "normalize", "lambda", "int8_mask", "rescale", "density")
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "arcee_fusion": (),
    "breadcrumbs": (*_ARITHMETIC, "gamma"),
    "breadcrumbs_ties": (*_ARITHMETIC, "gamma"),
    "dare_linear": _ARITHMETIC,
    "dare_ties": _ARITHMETIC,
    "della": (*_ARITHMETIC, "epsilon"),
    "della_linear": (*_ARITHMETIC, "epsilon"),
    "karcher": ("max_iter", "tol"),
    "linear": ("weight", "normalize"),
    "model_stock": ("filter_wise",),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "nearswap": ("t",),
    "nuslerp": ("weight", "nuslerp_row_wise", "nuslerp_flatten"),
    "passthrough": ("scale",),
    "ram": ("epsilon",),
    "ramplus_tl": ("epsilon", "r", "alpha"),
    "sce": ("int8_mask", "select_topk"),
    "slerp": ("t",),
    "task_arithmetic": ("weight", "normalize", "lambda", "int8_mask"),
    "ties": _ARITHMETIC,
}
"""Its methods, each with all that it reads under `parameters`."""

_OF_A_MODEL = ("weight", "density", "gamma", "epsilon", "scale")
"""Parameters that it reads under a model; all others are one for all models."""

_INSTEAD: Mapping[str, str] = {"ram": "ties", "ramplus_tl": "ties"}
"""What is nearest to its methods that are not here."""

_ONE_MODEL_EACH = ("models", "sources")
_OWN_KEYS = ("vector", "output", "skip", "only")
_AT_THE_TOP = ("base_model", "chat_template", "dtype", "out_dtype", "tokenizer_source")
_INT8_MASK = "int8_mask is left out: masks take no memory here, results are the same."


class Choice(NamedTuple):
    """Whose algorithms a file means.

    Attributes:
        conventions: Whose.
        place: Where the file says so; None if it does not.
        lacking: What mergekit's method asks for and the file gives nowhere, so that it is not
            mergekit's.
    """

    conventions: Conventions
    place: Place | None
    lacking: str = ""


@dataclass
class Understood:
    """A file as it is to be read.

    Attributes:
        choice: Whose algorithms it means.
        content: The file without what mergekit does not read, if they are mergekit's.
        remarks: What a person should know of that, a line each.
        slips: Of what is not read, all that resembles something that is.
    """

    choice: Choice
    content: dict[str, Any]
    remarks: list[str] = field(default_factory=list)
    slips: list[Fault] = field(default_factory=list)


def understood(
    content: Mapping[str, Any],
    keys: Mapping[str, Sequence[str]],
    line: Callable[[Place], int | None],
) -> Understood:
    """Read a file as whoever wrote it means it.

    Args:
        content: What the file says.
        keys: The keys that are read: at the top (under ''), and in what lies under these.
        line: The line of a place.
    """
    found = Understood(choice_of(content), deepcopy(dict(content)))
    method = content.get("merge_method")
    name = method if isinstance(method, str) else ""
    found.remarks += _who(name, found.choice, line)
    if found.choice.conventions == "mergekit":
        _Passing(found, name, line).over(keys)
    return found


def choice_of(content: Mapping[str, Any]) -> Choice:
    """Whose algorithms a file means.

    As it says; else the papers' if it has a key of ours alone, or lacks what mergekit asks for.
    """
    said, method = content.get("conventions"), content.get("merge_method")
    if said is not None:
        return Choice("mergekit" if said == "mergekit" else "papers", ("conventions",))
    known = isinstance(method, str) and (method in MERGE_METHODS or method in ALIASES)
    if known and method not in _PARAMETERS:
        return Choice("papers", ("merge_method",))
    own = next(_own_keys(content), None)
    if own is not None:
        return Choice("papers", own)
    lacking = _lacking(content, str(method)) if known else ""
    return Choice("papers" if lacking else "mergekit", None, lacking)


def is_one_method(name: str) -> bool:
    """Whether a name means one algorithm whatever the conventions."""
    return _under("papers", name) is _under("mergekit", name)


def hint_for(method: str, parameter: str) -> str:
    """What to write where mergekit's method of this name has a parameter that the paper's lacks."""
    ours = _under("papers", method)
    if parameter not in _PARAMETERS.get(method, ()) or ours is None or parameter in ours.fields():
        return ""
    return f" mergekit's {method} has it: conventions: mergekit."


def default_hint(method: str, parameter: str) -> str:
    """What a parameter is by default in the paper's method where mergekit's has no default."""
    ours = _under("papers", method)
    field = ours.fields().get(parameter) if ours and not is_one_method(method) else None
    if field is None or field.is_required():
        return ""
    return f" mergekit asks for it; with conventions: papers it is {field.default} by default."


def refuse_mergekit_alone(name: str) -> None:
    """Tell a method that mergekit has and this package has not from a misspelt one.

    Raises:
        MethodError: naming what is nearest to it, and the methods there are.
    """
    if name in _PARAMETERS and not any(name in one for one in METHODS_BY_CONVENTIONS.values()):
        near = f"Near to it is {_INSTEAD[name]}. " if name in _INSTEAD else ""
        raise MethodError(
            f"'{name}' is a method of mergekit that personae does not have. {near}"
            f"Known: {', '.join(sorted(MERGE_METHODS))}."
        )


def _under(conventions: Conventions, name: str) -> Any:
    known = METHODS_BY_CONVENTIONS[conventions]
    return known.get(name) or MERGE_METHODS.get(ALIASES.get(name, name))


def _own_keys(content: Mapping[str, Any]) -> Iterator[Place]:
    """Where a file says what mergekit has no word for."""
    for key in _OWN_KEYS:
        if content.get(key) is not None:
            yield (key,)
    for place, entry in _listed_in(content, (), _ONE_MODEL_EACH):
        if entry.get("name") is not None:
            yield *place, "name"
    for place, entry in _listed_in(content, (), ("slices",)):
        if entry.get("merge_method") is not None:
            yield *place, "merge_method"
    method = content.get("merge_method")
    ours = _under("papers", method) if isinstance(method, str) else None
    theirs = {*_read_by(method), *_ARITHMETIC} if isinstance(method, str) else set[str]()
    for place, parameters in _parameters_in(content, ()):
        for name in parameters:
            if ours is not None and name in ours.fields() and name not in theirs:
                yield *place, name


def _lacking(content: Mapping[str, Any], method: str) -> str:
    """A parameter that mergekit's method asks for and the paper's does not, if it is nowhere."""
    theirs, ours = _under("mergekit", method), _under("papers", method)
    if theirs is None or ours is None:
        return ""
    asked = {name for name, field_ in theirs.fields().items() if field_.is_required()}
    asked -= {name for _, parameters in _parameters_in(content, ()) for name in parameters}
    defaults = [name for name, field_ in ours.fields().items() if not field_.is_required()]
    return next((name for name in defaults if name in asked), "")


def _read_by(method: str) -> set[str]:
    """All that mergekit's method of this name reads, and the seed that ours of that name takes."""
    theirs = METHODS_BY_CONVENTIONS["mergekit"].get(method)
    return {*_PARAMETERS.get(method, ()), *(theirs.fields() if theirs else ())}


def _parameters_in(part: Any, place: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Every mapping under a key `parameters`, with its place."""
    if isinstance(part, list):
        for n, item in enumerate(part):
            yield from _parameters_in(item, (*place, n))
    for key, value in part.items() if isinstance(part, dict) else ():
        if key == "parameters" and isinstance(value, dict):
            yield (*place, key), value
        elif key != "parameters":
            yield from _parameters_in(value, (*place, str(key)))


def _listed_in(
    part: Any, place: Place, keys: Sequence[str]
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Every mapping in a list under one of these keys, with its place."""
    if isinstance(part, list):
        for n, item in enumerate(part):
            if isinstance(item, dict) and place[-1:] and place[-1] in keys:
                yield (*place, n), item
            yield from _listed_in(item, (*place, n), keys)
    for key, value in part.items() if isinstance(part, dict) else ():
        if key != "parameters":
            yield from _listed_in(value, (*place, str(key)), keys)


def _who(method: str, choice: Choice, line: Callable[[Place], int | None]) -> Iterator[str]:
    """Whose algorithm it is, where two have one name and the file does not say it."""
    if choice.place == ("conventions",) or is_one_method(method):
        return
    if choice.lacking:
        yield (
            f"{method} is the paper's algorithm here: the recipe gives no '{choice.lacking}', "
            "without which mergekit refuses it. For mergekit's algorithm, give each model one and "
            "write conventions: mergekit"
        )
    elif choice.place is None:
        yield (
            f"{method} is mergekit's algorithm here: no key of the recipe is personae's own. For "
            "the paper's algorithm, write conventions: papers"
        )
    else:
        yield (
            f"{_at(line, choice.place)}{method} is the paper's algorithm here: "
            f"'{choice.place[-1]}' is personae's own key. For mergekit's algorithm, write "
            "conventions: mergekit"
        )


def _at(line: Callable[[Place], int | None], place: Place) -> str:
    number = line(place)
    return f"line {number}: " if number else ""


class _Passing:
    """Takes out of a file what mergekit passes over, and notes it."""

    def __init__(self, found: Understood, method: str, line: Callable[[Place], int | None]) -> None:
        self._found, self._method, self._line = found, method, line
        slices = (part for _, part in _listed_in(found.content, (), ("slices",)))
        own = {str(part["merge_method"]) for part in slices if "merge_method" in part}
        self._read = {name for one in (method, *own) for name in _read_by(one)}

    def over(self, keys: Mapping[str, Sequence[str]]) -> None:
        """Take out all that is not read."""
        content = self._found.content
        self._keys(content, (), keys[""])
        for key, known in keys.items():
            inner = content.get(key) if key else None
            if isinstance(inner, dict):
                self._keys(inner, (key,), known)
            for place, part in list(_listed_in(content, (), (key,))):
                self._keys(part, place, known)
        if self._method in _PARAMETERS:
            for place, parameters in _parameters_in(content, ()):
                self._parameters(parameters, place)

    def _keys(self, part: dict[Any, Any], place: Place, known: Sequence[str]) -> None:
        for key in [key for key in part if isinstance(key, str) and key not in known]:
            if part.pop(key) is None:
                continue
            if key in _read_by(self._method):
                self._say((*place, key), "It is read under 'parameters' alone.")
            else:
                self._say((*place, key), *_near(key, known))

    def _parameters(self, parameters: dict[str, Any], place: Place) -> None:
        read = self._read
        for name in list(parameters):
            if name == "int8_mask":
                del parameters[name]
                if _INT8_MASK not in self._found.remarks:
                    self._found.remarks.append(_INT8_MASK)
            elif name not in read:
                del parameters[name]
                if name in _AT_THE_TOP:
                    self._say((*place, name), "It is read at the top of a recipe alone.")
                elif name in _ARITHMETIC:
                    self._say((*place, name), f"Its {self._method} has none.")
                else:
                    self._say((*place, name), *_near(name, read - {"int8_mask"}))
            elif len(place) > 2 and place[-3] in _ONE_MODEL_EACH and name not in _OF_A_MODEL:
                del parameters[name]
                self._say((*place, name), "It is one for all models, under 'parameters'.")
            else:
                self._filters(parameters, name, (*place, name))

    def _filters(self, parameters: dict[str, Any], name: str, place: Place) -> None:
        """Leave out entries whose filter has a `*`: there it is text that no name holds."""
        value = parameters[name]
        if not isinstance(value, list):
            return
        odd = [n for n, entry in enumerate(value) if _is_pattern(entry)]
        for n in odd:
            self._say((*place, n), f"No tensor's name holds the text '{value[n]['filter']}'.")
        if odd:
            parameters[name] = [entry for n, entry in enumerate(value) if n not in odd]
            if not parameters[name]:
                del parameters[name]

    def _say(self, place: Place, why: str = "", slip: bool = False) -> None:
        key = ".".join(map(str, place))
        text = f"'{key}' is left out, as mergekit does not read it."
        text += f" {why}" if why else ""
        self._found.remarks.append(f"{_at(self._line, place)}{text}")
        if slip:
            self._found.slips.append(Fault(place, text))


def _near(name: str, known: Sequence[str] | set[str]) -> tuple[str, bool]:
    """What a key was probably meant to be; nothing if it resembles none."""
    hint = nearest(name, known) if known else ""
    return (hint, True) if hint.startswith("Did you") else ("", False)


def _is_pattern(entry: Any) -> bool:
    pattern = entry.get("filter") if isinstance(entry, dict) else None
    return isinstance(pattern, str) and "*" in pattern and pattern != "*"
