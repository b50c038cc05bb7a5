"""Features of TRL's GRPO that a key switches on have the documented effect on rlkit's trainer.

docs/trl_features.md lists them. Losses are compared with formulas of this file, which use a plain forward
pass of the model; the trainer computes the prompt of a group once (`shared_prefix`).
"""

import json
import random
import re
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import trl.trainer.grpo_trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import HfDeepSpeedConfig
from trl import ModelConfig
from trl.generation import vllm_generation

import rlkit
from rlkit.arguments.parse import parse_train
from rlkit.arguments.train_keys import keys_without_effect
from rlkit.errors import RewardError, UserError
from rlkit.models.load import load_model
from rlkit.registry import load_environment
from rlkit.runs.checkpoints import last_checkpoint
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.resume import CheckpointCallback
from rlkit.training.rollout_counts import EpisodeWarnings
from rlkit.training.step import sampling_settings
from rlkit.training.train import changed_keys
from tests.conftest import TEMPLATE
from tests.quick import QUICK_GRPO, TOY
from tests.rlkit.training.recorded_steps import Judge
from tests.rlkit.training.test_variants import FixedRewards

G, B, T = 4, 8, 5
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.0}


@pytest.fixture
def make(make_trainer):
    """Return a function that builds a trainer whose reward is 0, 1, 2, 0, 1, 2, …; see `make_trainer`."""
    return partial(make_trainer, {"judge": Judge()})


