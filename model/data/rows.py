"""What identifies a row: the key of its prompt, the key of its content, and its draw of a split."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import Any


def prompt_key(prompt: str) -> bytes:
    """Equal for prompts that differ only in case, white space or Unicode form."""
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def row_key(row: dict[str, Any]) -> int:
    """A 64-bit hash of a normalised row's content; its file and position play no part.

    The probability that any two of a million different rows share a hash is 3e-8.
    """
    digest = hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def fraction(key: bytes, seed: int, purpose: str) -> float:
    """A uniform number in [0, 1) that depends on the prompt, the seed and the purpose alone.

    So a row stays in its split when the data set grows or is read in another order, and rows with the same prompt
    always share a split.
    """
    digest = hashlib.blake2b(key + f"{seed}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
