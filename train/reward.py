"""The reward of the docstring task: how many words a completion shares with the true summary line."""

from __future__ import annotations

import re
from collections import Counter


def words(text: str) -> list[str]:
    """Lower-case runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.lower())


def token_f1(completion: str, truth: str) -> float:
    """Harmonic mean of precision and recall over the two multisets of words; 0 where nothing is shared."""
    candidate, target = Counter(words(completion)), Counter(words(truth))
    shared = (candidate & target).total()
    if shared == 0:
        return 0.0
    return 2 * shared / (candidate.total() + target.total())
