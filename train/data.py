"""The data format: one JSON object per line, a prompt with two or more completions and a reward for each.

    {"prompt": "...", "completions": ["...", "..."], "rewards": [1.0, 0.2]}

Groups may differ in size, other keys are ignored, blank lines are skipped. Whatever else a line holds is
refused with the file and the line number, before any training starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One prompt and its group of scored completions."""

    prompt: str
    completions: list[str]
    rewards: list[float]


def write_jsonl(path: Path, examples: Iterable[Example]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Example]:
    """Every example of a file; ValueError names the file and the line that is not one."""
    if not path.is_file():
        raise ValueError(f"{path}: no such data file")
    examples = []
    # Bytes, so that a line which is not UTF-8 is named like any other bad line.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                examples.append(parse_example(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not examples:
        raise ValueError(f"{path}: holds no examples")
    return examples


def parse_example(line: bytes) -> Example:
    try:
        # An integer too large for a float becomes inf here, and is refused with the other infinities.
        record = json.loads(line.decode("utf-8"), parse_int=float)
    except ValueError as error:
        raise ValueError(f"not a JSON line: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    missing = [key for key in ("prompt", "completions", "rewards") if key not in record]
    if missing:
        raise ValueError(f"missing key {missing[0]!r}")
    prompt, completions, rewards = record["prompt"], record["completions"], record["rewards"]
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt must be a non-empty string, got {prompt!r:.40}")
    _check_completions(completions)
    _check_rewards(rewards, len(completions))
    return Example(prompt, completions, rewards)


def _check_completions(completions: object) -> None:
    if not isinstance(completions, list):
        raise ValueError(f"completions must be a list of strings, got {type(completions).__name__}")
    for i, completion in enumerate(completions):
        if not isinstance(completion, str):
            raise ValueError(f"completions[{i}] must be a string, got {type(completion).__name__}")
        if not completion.strip():
            raise ValueError(f"completions[{i}] is empty")
    if len(completions) < 2:
        raise ValueError(f"a contrast needs at least 2 completions, got {len(completions)}")


def _check_rewards(rewards: object, num_completions: int) -> None:
    if not isinstance(rewards, list):
        raise ValueError(f"rewards must be a list of numbers, got {type(rewards).__name__}")
    if len(rewards) != num_completions:
        raise ValueError(f"{num_completions} completions but {len(rewards)} rewards")
    for i, reward in enumerate(rewards):
        if not isinstance(reward, float):
            raise ValueError(f"rewards[{i}] must be a number, got {reward!r:.40}")
        if not math.isfinite(reward):
            raise ValueError(f"rewards[{i}] must be finite, got {reward}")
