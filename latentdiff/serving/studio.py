"""What the page asks the server: under /api, for itself and for nobody else."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import Field

from latentdiff import __version__
from latentdiff.errors import LatentDiffError
from latentdiff.reading.images import opened
from latentdiff.reading.texts import texts_of
from latentdiff.recipe import TEXT_CHUNK, read_account
from latentdiff.request.domains import Choice, Real, Whole
from latentdiff.request.option_texts import texts
from latentdiff.request.options import OPTIONS
from latentdiff.serving.asked import NAMES, OptionFields, decoded, options_in, seeds_from
from latentdiff.serving.command import TASK, command_line
from latentdiff.serving.engine import Engine
from latentdiff.serving.errors import Refused
from latentdiff.serving.gallery import SUFFIXES, Gallery
from latentdiff.serving.queue import Job
from latentdiff.serving.work import Draw, Failed, Made, Preview, Step

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class Asked(OptionFields):
    """What the form of the page says."""

    prompt: str = ""
    negative_prompt: str = ""
    model: str | None = None
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    num_images: int = Field(1, ge=1)
    previews: int = Field(0, ge=0, le=20)
    image: str | None = None
    mask: str | None = None
    strength: float | None = Field(None, ge=0, le=1)
    grow: int = Field(0, ge=0, le=512)
    blur: float = Field(0.0, ge=0, le=512)
    padding: int | None = Field(None, ge=0, le=4096)
    repeats: int = Field(1, ge=1)
    only_masked: bool = False
    remove: bool = False


class Explained(OptionFields):
    """Texts whose meaning is asked for."""

    prompt: str
    negative_prompt: str = ""
    model: str | None = None
    width: int | None = None
    height: int | None = None


class Studio:
    """The page's jobs, of which the last ones are kept, and its images."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        out = engine.settings.out
        self.gallery = Gallery(out) if out else None
        self.jobs: OrderedDict[int, Job] = OrderedDict()
        self.urls: dict[tuple[int, int], str] = {}

    def draw(self, asked: Asked) -> dict[str, Any]:
        """Begin a job; returns what the page has to know of it."""
        seeds = seeds_from(asked.seed, asked.num_images)
        job = self.engine.submit(self._draw(asked), seeds)
        self.jobs[job.number] = job
        while len(self.jobs) > self.engine.limits.finished and next(iter(self.jobs.values())).is_over:
            old, _ = self.jobs.popitem(last=False)
            self.urls = {key: url for key, url in self.urls.items() if key[0] != old}
        return {"job": job.number, "seeds": seeds, "command": self.command(asked, seeds[0])}

    def job(self, number: int) -> Job:
        """One of the jobs.

        Raises:
            Refused: it is not known, or no longer.
        """
        if number not in self.jobs:
            raise Refused(404, "there is no such job")
        return self.jobs[number]

    async def events(self, job: Job) -> AsyncIterator[str]:
        """What happens to a job, for an EventSource."""
        async for event in job.events():
            match event:
                case Step(numbers, done, steps):
                    told = {"type": "step", "places": numbers, "done": done, "steps": steps}
                case Preview(place, png=png):
                    told = {"type": "preview", "place": place, "url": _data_url(png, ".png")}
                case Made(place):
                    url = await asyncio.to_thread(self._keep, job, place, event)
                    recipe = json.loads(event.recipe)
                    told = {"type": "image", "place": place, "url": url, "recipe": recipe, "text": event.parameters}
                case Failed(place, kind, message):
                    told = {"type": "failed", "place": place, "kind": kind, "message": message}
            yield f"data: {json.dumps(told)}\n\n"
        yield 'data: {"type": "end"}\n\n'

    def command(self, asked: Asked, seed: int | None) -> str:
        """The command line of a form; what it begins from is kept as files first."""
        fields = {name: getattr(asked, name) for name in ("prompt", "negative_prompt", "num_images", *NAMES, *TASK)}
        fields |= {"seed": seed, "width": asked.width, "height": asked.height}
        settings = self.engine.settings
        source = settings.worker.models[self.engine.catalogue.model(asked.model)]
        files = {"--model": source and Path(source), "--lora-dir": settings.loras, "--out": settings.out}
        kept = {name: self._input(name, getattr(asked, name)) for name in ("image", "mask")}
        taken = () if kept["image"] is None else ("strength",) if kept["mask"] is None else tuple(TASK)
        left = {"grow": 0, "blur": 0.0, "repeats": 1}  # as they are by default
        fields = {
            name: value for name, value in fields.items() if name not in TASK or (name in taken and value != left.get(name))
        }
        if kept["mask"] is not None:
            fields |= {"width": None, "height": None}
        return command_line(fields, {flag: path for flag, path in files.items() if path}, **kept)

    def _draw(self, asked: Asked) -> Draw:
        image = decoded(asked.image, "the image") if asked.image else None
        mask = decoded(asked.mask, "the mask") if asked.mask else None
        if mask is not None and image is None:
            raise Refused(400, "expected an image with the mask")
        names = [] if image is None else ["strength"] if mask is None else list(TASK)
        task = {name: value for name in names if (value := getattr(asked, name)) is not None}
        return Draw(
            model=self.engine.catalogue.model(asked.model),
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            width=None if mask is not None else asked.width,
            height=None if mask is not None else asked.height,
            options=options_in(asked),
            image=image,
            mask=mask,
            task=task,
            previews=asked.previews,
        )

    def _input(self, name: str, text: str | None) -> Path | None:
        if not text:
            return None
        if self.gallery is None:
            return Path(f"{name}.png")
        file = decoded(text, f"the {name}")
        with opened(file, f"the {name}") as image:
            kind = image.format or "png"
        return self.gallery.add_input(file, "jpg" if kind == "JPEG" else kind)

    def _keep(self, job: Job, place: int, made: Made) -> str:
        """Where the page finds an image: a file of the gallery, written once however many watch."""
        if self.gallery is None:
            return _data_url(made.file, job.draw.suffix)
        if (job.number, place) not in self.urls:
            name = self.gallery.add(made.file, job.draw.suffix, job.pieces[place].seed)
            self.urls[job.number, place] = f"api/images/{name}"
        return self.urls[job.number, place]


