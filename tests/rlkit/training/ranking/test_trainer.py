"""In-batch objectives: which documents of a batch are negatives of a query."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit.training.ranking.trainer import (
    BatchDocuments,
    Objective,
    RankingTrainer,
    collate,
    list_distillation,
    ranking_metrics,
)


def row(query, ids, grades, relevant=None, *, texts=None, excluded=(), possible_answers=()):
    """Return a training row. The text of a document is its id in capital letters."""
    relevant = relevant or {name: grade for name, grade in zip(ids, grades, strict=True) if grade}
    ranked = sorted(relevant, key=lambda name: -relevant[name])
    return {
        "query": query,
        "passages": texts or [name.upper() for name in ids],
        "grades": grades,
        "ideal": [relevant[name] for name in ranked],
        "ids": ids,
        "relevant": ranked,
        "excluded": list(excluded),
        "possible_answers": list(possible_answers),
        "passages_are_queries": False,
    }


class Scores(torch.nn.Module):
    """A model whose scores are a parameter by query and document."""

    in_batch = True

    def __init__(self, queries, texts):
        super().__init__()
        self.queries, self.texts = queries, texts
        self.scores = torch.nn.Parameter(torch.zeros(len(queries), len(texts)))

    def query_texts(self, queries, passages):
        return list(queries)

    def forward(self, queries, passages, documents, passages_are_queries):
        rows = torch.tensor([self.queries.index(query) for query in queries])
        return self.scores[rows][:, torch.tensor([self.texts.index(text) for text in documents])]


def gradient(rows, objective, tmp_path):
    """Return the gradient of the loss by query and text."""
    from transformers import TrainingArguments

    texts = sorted({passage for r in rows for passage in r["passages"]})
    queries = [r["query"] for r in rows]
    model = Scores(queries, texts)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = RankingTrainer(model, Objective(objective), args=args)
    trainer.compute_loss(model, collate(rows)).backward()
    grad = model.scores.grad
    return {q: {t: grad[i, j].item() for j, t in enumerate(texts)} for i, q in enumerate(queries)}


@pytest.mark.parametrize("objective", ["infonce", "distillation"])
def test_relevant_document_of_another_query_is_not_a_negative(objective, tmp_path):
    both = {"a": 1, "b": 1}
    rows = [row("q1", ["a", "x"], [1, 0], both), row("q2", ["b", "y"], [1, 0], both)]
    gradients = gradient(rows, objective, tmp_path)
    assert gradients["q1"]["B"] == gradients["q2"]["A"] == 0
    assert gradients["q1"]["A"] < 0 < gradients["q1"]["Y"]


@pytest.mark.parametrize("objective", ["infonce", "distillation"])
def test_judgments_of_another_grade_and_excluded_documents_are_not_negatives(objective, tmp_path):
    rows = [
        row("q1", ["a", "c", "x"], [3, 1, 0], {"a": 3, "c": 1, "b": 2}, excluded=["z"]),
        row("q2", ["b", "y", "z"], [1, 0, 0]),
    ]
    gradients = gradient(rows, objective, tmp_path)
    assert gradients["q1"]["B"] == 0 and gradients["q1"]["Z"] == 0 < gradients["q1"]["Y"]
    assert gradients["q2"]["C"] > 0 and gradients["q2"]["Z"] > 0


@pytest.mark.parametrize("objective", ["infonce", "distillation"])
def test_passage_of_a_possible_answer_is_not_a_negative(objective, tmp_path):
    rows = [
        row("q1", ["a"], [1], texts=["A1"], possible_answers=["a", "b"]) | {"relevant": []},
        row("q2", ["a"], [1], texts=["A2"], possible_answers=["a"]) | {"relevant": []},
        row("q3", ["b"], [1], texts=["B"], possible_answers=["b"]) | {"relevant": []},
    ]
    gradients = gradient(rows, objective, tmp_path)
    assert gradients["q1"]["A2"] == gradients["q1"]["B"] == gradients["q2"]["A1"] == 0
    assert gradients["q2"]["A2"] < 0 < gradients["q2"]["B"]
    assert gradients["q3"]["B"] < 0 < gradients["q3"]["A1"]


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_distillation_adds_infonce_with_its_weight(weight, tmp_path):
    from transformers import TrainingArguments

    rows = [row("q1", ["a", "x"], [0.9, 0.1]), row("q2", ["b", "y"], [1, 0.5])]
    model = Scores(["q1", "q2"], ["A", "X", "B", "Y"])
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)

    def loss(**settings):
        objective = Objective("distillation", **settings)
        return RankingTrainer(model, objective, args=args).compute_loss(model, collate(rows)).item()

    teacher, uniform = torch.tensor([[0.9, 0.1], [1, 0.5]]), torch.zeros(2, 2)
    divergence = list_distillation(uniform, teacher, teacher > 0).mean().item()
    # The two documents of the other query are the negatives: log(1 + 2) for equal scores.
    assert loss(infonce_weight=weight) == pytest.approx(divergence + weight * math.log(3))
    assert loss() == pytest.approx(divergence + 0.1 * math.log(3))


def test_answers_of_rows_with_the_same_query_are_not_negatives():
    """A sentence may have a row with a passage of its page, and one with a passage that links to it."""
    rows = [
        row("same", ["a"], [1], possible_answers=["a"]) | {"relevant": []},
        row("same", ["b"], [1], possible_answers=["a", "b"]) | {"relevant": []},
        row("other", ["c"], [1], possible_answers=["c"]) | {"relevant": []},
    ]
    assert BatchDocuments.of(collate(rows)).rankable.tolist() == [
        [True, False, True],
        [False, True, True],
        [True, True, True],
    ]


def test_metrics_of_pairs_rank_the_documents_of_the_batch(tmp_path):
    """The score of a single passage has no spread, which a guard would report as a collapse."""
    from transformers import TrainingArguments

    rows = [row("q1", ["a"], [1]), row("q2", ["b"], [1]), row("q3", ["c"], [1])]
    model = Scores(["q1", "q2", "q3"], ["A", "B", "C"])
    model.scores.data = torch.tensor([[2.0, 1, 0], [2.0, 1, 0], [2.0, 1, 0]])
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = RankingTrainer(model, Objective("infonce"), args=args, train_dataset=rows)
    trainer.compute_loss(model, collate(rows))
    assert trainer.metrics["utility"] == [pytest.approx((1 + 1 / math.log2(3) + 0.5) / 3)]
    assert trainer.metrics["score_spread"] == [pytest.approx((2 / 3) ** 0.5)]
    same = [row("q1", ["a"], [1], texts=["A"]), row("q2", ["b"], [1], texts=["A"])]
    trainer.metrics.clear()
    trainer.compute_loss(model, collate(same))
    assert trainer.metrics["utility"] == [pytest.approx(1)]


def test_candidates_of_a_possible_answer_are_ranked_as_judged():
    """A list may have several passages of the document that its query is taken from."""
    rows = [row("q", ["a", "a"], [1, 0], {"a": 1}, texts=["A1", "A2"], possible_answers=["a"])]
    assert BatchDocuments.of(collate(rows)).rankable.tolist() == [[True, True]]


def test_teacher_scores_up_to_1_are_not_scaled():
    grades, mask = torch.tensor([[0.5, 0.25], [2.0, 1.0], [1.0, 0.5]]), torch.ones(3, 2, dtype=torch.bool)
    losses = list_distillation(torch.zeros(3, 2), grades, mask)
    assert losses[1] == losses[2] > losses[0] > 0


def test_document_with_the_text_of_a_relevant_one_is_not_a_negative(tmp_path):
    rows = [
        row("q1", ["a", "x"], [1, 0], texts=["same", "X"]),
        row("q2", ["b", "y"], [1, 0], texts=["same", "Y"]),
        row("q3", ["c", "a"], [1, 0], texts=["C", "same"]),
    ]
    batch = BatchDocuments.of(collate(rows))
    assert batch.texts == ["same", "X", "same", "Y", "C"]
    assert batch.labels.tolist() == [[1, 0, 1, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    without_ids = [r | {"ids": [], "relevant": []} for r in rows]
    batch = BatchDocuments.of(collate(without_ids))
    assert batch.texts == ["same", "X", "Y", "C"]
    assert batch.labels.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    assert batch.columns.tolist() == [[0, 1], [0, 2], [3, 0]]


def test_grades_of_two_candidates_with_the_same_text_are_not_added():
    rows = [row("q", ["a", "b", "c"], [1, 2, 0], texts=["same", "same", "other"])]
    assert BatchDocuments.of(collate(rows)).labels.tolist() == [[2, 2, 0]]
    rows[0] |= {"ids": [], "relevant": []}
    assert BatchDocuments.of(collate(rows)).labels.tolist() == [[2, 0]]


def test_document_with_another_passage_for_each_query_keeps_its_passages():
    """As for collections whose documents are ranked by their passages: each query has its best passage."""
    rows = [
        row("q1", ["d", "x"], [2, 0], texts=["first passage", "other"], excluded=["e"]),
        row("q2", ["e", "d"], [0, 1], {"d": 1}, texts=["second of e", "second passage"]),
        row("q3", ["e"], [1], texts=["third of e"]),
    ]
    batch = BatchDocuments.of(collate(rows))
    assert batch.texts == ["first passage", "other", "second of e", "second passage", "third of e"]
    assert batch.columns.tolist() == [[0, 1], [2, 3], [4, -1]]
    assert batch.labels.tolist() == [[2, 0, 0, 2, 0], [1, 0, 0, 1, 0], [0, 0, 1, 0, 1]]
    assert batch.rankable[0].tolist() == [True, True, False, True, False] and batch.rankable[1:].all()


def test_grades_of_other_queries_documents_are_labels_of_wasserstein(tmp_path):
    rows = [row("q1", ["a"], [3], {"a": 3, "b": 2}), row("q2", ["b"], [1])]
    assert BatchDocuments.of(collate(rows)).labels.tolist() == [[3, 2], [0, 1]]
    assert all(
        math.isfinite(x)
        for of_query in gradient(rows, "wasserstein", tmp_path).values()
        for x in of_query.values()
    )


def test_labels_of_other_queries_passages_are_0_and_grades_are_not_scaled():
    """In SyCL's batches of 16 lists of four, a passage of grade 3 thus gets 22% of the target."""
    ids = [[f"d{i}-{grade}" for grade in (3, 2, 1, 0)] for i in range(16)]
    rows = [row(f"q{i}", names, [3, 2, 1, 0]) | {"relevant": []} for i, names in enumerate(ids)]
    labels = BatchDocuments.of(collate(rows)).labels
    assert labels.shape == (16, 64) and labels.sum().item() == 16 * 6
    assert labels.softmax(-1).max(-1).values.tolist() == pytest.approx([0.2203] * 16, abs=1e-4)


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "num_steps"), [(5, 2, 4), (7, 3, 4), (8, 3, 6), (2, 4, 2)]
)
def test_last_batch_of_one_query_is_dropped_by_wasserstein(tmp_path, num_rows, batch_size, num_steps):
    from transformers import TrainingArguments

    rows = [row(f"q{i}", [f"a{i}", f"b{i}"], [3, 0]) for i in range(num_rows)]
    model = Scores([r["query"] for r in rows], [text for r in rows for text in r["passages"]])
    args = TrainingArguments(
        str(tmp_path),
        report_to="none",
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=batch_size,
        remove_unused_columns=False,
        save_strategy="no",
    )
    trainer = RankingTrainer(model, Objective("wasserstein"), args=args, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == num_steps


documents = st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True)


