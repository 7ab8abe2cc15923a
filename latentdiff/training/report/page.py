"""The report of a run: one HTML file with everything inside, no scripts, nothing from the network.

It is made of what lies in the run folder (`log.jsonl`, `config.yaml`, `data.json`, `samples/`, `copying/`,
`checkpoints/`), so that it can be written again at any time; what is not there is left out. Curves need matplotlib, and
the page says so where it is missing.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.errors import DataError
from latentdiff.files import atomic_path
from latentdiff.image import open_image
from latentdiff.reading.json import parse_json, read_object
from latentdiff.reading.plain import read_text
from latentdiff.reading.yaml import read_yaml
from latentdiff.recipe import read_recipe
from latentdiff.training.folder import hint_file
from latentdiff.training.report.charts import HINT, Points, can_draw, line_chart, number, smoothed
from latentdiff.training.report.log import LOG, RESULT, RunLog, kept_by_result, kept_in_words
from latentdiff.training.report.memorization import CopyCheck, read_copy_check
from latentdiff.training.report.words import duration, use_of_result

NAME = "report.html"

_PREVIEW = 1024  # pixels on the longer side of the sheet of a VAE
_LARGEST = 256  # pixels on the longer side of embedded images
_MOST_STEPS = 8  # columns of the table of samples
_MOST_VALUES = 40  # of a list or mapping in a table
_SMALL_FILE = 40_000  # bytes up to which an image is embedded as it is


def write_report(run: Path) -> Path:
    """Write `report.html` into the folder of a run, of one stage or of several; returns its path.

    Raises:
        DataError: the folder holds no log, or something in it cannot be read.
    """
    from jinja2 import Environment

    run = Path(run)
    settings = _yaml(run / "config.yaml")
    stages = _stages(run)
    template = Environment(autoescape=True, trim_blocks=True).from_string(
        (files("latentdiff.training.report") / "report.html.j2").read_text(encoding="utf-8")
    )
    text = template.render(
        title=f"{'Fine-tuning' if 'method' in settings else 'Training'} {run.resolve().name}",
        lead=_lead(settings),
        use=use_of_result(run),
        stages=[_stage(stage, settings if stage == run else settings.get(stage.name, {}), run) for stage in stages],
        tables=[("Settings", list(_rows(settings)))] if settings else [],
    )
    with atomic_path(run / NAME) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return run / NAME


def _stages(run: Path) -> list[Path]:
    """The folders that hold a log: the run itself, or those of its stages in the order of their beginning."""
    if (run / LOG).is_file() or not run.is_dir():
        return [run]
    found = [folder for folder in run.iterdir() if (folder / LOG).is_file()]
    return sorted(found, key=lambda folder: (folder / LOG).stat().st_mtime_ns) or [run]


def _stage(folder: Path, settings: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """What the page shows of one stage."""
    log, check = RunLog.read(folder / LOG), read_copy_check(folder)
    sheets, left_out = _sheets(folder)
    data = folder / "data.json"
    return {
        "name": "" if folder == run else folder.name,
        "facts": list(_facts(folder, log, settings, check)),
        "warnings": list(_warnings(log, check)),
        "findings": list(_findings(log)),
        "charts": list(_charts(log)),
        "without_charts": "" if can_draw() else HINT,
        "preview": next((_embedded(path, _PREVIEW) for path in sorted(folder.glob("previews/*.png"))[-1:]), None),
        "sheets": sheets,
        "left_out": left_out,
        "best_step": log.best[0] if log.best else None,
        "copying": _copying(folder, check),
        "data": list(_rows(parse_json(read_text(data, DataError), str(data), DataError))) if data.is_file() else [],
    }


def _yaml(path: Path) -> dict[str, Any]:
    return (read_yaml(path) or {}) if path.is_file() else {}


def _lead(settings: Mapping[str, Any]) -> str:
    return f"{settings['method']} of {settings.get('model') or 'the embedded model'}" if "method" in settings else ""


def _facts(run: Path, log: RunLog, settings: Mapping[str, Any], check: CopyCheck | None) -> Iterator[tuple[str, str]]:
    yield str(log.steps), "steps"
    if log.best:
        kept = (run / "checkpoints" / f"step-{log.best[0]:08d}").is_dir()
        yield (
            f"step {log.best[0]}",
            f"best by validation loss, {number(log.best[1])}; {'kept' if kept else 'not kept'} on disk",
        )
    if accuracy := log.last("val_accuracy"):
        yield f"{accuracy:.0%}", "of held-out pairs are told apart rightly at the end: 50 % is chance"
    if gaps := log["gap"]:
        (first_step, first), (_, last) = gaps[0], gaps[-1]
        yield number(last), f"validation loss minus training loss at the end; {number(first)} at step {first_step}"
    if why := _result(run).get("why"):
        yield f"step {_result(run)['step']}", f"is the result; the run stopped at step {log.steps}: {why}"
    if (share := kept_by_result(run)) is not None:
        yield f"{share:.2f}", f"kept of what it knew, 1 is all and 0 as far off as another prompt: {kept_in_words(share)}"
    if seconds := _seconds(log, settings):
        yield duration(seconds), "training time, without validation and samples"
    if rates := log["images_per_second"]:
        yield number(sorted(rate for _, rate in rates)[len(rates) // 2]), "images per second, median"
    if memory := log["peak_memory_mb"]:
        yield f"{max(value for _, value in memory):,.0f} MB", "peak memory"
    if check:
        yield f"{check.suspicious} of {len(check.nearest)}", "samples suspiciously near a training image"


def _result(run: Path) -> dict[str, Any]:
    path = run / RESULT
    return read_object(path, DataError, remedy="delete it") if path.is_file() else {}


def _seconds(log: RunLog, settings: Mapping[str, Any]) -> float:
    """Time of all steps, from the rates that the log gives."""
    points = [(0, 0.0), *log["images_per_second"]]
    images = ((step - before) * settings.get("batch_size", 0) for (before, _), (step, _) in pairwise(points))
    return sum(count / rate for count, (_, rate) in zip(images, points[1:], strict=True) if rate)


def _warnings(log: RunLog, check: CopyCheck | None) -> Iterator[str]:
    if check and check.suspicious:
        yield (
            f"{check.suspicious} of {len(check.nearest)} samples are suspiciously near a training image: the model may copy."
            " Compare the pairs below; fewer steps, a lower rank or more images help."
        )
    if not log.losses("val") and not log["psnr"]:
        yield "Nothing was held out, so that nothing here tells learning from memorising; set validation_share or validation."


def _findings(log: RunLog) -> Iterator[str]:
    losses = log.losses("val")
    if len(losses) < 2 or log.best is None:
        return
    (first_step, first), (last_step, last), (step, best) = losses[0], losses[-1], log.best
    change = 100 * (best / first - 1) if first else 0.0
    yield f"Validation loss went from {number(first)} at step {first_step} to {number(best)} at step {step} ({change:+.1f} %)."
    if step == last_step:
        yield "It was lowest at the last step: more steps may still help."
    elif last > best:
        training = dict(log.losses("train"))
        still_falls = training.get(last_step, math.inf) < training.get(step, -math.inf)
        reason = "; as the training loss still fell, the later steps learned by heart" if still_falls else ""
        yield f"After step {step} it rose again to {number(last)}{reason}. Take step {step} unless the samples say otherwise."


def _charts(log: RunLog) -> Iterator[dict[str, str]]:
    for title, series, style in _curves(log):
        if source := line_chart(title, series, **style):
            yield {"title": title, "source": source}


def _curves(log: RunLog) -> Iterator[tuple[str, Mapping[str, Points], dict[str, Any]]]:
    """Title, lines and style of each chart."""
    loss = log["loss"]
    mark = {"mark": (log.best[0], "best") if log.best else None}
    yield (
        "Training loss",
        {"as logged": loss, "smoothed": smoothed(loss, max(1.0, log.steps / 30))},
        {"faint": ["as logged"]},
    )
    yield "Loss at fixed noise", {"held out": log.losses("val"), "training images": log.losses("train")}, mark
    bands = {_band(name): points for name, points in log.held_out_bands.items()}
    yield "Held-out loss by timesteps (0 is clean)", bands, {"logarithmic": True, **mark}
    pairs = {"held out": log["val_accuracy"], "training pairs": log["train_accuracy"]}
    yield "Share of pairs of which the preferred image has become the likelier", pairs, {}
    pairs = {"preferred": smoothed(log["preferred_change"], 3.0), "rejected": smoothed(log["rejected_change"], 3.0)}
    yield "Change of the squared error on the images of pairs, smoothed", pairs, {}
    yield "Gap: held-out minus training images", {"gap": log["gap"]}, mark
    yield "Kept of what the model knew: 1 is all, 0 as far off as another prompt", {"kept": log["kept"]}, {}
    yield "Held-out images through the VAE, in dB", {"PSNR": log["psnr"]}, {}
    yield "Learning rate", {"learning rate": log["lr"]}, {}
    norms = {name: points for name, points in log.values.items() if name.startswith("grad_norm")}
    yield "Norm of the gradient", norms, {"logarithmic": True}
    yield "Images per second", {"images per second": log["images_per_second"]}, {}


def _band(name: str) -> str:
    return "-".join(name.removeprefix("val_").split("_"))


def _sheets(run: Path) -> tuple[list[dict[str, Any]], str]:
    """Tables of samples by step, one for each kind of weights, and what was left out of them."""
    folders = sorted(run.glob("samples/step-*"))
    shown = _spread(folders, _MOST_STEPS)
    titles = {"ema": "averaged weights (EMA), which the result has", "raw": "raw weights of the step"}
    sheets = []
    for weights, title in titles.items():
        columns = [_images(folder / weights) for folder in shown]
        count = max((len(column) for column in columns), default=0)
        if count:
            rows = [[column[row] if row < len(column) else None for column in columns] for row in range(count)]
            sheets.append(
                {
                    "title": title,
                    "steps": [int(folder.name.removeprefix("step-")) for folder in shown],
                    "rows": [
                        {
                            "prompt": _prompt(row),
                            "hint": next((_embedded(path) for path in map(_hint, row) if path), None),
                            "images": [path and _embedded(path) for path in row],
                        }
                        for row in rows
                    ],
                }
            )
    left_out = f"{len(folders) - len(shown)} more steps lie in samples/." if len(folders) > len(shown) else ""
    return sheets, left_out


def _spread(items: Sequence[Path], most: int) -> list[Path]:
    """At most so many items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if path.stem.isdecimal())


