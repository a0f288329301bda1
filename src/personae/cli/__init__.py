"""The command line: one typed function per command, and one place where errors become exits."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from personae import __version__
from personae.cli import compose, demo, inspect, merge, methods, pack, plan, unpack, verify
from personae.cli.allocator import keep_freed_memory
from personae.cli.console import err
from personae.errors import PersonaeError

_REFUSED = 2
_INTERRUPTED = 130


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
    """Run the command line; exits 0 done, 1 failed on the work, 2 refused input, 130 interrupt."""
    keep_freed_memory()
    try:
        app()
    except BrokenPipeError:  # the reader of our output has left, as 'head' does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:  # pressed again while the first was being handled
        _leave(_INTERRUPTED)
    except SystemExit as stop:
        if not isinstance(stop.code, int):
            raise
        _leave(stop.code)


def _leave(code: int) -> NoReturn:
    """Exit at once: torch takes 0.4 s to take down, and workers what they have under way."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Print errors instead of raising them: this package's, and what the system refuses to read."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except PersonaeError as error:
            err.print(f"error: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if error.filename is None or isinstance(error, BrokenPipeError):
                raise
            text = f"error: Cannot use '{error.filename}': {error.strerror}. See that it is there "
            err.print(f"{text}and that you may read it.", markup=False, soft_wrap=True)
            raise typer.Exit(_REFUSED) from error
        except KeyboardInterrupt as error:
            err.print("Interrupted; nothing half-done was kept under a final name.", markup=False)
            if command in (merge.merge, pack.pack):
                err.print("The same command goes on where it stopped.", markup=False)
            raise typer.Exit(_INTERRUPTED) from error

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
    plan.plan,
    inspect.inspect,
    verify.verify,
    methods.methods,
    demo.demo,
):
    app.command(cls=_Command)(_guarded(_command))
