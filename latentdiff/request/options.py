"""The options of generation. Each stands here and nowhere else.

The type of a key is what callers may give; its `Option` says the rest: default, domain, flag, heading, place in a recipe;
the text under it is its documentation. From these come the signatures of `Pipeline.__call__` and of the tasks (as
`Unpack[...]`), the check of values, the flags of the command line with their help, and the fields of recipes. None is
the same as not given. Loads no heavy library, as the command line's help has to be instant.
"""

# Annotations are evaluated here: the metadata in them is read.
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_args

from latentdiff.errors import UsageError
from latentdiff.request.domains import (
    Choice,
    ChoiceOrFile,
    Factor,
    Function,
    Interval,
    Made,
    Numbers,
    Pair,
    Real,
    Seeds,
    Texts,
    Whole,
    YesNo,
)
from latentdiff.request.option import (
    GuidanceOption,
    Kept,
    NoiseOption,
    Option,
    PromptOption,
    SamplerOption,
    SizeOption,
    SpeedOption,
    SteeringOption,
    XLOption,
)

if TYPE_CHECKING:
    from torch import Tensor

# The names that options choose from. A registry with an entry for each stands where the thing is made.
SamplerName = Literal[
    "ddim", "ddpm", "euler", "dpmpp-2m", "unipc", "euler-a", "heun", "dpm2", "dpm2-a", "lms", "dpmpp-2s", "dpmpp-2s-a",
    "dpmpp-sde", "dpmpp-2m-sde", "dpmpp-3m-sde", "pndm", "lcm", "tcd", "restart",
]  # fmt: skip
SyntaxName = Literal["a1111", "comfy", "plain"]
SpacingName = Literal[
    "leading", "trailing", "linspace", "karras", "uniform-lambda", "ays", "normal", "sgm-uniform", "simple", "ddim-uniform",
    "exponential", "polyexponential", "beta", "beta-comfy", "kl-optimal", "kl-optimal-comfy", "ays-a1111", "ays-a1111-xl",
    "lcm",
]  # fmt: skip
SdeNoiseName = Literal["path", "draws"]
NoiseName = Literal["cpu", "nv", "comfy"]
StartName = Literal["sigma", "unit"]
ToldName = Literal["exact", "whole"]
AttentionName = Literal["auto", "sdpa", "xformers", "sliced", "plain"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "int8"]
BackendName = Literal["torch", "openvino", "compile"]
PredictionName = Literal["epsilon", "v_prediction", "sample"]
LoRADialect = Literal["kohya", "peft"]
InversionName = Literal["fixed-point", "ddim-high", "ddim-low", "edict", "null-text"]
TranslationName = Literal["features", "direct", "null-text", "negative-prompt", "edict", "ddim", "replay"]
BlendName = Literal["linear", "constant", "exponential"]
OperatorName = Literal["inpaint", "super-resolution", "deblur", "denoise", "colourise"]
RestorationName = Literal["diffpir", "dps", "psld", "resample", "graikos"]
GuidanceName = Literal["cfg", "cfg++", "apg", "zero-star", "threshold"]
AxesName = Literal["x", "y", "xy"]
BorderName = Literal["reflect", "periodic"]
UpscalerName = Literal[
    "latent", "latent-antialiased", "latent-bicubic", "latent-bicubic-antialiased", "latent-nearest", "latent-nearest-exact",
    "lanczos",
]  # fmt: skip
PREPARATIONS = ("canny", "scribble", "xdog", "sobel", "tile")  # of hints for ControlNets
# Kinds of hints of "union" ControlNets (the first six) and of "promax", in the order of their places.
CONTROL_MODES = ("openpose", "depth", "scribble", "canny", "normal", "segment", "tile", "repaint")
# Blocks of SDXL that decide style and layout (Wang et al. 2024, InstantStyle).
BLOCK_PRESETS = {"style": {"up_blocks.0.attentions.1": 1.0}, "layout": {"down_blocks.2.attentions.1": 1.0}}

SIDE = Whole(1, metavar="PIXELS")  # of an image
REGION_WEIGHT = 0.7  # of a region, where the prompt for all has the rest
MOST_IMAGES = 10_000  # of one call; more is a mistake, or many calls


