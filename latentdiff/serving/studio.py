"""What the page asks the server: under /api, for itself and for nobody else."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import Field

from latentdiff.request.options import CONTROL_MODES, PREPARATIONS
from latentdiff.serving import answers
from latentdiff.serving.asked import NAMES, OptionFields, Strict, decoded, options_in, seeds_from, size_of
from latentdiff.serving.command import TASK, command_line, control_flags, image_prompt_flags
from latentdiff.serving.engine import Engine
from latentdiff.serving.errors import Refused
from latentdiff.serving.gallery import SUFFIXES, Gallery, input_name
from latentdiff.serving.queue import Job
from latentdiff.serving.work import Draw, Failed, Following, Made, Preview, Resembling, Sent, Step

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class AskedImage(Strict):
    """An image that steers: how strongly, and in which share of the steps."""

    image: str
    scale: float = Field(1.0, ge=0)
    start: float = Field(0.0, ge=0, le=1)
    end: float = Field(1.0, ge=0, le=1)


class AskedImagePrompt(AskedImage):
    """One IP-Adapter with its image."""

    adapter: str


class AskedControl(AskedImage):
    """One ControlNet with its image."""

    model: str
    prepare: Literal[PREPARATIONS] | None = None  # type: ignore[valid-type]
    mode: Literal[CONTROL_MODES] | None = None  # type: ignore[valid-type]


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
    controls: list[AskedControl] = []
    control_guess: bool = False
    image_prompts: list[AskedImagePrompt] = []


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
        kept = {name: self._kept_input(name, getattr(asked, name)) for name in ("image", "mask")}
        taken = () if kept["image"] is None else ("strength",) if kept["mask"] is None else tuple(TASK)
        left = {"grow": 0, "blur": 0.0, "repeats": 1}  # as they are by default
        fields = {
            name: value for name, value in fields.items() if name not in TASK or (name in taken and value != left.get(name))
        }
        if kept["mask"] is not None:
            fields |= {"width": None, "height": None}
        steering = [flag for control in asked.controls for flag in self._control_flags(control)]
        steering += ["--control-guess"] * (asked.control_guess and bool(asked.controls))
        steering += [flag for prompt in asked.image_prompts for flag in self._image_prompt_flags(prompt)]
        if asked.image_prompts and settings.worker.image_encoder:
            files["--image-encoder"] = Path(settings.worker.image_encoder)
        given = {flag: path for flag, path in files.items() if path}
        return command_line(fields, given, **kept, steering=steering)

    def _draw(self, asked: Asked) -> Draw:
        image, mask = self._sent("image", asked.image), self._sent("mask", asked.mask)
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
            controls=tuple(self._following(control, asked.control_guess) for control in asked.controls),
            image_prompts=tuple(map(self._resembling, asked.image_prompts)),
            task=task,
            previews=asked.previews,
        )

    def _following(self, asked: AskedControl, guess: bool) -> Following:
        sent = self._steering_image("control", asked)
        return Following(
            model=str(self.engine.catalogue.control(asked.model)),
            image=sent,
            prepare=asked.prepare,
            scale=asked.scale,
            start=asked.start,
            end=asked.end,
            guess=guess,
            mode=asked.mode,
        )

    def _resembling(self, asked: AskedImagePrompt) -> Resembling:
        return Resembling(
            adapter=str(self.engine.catalogue.ip_adapter(asked.adapter)),
            image=self._steering_image("image prompt", asked),
            scale=asked.scale,
            start=asked.start,
            end=asked.end,
        )

    def _steering_image(self, kind: str, asked: AskedImage) -> Sent:
        sent = self._sent(f"image of a{'n' * (kind[0] == 'i')} {kind}", asked.image)
        if sent is None or asked.start >= asked.end:
            raise Refused(400, f"expected an image with each {kind}, and a start before its end")
        return sent

    def _control_flags(self, asked: AskedControl) -> list[str]:
        place = self.engine.catalogue.control(asked.model)
        image = self._kept_input("image of a control", asked.image) or Path("hint.png")
        return control_flags(image, place, asked.prepare, asked.mode, asked.scale, asked.start, asked.end)

    def _image_prompt_flags(self, asked: AskedImagePrompt) -> list[str]:
        place = self.engine.catalogue.ip_adapter(asked.adapter)
        image = self._kept_input("image of an image prompt", asked.image) or Path("image.png")
        return image_prompt_flags(image, place, asked.scale, asked.start, asked.end)

    def _sent(self, name: str, text: str | None) -> Sent | None:
        """A file that was sent, under the name that it has in the gallery."""
        if not text:
            return None
        sent = Sent(decoded(text, f"the {name}"))
        size_of(sent, name, self.engine.limits)
        return sent if self.gallery is None else Sent(sent.file, input_name(sent.file))

    def _kept_input(self, name: str, text: str | None) -> Path | None:
        """The file for a command line."""
        sent = self._sent(name, text)
        if sent is None or self.gallery is None:
            return sent and Path(f"{name.split()[0]}.png")
        return self.gallery.add_input(sent.file, sent.name)

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
        return answers.about(engine)

    @routes.post("/api/explain")
    async def explain(asked: answers.Explained) -> dict[str, Any]:
        """What a prompt means to a model, and which words it does not know."""
        return await asyncio.to_thread(answers.explain, engine, asked)

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
        return await asyncio.to_thread(lambda: answers.recipe(path.read_bytes()))

    @routes.get("/api/inputs/{name}")
    async def input_of(name: str) -> Response:
        """What an image of the gallery was made from."""
        path = _gallery(studio).input(name)
        return FileResponse(path, media_type=SUFFIXES.get(path.suffix.lower(), "application/octet-stream"))

    @routes.post("/api/recipe")
    async def recipe(request: Request) -> dict[str, Any]:
        """The recipe in an image that was dropped: ours, or another program's text."""
        return await asyncio.to_thread(answers.recipe, await request.body())

    return routes


def _gallery(studio: Studio) -> Gallery:
    if studio.gallery is None:
        raise Refused(404, "this server keeps no images")
    return studio.gallery


def _data_url(file: bytes, suffix: str) -> str:
    return f"data:{SUFFIXES[suffix]};base64,{base64.b64encode(file).decode()}"
