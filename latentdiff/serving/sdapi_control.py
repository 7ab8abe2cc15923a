"""What the ControlNet extension adds to AUTOMATIC1111's interface: units in `alwayson_scripts`, and lists.

Facts from github.com/Mikubill/sd-webui-controlnet: internal_controlnet/args.py (fields, defaults), scripts/enums.py
(modes), scripts/api.py (routes) and scripts/supported_preprocessor.py (modules; those of IP-Adapters heed no control mode,
and neither resolution nor resize mode, as the image goes to CLIP as it is).
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from latentdiff.errors import LatentDiffError
from latentdiff.serving.asked import check_hint, decoded, size_of
from latentdiff.serving.engine import Engine
from latentdiff.serving.errors import Refused
from latentdiff.serving.work import Fit, Following, Resembling, Sent

SCRIPT = "controlnet"
MODULES = {"none": None, "canny": "canny", "tile_resample": "tile", "scribble": "scribble"}  # ours by its own name
IP_ADAPTERS = "ip-adapter-auto", "ip-adapter_clip_sd15", "ip-adapter_clip_sdxl", "ip-adapter_clip_sdxl_plus_vith"
SLIDERS = {  # of a module: title, default, least and largest value
    "canny": (("Low Threshold", 100, 1, 255), ("High Threshold", 200, 1, 255)),
    "scribble": (("Low Threshold", 100, 1, 255), ("High Threshold", 200, 1, 255)),
    "tile": (("Down Sampling Rate", 1, 1, 8),),
}
SLIDER_OF = {"canny": ("low", "high"), "scribble": ("low", "high"), "tile": ("factor",)}
RESOLUTION = ("Resolution", 512, 64, 2048)
FITS: dict[str | int, Fit] = {
    0: "resize", 1: "crop", 2: "pad", "Just Resize": "resize", "Crop and Resize": "crop", "Resize and Fill": "pad",
    "Inner Fit (Scale to Fit)": "crop", "Scale to Fit (Inner Fit)": "crop", "Outer Fit (Shrink to Fit)": "pad",
    "Envelope (Outer Fit)": "pad",
}  # fmt: skip
UNIONS = {
    "Unknown": None, "OpenPose": "openpose", "Depth": "depth", "Soft Edge": "scribble", "Hard Edge": "canny",
    "Normal Map": "normal", "Segmentation": "segment",
}  # fmt: skip
GUESS = {0: False, 2: True, "Balanced": False, "ControlNet is more important": True}


class Unit(BaseModel):
    """One ControlNet or IP-Adapter with its image. What concerns the extension's own page and memory means nothing here."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    enabled: bool = True
    module: str = "none"
    model: str = "None"
    weight: float = Field(1.0, ge=0, le=2)
    image: Any = Field(None, validation_alias=AliasChoices("image", "input_image"))
    mask: Any = Field(None, validation_alias=AliasChoices("mask", "mask_image"))
    resize_mode: str | int = "Crop and Resize"
    processor_res: int = -1
    threshold_a: float = -1
    threshold_b: float = -1
    guidance_start: float = Field(0.0, ge=0, le=1)
    guidance_end: float = Field(1.0, ge=0, le=1, validation_alias=AliasChoices("guidance_end", "guidance"))
    pixel_perfect: bool = False
    control_mode: str | int = "Balanced"
    hr_option: str = "Both"
    union_control_type: str = "Unknown"
    advanced_weighting: Any = None
    effective_region_mask: Any = None
    ipadapter_input: Any = None

    @property
    def is_image_prompt(self) -> bool:
        """Whether its model is an IP-Adapter."""
        return self.module.lower() in IP_ADAPTERS


class Detect(BaseModel):
    """The body of /controlnet/detect; webuiapi calls the images by the other name."""

    controlnet_module: str = "none"
    controlnet_input_images: list[str] = Field(
        [], validation_alias=AliasChoices("controlnet_input_images", "controlnet_images")
    )
    controlnet_processor_res: int = -1
    controlnet_threshold_a: float = -1
    controlnet_threshold_b: float = -1


