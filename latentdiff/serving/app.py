"""The application: all interfaces over one engine, behind the guard; and running it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from latentdiff import __version__
from latentdiff.errors import LatentDiffError, UsageError
from latentdiff.serving import openai, sdapi, sdapi_control, studio
from latentdiff.serving.engine import STOPPING, Engine
from latentdiff.serving.errors import OPENAI, Refused, body
from latentdiff.serving.metrics import Measured
from latentdiff.serving.security import Guard
from latentdiff.serving.settings import LOCAL, ServerSettings
from latentdiff.serving.training import Training
from latentdiff.serving.training import router as training_router

CONNECTIONS = 512  # at once; the next are answered with 503


def make_app(settings: ServerSettings) -> FastAPI:
    """The ASGI application; `app.state.engine` is what it draws with. The workers start with it.

    Raises:
        UsageError: it would be reached from other machines, and has no token.
    """
    if settings.host not in LOCAL and not settings.token:
        raise UsageError(
            f"expected a token for the address {settings.host}, which other machines reach; give --token, or set "
            "LATENTDIFF_TOKEN"
        )
    engine = Engine(settings)
    training = Training(engine)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        engine.workers.start()
        try:
            yield
        finally:
            engine.queue.close(STOPPING)
            await asyncio.to_thread(training.end, settings.grace)
            await asyncio.to_thread(engine.workers.stop, settings.grace)

    app = FastAPI(title="latentdiff", version=__version__, lifespan=life, redirect_slashes=False, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.include_router(openai.router(engine))
    app.include_router(sdapi.router(engine))
    app.include_router(sdapi_control.router(engine))
    app.include_router(studio.router(engine))
    app.include_router(training_router(training))
    app.include_router(_state(engine))
    app.add_exception_handler(LatentDiffError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Measured, metrics=engine.metrics)
    app.add_middleware(Guard, settings=settings)
    return app


def _state(engine: Engine) -> Any:
    routes = APIRouter(tags=["state"])

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """The server lives."""
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> Response:
        """It can draw: 200, or 503."""
        is_ready = bool(engine.workers.ready) and not engine.fault
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes


async def _on_error(request: Request, error: Exception) -> Response:
    refused = error if isinstance(error, Refused) else Refused(400, str(error), code="invalid_value")
    return JSONResponse(body(request.url.path, refused), refused.status, headers=refused.headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if request.url.path.startswith(OPENAI):
        return await _on_error(request, openai.invalid(error.errors()[0]))
    found = [{name: entry[name] for name in ("type", "loc", "msg")} for entry in error.errors()]  # not what was sent
    return JSONResponse({"detail": jsonable_encoder(found)}, 422)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return await _on_error(request, Refused(error.status_code, str(error.detail)))


class Server(uvicorn.Server):
    """Uvicorn, which on the first signal hands back what waits, so that only what is being made is waited for, and ends
    where the workers cannot work."""

    def check(self) -> None:
        """Raise a LatentDiffError if it ended for that."""
        if self._engine.fault:
            raise LatentDiffError(self._engine.fault)

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn."""
        return await super().on_tick(counter) or bool(self._engine.fault)

    @property
    def _engine(self) -> Engine:
        return self.config.app.state.engine  # type: ignore[union-attr]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn."""
        self._engine.queue.close(STOPPING)
        super().handle_exit(sig, frame)


def make_server(settings: ServerSettings) -> Server:
    """A server to be run by `server.run()`."""
    return Server(
        uvicorn.Config(
            make_app(settings),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=int(settings.grace) + 1,
            timeout_keep_alive=15,
            limit_concurrency=CONNECTIONS,
            ws="none",
        )
    )
