"""The command line: one module per command, imported when it is asked for. Everything heavy is imported when a command
runs, so help is instant."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

import click

from latentdiff import __version__
from latentdiff.cli.naming import Commands, Imported
from latentdiff.cli.terminal import Signals, Terminated, close_streams, open_streams
from latentdiff.errors import LatentDiffError, Stopped, printable

SELDOM = (50_000, 20, 100)  # for gc.set_threshold
INTERRUPTED = 130  # 128 + SIGINT, as shells expect
# The commands by their names, and the files in which they are; most are in one that is called so.
_NAMED = (
    "convert", "data", "edit", "evaluate", "finetune", "generate", "grid", "inpaint", "inspect", "interpolate", "invert",
    "lora", "report", "reproduce", "restore", "serve", "train", "translate", "upscale", "vary", "words",
)  # fmt: skip
FILES = {name: name for name in _NAMED} | {"control": "controls", "import": "importing"}


@click.group(
    cls=Commands,
    commands=Imported(FILES),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="latentdiff")
def cli() -> None:
    """Text to image with latent diffusion: generate, inspect, convert, reproduce, train and evaluate."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    # Importing torch makes half a million objects that stay: looking through them for garbage all the while takes a
    # fifth of a second, and once more at the end half a second.
    gc.set_threshold(*SELDOM)
    signals = Signals()
    signals.handle()
    try:
        open_streams()
        code = run(arguments)
    except KeyboardInterrupt:  # a second one, while the first was being answered
        code = INTERRUPTED
    except Terminated as stopped:
        code = _fail("terminated", 128 + stopped.number)
    except Exception:
        if not signals.received:
            raise
        click.echo("interrupted", err=True)  # libraries in C make other exceptions of it
        code = 128 + signals.received
    signals.release()
    gc.freeze()
    sys.exit(close_streams() or code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors become one line on stderr.

    Returns:
        0, or 2 for wrong usage, 130 after Ctrl-C, 1 for any other error.
    """
    try:
        with warnings.catch_warnings():
            _show_own_warnings()
            code = cli.main(arguments, prog_name="latentdiff", standalone_mode=False)
            return code or 0
    except Stopped as error:
        click.echo(str(error), err=True)
        return error.exit_code
    except LatentDiffError as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command: its help, as help
        click.echo(error.ctx.get_help())
        return 0
    except click.ClickException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "latentdiff")
        return _fail(f"{error.format_message()} (see {command} --help)", error.exit_code)
    except OSError as error:  # a file that cannot be read, a disk that fails
        return _fail(str(error), LatentDiffError.exit_code)
    except (click.Abort, KeyboardInterrupt):  # who wants it to end is told of no error
        click.echo("interrupted", err=True)
        return INTERRUPTED


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    return code


def _show_own_warnings() -> None:
    """Print warnings of latentdiff as one line each; those of the libraries below are not for its users."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        click.echo(f"warning: {printable(message)}", err=True)

    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"latentdiff\b", category=UserWarning)
    show_any: Any = show
    warnings.showwarning = show_any