def sample_batch(trainer):
    """Return the batch of one sampling step, without training on it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logged(trainer, name):
    """Return the values of a metric over the logged steps."""
    return [line[name] for line in trainer.state.log_history if name in line]


def saved_rollouts(trainer):
    trainer.run_dir.flush()
    files = sorted((trainer.run_dir.path / "rollouts").glob("*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


# --- The loss -----------------------------------------------------------------------------------------------

DEFAULTS = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "temperature": 1.0,
    "sapo_temperature_neg": 1.05,
    "sapo_temperature_pos": 1.0,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
}


def off_policy_batch(trainer, seed):
    """Return a batch whose old policy and reference model differ from the model by noise."""
    batch = sample_batch(trainer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        log_probs = trainer.token_log_probs(trainer.model, batch)
    mask = batch["completion_mask"]
    for name, scale in (("old_per_token_logps", 0.3), ("ref_per_token_logps", 0.5)):
        batch[name] = (log_probs + scale * torch.randn(mask.shape, generator=generator)) * mask
    batch["advantages"] = torch.randn(len(mask), generator=generator)
    return batch


def forward(model, batch, temperature):
    """Return log-probabilities and entropies (B, T) of the completion, by a forward pass of padded rows."""
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    width = batch["completion_ids"].size(1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -width - 1 : -1]
    log_probs = (logits / temperature).log_softmax(-1)
    return log_probs.gather(2, ids[:, -width:, None]).squeeze(2), -(log_probs.exp() * log_probs).sum(-1)


def reference_loss(model, batch, c):
    """Return the loss of the papers for a batch, with the settings `c` (see `DEFAULTS`)."""
    log_probs, entropies = forward(model, batch, c["temperature"])
    mask, old, ref = batch["completion_mask"], batch["old_per_token_logps"], batch["ref_per_token_logps"]
    A = batch["advantages"][:, None]
    log_ratio = (log_probs - old) * mask
    lengths = mask.sum(1, keepdim=True)
    ratio = log_ratio.exp()
    if c["importance_sampling_level"] == "sequence":  # GSPO: the geometric mean over the sequence
        ratio = (log_ratio.sum(1, keepdim=True) / lengths).exp()
    high = c["epsilon"] if c["epsilon_high"] is None else c["epsilon_high"]

    if c["loss_type"] == "cispo":  # MiniMax-M1: the truncated ratio is a constant
        per_token = -ratio.clamp(max=high).detach() * A * log_probs
    elif c["loss_type"] == "sapo":  # a sigmoid gate with slope 1 at a ratio of 1
        tau = torch.where(A > 0, c["sapo_temperature_pos"], c["sapo_temperature_neg"])
        per_token = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * A
    elif c["loss_type"] == "vespo":  # a gamma weight of the ratio of the sequence, a constant
        k = torch.where(A >= 0, c["vespo_k_pos"], c["vespo_k_neg"])
        rate = torch.where(A >= 0, c["vespo_lambda_pos"], c["vespo_lambda_neg"])
        w = log_ratio.sum(1, keepdim=True).exp()
        per_token = -(w**k * torch.exp(rate * (1 - w))).detach() * A * log_probs
    else:
        unclipped = ratio if c["delta"] is None else ratio.clamp(max=c["delta"])
        per_token = -torch.min(unclipped * A, ratio.clamp(1 - c["epsilon"], 1 + high) * A)

    if c["off_policy_mask_threshold"] is not None:  # DeepSeek-V3.2: drop off-policy negatives
        kl = -log_ratio.sum(1, keepdim=True).detach() / lengths
        per_token = per_token * ((A >= 0) | (kl <= c["off_policy_mask_threshold"]))
    is_active = mask
    if c["top_entropy_quantile"] < 1:  # train on the tokens of the highest entropy
        values = entropies[mask.bool()]
        is_active = mask * (entropies >= torch.quantile(values, 1 - c["top_entropy_quantile"]))
        per_token = per_token * is_active
    if c["beta"]:  # the k3 estimator, with the importance ratio if corrected
        k3 = (ref - log_probs).exp() - (ref - log_probs) - 1
        per_token = per_token + c["beta"] * (k3 * ratio if c["use_bias_correction_kl"] else k3)

    sums = (per_token * mask).sum(1)
    token_mean = sums.sum() / mask.sum()
    loss = {
        "grpo": (sums / lengths[:, 0]).mean(),
        "sapo": (sums / lengths[:, 0]).mean(),
        "luspo": sums.mean(),
        "dr_grpo": sums.sum() / (B * T),
    }.get(c["loss_type"], token_mean)
    return loss - c["entropy_coef"] * (entropies * is_active).sum() / is_active.sum()


SEQUENCE = {"importance_sampling_level": "sequence"}
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
SETTINGS = [
    *({"loss_type": loss} for loss in LOSSES),
    *({"loss_type": loss, **SEQUENCE, "beta": 0.1} for loss in ("grpo", "dapo", "luspo", "sapo")),
    {"epsilon": 0.05, "epsilon_high": 0.4, "delta": 1.1},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "sapo", "sapo_temperature_neg": 3.0, "sapo_temperature_pos": 0.5},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 1.5},
    {"loss_type": "vespo", "vespo_lambda_neg": 0.5},
    {"beta": 0.2, "use_bias_correction_kl": False},
    {"off_policy_mask_threshold": 0.05},
    {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    {"loss_type": "dapo", "top_entropy_quantile": 0.5, "beta": 0.1, "temperature": 0.7},
]


def random_setting(seed):
    """Return settings of the loss in a combination that nobody has chosen."""
    draw = random.Random(seed)
    setting = {
        "loss_type": draw.choice(LOSSES),
        "epsilon": draw.uniform(0.01, 0.4),
        "beta": draw.choice([0.0, draw.uniform(0.01, 0.5)]),
        "use_bias_correction_kl": draw.random() < 0.5,
        "temperature": draw.uniform(0.5, 1.5),
        "off_policy_mask_threshold": draw.choice([None, draw.uniform(0.01, 0.2)]),
        "top_entropy_quantile": draw.choice([1.0, draw.uniform(0.1, 0.9)]),
        "entropy_coef": draw.choice([0.0, draw.uniform(0.01, 0.5)]),
        "sapo_temperature_neg": draw.uniform(0.5, 2),
        "vespo_k_neg": draw.uniform(1, 3),
    }
    if setting["loss_type"] != "vespo":
        setting["importance_sampling_level"] = draw.choice(["token", "sequence"])
    if setting["loss_type"] not in ("cispo", "sapo", "vespo"):
        setting["delta"] = draw.choice([None, draw.uniform(1.05, 2)])
        setting["epsilon_high"] = setting["epsilon"] + draw.uniform(0, 0.3)
    return setting


@pytest.mark.parametrize("setting", [*SETTINGS, *map(random_setting, range(6))], ids=str)
def test_loss_and_gradient_equal_the_formula(make, setting):
    trainer = make(**setting)
    assert trainer.shared_prefix
    batch = off_policy_batch(trainer, seed=3)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    actual = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    trainer.model.zero_grad()
    expected_loss = reference_loss(trainer.model, batch, DEFAULTS | setting)
    expected_loss.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-4, abs=1e-6)
    assert expected.norm() > 1e-3 and (actual - expected).norm() < 1e-3 * expected.norm()


def test_settings_cover_every_key_and_choice_of_the_loss():
    assert {key for setting in SETTINGS for key in setting} == set(DEFAULTS)


@pytest.mark.parametrize("target", [100.0, 0.0])
def test_adaptive_entropy_coefficient_changes_once_per_optimizer_step(make, target):
    """With accumulation, and within its limits; the target is above or below the entropy of any policy."""
    keys = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": target}
    limits = {"entropy_coef_delta": 0.05, "entropy_coef_min": 0.04, "entropy_coef_max": 0.18}
    accumulation = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 3}
    trainer = make(**keys, **limits, **accumulation)
    trainer.train()
    expected = [0.15, 0.18, 0.18] if target else [0.05, 0.04, 0.04]
    assert logged(trainer, "entropy_coef") == pytest.approx(expected)
    assert trainer._last_world_entropy == pytest.approx(logged(trainer, "entropy")[-1], rel=0.1)


def test_mask_truncated_completions_leaves_the_loss_of_the_others(make):
    trainer = make(mask_truncated_completions=True, loss_type="grpo")
    loop = trainer.loop

    def truncating_loop(*args, **kwargs):
        rollouts = loop(*args, **kwargs)
        for i, rollout in enumerate(rollouts):
            rollout.truncated = i % 2 == 0
        return rollouts

    trainer.loop = truncating_loop
    trainer.loop.limits, trainer.loop.template = loop.limits, loop.template
    batch = sample_batch(trainer)
    assert (batch["completion_mask"].sum(1) > 0).tolist() == [False, True] * 4
    log_probs, _ = forward(trainer.model, batch, 1.0)
    mask = batch["completion_mask"]
    ratio = (log_probs - log_probs.detach()).exp()
    means = -(ratio * batch["advantages"][:, None] * mask).sum(1) / mask.sum(1).clamp(min=1)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(means.mean().item(), abs=1e-5)


def test_evaluation_mode_does_not_divide_the_loss_by_accumulation_steps(make):
    trainer = make()
    batch = off_policy_batch(trainer, seed=1)
    trainer.current_gradient_accumulation_steps = 4
    in_training = trainer.compute_loss(trainer.model, batch).item()
    trainer.model.eval()
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(4 * in_training, rel=1e-5)


# --- Models -------------------------------------------------------------------------------------------------


def test_lm_head_in_float32_gives_float32_log_probs_with_the_shared_prefix(make, tiny_model):
    """The logits of a bfloat16 model are rounded to 8 bits, unless its head is in float32."""
    errors = {}
    for cast in (True, False):
        model = tiny_model("llama").to(torch.bfloat16)
        trainer = make(model=model, cast_lm_head_to_fp32=cast)
        batch = sample_batch(trainer)
        with torch.no_grad():
            actual = trainer.token_log_probs(trainer.model, batch)
            exact, _ = forward(tiny_model("llama").to(torch.bfloat16).float(), batch, 1.0)
        assert trainer.shared_prefix
        assert model.lm_head.weight.dtype == (torch.float32 if cast else torch.bfloat16)
        assert actual.dtype == torch.float32
        errors[cast] = ((actual - exact) * batch["completion_mask"]).abs().max()
        trainer.train()
        assert trainer.state.global_step == 1
    assert errors[True] < errors[False] < 0.5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "n_positions": 512}),
    ],
)
def test_disable_dropout_makes_training_deterministic(make, tiny_model, kind, options):
    for is_disabled in (False, True):
        trainer = make(model=tiny_model(kind, **options), disable_dropout=is_disabled)
        batch = sample_batch(trainer)
        with torch.no_grad():
            first, second = (trainer.token_log_probs(trainer.model, batch) for _ in range(2))
        assert torch.equal(first, second) is is_disabled


def test_router_aux_loss_coef_weights_the_load_balancing_loss(make, tiny_model):
    losses = {}
    for coef in (0.0, 0.5):
        model = tiny_model("qwen3_moe", moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
        trainer = make(model=model, router_aux_loss_coef=coef)
        batch = off_policy_batch(trainer, seed=2)
        losses[coef] = trainer.compute_loss(trainer.model, batch).item()
        aux_loss = trainer._metrics["train"].get("aux_loss")
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * aux_loss[0], rel=1e-3) and aux_loss[0] > 0.1


def test_sync_ref_model_mixes_the_weights_into_the_reference(make):
    trainer = make(
        beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.7, max_steps=3
    )
    steps = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append((weights_of(trainer.model), weights_of(trainer.ref_model)))

    start = weights_of(trainer.ref_model)
    trainer.add_callback(Record())
    trainer.train()
    assert torch.equal(steps[0][1], start)
    mixed = 0.7 * steps[1][0] + 0.3 * start
    torch.testing.assert_close(steps[1][1], mixed)
    assert torch.equal(steps[2][1], steps[1][1]) and not torch.equal(mixed, start)
    assert "reference model" in trainer.stateful()


def test_trained_adapter_is_its_own_reference(make, tiny_folder):
    """TRL keeps a copy of an adapter that is trained further, named "ref"."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config)
    trainer = make(model=model, beta=0.1, max_steps=2, learning_rate=0.05)
    assert trainer.shared_prefix
    batch = sample_batch(trainer)
    with torch.no_grad():
        start = trainer.token_log_probs(trainer.model, batch)
        with trainer.model.disable_adapter():
            base = trainer.token_log_probs(trainer.model, batch)
    torch.testing.assert_close(batch["ref_per_token_logps"], start)
    assert not torch.allclose(base, start, atol=1e-3)
    trainer.train()
    with torch.no_grad(), trainer.reference_model() as reference:
        torch.testing.assert_close(trainer.token_log_probs(reference, batch), start)
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 1e-6


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_trust_remote_code_runs_the_code_of_policy_and_reference(make, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine"}
    config |= {"architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "code.MineConfig", "AutoModelForCausalLM": "code.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE)
    with pytest.raises(UserError, match="cannot load"):
        load_model(ModelConfig(model_name_or_path=str(folder)))
    model, _ = load_model(ModelConfig(model_name_or_path=str(folder)), trust_remote_code=True)
    trainer = make(model=model, trust_remote_code=True, beta=0.1)
    trainer.train()
    assert type(trainer.ref_model).__name__ == type(trainer.model).__name__ == "Mine"


def test_compiled_model_learns_the_weights_of_the_plain_one(make):
    compiled = make(**SGD, torch_compile=True, torch_compile_backend="eager")
    plain = make(**SGD)
    assert compiled.shared_prefix
    start = weights_of(plain.model)
    for trainer in (compiled, plain):
        trainer.runner.rewards["judge"].calls = 0
        trainer.train()
    change = weights_of(plain.model) - start
    assert (weights_of(compiled.model) - start - change).norm() < 1e-3 * change.norm()


@pytest.mark.parametrize(("rate", "factor"), [(0.2, 2), (0.0, 0)])
def test_learning_rate_scales_the_step(make, rate, factor):
    torch.manual_seed(0)
    changes = []
    for keys in (SGD, SGD | {"learning_rate": rate}):
        trainer = make(**keys)
        start = weights_of(trainer.model)
        trainer.runner.rewards["judge"].calls = 0
        trainer.train()
        changes.append(weights_of(trainer.model) - start)
    assert changes[0].norm() > 1e-3
    torch.testing.assert_close(changes[1], factor * changes[0], rtol=1e-2, atol=1e-6)


# --- Batches, tasks and prompts -----------------------------------------------------------------------------


def test_pad_to_multiple_of_pads_without_changing_the_loss(make):
    losses = []
    for multiple in (None, 8):
        trainer = make(pad_to_multiple_of=multiple)
        trainer.runner.rewards["judge"].calls = 0
        batch = sample_batch(trainer)
        widths = [batch["prompt_ids"].size(1), batch["completion_ids"].size(1)]
        assert all(width % 8 == 0 for width in widths) is bool(multiple)
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-7)


