"""Compiled blocks and CUDA graphs on a CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.engines.cuda_graphs import GraphedFunction
from latentdiff.errors import NotFiniteError
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_recorded_function_follows_its_inputs() -> None:
    weight = torch.randn(8, 8, device="cuda")
    graphed = GraphedFunction(lambda x, y: torch.tanh(x @ weight) + y)
    for _ in range(3):
        x, y = torch.randn(4, 8, device="cuda"), torch.randn(4, 8)
        torch.testing.assert_close(graphed("", x, y), torch.tanh(x @ weight) + y.cuda())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return tiny.sd1_folder(tmp_path_factory.mktemp("sd1"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_are_those_of_the_modules(folder, precision: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipe = Pipeline.load(folder, device="cuda", precision=precision)
    options = {"steps": 6, "seed": 3, "num_images": 2, "guidance_interval": (0.5, 10.0), "progress": False}
    plain = np.stack([np.asarray(image, float) for image in pipe("a red cat", **options)])
    pipe.use_backend("compile")
    for _ in range(2):
        found = np.stack([np.asarray(image, float) for image in pipe("a red cat", **options)])
        assert np.abs(found - plain).mean() < (0.1 if precision == "fp32" else 12)


def test_nan_is_an_error_without_waiting_for_each_step(folder) -> None:
    pipe = Pipeline.load(folder, device="cuda", precision="bf16")
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="after step 1 of 4"):
        pipe("a red cat", steps=4, seed=0, progress=False)
