"""The HTTP server: what each address answers, and what every request is held to."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRouter
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from personae import __version__
from personae.errors import PersonaeError
from personae.serve.generating import Continuation, continuation, prompt_tokens
from personae.serve.limits import Limits
from personae.serve.metrics import Metrics
from personae.serve.models import (
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    PredictRequest,
)
from personae.serve.openai import Shape
from personae.serve.predicting import Row, image_row, text_row
from personae.serve.refusals import Refusal
from personae.serve.scheduler import Job, Scheduler
from personae.serve.tasks import CLASSIFIES, EMBEDS, GENERATES, PREDICTS, ServedTask, Tasks

log = logging.getLogger("personae.serve")
router = APIRouter()


@dataclass(frozen=True)
class Server:
    """What routes work with.

    Attributes:
        tasks: What is served.
        scheduler: Computes rows.
        limits: Bounds of requests.
        metrics: Counters.
    """

    tasks: Tasks
    scheduler: Scheduler
    limits: Limits
    metrics: Metrics


def build(
    tasks: Tasks,
    limits: Limits | None = None,
    *,
    max_batch: int = 32,
    max_wait: float = 0.005,
    hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """An application that serves tasks; its scheduler ends with it.

    Args:
        tasks: What is served.
        limits: Bounds of requests.
        max_batch: Most rows computed at once.
        max_wait: Seconds that a row waits for others.
        hosts: By which names requests may call the server; "*": by any. A page of the web reaches
            a server of this machine by a name of its own, which is made to mean this machine.
    """
    limits = limits or Limits()
    metrics = Metrics()
    scheduler = Scheduler(
        max_batch=max_batch, max_wait=max_wait, max_queue=limits.queue, observe=metrics.batch
    )
    metrics.watch("personae_waiting_rows", "Rows that wait.", lambda: scheduler.waiting)
    metrics.watch("personae_cached_bytes", "Decoded tensors held.", lambda: tasks.cached_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await run_in_threadpool(scheduler.close)

    app = FastAPI(
        title="personae", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.server = Server(tasks, scheduler, limits, metrics)
    app.include_router(router)
    for kind in (Refusal, PersonaeError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    app.add_middleware(_bounded, most=limits.body_bytes)
    app.add_middleware(metrics.measured)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts])
    return app


def _server(request: Request) -> Server:
    return request.app.state.server


_Here: Any = Depends(_server)


@router.get("/health")
async def health(server: Server = _Here) -> Response:
    """Whether requests are computed."""
    ok = server.scheduler.alive
    content = {"status": "ok" if ok else "stopped", "waiting": server.scheduler.waiting}
    return JSONResponse(content, 200 if ok else 503)


@router.get("/metrics")
async def metrics(server: Server = _Here) -> Response:
    """Counters, for Prometheus."""
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/v1/tasks")
async def list_tasks(server: Server = _Here) -> dict[str, Any]:
    """What is served."""
    return {"object": "list", "data": [task.to_json() for task in server.tasks]}


@router.post("/v1/tasks")
async def load_tasks(body: LoadRequest, server: Server = _Here) -> dict[str, Any]:
    """Serve a pack of the folder of packs, or more of its tasks."""
    await run_in_threadpool(server.tasks.load_from_folder, body.pack, body.name, body.tasks)
    return await list_tasks(server)


@router.delete("/v1/tasks/{name:path}")
async def unload_task(name: str, server: Server = _Here) -> dict[str, Any]:
    """Serve a task no longer."""
    await run_in_threadpool(server.tasks.unload, name)
    return {"id": name, "object": "task", "deleted": True}


@router.get("/v1/models")
async def list_models(server: Server = _Here) -> dict[str, Any]:
    """What is served, as OpenAI lists it."""
    return {"object": "list", "data": [_model(task) for task in server.tasks]}


@router.get("/v1/models/{name:path}")
async def show_model(name: str, server: Server = _Here) -> dict[str, Any]:
    """One of them."""
    return _model(server.tasks[name])


@router.post("/v1/predict")
async def predict(body: PredictRequest, request: Request, server: Server = _Here) -> dict[str, Any]:
    """Labels, values or embeddings of texts or images."""
    server.scheduler.check_count(len(body.texts or body.images or ()))
    rows = await run_in_threadpool(_rows, body, server.tasks[body.model])
    server.scheduler.submit(rows)
    answers = await _answers(request, rows, server.limits)
    data = [{"index": place} | answer for place, answer in enumerate(answers)]
    return {"object": "list", "model": body.model, "data": data}


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request, server: Server = _Here) -> Response:
    """Texts that follow prompts."""
    served = server.tasks[body.model]
    served.check_kind((GENERATES,), "/v1/predict")
    server.scheduler.check_count(len(body.prompts))

    def prepared() -> list[Continuation]:
        tokenizer = served.tokenizer
        assert tokenizer is not None
        return [
            continuation(
                served,
                prompt_tokens(tokenizer, prompt),
                body.max_tokens,
                body.stops,
                body.sampling,
                "prompt",
            )
            for prompt in body.prompts
        ]

    rows = await run_in_threadpool(prepared)
    return await _generated(request, body, rows, server)


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request, server: Server = _Here) -> Response:
    """The next message of a conversation."""
    served = server.tasks[body.model]
    served.check_kind((GENERATES,), "/v1/predict")

    def prepared() -> list[Continuation]:
        assert served.tokenizer is not None
        prompt = served.tokenizer.chat([message.plain() for message in body.messages])
        most = body.max_completion_tokens or body.max_tokens
        return [continuation(served, prompt, most, body.stops, body.sampling, "messages")]

    rows = await run_in_threadpool(prepared)
    return await _generated(request, body, rows, server)


def _model(task: ServedTask) -> dict[str, Any]:
    told = {"id": task.name, "object": "model", "created": 0, "owned_by": "personae"}
    return told | {"root": task.pack} | ({"max_model_len": task.tokens} if task.tokens else {})


def _rows(body: PredictRequest, served: ServedTask) -> list[Row]:
    """The rows of a request.

    Raises:
        Refusal: if they are not what the task takes.
    """
    served.check_kind((CLASSIFIES, PREDICTS, EMBEDS), "/v1/completions")
    wanted, other = ("texts", "images") if served.tokenizer is not None else ("images", "texts")
    if getattr(body, wanted) is None or getattr(body, other) is not None:
        raise Refusal(f"Task '{served.name}' takes \"{wanted}\", and nothing else.", param=wanted)
    if body.pooling is not None and served.kind != EMBEDS:
        raise Refusal(f"Task '{served.name}' gives no embeddings: leave out pooling.")
    if body.images is not None:
        return [image_row(served, image, pooling=body.pooling) for image in body.images]
    rows: list[Row] = []
    for given in body.texts or ():
        text, pair = (given, None) if isinstance(given, str) else given
        rows.append(text_row(served, text, pair, truncate=body.truncate, pooling=body.pooling))
    return rows


async def _answers(request: Request, jobs: Sequence[Job], limits: Limits) -> list[Any]:
    """The answers of all, as soon as they are there.

    Raises:
        Refusal: if that takes too long, or the client has left.
    """
    answers = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait(
            {answers, gone}, timeout=limits.seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if answers.done():
            try:
                return answers.result()
            except Exception as error:
                refusal = _as_refusal(error)
                raise refusal from error
        if gone.done():
            raise Refusal("The client has left.", 499)
        raise Refusal(_too_late(limits), 504, "timeout")
    finally:
        gone.cancel()
        for job in jobs:
            job.cancel()
        answers.cancel()


async def _gone(request: Request) -> None:
    """Come back once the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _generated(
    request: Request,
    body: CompletionRequest | ChatRequest,
    rows: Sequence[Continuation],
    server: Server,
) -> Response:
    """What rows are continued with: once all have ended, or as it comes."""
    shape = Shape(body.model, isinstance(body, ChatRequest))
    if body.stream:
        events = _streamed(rows, shape, body.tells_usage, server)
        return StreamingResponse(events, media_type="text/event-stream")
    server.scheduler.submit(rows)
    await _answers(request, rows, server.limits)
    _count(rows, server)
    return JSONResponse(shape.whole(rows))