def task_numbers(trainer):
    return [int(task_id.split("-")[0]) for task_id in saved_rollouts(trainer)["task_id"]]


def test_shuffle_dataset_false_keeps_the_order_of_the_tasks(make):
    trainer = make(shuffle_dataset=False, max_steps=3)
    trainer.train()
    assert task_numbers(trainer) == [i for i in range(6) for _ in range(G)]


@pytest.mark.parametrize(
    ("keys", "tasks_per_sampling_step"),
    [
        ({"generation_batch_size": 16}, 4),
        ({"steps_per_generation": 2}, 4),
        ({"steps_per_generation": 2, "num_iterations": 2}, 4),
        ({"generation_batch_size": 8, "num_iterations": 3}, 2),
        ({"generation_batch_size": 16, "num_generations": 8}, 2),
    ],
)
def test_sampling_step_has_the_tasks_of_the_generation_batch(make, keys, tasks_per_sampling_step):
    trainer = make(shuffle_dataset=False, max_steps=2, **keys)
    trainer.train()
    steps = saved_rollouts(trainer).groupby("step")["task_id"]
    assert steps.nunique().iloc[0] == tasks_per_sampling_step
    assert steps.size().iloc[0] == tasks_per_sampling_step * trainer.num_generations
    size = trainer.args.steps_per_generation * trainer.num_iterations  # optimizer steps of a sampling step
    assert steps.nunique().index.tolist() == list(range(1, 3, size))


