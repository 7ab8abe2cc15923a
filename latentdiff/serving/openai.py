"""OpenAI's images interface: /v1/images/generations, /v1/images/edits and /v1/models.

https://platform.openai.com/docs/api-reference/images. All options of `latentdiff generate` are taken besides, under
their names in Python: steps, guidance_scale, sampler, seed, negative_prompt, ... (`extra_body` in the Python client).
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile

from latentdiff.serving.asked import OptionFields, options_in, seeds_from
from latentdiff.serving.engine import Engine
from latentdiff.serving.errors import Refused, body, of_failure
from latentdiff.serving.queue import Job
from latentdiff.serving.work import Draw, Failed, Made, Preview, Sent

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
MOST = 10  # images of a request, as OpenAI has it
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class Common(OptionFields):
    """What generations and edits have in common. What only OpenAI's models can do is taken and means nothing."""

    prompt: str
    model: str | None = None
    n: int = Field(1, ge=1, le=MOST)
    size: str | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100)
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    background: Literal["auto", "opaque"] | None = None
    quality: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    seed: int | None = Field(None, lt=2**64)
    negative_prompt: str = ""


class Generation(Common):
    """The body of /v1/images/generations."""

    style: str | None = None
    moderation: str | None = None


class Edit(Common):
    """The fields of /v1/images/edits, besides the files `image` and `mask`."""

    input_fidelity: str | None = None
    strength: float | None = Field(None, ge=0, le=1)


def router(engine: Engine) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/images/generations")
    async def generations(asked: Generation, request: Request) -> Any:
        """Images of a prompt."""
        return await _answer(engine, asked, _draw(engine, asked), request, "image_generation")

    @routes.post("/images/edits", openapi_extra=_EDITS)
    async def edits(request: Request) -> Any:
        """A changed image; with a mask, changed only where that is transparent."""
        async with request.form(max_files=17, max_fields=100) as form:
            names = {"image": "image", "image[]": "image", "mask": "mask"}
            files = {role: await _file(form.getlist(name), role) for name, role in names.items() if name in form}
            fields = {name: text for name, text in form.items() if name not in names}
        if "image" not in files:
            raise Refused(400, "Missing required parameter: 'image'.", param="image", code="missing_required_parameter")
        asked = read(Edit, fields)
        draw = _draw(engine, asked, **files, mask_kind="transparent" if "mask" in files else "white")
        return await _answer(engine, asked, draw, request, "image_edit")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The models that there are."""
        return {"object": "list", "data": [_model(name) for name in engine.catalogue.models]}

    @routes.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return _model(engine.catalogue.model(name))

    return routes


def read(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """Fields as a body.

    Raises:
        Refused: one is missing, unknown or outside its domain.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid(error.errors()[0]) from error


def invalid(first: Mapping[str, Any]) -> Refused:
    """What pydantic found, as OpenAI says it."""
    name = ".".join(str(part) for part in first["loc"] if part != "body") or None
    match first["type"]:
        case "missing":
            return Refused(400, f"Missing required parameter: {name!r}.", param=name, code="missing_required_parameter")
        case "extra_forbidden":
            return Refused(400, f"Unknown parameter: {name!r}.", param=name, code="unknown_parameter")
    return Refused(400, f"Invalid value for {name!r}: {first['msg']}", param=name, code="invalid_value")


def _draw(engine: Engine, asked: Common, **files: Any) -> Draw:
    width, height = _size(asked.size)
    strength = getattr(asked, "strength", None)
    return Draw(
        model=engine.catalogue.model(asked.model),
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        width=width,
        height=height,
        options=options_in(asked),
        task={} if strength is None else {"strength": strength},
        fit="resize" if files and width else None,
        previews=asked.partial_images if asked.stream else 0,
        suffix=SUFFIXES[asked.output_format],
        quality=max(1, asked.output_compression),
        **files,
    )


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text in (None, "auto"):
        return None, None
    found = _SIZE.fullmatch(text)
    if not found:
        raise Refused(400, f"expected a size of WIDTHxHEIGHT or auto, found {text!r}", param="size", code="invalid_value")
    return int(found[1]), int(found[2])


async def _file(values: list[Any], name: str) -> Sent:
    if len(values) != 1 or not isinstance(values[0], UploadFile):
        raise Refused(400, f"expected one file as {name!r}, found {len(values)}", param=name, code="invalid_value")
    return Sent(await values[0].read())


async def _answer(engine: Engine, asked: Common, draw: Draw, request: Request, kind: str) -> Any:
    job = engine.submit(draw, seeds_from(asked.seed, asked.n))
    if asked.stream:
        events = _stream(engine, asked, job, request.url.path, kind)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    made = await engine.finish(job, request)
    return {
        "created": int(time.time()),
        "data": [{"b64_json": base64.b64encode(image.file).decode()} for image in made],
        "background": "opaque",
        "output_format": asked.output_format,
        "size": f"{made[0].width}x{made[0].height}",
        "usage": _usage(engine, draw),
    }


async def _stream(engine: Engine, asked: Common, job: Job, path: str, kind: str) -> AsyncIterator[str]:
    size = asked.size or "auto"
    try:
        async for event in job.events():
            common = {"background": "opaque", "created_at": int(time.time()), "quality": "auto"}
            match event:
                case Preview(index=int(index), png=png):
                    told = {"partial_image_index": index, "size": size, "output_format": "png"}
                    yield _event(f"{kind}.partial_image", common | told | _encoded(png))
                case Made(file=file, width=width, height=height):
                    told = {"size": f"{width}x{height}", "output_format": asked.output_format}
                    told["usage"] = _usage(engine, job.draw)
                    yield _event(f"{kind}.completed", common | told | _encoded(file))
                case Failed():
                    yield _event("error", body(path, of_failure(event)))
                    return
    finally:
        engine.cancel(job)


def _event(kind: str, fields: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


def _encoded(file: bytes) -> dict[str, str]:
    return {"b64_json": base64.b64encode(file).decode()}


def _usage(engine: Engine, draw: Draw) -> dict[str, Any]:
    """Tokens of the prompt; images are not counted in tokens here."""
    tokens = engine.catalogue.tokens(draw.model, draw.prompt)
    details = {"text_tokens": tokens, "image_tokens": 0}
    return {"input_tokens": tokens, "input_tokens_details": details, "output_tokens": 0, "total_tokens": tokens}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "latentdiff"}


_EDITS = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompt"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "mask": {"type": "string", "format": "binary"},
                        **Edit.model_json_schema()["properties"],
                    },
                }
            }
        },
    }
}
