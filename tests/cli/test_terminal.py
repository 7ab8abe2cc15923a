"""The command line as a process: closed streams, readers that leave, letters that a terminal lacks, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The command line around a `generate` that makes nothing: what is tested is what it talks to.
WORK = """
import sys, time
import click
from latentdiff import cli

@cli.cli.command()
@click.argument("texts", nargs=-1)
@click.option("--wait", type=float, default=0)
def say(texts, wait):
    for text in texts:
        click.echo(text)
    click.echo("on the other", err=True)
    print("ready", file=sys.stderr, flush=True) if wait else None
    time.sleep(wait)
    open("done", "w").close()

cli.main(sys.argv[1:])
"""


def start(tmp_path: Path, *arguments: str, shell: str = "", **environment: str) -> subprocess.Popen:
    """`say` in a process of its own, with redirections of a shell."""
    (tmp_path / "work.py").write_text(WORK)
    command = f'"{sys.executable}" work.py "$@" {shell}'
    return subprocess.Popen(
        ["bash", "-c", f"exec {command}" if "|" not in shell else command, "bash", *arguments], cwd=tmp_path, text=False,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip


def end(process: subprocess.Popen) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_do_not_hinder(tmp_path, shell):
    code, out, err = end(start(tmp_path, "say", "a", "b", shell=shell))
    assert code == 0 and (tmp_path / "done").exists()
    assert out in (b"", b"a\nb\n") and err in (b"", b"on the other\n")


def test_a_reader_that_leaves_does_not_end_the_work(tmp_path):
    texts = [f"{number:>8}" * 100 for number in range(300)]
    shell = '| head -n 1; exit "${PIPESTATUS[0]}"'
    code, out, err = end(start(tmp_path, "say", *texts, shell=shell))
    assert (code, out, err) == (0, texts[0].encode() + b"\n", b"on the other\n") and (tmp_path / "done").exists()


def test_letters_that_the_terminal_lacks_are_escaped(tmp_path):
    code, out, err = end(start(tmp_path, "say", "é 猫", PYTHONIOENCODING="latin-1"))
    assert (code, out) == (0, b"\xe9 \\u732b\n") and (tmp_path / "done").exists()


def test_a_full_disk_is_told(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    code, _, err = end(start(tmp_path, "say", "a", shell=">/dev/full"))
    assert code == 1 and err.count(b"\n") <= 1 and b"Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("times", [1, 2])
def test_signals_end_it_with_one_line(tmp_path, number, code, times):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("this session ignores the signal, as under nohup, and so do its programs")
    process = start(tmp_path, "say", "a", "--wait", "60")
    while b"ready" not in process.stderr.readline():
        pass
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.005)
    found, out, err = end(process)
    # The second may find the program at its end: then it dies of the signal, which a shell shows as the same code.
    assert found == code or (times == 2 and found == -number)
    assert b"Traceback" not in err and err.count(b"error:") <= 1 and not (tmp_path / "done").exists()


def test_what_a_parent_has_asked_to_ignore_stays_ignored(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    command = f"trap '' HUP; exec '{sys.executable}' work.py say --wait 0.5 a"
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while b"ready" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0 and (tmp_path / "done").exists()
