"""Check that the files of a tokenizer exist before transformers reads them."""

from __future__ import annotations


def require_tokenizer_files(model: str, local_files_only: bool = False) -> None:
    """Raise an OSError if a model has none, because transformers 5 would make a tokenizer without any words.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        local_files_only: look only into the hub's cache.
    """
    from transformers.utils import cached_file

    try:
        cached_file(model, "tokenizer.json", local_files_only=local_files_only)
    except OSError:
        for name in ("vocab.json", "merges.txt"):
            cached_file(model, name, local_files_only=local_files_only)