class WalkOptions(TypedDict, total=False):
    """What every walk of the denoise loop takes that follows a prompt."""

    guidance_rescale: Annotated[float | None, GuidanceOption(Real(0, 1), 0.0, kept=Kept(float, "Guidance rescale", 0.0))]
    """0 to 1: how far to undo the contrast that guidance adds (Lin et al. 2023, section 3.4)."""
    guidance_interval: Annotated[
        tuple[float, float] | None,
        GuidanceOption(Interval(), unset="all", kept=Kept(tuple[float, float] | None, "Guidance interval", None)),
    ]
    """Guide only at the noise levels (low, high], in sigma/alpha, 0 to about 15 (Kynkäänniemi et al. 2024)."""
    prompt_syntax: Annotated[
        SyntaxName | None,
        PromptOption(Choice(get_args(SyntaxName)), "a1111", kept=Kept(str, "Prompt syntax", "plain")),
    ]
    """How prompts are read: with the weights, BREAK, AND, stages and tags of AUTOMATIC1111, with ComfyUI's weights, or
    as they stand, cut at the model's length."""
    clip_skip: Annotated[int | None, PromptOption(Whole(1), 1, kept=Kept(int, "Clip skip", 1))]
    """Which hidden state of the text encoder is taken, from its end; 1 is the model's own. diffusers counts from 0."""
    batch_size: Annotated[int | None, SpeedOption(Whole(1), 4)]
    """Images made at once: memory against speed; the images stay the same."""
    callback: Annotated[Callable[[int, float, "Tensor"], Any] | None, Option(Function(), flags=())]
    """Called as `callback(step, t, x0)` after each step of each batch, with the step from 0, the timestep and the
    clean latents expected there, (N, C, h, w); False cancels."""
    progress: Annotated[bool | None, Option(YesNo(), True, flags=())]
    """Show a progress bar on a terminal or in a notebook."""


class SeededOptions(WalkOptions, total=False):
    """What every task takes that draws noise."""

    negative_prompt: Annotated[
        str | Sequence[str] | None, Option(Texts(), "", kept=Kept(str, None, ""), flags=("--negative",))
    ]
    """What to avoid in the image. In Python also a list with one text for each prompt."""
    seed: Annotated[int | Sequence[int] | None, Option(Seeds(), unset="random, and printed", kept=Kept(int, "Seed"))]
    """Seed of a prompt's first image; the next ones have seed + 1, ... In Python also a list with a seed for each image."""


