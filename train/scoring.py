"""The user's reward function: found by name, called with a prompt and its samples, and held to its contract.

    def reward(prompt: str, completions: list[str], **row) -> list[float]

`prompt` is the data's, a list of messages where it is one there; `row` has the row's other columns. What comes back is
one finite number per completion.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.data import Example

RewardFunction = Callable[..., Sequence[float]]


class RewardError(Exception):
    """The reward function failed on a prompt, which the message names."""


def load_reward(name: str) -> RewardFunction:
    """The function `module:function`, from the current directory or wherever Python finds the module."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"--reward must be module:function, got {name!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise whatever it likes
        raise ValueError(f"--reward {name}: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--reward {name}: {module_name} has no function {function_name!r}")
    return function


def score(reward: RewardFunction, example: Example, completions: list[str]) -> list[float]:
    """The rewards of completions; RewardError names the prompt where there are none to be had."""
    about = f"for the prompt {example.prompt!r:.200}"
    try:
        returned: Any = reward(example.prompt, completions, **example.columns)
        rewards = [float(value) for value in returned]
    except Exception as error:  # the user's code may raise whatever it likes
        raise RewardError(f"the reward function raised {type(error).__name__}: {error} {about}") from error
    if len(rewards) != len(completions):
        raise RewardError(f"the reward function gave {len(rewards)} rewards for {len(completions)} completions {about}")
    for value, completion in zip(rewards, completions, strict=True):
        if not math.isfinite(value):
            raise RewardError(f"the reward function gave {value} to {completion!r:.80} {about}")
    return rewards
