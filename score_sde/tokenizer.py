"""Prompts as CLIP's tokens: byte-level pair encoding with the vocabulary of the model itself.

The library `tokenizers` does the work; it is imported when a tokenizer is made, as no other part needs it.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from score_sde.errors import UserError, one_line

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")  # the last two may be absent
START, END = "<|startoftext|>", "<|endoftext|>"
# Words, tried in this order: as published, but for the two special tokens, which the library knows.
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class Tokenizer(NamedTuple):
    """A tokenizer of prompts.

    library: an object of the library, for the words alone
    vocab_size: tokens that there are
    start, end, pad: the tokens before and behind a prompt, and the one that fills it up
    """

    library: Any
    vocab_size: int
    start: int
    end: int
    pad: int

    def __call__(self, prompts: Sequence[str], length: int = 77) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (B, length) int32 of prompts, and how many tokens of each had to be cut (B,).

        Start, words, end; a longer prompt is cut before its end, as published, a shorter one filled up.
        """
        tokens, cut = np.full((len(prompts), length), self.pad, np.int32), np.zeros(len(prompts), int)
        for i, encoding in enumerate(self.library.encode_batch(list(prompts))):
            words = encoding.ids
            cut[i] = max(0, len(words) + 2 - length)
            numbers = [self.start, *words[: length - 2], self.end]
            tokens[i, : len(numbers)] = numbers
        return tokens, cut


def read(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of the folder `tokenizer` of a diffusers model: vocab.json and merges.txt, with its own padding.

    UserError where the library is not installed, and where the files are absent or no vocabulary.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError("prompts need the library tokenizers: pip install tokenizers") from None
    folder = pathlib.Path(folder)
    try:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read the tokenizer: {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"cannot read the tokenizer in {folder}: {one_line(error)}") from None
    lines = lines[1:] if lines[0].startswith("#version") else lines
    merges = [tuple(line.split()) for line in lines if line.strip()]
    numbers = vocabulary.values() if isinstance(vocabulary, dict) else ()
    if sorted(n for n in numbers if isinstance(n, int)) != list(range(len(vocabulary))):
        raise UserError(f"{folder / 'vocab.json'} is no vocabulary: it must number tokens from 0 on")
    pad = _padding(folder)
    if missing := [token for token in (START, END, pad) if token not in vocabulary]:
        raise UserError(f"{folder / 'vocab.json'} is no vocabulary of CLIP: it has no {missing[0]!r}")
    normalizers, words = tokenizers.normalizers, tokenizers.pre_tokenizers
    try:
        # merges of what the vocabulary does not hold are refused here
        model = tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END)
    except Exception as error:  # the library raises no other
        raise UserError(f"{folder / 'merges.txt'} does not fit vocab.json: {one_line(error)}") from None
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    library.pre_tokenizer = words.Sequence(
        [
            words.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
            words.ByteLevel(add_prefix_space=False),
        ]
    )
    library.add_special_tokens([START, END])
    special = (vocabulary[token] for token in (START, END, pad))
    return Tokenizer(library, len(vocabulary), *special)


def _padding(folder: pathlib.Path) -> str:
    """The token that fills up: the end, unless a file of the folder names another (Stable Diffusion 2: "!")."""
    for name in FILES[2:]:
        try:
            token = json.loads((folder / name).read_text(encoding="utf-8"))["pad_token"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return token["content"] if isinstance(token, dict) and "content" in token else str(token)
    return END
