"""integrations.transformers: the head of every family against the model's own logits, PEFT, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

from copg_kernels import linear_logps
from copg_kernels.integrations.transformers import hidden_states_of, read_head
from tests.numerics import assert_close, assert_logps_close, relative_error

VOCAB, SIZES = 61, dict(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=1, max_position_embeddings=32)
LLAMA_LIKE = SIZES | dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
GPT_LIKE = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1)
NO_DROPOUT = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
OPT = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.0)

# name: (configuration, settings, logit_scale, softcap, whether there is a bias)
FAMILIES: dict[str, tuple[str, dict[str, Any], float, float | None, bool]] = {
    "llama": ("LlamaConfig", LLAMA_LIKE, 1.0, None, False),
    "llama-tied": ("LlamaConfig", LLAMA_LIKE | dict(tie_word_embeddings=True), 1.0, None, False),
    "qwen2": ("Qwen2Config", LLAMA_LIKE, 1.0, None, False),
    "qwen3": ("Qwen3Config", LLAMA_LIKE, 1.0, None, False),
    "gemma": ("GemmaConfig", LLAMA_LIKE | dict(head_dim=8), 1.0, None, False),
    "gemma2": ("Gemma2Config", LLAMA_LIKE | dict(head_dim=8, final_logit_softcapping=3.0), 1.0, 3.0, False),
    "gemma3": ("Gemma3TextConfig", LLAMA_LIKE | dict(head_dim=8, final_logit_softcapping=3.0), 1.0, 3.0, False),
    "gemma3-uncapped": ("Gemma3TextConfig", LLAMA_LIKE | dict(head_dim=8), 1.0, None, False),
    "cohere": ("CohereConfig", LLAMA_LIKE | dict(logit_scale=0.3), 0.3, None, False),
    "cohere2": ("Cohere2Config", LLAMA_LIKE | dict(logit_scale=0.3), 0.3, None, False),
    "granite": ("GraniteConfig", LLAMA_LIKE | dict(logits_scaling=4.0), 0.25, None, False),
    "hyperclovax": ("HyperCLOVAXConfig", LLAMA_LIKE | dict(logits_scaling=0.25), 0.25, None, False),
    "falcon-h1": ("FalconH1Config", LLAMA_LIKE | MAMBA | dict(lm_head_multiplier=0.4), 0.4, None, False),
    "gpt2": ("GPT2Config", GPT_LIKE | NO_DROPOUT, 1.0, None, False),
    "gptj": ("GPTJConfig", GPT_LIKE | NO_DROPOUT | dict(rotary_dim=4), 1.0, None, True),
    "phi": ("PhiConfig", LLAMA_LIKE, 1.0, None, True),
    "opt": ("OPTConfig", SIZES | OPT, 1.0, None, False),
    "nanochat": ("NanoChatConfig", LLAMA_LIKE | dict(final_logit_softcapping=3.0), 1.0, 3.0, False),
}


def make_model(family: str, **changes: Any) -> Any:
    """Random weights, biases too, and logits of a few nats: a cap of 3 and every scale matter."""
    name, settings, *_ = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings | changes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
        states = hidden_states_of(model, input_ids=torch.arange(1, 9)[None])
        head = model.get_output_embeddings()
        head.weight *= 6 / (states @ head.weight.T).std()
    return model.eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two sequences; the second is padded on the right."""
    input_ids = torch.randint(2, VOCAB, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def next_tokens(batch) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return labels[:, 1:]


def own_logps(model, batch) -> torch.Tensor:
    """From the logits of the model's own forward, in its own precision."""
    labels = next_tokens(batch)
    logps = model(**batch).logits[:, :-1].log_softmax(-1)
    return logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)


def fused_logps(model, batch) -> torch.Tensor:
    head, hidden_states = read_head(model), hidden_states_of(model, **batch)
    return linear_logps(hidden_states[:, :-1], head.lm_head_weight, next_tokens(batch), **head.options())


def double(model) -> Any:
    return copy.deepcopy(model).double()


def assert_same_logps(model, batch) -> None:
    truth = double(model)
    with torch.no_grad():
        largest = truth(**batch).logits.abs().max().item()
        gold, base = own_logps(truth, batch), own_logps(model, batch)
        assert_logps_close("logps", fused_logps(model, batch), base, gold, largest)


