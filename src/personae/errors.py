"""The closed list of errors. Each text says what was found, what was expected, what to do."""

import difflib
from collections.abc import Iterable, Sequence
from typing import TypeVar

_MOST_LISTED = 16
_MOST_FAULTS = 100
_LONGEST_NAME = 200


class PersonaeError(Exception):
    """Base of every error that this package raises; `exit_code` is what the command returns."""

    exit_code = 2
    faults: tuple[str, ...] = ()
    """The faults one by one, where it lists several."""
    lines: tuple[str, ...] = ()
    """The lines of its text, where these are several: no name in it can add one when shown."""


class RecipeError(PersonaeError):
    """A recipe or an option is wrong: unknown name, value out of range."""


class CheckpointError(PersonaeError):
    """A checkpoint cannot be read, or does not match the others."""


class MethodError(PersonaeError):
    """A method or codec was asked for something it cannot do."""


class PackError(PersonaeError):
    """A pack is damaged, foreign, or of a version this tool does not know."""


class BudgetError(PersonaeError):
    """A size or memory budget cannot be met; the text names the smallest that can."""


class OutputError(PersonaeError):
    """The output cannot be written: it exists already, or the disk is full."""


class WorkError(PersonaeError):
    """The input was fine but the work failed: a check did not hold."""

    exit_code = 1


Error = TypeVar("Error", bound=PersonaeError)


def listing(error: type[Error], heading: str, faults: Sequence[str]) -> Error:
    """An error that lists faults as lines below a heading."""
    lines = (heading, *numbered(faults))
    made = error("\n".join(lines))
    made.lines = lines
    return made


class Faults:
    """Collects faults so that a person sees all of them at once, not the first of many."""

    def __init__(self) -> None:
        """Start with none."""
        self._messages: dict[str, None] = {}

    @property
    def messages(self) -> list[str]:
        """The faults so far, each once, in the order noted."""
        return list(self._messages)

    def add(self, message: str) -> None:
        """Note one fault; repeated texts are kept once."""
        self._messages[message] = None

    def take(self, error: PersonaeError) -> None:
        """Note all that an error tells."""
        for message in error.faults or (str(error),):
            self.add(message)

    def raise_if_any(self, error: type[PersonaeError]) -> None:
        """Raise one `error` that lists every fault noted so far.

        Raises:
            PersonaeError: of the class given, if any fault was noted.
        """
        messages = self.messages
        if len(messages) == 1:
            raise error(messages[0])
        if messages:
            raised = listing(error, f"{len(messages)} faults:", messages)
            raised.faults = tuple(messages)
            raise raised


def numbered(faults: Sequence[str]) -> list[str]:
    """Faults as lines of a list, no more than a person reads."""
    lines = [f"  {n}. {text}" for n, text in enumerate(faults[:_MOST_FAULTS], 1)]
    rest = len(faults) - len(lines)
    return [*lines, f"  … and {rest} more"] if rest else lines


def nearest(name: object, known: Iterable[str]) -> str:
    """Say which known name `name` was probably meant to be, or list what is known."""
    name, known = str(name), sorted(known)
    lowered = {one.lower(): one for one in known}
    # Longer names are nobody's slip of the keyboard, and comparing them takes for ever.
    wanted = [name.lower()] if len(name) <= _LONGEST_NAME else []
    close = [one for w in wanted for one in difflib.get_close_matches(w, lowered, 1, 0.5)]
    if close:
        return f"Did you mean '{lowered[close[0]]}'?"
    rest = len(known) - _MOST_LISTED
    more = f" and {rest} more" if rest > 0 else ""
    return f"Known: {', '.join(known[:_MOST_LISTED])}{more}."
