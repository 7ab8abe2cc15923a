"""What a prompt says once its grammar is read.

    text -> tags, parts joined by AND -> stages over the steps -> runs of one weight -> chunks of tokens

A chunk is what a text encoder reads at once, which is 75 tokens for CLIP, without the marks. Each chunk is encoded alone,
and the embeddings are joined along the sequence.

Three grammars: "a1111", that of AUTOMATIC1111's web UI and its kin; "comfy", that of ComfyUI; "plain", every letter as
it stands, cut at the end of the first chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentdiff.errors import UsageError
from latentdiff.prompts.notice import LONGEST, shortened, warn
from latentdiff.prompts.stages import Stage, stages_of
from latentdiff.prompts.tags import TAG, LoRATag, without_tags
from latentdiff.prompts.tokenizer import END_OF_WORD
from latentdiff.prompts.weights import Run, Stretch, a1111_runs, comfy_runs

COMMA_REACH = 20  # so far back a comma may lie behind which a full chunk is cut (AUTOMATIC1111's default)
WHOLE_WORD = 8  # words of fewer tokens are not cut (ComfyUI)
_AND = re.compile(r"\bAND\b")
_PART_WEIGHT = re.compile(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*$")
_EMBEDDING = re.compile(r"\bembedding:([^\s,:()\[\]]+)")
_CHOICES = [re.compile(r"\{[^{}]*\|[^{}]*\}"), re.compile(r"__[\w/*-]+__")]  # of `dynamicprompts`
_NOT_COMFY = [
    re.compile(r"\bBREAK\b"),
    _AND,
    re.compile(r"<(?:lora|lyco):[^>]+>"),
    re.compile(r"\[[^\[\]]*[:|][^\[\]]*\]"),
]
_ALL_STEPS = 100  # enough to see every text of a prompt that changes
_WEIGHED = re.compile(r"[()\[\]\\:]|\bBREAK\b")  # a text without any of these is one run
_RUNS: dict[str, Callable[[str], list[Stretch]]] = {
    "a1111": a1111_runs,
    "comfy": comfy_runs,
    "plain": lambda text: [[Run(text)]],
}


@dataclass(frozen=True)
class Part:
    """One of the texts that `AND` joins, with its weight; a prompt without `AND` has one."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt, or a negative one, whose outer grammar is read.

    Attributes:
        parts: what is composed; a negative prompt has one.
        loras: what its tags ask for.
        unheeded: letters that look like grammar and have no meaning here, for warnings and the account.
    """

    syntax: str
    parts: tuple[Part, ...]
    loras: tuple[LoRATag, ...] = ()
    unheeded: tuple[str, ...] = ()

    def stages(self, part: Part, steps: int) -> list[Stage]:
        """The texts of a part over the steps."""
        is_staged = self.syntax == "a1111" and "[" in part.text
        return stages_of(part.text, steps) if is_staged else [Stage(steps, part.text)]

    @property
    def is_simple(self) -> bool:
        """Whether it says one thing with weight 1 from the first step to the last."""
        return len(self.parts) == 1 and self.parts[0].weight == 1.0 and len(self.stages(self.parts[0], 1000)) == 1


def as_list(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list of text.

    Raises:
        UsageError: there is no prompt, or one is not valid text.
    """
    if not isinstance(prompt, Iterable):
        raise UsageError(f"expected a prompt or a list of prompts, found {type(prompt).__name__}: {prompt!r}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UsageError("expected a prompt or a list of prompts, found an empty list")
    for text in prompts:
        if not isinstance(text, str):
            raise UsageError(f"expected prompts as text, found {type(text).__name__}: {text!r}")
        if not text.isascii() and text != text.encode(errors="replace").decode():
            raise UsageError(f"expected prompts in valid Unicode, found {text!r}")
    return prompts


def read_prompt(text: str, syntax: str, *, negative: bool = False) -> Prompt:
    """Read tags and `AND`, and find what looks like grammar and is none.

    A part may end in `:weight`, a prompt of one part too. Negative prompts know no `AND` and no tags.

    Raises:
        UsageError: there is no such syntax, or a tag or a weight is none.
    """
    if syntax not in _RUNS:
        raise UsageError(f"expected a prompt syntax of {', '.join(_RUNS)}, found {syntax!r}")
    if syntax != "a1111":
        return Prompt(syntax, (Part(text),), unheeded=tuple(_foreign(text, syntax)))
    if negative:
        unheeded = [found.group() for pattern in (_AND, TAG) for found in pattern.finditer(text)]
        return Prompt(syntax, (Part(text),), unheeded=(*unheeded, *_foreign(text, syntax)))
    text, loras, unheeded = without_tags(text) if "<" in text else (text, [], [])
    parts = [_part(piece) for piece in _AND.split(text)]
    return Prompt(syntax, tuple(parts), tuple(loras), (*unheeded, *_foreign(text, syntax)))


def runs_of(text: str, syntax: str) -> list[Stretch]:
    """The runs of one weight of a stage's text, one list for each stretch between `BREAK`s."""
    return _RUNS[syntax](text) if _WEIGHED.search(text) else [[Run(text)] if text else []]


def said(text: str, syntax: str) -> str:
    """The words of a prompt at all steps, without its grammar."""
    prompt = read_prompt(text, syntax)
    texts = [stage.text for part in prompt.parts for stage in prompt.stages(part, _ALL_STEPS)]
    return " ".join(run.text for each in dict.fromkeys(texts) for stretch in runs_of(each, syntax) for run in stretch)


def chunks_of(tokenizer: Any, text: str, syntax: str) -> list[Chunk]:
    """The chunks of a stage's text, at least one.

    `embedding:name` is the learned word of that name. One that is not loaded is left out with a `PromptWarning`.
    """
    if syntax != "plain":
        text = _EMBEDDING.sub(lambda found: _learned_word(tokenizer, found[1]), text)
    return CHUNKING[syntax](tokenizer, runs_of(text, syntax))


def warn_of_unheeded(prompt: Prompt) -> None:
    """Say in one line which letters of a prompt look like grammar and are none here."""
    if prompt.unheeded:
        shown = ", ".join(map(shortened, dict.fromkeys(prompt.unheeded)))
        warn(f"these parts of the prompt have no meaning in the syntax {prompt.syntax!r}: {shown}")


def dropped_text(tokenizer: Any, prompt: str) -> str:
    """The end of the prompt that the model does not read, from the first cut word on; "" if it reads all."""
    room = tokenizer.model_max_length - 1  # the end mark takes the last place
    encoded = tokenizer(prompt, truncation=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    if len(encoded["input_ids"]) <= room + 1:
        return ""
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    first = room
    while first > 1 and not tokens[first - 1].endswith(END_OF_WORD):
        first -= 1
    if tokenizer.is_fast:
        return prompt[encoded["offset_mapping"][first][0] :].strip()
    return tokenizer.decode(encoded["input_ids"][first:-1]).strip()  # transformers 4 may have no offsets


def warn_of_lost_text(tokenizer: Any, text: str) -> None:
    """Say which words of a plain prompt the model has no room for."""
    if lost := dropped_text(tokenizer, text):
        warn(f"the prompt has more than the {room(tokenizer)} tokens that the model reads; dropped: {shortened(lost)}")


def _part(text: str) -> Part:
    weight = _PART_WEIGHT.search(text)
    return Part(text, 1.0) if weight is None else Part(text[: weight.start()], float(weight[1]))


def _foreign(text: str, syntax: str) -> list[str]:
    patterns = {"a1111": _CHOICES, "comfy": [*_CHOICES, *_NOT_COMFY], "plain": []}[syntax]
    return [found.group() for pattern in patterns for found in pattern.finditer(text)]


def _learned_word(tokenizer: Any, name: str) -> str:
    word = name.removesuffix(".safetensors").removesuffix(".pt").removesuffix(".bin")
    if is_learned(tokenizer, word):
        return word
    warn(f"no embedding called {shortened(word)} is loaded; 'embedding:{word[:LONGEST]}' is left out")
    return ""


def is_learned(tokenizer: Any, word: str) -> bool:
    """Whether a word is a token of its own that was added to the vocabulary."""
    ids = tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"]
    return len(ids) == 1 and not tokenizer.convert_ids_to_tokens(ids)[0].endswith(END_OF_WORD)


@dataclass
class Chunk:
    """Tokens without start mark, end mark and padding, and the weight of each."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1.0 for weight in self.weights)

    def add(self, ids: Sequence[int], weight: float) -> None:
        """Append tokens of one weight."""
        self.ids += ids
        self.weights += [weight] * len(ids)

    def framed(self, tokenizer: Any) -> tuple[list[int], list[float]]:
        """Ids and weights with the marks and the padding, each as long as the tokenizer's `model_max_length`."""
        ids = [tokenizer.bos_token_id, *self.ids, tokenizer.eos_token_id]
        missing = tokenizer.model_max_length - len(ids)
        return ids + [tokenizer.pad_token_id] * missing, [1.0, *self.weights, *[1.0] * (missing + 1)]


def room(tokenizer: Any) -> int:
    """How many tokens a chunk holds besides its marks."""
    return tokenizer.model_max_length - 2


def chunks_by_commas(tokenizer: Any, stretches: Sequence[Stretch]) -> list[Chunk]:
    """Chunks as AUTOMATIC1111 makes them: a `BREAK` ends one; what follows a full one's last comma moves on with the
    rest, if that comma lies at most `COMMA_REACH` tokens back. The vectors of a learned word stay together."""
    size, comma = room(tokenizer), tokenizer.convert_tokens_to_ids("," + END_OF_WORD)
    done: list[Chunk] = []
    for place, stretch in enumerate(stretches):
        chunk, last_comma = Chunk(), -1
        for group, weight in _groups(tokenizer, stretch):
            if group == [comma]:
                last_comma = len(chunk)
            elif len(chunk) == size and last_comma >= 0 and size - last_comma <= COMMA_REACH:
                moved = Chunk(chunk.ids[last_comma + 1 :], chunk.weights[last_comma + 1 :])
                done.append(Chunk(chunk.ids[: last_comma + 1], chunk.weights[: last_comma + 1]))
                chunk, last_comma = moved, -1
            if len(chunk) + len(group) > size:
                done.append(chunk)
                chunk, last_comma = Chunk(), -1
            chunk.add(group[:size], weight)
        if len(chunk) or place < len(stretches) - 1 or not done:
            done.append(chunk)
    return done


def chunks_by_words(tokenizer: Any, stretches: Sequence[Stretch]) -> list[Chunk]:
    """Chunks as ComfyUI makes them: a word of fewer than `WHOLE_WORD` tokens is not cut; there are no breaks."""
    size, done, chunk = room(tokenizer), [], Chunk()
    for run in (run for stretch in stretches for run in stretch):
        for word in run.text.replace("\n", " ").split(" "):
            ids = [token for group in _expanded(tokenizer, word) for token in group]
            while len(chunk) + len(ids) > size:
                fits = size - len(chunk) if len(ids) >= WHOLE_WORD or not len(chunk) else 0
                chunk.add(ids[:fits], run.weight)
                done.append(chunk)
                ids, chunk = ids[fits:], Chunk()
            chunk.add(ids, run.weight)
    return [*done, chunk]


def cut(tokenizer: Any, stretches: Sequence[Stretch]) -> list[Chunk]:
    """The first chunk alone; what does not fit is lost."""
    chunk = Chunk()
    for group, weight in _groups(tokenizer, (run for stretch in stretches for run in stretch)):
        chunk.add(group, weight)
    size = room(tokenizer)
    return [Chunk(chunk.ids[:size], chunk.weights[:size])]


CHUNKING: dict[str, Callable[[Any, Sequence[Stretch]], list[Chunk]]] = {
    "a1111": chunks_by_commas,
    "comfy": chunks_by_words,
    "plain": cut,
}


def _groups(tokenizer: Any, runs: Iterable[Run]) -> Iterable[tuple[list[int], float]]:
    """What must not be torn apart, with its weight: single tokens, and all vectors of a learned word."""
    for run in runs:
        for group in _expanded(tokenizer, run.text):
            yield group, run.weight


def _expanded(tokenizer: Any, text: str) -> list[list[int]]:
    expansions = getattr(tokenizer, "expansions", {})
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [list(expansions.get(token, (token,))) for token in ids]
