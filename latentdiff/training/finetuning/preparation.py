"""A fine-tuning up to its first step: device, model, data, caches, trainer."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from latentdiff.adapters.lora.spec import TARGET_GROUPS
from latentdiff.checkpoints.components import Components, load_components
from latentdiff.checkpoints.embedded import EMBEDDED_NAME, embedded_model
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.engines.fast_forms import use_fast_forms
from latentdiff.errors import ConfigError, UsageError
from latentdiff.files import atomic_path
from latentdiff.networks.attention import use_attention_backend
from latentdiff.networks.device import computes_in_bf16
from latentdiff.networks.inputs import INPAINTING, NEEDS, TEXT, inputs_of
from latentdiff.networks.sizes import OF_BASE, count_of_sizes
from latentdiff.request.plan import customary_guidance
from latentdiff.training.denoising import DenoisingTask
from latentdiff.training.finetuning.config import CONFIG, KEEP_WEIGHT, FinetuneConfig
from latentdiff.training.finetuning.finishing import Decision
from latentdiff.training.finetuning.material import batches_of, read_material
from latentdiff.training.finetuning.methods import FinetuningMethod, make_method
from latentdiff.training.finetuning.old import Forgetting, Practice, Walks, texts, walks
from latentdiff.training.finetuning.old_prompts import GENERAL, old_prompts
from latentdiff.training.finetuning.painting import Painted
from latentdiff.training.finetuning.streaming import shards_to_stream
from latentdiff.training.lean import lean_layers
from latentdiff.training.loop import Trainer
from latentdiff.training.loss import DenoisingLoss, attention_backend
from latentdiff.training.material import Material, announce, build_latents, build_texts
from latentdiff.training.objective import DiffusionObjective
from latentdiff.training.preferences import PreferenceLoss
from latentdiff.training.report.wandb_run import check_installed
from latentdiff.training.sections import dump_config
from latentdiff.training.sharding import is_sharding
from latentdiff.training.sheets import Followed, SampleSheets, Steering

# Prompts, and places on the way of each, by what they are for. A model that lists its things is small, and is kept by as
# many prompts as it has things: one that nothing is asked about goes on with the new (a cat lost its face to a lantern).
WALKS = {"measured": (16, 4), "kept": (32, 8)}
_PLACES_OF_LISTED = 4


class Preparation:
    """The model and the data of a run, and what is made of them, in this order: `build_caches`, `trainer`; both inside
    `computing`.

    Args:
        settings: the configuration, with the precision that was chosen.
        accelerator: from `make_accelerator`.

    Attributes:
        settings: the same, with the attention back end that was chosen.
        method: what is trained.
        material: what is learned from.
        shards: of a stream.
        sheets: draws the samples.
    """

    def __init__(self, settings: FinetuneConfig, accelerator: Accelerator) -> None:
        if settings.track is not None:
            check_installed()
        parts = load_components(settings.model or embedded_model())
        if settings.model is None:
            parts.name = EMBEDDED_NAME
        _check_model(parts, settings)
        parts.schedule_config = _schedule_config(parts.schedule_config, settings)
        settings = settings.model_copy(update=_chosen(settings, lists_words=parts.words is not None))
        self.accelerator, self.method = accelerator, make_method(parts, settings)
        side = (
            settings.resolution / parts.vae.config.downscale if settings.resolution else parts.unet.config.sample_size
        )
        self.settings = settings.model_copy(update={"attention": attention_backend(settings, side, accelerator)})
        self.shards = shards_to_stream(self.settings) if settings.stream else []
        self.material: Material
        self.sheets: SampleSheets

    def read_data(self) -> None:
        """Find the images, and say what is trained on."""
        settings = self.settings
        self.material = read_material(settings, self.method.parts, self.shards)
        summary = self.material.summary(settings.batch_size) | ({"shards": len(self.shards)} if self.shards else {})
        announce(summary, settings.out / "data.json", self.accelerator)
        self.sheets = _sheets(settings, self.method, self.material)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, the networks compute as they do in training."""
        with ExitStack() as stack:
            stack.enter_context(use_attention_backend(self.settings.attention))
            _speed_up(self.method.parts, self.method, self.settings, self.accelerator, stack)
            yield

    def build_caches(self) -> None:
        """Encode what does not change in training, as far as that is asked for."""
        settings, method = self.settings, self.method
        if self.shards:
            return
        folder = settings.cache or settings.out / "cache"
        build_latents(self.material, method.parts.vae, settings, folder, self.accelerator)
        if settings.cache_text and not method.trains_text:
            build_texts(self.material, method.parts.text_encoder, settings, folder, self.accelerator)

    @contextmanager
    def trainer(self) -> Iterator[Trainer]:
        """The trainer, of the start model still; inside, the networks compute with the adapter."""
        settings = self.settings
        if settings.loss == "dpo" and is_sharding(self.accelerator):
            raise ConfigError("loss dpo compares with the start model, which FSDP has in parts only; take DDP")
        with self.method.attached():
            task = _task(settings, self.method, self.material, self.sheets, self.shards)
            task.settles = self.method.after_step
            if settings.stop == "auto":
                task.decides = Decision(settings, self.material, lambda: self.sheets.written)
            trainer = Trainer(task, settings, settings.out, self.accelerator)
            if self._remembers:
                with self.accelerator.autocast():
                    task.knowledge = Forgetting(task.module, self._walks(task.module, "measured"))
                    if (weight := self._keep_weight) is not None:
                        kept = self._walks(task.module, "kept")
                        task.practice = Practice(kept, weight, settings.batch_size, settings.seed)
            yield trainer

    @property
    def _remembers(self) -> bool:
        """Whether what the model knew can be compared with what it says later."""
        settings = self.settings
        return self.method.changes_model and settings.prediction_type == "model" and not settings.zero_snr

    @property
    def keeps_by_itself(self) -> bool:
        """Whether `keep: auto` keeps the old: each caption has a word that the model does not know.

        Without such a word, a caption asks for what the model draws already, and to keep that would work against the data.
        """
        words = self.method.parts.words
        if self.settings.keep != "auto" or words is None or self.shards or not self._remembers:
            return False
        captions = self.material.samples.data.captions
        return all(words.unknown([text]) for index in self.material.learned for text in captions[index])

    @property
    def _keep_weight(self) -> float | None:
        return KEEP_WEIGHT if self.keeps_by_itself else self.settings.keep_weight

    def _walks(self, module: DenoisingLoss, purpose: str) -> Walks:
        settings, parts = self.settings, self.method.parts
        side = settings.resolution or parts.unet.config.sample_size * parts.vae.config.downscale
        count, levels = WALKS[purpose]
        if purpose == "kept" and parts.words and len(parts.words.kinds["things"]) > count:
            count, levels = len(parts.words.kinds["things"]), _PLACES_OF_LISTED
        prompts = list(dict.fromkeys(settings.old_prompts)) or old_prompts(parts.words, count, purpose)
        if purpose == "measured" and len(prompts) == 1:
            prompts.append("" if prompts[0] else GENERAL[0])  # the scale is the distance to another prompt
        samples = self.material.samples
        told = texts([*prompts, ""], samples.tokens, side, tells_sizes=samples.tells_sizes)
        text, empty = ({name: rows[own] for name, rows in told.items()} for own in (slice(-1), slice(-1, None)))
        latent = side // parts.vae.config.downscale
        shape = (parts.vae.config.latent_channels, latent, latent)
        guidance = settings.sample_guidance
        if guidance is None:
            guidance = customary_guidance(Schedule(parts.schedule_config))
        return walks(
            module, text, empty, prompts, shape, count=levels, guidance=guidance, seed=settings.seed, purpose=purpose
        )


