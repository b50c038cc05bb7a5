"""Paths that tests share, the sizes of tiny models, and the settings of quick runs of the toy environment."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"  # published datasets; only some checkouts have them
TOY = str(ROOT / "tests" / "toy.py")

# Config of a random model of transformers.
TINY_MODEL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough that greedy decoding has no ties
    "eos_token_id": 2,
    "pad_token_id": 2,
    "bos_token_id": 1,
}

# Keys of a config file for `rlkit sft`, and for `rlkit train`.
QUICK = {
    "environment": f"{TOY}:Even",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
}
QUICK_GRPO = QUICK | {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "evaluation_tasks": 4,
}

# Arguments of GRPOConfig for a trainer that a test builds without the command line.
QUICK_GRPO_CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 5,
    "max_steps": 1,
    "logging_steps": 1,
    "learning_rate": 1e-3,
}