def _hint(sample: Path | None) -> Path | None:
    """What a sample followed, if it was made by a ControlNet that is trained."""
    path = sample and hint_file(sample)
    return path if path and path.is_file() else None


def _prompt(row: Sequence[Path | None]) -> str:
    path = next(path for path in row if path)
    try:
        return read_recipe(open_image(path).info).prompt
    except DataError:
        return path.stem


def _embedded(path: Path, largest: int = _LARGEST) -> str:
    """The image as a data: URL; large ones are made smaller."""
    image = open_image(path)
    data, kind = path.read_bytes(), "png"
    if max(image.size) > largest or len(data) > _SMALL_FILE:
        image = image.convert("RGB")
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _copying(run: Path, check: CopyCheck | None) -> dict[str, Any] | None:
    if check is None:
        return None
    part = (
        f"all {check.compared}"
        if check.compared == check.training_images
        else f"{check.compared} of {check.training_images}"
    )
    text = (
        f"Compared with {part} training images in the space of {check.space}. Training images are usually {number(check.usual)}"
        f" from the nearest other one; a sample nearer than {number(check.threshold)} is suspicious."
    )
    pairs = [
        {
            "sample": _embedded(run / one.sample),
            "training": _embedded(run / one.thumbnail),
            "name": one.training,
            "distance": number(one.distance),
            "mirrored": one.mirrored,
            "suspicious": one.suspicious,
        }
        for one in sorted(check.nearest, key=lambda one: one.distance)
    ]
    return {"text": text, "pairs": pairs}


def _rows(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as lines of a table; long lists and mappings are cut, which is said."""
    for place, (key, value) in enumerate(values.items()):
        if place == _MOST_VALUES and prefix:
            yield prefix.rstrip("."), f"and {len(values) - _MOST_VALUES} more"
            return
        if isinstance(value, Mapping) and value:
            yield from _rows(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            shown = ", ".join(json.dumps(one, ensure_ascii=False) for one in value[:_MOST_VALUES])
            yield prefix + key, shown + (f" and {len(value) - _MOST_VALUES} more" if len(value) > _MOST_VALUES else "")
        else:
            yield prefix + key, "none" if value is None else str(value)
