"""Forgetting as a number, and what keeps it small."""

import json
import re

import numpy as np
import pytest
import torch

from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.diffusion.parameterization import training_target, velocity
from latentdiff.errors import ConfigError
from latentdiff.prompts.words import read_words, split_words
from latentdiff.training.finetuning.finetune import run
from latentdiff.training.finetuning.old import Forgetting, Practice, Walks, predicted
from latentdiff.training.finetuning.old_prompts import GENERAL, old_prompts
from latentdiff.training.finetuning.preparation import Preparation, make_accelerator
from latentdiff.training.report.log import kept_in_words
from tests.training.finetuning.build import listing_model, log_of, model_folder, settings, state_of

PROMPTS = ["a photo of the cat", "a photo of the dog", "red", "the dog"]


IMAGES = 8


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
def test_the_velocity_is_that_of_the_definition(name):
    random = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 5, 5, generator=random).double()
    angle = torch.tensor([0.3, 0.8, 1.4]).double().view(3, 1, 1, 1)
    alpha, sigma = angle.cos(), angle.sin()
    raw = training_target(name, x0, eps, alpha, sigma)
    torch.testing.assert_close(velocity(name, raw, alpha * x0 + sigma * eps, alpha, sigma), alpha * eps - sigma * x0)


def test_old_prompts_use_the_words_that_the_model_lists():
    words = read_words(embedded_model())
    measured, kept = (old_prompts(words, 32, purpose) for purpose in ("measured", "kept"))
    assert len(measured) == len(kept) == 32 and not set(measured) & set(kept)
    for prompt in measured + kept:
        assert set(split_words(prompt)) <= words.all, prompt
    assert old_prompts(words, 16, "measured") == measured[:16]
    assert any(" of a" in prompt for prompt in measured) and any(prompt.startswith("two ") for prompt in measured)
    assert not any(re.search(r"snow background|(two|three|four) light bulb\b", prompt) for prompt in measured + kept)
    two = [prompt for prompt in measured + kept if " and " in prompt]
    coloured = [prompt for prompt in two if len(colours_in(prompt, words)) >= 2]
    assert len(two) > len(coloured) > 0, "things by twos, with colours and without, are what else is forgotten first"


def colours_in(prompt, words):
    return [word for word in split_words(prompt.partition(" on ")[0]) if word in words.kinds["colours"]]


def test_old_prompts_of_models_that_list_few_words_or_none(tmp_path):
    kinds = {"things": ("cat", "dog"), **dict.fromkeys(("colours", "backgrounds", "sizes", "counts", "relations"), ())}
    content = {**{kind: list(entries) for kind, entries in kinds.items()}, "words": ["a", "cat", "dog"], "size": 64}
    (tmp_path / "words.json").write_text(json.dumps(content))
    words = read_words(tmp_path)
    assert {*old_prompts(words, 16, "measured"), *old_prompts(words, 16, "kept")} == {"a cat", "a dog"}
    both = old_prompts(None, 16, "measured"), old_prompts(None, 16, "kept")
    assert {*both[0], *both[1]} == set(GENERAL) and not set(both[0]) & set(both[1])


@pytest.fixture
def prepared(tmp):
    (tmp / "run").mkdir()
    accelerator, of = make_accelerator(settings(tmp, old_prompts=PROMPTS))
    made = Preparation(of, accelerator)
    made.read_data()
    with made.computing():
        made.build_caches()
        with made.trainer() as trainer:
            yield made, trainer.task.module


