"""What a LoRA file says about itself: the keys that kohya's tools and the web UIs read, and our own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from latentdiff import __version__
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.networks.config import UNetConfig

OWN = "latentdiff"  # the entry that holds everything as JSON
_SPEC_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
# What we call a fact of the training -> what kohya's tools do.
_KOHYA_FACTS = {
    "images": "ss_num_train_images",
    "steps": "ss_steps",
    "epochs": "ss_num_epochs",
    "learning_rate": "ss_learning_rate",
    "resolution": "ss_resolution",
    "batch_size": "ss_batch_size_per_device",
    "seed": "ss_seed",
}


def lora_metadata(
    config: UNetConfig,
    prediction_type: str,
    *,
    model: str = "",
    model_hash: str = "",
    title: str = "",
    training: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Metadata for `save_lora`, which adds rank and alpha.

    Args:
        config: of the U-Net that was adapted.
        prediction_type: what that U-Net predicts.
        model, model_hash: name and SHA-256 of the model that was adapted.
        title: what the LoRA is called.
        training: facts as JSON can hold them, such as images, steps, epochs, learning_rate, resolution, batch_size,
            seed, data, words.
    """
    facts = dict(training or {})
    about = {
        "ss_sd_model_name": model,
        "ss_new_sd_model_hash": model_hash,
        "ss_output_name": title,
        "modelspec.title": title,
        "modelspec.prediction_type": _SPEC_PREDICTIONS.get(prediction_type, ""),
        **_family(config, prediction_type),
        **{_KOHYA_FACTS[name]: str(value) for name, value in facts.items() if name in _KOHYA_FACTS},
    }
    own = {
        "version": __version__,
        "model": model,
        "model_hash": model_hash,
        "prediction_type": prediction_type,
        "training": facts,
    }
    return {name: value for name, value in about.items() if value} | {OWN: json.dumps(own)}


def network_metadata(spec: LoRASpec) -> dict[str, str]:
    """What LyCORIS writes into its files, for a new adapter of a kind that it has; `save_lora` does it for LoRAs."""
    if spec.kind == "lora":
        return {}
    options = {"algo": "diag-oft"} if spec.kind == "oft" else {"algo": spec.kind}
    if spec.kind == "dora":
        options = {"algo": "lora", "dora_wd": "True", "wd_on_output": str(spec.axis == 0)}
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(spec.rank),
        "ss_network_alpha": str(spec.shape(spec.rank).alpha),
        "ss_network_args": json.dumps(options),
    }


def learned_words(metadata: Mapping[str, str]) -> list[str]:
    """The words of a LoRA's captions that its model had not known, as its file says; none where it does not."""
    try:
        found = json.loads(metadata.get(OWN, "{}"))["training"]["words"]
    except (ValueError, KeyError, TypeError):
        return []
    return [word for word in found if isinstance(word, str)] if isinstance(found, list) else []


_XL = {
    "ss_v2": "False",
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
}


def _family(config: UNetConfig, prediction_type: str) -> dict[str, str]:
    """By these keys the web UIs sort LoRAs; models of another size than the published ones are none of theirs."""
    if config.added_dim is not None:
        return _XL if (config.block_out_channels[0], config.cross_attention_dim) == (320, 2048) else {}
    second = config.use_linear_projection
    if (config.block_out_channels[0], config.cross_attention_dim) != (320, 1024 if second else 768):
        return {}
    velocity = second and prediction_type == "v_prediction"
    architecture = (
        "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512" if second else "stable-diffusion-v1"
    )
    return {
        "ss_v2": str(second),
        "ss_base_model_version": ("sd_v2" if second else "sd_v1") + ("_v" if velocity else ""),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
    }
