"""What a single file says of itself to other programs: Stability AI's model metadata standard, version 1.0.0."""

from __future__ import annotations

from latentdiff.checkpoints.families import SD, family_with
from latentdiff.checkpoints.modules import parse_config
from latentdiff.checkpoints.raw import RawModel
from latentdiff.networks.inputs import DEPTH, INPAINTING, INSTRUCTIONS, inputs_of

_IMPLEMENTATION = "https://github.com/CompVis/stable-diffusion"
_IMPLEMENTATION_OF_XL = "https://github.com/Stability-AI/generative-models"
_TASKS = {DEPTH: "-depth", INPAINTING: "-inpainting", INSTRUCTIONS: "-instruct-pix2pix"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_PUBLISHED = {(320, 768, False): "stable-diffusion-v1", (320, 1024, True): "stable-diffusion-v2"}


def modelspec(raw: RawModel, title: str) -> dict[str, str]:
    """Metadata for the header of a safetensors file."""
    unet, vae = parse_config("unet", raw.configs["unet"]), parse_config("vae", raw.configs["vae"])
    prediction = raw.configs["scheduler"].get("prediction_type", "epsilon")
    side = unet.sample_size * vae.downscale
    sizes = (unet.block_out_channels[0], unet.cross_attention_dim, unet.use_linear_projection)
    family = family_with(raw.parts)
    architecture = _PUBLISHED.get(sizes, "stable-diffusion-v2" if sizes[2] else "stable-diffusion-v1")
    if family is not SD:
        architecture = family.title
    if architecture.endswith("v2"):
        architecture += "-768-v" if prediction == "v_prediction" else "-512"
    architecture += _TASKS.get(inputs_of(unet, vae.latent_channels), "")
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": _IMPLEMENTATION if family is SD else _IMPLEMENTATION_OF_XL,
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": _PREDICTIONS[prediction],
    }
