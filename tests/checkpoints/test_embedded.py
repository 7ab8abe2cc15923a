from __future__ import annotations

import pytest

from latentdiff.checkpoints import embedded
from latentdiff.checkpoints.embedded import embedded_judge, embedded_model
from latentdiff.errors import CheckpointError


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "latentdiff"
    folder.mkdir(parents=True)
    monkeypatch.setattr(embedded, "__file__", str(folder / "checkpoints" / "embedded.py"))
    return folder


def put_model(folder):
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")


def test_inside_an_installed_package(package):
    put_model(package / "weights")
    assert embedded_model() == package / "weights"


def test_beside_the_package_in_a_checkout(package):
    put_model(package.parent / "weights")
    assert embedded_model() == package.parent / "weights"


def test_missing(package):
    (package / "weights").mkdir()
    with pytest.raises(CheckpointError, match="expected the embedded model in .*weights, found none"):
        embedded_model()


def test_the_judge_lies_beside_the_model(package):
    (package.parent / "weights" / "judge").mkdir(parents=True)
    assert embedded_judge() == package.parent / "weights" / "judge"


def test_missing_judge(package):
    (package / "weights").mkdir()
    with pytest.raises(CheckpointError, match="expected the judge in .*judge, found none"):
        embedded_judge()
