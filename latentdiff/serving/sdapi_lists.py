"""What AUTOMATIC1111's interface lists for its clients to choose from."""

from __future__ import annotations

from typing import Any

from latentdiff.request.infotext import AUTOMATIC, SCHEDULES, TITLES, UPSCALERS
from latentdiff.serving.engine import Engine


def name_of(schedule: str) -> str:
    """What a schedule is called besides its label: "SGM Uniform" is "sgm_uniform"."""
    return schedule.lower().replace(" ", "_")


def title_of(engine: Engine, name: str) -> str:
    """A model with the beginning of its hash, where that is known."""
    facts = engine.facts(name)
    return f"{name} [{facts.hash[:10]}]" if facts and facts.hash else name


def lists(engine: Engine) -> dict[str, Any]:
    """What there is to choose from, by path."""
    catalogue = engine.catalogue

    def sd_models() -> list[dict[str, Any]]:
        facts = {name: engine.facts(name) for name in catalogue.models}
        hashes = {name: each.hash if each else None for name, each in facts.items()}
        return [
            {
                "title": title_of(engine, name),
                "model_name": name,
                "hash": found[:10] if found else None,
                "sha256": found,
                "filename": name,
                "config": None,
            }
            for name, found in hashes.items()
        ]

    def samplers() -> list[dict[str, Any]]:
        return [{"name": title, "aliases": [named.sampler], "options": {}} for title, named in TITLES.items()]

    def schedulers() -> list[dict[str, Any]]:
        rest = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return [
            {"name": name_of(title), "label": title, **rest} for title in (AUTOMATIC, *SCHEDULES)
        ]

    def loras() -> list[dict[str, Any]]:
        return [{"name": name, "alias": name, "path": path.name, "metadata": {}} for name, path in catalogue.loras.items()]

    def embeddings() -> dict[str, Any]:
        unknown = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 0, "vectors": 0}
        return {"loaded": dict.fromkeys(catalogue.embeddings, unknown), "skipped": {}}

    nothing = ("sd-vae", "hypernetworks", "face-restorers", "prompt-styles")
    return {
        "sd-models": sd_models,
        "samplers": samplers,
        "schedulers": schedulers,
        "loras": loras,
        "embeddings": embeddings,
        "upscalers": lambda: [{"name": name, "scale": 4} for name, own in UPSCALERS.items() if own == "lanczos"],
        "latent-upscale-modes": lambda: [{"name": name} for name, own in UPSCALERS.items() if own != "lanczos"],
        "scripts": lambda: dict.fromkeys(
            ("txt2img", "img2img"), ["controlnet"] if catalogue.controls or catalogue.ip_adapters else []
        ),
        "script-info": lambda: [],
        "cmd-flags": lambda: {},
        "memory": lambda: {"ram": {}, "cuda": {}},
        **{name: lambda: [] for name in nothing},
    }