class SamplingOptions(SeededOptions, total=False):
    """What every task takes that walks with a sampler."""

    num_images: Annotated[int | None, Option(Whole(1, MOST_IMAGES), 1, flags=("-n",))]
    """How many images to make of each prompt."""
    fast: Annotated[bool | None, SpeedOption(YesNo(), False, kept=Kept(bool, "Fast", False))]
    """Nearly the same image in less time: by the model's own LoRA for few steps, else by dpmpp-2m, trailing, in 12 steps or
    as many as the model says."""
    steps: Annotated[int | None, Option(Whole(1), 25, fast=12, kept=Kept(int, "Steps"))]
    """Denoising steps, 1 to the number of timesteps of the training."""
    guidance_scale: Annotated[float | None, Option(Real(), 5.0, kept=Kept(float, "CFG scale"), flags=("--guidance",))]
    """How strongly to follow the prompt and avoid the negative one; 1 is no guidance (Ho & Salimans 2022). A model may
    come with a default of its own, as the embedded one does."""
    guidance_kind: Annotated[
        GuidanceName | None, GuidanceOption(Choice(get_args(GuidanceName)), "cfg", kept=Kept(str, "Guidance kind", "cfg"))
    ]
    """What is made of the prompt and the negative one: classifier-free guidance; cfg++ with a scale of 0 to 1; apg and
    threshold, which keep colours at large scales; zero-star."""
    apg_eta: Annotated[float | None, GuidanceOption(Real(0, 1), 0.0, kept=Kept(float, "APG eta", 0.0))]
    """With apg: share of the change that only raises contrast."""
    apg_bound: Annotated[float | None, GuidanceOption(Real(0), 15.0, kept=Kept(float, "APG bound", 15.0))]
    """With apg: longest change of an image's latents before the scale; 0 is no bound."""
    apg_momentum: Annotated[float | None, GuidanceOption(Real(-1, 1), -0.5, kept=Kept(float, "APG momentum", -0.5))]
    """With apg: share of the last change that is added."""
    threshold_percentile: Annotated[
        float | None, GuidanceOption(Real(0.5, 1), 0.995, kept=Kept(float, "Threshold percentile", 0.995))
    ]
    """With threshold: share of the values of the latents that are not clipped."""
    pag_scale: Annotated[float | None, GuidanceOption(Real(0), 0.0, kept=Kept(float, "PAG scale", 0.0))]
    """How strongly to lead away from an image whose parts do not see one another (PAG, Ahn et al. 2024); 3 is customary, 0
    is none. A third evaluation at each step."""
    seg_scale: Annotated[float | None, GuidanceOption(Real(0), 0.0, kept=Kept(float, "SEG scale", 0.0))]
    """How strongly to lead away from an image whose parts all look for the same (SEG, Hong 2024)."""
    seg_blur: Annotated[float | None, GuidanceOption(Real(0), unset="their mean", kept=Kept(float | None, "SEG blur", None))]
    """With seg_scale: by how much that which parts look for is blurred, in cells of the smallest feature map."""
    freeu: Annotated[
        Sequence[float] | None, GuidanceOption(Numbers(4, 0.0), unset="none", kept=Kept(tuple[float, ...] | None, None, None))
    ]
    """Four factors in the first two levels of the way up: of half of the features, and of the coarse part of the skips
    (FreeU, Si et al. 2023): 1.5,1.6,0.9,0.2 for SD 1.x, 1.4,1.6,0.9,0.2 for 2.x, 1.3,1.4,0.9,0.2 for XL."""
    sampler: Annotated[
        SamplerName | None,
        Option(
            Choice(get_args(SamplerName)), "ddim", fast="dpmpp-2m", unset="the model's, or ddim",
            kept=Kept(str),
        ),
    ]  # fmt: skip
    """How a step is taken."""
    eta: Annotated[float | None, SamplerOption(Real(0, 1), unset="the sampler's", kept=Kept(float | None, None, None))]
    """0 to 1: share of fresh noise in the steps of ddim, of the ancestral samplers (-a), the SDE ones and tcd."""
    s_noise: Annotated[float | None, SamplerOption(Real(0), 1.0, kept=Kept(float, "Sigma noise", 1.0))]
    """Factor of the noise in stochastic steps, and in churn."""
    s_churn: Annotated[float | None, SamplerOption(Real(0), 0.0, kept=Kept(float, "Sigma churn", 0.0))]
    """Fresh noise before the steps of euler, heun and dpm2, over all of them (Karras et al. 2022, algorithm 2)."""
    s_tmin: Annotated[float | None, SamplerOption(Real(0), 0.0, kept=Kept(float, "Sigma tmin", 0.0))]
    """Churn only from this noise level on, in sigma/alpha."""
    s_tmax: Annotated[float | None, SamplerOption(Real(0), unset="all", kept=Kept(float | None, "Sigma tmax", None))]
    """Churn only up to this noise level, in sigma/alpha."""
    sde_noise: Annotated[
        SdeNoiseName | None,
        SamplerOption(Choice(get_args(SdeNoiseName)), unset="path", kept=Kept(str | None, None, None)),
    ]
    """Noise of dpmpp-2m-sde and dpmpp-3m-sde: from a path that does not depend on the steps, or drawn at each."""
    noise_source: Annotated[NoiseName | None, NoiseOption(Choice(get_args(NoiseName)), "cpu", kept=Kept(str, None, "cpu"))]
    """Who draws the noise: a CPU generator for each image, as here and as A1111's RNG "CPU"; an NVIDIA GPU, as A1111's
    "GPU" and "NV"; or ComfyUI, one generator for a batch."""
    noise_index: Annotated[int | None, NoiseOption(Whole(0), 0, kept=Kept(int, "Noise index", 0))]
    """With the noise of comfy: the image's place in its batch, from 0."""
    seed_delta: Annotated[int | None, NoiseOption(Whole(), 0, kept=Kept(int, "ENSD", 0))]
    """Added to the seed for all noise after the first draw, as A1111's "eta noise seed delta" is."""
    noise_start: Annotated[
        StartName | None,
        NoiseOption(Choice(get_args(StartName)), unset="the sampler's", kept=Kept(str | None, "Noise start", None)),
    ]
    """How strong the noise is that generating starts from: as A1111 has it, a share sigma of noise and no image, or as
    ComfyUI has it, all noise. The two differ by 0.2 %."""
    spacing: Annotated[
        SpacingName | None,
        SamplerOption(Choice(get_args(SpacingName)), fast="trailing", unset="the model's", kept=Kept(str | None, None, None)),
    ]
    """Which noise levels are visited: even in timesteps (the first three) or in noise."""
    rho: Annotated[float | None, SamplerOption(Real(0), unset="7 and 1", kept=Kept(float | None, "Schedule rho", None))]
    """How uneven the spacings karras and polyexponential are."""
    discard_penultimate: Annotated[bool | None, SamplerOption(YesNo(), False, kept=Kept(bool, None, False))]
    """Leave out the last noise level before the end, and take one more instead, as web UIs do for some samplers."""
    told_timesteps: Annotated[
        ToldName | None,
        SamplerOption(Choice(get_args(ToldName)), unset="as in diffusers", kept=Kept(str | None, "Told timesteps", None)),
    ]
    """Which timestep the model is told at a noise level between two of its own: that in between, as A1111 does, or the
    nearest, as ComfyUI does."""
    sigmas: Annotated[
        Sequence[float] | None, SamplerOption(Numbers(), unset="by spacing", kept=Kept(tuple[float, ...] | None, None, None))
    ]
    """Noise levels to visit in place of a spacing, falling, in sigma/alpha; the end without noise is added."""
    timesteps: Annotated[
        Sequence[float] | None, SamplerOption(Numbers(), unset="by spacing", kept=Kept(tuple[float, ...] | None, None, None))
    ]
    """Timesteps to visit in place of a spacing, falling."""
    original_size: Annotated[
        tuple[int, int] | None,
        XLOption(Pair(1), unset="that of the image", kept=Kept(tuple[int, int] | None, None, None)),
    ]
    """Height and width in pixels that SDXL is told the image had before it was brought to its size."""
    crop_top_left: Annotated[tuple[int, int] | None, XLOption(Pair(0), (0, 0), kept=Kept(tuple[int, int], None, (0, 0)))]
    """Top and left in pixels that SDXL is told the image was cropped at."""
    target_size: Annotated[
        tuple[int, int] | None,
        XLOption(Pair(1), unset="that of the image", kept=Kept(tuple[int, int] | None, None, None)),
    ]
    """Height and width in pixels that SDXL is told the crop had."""
    aesthetic_score: Annotated[float | None, XLOption(Real(0, 10), 6.0, kept=Kept(float, None, 6.0))]
    """How beautiful the refiner of SDXL is told the image is."""
    negative_aesthetic_score: Annotated[float | None, XLOption(Real(0, 10), 2.5, kept=Kept(float, None, 2.5))]
    """How beautiful what is to be avoided is."""
    controls: Annotated[
        Sequence[Any] | None,
        SteeringOption(Made("is_control", "a list of what a ControlNet makes of images: controls=[edges(image)]"), flags=()),
    ]
    """ControlNets with their images: `controls=[ControlNet.load(file)(image, scale=0.8)]`."""
    image_prompts: Annotated[
        Sequence[Any] | None,
        SteeringOption(
            Made("is_image_prompt", "a list of what an IPAdapter makes of images: image_prompts=[faces(image)]"), flags=()
        ),
    ]
    """Images to resemble, by an IP-Adapter: `image_prompts=[IPAdapter.load(file)(image, scale=0.6)]`."""
    window: Annotated[int | None, SizeOption(SIDE, unset="the whole", kept=Kept(int | None, "Window", None))]
    """Predict in windows of so many pixels, averaged where they overlap, for images larger than those of the training."""
    window_stride: Annotated[int | None, SizeOption(SIDE, unset="half a window", kept=Kept(int | None, "Window stride", None))]
    """With window: pixels from one window to the next."""
    vae_tile: Annotated[
        int | None, SpeedOption(Whole(32, metavar="PIXELS"), unset="whole", kept=Kept(int | None, "VAE tile", None))
    ]
    """Encode and decode in overlapping tiles of so many pixels; where memory is short, tiles are decoded anyway."""
    regions: Annotated[
        Sequence[Any] | None, SteeringOption(Made("is_region", 'regions=[Region("a cat", box="left")]'), flags=())
    ]
    """Prompts for parts of the image: `regions=[Region("a cat", box="left"), Region("a dog", mask="dog.png")]`."""
    cache_interval: Annotated[int | None, SpeedOption(Whole(1), 1, kept=Kept(int, "Cache interval", 1))]
    """Compute the deep layers of the U-Net at every Nth step only (DeepCache, Ma et al. 2024); 1 is every step."""
    cache_branch: Annotated[int | None, SpeedOption(Whole(0), 0, kept=Kept(int, "Cache branch", 0))]
    """With a cache interval: how many more layers are always computed."""
    cache_centre: Annotated[int | None, SpeedOption(Whole(0), unset="evenly", kept=Kept(int | None, "Cache centre", None))]
    """With a cache interval: compute the deep layers most often around this step, from 0."""


