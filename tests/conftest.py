"""Tiny random models and a character tokenizer: real transformers classes that train in milliseconds."""

import contextlib
import os
import subprocess
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run in parallel, and many start processes. OpenMP threads that spin while waiting would use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import hypothesis
import pytest

from rlkit.runs.directory import RunDirectory
from tests.quick import QUICK_GRPO_CONFIG, ROOT, TINY_MODEL, TOY
from tests.waiting import wait_until

# On a busy machine a slow hypothesis example is not a failure.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """Return a tokenizer with one token per printable ASCII character; <|im_end|> is EOS and padding."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<unk>", "<|im_start|>", "<|im_end|>", "\n", *(chr(c) for c in range(32, 127))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Return the tokenizer of the tiny models (`make_tokenizer`)."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model():
    """Return a function that builds a random model: `tiny_model("llama", seed=1, **config)`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind="llama", seed=0, **options):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **(TINY_MODEL | options))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Return a folder with a tiny random model and its tokenizer, for `model_name_or_path`."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", max_position_embeddings=2048, initializer_range=0.02).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vllm_folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Return a folder like `tiny_folder`, with a model shape that vLLM's kernels support."""
    folder = tmp_path_factory.mktemp("tiny-vllm")
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192, "initializer_range": 0.1}
    sizes |= {"tie_word_embeddings": True}  # otherwise vLLM allocates them twice on a CPU
    tiny_model("llama", **sizes).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """Start a process that has imported TRL; return the environment variables with which commands fork it."""
    folder = ROOT / "tests" / "fork_server"
    address = tmp_path_factory.mktemp("fork") / "socket"
    command = [sys.executable, str(folder / "server.py"), str(address)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as server:
        wait_until(address.exists, process=server)
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        yield {"FORK_SERVER": str(address), "PYTHONPATH": os.pathsep.join(paths)}
        server.stdin.close()


@pytest.fixture(scope="module")
def forked_commands(fork_server):
    """Make `python -m rlkit` and launchers in other processes start in milliseconds (tests/fork_server)."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fork_server.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def open_run():
    """Return a function that opens a run directory for training; all are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def open_run(folder):
            run = RunDirectory(folder, "train")
            run.open(resume=True, overwrite=False)
            stack.callback(run.close)
            return run

        yield open_run


@pytest.fixture
def make_trainer(tmp_path, open_run, tiny_folder, tiny_tokenizer):
    """Return a function that builds rlkit's GRPOTrainer on the tiny model, with `QUICK_GRPO_CONFIG`.

    It takes the rewards by name or a `RewardRunner`, an environment (the toy's `Letters` by default), and any
    argument of GRPOTrainer or GRPOConfig: ``make_trainer({"judge": judge}, beta=0.1, shared_prefix=False)``.
    """
    # Imported here: importing TRL takes 20 seconds, which most test files can do without.
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig

    from rlkit.registry import load_environment
    from rlkit.scoring import RewardRunner
    from rlkit.training.grpo import GRPOTrainer

    def make_trainer(rewards, environment=None, **options):
        environment = environment or load_environment(f"{TOY}:Letters")
        config = {name: value for name, value in options.items() if name in GRPOConfig.__dataclass_fields__}
        defaults = {
            "model": AutoModelForCausalLM.from_pretrained(tiny_folder),
            "args": GRPOConfig(**({"output_dir": str(tmp_path)} | QUICK_GRPO_CONFIG | config)),
            "train_dataset": environment.tasks("train", 26),
        }
        arguments = {name: value for name, value in options.items() if name not in config}
        return GRPOTrainer(
            processing_class=tiny_tokenizer,
            environment=environment,
            runner=rewards if isinstance(rewards, RewardRunner) else RewardRunner(rewards),
            run_dir=open_run(tmp_path),
            **(defaults | arguments),
        )

    return make_trainer
