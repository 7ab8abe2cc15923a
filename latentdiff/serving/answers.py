"""What the page is told: what there is to choose from, what a prompt means, how an image was made."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from latentdiff import __version__
from latentdiff.errors import LatentDiffError
from latentdiff.reading.images import opened
from latentdiff.reading.texts import texts_of
from latentdiff.recipe import JSON_CHUNK, TEXT_CHUNK, Recipe, read_account, read_recipe
from latentdiff.request.domains import Choice, Real, Whole
from latentdiff.request.option_texts import texts
from latentdiff.request.options import CONTROL_MODES, OPTIONS, PREPARATIONS
from latentdiff.serving.asked import NAMES, OptionFields
from latentdiff.serving.engine import Engine
from latentdiff.serving.errors import Refused


class Explained(OptionFields):
    """Texts whose meaning is asked for."""

    prompt: str
    negative_prompt: str = ""
    model: str | None = None
    width: int | None = None
    height: int | None = None


def about(engine: Engine) -> dict[str, Any]:
    """What there is to choose from."""
    models = {name: engine.facts(name) for name in engine.catalogue.models}
    options = {}
    for name in NAMES:
        domain = OPTIONS[name].domain
        told: dict[str, Any] = {"text": texts()[name], "default": OPTIONS[name].default, "kind": type(domain).__name__,
                                "heading": OPTIONS[name].heading}
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
        "controls": {name: path.name for name, path in engine.catalogue.controls.items()},
        "ip_adapters": {name: path.name for name, path in engine.catalogue.ip_adapters.items()},
        "preparations": PREPARATIONS,
        "control_modes": CONTROL_MODES,
        "limits": {"side": limits.side, "steps": limits.steps, "images": limits.images, "prompt": limits.prompt,
                   "controls": limits.controls},
        "words": words.kinds if words else None,
    }


def explain(engine: Engine, asked: Explained) -> dict[str, Any]:
    """What prompts mean to a model, and which words it does not know.

    Raises:
        Refused: there is no such model, or the prompt is longer than the limit.
    """
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


def recipe(file: bytes) -> dict[str, Any]:
    """How the image in a file was made; of ours also what it was made from.

    Raises:
        DataError: it is no image, or says nothing of that.
    """
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
        **(_made_from(read_recipe(found)) if JSON_CHUNK in found else {}),
    }


def _made_from(recipe: Recipe) -> dict[str, Any]:
    """Under the names of recipes."""
    steering = {name: [asdict(one) for one in getattr(recipe, name)] for name in ("controls", "image_prompts")}
    return {"sources": recipe.sources, **steering, "task_settings": recipe.task_settings}
