"""Text -> token ids: CLIP's byte-pair encoding (Radford et al. 2021), from a published model's `tokenizer/` folder.

It gives the ids of transformers' CLIPTokenizer and is called as that is called, but starts without transformers, whose
import takes longer than an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from latentdiff.errors import CheckpointError
from latentdiff.reading.json import parse_object

END_OF_WORD = "</w>"  # how CLIP's vocabulary marks a word's last token
CONFIG, SPECIAL, ADDED, WHOLE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
VOCABULARY, MERGES = "vocab.json", "merges.txt"
LONGEST_PROMPT = 4096  # tokens; CLIP reads 77

_DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """A CLIP tokenizer.

    Args:
        files: name -> text, of vocab.json and merges.txt or of tokenizer.json, and of tokenizer_config.json,
            special_tokens_map.json and added_tokens.json where there are such.

    Raises:
        CheckpointError: a file is no JSON, or the length of prompts makes no sense.
        ValueError, KeyError, TypeError, Exception: the files are damaged (the library below has no exceptions of its
            own).

    Attributes:
        files: as given; words that were added later are not in them.
        model_max_length: the longest prompt in tokens, start and end marks included.
        second: the files of the tokenizer of a second text encoder, which reads alike and pads otherwise; for saving.
        expansions: the token of a learned word that has several vectors -> a token for each of them, itself the first.
        highest: the largest number that a token of the files has.
    """

    is_fast = True  # transformers' word for a tokenizer that knows where in the text each token comes from

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = dict(files)
        self.second: dict[str, str] = {}
        self.expansions: dict[int, tuple[int, ...]] = {}
        config = _object(files, CONFIG)
        vocabulary, merges = vocabulary_and_merges(files)
        special, added = _special_tokens(files, config)
        self.model_max_length = _length(config.get("model_max_length", 77))
        self.bos_token, self.eos_token, self.pad_token = (
            str(special[role].content) for role in ("bos_token", "eos_token", "pad_token")
        )
        self._unknown = special["unk_token"].content
        self._backend = _backend(vocabulary, merges, self._unknown)
        self._backend.add_tokens(added)
        self.highest = max(max(vocabulary.values()), len(self) - 1)
        marks = ((self.eos_token, self.eos_token_id), (self.bos_token, self.bos_token_id))
        self._backend.post_processor = processors.RobertaProcessing(*marks, trim_offsets=False, add_prefix_space=False)

    def __len__(self) -> int:
        """Tokens, added ones too."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> number, added ones too."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int:
        """Of the mark at the start of every text."""
        return self.convert_tokens_to_ids(self.bos_token)

    @property
    def eos_token_id(self) -> int:
        """Of the mark at the end of every text."""
        return self.convert_tokens_to_ids(self.eos_token)

    @property
    def pad_token_id(self) -> int:
        """Of what fills up a short text."""
        return self.convert_tokens_to_ids(self.pad_token)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> dict[str, Any]:
        """Token ids of one text, a list, or of several, a list of lists.

        Args:
            padding: "max_length" fills up to `max_length`; False does not.
            truncation: cut at `max_length`, the end mark included.
            max_length: None is `model_max_length`.
            add_special_tokens: put the start mark before and the end mark behind.
            return_offsets_mapping: also say where in the text each token comes from, (start, end); marks are at (0, 0).
            verbose: no matter; transformers warns of long texts unless it is False.

        Returns:
            {"input_ids": ...}, with "offset_mapping" if that was asked for.
        """
        if padding not in (False, "max_length"):
            raise ValueError(f"expected padding to be False or 'max_length', found {padding!r}")
        longest = self.model_max_length if max_length is None else max_length
        ids, offsets = [], []
        for one in [text] if isinstance(text, str) else text:
            encoding = self._backend.encode(one, add_special_tokens=add_special_tokens)
            row, places = encoding.ids, encoding.offsets
            if truncation and len(row) > longest:
                end = longest - add_special_tokens
                row, places = row[:end] + row[-1:] * add_special_tokens, places[:end] + [(0, 0)] * add_special_tokens
            missing = max(0, longest - len(row)) if padding else 0
            ids.append(row + [self.pad_token_id] * missing)
            offsets.append(places + [(0, 0)] * missing)
        found = {"input_ids": ids, "offset_mapping": offsets} if return_offsets_mapping else {"input_ids": ids}
        return {name: rows[0] for name, rows in found.items()} if isinstance(text, str) else found

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids, in lower case and with one space between words."""
        return self._backend.decode(list(ids), skip_special_tokens).replace(END_OF_WORD, " ").strip()

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary spells them, the last one of a word with `END_OF_WORD`."""
        return [self._backend.id_to_token(int(number)) for number in ids]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The number of a token, or the numbers of several; that of the unknown token where there is no such."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self._backend.token_to_id(tokens)
        return self._backend.token_to_id(self._unknown) if found is None else found

    def add_tokens(self, words: Sequence[str]) -> int:
        """Make each of these words one token, with the next free numbers; returns how many of them are new."""
        return self._backend.add_tokens(list(words))


