"""`latentdiff serve`: a page for the browser, and the interfaces that other programs' clients speak."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentdiff.cli.loras import EMBEDDINGS
from latentdiff.cli.options import ANY_PATH, BACKEND, LOW_MEMORY, PRECISION
from latentdiff.cli.terminal import Terminated
from latentdiff.errors import MissingDependencyError, UsageError
from latentdiff.files import check_named

if TYPE_CHECKING:
    from latentdiff.serving.settings import Limits

EMBEDDED = "latentdiff-embedded"


def _models(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str | None]:
    """ "NAME=PLACE", or a place that gives the name; none is the embedded model."""
    found: dict[str, str | None] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            name, place = Path(text).stem if Path(text).is_file() else Path(text).name, text
        if not name or not place or name in found:
            raise UsageError(f"expected --model PLACE or NAME=PLACE, each name once, found {text}")
        found[name] = None if place == EMBEDDED else place
    for place in filter(None, found.values()):
        check_named(place)
    return found or {EMBEDDED: None}


def _limits(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"expected --limit NAME=NUMBER, found {text}") from None
    return found


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    callback=_models,
    metavar="[NAME=]FOLDER|HUB_ID|FILE",
    help="A model to offer, the first by default; repeat it for several.  [default: the one that comes with latentdiff]",
)
@click.option("--keep", type=click.IntRange(1), default=2, show_default=True, help="Models that stay in memory.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; any other needs a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes a free one.")
@click.option(
    "--token", envvar="LATENTDIFF_TOKEN", help="What clients have to know; also read from LATENTDIFF_TOKEN."
)
@click.option("--lora", "loras", type=ANY_PATH, metavar="FOLDER", help="LoRAs that prompts name by <lora:name:weight>.")
@click.option("--control", "controls", type=ANY_PATH, metavar="FOLDER", help="ControlNets that images are to follow.")
@click.option(
    "--ip-adapter", "ip_adapters", type=ANY_PATH, metavar="FOLDER", help="IP-Adapters, for images to resemble others."
)
@click.option(
    "--image-encoder",
    type=ANY_PATH,
    metavar="FOLDER",
    help="Where the image encoder of --ip-adapter lies.  [default: image_encoder beside each]",
)
@EMBEDDINGS
@click.option("--data", type=ANY_PATH, metavar="FOLDER", help="Offer fine-tuning on the data sets that are its folders.")
@click.option(
    "--out", type=ANY_PATH, default="images", show_default=True, metavar="FOLDER", help="Where the page keeps images."
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=("auto",),
    show_default=True,
    metavar="NAME",
    help="auto, cpu, cuda, cuda:N or mps, with one worker for each; repeat it for several.",
)
@PRECISION
@BACKEND
@LOW_MEMORY
@click.option(
    "--preview-decoder", type=ANY_PATH, metavar="FILE", help="A taesd_decoder.safetensors, for previews at no cost."
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    callback=_limits,
    metavar="NAME=N",
    help="side, pixels, steps, images, queue, batch, prompt, upload, ...: see docs/serve.md. Repeat it for several.",
)
def serve(
    models: dict[str, str | None],
    keep: int,
    host: str,
    port: int,
    token: str | None,
    loras: Path | None,
    controls: Path | None,
    ip_adapters: Path | None,
    image_encoder: Path | None,
    embeddings: Sequence[str],
    data: Path | None,
    out: Path,
    devices: tuple[str, ...],
    preview_decoder: Path | None,
    limits: dict[str, float],
    **load: Any,
) -> None:
    """Open a page that draws, and answer as OpenAI's images interface and AUTOMATIC1111's do.

    Nothing leaves this machine. Ctrl-C stops it: what is being made is finished, what waits is handed back.
    """
    make_server = _extra()
    from latentdiff.serving.settings import Limits, ServerSettings, WorkerSettings

    folders = {"LoRAs": loras, "ControlNets": controls, "IP-Adapters": ip_adapters, "data sets": data}
    for what, folder in (folders | {"an image encoder": image_encoder}).items():
        if folder is not None and not folder.is_dir():
            raise UsageError(f"there is no folder {folder} with {what}")
    if image_encoder is not None and ip_adapters is None:
        raise UsageError("expected --ip-adapter FOLDER with --image-encoder, found none")
    within = _with_limits(Limits(), limits)
    worker = WorkerSettings(
        models=models,
        keep=keep,
        load=load,
        image_encoder=None if image_encoder is None else str(image_encoder),
        embeddings=tuple(embeddings),
        preview_decoder=None if preview_decoder is None else str(preview_decoder),
    )
    settings = ServerSettings(
        host=host,
        port=port,
        token=token,
        devices=devices,
        loras=loras,
        controls=controls,
        ip_adapters=ip_adapters,
        data=data,
        out=out,
        limits=within,
        worker=worker,
    )
    server = make_server(settings)
    listening = _listening(host, port)
    click.echo(f"latentdiff serves at {_address(listening, token)} (Ctrl-C stops it)")
    try:
        server.run(sockets=[listening])
    except (KeyboardInterrupt, Terminated):
        pass  # as uvicorn passes on what has stopped it in good order
    server.check()


def _extra() -> Callable[..., Any]:
    try:
        from latentdiff.serving.app import make_server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("latentdiff"):
            raise
        raise MissingDependencyError(
            f"the server needs {error.name}, which is not installed; install it: pip install 'latentdiff[serve]'"
        ) from error
    return make_server


def _with_limits(limits: Limits, asked: dict[str, float]) -> Limits:
    names = [field.name for field in dataclasses.fields(limits)]
    for name, value in asked.items():
        if name not in names or value <= 0:
            raise UsageError(f"expected --limit with one of {', '.join(names)} above 0, found {name}={value:g}")
    return dataclasses.replace(
        limits, **{name: type(getattr(limits, name))(value) for name, value in asked.items()}
    )


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)  # whoever comes before the server is up has to wait, and is not turned away
    except OSError as error:
        raise UsageError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port or --host") from error
    return found


def _address(listening: socket.socket, token: str | None) -> str:
    from urllib.parse import quote

    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")
