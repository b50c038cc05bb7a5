"""Print how far gradients with a shared prefix under DDP and FSDP2 are from those of a single process.

test_sharded_prefix.py runs this script with torchrun in two processes. It prints the largest relative error
of the gradients for each.
"""

import copy
import gc
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rlkit.training.shared_prefix import add_shared_prefix, completion_log_probs

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
config = AutoConfig.for_model("qwen2", **sizes, **heads)
unsharded = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
add_shared_prefix()

# Two groups of three rollouts, one for each process.
G, P, T = 3, 7, 5
ids = torch.randint(3, 64, (2 * G, P + T))
ids[:, :P] = ids[::G, :P].repeat_interleave(G, 0)
mask = torch.ones_like(ids)
mask[0, :2] = mask[1, :2] = mask[2, :2] = 0  # a shorter prompt and, below, shorter completions
mask[1, -2:] = mask[4, -1:] = 0
weights = torch.randn(2 * G, T)
shard = slice(rank * G, (rank + 1) * G)


def loss_of(model, rows):
    """Return the loss of some rows. Two processes average their gradients, which is half of the sum."""
    log_probs = completion_log_probs(model, ids[rows], mask[rows], T).log_probs
    return (log_probs * weights[rows]).sum()


def gradients(model):
    by_name = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        by_name[name.removeprefix("module.")] = grad
    return by_name


def relative_error(actual, expected):
    return max(((actual[k] - expected[k]).norm() / expected[k].norm()).item() for k in expected)


def shard_model(model, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


results = {}
for name in ("ddp", "fsdp2", "fsdp2 with checkpointing"):
    model = copy.deepcopy(unsharded)
    add_fused_lm_head(model, outputs=("entropy",))
    model.train()
    loss_of(model, slice(None)).backward()
    expected = {key: value / 2 for key, value in gradients(model).items()}
    model = copy.deepcopy(unsharded)
    add_fused_lm_head(model, outputs=("entropy",))
    model.train()
    wrapped = DistributedDataParallel(model) if name == "ddp" else shard_model(model, "checkpointing" in name)
    loss_of(wrapped, shard).backward()
    results[name] = relative_error(gradients(wrapped), expected)
if rank == 0:
    for name, value in results.items():
        sys.stdout.write(f"{name}: {value:.1e}\n")
# Wrapped models refer to the process group. Gloo's threads abort the process if it still exists at exit.
del model, wrapped
gc.collect()
dist.destroy_process_group()
