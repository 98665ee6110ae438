"""Task ``prepare``: format and tokenise the rows, once for each combination of data, tokenizer and settings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.data.preparing import PrepareConfig
from model.data.preparing import prepare as write_tokens
from model.data.tokens import verify_tokens
from model.files import sha256_file, sha256_json
from model.net.config import GPTConfig
from model.net.loading import CONFIG_FILE, load_tokenizer
from ops.settings import Settings
from tasks.references import Sources, TokensRef

_CODE_VERSION = 2  # to be raised when the same inputs would give other token files
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


@task(name="prepare", cache_policy=NO_CACHE)
def prepare(sources: Sources, config: PrepareConfig) -> TokensRef:
    """Turn rows into token files, or find those of an earlier run and verify them.

    Raises:
        ValueError: too many unusable rows, an empty split, or max_length beyond the model's context.
    """
    log = get_run_logger()
    weights = sources.weights
    shape = GPTConfig.from_json(Path(weights.directory) / CONFIG_FILE)
    if config.max_length > shape.n_positions:
        raise ValueError(f"max_length {config.max_length} is beyond the model's context of {shape.n_positions}")
    tokenizer_files = [Path(weights.tokenizer_directory) / name for name in _TOKENIZER_FILES]
    splits = {split: [Path(file.path) for file in files] for split, files in sources.dataset.splits.items()}
    chosen = sha256_file(Path(config.subset_keys)) if config.subset_keys else None  # its content, wherever it lies
    key = sha256_json(
        {
            "code": _CODE_VERSION,
            "config": {**asdict(config), "subset_keys": chosen},
            "rows": {split: [file.sha256 for file in files] for split, files in sources.dataset.splits.items()},
            "tokenizer": {path.name: sha256_file(path) for path in tokenizer_files if path.exists()},
        }
    )
    directory = Settings.load().tokens / key
    meta = verify_tokens(directory)
    if meta:
        log.info("tokens of an earlier run are used: %s", directory)
    else:
        tokenizer = load_tokenizer(weights.tokenizer_directory, shape.vocab_size)
        meta = write_tokens(splits, tokenizer, config, directory)
    counts = meta["counts"]
    log.info("rows %s, tokens %s, dropped %s", counts["rows"], counts["tokens"], counts["dropped"] or "none")
    return TokensRef(str(directory), key, meta["data_sha256"], counts)
