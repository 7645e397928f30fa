"""Captions of digits, and a tokenizer for their words."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from qdiff.errors import UserError
from qdiff.io.files import written_whole

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIGNS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
TEMPLATES = (
    "a handwritten {}",
    "a handwritten digit {}",
    "the digit {}",
    "the number {}",
    "a picture of a {}",
    "a scan of the number {}",
    "{} written by hand",
    "{}",
)


def random_caption(label: int, source: random.Random) -> str:
    """Return a random caption of a digit."""
    return source.choice(TEMPLATES).format(WORDS[label])


def all_captions() -> list[str]:
    return [template.format(word) for template in TEMPLATES for word in WORDS]


def write_tokenizer(folder: str | Path, texts: Sequence[str], vocab_size: int, max_length: int) -> None:
    """Learn byte-pair merges from texts and write the files of a CLIP tokenizer.

    Every letter, digit and common sign is in the vocabulary; all others become the unknown token. The same texts give
    the same files.

    Args:
        vocab_size: maximum number of tokens.
        max_length: tokens per text, including start and end.

    Raises:
        UserError: the vocabulary is too small for the single signs.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        # Every sign occurs twice, inside and at the end of a word; the trainer counts only signs that occur in the
        # texts.
        vocab_size=vocab_size - len(SIGNS),
        initial_alphabet=list(SIGNS),
        special_tokens=[start, end],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    # The trainer numbers single signs arbitrarily. A word may end with any of them, even if no caption does.
    signs = sorted(t for t in model["vocab"] if len(t) == 1)
    tokens = [start, end, *signs, *(f"{s}</w>" for s in signs), *(m.replace(" ", "") for m in merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    if len(vocabulary) > vocab_size:
        raise UserError(f"a vocabulary of {vocab_size} tokens cannot hold all signs; give at least {len(vocabulary)}")
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    texts_of = {
        "vocab.json": json.dumps(vocabulary, indent=0),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=1),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, **special}, indent=1
        ),
    }
    for name, text in texts_of.items():
        with written_whole(Path(folder) / name) as path:
            path.write_text(text)