def make_accelerator(settings: FinetuneConfig) -> tuple[Accelerator, FinetuneConfig]:
    """Device, precision and processes, and the configuration with the precision that was chosen."""
    # Without being told, several processes on a machine without a GPU would each train alone and overwrite one another.
    cpu = settings.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision = settings.mixed_precision
    if precision == "auto":
        precision = "bf16" if not cpu and computes_in_bf16("cuda") else "no"
    if precision == "fp16" and cpu:
        raise ConfigError("mixed_precision fp16 needs a GPU; on a CPU take bf16 or no")
    # accelerate remembers the precision for the life of the process; a second run may want another one.
    AcceleratorState._reset_state()
    return Accelerator(cpu=cpu, mixed_precision=precision), settings.model_copy(update={"mixed_precision": precision})


def _check_model(parts: Components, settings: FinetuneConfig) -> None:
    kind = inputs_of(parts.unet.config, parts.vae.config.latent_channels)
    pooled = getattr(parts.text_encoder, "pooled_width", None)
    if count_of_sizes(parts.unet.config, pooled) not in (0, OF_BASE):
        raise UsageError(
            "the refiner of SDXL, which is told scores of images, cannot be fine-tuned here; take the base"
        )
    if kind not in (TEXT, INPAINTING):
        raise UsageError(
            f"expected a text-to-image model or one for inpainting to fine-tune, found one that {NEEDS[kind]}"
        )
    if kind == INPAINTING and settings.method == "controlnet":
        raise UsageError(
            "a ControlNet is trained beside a text-to-image model, found one for inpainting; take the model that it was made"
            " from, whose ControlNets fit it too"
        )
    if kind == INPAINTING and settings.loss == "dpo":
        raise UsageError("loss dpo compares whole images, found a model for inpainting, which sees a part of one; take another")


