"""Measure what fine-tuning does to the embedded model: new things and styles, preferences, and when to stop.

    python tools/measure_finetuning.py runs/measured
    python tools/measure_finetuning.py runs/measured --part concepts --until 00:50

The parts, in this order:
    concepts  each thing and style of make_concept.py, taught by one command with its defaults: the time, what is seen in
              images of held-out prompts before and after, and the change of the old tasks
    forgets   the first animal among them once more without `--keep`: are cats and the like still right?
    dpo       pairs of the weakest task (make_pairs.py), learned, and the change of every task
    stop      runs that never stop, from whose log it follows where `--stop auto` would have stopped, beside the score
              of every step that was measured

Every figure is a line of results.jsonl in the folder as soon as it is known, and is not measured again; tables.md holds
them as tables.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from concept_judge import load_concept_judge
from glyphs import Glyphs, fetch_glyphs, glyphs_option
from make_concept import CONCEPTS, write_concept
from score_concept import change, images_of, read_lines, references, share, sheet_of, shows

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.errors import LatentDiffError
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.prompts import TASKS, read_prompts
from latentdiff.evaluation.protocol import Outcome, Result, Score, score_prompts
from latentdiff.image import contact_sheet, open_image, save_png
from latentdiff.pipeline import Pipeline
from latentdiff.training.finetuning.config import FinetuneConfig
from latentdiff.training.finetuning.stopping import choose
from latentdiff.training.report.log import LOG, RunLog
from latentdiff.training.sheets import sample_folder

PARTS = ("concepts", "forgets", "dpo", "stop")
CATS = ("a cat", "a cat on a blue background", "two dogs on a red background", "a fox to the left of a guitar")

SEEDS = 3  # images of each held-out prompt
OLD_PROMPTS = 40  # of each old task
OLD_STEPS = 12  # of the sampler, for the old tasks: what changes is compared with the same steps before
PAIR_PROMPTS, DPO_STEPS = 64, 300
STOPPING = ("teapot", "sepia")
STOPPING_SEEDS = 5
STOPPING_STEPS, MEASURED_EVERY = 300, 50

_COMMAND = "from latentdiff.__main__ import main; main()"
# Measures, draws and saves all that `--stop auto` does, and goes on.
_NEVER_DONE = (
    f"from latentdiff.training.finetuning.finishing import Decision; Decision.is_done = lambda _: False; {_COMMAND}"
)


@dataclass
class Study:
    """The folder with what was measured, and with what it is measured.

    Attributes:
        ends: nothing new is begun after that time; None is never.
    """

    out: Path
    glyphs: Glyphs
    judge: Judge
    model: str | None
    ends: datetime | None

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    def found(self, part: str) -> dict[str, dict[str, Any]]:
        """What was measured of a part, by name."""
        lines = read_lines(self.results) if self.results.is_file() else []
        return {line["name"]: line for line in lines if line["part"] == part}

    def measure(self, part: str, name: str, how: Callable[[], dict[str, Any]]) -> None:
        """Add a line to the results, unless it is there or it is too late."""
        if name in self.found(part) or self.ends and datetime.now() >= self.ends:
            return
        begun = time.monotonic()
        line = {"part": part, "name": name, **how(), "all_seconds": round(time.monotonic() - begun, 1)}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{datetime.now():%H:%M:%S} {part} {name}: {line['all_seconds']} s", flush=True)

    @cached_property
    def before(self) -> Pipeline:
        return Pipeline.load(self.model)

    def after(self, lora: Path) -> Pipeline:
        pipe = Pipeline.load(self.model)
        pipe.load_lora(lora)
        return pipe

    @cached_property
    def old(self) -> Result:
        """The old tasks before any fine-tuning."""
        path = self.out / "before.json"
        if not path.is_file():
            outcomes = old_tasks(self.before).outcomes
            path.write_text(json.dumps([asdict(one) for one in outcomes]) + "\n", encoding="utf-8")
        rows = json.loads(path.read_text(encoding="utf-8"))
        return Result.of([Outcome(**{**row, "reasons": tuple(row["reasons"])}) for row in rows])

    def data(self, concept: str) -> Path:
        folder = self.out / "data" / concept.replace(" ", "-")
        if not (folder / "prompts.jsonl").is_file():
            write_concept(concept, folder, 0, self.glyphs)
        return folder

    def finetune(self, name: str, *options: str | Path, program: str = _COMMAND) -> tuple[Path, dict[str, Any]]:
        """Run the command; the folder of its run, and how it went."""
        run = self.out / "runs" / name
        command = ["finetune", *map(str, options), "--out", str(run)]
        command += ["--model", self.model] if self.model else []
        if (run / "checkpoints").is_dir():  # of a study that was stopped
            command = ["finetune", "--resume", str(run)]
        begun = time.monotonic()
        run_command([sys.executable, "-c", program, *command], self.out / f"{name}.log")
        log = RunLog.read(run / LOG)
        return run, {"seconds": round(time.monotonic() - begun, 1), "steps": log.steps, "kept": log.last("kept")}


def run_command(command: Sequence[str], log: Path) -> None:
    """Run a program with its words in a file.

    Raises:
        LatentDiffError: it failed.
    """
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise LatentDiffError(f"{' '.join(command)} failed; {log} says why")


def old_tasks(pipe: Pipeline, seeds: int = 1, tasks: Sequence[str] = tuple(TASKS)) -> Result:
    prompts = [prompt for prompt in read_prompts(limit=OLD_PROMPTS) if prompt.task in tasks]
    return score_prompts(pipe, prompts, seeds_per_prompt=seeds, steps=OLD_STEPS)


def concepts(study: Study) -> None:
    for concept in CONCEPTS:
        study.measure("concepts", concept, lambda concept=concept: taught(study, concept))


def taught(study: Study, concept: str) -> dict[str, Any]:
    data, rule = study.data(concept), shows(concept)
    prompts = [line["prompt"] for line in read_lines(data / "prompts.jsonl")]
    things = [{need["class"] for need in line["include"]} for line in read_lines(data / "prompts.jsonl")]
    run, how = study.finetune(data.name, "--data", data / "train")
    after = study.after(run / "lora.safetensors")
    settings = {"steps": 25, "guidance": None}
    old = images_of(study.before, prompts, 1, **settings)
    new = images_of(after, prompts, SEEDS, **settings)
    save_png(sheet_of(old, prompts), study.out / f"{data.name}-before.png", metadata=False)
    save_png(sheet_of(new[::SEEDS], prompts), study.out / f"{data.name}-after.png", metadata=False)
    cats(study, data.name, after)
    seen = study.judge(new)
    whole = [
        rule(verdict) and things[number // SEEDS] <= {thing.noun for thing in verdict.objects}
        for number, verdict in enumerate(seen)
    ]
    scores = references(study.judge, study.before, data, rule, study.glyphs)
    scores |= {"before": share(study.judge, old, rule), "after": Score.of(map(rule, seen))}
    scores |= {"after, with all its things": Score.of(whole), "old, before": study.old.mean}
    scores["old, change"] = change(study.old, old_tasks(after))
    return how | {"scores": {name: asdict(score) for name, score in scores.items()}}


def cats(study: Study, name: str, after: Pipeline) -> None:
    """A sheet of what the model knew: before above after."""
    images = [pipe(list(CATS), seed=[7] * len(CATS), progress=False) for pipe in (study.before, after)]
    titles = [f"{prompt}, {when}" for when in ("before", "after") for prompt in CATS]
    sheet = contact_sheet([*images[0], *images[1]], titles)
    save_png(sheet, study.out / f"{name}-cats.png", metadata=False)


def forgets(study: Study) -> None:
    """The same images without `--keep`."""
    study.measure("forgets", "raccoon", lambda: forgotten(study, "raccoon"))


def forgotten(study: Study, concept: str) -> dict[str, Any]:
    data = study.data(concept)
    run, how = study.finetune(f"{data.name}-unkept", "--data", data / "train", "--keep", "nothing")
    after = study.after(run / "lora.safetensors")
    cats(study, f"{data.name}-unkept", after)
    return how | {"scores": {"old, change": asdict(change(study.old, old_tasks(after)))}}


def dpo(study: Study) -> None:
    study.measure("dpo", "weakest", lambda: preferred(study))


def preferred(study: Study) -> dict[str, Any]:
    """Learn the weakest of the old tasks from pairs; the other tasks have fewer images."""
    weakest = min(study.old.tasks, key=lambda task: study.old.tasks[task].value)
    pairs = study.out / "pairs"
    tool = Path(__file__).with_name("make_pairs.py")
    options = ["--task", weakest, "--count", str(PAIR_PROMPTS), "--steps", "16"]
    begun = time.monotonic()
    run_command([sys.executable, str(tool), str(pairs), *options, *(["--model", study.model] if study.model else [])],
                study.out / "pairs.log")  # fmt: skip
    drawing = round(time.monotonic() - begun, 1)
    run, how = study.finetune(
        "dpo", "--loss", "dpo", "--data", pairs, "--validation-share", "0.1", "--max-steps", str(DPO_STEPS)
    )
    after, log = study.after(run / "lora.safetensors"), RunLog.read(run / LOG)
    mine = [old_tasks(pipe, 3, [weakest]) for pipe in (study.before, after)]
    others = old_tasks(after)
    changes = {task: change(study.old, others, [task]) for task in TASKS if task != weakest}
    scores = {"before": mine[0].mean, "after": mine[1].mean, weakest: change(*mine, [weakest]), **changes}
    scores["others"] = change(study.old, others, list(changes))
    about = {"task": weakest, "pairs": len(read_lines(pairs / "metadata.jsonl")), "pairs_seconds": drawing}
    about |= {"val_accuracy": log.last("val_accuracy")}
    return how | about | {"scores": {name: asdict(score) for name, score in scores.items()}}


def stop(study: Study) -> None:
    for seed in range(STOPPING_SEEDS):
        for concept in STOPPING:
            name = f"{concept}-{seed}"
            study.measure("stop", name, lambda concept=concept, seed=seed: stopped(study, concept, seed))


def stopped(study: Study, concept: str, seed: int) -> dict[str, Any]:
    """A run that is never stopped; where it would have been, and how good each measured step was."""
    data, rule = study.data(concept), shows(concept)
    prompts = [line["prompt"] for line in read_lines(data / "prompts.jsonl")]
    every = [
        word for name in ("validate", "checkpoint", "preview") for word in (f"--{name}-every", str(MEASURED_EVERY))
    ]
    drawn = [word for prompt in prompts for word in ("--prompts", prompt)]
    options = ["--seed", str(seed), "--stop", "auto", "--max-steps", str(STOPPING_STEPS)]
    options += ["--sample-steps", "12", *every, *drawn]
    run, how = study.finetune(f"stop-{data.name}-{seed}", "--data", data / "train", *options, program=_NEVER_DONE)
    log = RunLog.read(run / LOG)
    scores = {}
    for step in range(MEASURED_EVERY, STOPPING_STEPS + 1, MEASURED_EVERY):
        folder = sample_folder(run, step, "ema")
        images = [open_image(folder / f"{number:02d}.png").convert("RGB") for number in range(len(prompts))]
        scores[step] = share(study.judge, images, rule).value
    step, at, why = decided(log)
    return how | {
        "scores": scores,
        "chosen": step,
        "stopped_at": at,
        "why": why,
        "gap": max(scores.values()) - scores[step],
    }


def decided(log: RunLog) -> tuple[int, int, str]:
    """The step that `--stop auto` chooses, when it does so, and why, by what the log said up to then."""
    settings = FinetuneConfig()
    steps = [step for step, _ in log["kept"] if step]
    for step in steps:
        upto = RunLog({name: [point for point in points if point[0] <= step] for name, points in log.values.items()})
        found = choose(upto, patience=settings.patience, least_kept=settings.least_kept)
        if found.ended or step == steps[-1]:
            return found.step or step, step, found.why
    raise LatentDiffError("expected measurements in the log, found none")


def tables(study: Study) -> str:
    """What was found, as Markdown."""
    lines = [
        "| concept | minutes | before | after | with all its things | old, change | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in ("concepts", "forgets"):
        for name, row in study.found(part).items():
            cells = [_cell(row, key) for key in ("before", "after", "after, with all its things", "old, change")]
            title = name if part == "concepts" else f"{name}, nothing kept"
            lines.append(f"| {title} | {row['seconds'] / 60:.1f} | {' | '.join(cells)} | {row['kept']:.3f} |")
    for row in study.found("dpo").values():
        lines += ["", f"DPO on {row['task']}, {row['pairs']} pairs:", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(row, name)} |" for name in row["scores"]]
    if runs := study.found("stop"):
        lines += ["", "| run | scores by step | chosen | stopped at | below the best |", "|---|---|---|---|---|"]
        for name, row in runs.items():
            scores = ", ".join(f"{step}: {score:.2f}" for step, score in row["scores"].items())
            lines.append(f"| {name} | {scores} | {row['chosen']} | {row['stopped_at']} | {row['gap']:.3f} |")
        lines.append(f"| mean | | | | {fmean(row['gap'] for row in runs.values()):.3f} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str) -> str:
    score = row["scores"].get(name)
    return f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f}, n = {score['images']})" if score else ""


def _time(text: str | None) -> datetime | None:
    """The next moment at which a clock shows HH:MM."""
    if text is None:
        return None
    now = datetime.now()
    at = datetime.combine(now.date(), datetime.strptime(text, "%H:%M").time())
    return at if at > now else at + timedelta(days=1)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="May be repeated.  [default: all]")
@click.option("--model", help="As `latentdiff generate` takes it.  [default: the embedded one]")
@click.option("--judge", "judge_folder", type=click.Path(path_type=Path), default=Path("data/concept-judge"), show_default=True,
              help="Folder of the judge; it is trained there if there is none.")  # fmt: skip
@click.option("--until", metavar="HH:MM", help="Begin nothing new after that time.")
@glyphs_option
def main(
    out: Path, parts: tuple[str, ...], model: str | None, judge_folder: Path, until: str | None, glyphs: Path | None
) -> None:
    try:
        source = Glyphs(glyphs or fetch_glyphs(Path("data")))
        judge = load_concept_judge(judge_folder, Judge.load(embedded_judge()), source)
        out.mkdir(parents=True, exist_ok=True)
        study = Study(out, source, judge, model, _time(until))
        for part in parts or PARTS:
            {"concepts": concepts, "forgets": forgets, "dpo": dpo, "stop": stop}[part](study)
            (out / "tables.md").write_text(tables(study) + "\n", encoding="utf-8")
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")
    print(tables(study))


if __name__ == "__main__":
    main()
