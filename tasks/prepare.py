"""Task ``prepare``: format and tokenise the rows, once for each combination of data, tokenizer and settings."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.data.config import PrepareConfig
from model.data.preparing import prepare as write_tokens
from model.data.preparing import small_splits
from model.data.tokens import verify_tokens
from model.files import sha256_file, sha256_json
from model.net.config import GPTConfig
from model.net.layout import CONFIG_FILE
from model.net.tokenizer import VOCABULARY_FILES, load_tokenizer
from ops.settings import Settings
from ops.tracking.data import log_data, log_table
from ops.tracking.runs import RunRef, log_params, set_tags
from ops.tracking.steps import pipeline_step
from tasks.references import Sources, TokensRef

_CODE_VERSION = 3  # raise it when equal inputs would give other token files


@task(name="prepare", cache_policy=NO_CACHE)
@pipeline_step
def prepare(run: RunRef, sources: Sources, config: PrepareConfig) -> TokensRef:
    """Turn rows into token files, or find those of an earlier run; log what they hold.

    Raises:
        ValueError: as find_or_write_tokens.
    """
    tokens = find_or_write_tokens(sources, config)
    set_tags(run, {"data_sha256": tokens.data_sha256})
    facts = _data_facts(tokens)
    profile = {name.removeprefix("data/"): value for name, value in facts.items()}
    log_data(run, sources.dataset.source, sources.dataset.revision, tokens.data_sha256, profile)
    log_params(run, facts)
    log_table(run, list(tokens.sources), "data_files")
    return tokens


def find_or_write_tokens(sources: Sources, config: PrepareConfig) -> TokensRef:
    """Turn rows into token files; those of an earlier run with equal inputs are verified and used again.

    Raises:
        ValueError: too many unusable rows, an empty split, or max_length beyond the model's context.
    """
    log = get_run_logger()
    weights = sources.weights
    shape = GPTConfig.from_json(Path(weights.directory) / CONFIG_FILE, weights.files[CONFIG_FILE])
    if config.max_length > shape.n_positions:
        raise ValueError(f"max_length {config.max_length} is beyond the model's context of {shape.n_positions}")
    key = _tokens_key(sources, config)
    directory = Settings.load().tokens / key
    meta = verify_tokens(directory)
    if meta:
        log.info("tokens of an earlier run are used: %s", directory)
    else:
        tokenizer = load_tokenizer(weights.tokenizer_directory, shape.vocab_size, weights.tokenizer_files)
        meta = write_tokens(sources.dataset.paths, tokenizer, config, directory, sources.dataset.check)
    for source in meta["sources"]:
        log.info("%s: %d rows, %s", source["file"], source["rows"], source["split"])
    counts = meta["counts"]
    for what in ("rows", "tokens", "dropped"):
        log.info("%s: %s", what, ", ".join(f"{name} {n:,}" for name, n in counts[what].items()) or "none")
    for warning in small_splits(counts["rows"], meta["sources"]):
        log.warning(warning)
    return TokensRef(str(directory), key, meta["data_sha256"], counts, tuple(meta["sources"]))


def _tokens_key(sources: Sources, config: PrepareConfig) -> str:
    """A sha256 over all that determines token files: code, settings, rows and tokenizer."""
    chosen = sha256_file(Path(config.subset_keys)) if config.subset_keys else None  # by content, whatever the path
    tokenizer = {name: sources.weights.tokenizer_files.get(name) for name in VOCABULARY_FILES}
    return sha256_json(
        {
            "code": _CODE_VERSION,
            "config": {**config.determinants(), "subset_keys": chosen},
            "rows": {split: [file.sha256 for file in files] for split, files in sources.dataset.splits.items()},
            "tokenizer": {name: sha256 for name, sha256 in tokenizer.items() if sha256},
        }
    )


def _data_facts(tokens: TokensRef) -> dict[str, float]:
    """Rows kept, cut and dropped by reason, under the names MLflow shows.

    They are known before the training, and parameters in MLflow: as metrics they would be its first charts.
    """
    counts = tokens.counts
    facts: dict[str, float] = {f"data/{split}_rows": rows for split, rows in counts["rows"].items()}
    facts["data/train_tokens"] = counts["tokens"]["train"]
    facts["data/truncated_share"] = counts["truncated"] / sum(counts["rows"].values())
    facts["data/dropped_rows"] = sum(counts["dropped"].values())
    return facts | {f"data/dropped/{reason}": count for reason, count in counts["dropped"].items()}
