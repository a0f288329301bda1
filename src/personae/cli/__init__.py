"""The command line: one typed function per command, and one place where errors become exits."""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from personae import __version__, kernels
from personae.cli import (
    check,
    compose,
    demo,
    diff,
    evaluate,
    export,
    inspect,
    merge,
    methods,
    pack,
    plan,
    serve,
    tune,
    unpack,
    verify,
)
from personae.cli.allocator import keep_freed_memory
from personae.cli.console import drop_output, err, show_warnings_plainly
from personae.errors import PersonaeError

_REFUSED = 2
_BY_SIGNAL = 128  # the exit code of what a signal ended, less its number
_STOPS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else ()))
_BROKEN_PIPE = 141  # as if SIGPIPE had ended it


class _Command(TyperCommand):
    """One whose context is what commands annotate; typer's own is of the class above it."""

    context_class = typer.Context


app = typer.Typer(
    name="personae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line.

    Exits 0 done, 1 failed on the work, 2 refused input, 141 broken pipe, or 128 and the number of
    the signal that stopped it.
    """
    keep_freed_memory()
    show_warnings_plainly()
    kernels.alone = True
    for stop in _STOPS:
        is_ignored = signal.getsignal(stop) is signal.SIG_IGN  # SIGHUP is by nohup
        if stop == signal.SIGINT or not is_ignored:
            signal.signal(stop, _interrupt)
    try:
        app()
    except KeyboardInterrupt as stop:  # pressed again while the first was being handled
        _leave(_code(stop))
    except OSError as error:  # of a help text or the version, which no command guards
        _tell_unwritten(error)
        _leave(_REFUSED)
    except SystemExit as stop:
        if not isinstance(stop.code, int):
            raise
        # Of a help text, whose reader's leaving rich and typer tell as a failure.
        has_reader = not isinstance(stop.__context__, BrokenPipeError)
        _leave(stop.code if has_reader else _BROKEN_PIPE)


def _interrupt(number: int, _: object) -> NoReturn:
    """Say that Ctrl-C was heard: what workers have under way may take a while.

    A signal that asks to end is taken as that, so that folders made for the meantime are removed.

    Raises:
        KeyboardInterrupt: With the number of the signal.
    """
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), b"\nStopping; Ctrl-C again stops at once.\n")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for ends in _STOPS[1:]:
        if signal.getsignal(ends) is _interrupt:
            signal.signal(ends, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def _code(stop: KeyboardInterrupt) -> int:
    return _BY_SIGNAL + (stop.args[0] if stop.args else signal.SIGINT)


def _leave(code: int) -> NoReturn:
    """Exit at once: torch takes 0.4 s to take down, and workers what they have under way."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or _BROKEN_PIPE
    except OSError as error:
        code = code or _REFUSED
        _tell_unwritten(error)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def _tell_unwritten(error: OSError) -> None:
    drop_output()
    sys.stderr.write(f"error: The output cannot be written: {error.strerror}.\n")


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Print errors instead of raising them: this package's, and what the system refuses to read."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except PersonaeError as error:
            first, *more = error.lines or (str(error),)
            err.print(f"error: {first}", *more, markup=False, soft_wrap=True)
            raise typer.Exit(error.exit_code) from error
        except BrokenPipeError:  # the reader of our output has left, as 'head' does
            drop_output()
            raise typer.Exit(_BROKEN_PIPE) from None
        except OSError as error:
            text = f"error: {error.strerror or error}."
            if error.filename is not None:
                text = (
                    f"error: Cannot use '{error.filename}': {error.strerror}. Check that it "
                    "exists and that you may read it."
                )
            err.print(text, markup=False, soft_wrap=True)
            raise typer.Exit(_REFUSED) from error
        except KeyboardInterrupt as error:
            err.print("Interrupted. No incomplete output has its final name.", markup=False)
            if command in (merge.merge, pack.pack, evaluate.evaluate, tune.tune):
                err.print("Run the same command again to continue.", markup=False)
            raise typer.Exit(_code(error)) from error

    return run


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"personae {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Many fine-tuned models in the space of one: merge a family, or pack it and rebuild any."""


for _command in (
    merge.merge,
    pack.pack,
    unpack.unpack,
    compose.compose,
    export.export,
    serve.serve,
    plan.plan,
    check.check,
    diff.diff,
    inspect.inspect,
    verify.verify,
    methods.methods,
    demo.demo,
):
    app.command(cls=_Command)(_guarded(_command))
app.command("eval", cls=_Command)(_guarded(evaluate.evaluate))
app.command(cls=_Command)(_guarded(tune.tune))
