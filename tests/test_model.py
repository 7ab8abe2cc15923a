"""A model in memory: wrong calls leave it as it was, and it says what it is."""

from __future__ import annotations

import pytest
import torch

from latentdiff import Pipeline
from latentdiff.errors import LatentDiffError, UsageError
from tests import peers


@pytest.fixture(scope="module")
def pipe():
    return peers.ours("sd1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ""}, "expected source to be a path or an id, found ''"),
        ({"source": 3}, "expected source to be a path or an id, found 3"),
        ({"device": "tpu"}, "expected the device auto, cpu, cuda"),
        ({"precision": "half"}, "expected precision to be one of auto, fp32"),
        ({"backend": "onnx"}, "expected backend to be one of torch, openvino, compile"),
        ({"prediction_type": "eps"}, "expected prediction_type to be one of epsilon"),
        ({"ema": "yes"}, "expected ema to be True or False"),
        ({"low_memry": True}, "there is no option 'low_memry'; did you mean 'low_memory'?"),
        ({"torch_dtype": torch.float16}, "there is no option 'torch_dtype' here; give `precision`"),
        ({"device_map": "auto"}, "give `device`"),
    ],
)
def test_wrong_loading_is_one_line(options, message):
    with pytest.raises(UsageError) as caught:
        Pipeline.load(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_moving_to_a_device_that_is_not_there_changes_nothing(pipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = pipe("cat", seed=0, steps=1, progress=False)[0].tobytes()
    for device in ("cuda", torch.device("cuda", 1), "nonsense", None, 3.5):
        with pytest.raises(UsageError):
            pipe.to(device)
    with pytest.raises(UsageError, match="expected a precision of auto, fp32, bf16, fp16, int8, found 'half'"):
        pipe.to("cpu", "half")
    assert (pipe.device.type, pipe.precision.name) == ("cpu", "fp32")
    assert pipe("cat", seed=0, steps=1, progress=False)[0].tobytes() == before


@pytest.mark.parametrize("place", [".", "./", ""])
def test_saving_over_a_folder_with_something_else_is_refused(pipe, place, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LatentDiffError):
        pipe.save(place)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_repr_says_what_is_loaded(pipe):
    text = repr(pipe)
    assert text.startswith("<Pipeline sd1, U-Net of ") and "\n" not in text
    assert "trained at 64x64, epsilon prediction, fp32 on cpu" in text
    assert "for inpainting" in repr(peers.ours("inpaint")) and "for inpainting" not in text
