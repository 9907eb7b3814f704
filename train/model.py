"""A tokenizer and a small GPT-2, both made from nothing: no weights and no vocabulary are fetched."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

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


def build_model(config: Config, tokenizer: Tokenizer) -> PreTrainedModel:
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


def head_inputs(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden_states (T, H) that predict batch.labels, and lm_head_weight (V, H): all the head needs.

    The model's own head is not called, so no logits are built here.
    """
    device_type = batch.input_ids.device.type
    with torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = model.base_model(batch.input_ids, attention_mask=batch.attention_mask)
    hidden_states = outputs.last_hidden_state.flatten(0, 1).index_select(0, batch.positions)
    return hidden_states.to(dtype), model.get_output_embeddings().weight.to(dtype)
