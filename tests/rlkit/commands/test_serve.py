"""`rlkit serve`: the command line and the environment variables of the vLLM server."""

import json

import pytest

from rlkit.commands import serve
from rlkit.errors import UserError


def build(*arguments, cuda=False):
    options, vllm_options = serve.build_parser().parse_known_args(arguments)
    return serve.vllm_command(options, options.model, vllm_options, cuda=cuda), options


def value(command, name):
    return command[command.index(name) + 1]


def test_vllm_command_has_the_required_options():
    command, options = build("some/model")
    assert "some/model" in command
    assert value(command, "--logprobs-mode") == "processed_logprobs"
    assert value(command, "--max-logprobs") == "-1"
    assert value(command, "--generation-config") == "vllm"
    assert value(command, "--host") == "127.0.0.1"
    assert "--enable-lora" not in command
    variables = serve.environment({"PATH": "/bin"}, options, cuda=False)
    assert variables == {"PATH": "/bin", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    assert (
        serve.environment({"VLLM_CPU_KVCACHE_SPACE": "8"}, options, cuda=False)["VLLM_CPU_KVCACHE_SPACE"]
        == "8"
    )


def test_vllm_command_uses_nccl_only_with_cuda():
    assert json.loads(value(build("m", cuda=True)[0], "--weight-transfer-config")) == {"backend": "nccl"}
    assert "--weight-transfer-config" not in build("m")[0]
    assert "VLLM_CPU_KVCACHE_SPACE" not in serve.environment({}, build("m")[1], cuda=True)


def test_vllm_command_enables_lora_if_a_rank_is_set():
    command, options = build("m", "--lora_rank", "16")
    assert "--enable-lora" in command
    assert value(command, "--max-lora-rank") == "16"
    # vLLM supports only some maximum ranks.
    assert value(build("m", "--lora_rank", "5")[0], "--max-lora-rank") == "8"
    assert serve.environment({}, options, cuda=True)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


def test_vllm_command_ends_with_passed_through_options():
    command, _ = build("m", "--port", "9", "--max-num-seqs", "64", "--no-enforce-eager", "--dtype", "float32")
    assert command[-3:] == ["--max-num-seqs", "64", "--no-enforce-eager"]
    assert (value(command, "--port"), value(command, "--dtype")) == ("9", "float32")


def test_parse_suggests_underscores():
    with pytest.raises(UserError, match=r"'--max-model-len' \(did you mean '--max_model_len'\?\)"):
        serve.parse(["m", "--max-model-len", "9"])


@pytest.mark.parametrize("has_vllm", [True, False])
def test_server_module_depends_on_the_distribution(monkeypatch, has_vllm):
    def version(name):
        if not has_vllm:
            raise serve.importlib.metadata.PackageNotFoundError(name)
        return "0.31.0"

    monkeypatch.setattr(serve.importlib.metadata, "version", version)
    expected = ["vllm.entrypoints.cli.main", "serve", "m"]
    if not has_vllm:
        expected = ["vllm.entrypoints.launchers.api_server.entry", "--model", "m"]
    assert serve.server_module("m") == expected


def test_main_names_the_missing_package(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install vllm"):
        serve.main(["m"])


def test_help_describes_every_option(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    text = capsys.readouterr().out
    assert all(a.help for a in serve.build_parser()._actions)
    assert "--lora_rank" in text and "--max_num_seqs" in text and "bundled:smollm2-135m" in text
