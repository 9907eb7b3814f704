"""The heads that are tuned where none is named, and the head of a model on the disk."""

from __future__ import annotations

import json
from pathlib import Path

# name: vocabulary entries, hidden size
HEADS: dict[str, tuple[int, int]] = {
    "llama-3": (128256, 4096),
    "qwen2.5-7b": (152064, 3584),
    "qwen3": (151936, 4096),
    "gemma-2-2b": (256000, 2304),
    "gpt2": (50257, 768),
}
# The interpreter runs every element of a tile in Python: enough of them for several tiles and splits.
INTERPRETED = (64, 16)


def head_of_model(folder: Path) -> tuple[int, int]:
    """Vocabulary entries and hidden size of a model in the format of transformers.

    Args:
        folder: with a config.json.

    Raises:
        ValueError: there is none, or it does not say.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model must be a folder with a config.json, got {folder}: {error}") from error
    # Models that also see have the language model's sizes one level down.
    for sizes in (config, config.get("text_config") if isinstance(config, dict) else None):
        if isinstance(sizes, dict) and {"vocab_size", "hidden_size"} <= set(sizes):
            return sizes["vocab_size"], sizes["hidden_size"]
    raise ValueError(f"{path} must have vocab_size and hidden_size")
