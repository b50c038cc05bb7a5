"""The shared prefix compares itself with TRL's forward pass, and names what differs."""

import copy
import logging
import re

import peft
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from rlkit.errors import UserError
from rlkit.training.probe import check_batch
from tests.quick import TINY_MODEL
from tests.rlkit.training.recorded_steps import Judge

SIZES = TINY_MODEL | {"max_position_embeddings": 128}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

# Families that share prompts, with the settings of a tiny model.
DENSE = [
    *("apertus", "arcee", "bitnet", "cohere", "diffllama", "ernie4_5", "gemma", "glm", "glm4", "gpt_neox"),
    *("granite", "helium", "hunyuan_v1_dense", "jais2", "llama", "mistral", "nanochat", "olmo", "olmo2"),
    *("persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2"),
]
MIXTURES = [
    *("flex_olmo", "glm4_moe", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "minimax_m2", "mixtral"),
    *("olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
]
SHARED = {
    **{kind: {"sliding_window": None} for kind in DENSE},
    **{kind: EXPERTS | {"sliding_window": None} for kind in MIXTURES},
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt-sw3"), GPT),
    "ctrl": GPT | {"dff": 48},
    "deepseek_v3": EXPERTS | LATENT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
# Families that do not, and a part of the reason.
UNSHARED = {
    "biogpt": ({}, "attention interface"),
    "bloom": ({}, "has no sdpa"),
    "cohere2": ({}, "sliding_attention"),
    "doge": ({}, "model.layers.0.self_attn changes the attention mask"),
    "exaone4": ({}, "sliding_attention"),
    "gemma2": ({}, "sliding_attention"),
    "gemma3_text": ({}, "sliding_attention"),
    "gpt_oss": (EXPERTS, "attn_implementation is eager"),
    "gptj": (GPT | {"rotary_dim": 8}, "has no sdpa"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "conv"),
    "mamba": ({}, "recurrent"),
    "minimax": (EXPERTS | {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "has no sdpa"),
    "nemotron": ({}, "model.layers.0.self_attn (and 1 more) computes attention without the layout"),
    "olmo3": ({}, "sliding_attention"),
    "stablelm": ({}, "attention interface"),
    "vaultgemma": ({}, "sliding_attention"),
    "xglm": ({"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2}, "has no sdpa"),
}


def build(kind, **options):
    """Return a tiny model whose norms, biases and gates are not those of an untrained model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | options))
    return randomized(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def randomized(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def trainer_of(make_trainer):
    """Return a function that builds a trainer of a model."""
    return lambda model, **options: make_trainer({"judge": Judge(())}, model=model, **options)


@pytest.fixture
def reasons(caplog):
    """Return a function that returns the reasons in the warnings about the shared prefix."""
    caplog.set_level(logging.WARNING)
    return lambda: [r.message for r in caplog.records if "shared_prefix is off" in r.message]


def both_ways(trainer, batch):
    """Return scores and gradients of a batch with a shared prefix, and by TRL's forward pass."""
    weights = torch.randn(len(batch.input_ids), batch.completion_length, generator=torch.Generator())
    results = []
    for shared in (True, False):
        trainer.shared_prefix = shared
        trainer.model.zero_grad()
        scores = trainer.padded_scores(trainer.model, *batch)
        loss = (scores.log_probs * weights).sum()
        if scores.aux_loss is not None:
            loss = loss + 10 * scores.aux_loss
        loss.backward()
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        results.append((scores, torch.cat(gradients)))
    return results


def assert_equal_both_ways(trainer, batch):
    (actual, actual_gradient), (expected, expected_gradient) = both_ways(trainer, batch)
    assert (actual.log_probs - expected.log_probs).abs().max() < 1e-4
    assert (actual.entropies - expected.entropies).abs().max() < 1e-4
    assert (actual_gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()
    assert expected_gradient.norm() > 0
    assert (actual.aux_loss is None) == (expected.aux_loss is None)
    if actual.aux_loss is not None:
        assert actual.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-5)


@pytest.mark.parametrize("kind", SHARED)
def test_shared_families_give_the_scores_and_gradients_of_the_padded_forward(trainer_of, reasons, kind):
    trainer = trainer_of(build(kind, **SHARED[kind]))
    assert trainer.shared_prefix, reasons()
    trainer.model.eval()
    batch = check_batch(trainer.model, (11, 3, 7), (4, 9, 5, 1, 9, 2), torch.device("cpu"))
    assert_equal_both_ways(trainer, batch)


@pytest.mark.parametrize("kind", UNSHARED)
def test_other_families_fall_back_with_a_reason(trainer_of, reasons, kind):
    options, reason = UNSHARED[kind]
    trainer = trainer_of(build(kind, **options))
    assert not trainer.shared_prefix
    assert len(reasons()) == 1
    assert reason in reasons()[0]


@pytest.mark.parametrize("kind", ["doge", "nemotron", "minimax", "mpt", "gpt2", "granitemoe", "mixtral"])
def test_step_trains_whether_or_not_prompts_are_shared(trainer_of, kind):
    options = SHARED[kind] if kind in SHARED else UNSHARED[kind][0]
    trainer = trainer_of(build(kind, **options))
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_loss_shares_prompts_too(trainer_of, kind):
    """TRL asks for an auxiliary loss only in the loss."""
    trainer = trainer_of(build(kind, **SHARED[kind]), steps_per_generation=2)
    shapes = {True: set(), False: set()}
    layer = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    layer.register_forward_hook(lambda m, args, out: shapes[torch.is_grad_enabled()].add(args[0].shape[0]))
    with torch.no_grad():
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        shapes[False].clear()  # of sampling
        trainer.token_log_probs(trainer.model, batch)
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch)
    assert shapes == {True: {1}, False: {1}}


# --- Models with faults -------------------------------------------------------------------------------------


class DropsKeywords(LlamaDecoderLayer):
    """Layer of a custom model that hands no extra keywords on to attention."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        kept = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        return super().forward(hidden_states, **kept)


class TokenShift(LlamaDecoderLayer):
    """Layer that mixes each token with the one before it."""

    def forward(self, hidden_states, **kwargs):
        shifted = torch.nn.functional.pad(hidden_states, (0, 0, 1, -1))
        return super().forward(hidden_states + 0.3 * shifted, **kwargs)


class Convolution(LlamaDecoderLayer):
    """Layer with a causal convolution before its feed-forward network."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.conv = torch.nn.Conv1d(config.hidden_size, config.hidden_size, 3, groups=config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        padded = torch.nn.functional.pad(hidden_states.transpose(1, 2), (2, 0))
        return super().forward(hidden_states, **kwargs) + self.conv(padded).transpose(1, 2)


class IgnoresMask(LlamaAttention):
    """Attention that calls torch itself and is causal along the row, whatever the mask says."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        output = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


class BiasByColumn(LlamaAttention):
    """Attention with ALiBi whose distances are those of columns."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        columns = torch.arange(hidden_states.shape[1])
        bias = -0.1 * (columns[:, None] - columns).abs().float()[None, None]
        causal = torch.ones_like(bias, dtype=torch.bool).tril()
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            causal = causal & attention_mask
        attention_mask = bias.masked_fill(~causal, -1e9)
        return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)


class ScalesByColumn(LlamaAttention):
    """Attention that scales its input by the column, which no mask shows."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        scale = 1 + 0.05 * torch.arange(hidden_states.shape[1])[:, None].flip(0)
        return super().forward(
            hidden_states * scale.to(hidden_states.dtype), position_embeddings, attention_mask, **kwargs
        )


class AttendsBothWays(LlamaAttention):
    """Attention of an encoder."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.is_causal = False


class RotatesByColumn(LlamaRotaryEmbedding):
    """Rotary embedding that ignores position ids."""

    def forward(self, x, position_ids):
        return super().forward(x, torch.arange(x.shape[1])[None].expand_as(position_ids))


class PositionsFromLength(LlamaModel):
    """Model that adds absolute positions counted from the row's length."""

    def forward(self, input_ids=None, **kwargs):
        embeddings = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1]).flip(0)[:, None] / 10
        return super().forward(inputs_embeds=embeddings + positions.sin().to(embeddings.dtype), **kwargs)


class RefusesMasks(LlamaModel):
    """Model that only takes padding masks."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"mask of shape {tuple(attention_mask.shape)}")
        return super().forward(input_ids, attention_mask, **kwargs)


class AddsKey(LlamaAttention):
    """Attention with a key and a value of its own (an attention sink)."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        def attend(module, query, key, value, mask, **options):
            key, value = (torch.nn.functional.pad(x, (0, 0, 1, 0)) for x in (key, value))
            if mask is None:
                mask = torch.ones(query.size(2), query.size(2), dtype=torch.bool).tril()[None, None]
            mask = torch.nn.functional.pad(mask, (1, 0), value=True)
            return AttentionInterface()["sdpa"](module, query, key, value, mask, **options)

        AttentionInterface.register("with_sink", attend)
        config, self.config = self.config, copy.copy(self.config)
        self.config._attn_implementation_internal = "with_sink"
        try:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        finally:
            self.config = config


class ShiftsInTraining(TokenShift):
    """Layer that mixes tokens only in training mode, as experts with a limited capacity do."""

    def forward(self, hidden_states, **kwargs):
        layer = super() if self.training else super(TokenShift, self)
        return layer.forward(hidden_states, **kwargs)


class BatchNorm(LlamaDecoderLayer):
    """Layer that normalizes over all tokens of a batch in training mode."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.norm = torch.nn.BatchNorm1d(config.hidden_size)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, hidden_states, **kwargs):
        normed = self.norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        return super().forward(self.dropout(normed), **kwargs)


class DropsKeywordsInCheckpoints(LlamaDecoderLayer):
    """Layer of a custom model that hands extra keywords on, but not with gradient checkpointing."""

    def __call__(self, *args, layout=None, **kwargs):
        if self.gradient_checkpointing and self.training:
            layout = None
        return super().__call__(*args, **kwargs, layout=layout)


class DropsKeywordsWithGradients(LlamaDecoderLayer):
    """Layer that hands extra keywords on only if no gradients are computed."""

    def __call__(self, *args, layout=None, **kwargs):
        return super().__call__(*args, **kwargs, layout=None if torch.is_grad_enabled() else layout)


def replace_layer(kind):
    return lambda model, i: model.model.layers.__setitem__(i, kind(model.config, i))


def replace_attention(kind):
    return lambda model, i: setattr(model.model.layers[i], "self_attn", kind(model.config, i))


def replace_model(kind):
    return lambda model, i: setattr(model, "model", kind(model.config))


FAULTS = {
    "drops keywords": (replace_layer(DropsKeywords), "model.layers.2.self_attn computes attention without"),
    "token shift": (replace_layer(TokenShift), "the first that differs is the input of model.layers.2.input"),
    "convolution": (replace_layer(Convolution), "the first that differs is model.layers.2"),
    "ignores mask": (replace_attention(IgnoresMask), "model.layers.2.self_attn"),
    "bias by column": (
        replace_attention(BiasByColumn),
        "model.layers.2.self_attn changes the attention mask",
    ),
    "scale by column": (replace_attention(ScalesByColumn), "model.layers.2.self_attn"),
    "both ways": (replace_attention(AttendsBothWays), "model.layers.2.self_attn attends in both directions"),
    "rotates by column": (
        lambda model, i: setattr(model.model, "rotary_emb", RotatesByColumn(model.config)),
        "the first that differs is model.rotary_emb",
    ),
    "positions from length": (replace_model(PositionsFromLength), "the input of model.layers.0"),
    "refuses masks": (replace_model(RefusesMasks), "model raises ValueError: mask of shape (1, 1, 1, 1)"),
}


MORE_FAULTS = {
    "adds a key": (replace_attention(AddsKey), "model.layers.2.self_attn attends to other keys than those"),
    "shifts in training": (
        replace_layer(ShiftsInTraining),
        "in training mode, it changes log-probabilities .* the input of model.layers.2.input",
    ),
    "drops keywords in checkpoints": (
        replace_layer(DropsKeywordsInCheckpoints),
        r"in training mode, model\.layers\.2\.self_attn computes attention without",
    ),
    "drops keywords with gradients": (
        replace_layer(DropsKeywordsWithGradients),
        r"in training mode, model\.layers\.2\.self_attn computes attention without",
    ),
    "batch norm": (replace_layer(BatchNorm), "in training mode, .* the input of model.layers.2.dropout"),
}


def build_faulty(name, **options):
    """Return a model of four layers, of which only the third has a fault."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": 4, "attn_implementation": "sdpa"} | options))
    model = LlamaForCausalLM(config)
    (FAULTS | MORE_FAULTS)[name][0](model, 2)
    return randomized(model)


