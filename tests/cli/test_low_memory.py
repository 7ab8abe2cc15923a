from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner
from PIL import Image

from latentdiff.cli import cli
from latentdiff.model.memory import residence
from latentdiff.model.memory.streaming import StreamedPart
from latentdiff.pipeline import Pipeline
from tests import peers


def test_generate_low_memory_makes_the_same_image(tmp_path: Path, monkeypatch):
    loaded = []
    original = Pipeline.from_components.__func__
    keep = lambda cls, *args, **options: loaded.append(original(cls, *args, **options)) or loaded[-1]  # noqa: E731
    monkeypatch.setattr(Pipeline, "from_components", classmethod(keep))
    monkeypatch.setattr(residence, "SMALL", 0)
    images = []
    for name, flags in (("usual", []), ("low", ["--low-memory"])):
        out = tmp_path / f"{name}.png"
        arguments = [
            "generate",
            "a cat",
            "--model",
            str(peers.folder("sd1")),
            "--steps",
            "2",
            "--seed",
            "1",
            "--out",
            str(out),
        ]
        result = CliRunner().invoke(cli, [*arguments, "--device", "cpu", *flags])
        assert result.exit_code == 0, result.output
        images.append(Image.open(out).tobytes())
    assert images[0] == images[1]
    assert [isinstance(pipe.residence.parts["unet"], StreamedPart) for pipe in loaded] == [False, True]
    # The program ends after its last image, and keeps nothing large for another one.
    assert all(not part.is_ready for name, part in loaded[0].residence.parts.items() if name != "vae")
