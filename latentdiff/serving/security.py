"""What is refused before a route sees it: wrong hosts, other sites, wrong tokens, bodies too large or too slow."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, quote, unquote, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentdiff.serving.errors import Refused, body
from latentdiff.serving.settings import LOCAL, ServerSettings

COOKIE = "latentdiff-token"
OPEN = ("/health", "/ready")  # for whoever watches over the server; they tell nothing else
SAFE = ("GET", "HEAD", "OPTIONS")
WITH_IMAGES = (
    "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/png-info", "/controlnet/detect", "/api/draw",
    "/api/command", "/api/recipe",
)  # fmt: skip
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
POLICY = (  # the page loads nothing from anywhere else
    b"content-security-policy",
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
)


class Guard:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._is_local = settings.host in LOCAL

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path, headers = scope["path"], {name.decode("latin1"): text.decode("latin1") for name, text in scope["headers"]}
        try:
            self._check_host(headers)
            self._check_origin(scope, headers)
            if path not in OPEN:
                if (query := self._token_in_query(scope)) is not None:
                    return await _welcome(path, query, send)
                self._check_token(headers)
            limit = self._limit(path)
            if int(headers.get("content-length") or 0) > limit:
                raise _too_large(limit)
            receive = await self._bounded(receive, headers, limit)
        except (Refused, ValueError) as error:
            refused = error if isinstance(error, Refused) else Refused(400, "the request is malformed")
            return await _refuse(path, refused, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = any(name == POLICY[0] for name, _ in message["headers"])
                policy = () if own else (POLICY,)
                message["headers"] = [*message["headers"], *HEADERS, *policy]
            await send(message)

        await self._app(scope, receive, with_headers)

    def _check_host(self, headers: dict[str, str]) -> None:
        """A server for this machine is asked by the names of this machine; others are a site's that points here."""
        if self._is_local and _name(headers.get("host", "")) not in LOCAL:
            raise Refused(421, "this server answers to localhost only", code="misdirected_request")

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        """What a page of another site has the browser send is not what the user asked for."""
        if scope["method"] in SAFE:
            return
        origin = headers.get("origin")
        is_own = origin is None or urlsplit(origin).netloc == headers.get("host")
        if not is_own or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise Refused(403, "the request comes from the page of another site", code="cross_site")

    def _check_token(self, headers: dict[str, str]) -> None:
        token = self._settings.token
        if token is not None and not any(_same(found, token) for found in _tokens(headers)):
            raise Refused(401, "expected the token that the server was started with", code="invalid_api_key")

    def _token_in_query(self, scope: Scope) -> bytes | None:
        """The cookie for a browser whose address has the token, as `latentdiff serve` prints it."""
        token = self._settings.token
        given = parse_qs(scope["query_string"].decode("latin1")).get("token", [""])[0]
        if token is None or scope["path"] != "/" or not _same(given, token):
            return None
        return f"{COOKIE}={quote(token, safe='')}; Path=/; HttpOnly; SameSite=Strict".encode()

    def _limit(self, path: str) -> int:
        limits = self._settings.limits
        return limits.upload if path in WITH_IMAGES else limits.text

    async def _bounded(self, receive: Receive, headers: dict[str, str], limit: int) -> Receive:
        """The body, read whole within its limits of bytes and seconds before anything is done with it."""
        if not (headers.get("content-length", "0") != "0" or "transfer-encoding" in headers):
            return receive
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._settings.limits.body_seconds):
                more, size = True, 0
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise Refused(400, "the request ended before its body did")
                    part = message.get("body", b"")
                    parts.append(part)
                    size, more = size + len(part), message.get("more_body", False)
                    if size > limit:
                        raise _too_large(limit)
        except TimeoutError:
            seconds = self._settings.limits.body_seconds
            raise Refused(408, f"the request took longer than {seconds:g} seconds to arrive") from None
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay


def _tokens(headers: dict[str, str]) -> list[str]:
    """All that a request gives as a token: Bearer as OpenAI's clients, Basic as AUTOMATIC1111's, the page's cookie."""
    found: list[str] = []
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(rest.strip())
    elif scheme.lower() == "basic":
        try:
            found.append(base64.b64decode(rest, validate=True).decode().partition(":")[2])
        except (binascii.Error, UnicodeDecodeError):
            pass
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        cookie = None
    if cookie is not None:
        found.append(unquote(cookie.value))
    return found


def _same(found: str, token: str) -> bool:
    return hmac.compare_digest(found.encode(), token.encode())  # takes as long wherever they differ


def _name(host: str) -> str:
    """The name in "name:port" or "[address]:port"."""
    return urlsplit(f"//{host}").hostname or ""


def _too_large(limit: int) -> Refused:
    return Refused(413, f"expected a request of at most {limit:,} bytes", code="request_too_large")


async def _refuse(path: str, error: Refused, send: Send) -> None:
    content = json.dumps(body(path, error)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
    headers |= error.headers
    encoded = [(name.lower().encode(), text.encode()) for name, text in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": [*encoded, *HEADERS]})
    await send({"type": "http.response.body", "body": content})


async def _welcome(path: str, cookie: bytes, send: Send) -> None:
    headers = [(b"location", path.encode()), (b"set-cookie", cookie), *HEADERS]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
