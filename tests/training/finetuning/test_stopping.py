"""Which step is chosen and when a run stops, from logs made up for it and in a run."""

import json

import pytest
import torch
from PIL import Image

from latentdiff.errors import ConfigError
from latentdiff.training.finetuning.finetune import run
from latentdiff.training.finetuning.stopping import choose, relative_losses
from latentdiff.training.loop import Trainer
from latentdiff.training.report.log import RunLog
from latentdiff.training.report.memorization import count_copies
from tests.training.finetuning.build import captioned_folder, settings, state_of


def log(losses, kept=(), copies=()):
    """A log with two bands, the second ten times the first, measured every 10 steps."""
    values = {"val_0_499": [], "val_500_999": [], "val_mse": [], "kept": [], "copies": []}
    for place, loss in enumerate(losses):
        values["val_0_499"].append((10 * place, loss))
        values["val_500_999"].append((10 * place, 10 * loss))
        values["val_mse"].append((10 * place, 5.5 * loss))
    values["kept"] = [(10 * place, share) for place, share in enumerate(kept)]
    values["copies"] = [(10 * (place + 1), count) for place, count in enumerate(copies)]
    return RunLog(values)


def decided(*args, patience=2, least_kept=0.8):
    return choose(log(*args), patience=patience, least_kept=least_kept)


def test_each_band_counts_as_a_share_of_its_own():
    values = {"val_0_499": [(0, 1.0), (10, 0.5)], "val_500_999": [(0, 100.0), (10, 110.0)]}
    assert relative_losses(RunLog(values)) == {0: 1.0, 10: pytest.approx((0.5 + 1.1) / 2)}


@pytest.mark.parametrize(
    "found, step, ended, why",
    [
        (([],), None, False, "nothing"),
        (([1.0],), None, False, "nothing"),  # the start model is no result
        (([1.0, 0.9, 0.8],), 20, False, "lowest"),
        (([1.0, 0.9, 0.95],), 10, False, "lowest"),
        (
            ([1.0, 0.9, 0.95, 0.96],),
            10,
            True,
            "2 measurements did not better its held-out loss, which has risen since at",
        ),
        (([1.0, 0.9, 0.8999, 0.8998],), 10, True, "stands still"),  # less than a thousandth is no progress
        (([1.0, 0.9, 0.8, 0.7], [1, 1, 0.9, 0.7]), 20, False, "lowest"),  # once may be chance
        (([1.0, 0.9, 0.8, 0.7, 0.6], [1, 1, 0.9, 0.7, 0.7]), 20, True, "less than 0.8 of the old"),
        (([1.0, 0.9, 0.8], [1, 0.5, 0.4]), 10, True, "less than 0.8 of the old"),  # nothing keeps enough: the first
        (([1.0, 0.9, 0.8, 0.7], [], [0, 0, 1]), 20, True, "samples of step 30 are copies"),
        (([1.0, 0.9, float("nan")],), 10, False, "lowest"),
    ],
)
def test_what_the_log_says(found, step, ended, why):
    choice = decided(*found)
    assert (choice.step, choice.ended) == (step, ended) and why in choice.why


@pytest.fixture
def tmp(tmp_path):
    captioned_folder(tmp_path / "data", 10)
    return tmp_path


LOSSES = {0: 1.0, 2: 0.8, 4: 0.7, 6: 0.75, 8: 0.76, 10: 0.1, 12: 0.1}


def test_a_run_stops_with_the_weights_of_its_best_step_however_it_came_there(tmp, monkeypatch, capsys):
    monkeypatch.setattr(
        Trainer, "validate", lambda self: {"val_0_999": LOSSES[self.step], "val_mse": LOSSES[self.step]}
    )
    auto = {"stop": "auto", "patience": 2, "validate_every": 2, "max_steps": 12, "keep_checkpoints": 1}
    run(settings(tmp, out=tmp / "whole", **auto))
    out = capsys.readouterr().out
    assert "stopped at step 8 of 12: 2 measurements did not better its held-out loss" in out
    assert "the result is that of step 4, the chosen one" in out
    kept = sorted(path.name for path in (tmp / "whole" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008"]
    assert json.loads((tmp / "whole" / "result.json").read_text())["step"] == 4
    assert "is the result; the run stopped at step 8" in (tmp / "whole" / "report.html").read_text()

    def killed(self):
        if self.step == 6:
            raise KeyboardInterrupt
        return {"val_0_999": LOSSES[self.step], "val_mse": LOSSES[self.step]}

    monkeypatch.setattr(Trainer, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp, out=tmp / "parts", **auto))
    monkeypatch.setattr(
        Trainer, "validate", lambda self: {"val_0_999": LOSSES[self.step], "val_mse": LOSSES[self.step]}
    )
    for _ in range(2):  # the second time there is nothing left to do
        run(settings(tmp, out=tmp / "parts", **auto))
        parts, whole = state_of(tmp / "parts"), state_of(tmp / "whole")
        assert all(torch.equal(value, parts[name]) for name, value in whole.items())
        about = [json.loads((tmp / name / "result.json").read_text()) for name in ("parts", "whole")]
        assert all(about[0][key] == about[1][key] for key in ("step", "why"))
        assert (tmp / "parts" / "lora.safetensors").stat().st_size == (
            tmp / "whole" / "lora.safetensors"
        ).stat().st_size


def test_samples_that_copy_end_a_run(tmp, monkeypatch):
    image = Image.open(tmp / "data" / "0.png").convert("RGB")

    def draw(self, step, weights):
        place = self._folder / "samples" / f"step-{step:08d}" / weights / "00.png"
        place.parent.mkdir(parents=True)
        (image if step >= 4 else Image.effect_noise((16, 16), 80).convert("RGB")).save(place)
        self.written = [place]

    monkeypatch.setattr("latentdiff.training.sheets.SampleSheets.write", draw)
    every = {"validate_every": 2, "preview_every": 2, "max_steps": 8, "least_kept": 0.0}
    run(settings(tmp, stop="auto", **every))
    result = json.loads((tmp / "run" / "result.json").read_text())
    assert result["step"] == 2 and "samples of step 4 are copies" in result["why"]


def test_copies_are_counted(tmp):
    paths = [tmp / "copy.png", tmp / "noise.png"]
    Image.open(tmp / "data" / "3.png").convert("RGB").save(paths[0])
    Image.effect_noise((16, 16), 80).convert("RGB").save(paths[1])
    images = [Image.open(tmp / "data" / f"{number}.png").convert("RGB") for number in range(10)]
    assert count_copies(paths, images.__getitem__, range(10)) == 1


def test_what_stop_auto_needs(tmp):
    assert settings(tmp, stop="auto").validation_share == 0.1
    assert settings(tmp, stop="auto", validation=str(tmp / "data")).validation_share == 0.0
    with pytest.raises(ConfigError, match="stop auto decides by held-out images"):
        settings(tmp, stop="auto", stream=True)
    with pytest.raises(ConfigError, match="multiple of checkpoint_every 4, found 6"):
        settings(tmp, stop="auto", validate_every=6, checkpoint_every=4)
