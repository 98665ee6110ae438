"""The embedded default: a tiny pretrained base in ``base/`` and rows from a grammar."""

from pathlib import Path

# The "tiny" preset's weights and tokenizer, made by model/demo/pretrain.py.
EMBEDDED_BASE = Path(__file__).parent / "base"
