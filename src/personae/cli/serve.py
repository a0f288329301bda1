"""personae serve: the tasks of packs over HTTP, from one model in memory."""

import contextlib
import errno
import importlib
import importlib.util
import ipaddress
import signal
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from personae.cli import console, options
from personae.errors import Faults, OutputError, RecipeError, nearest
from personae.runtime.cache import CACHE
from personae.serve.limits import Limits

_DTYPES = ("float32", "bfloat16", "float16")
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "transformers")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_GRACE = 5
"""Seconds that requests under way have after Ctrl-C."""


def serve(
    packs: Annotated[
        list[str],
        typer.Argument(
            metavar="PACK...", help="Packs; NAME=PATH puts NAME/ before the names of its tasks."
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every one that this machine has.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any.")] = 8000,
    mode: Annotated[
        Literal["factored", "merged"],
        typer.Option(
            metavar="MODE", help="factored (tasks mix in a batch) or merged (takes every codec)."
        ),
    ] = "factored",
    base: options.Base = None,
    device: options.Device = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"{', '.join(_DTYPES)}.", show_default="the reference's"),
    ] = None,
    cache: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Most bytes of decoded tensors held for each pack, or their share of the model's.",
        ),
    ] = CACHE,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--packs",
            metavar="FOLDER",
            help="Let requests load packs of this folder, and unload tasks.",
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows computed at once, at most.")] = 32,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="How long a row waits for others.")
    ] = 5.0,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a row with its answer; the model's bound holds.")
    ] = Limits.tokens,
    max_queue: Annotated[int, typer.Option(min=1, help="Rows that wait, at most.")] = Limits.queue,
    max_body: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest body of a request.")
    ] = "8MB",
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds until a request is given up.")
    ] = Limits.seconds,
) -> None:
    """Serve the tasks of packs over HTTP: predictions, and OpenAI's completions and chats."""
    faults = Faults()
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        faults.add(
            f"Serving needs {', '.join(missing)}, which is not installed: "
            "pip install 'personae[serve]'."
        )
    if dtype is not None and dtype not in _DTYPES:
        faults.add(f"Unknown dtype '{dtype}'. {nearest(dtype, _DTYPES)}")
    if folder is not None and not folder.is_dir():
        faults.add(f"--packs {folder} is no folder.")
    limits = Limits(_bytes(max_body, faults), max_tokens, max_queue, timeout)
    faults.raise_if_any(RecipeError)
    from personae.serve.tasks import Loading, Tasks

    with _listening(host, port) as listener:
        loading = Loading(mode, base, device, getattr(torch, dtype) if dtype else None, cache)
        tasks = Tasks(loading, folder=folder, tokens=max_tokens, note=console.note)
        for pack in packs:
            name, equals, path = pack.rpartition("=")
            tasks.load(Path(path), name if equals else None)
        app_module = importlib.import_module("personae.serve.app")
        app = app_module.build(
            tasks,
            limits,
            max_batch=max_batch,
            max_wait=max_wait_ms / 1000,
            hosts=[*_LOOPBACK, _spelt(host)] if _is_loopback(host) else ["*"],
        )
        place = f"http://{_spelt(host)}:{listener.getsockname()[1]}"
        unshown = _shown(f"{', '.join(task.name for task in tasks)} at {place}")
        if not _is_loopback(host):
            console.note(
                f"Whoever reaches {host} can use this server: it asks for no password, and speaks "
                "no TLS. Put a proxy before it that does."
            )
        _run_until_stopped(app, listener)
    console.note("Stopped.")
    if unshown is not None:
        raise unshown


def _shown(line: str) -> Exception | None:
    """Print what is served where; what kept it from being read, which keeps nobody from asking."""
    try:
        console.out.print(line, markup=False)
    except (OutputError, BrokenPipeError) as error:
        console.drop_output()
        console.note(line)
        return error
    return None


def _run_until_stopped(app: Any, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    uvicorn = importlib.import_module("uvicorn")
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {stop: signal.signal(stop, signal.default_int_handler) for stop in stops}
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # raised again once all has ended
            uvicorn.Server(settings).run(sockets=[listener])
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there, before anything is loaded.

    Raises:
        OutputError: if the system refuses.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OutputError(
                f"Port {port} of {host} is in use. Give another with --port; 0 takes any that is "
                "free."
            ) from error
        raise OutputError(f"Cannot listen at {host}, port {port}: {error.strerror}.") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _spelt(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bytes(size: str, faults: Faults) -> int:
    try:
        return options.bytes_of("--max-body", size)
    except RecipeError as error:
        faults.take(error)
        return 0
