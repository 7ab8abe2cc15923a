from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.finetuning.build import captioned_folder


@pytest.fixture
def tmp(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with `data` of ten images and their captions, or of as many as a test module's `IMAGES` says."""
    captioned_folder(tmp_path / "data", getattr(request.module, "IMAGES", 10))
    return tmp_path