@pytest.mark.parametrize("initializer_range", [0.3, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAULTS)
def test_faulty_layer_is_caught_and_named(trainer_of, reasons, name, dtype, initializer_range):
    """Weights in half precision are converted to float32 for a moment, so the check is as exact."""
    trainer = trainer_of(build_faulty(name, initializer_range=initializer_range).to(dtype))
    assert not trainer.shared_prefix
    assert FAULTS[name][1] in reasons()[0]


@pytest.mark.parametrize("name", MORE_FAULTS)
def test_less_common_fault_is_caught_and_named(trainer_of, reasons, name):
    model = build_faulty(name)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    hooks = len(model.get_input_embeddings()._forward_hooks)
    trainer = trainer_of(model, gradient_checkpointing=True)
    assert not model.is_gradient_checkpointing  # until training begins
    assert len(model.get_input_embeddings()._forward_hooks) == hooks
    assert not trainer.shared_prefix
    assert re.search(MORE_FAULTS[name][1], reasons()[0])
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("name", ["token shift", "rotates by column"])
def test_faulty_layer_under_lora_is_caught(trainer_of, reasons, name):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    assert not trainer_of(peft.get_peft_model(build_faulty(name), config)).shared_prefix
    assert "model.layers.2.input" in reasons()[0] or "model.rotary_emb" in reasons()[0]


@pytest.mark.parametrize("name", ["token shift", "rotates by column", "scale by column"])
def test_faulty_layer_under_autocast_is_caught(trainer_of, name):
    assert not trainer_of(build_faulty(name), bf16=True).shared_prefix


def test_rounding_in_a_deep_model_is_tolerated(trainer_of, reasons):
    """Padding alone changes the log-probabilities of this model by more than 1e-4."""
    model = build("llama", num_hidden_layers=48, initializer_range=1.0, rms_norm_eps=1e-9)
    assert trainer_of(model).shared_prefix, reasons()


# --- What the check leaves as it was ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", [False, True])
def test_check_changes_neither_weights_nor_modes_nor_random_states(trainer_of, dtype, lora):
    model = build("llama").to(dtype)
    if lora:
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
        model = peft.get_peft_model(model, config)
    trainer = trainer_of(model, bf16=dtype == torch.bfloat16, gradient_checkpointing=True)
    trainer.model.train()
    list(trainer.model.modules())[-1].eval()
    modes = [module.training for module in trainer.model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()]
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    trainer.shared_prefix = False
    trainer.prefix.enable(share=True)
    assert trainer.shared_prefix
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in trainer.model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()] == hooks
    after = trainer.model.state_dict()
    assert all(
        torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items()
    )
    assert all(p.grad is None for p in trainer.model.parameters())


