from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from latentdiff.errors import ConfigError
from latentdiff.training.sections import dump_config
from latentdiff.training.stages import config as module
from latentdiff.training.stages.config import TrainingConfig, load_config, validate_config
from tests.training.build import values

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "train").glob("*.yaml"))
SECTIONS = [
    entry
    for entry in vars(module).values()
    if isinstance(entry, type) and issubclass(entry, BaseModel) and entry.model_fields
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path):
    assert isinstance(load_config(path), TrainingConfig)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_documented(section):
    assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_the_resolved_configuration_is_read_back_as_it_was(tmp_path):
    config = validate_config(values(tmp_path, decoder={**values(tmp_path)["vae"], "max_steps": 3}), "test")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path)))
    overrides = ["diffusion.lr=1e-3", "model.unet.num_heads=[2, 4]", "data.limit=5", "diffusion.min_snr_gamma=null"]
    config = load_config(path, overrides)
    assert config.diffusion.lr == 1e-3
    assert config.model.unet.num_heads == (2, 4)
    assert config.data.limit == 5
    assert config.diffusion.min_snr_gamma is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("diffusion.learning_rate=1", "diffusion.learning_rate: Extra inputs are not permitted"),
        ("model.unet.width=3", "model.unet: unknown 'width'"),
        ("model.schedule.prediction_type=x", "prediction_type must be one of"),
        ("diffusion.lr=0", "diffusion.lr: .*greater than 0, found 0"),
        ("diffusion.lr=fast", "diffusion.lr: .*found 'fast'"),
        ("diffusion.caption_dropout=1.5", "caption_dropout"),
        ("vae.crop=10", "vae.crop must be a multiple of the VAE's downscale 4"),
        ("vae.crop=32", "at most data.resolution 16"),
        ("model.unet.in_channels=9", "must be equal, found"),
        ("model.unet.cross_attention_dim=8", "must equal text_encoder.hidden_size 16"),
        ("model.unet.sample_size=8", "sample_size must be data.resolution / downscale = 4, found 8"),
        ("vae.perceptual_weight=1", "needs perceptual_network"),
        ("run.x=1", "run is a value, not a section"),
        ("nothing", "expected KEY=VALUE"),
        ("run=[", "is not valid YAML"),
    ],
)
def test_bad_values_are_named(tmp_path, override, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path)))
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("a: [", "is not valid YAML"),
        ("- a", "must hold a mapping"),
        ("{}", "run: Field required .and 4 more"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value)
