"""How well pictures show what the prompts say: GenEval's protocol (Ghosh et al. 2023) on scenes.

`evaluate` scores anything that is called like a Pipeline; `run` does all that `latentdiff evaluate` does.
"""

from __future__ import annotations

from latentdiff.evaluation.judge import Judge, Seen, Verdict
from latentdiff.evaluation.prompts import TASKS, EvaluationPrompt, Requirement, read_prompts
from latentdiff.evaluation.protocol import Outcome, Result, Score, evaluate
from latentdiff.evaluation.report import Report
from latentdiff.evaluation.run import run

__all__ = [
    "TASKS",
    "EvaluationPrompt",
    "Judge",
    "Outcome",
    "Report",
    "Requirement",
    "Result",
    "Score",
    "Seen",
    "Verdict",
    "evaluate",
    "read_prompts",
    "run",
]
