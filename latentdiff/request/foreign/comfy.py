"""The graph of ComfyUI: from the sampler that made the image back to its prompts, its latents and its model.

Nodes of its core are read. What passes through others is followed, and they are named as refused.
"""

from __future__ import annotations

from typing import Any

from latentdiff.errors import DataError
from latentdiff.request.foreign.account import Account, Draft
from latentdiff.request.foreign.graph import Graph, Node

SAMPLERS = {
    "euler": "euler", "euler_ancestral": "euler-a", "heun": "heun", "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2-a",
    "lms": "lms", "dpmpp_2s_ancestral": "dpmpp-2s-a", "dpmpp_sde": "dpmpp-sde", "dpmpp_sde_gpu": "dpmpp-sde",
    "dpmpp_2m": "dpmpp-2m", "dpmpp_2m_sde": "dpmpp-2m-sde", "dpmpp_2m_sde_gpu": "dpmpp-2m-sde",
    "dpmpp_3m_sde": "dpmpp-3m-sde", "dpmpp_3m_sde_gpu": "dpmpp-3m-sde", "lcm": "lcm",
    "ddim": "euler",  # which is what ComfyUI makes of it
    "uni_pc": "unipc", "uni_pc_bh2": "unipc",
}  # fmt: skip
SCHEDULES = {
    "normal": "normal", "karras": "karras", "exponential": "exponential", "sgm_uniform": "sgm-uniform",
    "simple": "simple", "ddim_uniform": "ddim-uniform", "beta": "beta-comfy", "kl_optimal": "kl-optimal-comfy",
}  # fmt: skip
_DISCARDS = ("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2")
_NEARLY = {
    "uni_pc": "its order is that of diffusers here",
    "uni_pc_bh2": "its order is that of diffusers here",
    "lcm": "near the end some of its input is kept here, as in diffusers",
}
_PATHS = ("dpmpp-sde", "dpmpp-2m-sde", "dpmpp-3m-sde")
_KSAMPLERS = ("KSampler", "KSamplerAdvanced")
_PREVIEW = "PreviewImage"
_SAVES = ("SaveImage", _PREVIEW, "SaveAnimatedWEBP", "SaveAnimatedPNG", "SaveImageWebsocket")
_DECODERS = ("VAEDecode", "VAEDecodeTiled")
NEEDED = {"prompt": "positive", "seed": "seed", "steps": "steps", "sampler": "sampler_name", "width": "latent_image"}


def read(content: Any) -> Account:
    """The account of the JSON of a graph.

    Raises:
        DataError: it is no graph, its links go round in a circle, or several samplers end in images.
    """
    graph = Graph(content)
    draft = Draft("ComfyUI", prompt_syntax="comfy", noise_source="comfy", noise_start="unit", told_timesteps="whole")
    sampler, between = _sampler(graph)
    for node in between:
        if node.kind not in (*_DECODERS, *_SAVES):
            draft.refuse(str(node), "", "changes the image after it was made")
    _walk(draft, graph, sampler)
    _text(draft, graph, sampler, "positive", "prompt")
    _text(draft, graph, sampler, "negative", "negative_prompt")
    _model(draft, graph, sampler)
    _vae(draft, graph, between)
    _latents(draft, graph, sampler)
    _others(draft, graph, [*between[:1], sampler][0])
    draft.honour("(noise)", "CPU generator for the batch", "as ComfyUI on an NVIDIA GPU draws it")
    draft.require(NEEDED)
    return draft.account()


def _sampler(graph: Graph) -> tuple[Node, list[Node]]:
    """The sampler whose latents the saved image shows, and what lies between."""
    found: dict[str, tuple[Node, list[Node]]] = {}
    saves = graph.of_kind(*_SAVES)
    if any(save.kind != _PREVIEW for save in saves):
        saves = [save for save in saves if save.kind != _PREVIEW]
    for save in saves:
        between: list[Node] = []
        node: Node | None = None
        for node in graph.chain(save, "images", "image", "samples", "pixels", "latent", "latent_image"):
            if node.kind in _KSAMPLERS:
                break
            between.append(node)
        if node is not None and node.kind in _KSAMPLERS:
            graph.seen.add(save.id)
            found[node.id] = node, between
    if not found:
        lone = graph.of_kind(*_KSAMPLERS)
        found = {node.id: (node, []) for node in lone}
    if not found:
        other = ", ".join(sorted({node.kind for node in graph.nodes.values() if "ampler" in node.kind})[:5])
        raise DataError(
            "expected a KSampler or KSamplerAdvanced in the image's graph of ComfyUI, found "
            + (f"{other}, which latentdiff does not read" if other else "none")
        )
    if len(found) > 1:
        names = ", ".join(str(node) for node, _ in found.values())
        raise DataError(f"the image's graph of ComfyUI makes several images ({names}) and does not say which this is")
    return next(iter(found.values()))


