"""What TRL's trainers need on a CPU without a network: a tokenizer of words and a model of one layer."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

WORDS = "a b c d e f g h i j k l".split()
QUIET = dict(report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False, logging_steps=1)
# Steps large enough to show, and in proportion to the gradient.
STEPS = dict(max_steps=3, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0)


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    special = dict(bos_token_id=1, eos_token_id=1, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **special, initializer_range=0.3, num_key_value_heads=2))


def policy_with_reference(folder, seed: int = 0, reference_seed: int = 0) -> LlamaForCausalLM:
    """TRL loads the reference policy from where the policy's configuration says that it came from."""
    tiny_model(reference_seed).save_pretrained(folder)
    policy = tiny_model(seed)
    policy.config._name_or_path = str(folder)
    return policy


def count_of_a(completions, **_) -> list[float]:
    """A reward."""
    return [text.count("a") - 0.5 * text.count("b") + 0.01 * len(text) for text in completions]
