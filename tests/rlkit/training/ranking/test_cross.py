"""Training of small cross-encoders: losses, gradients, saved models, from `rlkit rank` to `rlkit eval`."""

import json
import sys

import pytest
import torch
from trl import ModelConfig

from rlkit.arguments.keys import RankArguments
from rlkit.commands import main as cli
from rlkit.errors import UserError
from rlkit.retrieval.cross_encoders import load_cross_encoder
from rlkit.training.ranking.cross import CrossScorer, train_head
from rlkit.training.ranking.lora import add_lora
from rlkit.training.ranking.trainer import Objective, RankingTrainer, collate
from tests.tiny_encoders import save_tiny_transformer

QUERIES = ["red wine", "stone castle", "north road"]
PASSAGES = [
    ["green wine", "a river", "iron"],
    ["castle of stone", "bread"],
    ["road south", "queen", "cheese"],
]
ROWS = [
    {"query": q, "passages": p, "grades": [2, 1, 0][: len(p)], "ideal": [2, 1], "ids": [], "relevant": [],
     "excluded": [], "possible_answers": [], "passages_are_queries": False}
    for q, p in zip(QUERIES, PASSAGES, strict=True)
]  # fmt: skip


@pytest.fixture
def scorer(tmp_path):
    model = load_cross_encoder(save_tiny_transformer(tmp_path / "body"), new_head=True)
    return CrossScorer(model.to("cpu"), 1.0)


def test_scores_are_those_of_the_model_with_zeros_at_padding(scorer):
    scorer.eval()
    scores = scorer(QUERIES, PASSAGES)
    assert scores.shape == (3, 3) and scores[1, 2] == 0
    for query, passages, row in zip(QUERIES, PASSAGES, scores, strict=True):
        torch.testing.assert_close(row[: len(passages)].detach(), scorer.score(query, passages, 2))


def test_temperature_divides_the_scores(scorer):
    scorer.eval()
    expected = scorer(QUERIES, PASSAGES) / 4
    scorer.temperature = 4.0
    torch.testing.assert_close(scorer(QUERIES, PASSAGES), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_float32_under_autocast(scorer, dtype):
    with torch.autocast("cpu", dtype):
        assert scorer(QUERIES, PASSAGES).dtype == torch.float32


def test_saved_model_has_the_same_scores(scorer, tmp_path):
    scorer.eval()
    scorer.save_pretrained(tmp_path / "saved")
    loaded = CrossScorer(load_cross_encoder(str(tmp_path / "saved")).eval().to("cpu"), 1.0)
    torch.testing.assert_close(loaded(QUERIES, PASSAGES), scorer(QUERIES, PASSAGES))


@pytest.mark.parametrize(
    "name", ["plackett_luce", "infonce", "pointwise", "ranknet", "softmax_margin", "distillation"]
)
def test_objective_trains_body_and_head_until_the_rankings_are_ideal(scorer, tmp_path, name):
    import transformers

    args = transformers.TrainingArguments(
        str(tmp_path / "run"), report_to="none", use_cpu=True, per_device_train_batch_size=3
    )
    trainer = RankingTrainer(scorer.eval(), Objective(name), args=args, train_dataset=ROWS)
    batch = collate(ROWS)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(scorer.parameters(), 3e-3)
    for step in range(40):
        loss = trainer.compute_loss(scorer, batch)
        loss.backward()
        if not step:
            head = scorer.model.transformers_model.classifier.weight.grad
            body = scorer.model.transformers_model.get_input_embeddings().weight.grad
            assert head.abs().sum() > 0 and body.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
    scores = scorer(QUERIES, PASSAGES).detach()
    best = 1 if name != "infonce" else 0  # InfoNCE has one positive, and ignores the other relevant ones
    assert all(row[0] > row[1] or best == 0 for row in scores)
    assert all(row[0] > row[2] for row in scores[[0, 2]])


def test_lora_trains_adapters_and_the_head_and_is_merged_when_saved(scorer, tmp_path):
    model = scorer.model
    config = ModelConfig(use_peft=True, lora_r=4, lora_target_modules=["query", "value"])
    add_lora(model, config)
    train_head(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name or ".classifier." in name for name in trained)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    scorer.eval()
    scorer.save_pretrained(tmp_path / "saved")
    loaded = CrossScorer(load_cross_encoder(str(tmp_path / "saved")).eval().to("cpu"), 1.0)
    torch.testing.assert_close(loaded(QUERIES, PASSAGES), scorer(QUERIES, PASSAGES), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"listwise": 3}, "listwise is for encoders"),
        ({"adapter_rank": 4}, "adapter_rank is for encoders"),
        ({"query_prompt": "query: "}, "query_prompt is for encoders"),
        ({"passage_prompt": ""}, "passage_prompt is for encoders"),
        ({"similarity": "dot"}, "similarity is for encoders"),
        ({"objective": "wasserstein"}, "wasserstein compares all documents of a batch"),
    ],
)
def test_cross_encoder_refuses_keys_of_encoders(keys, message):
    with pytest.raises(UserError, match=message):
        RankArguments(cross_encoder=True, **keys)


def test_default_temperature_depends_on_the_scorer():
    assert RankArguments().temperature == 0.05 and RankArguments(cross_encoder=True).temperature == 1.0
    assert RankArguments(cross_encoder=True, temperature=0.5).temperature == 0.5


def test_rank_trains_a_cross_encoder_that_eval_reranks_with(tmp_path, monkeypatch, capsys):
    """The whole way: train from a body without a head, then retrieve with BM25 and rerank in `rlkit eval`."""
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    body = save_tiny_transformer(tmp_path / "body")
    keys = {
        "environment": "rerank-v3",
        "environment_args": json.dumps({"collection": "generated:200:0", "candidates": 4}),
        "model_name_or_path": body,
        "num_tasks": 24,
        "evaluation_tasks": 4,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": "true",
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
    }
    argv = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["rlkit", "rank", "--cross_encoder", "true", *argv])
    assert cli.main() == 0
    assert not list((tmp_path / "run" / "evaluation").glob("first-stage*"))
    retriever = f"rerank:bm25|{tmp_path / 'run' / 'model'}@5"
    capsys.readouterr()
    command = [
        "eval",
        "--collection",
        "generated:200:0",
        "--retriever",
        retriever,
        "-n",
        "4",
        "--depth",
        "20",
    ]
    monkeypatch.setattr(sys, "argv", ["rlkit", *command, "--measures", "ndcg@10", "recall@20", "--json"])
    assert cli.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 <= result["rewards"]["ndcg@10"] <= 1