def _streamed(
    rows: Sequence[Continuation], shape: Shape, tells_usage: bool, server: Server
) -> AsyncIterator[str]:
    """Let rows wait; what comes of them as server-sent events.

    Raises:
        Refusal: if they cannot wait.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[int, str | None]]()

    def put(place: int, text: str | None) -> None:
        loop.call_soon_threadsafe(arrived.put_nowait, (place, text))

    def ended(place: int, _: object) -> None:
        put(place, None)

    for place, row in enumerate(rows):
        row.emit = partial(put, place)
        row.future.add_done_callback(partial(ended, place))
    server.scheduler.submit(rows)
    return _events(rows, arrived, shape, tells_usage, server)


async def _events(
    rows: Sequence[Continuation],
    arrived: "asyncio.Queue[tuple[int, str | None]]",
    shape: Shape,
    tells_usage: bool,
    server: Server,
) -> AsyncIterator[str]:
    """Pieces of rows as they arrive; None ends a row."""
    try:
        for place in range(len(rows)):
            if (first := shape.first(place)) is not None:
                yield _event(first)
        running = len(rows)
        async with asyncio.timeout(server.limits.seconds):
            while running:
                place, text = await arrived.get()
                if text is not None:
                    yield _event(shape.piece(place, text))
                    continue
                running -= 1
                yield _event(shape.last(place, rows[place].future.result()))
        _count(rows, server)
        if tells_usage:
            yield _event(shape.total(rows))
        yield "data: [DONE]\n\n"
    except TimeoutError:
        yield _event(Refusal(_too_late(server.limits), 504, "timeout").body)
    except Exception as error:  # the status is sent already
        yield _event(_as_refusal(error).body)
    finally:
        for row in rows:
            row.cancel()


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _count(rows: Sequence[Continuation], server: Server) -> None:
    for row in rows:
        server.metrics.tokens(row.task, len(row.prompt), row.count)


def _too_late(limits: Limits) -> str:
    return (
        f"There was no answer within {limits.seconds:g} s. Ask for less, or start the server with "
        "a larger --timeout."
    )


async def _refused(_: Request, error: Exception) -> Response:
    refusal = _as_refusal(error)
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def _as_refusal(error: Exception) -> Refusal:
    """What a client is told of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, PersonaeError):
        return Refusal(str(error), 500, "task_failed")
    if isinstance(error, HTTPException):
        return Refusal(str(error.detail), error.status_code)
    if isinstance(error, RequestValidationError):
        return _malformed(error)
    log.error("A request failed.", exc_info=error)
    first = (str(error).strip() or repr(error)).splitlines()[0]
    return Refusal(f"The request failed: {type(error).__name__}: {first}", 500, "failed")


def _malformed(error: RequestValidationError) -> Refusal:
    """All that is wrong with a body."""
    faults = error.errors()
    if any(fault["type"] == "json_invalid" for fault in faults):
        reason = faults[0].get("ctx", {}).get("error", faults[0]["msg"])
        return Refusal(f"The body is not JSON: {reason}.", code="malformed_json")
    told: list[str] = []
    for fault in faults:
        place = ".".join(str(part) for part in fault["loc"] if part != "body") or "the body"
        told.append(f"{place}: {fault['msg']}")
    param = next((str(f["loc"][1]) for f in faults if len(f["loc"]) > 1), None)
    return Refusal("; ".join(dict.fromkeys(told)), param=param)


def _bounded(app: Any, most: int) -> Any:
    """An ASGI application that reads no larger bodies."""

    async def bounded(scope: Any, receive: Any, send: Any) -> None:
        read = 0

        async def received() -> Any:
            nonlocal read
            message = await receive()
            told = dict(scope["headers"]).get(b"content-length", b"0")
            read += len(message.get("body", b""))
            if read > most or int(told) > most:
                raise HTTPException(413, f"The body is larger than {most} bytes.")
            return message

        await app(scope, received if scope["type"] == "http" else receive, send)

    return bounded
