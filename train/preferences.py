"""Preference pairs that a reward model can learn from, by kind, without a human: the true line is the judge."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers import Tokenizer

from train.batch import Group
from train.documents import Document, others
from train.model import EOS_ID
from train.reward import token_f1

KINDS = ("true over another's", "true over sample", "sample over sample")


def preference_pairs(
    documents: Sequence[Document], samples: Sequence[list[list[int]]], tokenizer: Tokenizer, seed: int
) -> dict[str, list[Group]]:
    """kind -> pairs, as groups whose first completion is the preferred one (reward 1 against 0).

    Per document one pair of each kind:
      true over another's   the summary line against that of another document: teaches what the body is about;
      true over sample      against a sample of the policy: teaches what a summary line reads like;
      sample over sample    of the samples, the one that shares most words with the true line (token_f1) against the
                            one that shares fewest; none where all share equally many.
    """
    rng = random.Random(seed)
    pairs: dict[str, list[Group]] = {kind: [] for kind in KINDS}
    for document, other, drawn in zip(documents, others(documents, rng), samples, strict=True):
        pairs[KINDS[0]].append(_pair(document, document.summary_ids, other.summary_ids))
        pairs[KINDS[1]].append(_pair(document, document.summary_ids, rng.choice(drawn)))
        ranked = sorted(drawn, key=lambda ids: overlap(ids, document, tokenizer))
        if overlap(ranked[0], document, tokenizer) < overlap(ranked[-1], document, tokenizer):
            pairs[KINDS[2]].append(_pair(document, ranked[-1], ranked[0]))
    return pairs


def overlap(completion_ids: list[int], document: Document, tokenizer: Tokenizer) -> float:
    """token_f1 of a completion with the true line."""
    return token_f1(tokenizer.decode([token for token in completion_ids if token != EOS_ID]), document.summary)


def _pair(document: Document, better: list[int], worse: list[int]) -> Group:
    return Group(document.prompt_ids, [better, worse], [1.0, 0.0])
