"""`latentdiff reproduce`: make an image again from its recipe, and say how well that went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from latentdiff.cli.loras import loras_of, offer_loras_of, with_loras
from latentdiff.cli.options import ANY_PATH, DEVICE, IMAGE_FILE, PARTS_FROM
from latentdiff.cli.output import check_image_file, check_writable
from latentdiff.errors import CheckpointError, DataError, UsageError, printable
from latentdiff.recipe import Recipe, read_account, read_recipe
from latentdiff.request.option import flag_of
from latentdiff.request.options import PrecisionName
from latentdiff.request.recorded import MODEL_ROLES

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.pipeline import Pipeline
    from latentdiff.request.foreign.account import Account

# Differences up to this many grey levels of 255 are rounding: another batch size or number of threads.
ROUNDING = 2
# A lossy file is right if it is this near in dB, as JPEG of quality 75 is to most images and one of another seed never is; or
# nearly as near as one that is written now, for images of which these formats lose much.
LOSSY, SLACK = 30.0, 3.0
SHORT = 8  # digits of the shortest hash of a model that web UIs wrote; today it is 10


@click.command()
@click.argument("image", type=IMAGE_FILE)
@click.option(
    "--model",
    metavar="FOLDER|HUB_ID|FILE",
    help="The model of the recipe; not needed for the one that comes with latentdiff.",
)
@PARTS_FROM
@click.option(
    "--source",
    multiple=True,
    metavar="ROLE=FILE",
    help="Where an image lies that the recipe starts from: image=photo.png. Repeat it for several.  [default: beside IMAGE]",
)
@DEVICE
@click.option("--precision", type=click.Choice(get_args(PrecisionName)), help="Number format.  [default: the recipe's]")
@click.option("--out", type=ANY_PATH, metavar="FILE", help="Write the new image there.")
@click.option(
    "--lora-dir",
    type=ANY_PATH,
    metavar="FOLDER",
    help="Where the recipe's LoRAs lie.  [default: here or beside IMAGE]",
)
def reproduce(
    image: Path,
    model: str | None,
    source: tuple[str, ...],
    device: str,
    precision: str | None,
    out: Path | None,
    lora_dir: Path | None,
    **parts: str | None,
) -> int:
    """Make IMAGE again from its recipe, report the pixel difference and why there is one. An animation is one, too.

    What an edited image was made from is looked for beside it, and where --source says.

    The exit code is 0 if the images agree up to rounding (2 of 255 grey levels), or a lossy file up to what such files
    lose, else 1.
    """
    from latentdiff.image import frames_of, is_lossy, open_image

    original = open_image(image)
    recipe = read_recipe(original.info)
    if out:
        _check_out(out, is_animation=original.format == "GIF")
    _warn(read_account(original.info), parts)
    if recipe.given_embeddings:
        raise DataError(f"{image} was made from given text embeddings, which a recipe does not hold")
    if recipe.given_latents:
        raise DataError(f"{image} was made from given start noise, which a recipe does not hold")
    sources = _sources(recipe, image, source)
    if recipe.task == "upscale" and not recipe.model_hash:  # without a model
        again = _make(None, recipe, sources)
    else:
        folders = [lora_dir] if lora_dir else [image.parent, Path()]
        pipe = _load(recipe, model, device, precision, {**_parts(recipe, image, parts), **_given(parts)})
        loras = loras_of(offer_loras_of(pipe, recipe, folders), folders)
        with with_loras(pipe, loras):
            again = _make(pipe, recipe, sources)
    if out:
        _save(again, out)
        click.echo(out)
    if isinstance(again, bytes):
        return _report(frames_of(image), frames_of(again), recipe)
    lossy = original.format if is_lossy(image) else None
    return _report([original], [again], recipe, lossy)


def _check_out(out: Path, *, is_animation: bool) -> None:
    if not is_animation:
        return check_image_file("--out", out)
    if out.suffix.lower() != ".gif":
        raise UsageError(f"expected --out FILE.gif for an animation, found {out}")
    check_writable(out.parent)


def _given(parts: Mapping[str, str | None]) -> dict[str, str]:
    return {role: place for role, place in parts.items() if place is not None}


def _parts(recipe: Recipe, image: Path, given: Mapping[str, str | None]) -> dict[str, str]:
    """Where the parts lie that the recipe takes from elsewhere than the model, but for those that are `given`.

    Raises:
        DataError: one is not here or beside the image, or is another one.
    """
    from latentdiff.checkpoints.hashing import place_hash

    found = {}
    for role, entry in recipe.parts.items():
        if role not in given:
            raise DataError(f"the image's recipe takes a part {role!r} from elsewhere; expected {', '.join(given)}")
        if given[role] is not None:
            continue
        name, option = Path(entry.get("file", "")).name, flag_of(role)  # never a path, as of sources
        places = [path for folder in (image.parent, Path()) if name and (path := folder / name).exists()]
        if not places:
            raise DataError(
                f"the image was made with the {role} {name or '(without a name)'}, which is not beside it or here; say where "
                f"it is with {option}"
            )
        right = [path for path in places if place_hash(path) == entry.get("sha256")]
        if not right:
            raise DataError(
                f"{places[0]} is not the {role} that the image was made with: its SHA-256 differs; say where that is with "
                f"{option}"
            )
        found[role] = str(right[0])
    return found


def _warn(account: Account, parts: Mapping[str, str | None]) -> None:
    """Say on stderr, in a line each, what of another program's image is not as it was."""
    for one in account.of("approximated", "refused"):
        click.echo(f"{one.verdict}: {printable(one.name)} {printable(one.value)}: {printable(one.why)}", err=True)
    if account.model_options.get("vae") and not parts["vae"]:
        click.echo(f"refused: the VAE {printable(account.model_options['vae'])}: name its file with --vae", err=True)