def vocabulary_and_merges(files: Mapping[str, str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> number, and the pairs that become one token, most important first."""
    if WHOLE in files:
        model = _object(files, WHOLE)["model"]
        vocabulary, lines = model["vocab"], model["merges"]
    else:
        vocabulary = _object(files, VOCABULARY)
        lines = [line for line in files[MERGES].split("\n") if line and not line.startswith("#version")]
    merges = (line.split(" ") if isinstance(line, str) else line for line in lines)
    return vocabulary, [(left, right) for left, right in merges]


def _special_tokens(
    files: Mapping[str, str], config: Mapping[str, Any]
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The tokens with a role, and all that are no part of the vocabulary's merges, in the order in which they are
    added.

    The same token may be described twice, with and without `normalized` (whether it is also found in the text's
    lower-case form); the description that is added last holds, as in transformers.
    """
    roles: dict[str, Any] = _DEFAULTS | {role: config[role] for role in _ROLES if config.get(role)}
    if "added_tokens_decoder" in config:
        numbered = [(int(number), token) for number, token in config["added_tokens_decoder"].items()]
    else:
        special = _object(files, SPECIAL)
        roles |= {role: special[role] for role in _ROLES if special.get(role)}
        named = {_content(token) for token in roles.values()}
        numbered = [
            (number, {"content": word, "special": word in named, "normalized": word not in named})
            for word, number in _object(files, ADDED).items()
        ]
        if WHOLE in files:
            numbered += [(token["id"], token) for token in _object(files, WHOLE)["added_tokens"]]
    known = {_content(token): _token(token) for _, token in sorted(numbered, key=lambda pair: pair[0])}
    special_tokens = {role: known.get(_content(token)) or _token(token, special=True) for role, token in roles.items()}
    return special_tokens, [
        *known.values(),
        *(token for token in special_tokens.values() if token.content not in known),
    ]


def _object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    return parse_object(files.get(name, "{}"), name)


def _length(value: Any) -> int:
    """The longest prompt. Transformers writes 1e30 where nobody said one, which no text encoder reads."""
    if type(value) not in (int, float) or not 3 <= value <= LONGEST_PROMPT or value != int(value):
        raise CheckpointError(
            f"{CONFIG} has model_max_length {str(value)[:40]}, expected 3 to {LONGEST_PROMPT} tokens as the text encoder "
            "reads (77 for Stable Diffusion); write that there"
        )
    return int(value)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _token(token: str | Mapping[str, Any], *, special: bool = False) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=special)
    flags = {name: token[name] for name in ("lstrip", "rstrip", "normalized", "single_word") if name in token}
    return AddedToken(token["content"], special=special or token.get("special", False), **flags)


def _backend(vocabulary: dict[str, int], merges: Iterable[tuple[str, str]], unknown: str) -> Backend:
    """Lower case, words, bytes, merges."""
    model = BPE(
        vocabulary, list(merges), continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD, unk_token=unknown
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return backend