def test_data_loader_workers_yield_the_same_tasks(make):
    orders = []
    for workers in (0, 1):
        trainer = make(dataloader_num_workers=workers, max_steps=2)
        trainer.train()
        orders.append(task_numbers(trainer))
    assert orders[0] == orders[1]


@pytest.mark.parametrize("keys", [{}, {"steps_per_generation": 2, "per_device_train_batch_size": 4}])
def test_stream_of_tasks_trains_like_a_dataset(make_trainer, keys):
    """TRL trains on datasets that cannot be indexed, too; a curriculum then counts optimizer steps."""
    environment = load_environment(f"{TOY}:Rising")
    tasks = environment.tasks("train", 26).to_iterable_dataset()
    options = {"environment": environment, "train_dataset": tasks, "shuffle_dataset": False, "max_steps": 4}
    trainer = make_trainer({"even": Judge()}, **options, **keys)
    trainer.train()
    num_sampling_steps = 4 // keys.get("steps_per_generation", 1)
    assert task_numbers(trainer) == [i for i in range(2 * num_sampling_steps) for _ in range(G)]
    expected = [(i, num_sampling_steps) for i in range(1, num_sampling_steps + 2)]
    assert [(step, steps) for step, steps, _ in environment.progress] == expected


def test_dynamic_sampling_of_a_stream_is_refused(make):
    tasks = load_environment(f"{TOY}:Letters").tasks("train", 26).to_iterable_dataset()
    with pytest.raises(UserError, match="without streaming"):
        make(train_dataset=tasks, dynamic_sampling=2)


