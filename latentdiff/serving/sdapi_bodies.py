"""The bodies of AUTOMATIC1111's interface, with its names and defaults."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Asked(BaseModel):
    """What both kinds of requests have. Fields that are not here are those of extensions, and are refused if they ask
    for something."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    subseed_strength: float = 0.0
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    steps: int = Field(50, ge=1)
    cfg_scale: float = 7.0
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    styles: list[str] | None = None
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] = {}
    override_settings: dict[str, Any] | None = None
    send_images: bool = True
    enable_hr: bool = False
    refiner_checkpoint: str | None = None


class Txt2Img(Asked):
    """The body of txt2img; the fields of a second, larger pass count with `enable_hr` alone."""

    denoising_strength: float | None = None
    hr_scale: float = Field(2.0, gt=1, le=8)
    hr_upscaler: str | None = None
    hr_second_pass_steps: int = Field(0, ge=0)
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str = ""
    hr_negative_prompt: str = ""


class Img2Img(Asked):
    """The body of img2img."""

    init_images: list[str] | None = None
    resize_mode: int = 0
    denoising_strength: float = Field(0.75, ge=0, le=1)
    image_cfg_scale: float | None = Field(None, ge=0)
    mask: str | None = None
    mask_blur: int | None = None
    inpainting_fill: int = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = Field(0, ge=0)
    inpainting_mask_invert: int = 0
    include_init_images: bool = False


class ImageBody(BaseModel):
    """An image in base64."""

    image: str
