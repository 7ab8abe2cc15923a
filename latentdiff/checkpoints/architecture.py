"""Telling what a set of named tensors is, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from latentdiff.checkpoints.families import SD, UNET_PREFIX, Family, family_in
from latentdiff.checkpoints.keymap import Shape
from latentdiff.errors import CheckpointError

CONTROL, IMAGE_PROMPT, T2I = STEERING = ("ControlNet", "IP-Adapter", "T2I-Adapter")
UPSCALER = "upscaler of the ESRGAN family"
UNKNOWN = "unknown architecture"
WRAPPERS = ("params_ema.", "params.", "module.", "netG.")  # before the names of upscalers
OF_IP_ADAPTER = ("image_proj", "ip_adapter")  # the two parts of its file
_TEXT_OF_XL = "conditioner.embedders."
# Parts of names that only other architectures have. The first that occurs decides.
_OTHERS = (
    ("motion_modules.", "AnimateDiff motion module"),
    (_TEXT_OF_XL, "SDXL"),  # in a file of another family
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux"),
    ("single_transformer_blocks.", "Flux"),
    ("double_layers.", "AuraFlow"),
    ("clip_txt_mapper.", "Stable Cascade"),
    (".channelwise.0.", "Stable Cascade"),
    ("cap_embedder.", "Lumina"),
    ("txt_in.individual_token_refiner.", "Hunyuan Video"),
    ("adaln_single.", "PixArt diffusion transformer"),
    ("img_mod.1.", "Qwen Image"),
    ("blocks.0.cross_attn.", "video diffusion transformer"),
    ("control_model.", CONTROL),
    ("controlnet_cond_embedding.", CONTROL),
    ("input_hint_block.", CONTROL),
    ("t2i_adapter.", T2I),
    ("body.0.block1.", T2I),
    ("body.0.body.0.block1.", T2I),
    ("body.0.resnets.0.block1.", T2I),
    ("transformer_layes.", T2I),
    ("ip_adapter.", "a part of an IP-Adapter"),
    ("adaLN_modulation.", "diffusion transformer"),
)
# What names of tensors in adapter files end in, and the kinds that are told by it.
_ADAPTERS = {
    "LoRA": r"lora_(up|down|A|B)(\.\w+)?\.(weight|bias)|(lora|\w+_lora|lora_linear_layer)\.(up|down)\.weight",
    "LoRA with a middle matrix": r"lora_mid(\.\w+)?\.weight",
    "LoHa": r"hada_\w+",
    "LoKr": r"lokr_\w+",
    "OFT or BOFT": r"oft_blocks|oft_R(\.\w+)*|boft_[Rs]|rescale",
    "IA3": r"on_input|ia3_l",
    "GLoRA": r"(a1|a2|b1|b2|bm)\.weight",
    "T-LoRA": r"lambda_layer|[pq]_layer\.weight",
    "DoRA": r"dora_scale|lora_magnitude_vector(\.\w+)*",
    "norm difference": r"[wb]_norm",
    "full difference": r"diff",
    "bias difference": r"diff_b",
}
_ADAPTER_ENDS = {kind: re.compile(rf"(.*)[.](?:{end})") for kind, end in _ADAPTERS.items()}
_ADAPTER_STARTS = ("lora_unet_", "lora_te", "lycoris_", "bundle_emb.")
# By what upscalers of the ESRGAN family are known: the first code, its later forms, and Real-ESRGAN's small networks.
_UPSCALERS = (
    ("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"),
    ("model.0.weight", "model.1.sub.0.RDB1.conv1x1.weight"),
    ("conv_first.weight", "body.0.rdb1.conv1.weight"),
    ("conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight"),
    ("body.0.weight", "body.1.weight", "body.2.weight", "body.2.bias"),
)
_FILL = "use a file saved with all parts, or say where the others are with --vae, --text-encoder or --base MODEL"
_EMBEDDING = ("emb_params", "string_to_param.*")


@dataclass(frozen=True)
class Identity:
    """What a file of tensors is.

    Attributes:
        kind: "model" (an original single file), "part" (one part in the diffusers layout, or a VAE or U-Net cut
            out of a single file), "lora", "embedding", "control" (what steers one), "upscaler" or "other".
        family: a name for people, "Stable Diffusion 1.x" say.
        parts: which of unet, vae, text_encoder it holds.
        strays: names of tensors that belong to something else, of a model; the majority decides what a file is.
    """

    kind: str
    family: str
    parts: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()


def identify(shapes: Mapping[str, Shape]) -> Identity:
    """Recognise a file by the names and shapes of its tensors."""
    if is_ip_adapter(shapes):  # also one that holds LoRAs
        return Identity("control", IMAGE_PROMPT)
    adapter = {name for name in shapes if _is_of_adapter(name)}
    if 2 * len(adapter) >= len(shapes) > 0:
        return Identity("lora", f"{', '.join(adapter_kinds(shapes)) or 'LoRA'} ({lora_dialect(shapes)} names)")
    own = {name: shape for name, shape in shapes.items() if name not in adapter}
    of_sd = family_in(own) is SD
    prefixes = family_in(own).prefixes
    parts = tuple(part for part, prefix in prefixes.items() if any(name.startswith(prefix) for name in own))
    if len(parts) == len(prefixes):  # a whole model: what lies beside it does not make it another thing
        beside = [name for name in own if not name.startswith(tuple(prefixes.values()))]
        others = [name for name in beside if any(marker in name for marker, _ in _OTHERS)]
        own = {name: shape for name, shape in own.items() if name not in set(others)}
        adapter |= set(others) if 2 * len(others) < len(shapes) else set()
    for marker, family in _OTHERS:
        if any(marker in name for name in own) and (of_sd or marker != _TEXT_OF_XL):
            return Identity("control" if family in STEERING else "other", family)
    if parts:
        return Identity("model", _family_of_original(own), parts, tuple(sorted(adapter)))
    if part := _lone_part(own):
        return Identity("part", *part)
    if any(all(f"{start}{mark}" in own for mark in marks) for marks in _UPSCALERS for start in ("", *WRAPPERS)):
        return Identity("upscaler", UPSCALER)
    if is_embedding(shapes):
        return Identity("embedding", "textual-inversion embedding")
    return Identity("other", UNKNOWN)


def is_ip_adapter(names: Iterable[str]) -> bool:
    """Whether these are the tensors of an IP-Adapter of any kind."""
    return {name.partition(".")[0] for name in names} >= set(OF_IP_ADAPTER)


def is_embedding(shapes: Mapping[str, Shape]) -> bool:
    """Whether these are vectors of words and nothing else: one tensor, or two for the two encoders of SDXL."""
    if set(shapes) == {"clip_l", "clip_g"}:
        return True
    ((name, shape),) = shapes.items() if len(shapes) == 1 else [("", ())]
    is_other = name.endswith((".weight", ".bias", ".alpha")) or _is_of_adapter(name)
    return name in _EMBEDDING or (0 < len(shape) <= 2 and not is_other)


def adapter_kinds(names: Iterable[str]) -> list[str]:
    """The kinds of changes that a file of an adapter holds, by the names of its tensors."""
    names = list(names)
    return [kind for kind, end in _ADAPTER_ENDS.items() if any(end.fullmatch(name) for name in names)]


def adapter_layer(name: str) -> str:
    """The layer that a tensor of an adapter changes, as the file calls it."""
    if re.search(r"_lora\.(up|down)\.weight$", name):
        return name.rpartition("_lora.")[0]
    ends = (end.fullmatch(name) for end in _ADAPTER_ENDS.values())
    return next((match[1] for match in ends if match), name.rpartition(".")[0])


def _is_of_adapter(name: str) -> bool:
    return name.startswith(_ADAPTER_STARTS) or any(end.fullmatch(name) for end in _ADAPTER_ENDS.values())


def require_original(source: object, identity: Identity, names: Iterable[str]) -> None:
    """Fail unless `identity` is a whole Stable Diffusion 1.x, 2.x or XL in the original layout.

    Raises:
        CheckpointError: says what the file is in place of that.
    """
    wanted = "expected a whole Stable Diffusion 1.x, 2.x or XL"
    names = list(names)
    if identity.kind == "lora":
        raise CheckpointError(
            f"{source} is a {identity.family}, which adapts a model and is none; {wanted}: load its base model"
        )
    if identity.kind == "embedding":
        raise CheckpointError(f"{source} is a {identity.family}, not a model; {wanted}")
    if identity.kind in ("other", "control"):
        first = ", ".join(names[:5]) or "no tensors at all"
        raise CheckpointError(f"{source} is another architecture ({identity.family}); {wanted}, found {first}")
    if identity.kind == "upscaler":
        raise CheckpointError(f"{source} is an {UPSCALER}, which `latentdiff upscale` takes, not a model; {wanted}")
    if identity.kind == "part":
        raise CheckpointError(f"{source} holds only a {identity.family}; {wanted}: {_FILL}")
    prefixes = family_in(names).prefixes
    missing = [part for part in prefixes if part not in identity.parts]
    if missing:
        lacking = " and ".join(f"{part} ({prefixes[part]}*)" for part in missing)
        held = ", ".join(identity.parts)
        raise CheckpointError(f"{source} has no {lacking}, only {held}; {wanted}: {_FILL}")


def lora_dialect(shapes: Iterable[str]) -> str:
    """Whose names an adapter file uses: "kohya", "lycoris", "peft", "diffusers", or "original" single files'."""
    names = list(shapes)
    for dialect, starts in {"kohya": ("lora_unet_", "lora_te"), "lycoris": ("lycoris_",)}.items():
        if any(name.startswith(starts) for name in names):
            return dialect
    if any(name.startswith(("diffusion_model.", "model.diffusion_model.")) for name in names):
        return "original"
    if any(name.startswith("base_model.") or ".lora_A." in name or ".lora_B." in name for name in names):
        return "peft"
    return "diffusers"