def assert_same_gradients(model, batch) -> None:
    """Of every trainable parameter, for one upstream gradient per token; exactly those that train get one."""
    upstream, truth = torch.randn(next_tokens(batch).shape), double(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    grads = []
    for logps, owner in ((own_logps, truth), (own_logps, model), (fused_logps, model)):
        owner.zero_grad()
        (logps(owner, batch) * upstream).sum().backward()
        found = {name: parameter.grad for name, parameter in owner.named_parameters() if parameter.grad is not None}
        assert list(found) == trained
        grads.append({name: grad.clone() for name, grad in found.items()})
    gold, base, actual = grads
    for name in trained:
        assert_close(name, actual[name], base[name], gold[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_of_every_family(family, batch):
    *_, logit_scale, softcap, has_bias = FAMILIES[family]
    model = make_model(family)
    head = read_head(model)
    assert (head.logit_scale, head.softcap, head.bias is not None) == (logit_scale, softcap, has_bias)
    assert head.lm_head_weight.shape == (VOCAB, 32)
    assert_same_logps(model, batch)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma2", "granite"])
def test_gradients(family, batch):
    assert_same_gradients(make_model(family), batch)


def test_the_models_own_head_is_not_called(batch, monkeypatch):
    model, forward, called = make_model("llama"), nn.Linear.forward, []
    read_head(model)  # compares with the model's own logits, once

    def spy(linear, x):
        called.append(linear)
        return forward(linear, x)

    monkeypatch.setattr(nn.Linear, "forward", spy)
    fused_logps(model, batch)
    assert model.model.layers[0].self_attn.q_proj in called and model.lm_head not in called


def test_bfloat16_and_autocast_give_operands_of_one_dtype(batch):
    model = make_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert hidden_states_of(model, **batch).dtype == read_head(model).lm_head_weight.dtype == torch.bfloat16
        autocast = fused_logps(model, batch)
    torch.testing.assert_close(autocast, fused_logps(model, batch), atol=0.3, rtol=0)
    model = model.bfloat16()
    assert hidden_states_of(model, **batch).dtype == read_head(model).lm_head_weight.dtype == torch.bfloat16


def test_the_check_leaves_the_model_as_it_was():
    model = make_model("llama").train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    read_head(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.model._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_asked_once():
    model, calls = make_model("llama"), []
    model.register_forward_hook(lambda *args: calls.append(1))
    read_head(model)
    read_head(model)
    assert calls == [1]


def with_lora(model, **settings):
    peft = pytest.importorskip("peft")
    settings = dict(r=4, lora_alpha=6, lora_dropout=0.0, init_lora_weights=False) | settings
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return wrapped.eval()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lora_anywhere_but_the_head_leaves_the_head_frozen(family, batch):
    model = with_lora(make_model(family), target_modules=["q_proj", "down_proj"])
    assert not read_head(model).lm_head_weight.requires_grad
    assert_same_logps(model, batch)
    assert_same_gradients(model, batch)


@pytest.mark.parametrize("family", ["llama", "phi", "cohere"])
def test_lora_on_the_head(family, batch):
    model = with_lora(make_model(family, tie_word_embeddings=False), target_modules=["q_proj", "lm_head"])
    assert read_head(model).lm_head_weight.shape == (VOCAB, 32 + 4)
    assert_same_logps(model, batch)
    assert_same_gradients(model, batch)


def test_two_adapters_on_the_head_add_up(batch):
    peft = pytest.importorskip("peft")
    model = with_lora(make_model("llama"), target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    one_adapter = fused_logps(model, batch)
    model.base_model.set_adapter(["default", "second"])
    assert read_head(model).lm_head_weight.shape == (VOCAB, 32 + 4 + 2)
    assert_same_logps(model, batch)
    assert not torch.allclose(fused_logps(model, batch), one_adapter)


def test_merged_and_disabled_adapters(batch):
    plain = make_model("llama")
    plain_logps = fused_logps(plain, batch)
    model = with_lora(plain, target_modules=["q_proj", "lm_head"])
    adapted_logps = fused_logps(model, batch)
    assert not torch.allclose(adapted_logps, plain_logps)
    with model.disable_adapter():
        assert torch.equal(fused_logps(model, batch), plain_logps)
    model.merge_adapter()
    assert read_head(model).lm_head_weight.shape == (VOCAB, 32)
    torch.testing.assert_close(fused_logps(model, batch), adapted_logps)
    with model.disable_adapter():
        torch.testing.assert_close(fused_logps(model, batch), plain_logps)


def test_a_small_adapter_of_the_head_survives_bfloat16(batch):
    """s B A of 2^-12 of W: added to W in bfloat16 it would be rounded away."""
    model = with_lora(make_model("llama"), target_modules=["lm_head"]).bfloat16()
    head = model.base_model.model.lm_head
    with torch.no_grad():
        head.lora_B["default"].weight *= 2**-12 * head.weight.norm() / head.get_delta_weight("default").norm()
        hidden_states, labels = hidden_states_of(model, **batch)[:, :-1], next_tokens(batch)
        adapted = linear_logps(hidden_states, read_head(model).lm_head_weight, labels)
        with model.disable_adapter():
            plain = linear_logps(hidden_states_of(model, **batch)[:, :-1], read_head(model).lm_head_weight, labels)
        x, W, A, B = (t.double() for t in (hidden_states[..., :32], head.weight, *lora_matrices(head)))
        truth = linear_logps(x, W + 1.5 * B @ A, labels) - linear_logps(x, W, labels)
    assert relative_error(adapted - plain, truth) < 2**-5
    rounded = linear_logps(x, (W + 1.5 * B @ A).bfloat16().double(), labels) - linear_logps(x, W, labels)
    assert relative_error(rounded, truth) > 0.5


def lora_matrices(head):
    return head.lora_A["default"].weight, head.lora_B["default"].weight


def test_dropout_of_lora_on_the_head_is_the_models_own(batch):
    model = with_lora(make_model("llama"), target_modules=["lm_head"], lora_dropout=0.5)
    read_head(model)
    model.train()
    torch.manual_seed(0)
    fused = fused_logps(model, batch)
    torch.manual_seed(0)
    torch.testing.assert_close(fused, own_logps(model, batch))


def test_modules_to_save_reads_the_active_copy(batch):
    model = with_lora(make_model("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.base_model.model.lm_head
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.normal_()
    assert read_head(model).lm_head_weight is wrapper.modules_to_save["default"].weight
    assert_same_logps(model, batch)
    assert_same_gradients(model, batch)
    with model.disable_adapter():
        assert read_head(model).lm_head_weight is wrapper.original_module.weight


class ScaledHead(transformers.LlamaForCausalLM):
    """A model this library knows nothing about."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * self.config.output_multiplier
        return outputs


def unknown_model(output_multiplier: float):
    config = transformers.LlamaConfig(**LLAMA_LIKE, output_multiplier=output_multiplier)
    config.model_type = "mystery"
    return ScaledHead(config)


def test_an_unknown_model_is_accepted_only_where_its_logits_agree(batch):
    assert_same_logps(unknown_model(1.0), batch)
    with pytest.raises(ValueError, match=r"mystery.*not understood: its logits differ.*'output_multiplier': 0.5"):
        read_head(unknown_model(0.5))


def test_a_cap_shows_however_small_the_logits_are():
    model = make_model("gemma2", final_logit_softcapping=50.0)
    with torch.no_grad():
        model.lm_head.weight *= 1e-3
    assert read_head(model).softcap == 50.0
    model.config.model_type = "mystery"
    with pytest.raises(ValueError, match="its logits differ"):
        read_head(model)


def test_a_body_that_its_own_model_calls_otherwise_is_refused():
    model = make_model("llama")
    own_forward = model.forward
    model.forward = lambda input_ids, attention_mask, **kwargs: own_forward(
        input_ids=input_ids.flip(1), attention_mask=attention_mask, **kwargs
    )
    with pytest.raises(ValueError, match="its hidden states differ"):
        read_head(model)


def set_head(model, head) -> Any:
    model.lm_head = head
    return model


class SquashedHead(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x.tanh(), self.weight)


def test_other_heads_are_refused():
    model = make_model("llama")
    with pytest.raises(ValueError, match="must be a torch.nn.Linear, got .*Sequential"):
        read_head(set_head(model, nn.Sequential(nn.Linear(32, VOCAB))))
    with pytest.raises(ValueError, match="must be a torch.nn.Linear, got .*SquashedHead"):
        read_head(set_head(model, SquashedHead(32, VOCAB)))
    with pytest.raises(ValueError, match="must be in memory.*meta"):
        read_head(set_head(model, nn.Linear(32, VOCAB, device="meta")))
    with pytest.raises(ValueError, match="ordinary floating-point tensor, got Parameter of torch.float8"):
        head = nn.Linear(32, VOCAB)
        head.weight = nn.Parameter(head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        read_head(set_head(model, head))
    with pytest.raises(ValueError, match="cannot be checked"):
        read_head(set_head(model, nn.Linear(32, VOCAB).requires_grad_(False).apply(lambda m: m.weight.zero_())))


def test_hooks_and_replaced_forwards_of_the_head_are_refused():
    model = make_model("llama")
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output / 2)
    with pytest.raises(ValueError, match="no forward hooks.*got 1"):
        read_head(model)
    handle.remove()
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    with pytest.raises(ValueError, match="no forward hooks.*got 1"):
        read_head(model)
    handle.remove()
    model.lm_head.forward = lambda x: x
    with pytest.raises(ValueError, match="replaced on the instance"):
        read_head(model)


def test_models_without_a_head_and_wrappers_are_refused(batch):
    model = make_model("llama")
    with pytest.raises(TypeError, match="without another wrapper .*got DataParallel"):
        read_head(nn.DataParallel(model))
    with pytest.raises(ValueError, match="LlamaModel has none"):
        read_head(model.model)
    with pytest.raises(TypeError, match="must not hold labels"):
        hidden_states_of(model, **batch, labels=batch["input_ids"])
    bert = transformers.BertConfig(**{**LLAMA_LIKE, "is_decoder": True, "num_key_value_heads": None})
    with pytest.raises(ValueError, match="BertLMHeadModel .*not understood"):
        read_head(transformers.BertLMHeadModel(bert))


def test_adapters_that_cannot_be_read_are_refused(batch):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="plain W \\+ s B A, adapter 'default'.*use_dora"):
        read_head(with_lora(make_model("llama"), target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ValueError, match="must have no bias, adapter 'default'.*lora_bias=False"):
        read_head(with_lora(make_model("phi"), target_modules=["lm_head"], lora_bias=True))
    ia3 = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    with pytest.raises(ValueError, match="must be LoRA, got peft.tuners.ia3.*modules_to_save"):
        read_head(peft.get_peft_model(make_model("llama"), ia3))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt learning: adapter 'default'"):
        hidden_states_of(peft.get_peft_model(make_model("llama"), prompt), **batch)
