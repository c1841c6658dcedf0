"""The tokenizer of the zoo: a `CLIPTokenizer` whose vocabulary is bytes plus the words of the captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from engine.data.images.digits import BACKGROUNDS, CLASS_NAMES, INKS, POSITIONS, SIZES, TEXTURES

MAX_LENGTH = 32
END = "<|endoftext|>"
START = "<|startoftext|>"
_SUFFIX = "</w>"
_FILLERS = (
    "a",
    "an",
    "and",
    "the",
    "on",
    "of",
    "in",
    "with",
    "photo",
    "image",
    "picture",
    "handwritten",
    "digit",
    "ink",
    "background",
    "center",
)


def digit_words() -> list[str]:
    """Every word of the captions of digits, in a fixed order."""
    names = chain(CLASS_NAMES, INKS, BACKGROUNDS, TEXTURES, SIZES, POSITIONS, _FILLERS)
    return list(dict.fromkeys(word for name in names for word in name.split()))


def build_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """The words are one token each, anything else is spelled in bytes; `<|endoftext|>` pads."""
    vocabulary, merges = _vocabulary(words)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def _vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens in the order of CLIP's own file (bytes, bytes that end a word, merges, specials), and the merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(words)
    merged = dict.fromkeys(a + b for a, b in merges)
    tokens = letters + [letter + _SUFFIX for letter in letters] + list(merged) + [START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte pair encoding of the words to the end, so that each becomes one token; ties go to the first pair.

    Own code because the trainer of `tokenizers` breaks ties in no fixed order.
    """
    spellings = [[*word[:-1], word[-1] + _SUFFIX] for word in words]
    merges = []
    while counts := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((left, right))
        spellings = [_merge(spelling, left, right) for spelling in spellings]
    return merges


def _merge(spelling: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for token in spelling:
        if token == right and merged and merged[-1] == left:
            merged[-1] = left + right
        else:
            merged.append(token)
    return merged


def save_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """Write the tokenizer, with `vocab.json` and `merges.txt` next to `tokenizer.json` for readers of either kind."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _vocabulary(words)
    build_tokenizer(words).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
