"""The names that the command line offers, without importing what they name: `--help` must be instant."""

from __future__ import annotations

SAMPLER_NAMES = ("ddim", "ddpm", "euler", "dpmpp-2m")
ATTENTION_NAMES = ("sdpa", "xformers", "sliced", "plain")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