def _walk(draft: Draft, graph: Graph, node: Node) -> None:
    """Seed, steps, guidance, sampler and schedule."""
    is_advanced = node.kind == "KSamplerAdvanced"
    said = {name: graph.value(node, name) for name in node.inputs}
    draft.number("seed", said.get("noise_seed" if is_advanced else "seed"), "seed", int)
    draft.number("steps", said.get("steps"), "steps", int)
    draft.number("cfg", said.get("cfg"), "guidance_scale")
    name, schedule = str(said.get("sampler_name")), str(said.get("scheduler"))
    if name not in SAMPLERS:
        draft.lack("sampler_name", name, "there is no such sampler here")
    else:
        options = {"sampler": SAMPLERS[name], "discard_penultimate": name in _DISCARDS}
        if SAMPLERS[name] in _PATHS:
            draft.approximate("sampler_name", name, "a Brownian path of k-diffusion there, one of ours here", **options)
        elif name in _NEARLY:
            draft.approximate("sampler_name", name, _NEARLY[name], **options)
        else:
            draft.honour("sampler_name", name, SAMPLERS[name], **options)
    if schedule in SCHEDULES:
        draft.honour("scheduler", schedule, SCHEDULES[schedule], spacing=SCHEDULES[schedule])
    else:
        draft.lack("scheduler", schedule, "there is no such schedule here")
    read = {"seed", "noise_seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"}
    read |= {"model", "positive", "negative", "latent_image", "control_after_generate"}
    whole = {"add_noise": "enable", "start_at_step": 0, "return_with_leftover_noise": "disable"}
    for key, value in said.items():
        if is_advanced and (whole.get(key) == value or (key == "end_at_step" and _reaches(value, said.get("steps")))):
            draft.honour(key, value)
        elif key not in read:
            draft.refuse(key, value, "a part of a walk is not made alone here" if is_advanced else "is not known")


def _reaches(end: Any, steps: Any) -> bool:
    return isinstance(end, int) and isinstance(steps, int) and end >= steps


def _text(draft: Draft, graph: Graph, sampler: Node, name: str, option: str) -> None:
    """A prompt, through what changes embeddings, and the layer that it is taken from."""
    node = None
    inputs = ("conditioning", name, "conditioning_1", "conditioning_to")
    for node in graph.chain(graph.behind(sampler, name), *inputs):
        if node.kind == "CLIPTextEncode":
            break
        draft.refuse(f"{name}: {node}", "", "what is done to embeddings besides a prompt is not done here")
    if node is None or node.kind != "CLIPTextEncode":
        draft.lack(name, "", "there is no CLIPTextEncode behind it")
        return
    text = graph.value(node, "text")
    if not isinstance(text, str):
        source = graph.behind(node, "text")
        draft.lack(name, source or "", "its text is computed by a node that is not read here")
        return
    draft.honour(name, text, **{option: text})
    for one in graph.chain(graph.behind(node, "clip"), "clip"):
        if one.kind == "CLIPSetLastLayer":
            layer = graph.value(one, "stop_at_clip_layer")
            skip = -layer if isinstance(layer, int) and layer < 0 else 0
            if skip:
                draft.honour(f"{name}: {one}", layer, clip_skip=skip)
            else:
                draft.refuse(f"{name}: {one}", layer, "expected a layer from the end, below 0")
        elif one.kind not in ("LoraLoader", "CheckpointLoaderSimple", "CheckpointLoader"):
            draft.refuse(f"{name}: {one}", "", "is not read here; --text-encoder names another text encoder")


def _model(draft: Draft, graph: Graph, sampler: Node) -> None:
    """The checkpoint, and what is attached to it, nearest to the checkpoint first."""
    for node in reversed(list(graph.chain(graph.behind(sampler, "model"), "model"))):
        said = {name: graph.value(node, name) for name in node.inputs if graph.linked(node.inputs[name]) is None}
        if node.kind in ("CheckpointLoaderSimple", "CheckpointLoader"):
            draft.model = str(said.get("ckpt_name", ""))
            draft.honour("ckpt_name", draft.model, "name its file with --model")
        elif node.kind in ("LoraLoader", "LoraLoaderModelOnly"):
            name, unet, text = said.get("lora_name"), said.get("strength_model"), said.get("strength_clip", 0.0)
            draft.attach(str(node), f"{name}: {unet}, {text}", name, unet, text)
        elif node.kind == "ModelSamplingDiscrete":
            _prediction(draft, node, said)
        elif node.kind == "RescaleCFG":
            why = "as Lin et al. have it; ComfyUI rescales in other units"
            draft.approximate(str(node), said.get("multiplier"), why)
            draft.number(f"{node}: multiplier", said.get("multiplier"), "guidance_rescale")
        else:
            draft.refuse(str(node), said, "what it does to the model is not done here")
    if not draft.model:
        draft.refuse("model", "", "no CheckpointLoaderSimple is behind it; name the model with --model")


