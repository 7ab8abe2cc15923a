"""The type checker sees the public face: it flags wrong calls and passes right ones."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALLS = Path(__file__).with_name("calls.py")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="needs pyright: pip install 'pyright[nodejs]'")
def test_wrong_calls_are_flagged_and_no_others():
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout)["generalDiagnostics"]
    flagged = {entry["range"]["start"]["line"] + 1 for entry in found if entry["severity"] == "error"}
    lines = CALLS.read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# flagged")}
    assert flagged == expected, [entry["message"] for entry in found]
