"""A tokenizer and a small GPT-2, both made from nothing; and what the head needs of any causal model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from copg_kernels.integrations.transformers import HeadInputs, hidden_states_of, read_head
from train.batch import Batch
from train.config import Config

PAD, EOS = "<|pad|>", "<|eos|>"
# A trained vocabulary begins with its special tokens, in the order given to the trainer.
PAD_ID, EOS_ID = 0, 1


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over the texts: every string has an encoding, whatever it was trained on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer with the interface and the files of transformers."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def build_model(config: Config, tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """Random weights from the seed, no dropout, input and output embeddings tied as in GPT-2."""
    torch.manual_seed(config.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            n_positions=config.max_prompt_tokens + config.max_completion_tokens,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            # A log-ratio of exactly zero at the start needs a policy that is a function of its weights.
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            pad_token_id=PAD_ID,
            bos_token_id=EOS_ID,
            eos_token_id=EOS_ID,
            use_cache=False,
        )
    )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products of the transformer in bfloat16, where that is the dtype; nothing else."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def head_operands(model: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, HeadInputs]:
    """hidden_states (T, H) that predict batch.labels, and the head's weight, bias, scale and cap.

    The model's own head is not called, so no logits are built here.
    """
    inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    given = {name: value for name, value in inputs.items() if value is not None}
    with autocast(batch.input_ids.device, dtype):
        hidden_states = hidden_states_of(model, input_ids=batch.input_ids, **given)
        head = read_head(model)
    return hidden_states.flatten(0, 1).index_select(0, batch.positions), head


def head_inputs(model: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden_states (T, H) and lm_head_weight (V, H), where these two are all of the head."""
    hidden_states, head = head_operands(model, batch, dtype)
    if head.bias is not None or head.logit_scale != 1 or head.softcap is not None:
        raise ValueError(f"the head of {type(model).__name__} is more than a product with its weight")
    return hidden_states, head.lm_head_weight
