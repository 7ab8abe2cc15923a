"""Whole runs of a tiny model: results, resuming, and what must not change the numbers."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from latentdiff import Pipeline, finetune
from latentdiff.adapters.lora.metadata import learned_words
from latentdiff.cli import cli
from latentdiff.cli import run as run_command
from latentdiff.errors import (
    ConfigError,
    DataError,
    LatentDiffError,
    MissingDependencyError,
    NotFiniteError,
    UsageError,
)
from latentdiff.prompts.words import KINDS, Words, as_json, read_words
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.data.tokens import CaptionTokens
from latentdiff.training.finetuning.finetune import resolve, run
from latentdiff.training.finetuning.streaming import shards_to_stream
from latentdiff.training.loop import TrainingStopped
from tests import peers
from tests.training.finetuning.build import captioned_folder, log_of, model_folder, settings, state_of

ROOT = Path(__file__).parents[3]
LIBRARIES = {"prodigy": "prodigyopt", "lion": "lion_pytorch", "schedulefree": "schedulefree"}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_lora_learns_and_its_file_changes_images(tmp):
    targets = ["attention", "convolutions"]
    result = run(
        settings(
            tmp, max_steps=60, rank=8, targets=targets, validation_share=0.2, validate_every=60, checkpoint_every=60
        )
    )
    losses = [entry["train_mse"] for entry in log_of(tmp / "run") if "train_mse" in entry]
    assert len(losses) == 2 and losses[1] < 0.9 * losses[0]
    pipe = Pipeline.load(model_folder(), device="cpu")
    before = pipe("cat", seed=0, steps=2, output="latents", progress=False)
    pipe.load_lora(result)
    after = pipe("cat", seed=0, steps=2, output="latents", progress=False)
    assert (after - before).abs().max() > 1e-2


def test_full_writes_a_model_with_the_averaged_weights(tmp):
    result = run(settings(tmp, method="full", ema_decay=0.5, result_precision="fp16"))
    assert result == tmp / "run" / "model"
    pipe, state = Pipeline.load(result, device="cpu", precision="fp16"), state_of(tmp / "run")
    assert torch.equal(pipe.unet.conv_out.weight, state["ema unet.conv_out.weight"].half())
    start = Pipeline.load(model_folder(), device="cpu", precision="fp16")
    assert not torch.equal(pipe.unet.conv_out.weight, start.unet.conv_out.weight)
    for name, tensor in start.text_encoder.state_dict().items():
        assert torch.equal(tensor, pipe.text_encoder.state_dict()[name])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_result_says_which_words_it_learned(tmp, method):
    model = shutil.copytree(model_folder(), tmp / "knowing")
    known = Words({kind: () for kind in KINDS}, frozenset(("cat", "a")), 16)
    (model / "words.json").write_text(json.dumps(as_json(known)))
    result = run(settings(tmp, method=method, model=str(model), max_steps=1))
    learned = {"photo", "of", "the", "dog"}
    if method == "lora":
        with safe_open(result, "pt") as file:
            assert set(learned_words(file.metadata())) == learned
    else:
        assert read_words(result) == Words(known.kinds, known.all | learned, 16)


def test_the_text_encoder_is_trained_if_asked_for(tmp):
    run(settings(tmp, method="full", train_text_encoder=True, text_encoder_lr=1e-3))
    assert any(name.startswith("text_encoder.") for name in state_of(tmp / "run"))
    assert {"grad_norm_unet", "grad_norm_text_encoder"} <= log_of(tmp / "run")[1].keys()
    assert not list((tmp / "run" / "cache").glob("text-*"))


@pytest.mark.parametrize(
    "method, optimizer, more",
    [
        ("lora", "adamw", {}),
        ("full", "adamw", {}),
        ("lora", "muon", {}),
        ("lora", "prodigy", {}),
        ("lora", "adafactor", {}),
        ("full", "adafactor", {"relative_step": True}),
        ("lora", "lion", {"lr": 1e-3}),
        ("lora", "schedulefree", {"validation_share": 0.3, "validate_every": 2, "result": "best"}),
    ],
)
def test_stopped_and_resumed_equals_unbroken(tmp, method, optimizer, more):
    if optimizer in LIBRARIES:
        pytest.importorskip(LIBRARIES[optimizer])
    for name, steps in (("whole", 6), ("parts", 3)):
        run(settings(tmp, method=method, optimizer=optimizer, out=tmp / name, max_steps=steps, **more))
    (tmp / "parts" / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    run(resolve(tmp / "parts", None, {"max_steps": 6}))
    assert_same(state_of(tmp / "parts"), state_of(tmp / "whole"))
    for last in (-2, -1):  # the loss, and what was kept of the old
        seen = [{**log_of(tmp / name)[last], "images_per_second": 0, "peak_memory_mb": 0} for name in ("parts", "whole")]
        assert seen[0] == seen[1]


def test_resuming_says_what_it_skips(tmp, capsys):
    run(settings(tmp, max_steps=4))
    (tmp / "run" / "checkpoints" / "step-00000004" / "ema.safetensors").write_bytes(b"")
    finetune(resume=tmp / "run")
    out = capsys.readouterr().out
    assert "skipped a checkpoint that is not whole" in out and "resumed" in out and "step-00000002" in out


def test_a_signal_saves_first(tmp, monkeypatch):
    from latentdiff.training.journal import Journal

    write = Journal.write

    def interrupt(self, entry):
        write(self, entry)
        if entry["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "write", interrupt)
    with pytest.raises(TrainingStopped, match=r"go on with: latentdiff finetune --resume .*/run"):
        run(settings(tmp))
    monkeypatch.undo()
    finetune(resume=tmp / "run")
    run(settings(tmp, out=tmp / "whole"))
    assert_same(state_of(tmp / "run"), state_of(tmp / "whole"))


def test_a_refused_change_leaves_the_configuration_as_it_was(tmp):
    run(settings(tmp))
    before = (tmp / "run" / "config.yaml").read_text()
    with pytest.raises(LatentDiffError, match="this configuration needs"):
        finetune(resume=tmp / "run", rank=4, max_steps=8)
    assert (tmp / "run" / "config.yaml").read_text() == before
    finetune(resume=tmp / "run", max_steps=8, verify_resume=2)
    assert "max_steps: 8" in (tmp / "run" / "config.yaml").read_text()


def test_accumulation_equals_the_large_batch(tmp):
    run(settings(tmp, out=tmp / "large"))
    run(settings(tmp, out=tmp / "micro", accumulation=4))
    assert_same(state_of(tmp / "micro"), state_of(tmp / "large"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing(tmp, method):
    run(settings(tmp, method=method, out=tmp / "plain"))
    run(settings(tmp, method=method, out=tmp / "checkpointed", gradient_checkpointing=True))
    assert_same(state_of(tmp / "checkpointed"), state_of(tmp / "plain"))


def test_caches_change_nothing(tmp):
    run(settings(tmp, out=tmp / "cached", cache_precision="fp32"))
    run(settings(tmp, out=tmp / "bare", cache_latents=False, cache_text=False))
    assert list((tmp / "cached" / "cache").glob("*/*.safetensors")) and not (tmp / "bare" / "cache").exists()
    assert_same(state_of(tmp / "bare"), state_of(tmp / "cached"), rtol=1e-3, atol=1e-5)


def test_random_crops_flips_and_long_captions_train_without_caches_that_would_be_wrong(tmp):
    Image.fromarray(np.zeros((40, 24, 3), np.uint8)).save(tmp / "data" / "0.png")
    line = json.dumps({"file_name": "0.png", "text": "cat " * 40})
    (tmp / "data" / "metadata.jsonl").write_text(line + "\n")
    run(settings(tmp, crop="random", flip=True, long_captions="chunk", bucket_step=4, max_steps=2))
    assert not (tmp / "run" / "cache").exists()
    assert json.loads((tmp / "run" / "data.json").read_text())["buckets"] == {"12x20": 1}


def test_the_last_of_300_tokens_is_trained_and_drawn(tmp):
    """In chunks; what is cut at the first chunk makes no difference."""

    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp / "data" / "0.png")

    def trained(last: str, way: str):
        line = json.dumps({"file_name": "0.png", "text": "cat " * 299 + last})
        (tmp / "data" / "metadata.jsonl").write_text(line + "\n")
        for old in (tmp / "run", tmp / "cache"):
            shutil.rmtree(old, ignore_errors=True)
        run(settings(tmp, model=str(peers.folder("sd1")), long_captions=way, batch_size=1, max_steps=1))
        return state_of(tmp / "run")

    chunked = trained("dog", "chunk")
    assert not all(torch.equal(tensor, chunked[name]) for name, tensor in trained("fox", "chunk").items())
    cut = trained("dog", "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in trained("fox", "cut").items())
    pipe = peers.ours("sd1")
    options = {"steps": 1, "seed": 1, "progress": False, "output": "latents"}
    drawn = [pipe("cat " * 299 + last, **options) for last in ("dog", "fox")]
    assert not torch.equal(*drawn)


def test_validation_and_samples_are_written(tmp):
    result = run(
        settings(
            tmp, validation_share=0.2, validate_every=3, preview_every=6, sample_count=2, sample_steps=2, max_steps=6
        )
    )
    assert result.is_file()
    measured = [entry for entry in log_of(tmp / "run") if "val_mse" in entry]
    assert [entry["step"] for entry in measured] == [0, 3, 6]
    assert {"val_0_199", "train_mse", "gap"} <= measured[0].keys()
    sheets = sorted(path.relative_to(tmp / "run") for path in (tmp / "run").rglob("sheet.png"))
    assert [str(path) for path in sheets] == [
        "samples/step-00000006/ema/sheet.png",
        "samples/step-00000006/raw/sheet.png",
    ]
    assert "latentdiff" in Image.open(tmp / "run" / "samples" / "step-00000006" / "ema" / "00.png").info
    count = json.loads((tmp / "run" / "data.json").read_text())["images"]
    assert f"Compared with all {count} training images" in (tmp / "run" / "report.html").read_text()


def shards_of(tmp, count, per_shard):
    folder = tmp / "shards"
    folder.mkdir()
    for number in range(count):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for place in range(per_shard):
                name = f"{place % 10}.png"
                tar.add(tmp / "data" / name, f"{number:03d}{place:03d}.png")
                text = f"a photo of the {'cat' if place % 2 else 'dog'}".encode()
                about = tarfile.TarInfo(f"{number:03d}{place:03d}.txt")
                about.size = len(text)
                tar.addfile(about, io.BytesIO(text))
    return folder


def test_prefixes_and_tags_change_captions_and_caches(tmp, monkeypatch):
    seen = []
    tokenize = CaptionTokens._tokenize
    monkeypatch.setattr(CaptionTokens, "_tokenize", lambda self, caption: seen.append(caption) or tokenize(self, caption))
    asked = ["a house"]  # what is measured of the model is not prefixed
    run(settings(tmp, data={"path": str(tmp / "data"), "prefix": "red dog,"}, max_steps=1, old_prompts=asked))
    assert {caption for caption in seen if not caption.startswith("red dog, ")} == {"", *asked}
    assert (tmp / "run" / "cache").is_dir()
    with pytest.raises(ConfigError, match="keep_tags goes with shuffle_tags or tag_dropout"):
        settings(tmp, keep_tags=1)
    with pytest.raises(UsageError, match="no repeats and no weight"):
        shards_to_stream(settings(tmp, data=_shard(tmp) + ":2", stream=True))


def _shard(tmp):
    tarfile.open(tmp / "a.tar", "w").close()
    return str(tmp / "a.tar")


def test_a_stream_trains_and_goes_on_where_it_was(tmp):
    pytest.importorskip("webdataset")
    stream = {"data": str(shards_of(tmp, 3, 12)), "stream": True, "validation": str(tmp / "data"), "validate_every": 6}
    for name, steps in (("whole", 6), ("parts", 2), ("parts", 6)):
        run(settings(tmp, out=tmp / name, max_steps=steps, accumulation=2, **stream))
    assert_same(state_of(tmp / "parts"), state_of(tmp / "whole"))
    assert [entry["loss"] for entry in log_of(tmp / "parts") if "loss" in entry] == [
        entry["loss"] for entry in log_of(tmp / "whole") if "loss" in entry
    ]
    assert json.loads((tmp / "whole" / "data.json").read_text())["shards"] == 3
    with pytest.raises(UsageError, match="stream reads one folder or range of WebDataset tar files"):
        run(settings(tmp, stream=True, out=tmp / "folder"))


def test_an_optimizer_that_is_not_installed_is_named(tmp, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        MissingDependencyError, match=r"adamw8bit needs bitsandbytes: pip install 'latentdiff\[optimizers\]'"
    ):
        run(settings(tmp, optimizer="adamw8bit"))


def test_the_best_step_is_kept_and_can_be_the_result(tmp, monkeypatch, capsys):
    from latentdiff.training.denoising import DenoisingTask

    values = iter([3.0, 1.0, 2.0, 5.0, 4.0])
    monkeypatch.setattr(DenoisingTask, "validate", lambda self: {"val_mse": next(values)})
    run(
        settings(
            tmp, method="full", max_steps=8, validate_every=2, keep_checkpoints=1, validation_share=0.2, result="best"
        )
    )
    kept = sorted(path.name for path in (tmp / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000008"]
    assert "the result is that of step 2" in capsys.readouterr().out
    average = load_checkpoint(tmp / "run" / "checkpoints" / kept[0]).ema["unet.conv_out.weight"]
    assert torch.equal(Pipeline.load(tmp / "run" / "model", device="cpu").unet.conv_out.weight, average)


def test_running_out_of_memory_says_what_helps(tmp, monkeypatch):
    from latentdiff.training.loss import DenoisingLoss

    def full(self, batch, step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DenoisingLoss, "forward", full)
    with pytest.raises(LatentDiffError, match="not enough memory for this training; try --gradient-checkpointing"):
        run(settings(tmp))


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_a_lora_on_a_half_precision_model(tmp, mixed):
    path = run(
        settings(tmp, base_precision="bf16", mixed_precision=mixed, max_steps=2, targets=["attention", "text_encoder"])
    )
    state = state_of(tmp / "run")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state.values())
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_a_held_out_folder_and_repeats(tmp):
    captioned_folder(tmp / "held-out", 3, seed=1)
    captioned_folder(tmp / "more", 2, seed=2)
    data = [{"path": str(tmp / "data"), "repeats": 1}, {"path": str(tmp / "more"), "repeats": 5}]
    run(settings(tmp, data=data, validation=str(tmp / "held-out"), validate_every=6))
    summary = json.loads((tmp / "run" / "data.json").read_text())
    assert (summary["images"], summary["held_out"]) == (12, 3)


def test_no_averages_if_the_decay_is_zero(tmp):
    run(settings(tmp, ema_decay=0.0, max_steps=2))
    assert not any(name.startswith("ema ") for name in state_of(tmp / "run"))


def test_a_loss_that_is_not_finite_stops_with_step_and_files(tmp, monkeypatch):
    from latentdiff.training.samples import Batches

    arrays = Batches.arrays

    def poisoned(self, step, rows):
        made = arrays(self, step, rows)
        return {**made, "noise": made["noise"] * np.nan} if step == 4 else made

    monkeypatch.setattr(Batches, "arrays", poisoned)
    with pytest.raises(
        NotFiniteError, match=r"step 4 is not finite; its batch of 4 begins with \d\.png.*step-00000004 is from"
    ):
        run(settings(tmp))
    assert all(value.isfinite().all() for value in state_of(tmp / "run").values())


def test_the_command(tmp, monkeypatch, capfd):
    command = (
        f"finetune --data {tmp / 'data'} --model {model_folder()} --out {tmp / 'run'} --rank 2 --max-steps 2 --batch-size 4"
        f" --betas 0.8 0.9 --no-buckets --sample-count 0 --min-snr-gamma none --device cpu"
    )
    result = CliRunner().invoke(cli, command.split(), catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == str(tmp / "run" / "lora.safetensors")
    assert f"how it went: {tmp / 'run' / 'report.html'}" in result.stderr
    command_of_use = f"'a photo of the dog' --model {model_folder()} --lora {tmp / 'run' / 'lora.safetensors'}"
    assert f"use it: latentdiff generate {command_of_use}" in result.stderr.replace("the cat", "the dog")
    assert "learned: nothing was held out" in result.stderr
    page = unescape((tmp / "run" / "report.html").read_text())
    assert command_of_use in page.replace("the cat", "the dog")
    saved = (tmp / "run" / "config.yaml").read_text()
    assert (
        "min_snr_gamma: null" in saved
        and "buckets: false" in saved
        and "- 0.8" in saved
        and "mixed_precision: 'no'" in saved
    )
    assert run_command(command.split()) == 2
    assert re.search(r"error: .*run holds a run already; go on with --resume", capfd.readouterr().err)


def test_ctrl_c_before_the_first_step_is_no_error_and_says_how_to_go_on(tmp, monkeypatch, capfd):
    def stopped(self):
        raise KeyboardInterrupt

    out = tmp / "my run"
    command = f"finetune --data {tmp / 'data'} --model {model_folder()} --rank 2 --max-steps 2 --sample-count 0 --device cpu"
    with monkeypatch.context() as patch:
        patch.setattr("latentdiff.training.finetuning.preparation.Preparation.build_caches", stopped)
        assert run_command([*command.split(), "--out", str(out)]) == 130
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said == f"interrupted; go on with: latentdiff finetune --resume '{out}'"
    assert run_command(["finetune", "--resume", str(out)]) == 0 and (out / "lora.safetensors").is_file()


def empty_folder(tmp):
    (tmp / "bad").mkdir()


def no_captions(tmp):
    captioned_folder(tmp / "bad", 3)
    (tmp / "bad" / "metadata.jsonl").unlink()


def captions_without_images(tmp):
    (tmp / "bad").mkdir()
    (tmp / "bad" / "0.txt").write_text("a cat")


def only_tiny_images(tmp):
    (tmp / "bad").mkdir()
    Image.new("RGB", (1, 1)).save(tmp / "bad" / "0.png")
    (tmp / "bad" / "0.txt").write_text("a cat")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (empty_folder, "no images in"),
        (no_captions, "no captions in"),
        (captions_without_images, "no images in"),
        (only_tiny_images, "all 1 images are smaller than the smallest bucket"),
    ],
)
def test_bad_data_is_one_line(tmp, prepare, message, capfd):
    prepare(tmp)
    assert (
        run_command(["finetune", "--data", str(tmp / "bad"), "--model", str(model_folder()), "--out", str(tmp / "run")])
        == 1
    )
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_damaged_and_odd_images_are_named_and_left_out(tmp, capsys):
    lines = (tmp / "data" / "metadata.jsonl").read_text().splitlines()
    (tmp / "data" / "0.png").write_bytes(b"")
    (tmp / "data" / "1.png").write_text("this is no image")
    Image.new("RGB", (1, 1)).save(tmp / "data" / "2.png")
    Image.new("RGB", (4000, 20)).save(tmp / "data" / "3.png")
    lines[4] = json.dumps({"file_name": "4.png", "text": "cat " * 5000})
    (tmp / "data" / "metadata.jsonl").write_text("\n".join(lines))
    run(settings(tmp, max_steps=2))
    summary = json.loads((tmp / "run" / "data.json").read_text())
    assert (summary["images"], summary["too_small"], summary["captions_cut"], len(summary["unreadable"])) == (
        7,
        1,
        1,
        2,
    )
    said = capsys.readouterr().out
    assert "2 cannot be read and are left out, the first is 0.png" in said and "1 of 7 captions are too long" in said
    with pytest.raises(DataError, match=r"2 images cannot be used, the first is 0\.png"):
        run(settings(tmp, strict=True, out=tmp / "strict"))


def test_unwritable_run_folder(tmp):
    (tmp / "run").write_text("a file")
    with pytest.raises(DataError, match="cannot write to the run folder .*choose another with --out"):
        run(settings(tmp))


def test_a_full_disk_is_said_before_training(tmp, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match="free some space"):
        run(settings(tmp, cache_latents=False, cache_text=False))
    assert newest_checkpoint(tmp / "run" / "checkpoints") == (None, [])


def test_resume_needs_a_run(tmp):
    with pytest.raises(UsageError, match="expected a run to resume in .*, found no config.yaml there"):
        finetune(resume=tmp / "nothing")
    with pytest.raises(UsageError, match="without --config"):
        finetune(resume=tmp, config=tmp / "x.yaml")


@pytest.mark.slow
def test_a_stream_of_200_000_samples_trains_in_flat_memory(tmp):
    """As much memory as 200 samples need; the images that are shuffled together are a few bytes each here."""
    pytest.importorskip("webdataset")
    small = shards_of(tmp, 1, 200)
    large = tmp / "large"
    large.mkdir()
    content = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(content, "PNG")
    for shard in range(100):
        with tarfile.open(large / f"{shard:03d}.tar", "w") as tar:
            for sample in range(2000):
                for suffix, data in (("png", content.getvalue()), ("txt", b"a photo of the cat")):
                    about = tarfile.TarInfo(f"{shard:03d}{sample:04d}.{suffix}")
                    about.size = len(data)
                    tar.addfile(about, io.BytesIO(data))
    peaks = {}
    for folder in (small, large):
        options = ["--stream", "--max-steps", "60", "--batch-size", "32", "--log-every", "20"]
        command = command_of(tmp, tmp / folder.name / "run", *options)
        command["args"][command["args"].index("--data") + 1] = str(folder)
        subprocess.run(**command, check=True, capture_output=True)
        peaks[folder.name] = [entry["peak_memory_mb"] for entry in log_of(tmp / folder.name / "run") if "loss" in entry]
    assert max(peaks["large"]) < 1.15 * max(peaks["shards"]), peaks


def command_of(tmp, out, *more, launcher=(sys.executable, "-m")):
    options = (
        f"--data {tmp / 'data'} --model {model_folder()} --out {out} --rank 2 --lr 1e-2 --batch-size 4 --sample-count 0"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return {"args": [*launcher, "latentdiff", "finetune", *options.split(), *more], "env": environment}


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(3))
def test_killed_at_a_random_step_and_resumed_equals_unbroken(tmp, trial):
    """SIGKILL: no handler runs, files may be half written. Bit for bit, moments and averages included."""
    steps = (
        "--max-steps",
        "60",
        "--checkpoint-every",
        "4",
        "--log-every",
        "1",
        *(("--method", "full") if trial == 2 else ()),
    )
    subprocess.run(**command_of(tmp, tmp / "whole", *steps), check=True, capture_output=True)
    process = subprocess.Popen(
        **command_of(tmp, tmp / "parts", *steps), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log, target = tmp / "parts" / "log.jsonl", int(np.random.default_rng().integers(5, 50))
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= target):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"finished before step {target}"
    resumed = command_of(tmp, tmp / "parts")
    resumed["args"] = [sys.executable, "-m", "latentdiff", "finetune", "--resume", str(tmp / "parts")]
    subprocess.run(**resumed, check=True, capture_output=True)
    assert_same(state_of(tmp / "parts"), state_of(tmp / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_equal_one(tmp, method):
    """Half the batch each, gradients averaged: the same up to the order of sums."""
    steps = ("--max-steps", "5", "--method", method, "--lr", "1e-3")
    subprocess.run(**command_of(tmp, tmp / "one", *steps), check=True, capture_output=True)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    done = subprocess.run(**command_of(tmp, tmp / "two", *steps, launcher=torchrun), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = state_of(tmp / "one"), state_of(tmp / "two")
    for name in first:
        if not name.endswith(("exp_avg", "exp_avg_sq")):
            torch.testing.assert_close(
                second[name], first[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--train-text-encoder", "--accumulation", "2", "--ema-decay", "0")])
def test_two_processes_that_split_the_model_equal_one(tmp, more):
    """FSDP: weights, averages and moments in the checkpoint, validation losses, the result; and resumed."""
    steps = (
        "--method",
        "full",
        "--lr",
        "1e-3",
        "--grad-clip",
        "0.05",
        "--validation-share",
        "0.3",
        "--validate-every",
        "2",
        *more,
    )
    subprocess.run(**command_of(tmp, tmp / "one", "--max-steps", "4", *steps), check=True, capture_output=True)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    split = command_of(tmp, tmp / "two", "--max-steps", "4", *steps, launcher=torchrun)
    split["env"] = {**split["env"], "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    done = subprocess.run(**split, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "split over 2 processes" in done.stdout
    first, second = state_of(tmp / "one"), state_of(tmp / "two")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    results = [
        load_file(tmp / run / "model" / "unet" / "diffusion_pytorch_model.safetensors") for run in ("one", "two")
    ]
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=2e-3, atol=2e-4)
    losses = [[entry["val_mse"] for entry in log_of(tmp / run) if "val_mse" in entry] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    split["args"] = [*torchrun, "latentdiff", "finetune", "--resume", str(tmp / "two"), "--max-steps", "6"]
    done = subprocess.run(**split, capture_output=True, text=True)
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr[-2000:]
    subprocess.run(**command_of(tmp, tmp / "whole", "--max-steps", "6", *steps), check=True, capture_output=True)
    whole, resumed = state_of(tmp / "whole"), state_of(tmp / "two")
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=5e-3, atol=5e-4, msg=lambda m, n=name: f"{n}: {m}")
