"""What is loaded when: heavy libraries only where they are used."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

import latentdiff
from latentdiff.cli import FILES

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch", "torch._dynamo", "transformers", "numpy", "PIL", "accelerate", "huggingface_hub", "pydantic", "yaml", "tqdm",
    "scipy", "sympy", "matplotlib", "datasets",
)  # fmt: skip
# What a plain prompt has no use for: other commands, and what adapts, steers, converts, enlarges, edits or trains.
UNUSED = (
    "adapters.control", "adapters.lora.adapter", "adapters.lora.kinds", "adapters.lora.loading", "adapters.lora.reading",
    "checkpoints.architecture", "checkpoints.infer", "checkpoints.inspection", "checkpoints.original", "checkpoints.pickled",
    "checkpoints.unclip", "engines.calibration", "evaluation", "networks.controlnet", "networks.freeu", "networks.ip_adapter",
    "networks.regional", "networks.seamless", "networks.t2i_adapter", "networks.told_guidance", "networks.upscaling",
    "networks.weakened", "networks.windows", "prompts.account", "reading.archives", "reading.pickles", "request.foreign",
    "serving", "tasks", "training",
)  # fmt: skip


def loaded_after(code: str, names: str = f"{HEAVY!r}") -> set[str]:
    """Which of the heavy libraries, or of other modules, a fresh interpreter has loaded after `code`."""
    report = f"import sys\n{code}\nprint('LOADED', *(name for name in {names} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split("LOADED")[1].split())


def test_import_is_light():
    assert loaded_after("import latentdiff; latentdiff.__version__") == set()


@pytest.mark.parametrize("command", ["", "generate", "reproduce", "inspect", "convert", "train", "evaluate"])
def test_help_is_light(command):
    arguments = [*command.split(), "--help"]
    assert loaded_after(f"from latentdiff.cli import run; assert run({arguments}) == 0") == set()


def test_wrong_usage_is_light():
    assert (
        loaded_after("from latentdiff.cli import run; assert run(['generate', '--sampler', 'x', 'cat']) == 2") == set()
    )


def test_an_image_needs_little_beside_torch(tmp_path):
    """The first image comes so much sooner."""
    arguments = ["generate", "a cat", "--seed", "0", "--steps", "1", "--out", str(tmp_path), "--device", "cpu"]
    loaded = loaded_after(f"from latentdiff.cli import run; assert run({arguments}) == 0")
    assert loaded == {"torch", "numpy", "PIL", "tqdm"}, "see with: python -X importtime -m latentdiff generate ..."


def test_an_image_needs_little_of_ours(tmp_path):
    arguments = ["generate", "a cat", "--seed", "0", "--steps", "1", "--out", str(tmp_path), "--device", "cpu"]
    loaded = loaded_after(f"from latentdiff.cli import run; assert run({arguments}) == 0", "list(sys.modules)")
    ours = {name.removeprefix("latentdiff.") for name in loaded if name.startswith("latentdiff.")}
    commands = {name.split(".")[1] for name in ours if name.startswith("cli.")} & set(FILES.values())
    assert "pipeline" in ours and commands == {"generate", "controls", "words"}  # of the last two the options
    assert not [name for name in ours if f"{name}.".startswith(tuple(f"{unused}." for unused in UNUSED))]
    assert all(find_spec(f"latentdiff.{name}") for name in UNUSED)


def test_pipeline_is_there_when_asked_for():
    assert "torch" in loaded_after("import latentdiff; latentdiff.Pipeline")
    assert set(latentdiff.__all__) <= set(dir(latentdiff))
    assert all(callable(getattr(latentdiff, name)) for name in latentdiff.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        latentdiff.Nothing  # noqa: B018


def test_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dynamic"] == ["version"] and latentdiff.__version__


def test_names_agree_with_what_they_name():
    from latentdiff.diffusion.samplers import SAMPLERS, SPACINGS
    from latentdiff.networks.attention import ATTENTION_BACKENDS
    from latentdiff.networks.device import FORMATS
    from latentdiff.request.infotext import SAMPLER_TITLES
    from latentdiff.request.options import AttentionName, PrecisionName, SamplerName, SpacingName

    assert tuple(SAMPLERS) == get_args(SamplerName)
    assert set(SAMPLERS) == set(SAMPLER_TITLES)
    assert SPACINGS == get_args(SpacingName)
    assert tuple(ATTENTION_BACKENDS) == get_args(AttentionName)
    assert ("auto", *FORMATS) == get_args(PrecisionName)