def test_check_keeps_buffers_of_dynamic_rotary_embeddings(trainer_of):
    model = build("llama", rope_parameters=ROPES["dynamic"], max_position_embeddings=16)
    trainer = trainer_of(model)
    rotary = model.model.rotary_emb
    with torch.no_grad():
        model(torch.randint(3, 99, (1, 40)))
    grown = rotary.inv_freq.clone()
    trainer.prefix.enable(share=True)
    assert torch.equal(rotary.inv_freq, grown)


# --- Numbers ------------------------------------------------------------------------------------------------

ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 6.0],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("completion", [3, 5, 6, 7, 30])
@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_of_long_contexts_are_those_of_the_longest_rollout(trainer_of, kind, completion):
    """They depend on the largest position: a prompt of 10 tokens and 7 more exceed the original 16."""
    length = 16 if kind == "dynamic" else 64
    trainer = trainer_of(build("llama", rope_parameters=ROPES[kind], max_position_embeddings=length))
    assert trainer.shared_prefix
    trainer.model.eval()
    batch = check_batch(trainer.model, (10, 2), (completion, 1, 2, 30), torch.device("cpu"))
    assert_equal_both_ways(trainer, batch)
    short = check_batch(trainer.model, (10, 2), (completion, 1, 2, 3), torch.device("cpu"))
    assert_equal_both_ways(trainer, short)


