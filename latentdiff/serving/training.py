"""The tab that fine-tunes: `latentdiff data check` and `latentdiff finetune` as processes beside the server, one at a time.

Data sets are the folders in one that the server was started with; the page names them and never a path.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from pydantic import Field

from latentdiff.serving.asked import Strict
from latentdiff.serving.engine import Engine
from latentdiff.serving.errors import Refused

LINES = 200  # of output that are shown
POINTS = 2_000  # of the log that are shown
_NAME = re.compile(r"[\w][\w-]{0,63}")
_BAR = "%|"
_SAMPLE = re.compile(r"step-\d{8}")


class Check(Strict):
    """Which data set is to be looked through."""

    data: str
    model: str | None = None


class Run(Check):
    """A run to be started."""

    name: str
    method: Literal["lora", "full", "textual_inversion"] = "lora"
    word: str | None = Field(None, max_length=64)
    max_steps: int = Field(1000, ge=1, le=1_000_000)
    batch_size: int = Field(8, ge=1, le=1024)
    lr: float | None = Field(None, gt=0, le=1)
    rank: int | None = Field(None, ge=1, le=1024)
    prompt: str | None = Field(None, max_length=1000)
    every: int = Field(100, ge=1)


class Training:
    """One process at most, what it has said, and the folders of all runs."""

    def __init__(self, engine: Engine) -> None:
        settings = engine.settings
        self._engine, self._data = engine, settings.data
        self._runs = settings.out / "runs" if settings.out else None
        self._process: subprocess.Popen[str] | None = None
        self._said: deque[str] = deque(maxlen=LINES)
        self._command: list[str] = []
        self._lock = threading.Lock()

    @property
    def is_offered(self) -> bool:
        """Whether the server was started with data sets and a place for runs."""
        return self._data is not None and self._runs is not None

    def datasets(self) -> list[str]:
        """The names of the data sets."""
        if self._data is None or not self._data.is_dir():
            return []
        return sorted(path.name for path in self._data.iterdir() if path.is_dir() and path.name[0] != ".")

    def runs(self) -> list[str]:
        """The names of the runs, the latest first."""
        if self._runs is None or not self._runs.is_dir():
            return []
        found = [path for path in self._runs.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
        return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)]

    def folder(self, name: str) -> Path:
        """Where a run lies.

        Raises:
            Refused: there is none of that name.
        """
        if name not in self.runs() or self._runs is None:
            raise Refused(404, "there is no such run")
        return self._runs / name

    def check(self, asked: Check) -> None:
        """Begin to look through a data set."""
        self._start(["data", "check", str(self._dataset(asked.data)), *self._model(asked.model)])

    def begin(self, asked: Run) -> None:
        """Begin a run, or go on with one of that name."""
        if self._runs is None or not _NAME.fullmatch(asked.name):
            raise Refused(400, f"expected a name of letters, digits, - and _, found {asked.name!r}")
        folder = self._runs / asked.name
        if (folder / "checkpoints").is_dir():
            return self._start(["finetune", "--resume", str(folder)])
        values: dict[str, object] = {"data": self._dataset(asked.data), "method": asked.method, "out": folder}
        values |= {"max-steps": asked.max_steps, "batch-size": asked.batch_size, "lr": asked.lr, "rank": asked.rank}
        values |= {"word": asked.word, "prompts": asked.prompt}
        values |= dict.fromkeys(("preview-every", "validate-every", "checkpoint-every"), asked.every)
        values["log-every"] = max(1, asked.every // 10)
        words = [f"--{name}={value}" for name, value in values.items() if value]  # so that no value can be a flag
        return self._start(["finetune", *words, *self._model(asked.model)])

    def stop(self) -> None:
        """End what runs as Ctrl-C does: a run keeps its state."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)

    def end(self, seconds: float) -> None:
        """The same, and wait for it; for when the server stops."""
        self.stop()
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def state(self) -> dict[str, Any]:
        """What runs, and what it has said."""
        code = self._process.poll() if self._process else 0
        return {
            "offered": self.is_offered,
            "datasets": self.datasets(),
            "runs": self.runs(),
            "running": self._process is not None and code is None,
            "code": code,
            "command": shlex.join(["latentdiff", *self._command]) if self._command else "",
            "said": "\n".join(self._said),
        }

    def told(self, name: str) -> dict[str, Any]:
        """The log of a run, and its samples: step -> names."""
        folder = self.folder(name)
        entries = []
        if (folder / "log.jsonl").is_file():
            lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines[-POINTS:] if line.endswith("}")]
        steps = [path for path in (folder / "samples").glob("step-*") if _SAMPLE.fullmatch(path.name)]
        samples = {path.name: f"api/train/runs/{name}/samples/{path.name}" for path in sorted(steps) if _sheet(path)}
        result = "lora.safetensors" if (folder / "lora.safetensors").is_file() else None
        return {"log": entries, "samples": samples, "report": (folder / "report.html").is_file(), "result": result}

    def _dataset(self, name: str) -> Path:
        if name not in self.datasets() or self._data is None:
            raise Refused(404, f"there is no data set {name!r}")
        return self._data / name

    def _model(self, name: str | None) -> list[str]:
        source = self._engine.catalogue.models[self._engine.catalogue.model(name)]
        return [] if source is None else ["--model", source]

    def _start(self, words: list[str]) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                raise Refused(409, "something runs already; stop it first, or wait")
            self._said.clear()
            self._command = words
            self._process = subprocess.Popen(
                [sys.executable, "-m", "latentdiff", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C on the server's terminal goes to the server, which passes it on once
            )
            threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in filter(str.strip, process.stdout):
            before = self._said[-1] if self._said else ""
            if _BAR in line and _BAR in before and _bar(before) == _bar(line):
                self._said.pop()  # a bar that is drawn again
            self._said.append(line.rstrip())


def _bar(line: str) -> str:
    return line.partition(_BAR)[0].rstrip("0123456789 ")


def _sheet(folder: Path) -> Path | None:
    """The samples of one step on one sheet, of the averaged weights where there are such."""
    return next((path for path in (folder / "ema" / "sheet.png", folder / "raw" / "sheet.png") if path.is_file()), None)


def router(training: Training) -> APIRouter:
    """The routes of the tab."""
    routes = APIRouter(prefix="/api/train", tags=["page"])

    @routes.get("")
    def state() -> dict[str, Any]:
        """What there is, and what runs."""
        return training.state()

    @routes.post("/check")
    def check(asked: Check) -> dict[str, Any]:
        """Look through a data set."""
        training.check(asked)
        return training.state()

    @routes.post("/start")
    def start(asked: Run) -> dict[str, Any]:
        """Begin a run, or go on with it."""
        training.begin(asked)
        return training.state()

    @routes.post("/stop")
    def stop() -> dict[str, Any]:
        """End what runs; it can go on later."""
        training.stop()
        return training.state()

    @routes.get("/runs/{name}")
    def run(name: str) -> dict[str, Any]:
        """The curves and samples of a run."""
        return training.told(name)

    @routes.get("/runs/{name}/samples/{step}")
    def samples(name: str, step: str) -> Response:
        """The samples of one step."""
        sheet = _sheet(training.folder(name) / "samples" / step) if _SAMPLE.fullmatch(step) else None
        if sheet is None:
            raise Refused(404, "there are no such samples")
        return FileResponse(sheet, media_type="image/png")

    @routes.get("/runs/{name}/report")
    def report(name: str) -> Response:
        """The report of a run, as one page without scripts."""
        path = training.folder(name) / "report.html"
        if not path.is_file():
            raise Refused(404, "there is no report yet")
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        return FileResponse(path, media_type="text/html", headers={"content-security-policy": policy})

    return routes
