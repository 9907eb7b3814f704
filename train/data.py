"""The data format: rows of a prompt with two or more completions and a reward for each, as JSON lines or parquet.

    {"prompt": "...", "completions": ["...", "..."], "rewards": [1.0, 0.2]}

Groups may differ in size, other columns are ignored, blank lines are skipped. For a chat model the prompt may be a
list of messages, {"role": "user", "content": "..."}. Online training samples its own completions: its rows need a
prompt only, keep their other columns for the reward function, and may hold completions for a supervised warm-up.
Whatever else a row holds is refused with the file and the line or row number, before any training starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "completions", "rewards")
ROLES = ("system", "user", "assistant", "tool")
Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """One prompt and its group of scored completions, none where these are to be sampled."""

    prompt: Prompt
    completions: list[str]
    rewards: list[float]
    columns: dict[str, Any] = field(default_factory=dict)  # the row's others, kept for a reward function


def write_jsonl(path: Path, examples: Iterable[Example]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            record = {name: getattr(example, name) for name in COLUMNS} | example.columns
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_examples(path: Path, *, chat: bool = False, online: bool = False) -> list[Example]:
    """Every example of a .parquet or a JSON-lines file; ValueError names the file and the row that is not one."""
    if not path.is_file():
        raise ValueError(f"{path}: no such data file")
    if path.suffix == ".parquet":
        examples = _parsed(path, _parquet_rows(path), lambda row: to_example(row, chat, online))
    else:
        examples = _parsed(path, _lines(path), lambda line: parse_example(line, chat, online))
    if not examples:
        raise ValueError(f"{path}: holds no examples")
    return examples


def read_jsonl(path: Path) -> list[Example]:
    """Every example of a file of JSON lines."""
    return read_examples(path)


def parse_example(line: bytes, chat: bool = False, online: bool = False) -> Example:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"not a JSON line: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    return to_example(record, chat, online)


def to_example(record: dict[str, Any], chat: bool = False, online: bool = False) -> Example:
    """The example of a row."""
    needed = ("prompt",) if online and record.get("completions") is None else COLUMNS
    missing = [key for key in needed if key not in record]
    if missing:
        raise ValueError(f"missing key {missing[0]!r}")
    _check_prompt(record["prompt"], chat)
    columns = {name: value for name, value in record.items() if name not in COLUMNS} if online else {}
    if len(needed) == 1:
        return Example(record["prompt"], [], [], columns)
    completions, rewards = record["completions"], _as_floats(record["rewards"])
    _check_completions(completions)
    _check_rewards(rewards, len(completions))
    return Example(record["prompt"], completions, rewards, columns)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes, so that a line which is not UTF-8 is named like any other bad line.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path}: parquet needs the datasets package, which is not installed") from None
    try:
        # Streamed, so that no second copy of the data lands in a cache of the library.
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from enumerate(rows, start=1)
    except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
        raise ValueError(f"{path}: not readable as parquet: {error}") from None


def _parsed(path: Path, rows: Iterator[tuple[int, Any]], parse: Callable[[Any], Example]) -> list[Example]:
    examples = []
    for number, row in rows:
        try:
            examples.append(parse(row))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return examples


def _check_prompt(prompt: object, chat: bool) -> None:
    if isinstance(prompt, list):
        if not chat:
            raise ValueError("prompt is a list of messages, which needs --chat")
        _check_messages(prompt)
    elif not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt must be a non-empty string, got {prompt!r:.40}")


def _check_messages(messages: list) -> None:
    if not messages:
        raise ValueError("prompt is an empty list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"prompt[{i}] must be a message with a role and a content, got {message!r:.40}")
        if message.get("role") not in ROLES:
            raise ValueError(f"prompt[{i}] must have a role of {', '.join(ROLES)}, got {message.get('role')!r:.40}")


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


def _as_floats(rewards: Any) -> Any:
    """Whole numbers as floats; one too large for that as an infinity, which is refused with the others."""
    if not isinstance(rewards, list):
        return rewards
    return [float(str(reward)) if type(reward) is int else reward for reward in rewards]


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
