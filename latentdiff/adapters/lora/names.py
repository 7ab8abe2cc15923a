"""What the LoRA files of the field call the layers of a model.

Full names are ours: `unet.`, `text_encoder.` or, of SDXL, `text_encoder_2.` and the module's path, as in the files that PEFT
and diffusers write. The files of kohya's tools, which the web UIs read, have underscores for dots, so that their names can
only be read with the model at hand; some of them name the U-Net's layers as the original single-file layout does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from latentdiff.checkpoints.tables import unet_map
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.text_encoder import PREFIX

_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
_FIRST_OF_TWO = "lora_te1_"

# "module.lora_down.weight" (kohya), "module.lora_A.weight" (PEFT), "module.lora.down.weight" (diffusers),
# "module.lora_linear_layer.down.weight" (its text encoders), "attn1.processor.to_q_lora.down.weight" (its oldest
# files).
_WEIGHT = re.compile(
    r"(?P<module>.+?)(?P<old>_lora)?\."
    r"(?:lora_(?P<side>down|up|mid|A|B)(?:\.\w+)?|(?:lora\.|lora_linear_layer\.)?(?P<old_side>down|up))"
    r"\.(?P<leaf>weight|bias)"
)
# The last part of other names, of LyCORIS and of PEFT, which may put an adapter's own name and "weight" behind it.
_OTHER = re.compile(
    r"(?P<module>.+?)\.(?P<role>hada_\w+|lokr_\w+|oft_blocks|oft_R|boft_[Rs]|ia3_l|lora_magnitude_vector|"
    r"vera_lambda_[bd]|a1|a2|b1|b2|bm|p_layer|q_layer)(\.(?!weight)\w+)?(\.weight)?"
)
_ROLES = {"lora_magnitude_vector": "magnitude", "vera_lambda_b": "vera_lambda", "vera_lambda_d": "vera_lambda"}
_FLAT = ("lora_unet_", "lora_te", "lycoris_")  # starts of names in which dots have become underscores
BUNDLED = "bundle_emb."  # embeddings that come with an adapter
_SIDES = {"A": "down", "B": "up"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def kohya_name(name: str, xl: UNetConfig | None = None) -> str:
    """The layer's name in the files of kohya's tools: dots become underscores.

    Args:
        xl: of a U-Net of SDXL, whose layers they call as the original layout does; its text encoders are numbered.
    """
    part, _, path = name.partition(".")
    if xl is None:
        return _KOHYA[part] + _flat(path)
    if part == "unet":
        return _KOHYA[part] + _flat(unet_map(xl).to_theirs(path) or path)
    return (_FIRST_OF_TWO if part == "text_encoder" else _KOHYA[part]) + _flat(path)


def read_key(key: str) -> tuple[str, str]:
    """Split the name of a tensor into the name of a layer, in whichever dialect, and a role.

    Roles of a LoRA are "down", "up", "mid" and "alpha"; of other kinds, see `kinds`, the last part of the name.
    """
    key = key.replace(".processor.", ".")
    if match := _WEIGHT.fullmatch(key):
        side = match["side"] or match["old_side"]
        module = _modern(match["module"]) if match["old"] else match["module"]
        return module, _SIDES.get(side, side) + ("_bias" if match["leaf"] == "bias" else "")
    if match := _OTHER.fullmatch(key):
        return match["module"], _ROLES.get(match["role"], match["role"])
    module, _, role = key.partition(".") if key.startswith(_FLAT) else key.rpartition(".")
    return module, role


def _modern(module: str) -> str:
    """Where the oldest files name an attention's output and a text encoder's projections in their own way."""
    head, _, leaf = module.rpartition(".")
    if head.endswith(".self_attn"):
        return f"{head}.{_OLD_TEXT.get(leaf, leaf)}"
    return f"{head}.to_out.0" if leaf == "to_out" else module


def all_names(names: Iterable[str], config: UNetConfig) -> dict[str, str]:
    """Full names by everything that files call these layers, full names included."""
    original = unet_map(config)
    known: dict[str, str] = {}
    for name in names:
        part, _, path = name.partition(".")
        paths = [path] if part == "unet" else [path, path.removeprefix(PREFIX)]
        for other in paths:
            known |= dict.fromkeys((f"{part}.{other}", _KOHYA[part] + _flat(other)), name)
            for bare in (other, f"base_model.model.{other}", f"lycoris_{_flat(other)}"):
                known.setdefault(bare, name)  # the first text encoder's, where there are two
            if part == "text_encoder":
                known[f"{_FIRST_OF_TWO}{_flat(other)}"] = name
        if part == "unet":
            known[f"diffusion_model.{path}"] = name
        if part == "unet" and (theirs := original.to_theirs(path)):
            known |= dict.fromkeys((_KOHYA[part] + _flat(theirs), f"lycoris_{_flat(theirs)}"), name)
            known |= dict.fromkeys((f"diffusion_model.{theirs}", f"model.diffusion_model.{theirs}"), name)
    return known


def _flat(path: str) -> str:
    return path.replace(".", "_")
