"""What a run needs at its end is checked before its directory is touched."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from rlkit.arguments.parse import parse_sft, parse_train
from rlkit.errors import GuardError, UserError
from rlkit.training.sft import sft
from rlkit.training.start_checks import check_dtypes, check_saving
from rlkit.training.train import train
from tests.conftest import make_tokenizer
from tests.quick import QUICK, QUICK_GRPO
from tests.tiny_encoders import save_tiny_encoder

ARGS = SFTConfig(use_cpu=True, bf16=False, report_to="none", max_steps=4, save_steps=2)
REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
UNSAVABLE_REWARD = """
import numpy

class Reward:
    def __call__(self, completion):
        return 1.0

    def state_dict(self):
        return {"mean": numpy.float64(0.5)}

    def load_state_dict(self, state):
        pass

reward = Reward()
"""


@pytest.fixture
def keys(tmp_path, tiny_folder):
    """Return the keys of a run of two steps that saves a checkpoint of each."""
    steps = {"max_steps": 2, "save_steps": 1, "num_tasks": 8, "evaluation_tasks": 0}
    paths = {"model_name_or_path": tiny_folder, "output_dir": str(tmp_path / "run")}
    return QUICK | steps | paths


def write_object(model, tokenizer):
    model.config.reviewer = object()


def add_undeclared_tie(model, tokenizer):
    model.model.layers[0].mlp.gate_proj.weight = model.model.layers[1].mlp.gate_proj.weight


def break_generation_config(model, tokenizer):
    model.generation_config.temperature = 0.5


def break_tokenizer(model, tokenizer):
    tokenizer.init_kwargs["reviewer"] = object()


def move_vocabulary(model, tokenizer):
    tokenizer.get_vocab = lambda: {"a": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (write_object, r"cannot save the model's configs: .*; fix config\.json"),
        (add_undeclared_tie, r"cannot save the model's configs: .*gate_proj"),
        (break_generation_config, r"cannot save the model's configs: .*temperature"),
        (break_tokenizer, r"cannot save the tokenizer: .*; fix the tokenizer's files"),
        (move_vocabulary, r"cannot load the saved tokenizer again: its vocabulary has changed"),
    ],
)
def test_check_saving_rejects_what_cannot_be_saved_in_one_line(tiny_model, change, message):
    model, tokenizer = tiny_model("llama"), make_tokenizer()
    assert check_saving(model, tokenizer, ARGS) > 1000
    change(model, tokenizer)
    with pytest.raises(UserError, match=message) as caught:
        check_saving(model, tokenizer, ARGS)
    assert "\n" not in str(caught.value)


def test_check_saving_names_the_folder_when_nothing_can_be_written(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(UserError, match=r"cannot create a temporary folder: .*set TMPDIR"):
        check_saving(tiny_model("llama"), tiny_tokenizer, ARGS)


def test_check_saving_of_an_encoder_writes_no_weights(tmp_path):
    from rlkit.retrieval.encoders import load_encoder
    from rlkit.training.ranking.scorers import EncoderScorer

    scorer = EncoderScorer(load_encoder(save_tiny_encoder(tmp_path / "encoder")), 1.0)
    num_bytes = sum(weight.nbytes for weight in scorer.parameters())
    assert check_saving(scorer, None, ARGS) < num_bytes / 2
    assert len(scorer.encoder.state_dict()) > 10  # the hooks that leave out the weights are removed
    scorer.encoder[0].model.config.reviewer = object()
    with pytest.raises(UserError, match="cannot save the model: "):
        check_saving(scorer, None, ARGS)


@pytest.mark.parametrize("deepspeed", [False, True])
def test_check_dtypes_rejects_trained_float16_weights(tiny_model, deepspeed):
    model = tiny_model("llama")
    check_dtypes(model.to(torch.bfloat16), deepspeed=deepspeed)
    model.to(torch.float16)
    check_dtypes(model.requires_grad_(False), deepspeed=deepspeed)
    model.lm_head.weight.requires_grad_(True)
    if deepspeed:
        check_dtypes(model, deepspeed=True)
        return
    with pytest.raises(UserError, match=r"dtype must be float32 or bfloat16 to train, but lm_head\.weight"):
        check_dtypes(model, deepspeed=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16"),
        (
            {"use_peft": True, "lora_target_modules": ["embed_tokens"]},
            "LoRA must not adapt model.embed_tokens",
        ),
        ({"model_name_or_path": "adapter"}, "is a LoRA adapter: merge it with `rlkit export"),
    ],
)
def test_rejected_run_leaves_the_previous_one_unchanged(tmp_path, keys, tiny_model, change, message):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 7\n")
    change = {"model_name_or_path": "tied"} | change
    change["model_name_or_path"] = str(tmp_path / change["model_name_or_path"])
    with pytest.raises(UserError, match=message):
        sft(parse_sft([], keys | change | {"overwrite": True}))
    assert sorted(path.name for path in run.iterdir() if path.name != ".lock") == ["config.yaml"]
    assert (run / "config.yaml").read_text() == "seed: 7\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype must be float32"),
        ({"push_to_hub": True}, "(?i)offline"),
        ({"report_to": "wandb"}, "report_to wandb requires an API key: run `wandb login`"),
    ],
)
def test_rejected_run_creates_no_folder(tmp_path, keys, change, message, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=message):
        sft(parse_sft([], keys | change))
    assert not (tmp_path / "run").exists()


def test_reward_whose_state_cannot_be_saved_is_rejected_before_training(tmp_path, keys):
    (tmp_path / "own.py").write_text(UNSAVABLE_REWARD)
    keys |= QUICK_GRPO | {"evaluation_tasks": 0, "rewards": [f"{tmp_path}/own.py:reward"]}
    with pytest.raises(UserError, match=r"state_dict\(\) of 'reward .*' contains a numpy\.float64"):
        train(parse_train([], keys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["sft", "train"])
@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }",
        "{{ raise_exception('no user messages, please') }}",
        "hello",
    ],
)
def test_chat_template_that_fails_is_a_one_line_error(tmp_path, keys, tiny_folder, stage, template):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    keys |= {"model_name_or_path": str(folder)}
    message = (
        r"chat template of .*model (cannot format the prompts: (unexpected '}'|no user messages).*"
        "|formats different prompts alike); fix the template"
    )
    with pytest.raises(UserError, match=message):
        sft(parse_sft([], keys)) if stage == "sft" else train(parse_train([], keys | QUICK_GRPO))
    assert not (tmp_path / "run").exists()


def test_sft_with_a_broken_chat_template_path_is_a_one_line_error(tmp_path, keys):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}")
    with pytest.raises(UserError, match=r"Unexpected end of template"):
        sft(parse_sft([], keys | {"chat_template_path": str(tmp_path / "own.jinja")}))


def test_sft_stops_before_a_step_with_a_nan(tmp_path, keys, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": math.nan}))
    keys |= {"model_name_or_path": str(folder)}
    with pytest.raises(GuardError, match="guard gradient, step 1: the gradient is not finite"):
        sft(parse_sft([], keys))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_model_whose_config_turns_off_named_outputs_trains(tmp_path, keys, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    train(parse_train([], keys | QUICK_GRPO | {"model_name_or_path": str(folder), "evaluation_tasks": 0}))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_overwritten_run_can_log_its_completions(tmp_path, keys):
    keys |= QUICK_GRPO | {"evaluation_tasks": 0, "log_completions": True, "overwrite": True}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    train(parse_train([], keys))
    assert list((tmp_path / "run" / "completions").glob("*.parquet"))


def test_model_with_an_invalid_generation_config_trains_and_is_saved(tmp_path, keys, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "length_penalty": 2.0}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | settings))
    keys |= QUICK_GRPO | {"evaluation_tasks": 0, "model_name_or_path": str(folder), "beta": 0.1}
    train(parse_train([], keys))
    for name in ("checkpoint-2", "model"):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name).generation_config
        assert (saved.eos_token_id, saved.temperature, saved.top_p) == ([2], None, None)


def test_model_with_its_own_code_is_saved_with_it(tmp_path, keys, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "own.py").write_text(REMOTE_CODE)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    sft(parse_sft([], keys | {"model_name_or_path": str(folder), "trust_remote_code": True}))
    saved = tmp_path / "run" / "model"
    assert (saved / "own.py").is_file()
    shutil.rmtree(folder)
    assert type(AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)).__name__ == "OwnModel"
