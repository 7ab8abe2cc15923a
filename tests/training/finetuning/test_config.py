from pathlib import Path

import pytest
import yaml

from latentdiff.cli.finetune import finetune as command
from latentdiff.errors import ConfigError, UsageError
from latentdiff.training.finetuning.config import (
    METHOD_DEFAULTS,
    METHODS,
    FinetuneConfig,
    load_finetune_config,
    make_config,
)
from latentdiff.training.finetuning.rates import rate_advice
from latentdiff.training.sections import dump_config, sources, with_words

CONFIGS = Path(__file__).parents[3] / "configs" / "finetune"
OF_METHODS = sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("layout_*.yaml")))


def flags():
    return {parameter.name: parameter for parameter in command.get_params(command.make_context("finetune", []))}


def test_every_key_is_documented_and_a_flag():
    for name, field in FinetuneConfig.model_fields.items():
        assert field.description, name
        assert flags()[name].help.startswith(" ".join(field.description.split())), name


def test_methods_have_defaults_of_their_own():
    assert set(METHOD_DEFAULTS) == set(METHODS)
    lora, full = (make_config({"data": "x", "method": method}, "test") for method in ("lora", "full"))
    assert lora.lr > full.lr and lora.weight_decay == 0 < full.weight_decay
    assert make_config({"data": "x", "method": "lora", "lr": 0.5}, "test").lr == 0.5


def test_words_go_around_the_captions_of_what_is_learned():
    given = [{"path": "a", "prefix": "new"}, {"path": "b", "suffix": "at night"}, {"path": "c", "regularization": True}]
    entries = make_config({"data": given, "caption_prefix": "sks,", "caption_suffix": ", in oil"}, "test")
    found = with_words(entries.data, entries.caption_prefix, entries.caption_suffix)
    assert [(entry.prefix, entry.suffix) for entry in found] == [
        ("sks, new", ", in oil"),
        ("sks,", "at night, in oil"),
        ("", ""),
    ]
    assert [source.suffix for source in sources(found)] == [", in oil", "at night, in oil", ""]


def test_optimizers_have_defaults_of_their_own():
    lion, adamw, free, prodigy = (
        make_config({"data": "x", "method": "full", "optimizer": name}, "test")
        for name in ("lion", "adamw", "schedulefree", "prodigy")
    )
    assert lion.lr * lion.weight_decay == pytest.approx(adamw.lr * adamw.weight_decay)  # what decays stays the same
    assert lion.lr <= adamw.lr / 3 and lion.betas == (0.9, 0.99)
    assert (free.decay, free.ema_decay, free.lr) == ("constant", 0.0, adamw.lr)
    assert prodigy.lr == 1.0


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"optimizer": "prodigy", "lr": 1e-3}, "prodigy multiplies the rate that it finds by lr: 1 is usual"),
        ({"optimizer": "lion", "lr": 1e-4}, "lion wants a third to a tenth of the lr of adamw: about 1e-05 here"),
        ({"optimizer": "lion"}, ""),
        ({"optimizer": "prodigy"}, ""),
        ({"optimizer": "adamw", "lr": 1e-2}, ""),
    ],
)
def test_rates_of_another_optimizer_are_told(values, advice):
    config = make_config({"data": "x", "method": "full", **values}, "test")
    found = rate_advice(config, METHOD_DEFAULTS["full"]["lr"])
    assert found.startswith(advice) and bool(found) == bool(advice)


def test_flags_replace_the_file_which_replaces_the_defaults(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("data: [pictures, {path: more, repeats: 3, weight: 0.5}]\nlr: 3e-4\nrank: 16\n")
    config = load_finetune_config(path, {"rank": "4", "prompts": ["a cat"]})
    assert (config.lr, config.rank, config.max_steps, config.prompts) == (3e-4, 4, 600, ("a cat",))
    assert [(entry.path, entry.repeats, entry.weight) for entry in config.data] == [
        ("pictures", 1, 1.0),
        ("more", 3, 0.5),
    ]


def test_ways_to_name_data(tmp_path):
    (tmp_path / "odd:3").mkdir()
    given = ["a/b:4", str(tmp_path / "odd:3"), "{path: c, repeats: 2}", "org/set"]
    entries = make_config({"data": given}, "test").data
    assert [(Path(entry.path).name, entry.repeats) for entry in entries] == [
        ("b", 4),
        ("odd:3", 1),
        ("c", 2),
        ("set", 1),
    ]


def test_a_saved_configuration_is_the_same():
    config = make_config({"data": ["a:2"], "method": "full", "prompts": ["x"], "betas": [0.5, 0.6]}, "test")
    assert make_config(yaml.safe_load(dump_config(config)), "test") == config


@pytest.mark.parametrize("path", OF_METHODS, ids=lambda path: path.stem)
def test_shipped_configurations_state_the_defaults_of_their_method(path):
    values = yaml.safe_load(path.read_text())
    word = {"word": "<x>"} if values["method"] == "textual_inversion" else {}
    config = load_finetune_config(path, {"data": ["x"], **word})
    for name, value in METHOD_DEFAULTS[config.method].items():
        assert getattr(config, name) == value and name in values


def test_there_is_a_configuration_for_every_method():
    assert {yaml.safe_load(path.read_text())["method"] for path in OF_METHODS} == set(METHODS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"relative_step": True}, "relative_step goes with optimizer adafactor"),
        ({"optimizer": "schedulefree", "ema_decay": 0.9}, "expected decay constant and ema_decay 0, found constant and 0.9"),
        ({"optimizer": "schedulefree", "betas": [0, 0.9]}, "betas of which the first is above 0"),
        (
            {"optimizer": "adafactor", "relative_step": True, "text_encoder_lr": 1e-3, "method": "full"},
            "adafactor finds one step size for all; leave out text_encoder_lr",
        ),
        ({"learning_rate": 1}, "learning_rate: Extra inputs are not permitted"),
        ({"lr": -1}, "lr: Input should be greater than 0, found -1"),
        ({"method": "dreambooth"}, "or 'controlnet', found 'dreambooth'"),
        ({"data": [{"folder": "x"}]}, "data.0.path: Field required"),
        ({"train_text_encoder": True}, "put text_encoder into targets"),
        ({"method": "textual_inversion"}, "textual_inversion needs the new word"),
        ({"validation": ["v"], "validation_share": 0.5}, "either validation or validation_share"),
    ],
)
def test_senseless_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        make_config({"data": "x", **values}, "test")


def test_no_data():
    with pytest.raises(UsageError, match="give a folder with --data FOLDER"):
        load_finetune_config(None, {})