@given(
    st.lists(
        st.tuples(documents, st.dictionaries(st.integers(0, 7), st.integers(1, 3))), min_size=1, max_size=5
    ),
    st.booleans(),
)
def test_labels_equal_the_judgments(queries, share_texts):
    """Documents i and i + 4 have the same text if `share_texts`."""
    rows = []
    for number, (ids, judged) in enumerate(queries):
        grades = [judged.get(i, 0) for i in ids]
        texts = [f"text {i % 4 if share_texts else i}" for i in ids]
        judged_ids = {f"d{i}": grade for i, grade in judged.items()} or {"none": 0}
        rows.append(row(f"q{number}", [f"d{i}" for i in ids], grades, judged_ids, texts=texts))
    batch = BatchDocuments.of(collate(rows))
    order = list(dict.fromkeys(i for ids, _ in queries for i in ids))
    assert len(batch.texts) == len(order)
    for b, (ids, judged) in enumerate(queries):
        assert batch.columns[b, : len(ids)].tolist() == [order.index(i) for i in ids]
        for column in range(len(order)):
            same = [j for j in order if batch.texts[order.index(j)] == batch.texts[column]]
            assert batch.labels[b, column] == max(judged.get(j, 0) for j in same)


def test_metrics_are_the_utility_and_the_spread_of_the_ranking_by_score():
    grades, mask = (
        torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]),
        torch.tensor([[True, True, True], [True, True, False]]),
    )
    scores = torch.tensor([[3.0, 0, 0], [1.0, -1.0, 9.0]])
    metrics = ranking_metrics(Objective(), scores, grades, mask, torch.tensor([[1.0], [1.0]]))
    assert metrics["utility"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert metrics["score_spread"] == pytest.approx((2**0.5 + 1) / 2)


def test_negative_grades_are_not_relevant_and_not_padding():
    batch = collate([row("q", ["a", "b"], [-1, 1], {"b": 1}), row("q", ["a"], [1])])
    assert batch["grades"].tolist() == [[0, 1], [1, 0]]
    assert batch["mask"].tolist() == [[True, True], [True, False]]


def test_checkpoint_of_a_scorer_with_tied_weights_is_saved_and_loaded(tmp_path):
    """The embeddings of T5 encoders have two names, and safetensors rejects tensors that share memory."""
    from transformers import TrainingArguments

    scorer = torch.nn.ModuleDict(
        {"shared": torch.nn.Embedding(3, 2), "embed_tokens": torch.nn.Embedding(3, 2)}
    )
    scorer["embed_tokens"].weight = scorer["shared"].weight
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = RankingTrainer(scorer, Objective(), args=arguments)
    trainer.save_model(tmp_path / "checkpoint-1")
    expected = scorer["shared"].weight.detach().clone()
    scorer["shared"].weight.data.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(scorer["embed_tokens"].weight, expected)
    assert scorer["embed_tokens"].weight is scorer["shared"].weight
