"""The embedded default: a tiny pretrained base in ``base/`` and rows from a grammar."""

from pathlib import Path

# The "tiny" preset's weights and tokenizer, made by model/demo/pretrain.py.
EMBEDDED_BASE = Path(__file__).parent / "base"
# Its files' sha256, which are part of the code: a file that changed is refused, before each run and at each loading.
EMBEDDED_SHA256 = {
    "config.json": "95f0e48dcadba073fd5f18ba168d2515227be169412135992e346a38190a682b",
    "model.safetensors": "d8b9dbdbff13a830e56dd1154ce104749bb655128385ee570daec7e7eeca0391",
    "tokenizer.json": "1e22c39be5213d3107314caccbd0d6e4d2fc31e8f7dfb0811d7cef2b0fa8b47d",
    "tokenizer_config.json": "a945d4c0e3f0296552d20a2e669209c7cc06b27ad674e50d7b23386c495363d6",
}