def family_name(
    family: Family, *, linear: bool, extra_channels: int, width: int, context: int, varies: bool = False
) -> str:
    """A name for people: linear projections are the mark of SD 2.x; other sizes than the published are told apart.

    Args:
        extra_channels: of the U-Net's input, more than the latents have: a mask and an image, an image, a small one, a
            depth map.
        varies: it is told an image's embedding (unCLIP).
    """
    number, published = ("2.x", (320, 1024)) if linear else ("1.x", (320, 768))
    if family is not SD:
        number, published = family.name, family.published
    tasks = {5: " inpainting", 4: " conditioned on an image", 3: " upscaling by 4", 1: " conditioned on depth"}
    task = " for variations of images" if varies else tasks.get(extra_channels, "")
    size = "" if (width, context) == published else ", a size of its own"
    return f"Stable Diffusion {number}{task}{size}"


def _family_of_original(shapes: Mapping[str, Shape]) -> str:
    def find(end: str, default: Shape) -> Shape:
        return next((shape for name, shape in shapes.items() if name.endswith(end)), default)

    width, in_channels, *_ = find("model.diffusion_model.input_blocks.0.0.weight", (0, 4))
    return family_name(
        family_in(shapes),
        linear=len(find(".1.proj_in.weight", (0, 0, 0, 0))) == 2,
        extra_channels=in_channels - find("model.diffusion_model.out.2.weight", (4,))[0],
        width=width,
        context=find(".attn2.to_k.weight", (0, 0))[1],
        varies=family_in(shapes) is SD and f"{UNET_PREFIX}label_emb.0.0.weight" in shapes,
    )


def _lone_part(shapes: Mapping[str, Shape]) -> tuple[str, tuple[str, ...]] | None:
    if "down_blocks.0.resnets.0.conv1.weight" in shapes and "time_embedding.linear_1.weight" in shapes:
        return "U-Net (diffusers layout)", ("unet",)
    if "input_blocks.0.0.weight" in shapes and "time_embed.0.weight" in shapes:
        return "U-Net (original layout)", ("unet",)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes:
        return "VAE (diffusers layout)", ("vae",)
    if "decoder.conv_in.weight" in shapes and any(name.startswith("decoder.up.") for name in shapes):
        return "VAE (original layout)", ("vae",)
    if any(name.endswith("embeddings.patch_embedding.weight") for name in shapes):
        return "image encoder (CLIP)", ("image_encoder",)
    if any(name.endswith("embeddings.token_embedding.weight") for name in shapes):
        return "text encoder (CLIP)", ("text_encoder",)
    return None
