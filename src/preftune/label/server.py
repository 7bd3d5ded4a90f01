"""The page over HTTP, for this machine only: 127.0.0.1, a secret in each link, and nothing that names a file.

Links carry the secret behind "#", which no browser sends; the page's script sends it as a header, which no
page of another site can. So there are no cookies and nothing to forge.
"""

import asyncio
import hmac
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preftune.config.base import Settings
from preftune.errors import PreftuneError, UsageError
from preftune.label.judgements import Judgement, Undone
from preftune.label.page import SERVED_POLICY, asset, served_page
from preftune.label.results import as_rows
from preftune.label.store import Conflict, Store
from preftune.records.base import first_fault
from preftune.untrusted import printable

LIMIT = 128 * 1024  # bytes of a body
PATIENCE = 10.0  # seconds for a body to come
_HEADERS = {
    "content-security-policy": SERVED_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
S = TypeVar("S", bound=Settings)


class Guard:
    """Refuses before anything is looked at: other hosts' names (DNS rebinding), other sites, large bodies."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and the end; there are no websockets here
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        body = b""
        if refusal is None:
            try:
                async with asyncio.timeout(PATIENCE):
                    body = await _whole(receive)
            except ValueError:
                refusal = (413, f"a body may have {LIMIT} bytes")
            except (TimeoutError, ConnectionError):
                refusal = (408, "the body did not come")
        if refusal is not None:
            await JSONResponse({"error": refusal[1]}, refusal[0])(scope, receive, answer)
            return

        async def again() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, answer)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        if [host.lower() for host in headers.getlist("host")] not in ([host] for host in self.hosts):
            return 421, "this server answers to its own address only"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin not in (None, *(f"http://{host}" for host in self.hosts)) or site not in (
            "none",
            "same-origin",
        ):
            own_page = scope["method"] == "GET" and scope["path"] == "/" and origin is None
            if not own_page:  # a link in a mail may lead to the empty page
                return 403, "another site asked"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()) or int(length[:12]) > LIMIT:
            return 413, f"a body may have {LIMIT} bytes"
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0] != "application/json"
        ):
            return 415, "only application/json"
        return None


async def _whole(receive: Receive) -> bytes:
    """The body. ValueError once it is too large, ConnectionError if its sender is gone."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError
        body += message.get("body", b"")
        if len(body) > LIMIT:
            raise ValueError
        if not message.get("more_body"):
            return body


def make_app(store: Store, tokens: Mapping[str, str], port: int) -> Starlette:
    """The application; `tokens` maps raters, and "" for the owner, to their secrets."""

    def rater_of(request: Request) -> str:
        """The rater whose secret was sent, "" for the owner."""
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        sent = secret.encode()
        names = [name for name, token in tokens.items() if hmac.compare_digest(token.encode(), sent)]
        if kind != "Bearer" or not names:
            raise HTTPException(401, "open the whole link that preftune label has printed")
        return names[0]

    def rater(request: Request) -> str:
        if not (name := rater_of(request)):
            raise HTTPException(403, "the owner's link shows results; raters have links of their own")
        return name

    async def state(request: Request) -> Response:
        name = rater_of(request)
        if name:
            return JSONResponse(store.state(name))
        return JSONResponse({"results": await run_in_threadpool(as_rows, store)})  # seconds for ten thousand

    async def judge(request: Request) -> Response:
        name = rater(request)
        return _apply(store, name, lambda sent: store.record(name, sent), await _sent(request, Judgement))

    async def undo(request: Request) -> Response:
        name = rater(request)
        return _apply(store, name, lambda undone: store.undo(name, undone), await _sent(request, Undone))

    routes = [
        Route("/", _text(served_page(), "text/html"), methods=["GET"]),
        Route("/label.js", _text(asset("label.js"), "text/javascript"), methods=["GET"]),
        Route("/label.css", _text(asset("label.css"), "text/css"), methods=["GET"]),
        Route("/api/state", state, methods=["GET"]),
        Route("/api/judge", judge, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
    ]
    hosts = frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost"))
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={HTTPException: _refused, PreftuneError: _failed, OSError: _failed},
    )
    app.router.redirect_slashes = False
    return app


def _apply(store: Store, name: str, change: Callable[[S], None], sent: S) -> Response:
    """Make a change and answer with what comes next; 409 with the same where another tab was first."""
    try:
        change(sent)
    except Conflict:
        return JSONResponse(store.state(name), 409)
    return JSONResponse(store.state(name))


async def _sent(request: Request, kind: type[S]) -> S:
    try:
        return kind.model_validate(json.loads(await request.body()))
    except ValidationError as error:
        raise HTTPException(422, first_fault(error)) from None
    except (ValueError, RecursionError):
        raise HTTPException(400, "not JSON") from None


def _text(content: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def give(request: Request) -> Response:
        return Response(content, media_type=kind)

    return give


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    """Input that does not fit is answered to the page; what could not be written is also told in the
    terminal.
    """
    if isinstance(error, UsageError):
        return JSONResponse({"error": error.message}, 422)
    print(f"not saved: {printable(error)}", file=sys.stderr)
    return JSONResponse({"error": "not saved"}, 500)


def serve(app: Starlette, port: int) -> None:
    """Answer until Ctrl-C."""
    settings: dict[str, Any] = {"server_header": False, "date_header": False, "access_log": False}
    settings |= {"log_level": "warning", "ws": "none", "http": "h11", "lifespan": "off"}
    settings |= {
        "h11_max_incomplete_event_size": 16384,
        "limit_concurrency": 100,
        "timeout_graceful_shutdown": 3,
    }
    uvicorn.run(app, host="127.0.0.1", port=port, **settings)