def test_walks_are_ddim_of_the_start_model(prepared):
    made, module = prepared
    walks = made._walks(module, "measured")
    assert walks.x.shape == walks.raw.shape == (4, 4, 4, 4, 4) and (np.diff(walks.timesteps) < 0).all()
    alphas = module.objective.alpha.double()
    empty = {name: np.repeat(row, 4, 0) for name, row in walks.empty.items()}
    for level in range(3):
        x, t = torch.from_numpy(walks.x[:, level]), torch.from_numpy(walks.timesteps[:, level])
        with_prompt, without = (torch.from_numpy(found[:, level]) for found in (walks.raw, walks.raw_empty))
        assert torch.equal(predicted(module, walks.text, x, t), with_prompt)
        assert torch.equal(predicted(module, empty, x, t), without)
        raw = without + walks.guidance * (with_prompt - without)  # Ho & Salimans 2022
        # Song et al. 2021, equation 12 with sigma_t = 0, of v-prediction.
        a, following = (
            alphas[times].view(-1, 1, 1, 1) for times in (t, torch.from_numpy(walks.timesteps[:, level + 1]))
        )
        sigma = (1 - a**2).sqrt()
        x0, eps = a * x - sigma * raw, sigma * x + a * raw
        torch.testing.assert_close(
            torch.from_numpy(walks.x[:, level + 1]).double(), following * x0 + (1 - following**2).sqrt() * eps,
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_a_model_is_kept_by_as_many_prompts_as_it_lists_things(tmp):
    things = [f"thing{number}" for number in range(40)]
    model = listing_model(tmp, things)
    content = json.loads((model / "words.json").read_text())
    (model / "words.json").write_text(json.dumps({**content, "things": things, "backgrounds": ["red", "blue"]}))
    (tmp / "run").mkdir()
    accelerator, of = make_accelerator(settings(tmp, model=str(model)))
    made = Preparation(of, accelerator)
    made.read_data()
    with made.computing():
        made.build_caches()
        with made.trainer() as trainer:
            module = trainer.task.module
            assert made._walks(module, "kept").x.shape[:2] == (40, 4)
            assert made._walks(module, "measured").x.shape[:2] == (16, 4)


def test_the_scale_of_what_was_kept(prepared, monkeypatch):
    made, module = prepared
    measure = Forgetting(module, made._walks(module, "measured"))
    assert measure.kept(module) == 1.0
    before = type(module).prediction

    def mixed(share):
        def prediction(self, noisy, timesteps, batch):
            other = {name: tensor.roll(1, 0) for name, tensor in batch.items()}
            return before(self, noisy, timesteps, batch).lerp(before(self, noisy, timesteps, other), share)

        return prediction

    for share, kept in ((0.5, 0.75), (1.0, 0.0), (2.0, 0.0)):  # 1 - share²
        monkeypatch.setattr(type(module), "prediction", mixed(share))
        assert measure.kept(module) == pytest.approx(kept, abs=1e-4)


@pytest.mark.parametrize(
    "share, words", [(1.0, "hardly"), (0.99, "hardly"), (0.98, "little"), (0.8, "much"), (0, "most")]
)
def test_what_was_kept_in_words(share, words):
    assert words in kept_in_words(share)


def test_practice_counts_the_same_however_a_batch_is_split():
    text = {"tokens": np.arange(3)[:, None, None]}
    x = np.arange(6.0).reshape(3, 2, 1, 1, 1)
    empty = {"tokens": np.full((1, 1, 1), 9)}
    walks = Walks(text, empty, 5.0, x, np.arange(6).reshape(3, 2), np.zeros_like(x), np.ones_like(x))
    practice = Practice(walks, 0.5, 10, 7)
    whole = practice.rows(3, range(10))
    assert len(whole["old_weights"]) == 3  # rows 0, 4, 8
    assert whole["old_weights"].sum() / 10 == pytest.approx(0.5)
    assert whole["old_raw"][:, 0, 0, 0].tolist() == [1, 0, 1]  # the empty prompt in turn with the others
    assert whole["old_tokens"][[0, 2], 0, 0].tolist() == [9, 9]
    assert whole["old_timesteps"][1] // 2 == whole["old_tokens"][1, 0, 0]
    assert practice.rows(4, range(10))["old_raw"][:, 0, 0, 0].tolist() == [0, 1, 0]
    parts = [practice.rows(3, range(first, first + 2)) for first in range(0, 10, 2)]
    kept = [part for part in parts if part["old_weights"].any()]
    assert np.concatenate([part["old_x"] for part in kept]).tolist() == whole["old_x"].tolist()
    assert sum(part["old_weights"].sum() for part in parts) == whole["old_weights"].sum()


def test_what_is_kept_is_forgotten_less(tmp, monkeypatch):
    """As squared distances: the random model hardly listens to prompts, so that any training takes it to 0 on the scale."""
    monkeypatch.setattr(Forgetting, "kept", lambda self, module: self._squares(module, self._walks.text))
    strong = {"rank": 8, "max_steps": 30, "lr": 2e-2, "validate_every": 30, "log_every": 10, "old_prompts": PROMPTS}
    moved = {}
    for name, more in (("plain", {}), ("kept", {"keep": "old:4"})):
        run(settings(tmp, out=tmp / name, **strong, **more))
        moved[name] = [entry["kept"] for entry in log_of(tmp / name) if "kept" in entry]
        assert "kept of what it knew" in (tmp / name / "report.html").read_text()
    assert moved["plain"][0] == moved["kept"][0] == 0.0
    assert moved["kept"][-1] < 0.7 * moved["plain"][-1]
    assert any("old" in entry for entry in log_of(tmp / "kept"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_keeping_goes_on_where_it_was_and_in_parts(tmp, method):
    keep = {"keep": "old", "method": method, "batch_size": 8, "lr": 1e-3}
    for name, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        run(settings(tmp, out=tmp / name, max_steps=steps, **keep))
    whole, parts = state_of(tmp / "whole"), state_of(tmp / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    run(settings(tmp, out=tmp / "micro", accumulation=8, **keep))
    for name, value in state_of(tmp / "micro").items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", ["new", "old:", "old:x", "old:0", "old:-1", "old:inf", "old:nan"])
def test_what_cannot_be_kept_is_said(tmp, value):
    with pytest.raises(ConfigError, match="expected auto, nothing, old, or old:WEIGHT"):
        settings(tmp, keep=value)


@pytest.mark.parametrize(
    ("lists", "keep", "keeps"),
    [
        (["a", "photo"], "auto", True),
        (["a", "photo", "of", "the", "cat"], "auto", False),  # half of the captions say nothing new
        (None, "auto", False),
        (["a", "photo"], "nothing", False),
        (["a", "photo"], None, False),
    ],
)
def test_by_itself_it_keeps_the_old_where_new_words_carry_the_new(tmp, capsys, lists, keep, keeps):
    model = model_folder() if lists is None else listing_model(tmp, lists)
    run(settings(tmp, model=str(model), max_steps=2, keep=keep))
    assert any("old" in entry for entry in log_of(tmp / "run")) == keeps
    assert ("what it knew is kept meanwhile" in capsys.readouterr().out) == keeps


def test_keep_goes_with_what_changes_the_model(tmp):
    with pytest.raises(ConfigError, match="keep goes with lora and full"):
        settings(tmp, keep="old", method="textual_inversion", word="<x>")
    with pytest.raises(ConfigError, match="leave out keep"):
        settings(tmp, keep="old", method="full", zero_snr=True)