def router(engine: Engine) -> APIRouter:
    """The routes of the page."""
    routes = APIRouter(tags=["page"])
    studio = Studio(engine)

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return await page("docs.html")

    @routes.get("/", include_in_schema=False)
    @routes.get("/page/{name}", include_in_schema=False)
    async def page(name: str = "index.html") -> Response:
        files = {path.name: path for path in PAGE.iterdir() if path.suffix in KINDS}
        if name not in files:
            raise Refused(404, "there is no such file")
        return FileResponse(files[name], media_type=KINDS[files[name].suffix], headers={"Cache-Control": "no-cache"})

    @routes.get("/api/about")
    async def about() -> dict[str, Any]:
        """What there is to choose from."""
        return _about(engine)

    @routes.post("/api/explain")
    async def explain(asked: Explained) -> dict[str, Any]:
        """What a prompt means to a model, and which words it does not know."""
        return await asyncio.to_thread(_explain, engine, asked)

    @routes.post("/api/draw")
    async def draw(asked: Asked) -> dict[str, Any]:
        """Begin to draw."""
        return await asyncio.to_thread(studio.draw, asked)

    @routes.post("/api/command")
    async def command(asked: Asked) -> dict[str, str]:
        """The command line that says the same."""
        return {"command": await asyncio.to_thread(studio.command, asked, asked.seed)}

    @routes.get("/api/jobs/{number}/events")
    async def events(number: int) -> Response:
        """What happens to a job."""
        return StreamingResponse(
            studio.events(studio.job(number)), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    @routes.post("/api/jobs/{number}/cancel")
    async def cancel(number: int) -> dict[str, bool]:
        """End a job."""
        engine.cancel(studio.job(number))
        return {"cancelled": True}

    @routes.get("/api/images")
    async def images() -> list[str]:
        """The gallery, the latest first."""
        return await asyncio.to_thread(studio.gallery.names) if studio.gallery else []

    @routes.get("/api/images/{name}")
    async def image(name: str) -> Response:
        """One image of the gallery."""
        path = _gallery(studio).path(name)
        return FileResponse(path, media_type=SUFFIXES[path.suffix.lower()])

    @routes.get("/api/images/{name}/recipe")
    async def recipe_of(name: str) -> dict[str, Any]:
        """The recipe in an image of the gallery."""
        path = _gallery(studio).path(name)
        return await asyncio.to_thread(lambda: _recipe(path.read_bytes()))

    @routes.post("/api/recipe")
    async def recipe(request: Request) -> dict[str, Any]:
        """The recipe in an image that was dropped: ours, or another program's text."""
        return await asyncio.to_thread(_recipe, await request.body())

    return routes


def _gallery(studio: Studio) -> Gallery:
    if studio.gallery is None:
        raise Refused(404, "this server keeps no images")
    return studio.gallery


def _about(engine: Engine) -> dict[str, Any]:
    models = {name: engine.facts(name) for name in engine.catalogue.models}
    options = {}
    for name in NAMES:
        domain = OPTIONS[name].domain
        told: dict[str, Any] = {"text": texts()[name], "default": OPTIONS[name].default, "kind": type(domain).__name__}
        if isinstance(domain, Choice):
            told["choices"] = domain.names
        elif isinstance(domain, Whole | Real):
            told |= {"low": domain.low, "high": domain.high}
        options[name] = told
    words = engine.catalogue.words(engine.settings.default_model)
    limits = engine.limits
    return {
        "version": __version__,
        "ready": bool(engine.workers.ready),
        "fault": engine.fault,
        "models": {
            name: facts and {"size": facts.size, "steps": facts.steps, "guidance": facts.guidance, "sampler": facts.sampler}
            for name, facts in models.items()
        },
        "options": options,
        "loras": list(engine.catalogue.loras),
        "embeddings": engine.catalogue.embeddings,
        "limits": {"side": limits.side, "steps": limits.steps, "images": limits.images, "prompt": limits.prompt},
        "words": words.kinds if words else None,
    }


def _explain(engine: Engine, asked: Explained) -> dict[str, Any]:
    model = engine.catalogue.model(asked.model)
    if max(len(asked.prompt), len(asked.negative_prompt)) > engine.limits.prompt:
        raise Refused(400, f"expected at most {engine.limits.prompt:,} characters")
    syntax, steps = asked.prompt_syntax or "a1111", min(asked.steps or 25, engine.limits.steps)
    told: dict[str, Any] = {}
    for name, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt)):
        try:
            found = engine.catalogue.account(model, text, syntax, steps, negative=name != "prompt")
        except LatentDiffError as error:
            told[name] = {"error": str(error)}
            continue
        chunks = [chunk for stages in found.stages for stage in stages for chunk in stage.chunks]
        told[name] = {
            "tokens": max((stage.count for stages in found.stages for stage in stages), default=0),
            "room": found.room,
            "chunks": [[{"text": t.text, "count": t.count, "weight": t.weight} for t in chunk] for chunk in chunks],
            "loras": [str(tag) for tag in found.prompt.loras],
            "unheeded": list(dict.fromkeys(found.prompt.unheeded)),
            "cut": found.cut,
        }
    words = engine.catalogue.words(model)
    told["remarks"] = list(words.remarks([asked.prompt], asked.width, asked.height)) if words and asked.prompt else []
    return told


def _recipe(file: bytes) -> dict[str, Any]:
    with opened(file, "the image") as image:
        image.load()
        found = texts_of(image)
        size = image.size
    account = read_account(found)
    options = {name: value for name, value in account.options.items() if value is not None}
    return {
        "program": account.program,
        "size": size,
        "task": account.task,
        "strength": account.strength,
        "model": account.model,
        "options": options,
        "loras": [f"{lora.file}: {lora.strength}" for lora in account.loras],
        "lacking": list(account.lacking),
        "fields": [
            {"name": f.name, "value": f.value[:2000], "verdict": f.verdict, "why": f.why} for f in account.fields
        ],
        "text": found.get(TEXT_CHUNK, ""),
    }


def _data_url(file: bytes, suffix: str) -> str:
    return f"data:{SUFFIXES[suffix]};base64,{base64.b64encode(file).decode()}"
