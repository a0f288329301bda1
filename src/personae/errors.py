"""The closed list of errors. Each text says what was found, what was expected, what to do."""

import difflib
from collections.abc import Iterable

_MOST_LISTED = 16


class PersonaeError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is the command's."""

    exit_code = 2
    faults: tuple[str, ...] = ()
    """The faults one by one, where it lists several."""


class RecipeError(PersonaeError):
    """A recipe or an option is wrong: unknown name, value out of range."""


class CheckpointError(PersonaeError):
    """A checkpoint cannot be read, or does not fit the others."""


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


class Faults:
    """Collects faults so that a person sees all of them at once, not the first of many."""

    def __init__(self) -> None:
        """Start with none."""
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Note one fault; repeated texts are kept once."""
        if message not in self.messages:
            self.messages.append(message)

    def take(self, error: PersonaeError) -> None:
        """Note all that an error tells."""
        for message in error.faults or (str(error),):
            self.add(message)

    def raise_if_any(self, error: type[PersonaeError]) -> None:
        """Raise one `error` that lists every fault noted so far.

        Raises:
            PersonaeError: of the class given, if any fault was noted.
        """
        if len(self.messages) == 1:
            raise error(self.messages[0])
        if self.messages:
            listed = "\n".join(f"  {n}. {text}" for n, text in enumerate(self.messages, 1))
            raised = error(f"{len(self.messages)} faults:\n{listed}")
            raised.faults = tuple(self.messages)
            raise raised


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name `name` was probably meant to be, or list what is known."""
    known = sorted(known)
    lowered = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{lowered[close[0]]}'?"
    rest = len(known) - _MOST_LISTED
    more = f" and {rest} more" if rest > 0 else ""
    return f"Known: {', '.join(known[:_MOST_LISTED])}{more}."
