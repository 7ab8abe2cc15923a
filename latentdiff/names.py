"""The names that the command line offers, without importing what they name: `--help` must be instant."""

from __future__ import annotations

SAMPLER_NAMES = ("ddim", "ddpm", "euler", "dpmpp-2m", "unipc")
SPACING_NAMES = ("leading", "trailing", "linspace", "karras", "uniform-lambda", "ays")
ATTENTION_NAMES = ("auto", "sdpa", "xformers", "sliced", "plain")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")
BACKEND_NAMES = ("torch", "openvino", "compile")
LORA_DIALECTS = ("kohya", "peft")
INVERSION_NAMES = ("fixed-point", "ddim-high", "ddim-low", "edict", "null-text")
TRANSLATION_NAMES = ("features", "direct", "null-text", "negative-prompt", "edict", "ddim", "replay")
BLEND_NAMES = ("linear", "constant", "exponential")
OPERATOR_NAMES = ("inpaint", "super-resolution", "deblur", "denoise", "colourise")
RESTORATION_NAMES = ("diffpir", "dps", "psld", "resample", "graikos")
BORDER_NAMES = ("reflect", "periodic")