def steering(
    engine: Engine, arguments: Sequence[Any], size: tuple[int, int], image: Sent | None = None
) -> dict[str, Any]:
    """The `controls` and `image_prompts` of a `Draw` that the arguments of the extension ask for.

    Args:
        arguments: units; others, such as the switches of old versions, are left out.
        size: width and height of what is made.
        image: what img2img begins from, which units without an image of their own follow.

    Raises:
        Refused: a unit is not as the extension has it, or asks for what is not done here.
    """
    try:
        units = [Unit.model_validate(unit) for unit in arguments if isinstance(unit, dict)]
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(422, f"ControlNet: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    found: list[Following | Resembling] = []
    for unit in units:
        if unit.enabled:
            given = _checked(unit, image)
            found.append(
                _resembling(engine, unit, given) if unit.is_image_prompt else _following(engine, unit, size, given)
            )
    kinds = {"controls": Following, "image_prompts": Resembling}
    return {name: tuple(one for one in found if isinstance(one, kind)) for name, kind in kinds.items()}


def _checked(unit: Unit, image: Sent | None) -> Sent:
    """The image of a unit that asks for nothing that is not done here."""
    names = ("mask", "advanced_weighting", "effective_region_mask", "ipadapter_input")
    if found := [name for name in names if getattr(unit, name)]:
        raise Refused(422, f"ControlNet: {', '.join(found)}: this is not done here; leave it out")
    chosen: dict[str, Any] = {"hr_option": ("Both",)}
    if not unit.is_image_prompt:
        chosen |= {"control_mode": GUESS, "resize_mode": FITS, "union_control_type": UNIONS}
    for name, choices in chosen.items():
        if (value := getattr(unit, name)) not in choices:
            known = ", ".join(choice for choice in choices if isinstance(choice, str))
            raise Refused(422, f"ControlNet: expected a {name} of {known}, found {value}")
    if unit.guidance_start >= unit.guidance_end:
        raise Refused(422, f"ControlNet: guidance_start({unit.guidance_start}) > guidance_end({unit.guidance_end})")
    given = _image(unit.image) or image
    if given is None:
        raise Refused(422, "ControlNet: a unit has no image")
    return given


def _resembling(engine: Engine, unit: Unit, given: Sent) -> Resembling:
    return Resembling(
        adapter=str(engine.catalogue.ip_adapter(_name(unit))),
        image=given,
        scale=unit.weight,
        start=unit.guidance_start,
        end=unit.guidance_end,
    )


def _name(unit: Unit) -> str:
    """The model of a unit without the hash that clients may put behind it."""
    return unit.model.partition(" [")[0]


def _following(engine: Engine, unit: Unit, size: tuple[int, int], given: Sent) -> Following:
    kind = _kind(unit.module)
    fit = FITS[unit.resize_mode]
    resolution = _within(unit.processor_res, RESOLUTION)
    if unit.pixel_perfect:
        own = size_of(given, "image of a control", engine.limits)
        factors = size[0] / own[0], size[1] / own[1]
        resolution = max(1, round(min(own) * (min(factors) if fit == "pad" else max(factors))))
    return Following(
        model=str(engine.catalogue.control(_name(unit))),
        image=given,
        prepare=kind,
        preparation=_preparation(kind, unit.threshold_a, unit.threshold_b),
        resolution=resolution if kind and kind != "tile" else None,
        fit=fit,
        scale=unit.weight,
        start=unit.guidance_start,
        end=unit.guidance_end,
        guess=GUESS[unit.control_mode],
        mode=UNIONS[unit.union_control_type],
    )


def _image(given: Any) -> Sent | None:
    """An image of a unit: base64, or that as {"image": ..., "mask": None}."""
    if isinstance(given, dict) and not given.get("mask"):
        given = given.get("image")
    if given is None or given == "":
        return None
    if not isinstance(given, str):
        raise Refused(422, "ControlNet: expected an image in base64, without a mask")
    try:
        return Sent(decoded(given, "an image"))
    except LatentDiffError as error:
        raise Refused(500, "Invalid encoded image") from error


def _kind(module: str) -> str | None:
    found = MODULES.get(module.lower(), module)
    if found is not None and found not in SLIDERS:
        raise Refused(422, f"module({module}) not found in supported modules: {', '.join((*MODULES, *IP_ADAPTERS))}")
    return found


def _preparation(kind: str | None, *thresholds: float) -> dict[str, int]:
    """Options of a preparation; values outside a slider are its default, as in the extension."""
    if kind is None:
        return {}
    return {
        name: round(_within(value, slider))
        for name, value, slider in zip(SLIDER_OF[kind], thresholds, SLIDERS[kind], strict=False)
    }


def _within(value: float, slider: tuple[str, int, int, int]) -> Any:
    _, default, low, high = slider
    return value if low <= value <= high else default


def router(engine: Engine) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/controlnet", tags=["AUTOMATIC1111"])

    @routes.get("/version")
    async def version() -> dict[str, int]:
        """Of the extension's interface."""
        return {"version": 2}

    @routes.get("/model_list")
    async def model_list() -> dict[str, list[str]]:
        """The ControlNets and IP-Adapters that there are."""
        return {"model_list": [*engine.catalogue.controls, *engine.catalogue.ip_adapters]}

    @routes.get("/module_list")
    async def module_list() -> dict[str, Any]:
        """What hints are made by, and what sees the images of IP-Adapters."""
        modules = {**MODULES, **dict.fromkeys(IP_ADAPTERS)}
        return {"module_list": list(modules), "module_detail": {name: _detail(kind) for name, kind in modules.items()}}

    @routes.get("/settings")
    async def settings() -> dict[str, int]:
        """How many units there may be."""
        return {"control_net_unit_count": engine.limits.controls}

    @routes.post("/detect")
    async def detect(asked: Detect) -> dict[str, Any]:
        """The hints of images."""
        return await asyncio.to_thread(_detected, engine, asked)

    return routes


def _detail(kind: str | None) -> dict[str, Any]:
    sliders = [] if kind is None else [RESOLUTION, *SLIDERS[kind]]
    names = ("name", "value", "min", "max")
    return {"model_free": False, "sliders": [dict(zip(names, slider, strict=True)) for slider in sliders]}


def _detected(engine: Engine, asked: Detect) -> dict[str, Any]:
    if not asked.controlnet_input_images:
        raise Refused(422, "No image selected")
    if (count := len(asked.controlnet_input_images)) > engine.limits.images:
        raise Refused(422, f"expected at most {engine.limits.images} images, found {count}")
    if asked.controlnet_module.lower() in IP_ADAPTERS:
        raise Refused(422, f"{asked.controlnet_module} makes no image of its own to show")
    from latentdiff.serving.hints import hint

    kind = _kind(asked.controlnet_module)
    thresholds = asked.controlnet_threshold_a, asked.controlnet_threshold_b
    found = []
    for text in asked.controlnet_input_images:
        sent = _image(text)
        if sent is None:
            raise Refused(422, "No image selected")
        following = Following(
            model="",
            image=sent,
            prepare=kind,
            preparation=_preparation(kind, *thresholds),
            resolution=_within(asked.controlnet_processor_res, RESOLUTION) if kind and kind != "tile" else None,
        )
        check_hint(following, engine.limits)
        file = io.BytesIO()
        hint(following, (0, 0)).save(file, "PNG")
        found.append(base64.b64encode(file.getvalue()).decode())
    return {"info": "Success", "images": found}