def _save(again: Image.Image | bytes, path: Path) -> None:
    from latentdiff.files import atomic_path
    from latentdiff.image import save_image

    if isinstance(again, bytes):
        with atomic_path(path) as temporary:
            temporary.write_bytes(again)
    else:
        save_image(again, path)


def _make(pipe: Pipeline | None, recipe: Recipe, sources: dict[str, Path]) -> Image.Image | bytes:
    if pipe and recipe.task == "generate":
        from latentdiff.tasks.sources import sampling_of

        size = {"width": recipe.width, "height": recipe.height}
        files = {role: path for role, path in sources.items() if role == "hires_upscaler"}
        return pipe(recipe.prompt, **size, **sampling_of(recipe, sources), **{**recipe.generating(), **files})[0]
    from latentdiff.tasks import TASKS

    if recipe.task not in TASKS:
        raise DataError(f"the image was made by the task {recipe.task!r}; this latentdiff knows {', '.join(TASKS)}")
    return TASKS[recipe.task](pipe, recipe, sources)


def _sources(recipe: Recipe, image: Path, given: tuple[str, ...]) -> dict[str, Path]:
    """The files that the recipe starts from, by role, each the right one by its hash.

    Raises:
        UsageError: a `given` that is not ROLE=FILE, or whose role the recipe does not have.
        DataError: a file is not there, or is another one.
    """
    places = dict(_role_and_file(text, recipe) for text in given)
    if not recipe.roles():
        return {}
    from latentdiff.checkpoints.hashing import place_hash
    from latentdiff.request.sources import is_the_one

    found = {}
    for role, entry in recipe.roles().items():
        name = Path(entry.get("file", "")).name  # never a path: the recipe may come from anywhere
        path = places.get(role) or _beside(image, name)
        hint = f"say where it is with --source {role}=FILE"
        is_loaded = role == "refiner"  # as a model, which tells its own hash then
        is_model = is_loaded or role.startswith(MODEL_ROLES)
        if not (path.exists() if is_model else path.is_file()):
            raise DataError(
                f"the recipe starts from the {role} {name or '(without a name)'}, which is not at {path}; {hint}"
            )
        expected = entry.get("sha256", "")
        if not is_loaded and not (place_hash(path) == expected if is_model else is_the_one(path, expected)):
            raise DataError(f"{path} is not the {role} that the recipe names: its SHA-256 differs; {hint}")
        found[role] = path
    return found


def _beside(image: Path, name: str) -> Path:
    """Where a file lies that an image was made from: beside it, or where the page of `latentdiff serve` keeps those."""
    places = image.parent / name, image.parent / "inputs" / name
    return next((place for place in places if place.exists()), places[0])


