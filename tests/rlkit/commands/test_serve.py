"""`rlkit serve`: what vLLM is started with."""

import json

import pytest

from rlkit.commands import serve
from rlkit.errors import UserError


def build(*arguments, cuda=False):
    options, further = serve.parser().parse_known_args(arguments)
    return serve.vllm_command(options, options.model, further, cuda=cuda), options


def value(command, name):
    return command[command.index(name) + 1]


def test_what_training_needs_is_always_there():
    command, options = build("some/model")
    assert "some/model" in command
    assert value(command, "--logprobs-mode") == "processed_logprobs"
    assert value(command, "--max-logprobs") == "-1"
    assert value(command, "--generation-config") == "vllm"
    assert value(command, "--host") == "127.0.0.1"
    assert "--enable-lora" not in command
    made = serve.environment({"PATH": "/bin"}, options, cuda=False)
    assert made == {"PATH": "/bin", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    assert (
        serve.environment({"VLLM_CPU_KVCACHE_SPACE": "8"}, options, cuda=False)["VLLM_CPU_KVCACHE_SPACE"]
        == "8"
    )


def test_only_a_gpu_takes_weights_over_nccl():
    assert json.loads(value(build("m", cuda=True)[0], "--weight-transfer-config")) == {"backend": "nccl"}
    assert "--weight-transfer-config" not in build("m")[0]
    assert "VLLM_CPU_KVCACHE_SPACE" not in serve.environment({}, build("m")[1], cuda=True)


def test_adapters():
    command, options = build("m", "--lora_rank", "16")
    assert "--enable-lora" in command
    assert value(command, "--max-lora-rank") == "16"
    assert serve.environment({}, options, cuda=True)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


def test_further_options_go_to_vllm_and_come_last():
    command, _ = build("m", "--port", "9", "--max-num-seqs", "64", "--no-enforce-eager", "--dtype", "float32")
    assert command[-3:] == ["--max-num-seqs", "64", "--no-enforce-eager"]
    assert (value(command, "--port"), value(command, "--dtype")) == ("9", "float32")


def test_options_in_the_old_spelling_name_the_new_one():
    with pytest.raises(UserError, match=r"'--max-model-len' \(did you mean '--max_model_len'\?\)"):
        serve.parse(["m", "--max-model-len", "9"])


@pytest.mark.parametrize("has_vllm", [True, False])
def test_how_vllm_is_started(monkeypatch, has_vllm):
    def version(name):
        if not has_vllm:
            raise serve.importlib.metadata.PackageNotFoundError(name)
        return "0.31.0"

    monkeypatch.setattr(serve.importlib.metadata, "version", version)
    expected = ["vllm.entrypoints.cli.main", "serve", "m"]
    if not has_vllm:
        expected = ["vllm.entrypoints.launchers.api_server.entry", "--model", "m"]
    assert serve.server_module("m") == expected


def test_without_vllm_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install vllm"):
        serve.main(["m"])


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    text = capsys.readouterr().out
    assert all(a.help for a in serve.parser()._actions)
    assert "--lora_rank" in text and "--max_num_seqs" in text and "bundled:smollm2-135m" in text
