"""The policy: a model from random weights or a trained one, with its tokenizer, and what of it is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from train.config import Config
from train.data import Example
from train.model import as_pretrained, build_model, train_tokenizer


def open_policy(
    config: Config, examples: Sequence[Example], folder: Path | None, attention: str | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model, the latter without adapters; from a checkpoint's folder where there is one."""
    torch.manual_seed(config.seed)
    if folder is None and not config.model:
        texts = (text for example in examples for text in (str(example.prompt), *example.completions))
        byte_pairs = train_tokenizer(texts, config.vocab_size)
        model = build_model(config, byte_pairs)
        if attention is not None:
            model.set_attn_implementation(attention)
        return as_pretrained(byte_pairs), model
    tokenizer = load_tokenizer(str(folder or config.model), config.chat)
    # A checkpoint has the adapters alone; what is below them comes from where it came at first.
    model = load_model(str(config.model if config.lora_rank else folder or config.model), config, attention)
    check_fit(model, tokenizer, config)
    return tokenizer, model


def load_tokenizer(name: str, chat: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; ValueError where it cannot end a completion or has no chat template asked for."""
    tokenizer = _loaded(AutoTokenizer, name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer has no EOS token, so that no completion could end")
    if tokenizer.pad_token_id is None:
        print(f"the tokenizer of {name} has no pad token: EOS fills up the batches, and is masked there")
        tokenizer.pad_token = tokenizer.eos_token
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"--chat: the tokenizer of {name} has no chat template")
    return tokenizer


def load_model(name: str, config: Config, attention: str | None) -> PreTrainedModel:
    """A causal model without dropout: a log-ratio of exactly zero at the start needs a function of the weights."""
    # What is trained stays float32 and is cast by autocast; what is frozen needs no such copy.
    dtype = torch.bfloat16 if config.lora_rank and config.dtype == "bfloat16" else torch.float32
    settings = _loaded(AutoConfig, name)
    for key, value in settings.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(settings, key, 0.0)
    return _loaded(AutoModelForCausalLM, name, config=settings, attn_implementation=attention, dtype=dtype)


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """ValueError where the texts exceed the model's context, or the tokens its vocabulary."""
    context = getattr(model.config, "max_position_embeddings", None)
    longest = config.max_prompt_tokens + config.max_completion_tokens
    if context is not None and longest > context:
        limits = f"--max-prompt-tokens {config.max_prompt_tokens} and --max-completion-tokens"
        raise ValueError(f"{limits} {config.max_completion_tokens} exceed the model's context of {context} tokens")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"--model {config.model}: {len(tokenizer)} tokens in its tokenizer, {rows} in its embedding")


def trained_part(config: Config, model: PreTrainedModel, folder: Path | None) -> nn.Module:
    """The model with what --lora-rank adds to it, new or from a checkpoint's folder, in the mode it is trained in."""
    trained: nn.Module = model
    if config.lora_rank and folder is not None:
        trained = require_peft().PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    elif config.lora_rank:
        trained = with_new_adapters(model, config)
    # Activations are recomputed in training mode only; there is no dropout that it could turn on.
    trained.train(config.gradient_checkpointing)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return trained


def with_new_adapters(model: PreTrainedModel, config: Config) -> nn.Module:
    """The model with low-rank adapters on --lora-targets and everything else frozen."""
    peft = require_peft()
    targets = config.lora_targets if config.lora_targets == "all-linear" else config.lora_targets.split(",")
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(f"--lora-targets {config.lora_targets}: {error}") from None
    if any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters()):
        raise ValueError(f"--lora-targets {config.lora_targets}: the head is to have no adapter")
    return adapted


def merge_adapters(model: Any) -> PreTrainedModel:
    """The model with its adapters folded into the weights; the adapted one is gone after that."""
    return model.merge_and_unload()


def without_wrapper(model: Any) -> PreTrainedModel:
    """The model of transformers, its adapters inside."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def require_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("--lora-rank needs the peft package, which is not installed") from None
    return peft


def pick_attention(config: Config, device: torch.device) -> str | None:
    """The implementation that packed sequences run on, None for padded ones and what transformers takes for these."""
    needs = {
        "the flash-attn package": importlib.util.find_spec("flash_attn") is not None,
        "a CUDA device": device.type == "cuda",
        "--dtype bfloat16": config.dtype == "bfloat16",
    }
    missing = [what for what, is_there in needs.items() if not is_there]
    if config.attention == "packed" and missing:
        raise ValueError(f"--attention packed needs {' and '.join(missing)}")
    return None if config.attention == "padded" or missing else "flash_attention_2"


def _loaded(auto: Any, name: str, **options: Any) -> Any:
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise ValueError(f"--model {name}: no such directory")
    try:
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "it cannot be loaded" if Path(name).exists() else "no such directory, and it cannot be had from the hub"
        raise ValueError(f"--model {name}: {what}: {reason}") from None
