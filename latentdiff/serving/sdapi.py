"""AUTOMATIC1111's interface, /sdapi/v1: what its clients ask for is done as its web UI does it, or refused by name.

Facts from its modules/api/api.py and models.py (webui 1.10). Names of samplers and schedules are in `request.infotext`.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter, Request

from latentdiff.errors import DataError, UsageError
from latentdiff.reading.images import opened
from latentdiff.reading.texts import texts_of
from latentdiff.recipe import TEXT_CHUNK
from latentdiff.request.infotext import AUTOMATIC, SAMPLER_TITLES, SCHEDULES, UPSCALERS, read_sampler, split
from latentdiff.request.options import checked
from latentdiff.serving.asked import decoded, seeds_from
from latentdiff.serving.engine import Engine
from latentdiff.serving.errors import Refused, of_failure
from latentdiff.serving.queue import Job
from latentdiff.serving.sdapi_bodies import Asked, ImageBody, Img2Img, Txt2Img
from latentdiff.serving.sdapi_control import SCRIPT, steering
from latentdiff.serving.sdapi_lists import lists, name_of, title_of
from latentdiff.serving.work import Draw, Made, Sent

FITS: tuple[Literal["resize", "crop", "pad"], ...] = ("resize", "crop", "pad")  # by `resize_mode`
RNG = {"GPU": "nv", "NV": "nv", "CPU": "cpu"}
FILL, ORIGINAL = 0, 1  # of `inpainting_fill`


class State:
    """What this interface remembers between requests: the one before the others, and the chosen model."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model = engine.settings.default_model
        self.jobs: list[Job] = []
        self.interrupted = False


