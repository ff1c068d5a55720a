"""The HTTP side, in OpenAI's shape: `model` names the tenant."""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bayou.errors import BayouError
from bayou.serving import page
from bayou.serving.answers import Conversation, Gone, error_body
from bayou.serving.engine import Engine
from bayou.serving.metrics import Metrics
from bayou.serving.refusals import Refused, refusal
from bayou.serving.requests import Chat, Completion, LoadAdapter, UnloadAdapter
from bayou.serving.roster import Roster
from bayou.serving.tenant import Tenant
from bayou.version import __version__

_log = logging.getLogger("bayou.serving")
_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class _Guard:
    """Refuses bodies over a limit, and requests under /v1 without the key where there is one."""

    def __init__(self, app: ASGIApp, body: int, key: str | None) -> None:
        self._app, self._body = app, body
        self._key = None if key is None else b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self._key and scope["path"].startswith("/v1/") and not hmac.compare_digest(given, self._key):
            await _error(Refused("the API key is missing or wrong", 401, "invalid_api_key"))(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._body:
            await _error(self._too_large())(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._body:  # a body in pieces, whose length nobody said
                raise HTTPException(413, str(self._too_large()))
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> Refused:
        return Refused(f"a request's body may have {self._body:,} bytes", 413, "body_too_large")


def _error(refused: Refused) -> JSONResponse:
    headers = {"Retry-After": "1"} if refused.status in (429, 503) else {}
    return JSONResponse(error_body(refused), refused.status, headers)


def _described(tenant: Tenant, engine: Engine) -> dict[str, Any]:
    base = engine.bank.base
    found = {"id": tenant.name, "object": "model", "created": tenant.created, "owned_by": "bayou"}
    found |= {"parent": None, "root": base.name, "max_model_len": engine.length, "bytes": engine.bank.base_bytes}
    found |= {"chat": tenant.voice.chats}
    if tenant.file is not None:
        found |= {"parent": base.name, "root": tenant.root, "bytes": tenant.file.nbytes, "fidelity": tenant.fidelity}
        found |= {"loaded": tenant.on_device is not None}
    return found


def application(engine: Engine, roster: Roster, *, key: str | None = None, body: int = 2**21) -> FastAPI:
    """The ASGI application over an engine, which is closed when it ends.

    key: what clients must send as a bearer token, None for no key. body: bytes of a request at most.
    """
    metrics = Metrics(engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    known = {400: "a request that cannot be answered", 404: "no such model", 409: "another base"}
    known |= {413: "too large", 422: "a file that cannot be served", 429: "the queue is full"}
    responses: dict[int | str, dict[str, Any]] = {status: {"description": text} for status, text in known.items()}
    app = FastAPI(
        title="Bayou", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=responses
    )
    app.state.metrics = metrics
    app.add_middleware(_Guard, body=body, key=key)

    def refuse(refused: Refused) -> JSONResponse:
        metrics.refused(refused.status)
        return _error(refused)

    @app.exception_handler(BayouError)
    async def _(_: Request, error: BayouError) -> JSONResponse:
        return refuse(refusal(error))

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return refuse(Refused(f"{where or 'body'}: {first['msg']:.300}", 400, "bad_request", where or None))

    @app.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> JSONResponse:
        return refuse(Refused(str(error.detail), error.status_code, _CODES.get(error.status_code, "refused")))

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return refuse(Refused("an error of the server's; its log has it", 500, "internal_error"))

    async def answer(wishes: Completion | Chat, request: Request) -> Response:
        tenant = await run_in_threadpool(roster.find, wishes.model)
        prompts = await run_in_threadpool(wishes.prompts, tenant.voice, engine.length)
        conversation = Conversation(engine, tenant, wishes)
        conversation.ask(prompts, asyncio.get_running_loop())
        if not wishes.stream:
            try:
                return JSONResponse(await conversation.whole(request))
            except Gone:
                return Response(status_code=499)  # nobody reads it
        events = conversation.events()
        try:
            first = await anext(events)
        except BaseException:
            conversation.leave()
            raise

        async def told() -> AsyncIterator[bytes]:
            try:
                yield first
                async for event in events:
                    yield event
            finally:
                conversation.leave()
                await events.aclose()

        return StreamingResponse(told(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.post("/v1/completions")
    async def completions(wishes: Completion, request: Request) -> Response:
        """Continue a text, or several."""
        return await answer(wishes, request)

    @app.post("/v1/chat/completions")
    async def chat(wishes: Chat, request: Request) -> Response:
        """Answer a conversation, by the tenant's own chat template."""
        return await answer(wishes, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base and its deltas: `parent`, bytes on disk, relative errors, whether there is a chat template."""
        names = [engine.bank.base.name, *engine.bank.names()]
        found = [tenant for name in names if (tenant := engine.bank.find(name)) is not None]
        return {"object": "list", "data": [_described(tenant, engine) for tenant in found]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return _described(await run_in_threadpool(roster.find, name), engine)

    @app.post("/v1/load_lora_adapter")
    async def load(wanted: LoadAdapter) -> PlainTextResponse:
        """Serve a file of --delta-dir, verified as a whole first. As vLLM's, so that its clients work."""
        await run_in_threadpool(roster.load, wanted.lora_name, wanted.lora_path, replacing=wanted.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{wanted.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(wanted: UnloadAdapter) -> PlainTextResponse:
        """Serve a delta no longer; answers in the making go on."""
        await run_in_threadpool(roster.unload, wanted.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{wanted.lora_name}' removed successfully.")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        """A page that asks several models at once, itself without a key: it has a field for one."""
        return HTMLResponse(page.TEXT, headers=page.HEADERS)

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken."""
        return JSONResponse({"status": "ok"}) if engine.alive else JSONResponse({"status": "closing"}, 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