@pytest.mark.parametrize("kind", ["gpt2", "ctrl", "hunyuan_v1_dense", "biogpt"])
def test_padding_does_not_change_log_probs_without_a_shared_prefix(trainer_of, kind):
    """TRL passes no position ids, so the positions of these models would count the padding."""
    trainer = trainer_of(build(kind, **SHARED.get(kind, {})), shared_prefix=False)
    trainer.model.eval()
    ids, mask, length = check_batch(trainer.model, (7, 2), (4, 4, 4, 4), torch.device("cpu"))
    with torch.no_grad():
        padded = trainer.padded_scores(trainer.model, ids, mask, length).log_probs[2:]
        alone = trainer.padded_scores(trainer.model, ids[2:, 5:], mask[2:, 5:], length).log_probs
    assert (padded - alone).abs().max() < 1e-4


def test_layer_that_loses_the_layout_after_the_check_stops_the_run(trainer_of):
    """Its attention would otherwise treat the long row as one sequence."""
    trainer = trainer_of(build("llama"))
    assert trainer.shared_prefix
    trainer.model.model.layers[1] = DropsKeywords(trainer.model.config, 1)
    batch = check_batch(trainer.model, (7, 2), (4, 4, 4, 4), torch.device("cpu"))
    with pytest.raises(UserError, match="without the layout of the shared row: set shared_prefix"):
        trainer.prefix.score(trainer.model, *batch)
    trainer.prefix.with_position_ids(trainer.model)(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    )  # calls without a shared row are not affected


def test_auxiliary_loss_that_trl_cannot_compute_is_turned_off(trainer_of, caplog):
    """granitemoe returns no router logits; TRL's loss would fail."""
    trainer = trainer_of(build("granitemoe", **SHARED["granitemoe"]), shared_prefix=False)
    assert not trainer.aux_loss_enabled
    assert [r for r in caplog.records if "the auxiliary loss is off" in r.message]