def router(engine: Engine) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    state = State(engine)

    @routes.post("/txt2img")
    async def txt2img(asked: Txt2Img, request: Request) -> dict[str, Any]:
        """Images of a prompt, in one pass or in two."""
        return await _answer(state, asked, _from_prompt(state, asked), request)

    @routes.post("/img2img")
    async def img2img(asked: Img2Img, request: Request) -> dict[str, Any]:
        """A changed image; with a mask, changed where that is white."""
        return await _answer(state, asked, _from_image(state, asked), request)

    @routes.get("/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """How far the first of the requests is."""
        return _progress(state, skip_current_image)

    @routes.post("/interrupt")
    @routes.post("/skip")
    async def interrupt() -> dict[str, Any]:
        """End what is being made; its request is answered with the images that there are."""
        state.interrupted = bool(state.jobs)
        for job in state.jobs[:1]:
            engine.cancel(job)
        return {}

    @routes.post("/png-info")
    async def png_info(asked: ImageBody) -> dict[str, Any]:
        """The text that an image carries."""
        try:
            with opened(_file(asked.image).file, "the image") as image:
                texts = texts_of(image)
        except DataError as error:
            raise Refused(500, "Invalid encoded image") from error
        info = texts.pop(TEXT_CHUNK, "")
        return {"info": info, "items": {TEXT_CHUNK: info, **texts}, "parameters": _parameters(info)}

    @routes.get("/options")
    async def options() -> dict[str, Any]:
        """The model that requests are answered by, and how it numbers noise."""
        return {"sd_model_checkpoint": title_of(engine, state.model), "randn_source": "CPU", "samples_format": "png"}

    @routes.post("/options")
    async def set_options(asked: dict[str, Any]) -> None:
        """Choose another model for the requests that name none."""
        if rest := asked.keys() - {"sd_model_checkpoint"}:
            raise Refused(422, f"expected no option but sd_model_checkpoint, found {', '.join(sorted(rest))}")
        state.model = _model(state, asked.get("sd_model_checkpoint"))

    for path, value in lists(engine).items():
        routes.add_api_route(f"/{path}", value, methods=["GET"])
    routes.add_api_route("/refresh-checkpoints", lambda: None, methods=["POST"])
    return routes


def _draw(state: State, asked: Asked, image: Sent | None = None) -> Draw:
    units = _units(asked)
    override = dict(asked.override_settings or {})
    model = _model(state, override.pop("sd_model_checkpoint", None) or state.model)
    title = asked.sampler_name or asked.sampler_index or "Euler"
    try:
        method = read_sampler(title, _schedule(asked.scheduler))
    except DataError:
        raise Refused(404, "Sampler not found") from None
    options = {
        "steps": asked.steps,
        "guidance_scale": asked.cfg_scale,
        "sampler": method.sampler,
        "spacing": method.spacing,
        "discard_penultimate": method.discard_penultimate,
        "clip_skip": override.pop("CLIP_stop_at_last_layers", None),
        "noise_source": RNG.get(override.pop("randn_source", None)),
        "eta": asked.eta,
        "s_noise": asked.s_noise,
        "s_churn": asked.s_churn,
        "s_tmin": asked.s_tmin,
        "s_tmax": asked.s_tmax or None,  # 0 is no limit there
    }
    if override:
        raise Refused(422, f"these override_settings are not known here: {', '.join(sorted(override))}")
    return Draw(
        model=model,
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        width=asked.width,
        height=asked.height,
        options=checked({name: value for name, value in options.items() if value is not None}),
        lenient=True,
        image=image,
        **steering(state.engine, units, _size(state, asked, model), image),
    )


def _size(state: State, asked: Asked, model: str) -> tuple[int, int]:
    """Width and height of what is made, as far as that is known before the model is loaded."""
    facts = state.engine.facts(model)
    own = facts.size if facts else (512, 512)
    return asked.width or own[0], asked.height or own[1]


def _from_prompt(state: State, asked: Txt2Img) -> Draw:
    draw = _draw(state, asked)
    own: dict[str, Any] = {"seamless": "xy"} if asked.tiling else {}
    if asked.enable_hr:
        same = {"hr_sampler_name": asked.sampler_name, "hr_scheduler": asked.scheduler, "hr_prompt": asked.prompt}
        same |= {"hr_negative_prompt": asked.negative_prompt, "hr_checkpoint_name": None}
        same |= {"hr_resize_x": 0, "hr_resize_y": 0}
        if other := [name for name, first in same.items() if getattr(asked, name) not in (None, "", 0, first)]:
            raise Refused(422, f"{', '.join(other)}: the second pass is like the first here; leave it out")
        upscaler = asked.hr_upscaler or "Latent"
        if upscaler not in UPSCALERS:
            raise Refused(422, f"expected a hr_upscaler of {', '.join(UPSCALERS)}, found {upscaler}")
        own |= {"hires": asked.hr_scale, "hires_upscaler": UPSCALERS[upscaler]}
        own |= {"hires_steps": asked.hr_second_pass_steps or None, "hires_strength": asked.denoising_strength or 0.75}
    own = checked({name: value for name, value in own.items() if value is not None})
    return replace(draw, options={**draw.options, **own})


def _from_image(state: State, asked: Img2Img) -> Draw:
    if not asked.init_images:
        raise Refused(404, "Init image not found")
    if len(asked.init_images) > 1:
        raise Refused(422, f"expected one image in init_images, found {len(asked.init_images)}")
    if asked.resize_mode not in range(len(FITS)):
        raise Refused(422, f"expected a resize_mode of 0 to 2, found {asked.resize_mode}")
    task: dict[str, Any] = {"strength": asked.denoising_strength}
    if asked.image_cfg_scale is not None and not asked.mask:
        task["image_guidance_scale"] = asked.image_cfg_scale
    if asked.mask:
        if asked.inpainting_fill not in (FILL, ORIGINAL):
            raise Refused(422, f"expected an inpainting_fill of 0 (fill) or 1, found {asked.inpainting_fill}")
        task |= {
            "remove": asked.inpainting_fill == FILL,
            "blur": float(4 if asked.mask_blur is None else asked.mask_blur),
            "only_masked": asked.inpaint_full_res,
            "padding": asked.inpaint_full_res_padding,
        }
    return replace(
        _draw(state, asked, _file(asked.init_images[0])),
        mask=_file(asked.mask) if asked.mask else None,
        invert_mask=bool(asked.inpainting_mask_invert),
        task=task,
        fit=FITS[asked.resize_mode],
    )


def _units(asked: Asked) -> list[Any]:
    """The arguments of the ControlNet extension; what else is asked for and is not here is refused."""
    scripts = {name: arguments for name, given in asked.alwayson_scripts.items() if (arguments := _arguments(given))}
    units = [unit for name in list(scripts) if name.lower() == SCRIPT for unit in scripts.pop(name)]
    for name in filter(None, [asked.script_name, *scripts]):
        raise Refused(422, f"Script '{name}' not found")
    wanted = {
        "enable_hr": asked.enable_hr and not isinstance(asked, Txt2Img),
        "restore_faces": asked.restore_faces,
        "tiling": asked.tiling and not isinstance(asked, Txt2Img),
        "subseed_strength": asked.subseed_strength,
        "styles": asked.styles,
        "refiner_checkpoint": asked.refiner_checkpoint,
    }
    if found := [name for name, value in wanted.items() if value]:
        raise Refused(422, f"{', '.join(found)}: this is not done here; leave it out")
    return units


def _arguments(script: Any) -> list[Any]:
    """What an extension is asked for; clients send empty arguments and [False] to switch it off."""
    arguments = script.get("args", []) if isinstance(script, dict) else script
    return [] if not arguments or arguments == [False] else arguments if isinstance(arguments, list) else [arguments]


def _schedule(name: str | None) -> str | None:
    """The title of a schedule, which clients give by its name too: "karras" as "Karras"."""
    if name is None:
        return None
    titles = {name_of(title): title for title in (AUTOMATIC, *SCHEDULES)}
    return titles.get(name_of(name), name)


def _model(state: State, name: str | None) -> str:
    """A model by its name or its title, "name [hash]"."""
    plain = (name or state.model).partition(" [")[0]
    if plain not in state.engine.catalogue.models:
        raise Refused(404, "Model not found")
    return plain


async def _answer(state: State, asked: Asked, draw: Draw, request: Request) -> dict[str, Any]:
    job = state.engine.submit(draw, seeds_from(asked.seed, asked.batch_size * asked.n_iter))
    state.jobs.append(job)
    try:
        await state.engine.wait(job, request)
    finally:
        state.jobs.remove(job)
    failure = job.failure
    if failure is not None and failure.kind != "cancelled":
        raise of_failure(failure)
    made = job.made
    with_images = ("init_images", "mask", "alwayson_scripts")
    sent = {name: value for name, value in asked.model_dump().items() if name not in with_images}
    return {
        "images": [base64.b64encode(image.file).decode() for image in made] if asked.send_images else [],
        "parameters": sent,
        "info": json.dumps(_info(asked, job, made)),
    }


def _info(asked: Asked, job: Job, made: list[Made]) -> dict[str, Any]:
    seeds = [piece.seed for piece in job.pieces]
    facts = {"width": made[0].width, "height": made[0].height} if made else {}
    hashes = {json.loads(image.recipe)["model_hash"] for image in made}
    return {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(seeds),
        "negative_prompt": asked.negative_prompt,
        "all_negative_prompts": [asked.negative_prompt] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        **facts,
        "sampler_name": SAMPLER_TITLES[job.draw.options["sampler"]],
        "cfg_scale": asked.cfg_scale,
        "steps": asked.steps,
        "batch_size": asked.batch_size,
        "sd_model_name": job.draw.model,
        "sd_model_hash": next(iter(hashes), "")[:10],
        "denoising_strength": job.draw.task.get("strength"),
        "index_of_first_image": 0,
        "infotexts": [image.parameters for image in made],
        "job_timestamp": datetime.now().strftime("%Y%m%d%H%M%S"),
    }


def _progress(state: State, without_image: bool) -> dict[str, Any]:
    job = state.jobs[0] if state.jobs else None
    told = {"skipped": False, "interrupted": state.interrupted and job is not None, "stopping_generation": False}
    if job is None:
        idle = {"job": "", "job_count": 0, "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
        return {"progress": 0.0, "eta_relative": 0.0, "state": told | idle, "current_image": None, "textinfo": None}
    at = next((step for place, step in sorted(job.steps.items()) if place not in job.ends), None)
    preview = next(iter(job.previews.values()), None)
    if not without_image:
        for piece in job.pieces[:1]:
            state.engine.workers.peek(piece.number)
    seconds = time.monotonic() - (job.began or time.monotonic())
    share = job.progress
    busy = {
        "job": "img2img" if job.draw.image else "txt2img",
        "job_count": len(job.pieces),
        "job_timestamp": str(job.number),
        "job_no": len(job.ends),
        "sampling_step": at.done if at else 0,
        "sampling_steps": at.steps if at else 0,
    }
    return {
        "progress": max(0.01, share),
        "eta_relative": seconds / share - seconds if share else 0.0,
        "state": told | busy,
        "current_image": base64.b64encode(preview.png).decode() if preview and not without_image else None,
        "textinfo": None,
    }


def _file(text: str) -> Sent:
    try:
        return Sent(decoded(text, "an image"))
    except UsageError as error:
        raise Refused(500, "Invalid encoded image") from error


def _parameters(info: str) -> dict[str, str]:
    """The text by its parts, under the names that the web UI gives them."""
    if not info:
        return {}
    try:
        found = split(info)
    except DataError:
        return {}
    return {"Prompt": found.prompt, "Negative prompt": found.negative, **found.settings}
