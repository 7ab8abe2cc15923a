"""How well images show what the prompts say: GenEval's protocol (Ghosh et al. 2023) on scenes.

`score_prompts` scores anything that is called like a Pipeline; `evaluate` does all that `latentdiff evaluate` does.
"""

from __future__ import annotations

from latentdiff.evaluation.judge import Judge, Seen, Verdict
from latentdiff.evaluation.prompts import TASKS, EvaluationPrompt, Requirement, read_prompts
from latentdiff.evaluation.protocol import Outcome, Result, Score, score_prompts
from latentdiff.evaluation.report import Scores
from latentdiff.evaluation.run import evaluate

__all__ = [
    "TASKS",
    "EvaluationPrompt",
    "Judge",
    "Outcome",
    "Scores",
    "Requirement",
    "Result",
    "Score",
    "Seen",
    "Verdict",
    "evaluate",
    "read_prompts",
    "score_prompts",
]