@pytest.mark.parametrize("kind", ["map", "stream", "several"])
def test_evaluation_datasets_of_trl_are_evaluated_without_saved_rollouts(make, kind):
    tasks = load_environment(f"{TOY}:Letters").tasks("train", 4)
    datasets = {"map": tasks, "stream": tasks.to_iterable_dataset(), "several": {"a": tasks, "b": tasks}}
    keys = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "max_steps": 2}
    trainer = make(eval_dataset=datasets[kind], num_generations_eval=2, **keys)
    trainer.train()
    rewards = logged(trainer, "eval_reward")  # TRL logs those of several datasets under one name
    assert len(rewards) == (4 if kind == "several" else 2) and all(0 <= reward <= 2 for reward in rewards)
    assert len(logged(trainer, "eval_a_loss" if kind == "several" else "eval_loss")) == 2
    assert len(saved_rollouts(trainer)) == 2 * B
    assert trainer.state.num_input_tokens_seen == logged(trainer, "num_tokens")[-1]


EXCITED = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}{% if is_excited %}?!{% endif %}")


@pytest.fixture
def excited(tiny_tokenizer, monkeypatch):
    """Return the tokenizer with a chat template that appends "?!" to messages if `is_excited` is true."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", EXCITED)
    return tiny_tokenizer


def test_chat_template_kwargs_reach_training_evaluation_and_replies(make, excited):
    trainer = make(chat_template_kwargs={"is_excited": True})
    batch = sample_batch(trainer)
    assert all("?!" in excited.decode(ids) for ids in batch["prompt_ids"])
    task = trainer.train_dataset[0]
    with trainer.engine() as engine:
        ((rollout,),) = trainer.sampler(engine, [task], 1)
    assert "?!" in excited.decode(rollout.prompt_ids)
    _, ids = trainer.loop.replies("hello", closed=True)
    assert "hello?!" in excited.decode(ids)
    assert "?!" not in excited.decode(sample_batch(make())["prompt_ids"][0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_exited": True}, r"no variable 'is_exited' \(did you mean 'is_excited'\?\)"),
        ({"add_generation_prompt": False}, "'add_generation_prompt': the rollout loop sets it"),
        ({"tokenize": False}, "'tokenize'"),
        ({"tools": []}, r"Environment\.tools"),
    ],
)
def test_chat_template_kwargs_that_the_template_ignores_are_refused(make, excited, settings, message):
    with pytest.raises(UserError, match=message):
        make(chat_template_kwargs=settings)


def test_chat_template_kwargs_without_a_template_are_refused(make, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="has no chat template"):
        make(chat_template_kwargs={"enable_thinking": False})


# --- Sampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}, {}], ids=str
)
def test_sampling_keys_shape_the_distribution_of_rollouts(make, tiny_model, keys):
    """Each of these settings leaves the likeliest token only."""
    trainer = make(model=tiny_model("llama"), **keys)
    ids = sample_batch(trainer)["completion_ids"]
    numbers_of_distinct = [len(set(map(tuple, group.tolist()))) for group in ids.split(G)]
    assert numbers_of_distinct == [1, 1] if keys else min(numbers_of_distinct) > 1


def test_repetition_penalty_prevents_repeated_tokens(make, tiny_model):
    """A huge penalty excludes tokens of the prompt and the completion that have positive logits."""
    keys = {"max_completion_length": 30, "top_k": 1}
    trainer = make(model=tiny_model("llama"), repetition_penalty=1e6, **keys)
    assert all(len(set(ids.tolist())) == 30 for ids in sample_batch(trainer)["completion_ids"])
    plain = make(model=tiny_model("llama"), **keys)
    assert any(len(set(ids.tolist())) < 30 for ids in sample_batch(plain)["completion_ids"])


def test_continuous_batching_samples_rollouts_with_the_config_given(make):
    cache = {"num_blocks": 32, "max_batch_tokens": 128}
    trainer = make(
        use_transformers_continuous_batching=True, transformers_continuous_batching_config=cache, **SGD
    )
    assert trainer.continuous_batching_config.num_blocks == 32
    start = weights_of(trainer.model)
    trainer.train()
    frame = saved_rollouts(trainer)
    assert len(frame) == B and frame["length"].between(1, T).all() and frame["invalid"].isna().all()
    assert not torch.equal(weights_of(trainer.model), start)


def test_structured_outputs_regex_is_a_setting_of_each_vllm_request(make):
    trainer = make(vllm_structured_outputs_regex="[ab]+")
    assert sampling_settings(trainer).extra == {}
    trainer.use_vllm = True
    assert sampling_settings(trainer).extra == {"structured_outputs": {"regex": "[ab]+"}}


class Started(Exception):  # noqa: N818
    """Raised instead of starting vLLM; its argument are the settings."""


def test_vllm_keys_reach_the_engine_in_this_process(make, monkeypatch):
    def start(**settings):
        raise Started(settings)

    monkeypatch.setattr(vllm_generation, "LLM", start)
    keys = {
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.4,
        "vllm_max_model_length": 64,
        "vllm_model_impl": "transformers",
        "vllm_enable_sleep_mode": True,
    }
    with pytest.raises(Started) as caught:
        make(use_vllm=True, **keys)
    (settings,) = caught.value.args
    for key in ("gpu_memory_utilization", "model_impl", "enable_sleep_mode"):
        assert settings[key] == keys[f"vllm_{key}"]
    assert settings["max_model_len"] == 64


@pytest.mark.parametrize("gathers", [True, False])
def test_zero3_without_gathered_weights_samples_with_trl(make, gathers):
    trainer = make(ds3_gather_for_generation=gathers)
    assert not trainer.samples_with_trl
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # ZeRO-3 is on while this object exists
    assert trainer.samples_with_trl is not gathers
    del config


# --- Rewards and advantages ---------------------------------------------------------------------------------

FIRST = np.array([1.0, 0.0, 0.0, 0.0, 0.5, 2.0, 1.0, 1.5])
SECOND = np.array([10.0, 30.0, 20.0, 40.0, 5.0, 0.0, 0.0, 7.0])


def normalized(x):
    return (x - x.mean()) / (x.std(ddof=1) + 1e-4)


def expected_advantages(aggregation, scale, weights):
    if aggregation == "normalize_then_sum":
        rewards = sum(
            w * np.concatenate([normalized(group) for group in column.reshape(-1, G)])
            for w, column in zip(weights, (FIRST, SECOND), strict=True)
        )
        return normalized(rewards)
    rewards = (weights[0] * FIRST + weights[1] * SECOND).reshape(-1, G)
    centered = rewards - rewards.mean(1, keepdims=True)
    deviation = {
        "group": rewards.std(1, ddof=1, keepdims=True) + 1e-4,
        "batch": rewards.std(ddof=1) + 1e-4,
        "none": 1.0,
    }[scale]
    return (centered / deviation).flatten()


@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [
        ("sum_then_normalize", "group"),
        ("sum_then_normalize", "batch"),
        ("sum_then_normalize", "none"),
        ("normalize_then_sum", "group"),
    ],
)
def test_advantages_of_two_rewards_equal_the_formula(make_trainer, aggregation, scale):
    weights = [2.0, 0.1]
    trainer = make_trainer(
        {"first": FixedRewards(FIRST), "second": FixedRewards(SECOND)},
        multi_objective_aggregation=aggregation,
        scale_rewards=scale,
        reward_weights=weights,
    )
    actual = sample_batch(trainer)["advantages"]
    expected = expected_advantages(aggregation, scale, weights)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_funcs": [len]}, r"without reward_funcs: .*RewardRunner"),
        ({"reward_funcs": "org/model"}, r"without reward_funcs: .*RewardRunner"),
        ({"reward_processing_classes": [None]}, "without reward_processing_classes: .*RewardModel"),
        ({"rollout_func": lambda prompts, trainer: {}}, "without rollout_func: write an Environment"),
        ({"environment_factory": dict}, "without environment_factory: write an Environment"),
        ({"tools": [len]}, "without tools: write an Environment"),
    ],
)
def test_arguments_of_trl_that_the_step_does_not_read_are_refused(make, arguments, message):
    with pytest.raises(UserError, match=message):
        make(**arguments)


@pytest.mark.parametrize("reward", ["org/reward-model", 3, torch.nn.Linear(1, 1)])
def test_reward_that_is_no_function_is_refused(reward):
    with pytest.raises(UserError, match=r"the reward 'mine' must be a function, not .*RewardModel"):
        RewardRunner({"mine": reward})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cache_implementation": "static"}, "its own cache"),
        ({"neftune_noise_alpha": 5.0}, "importance ratio"),
        ({"label_smoothing_factor": 0.1}, "no labels"),
        ({"remove_unused_columns": True}, "columns of the tasks"),
        ({"max_tool_calling_iterations": 2}, "max_turns"),
        ({"train_sampling_strategy": "sequential"}, "shuffle_dataset"),
        ({"loss_type": "grop"}, "did you mean 'grpo'"),
        ({"importance_sampling_level": "sentence"}, "did you mean 'sequence'"),
    ],
)
def test_trainer_built_in_python_refuses_keys_that_it_would_ignore(make, keys, message):
    with pytest.raises(UserError, match=message):
        make(**keys)


# --- Rollouts that are not trained on -----------------------------------------------------------------------


class Failing(Judge):
    """Fails on the calls of some batches of 8, and returns None on those of others."""

    def __init__(self, invalid=(), unrewarded=()):
        super().__init__()
        self.invalid, self.unrewarded = invalid, unrewarded

    def __call__(self, completion: str) -> float | None:
        self.calls += 1
        batch = (self.calls - 1) // B
        if batch in self.invalid and self.calls % 2:
            raise ValueError("the judge\nis down")
        return None if batch in self.unrewarded else float(self.calls % 3)


def warnings_with(caplog, text):
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def test_invalid_rollouts_below_the_budget_are_logged_and_warned_of(make_trainer, caplog):
    trainer = make_trainer({"judge": Failing(invalid={1, 2, 4})}, max_steps=6, budget=ErrorBudget(0.6, 9))
    trainer.train()
    assert logged(trainer, "completions/invalid_ratio") == [0, 0.5, 0.5, 0, 0.5, 0]
    first, second = warnings_with(caplog, "rollouts are invalid")
    assert first.startswith("step 2: 4 of 8 rollouts are invalid") and "the judge" in first
    assert second.startswith("step 5:") and "\n" not in first + second
    (summary,) = warnings_with(caplog, "of the 48 rollouts of this run")
    assert summary.startswith("12 of the 48") and "(25.0%)" in summary and "the judge" in summary


def test_batch_without_a_reward_is_warned_of_and_has_no_advantage(make_trainer, caplog):
    trainer = make_trainer({"judge": Failing(unrewarded={1})}, max_steps=3, scale_rewards="none")
    trainer.train()
    (warning,) = warnings_with(caplog, "no reward applies")
    assert warning.startswith("step 2: no reward applies to 8 of 8 rollouts")
    frame = saved_rollouts(trainer)
    assert (frame.loc[frame["step"] == 2, "advantage"] == 0).all()
    assert frame.loc[frame["step"] == 2, "invalid"].isna().all()
    assert logged(trainer, "completions/invalid_ratio") == [0, 0, 0]


def test_run_without_a_valid_rollout_is_an_error_also_after_resuming(make_trainer):
    """The error budget stops only runs that are longer than its patience."""
    trainer = make_trainer({"judge": Judge(failing=set(range(99)))}, max_steps=2)
    with pytest.raises(RewardError, match=r"all 16 rollouts of this run are invalid.*the judge is down"):
        trainer.train()
    again = make_trainer({"judge": Judge()}, max_steps=2)
    again.rollout_counts.load_state_dict(trainer.stateful()["rollouts"].state_dict())
    again.state.global_step = again.state.max_steps = 2
    with pytest.raises(RewardError, match="all 16 rollouts"):
        again.rollout_counts.on_train_begin(again.args, again.state, again.control)


def test_run_that_stops_early_is_not_judged_by_its_rollouts(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = make_trainer({"judge": Judge(failing=set(range(99)))}, max_steps=5, callbacks=[Stop()])
    trainer.train()
    assert trainer.state.global_step == 1


def test_episode_warnings_double_the_number_of_episodes_between_two():
    warnings = EpisodeWarnings()
    holds = [False, True, True, False, True, False, True, False, True, True]
    assert [i for i, value in enumerate(holds) if warnings.is_due(value)] == [1, 4, 8]


# --- Logs and state -----------------------------------------------------------------------------------------


def test_num_completions_to_print_limits_the_printed_table(make, capsys):
    for limit, expected in ((3, 3), (None, B)):
        trainer = make(log_completions=True, num_completions_to_print=limit)
        trainer.train()
        # TRL prints the table of the last step again when training ends.
        assert len(re.findall(r"│ *\S*.{0,20}Say", capsys.readouterr().out)) == 2 * expected
        assert len(pd.read_parquet(next(trainer.run_dir.path.glob("completions/*.parquet")))) == B


def test_log_unique_prompts_logs_each_prompt_once_to_wandb(make, monkeypatch):
    tables = []

    class Wandb:
        run = object()

        @staticmethod
        def Table(dataframe):  # noqa: N802 the name of W&B
            return dataframe

        @staticmethod
        def log(values):
            tables.append(values["completions"])

    monkeypatch.setattr(trl.trainer.grpo_trainer, "wandb", Wandb, raising=False)
    for is_unique in (False, True):
        trainer = make(log_completions=True, log_unique_prompts=is_unique)
        trainer.args.report_to = ["wandb"]
        trainer.train()
    assert [len(table) for table in tables if len(table)] == [B, B, B // G, B // G]


HOOKS = """
def progress(completions, trainer_state, log_metric, log_extra, **kwargs):
    log_metric("progress/size", len(completions))
    log_extra("position", list(range(len(completions))))
    return [float(i % 2) + trainer_state.global_step for i in range(len(completions))]