class SizedOptions(SamplingOptions, total=False):
    """What making images of prompts alone takes."""

    width: Annotated[int | None, Option(SIDE, unset="that of the training")]
    """Width of the image in pixels, a multiple of the VAE's factor (8)."""
    height: Annotated[int | None, Option(SIDE, unset="that of the training")]
    """Height of the image in pixels, a multiple of the VAE's factor (8)."""


class GenerateOptions(SizedOptions, total=False):
    """What `generate` takes besides."""

    hires: Annotated[
        float | None, SizeOption(Factor(8.0), unset="one pass", kept=Kept(float | None, "Hires upscale", None))
    ]
    """Make the image at its size, enlarge it so many times, and go over it once more there."""
    hires_upscaler: Annotated[
        UpscalerName | str | PathLike[str] | None,
        SizeOption(ChoiceOrFile(get_args(UpscalerName)), "latent", kept=Kept(str, None, "latent")),
    ]
    """With hires: how it is enlarged, as latents, by lanczos in pixels, or by the file of an upscaler (ESRGAN)."""
    hires_strength: Annotated[float | None, SizeOption(Real(0.001, 1), 0.5, kept=Kept(float, None, 0.5))]
    """With hires: how far the second pass goes from the enlarged image."""
    hires_steps: Annotated[
        int | None, SizeOption(Whole(1), unset="as many as before", kept=Kept(int | None, "Hires steps", None))
    ]
    """With hires: steps of the second pass, all of which are taken."""
    seamless: Annotated[
        AxesName | None, SizeOption(Choice(get_args(AxesName)), unset="no", kept=Kept(str | None, None, None))
    ]
    """Edges continue at the other side along these axes, so that the image tiles."""


