"""Text to token ids: prompts with what a model expects around them, completions with nothing but EOS behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from train.data import Prompt


def encode(tokenizer: Tokenizer | PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if isinstance(tokenizer, Tokenizer):
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def encode_prompt(tokenizer: Tokenizer | PreTrainedTokenizerBase, prompt: Prompt, limit: int) -> tuple[list[int], bool]:
    """At most `limit` token ids of a prompt, and whether that cut it.

    A text keeps its last tokens, next to the completion, behind the BOS that the tokenizer puts in front of texts.
    """
    assert isinstance(prompt, str)  # lists of messages come with --chat only
    start = _bos(tokenizer)
    ids = encode(tokenizer, [prompt])[0]
    if not ids:
        raise ValueError(f"a prompt has no tokens: {prompt!r:.80}")
    keep = limit - len(start)
    return start + ids[max(0, len(ids) - keep) :], len(ids) > keep


def encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, limit: int) -> list[int]:
    """Token ids of a prompt in the chat template, up to where the answer begins; a template is not to be cut."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = encode(tokenizer, [text])[0]
    if len(ids) > limit:
        raise ValueError(
            f"--max-prompt-tokens is {limit}, but in the chat template a prompt has {len(ids)} tokens: {prompt!r:.80}"
        )
    return ids


def _bos(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> list[int]:
    if isinstance(tokenizer, Tokenizer) or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
