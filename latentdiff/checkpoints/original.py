"""The original single-file layout of Stable Diffusion 1.x, 2.x and XL (CompVis, Stability): reading and writing it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff.checkpoints import tables, unclip
from latentdiff.checkpoints.architecture import identify, require_original
from latentdiff.checkpoints.families import (
    ALL_PREFIXES,
    SD,
    UNET_PREFIX,
    Family,
    family_in,
    family_with,
    is_text,
)
from latentdiff.checkpoints.files import TensorFile, read_tensors
from latentdiff.checkpoints.folder import save_tensors
from latentdiff.checkpoints.index import model_index
from latentdiff.checkpoints.infer import infer_configs, is_open_clip
from latentdiff.checkpoints.keymap import KeyMap, compare
from latentdiff.checkpoints.modelspec import modelspec
from latentdiff.checkpoints.modules import (
    POSITION_IDS,
    check_fits,
    expected_shapes,
    parse_config,
    shapes_of,
)
from latentdiff.checkpoints.parts import PartWeights
from latentdiff.checkpoints.prediction import PredictionType, read_prediction_type
from latentdiff.checkpoints.prefixes import unwrapped
from latentdiff.checkpoints.probing import probed
from latentdiff.checkpoints.raw import PART_LABELS, RawModel
from latentdiff.checkpoints.schedules import stored_schedule
from latentdiff.checkpoints.stored import METADATA, WORDS, stored_in, stored_words
from latentdiff.checkpoints.tokenizer import clip_tokenizer_files, with_clip_vocabulary, without_clip_vocabulary
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import CheckpointError, ConfigError
from latentdiff.networks.text_encoder import PROJECTED
from latentdiff.networks.tiny_vae import NAME as TINY_VAE
from latentdiff.prompts.words import as_json

_SHOWN = 5  # names in a message

Tensors = dict[str, Tensor]

# Tensors that are no weights of the parts: the training schedule, averaged weights, losses, what OpenCLIP
# needs for its pooled output, textual inversion's own embeddings, the depth model's MiDaS, the noise schedules of the
# upscaler's image and of unCLIP's, the text tower beside that one's image encoder, and markers.
_EXTRAS = re.compile(
    r"""(
      (betas | (sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?
       | posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2) | logvar | lvlb_weights | scale_factor
       | v_pred | ztsnr | denoiser\.sigmas)$
    | (first_stage_model\.)?(model_ema|loss)\.
    | (first_stage_model|cond_stage_model)\.(model_)?ema
    | (cond_stage_model|conditioner\.embedders\.\d)\.(model\.|transformer\.)?(text_projection|logit_scale|attn_mask)
    | cond_stage_model\.(model\.visual|transformer\.(vision_model|visual_projection))\.
    | embedding_manager\.
    | (depth_model | low_scale_model | noise_augmentor | embedder)\.
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class PartLayout:
    """How one part lies in the file: its prefix, its table, and what is done to tensors besides renaming."""

    prefix: str
    names: KeyMap
    to_ours: Callable[[Tensors], Tensors] = dict
    to_theirs: Callable[[Tensors], Tensors] = dict

    def theirs(self, name: str) -> str:
        """The name in the file, or our own where several of ours share one there."""
        renamed = self.names.to_theirs(name)
        return name if renamed is None else self.prefix + renamed


def layouts(configs: dict[str, dict[str, Any]], *, open_clip: bool, family: Family = SD) -> dict[str, PartLayout]:
    """The layout of every part of a model with these configurations.

    Args:
        open_clip: the one text encoder of SD 1.x and 2.x is OpenCLIP's.
    """
    prefixes = family.prefixes
    found = {
        "unet": PartLayout(prefixes["unet"], tables.unet_map(parse_config("unet", configs["unet"]))),
        "vae": PartLayout(
            prefixes["vae"],
            tables.vae_map(parse_config("vae", configs["vae"])),
            tables.attention_to_linear,
            tables.attention_to_convolution,
        ),
    }
    for part in filter(is_text, family.parts):
        is_theirs = open_clip if family is SD else part in family.open_clip
        found[part] = _text_layout(prefixes[part], configs[part], open_clip=is_theirs)
    return found


def _text_layout(prefix: str, config: Mapping[str, Any], *, open_clip: bool) -> PartLayout:
    layers = config.get("num_hidden_layers", 12)
    if not isinstance(layers, int):
        raise ConfigError(f"the text encoder's num_hidden_layers must be a number, found {layers!r}")
    if not open_clip:
        return PartLayout(prefix, tables.clip_map())
    names = tables.open_clip_map(layers, projected=config.get("architectures") == [PROJECTED])
    return PartLayout(prefix, names, tables.to_transformers, tables.to_open_clip)


def read_original(path: Path, *, ema: bool = False, prediction_type: str | None = None) -> RawModel:
    """Map an original single file, `.safetensors` or `.ckpt`.

    Args:
        path: the file.
        ema: take the U-Net's averaged weights in place of the last ones.
        prediction_type: "epsilon" or "v_prediction"; None reads or guesses it.

    Raises:
        CheckpointError: the file is damaged, something else, incomplete, or has no averaged weights.
    """
    file = read_tensors(path)
    file = replace(file, tensors=unwrapped(file.tensors))
    shapes = shapes_of(file.tensors)
    identity = identify(shapes)
    require_original(path, identity, shapes)
    stored = stored_in(file)
    tensors = {name: tensor for name, tensor in file.tensors.items() if name not in set(identity.strays)}
    found = PredictionType(prediction_type, "the argument") if prediction_type else None
    if not found and not stored:
        found = read_prediction_type(file)
    raw = _assemble(file, tensors, stored, found.name if found else "v_prediction", ema=ema)
    if not found and not stored:
        found = probed(raw, second_family="2.x" in identity.family)
        raw = _assemble(file, tensors, stored, found.name, ema=ema)
    if found:
        raw.configs["scheduler"]["prediction_type"] = found.name
        if found.guessed:
            raw.warnings.append(
                f"guessed that {path.name} predicts {found.name}, from {found.source}; if images look wrong, give "
                "the other prediction_type"
            )
    if not stored:
        raw.configs["scheduler"] |= stored_schedule(tensors)
    if identity.strays:
        raw.warnings.append(
            f"{path.name} holds {len(identity.strays)} tensors of something else, which are left out: "
            f"{', '.join(identity.strays[:_SHOWN])}"
        )
    return raw


def assembled(path: Path, parts: Mapping[str, PartWeights], prediction_type: str | None) -> RawModel:
    """A model of parts that lie in different files; `path` is that of the U-Net, after which it is called."""
    configs = {part: given.config for part, given in parts.items()}
    unet = parse_config("unet", configs["unet"])
    if unet.added_dim is not None:
        raise CheckpointError(
            f"{path} holds a U-Net of SDXL without its two text encoders; say where they are with --base"
        )
    open_clip = unet.use_linear_projection
    raw = RawModel(
        source=path,
        tensors={part: dict(given.tensors) for part, given in parts.items()},
        configs={**configs, "scheduler": ScheduleConfig().to_diffusers(), "model_index": model_index(unet)},
        tokenizer=parts["text_encoder"].tokenizer or clip_tokenizer_files("!" if open_clip else "<|endoftext|>"),
        weight_files=tuple(dict.fromkeys(file for given in parts.values() for file in given.files)),
    )
    found = PredictionType(prediction_type, "the argument") if prediction_type else probed(raw, second_family=open_clip)
    raw.configs["scheduler"]["prediction_type"] = found.name
    if found.guessed:
        raw.warnings.append(f"guessed that {path.name} predicts {found.name}, from {found.source}")
    return raw


def write_original(raw: RawModel, path: Path) -> None:
    """Write a model as one safetensors file in the original layout, atomically.

    What the layout has no place for (configuration, tokenizer, words) goes into the file's metadata.

    Raises:
        CheckpointError: the weights do not fit the configuration.
        LatentDiffError: the file cannot be written.
    """
    if raw.configs["vae"].get("_class_name") == TINY_VAE:
        raise CheckpointError("a single file cannot hold a tiny VAE; convert the model with its own VAE, without --vae")
    # The original programs tell the two text encoders apart by these names, and expect OpenCLIP with SD 2.x.
    open_clip = bool(raw.configs["unet"].get("use_linear_projection")) and (
        raw.configs.get("text_encoder", {}).get("hidden_act") == "gelu"
    )
    tensors: Tensors = {}
    for part, layout in layouts(raw.configs, open_clip=open_clip, family=family_with(raw.parts)).items():
        check_fits(raw, part)
        tensors |= {layout.theirs(name): tensor for name, tensor in layout.to_theirs(raw.tensors[part]).items()}
    kept = {
        "configs": raw.configs,
        "tokenizer": without_clip_vocabulary(raw.tokenizer),
        **({"tokenizer_2": without_clip_vocabulary(raw.second_tokenizer)} if raw.second_tokenizer else {}),
        "names": raw.names,
        **({} if raw.words is None else {WORDS: as_json(raw.words)}),
    }
    about = {name: text for name, text in modelspec(raw, path.stem).items() if name not in raw.metadata}
    kept["added"] = list(about)
    metadata = {"format": "pt", **about, **raw.metadata, METADATA: json.dumps(kept)}
    save_tensors({**tensors, **unclip.original_names(raw), **raw.extras}, path, metadata)


def has_ema(names: Iterable[str]) -> bool:
    """Whether the file holds an averaged copy of every weight of the U-Net."""
    names = set(names)
    unet = [name for name in names if name.startswith(UNET_PREFIX)]
    return bool(unet) and all(tables.ema_name(name) in names for name in unet)


def _assemble(
    file: TensorFile, tensors: Tensors, stored: dict[str, Any], prediction_type: str, *, ema: bool
) -> RawModel:
    shapes = shapes_of(tensors)
    family = family_in(shapes)
    text_prefix = SD.prefixes["text_encoder"]
    open_clip = is_open_clip({n.removeprefix(text_prefix): s for n, s in shapes.items() if n.startswith(text_prefix)})
    configs = stored.get("configs") or infer_configs(shapes, prediction_type)
    if ema:
        tensors = _with_ema(file.path, tensors)
    parts: dict[str, Tensors] = {}
    used: set[str] = set()
    for part, layout in layouts(configs, open_clip=open_clip, family=family).items():
        parts[part], names = _read_part(file.path, part, layout, tensors, configs[part])
        used |= names
    extras = {name: tensor for name, tensor in tensors.items() if name not in used}
    _refuse_unknown(file.path, extras)
    beside = unclip.taken_from(extras, configs) if configs["unet"].get("class_embed_type") else {}
    pads = ["!"] if open_clip else list(family.tokenizers.values())
    kept = [stored[name] for name in ("tokenizer", "tokenizer_2") if name in stored]
    tokenizers = [with_clip_vocabulary(files) for files in kept] if stored else [*map(clip_tokenizer_files, pads)]
    return RawModel(
        source=file.path,
        tensors=parts,
        configs=configs,
        tokenizer=tokenizers[0],
        second_tokenizer=tokenizers[1] if len(tokenizers) > 1 else {},
        extras=extras,
        names=stored.get("names", {}),
        metadata={
            name: text
            for name, text in file.metadata.items()
            if name not in (METADATA, "format", *stored.get("added", ()))
        },
        weight_files=(file.path,),
        words=stored_words(file, stored),
        beside=beside,
    )


def _read_part(
    path: Path, part: str, layout: PartLayout, tensors: Tensors, config: dict[str, Any]
) -> tuple[Tensors, set[str]]:
    """The tensors of one part under our names, and the names in the file that they came from."""
    renamed: Tensors = {}
    used: set[str] = set()
    unknown: Tensors = {}
    for name, tensor in tensors.items():
        if not name.startswith(layout.prefix):
            continue
        ours = layout.names.to_ours(name.removeprefix(layout.prefix))
        if ours is not None:
            renamed[ours] = tensor
            used.add(name)
        elif not _EXTRAS.match(name) and not _is_unused_layer(name, config):
            unknown[name] = tensor
    found = layout.to_ours(renamed)
    weights = {layout.theirs(name): tensor for name, tensor in found.items() if name != POSITION_IDS}
    expected = {layout.theirs(name): shape for name, shape in expected_shapes(part, config, len(found)).items()}
    compare(PART_LABELS[part], expected, shapes_of(weights | unknown)).raise_unless_fits(path)
    return found, used


def _is_unused_layer(name: str, config: dict[str, Any]) -> bool:
    """The last layer of OpenCLIP's tower, whose output SD 2.x does not read."""
    layer = re.match(r"cond_stage_model\.model\.transformer\.resblocks\.(\d+)\.", name)
    return layer is not None and int(layer[1]) == config.get("num_hidden_layers")


def _refuse_unknown(path: Path, extras: Tensors) -> None:
    unknown = {n: tuple(t.shape) for n, t in extras.items() if not _EXTRAS.match(n) and not n.startswith(ALL_PREFIXES)}
    compare("content", {}, unknown).raise_unless_fits(path)


def _with_ema(path: Path, tensors: Tensors) -> Tensors:
    if not has_ema(tensors):
        raise CheckpointError(f"{path} has no EMA weights (model_ema.*); load it without ema")
    return {
        name: tensors[tables.ema_name(name)] if name.startswith(UNET_PREFIX) else tensor
        for name, tensor in tensors.items()
        if not name.startswith("model_ema.")
    }