def _prediction(draft: Draft, node: Node, said: dict[str, Any]) -> None:
    kinds = {"eps": "epsilon", "v_prediction": "v_prediction", "x0": "sample"}
    kind = str(said.get("sampling"))
    if kind not in kinds:
        draft.refuse(str(node), said, f"expected sampling {', '.join(kinds)}")
        return
    draft.model_options["prediction_type"] = kinds[kind]
    if said.get("zsnr"):
        draft.model_options["zero_terminal_snr"] = True
    draft.honour(str(node), said)


def _vae(draft: Draft, graph: Graph, between: list[Node]) -> None:
    for node in between:
        vae = graph.behind(node, "vae") if node.kind in _DECODERS else None
        if vae is not None and vae.kind == "VAELoader":
            draft.model_options["vae"] = str(graph.value(vae, "vae_name"))
            draft.honour("vae_name", draft.model_options["vae"], "name its file with --vae")


def _latents(draft: Draft, graph: Graph, sampler: Node) -> None:
    """What the walk starts from: nothing, or an image."""
    node, denoise = graph.behind(sampler, "latent_image"), graph.value(sampler, "denoise")
    is_whole = denoise is None or denoise == 1
    index = 0
    if node is not None and node.kind == "LatentFromBatch":
        index, inner = graph.value(node, "batch_index"), graph.behind(node, "samples")
        if isinstance(index, int) and graph.value(node, "length") == 1:
            draft.honour(str(node), index, noise_index=index)
        else:
            draft.refuse(str(node), index, "it takes several images of a batch")
        node = inner
    if node is not None and node.kind == "EmptyLatentImage" and is_whole:
        draft.number("width", graph.value(node, "width"), "width", int)
        draft.number("height", graph.value(node, "height"), "height", int)
        count = graph.value(node, "batch_size")
        if isinstance(count, int) and count > 1 and "noise_index" not in draft.options:
            why = f"the file does not say which it is: --noise-index 0 to {count - 1}, where 0 is the first"
            draft.approximate("batch_size", count, why)
        elif count is not None:
            draft.honour("batch_size", count)
        if denoise is not None:
            draft.honour("denoise", denoise)
        return
    _image(draft, graph, node, denoise)


def _others(draft: Draft, graph: Graph, end: Node) -> None:
    """The nodes that nothing has been said of."""
    leading = graph.above(end)
    for node in graph.nodes.values():
        if node.id in leading and node.id not in graph.seen | {end.id}:
            draft.refuse(str(node), "", "what it does to the image is not done here")
        elif node.kind == _PREVIEW:
            draft.approximate(str(node), "", f"the image is taken for that of {end}, not for this preview")
        elif node.id not in leading:
            draft.honour(str(node), "", "does not lead to the image")


def _image(draft: Draft, graph: Graph, node: Node | None, denoise: Any) -> None:
    kinds = {"VAEEncode": "edit", "VAEEncodeForInpaint": "inpaint", "SetLatentNoiseMask": "inpaint"}
    if node is None or node.kind not in kinds or not isinstance(denoise, int | float) or not 0 < denoise <= 1:
        what = f"from {node} with denoise {denoise}" if node else "from nothing that is known"
        why = "a second pass is not made here" if node and node.kind.startswith("LatentUpscale") else "is not read here"
        draft.lack("latent_image", what, f"beginning there {why}")
        return
    draft.task, draft.strength = kinds[node.kind], float(denoise)
    names = ("pixels", "samples", "image")
    source: Node | None = node
    for _ in range(3):
        source = next((one for key in names if source and (one := graph.behind(source, key))), source)
    name = graph.value(source, "image") if source is not None and source.kind == "LoadImage" else None
    draft.options["width"] = None
    steps = draft.options.get("steps")
    if isinstance(steps, int):
        draft.options["steps"] = int(steps / float(denoise))
    why = "made from this image, which the command names; the noise levels are nearly the same"
    draft.approximate("latent_image", name or node, why)
    draft.approximate("denoise", denoise, "ComfyUI cuts the same schedule, and takes all of steps below")