def _chosen(settings: FinetuneConfig, *, lists_words: bool) -> dict[str, Any]:
    """What is trained, where nobody says. The text encoder of a model that lists its words has read no others."""
    found: dict[str, Any] = {}
    if settings.targets == ("auto",):
        found["targets"] = tuple(TARGET_GROUPS) if lists_words else ("attention",)
    if settings.train_text_encoder is None:
        found["train_text_encoder"] = lists_words and settings.method == "full"
    return found


def _schedule_config(of_model: ScheduleConfig, settings: FinetuneConfig) -> ScheduleConfig:
    """The schedule that is trained on, and written into the result."""
    wanted: dict[str, Any] = (
        {} if settings.prediction_type == "model" else {"prediction_type": settings.prediction_type}
    )
    if settings.zero_snr:
        predicted = wanted.get("prediction_type", of_model.prediction_type)
        if predicted == "epsilon":
            raise ConfigError(
                "zero_snr needs a model of v-prediction, found epsilon: at the last noise level there is no signal that a"
                " prediction of the noise could reveal; add --prediction-type v_prediction"
            )
        # Samplers must begin at the last level, or what it has learned is not used.
        wanted |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return replace(of_model, **wanted).with_drawing(of_model.drawing)


def _speed_up(
    parts: Any, method: FinetuningMethod, settings: FinetuneConfig, accelerator: Accelerator, stack: ExitStack
) -> None:
    """Give the networks their fast forms on a CPU, until the `stack` is closed."""
    trained = [parts.unet, *([parts.text_encoder] if method.trains_text else [])]
    trained += [method.control] if method.control else []
    if accelerator.device.type != "cpu":
        return
    for network in (parts.vae, parts.text_encoder):
        if network not in trained:
            use_fast_forms(network)
    if not settings.compile and not is_sharding(accelerator):
        stack.enter_context(lean_layers(*trained))


def write_config(settings: FinetuneConfig, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        with atomic_path(settings.out / CONFIG) as temporary:
            temporary.write_text(dump_config(settings), encoding="utf-8")
    accelerator.wait_for_everyone()


def _task(
    settings: FinetuneConfig, method: FinetuningMethod, of: Material, sheets: SampleSheets, shards: Sequence[Path]
) -> DenoisingTask:
    parts, schedule = method.parts, Schedule(method.parts.schedule_config)
    for network in (parts.unet, method.control):
        if network is not None:
            network.to(memory_format=torch.channels_last)
            if settings.gradient_checkpointing:
                network.enable_gradient_checkpointing()
    is_dpo = settings.loss == "dpo"
    kind = partial(PreferenceLoss, as_before=method.as_before(), beta=settings.dpo_beta) if is_dpo else DenoisingLoss
    module = kind(
        parts.unet,
        parts.text_encoder,
        DiffusionObjective(schedule, settings),
        vae=None if of.cached and of.samples.holes is None else parts.vae,
        adapter=method.adapter,
        control=method.control,
        trains_text=method.trains_text,
        dropout=method.dropout,
    )
    return DenoisingTask(
        module,
        method.parameter_groups,
        batches_of(of, settings, schedule.num_train_timesteps, shards),
        of,
        sheets,
        settings.out,
        seed=settings.seed,
        networks=method.networks(),
        loader_threads=settings.loader_threads,
        measures_start=True,
        draws_raw=True,
        resume_hint=f"go on with: {shlex.join(['latentdiff', 'finetune', '--resume', str(settings.out)])}",
    )


def _sheets(settings: FinetuneConfig, method: FinetuningMethod, material: Material) -> SampleSheets:
    prompts, seed = material.prompts(settings, settings.seed), settings.seed
    followed: Steering | None = None
    if method.control is not None:
        followed = Followed(method.control, material.hints(settings, seed))
    elif material.samples.holes is not None:
        followed = Painted.of(material, settings, seed)
    return SampleSheets(method.parts, prompts, settings, settings.out, seed, followed)
