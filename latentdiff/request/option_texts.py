"""What is said of the options of generation, for help and for the documentation."""

from __future__ import annotations

import ast
from functools import cache
from itertools import pairwise
from pathlib import Path

from latentdiff.request import options


@cache
def texts() -> dict[str, str]:
    """What stands under each option in `request/options.py`, on one line."""
    classes = [node for node in ast.parse(Path(options.__file__).read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
    return {
        key.target.id: " ".join(text.value.value.split())
        for group in classes
        for key, text in pairwise(group.body)
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