def _role_and_file(text: str, recipe: Recipe) -> tuple[str, Path]:
    role, equals, file = text.partition("=")
    if not equals or role not in recipe.roles():
        roles = ", ".join(recipe.roles()) or "none"
        raise UsageError(f"expected --source ROLE=FILE with a role of the recipe ({roles}), found {text!r}")
    return role, Path(file)


def _load(
    recipe: Recipe, model: str | None, device: str, precision: str | None, parts: Mapping[str, str | None]
) -> Pipeline:
    from latentdiff.pipeline import Pipeline

    pipe = Pipeline.load(
        model,
        device=device,
        precision=precision or recipe.precision or "auto",
        backend=recipe.backend,
        ema=recipe.ema,
        prediction_type=recipe.prediction_type if model else None,
        zero_terminal_snr=recipe.zero_terminal_snr and model is not None,
        **parts,
    )
    if model is None and not _same_hash(recipe, pipe):
        raise CheckpointError(
            f"the image was made with the model {recipe.model!r} (hash {recipe.model_hash[:10] or 'unknown'}), "
            "which is not the one that comes with latentdiff; say where it is with --model"
        )
    return pipe


def _same_hash(recipe: Recipe, pipe: Pipeline) -> bool:
    """Whether `pipe` is the recipe's model; the text of the web UIs holds only the start of a hash."""
    if 0 < len(recipe.model_hash) < SHORT:
        raise DataError(
            f"the image's recipe has a model hash of {len(recipe.model_hash)} digits ({recipe.model_hash}), too few to tell "
            f"models apart; expected at least {SHORT}: name the model with --model"
        )
    return bool(recipe.model_hash) and pipe.model_hash.startswith(recipe.model_hash)


def _report(
    original: Sequence[Image.Image], again: Sequence[Image.Image], recipe: Recipe, lossy: str | None = None
) -> int:
    """Of one image each, or of as many frames; `lossy` is the format of a file that does not hold what was made."""
    from latentdiff.image import as_stored

    sizes = original[0].size, again[0].size
    if sizes[0] != sizes[1]:
        raise DataError(f"the image has been resized: it is {sizes[0]}, its recipe says {sizes[1]}")
    if len(original) != len(again):
        raise DataError(f"the animation has been edited: it has {len(original)} frames, made again {len(again)}")
    worst, mean, nearness = _difference(original, again)
    if worst == 0:
        click.echo("identical: every pixel is the same")
        return 0
    click.echo(f"difference: at most {worst}, on average {mean:.3f} of 255 grey levels")
    if lossy:
        own = _difference(again, [as_stored(again[0], lossy)])[2]
        is_near = nearness >= min(LOSSY, own - SLACK)
        verdict = (
            "as near as such files keep images" if is_near else f"but such a file keeps this image to {own:.1f} dB"
        )
        click.echo(f"  {lossy} does not keep pixels exactly: {nearness:.1f} dB, {verdict}")
        if is_near:
            return 0
    for reason in _reasons(recipe, read_recipe(again[0].info)):
        click.echo(f"  {reason}")
    return 0 if worst <= ROUNDING else 1


def _difference(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> tuple[int, float, float]:
    """The largest and the mean difference in grey levels, and the nearness in dB, of images in pairs."""
    import numpy as np

    from latentdiff.image import decibels, is_transparent

    mode = "RGBA" if any(is_transparent(one) for one in (*images, *others)) else "RGB"
    pair = (np.stack([np.asarray(one.convert(mode), dtype=np.int16) for one in all_]) for all_ in (images, others))
    difference = np.abs(np.subtract(*pair))
    error = float(np.square(difference, dtype=np.float64).mean())
    return int(difference.max()), float(difference.mean()), decibels(error)


def _reasons(then: Recipe, now: Recipe) -> list[str]:
    """What differs between the two runs and can change pixels."""
    pairs = {
        "model hash": (then.model_hash[:10], now.model_hash[:10]),
        "device": (then.device, now.device),
        "precision": (then.precision, now.precision),
        "back end": (then.backend, now.backend),
        "prediction type": (then.prediction_type, now.prediction_type),
    }
    pairs |= {name: (then.versions.get(name), now.versions.get(name)) for name in then.versions | now.versions}
    found = [f"{name}: then {a or 'unknown'}, now {b or 'unknown'}" for name, (a, b) in pairs.items() if a != b]
    return found or [
        "model, versions, device and precision are the same: it was made in a batch, with another number of "
        "threads or on another processor, or edited since"
    ]