def options_of(group: type[Any]) -> dict[str, Option]:
    """The options of one of the groups above, by name."""
    return {name: kind.__metadata__[0] for name, kind in group.__annotations__.items()}


OPTIONS = options_of(GenerateOptions)
SAMPLING = options_of(SamplingOptions)
KEPT = {name: option.kept for name, option in OPTIONS.items() if option.kept is not None}
GENERATING = tuple(name for name in KEPT if name not in SAMPLING)  # what is kept of generating alone
SECOND_PASS = tuple(name for name in GENERATING if name.startswith("hires"))
OF_MODEL = ("steps", "guidance_scale", "sampler", "spacing")  # what a model or a sampler may decide, where it is left open
FAST = {name: option.fast for name, option in SAMPLING.items() if option.fast is not None}


def check_second_pass(options: Mapping[str, Any]) -> None:
    """Make sure that nothing is said of a second pass that there is not.

    Raises:
        UsageError: something is.
    """
    said = [name for name in SECOND_PASS if options.get(name) not in (None, OPTIONS[name].default)]
    if said and options.get("hires") is None:
        raise UsageError(f"expected hires, how much larger, with {said[0]}; found {options[said[0]]!r} alone")


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as Python's types; None stays None.

    Raises:
        UsageError: a value outside its domain.
    """
    return {name: value if value is None else OPTIONS[name].domain(name, value) for name, value in options.items()}
