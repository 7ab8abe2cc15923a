"""The names that the command line offers, without the imports of what they name: `--help` must be instant."""

from __future__ import annotations

SAMPLERS = ("ddim", "ddpm", "euler", "dpmpp-2m")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
ATTENTION_BACKENDS = ("sdpa", "xformers", "sliced", "plain")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
