"""The texts of the summarisation experiment: docstring bodies as prompts, summary lines as their completions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Tokenizer

from train.docstrings import summaries_by_body
from train.model import EOS_ID, train_tokenizer
from train.summarize_settings import Settings


@dataclass(frozen=True)
class Document:
    prompt_ids: list[int]  # the body's beginning and a newline
    summary_ids: list[int]  # EOS included, unless it was cut
    summary: str


class Splits(NamedTuple):
    """Disjoint prompts, each split for one use."""

    sft: list[Document]
    preferences: list[Document]  # reward model and offline data of the policies
    validation: list[Document]
    test: list[Document]


def read_documents(settings: Settings) -> tuple[Tokenizer, Splits]:
    """Docstrings of the installed packages, split at random, and a tokenizer of the two training splits."""
    pairs = list(summaries_by_body(settings.files_per_package).items())
    random.Random(0).shuffle(pairs)
    heldout = settings.validation_prompts + settings.test_prompts
    num_sft = round(settings.sft_share * (len(pairs) - heldout))
    if min(num_sft, len(pairs) - heldout - num_sft) < settings.data_prompts:
        raise ValueError(f"{len(pairs)} docstrings are too few: {heldout} are held out, {settings.data_prompts} "
                         "are the least for fine-tuning and as many for the policies")  # fmt: skip
    tokenizer = train_tokenizer((text for pair in pairs[heldout:] for text in pair), settings.vocab_size)
    documents = [to_document(tokenizer, *pair, settings) for pair in pairs]
    training, validation = documents[heldout:], settings.validation_prompts
    return tokenizer, Splits(
        training[:num_sft], training[num_sft:], documents[:validation], documents[validation:heldout]
    )


def to_document(tokenizer: Tokenizer, body: str, summary: str, settings: Settings) -> Document:
    """Bodies keep their beginning, where docstrings say what they are about. No body holds a newline."""
    body_ids, newline, summary_ids = (
        encoding.ids for encoding in tokenizer.encode_batch([body, "\n", summary], add_special_tokens=False)
    )
    prompt_ids = body_ids[: settings.max_prompt_tokens - len(newline)] + newline
    return Document(prompt_ids, (summary_ids + [EOS_ID])[: settings.max_completion_tokens], summary)


def others(documents: Sequence[Document], rng: random.Random) -> list[Document]:
    """For each document another one: its neighbour in a random circle."""
    order = rng.sample(range(len(documents)), len(documents))
    neighbour = dict(zip(order, order[1:] + order[:1], strict=True))
    return [documents[neighbour[i]] for i in range(len(documents))]