"""


def test_rewards_of_a_run_log_metrics_and_columns_and_read_the_state(tmp_path, tiny_folder, capsys):
    file = tmp_path / "mine.py"
    file.write_text(HOOKS)
    keys = QUICK_GRPO | {"evaluation_tasks": 0, "rewards": [f"{file}:progress"], "max_steps": 2}
    keys |= {"vllm_mode": "server", "epsilon": 0.3, "loss_type": "sapo"}
    folder = tmp_path / "run"
    rlkit.train(model_name_or_path=tiny_folder, output_dir=str(folder), save_strategy="no", **keys)
    lines = pd.read_json(folder / "metrics.jsonl", lines=True)
    assert lines["progress/size"].dropna().tolist() == [8, 8]
    assert lines["rewards/progress/mean"].dropna().tolist() == pytest.approx([0.5, 1.5])
    frame = pd.concat([pd.read_parquet(path) for path in sorted((folder / "rollouts").iterdir())])
    assert frame["extra/position"].astype(int).tolist() == [*range(8), *range(8)]
    errors = capsys.readouterr().err
    assert errors.count("vllm_mode has no effect without use_vllm: true") == 1
    assert errors.count("epsilon has no effect without loss_type grpo") == 1


def test_only_keys_that_differ_from_default_and_preset_are_reported():
    run = parse_train(["--algorithm", "hapo", "--beta", "0", "--vllm_mode", "colocate", "--delta", "2.0"])
    assert changed_keys(run) == {"algorithm", "beta", "delta"}
    assert keys_without_effect(changed_keys(run), run.keys()) == []
    run = parse_train(["--loss_type", "sapo", "--delta", "2.0", "--vllm_server_port", "8001"])
    sentences = keys_without_effect(changed_keys(run), run.keys())
    assert [sentence.split()[0] for sentence in sentences] == ["vllm_server_port", "delta"]


RESUMABLE = {
    "adaptive entropy": {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.1,
        "entropy_target": 100.0,
        "entropy_coef_delta": 0.05,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    },
    "synced reference": {
        "beta": 0.2,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "steps_per_generation": 2,
        "per_device_train_batch_size": 4,
    },
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2, "loss_type": "luspo"},
}


@pytest.mark.parametrize("feature", RESUMABLE)
def test_run_with_the_feature_resumes_bit_for_bit(make, feature, tmp_path):
    """The state of the feature is part of a checkpoint."""

    def make_saving(resume_from=None):
        trainer = make(**RESUMABLE[feature], max_steps=4, save_strategy="steps", save_steps=3)
        saver = CheckpointCallback(trainer, trainer.stateful(), trainer.run_dir, {}, resume_from=resume_from)
        trainer.callback_handler.callbacks.insert(0, saver)
        return trainer

    whole = make_saving()
    whole.runner.rewards["judge"].calls = 0
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-3")
    assert last_checkpoint(tmp_path).name in ("checkpoint-3", "checkpoint-4")
    resumed = make_saving(checkpoint)
    # The toy reward counts its calls; its state is not part of the checkpoint.
    resumed.runner.rewards["judge"].calls = 24 if feature == "adaptive entropy" else 16
    resumed.train(resume_from_checkpoint=checkpoint)
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.entropy_coef == whole.entropy_coef
    if whole.ref_model is not None:
        assert torch.equal(weights_of(resumed.ref_model), weights_of(whole.ref_model))
    names = ("loss", "entropy_coef", "kl", "entropy")
    for name in names:
        assert logged(resumed, name) == logged(whole, name)
