"""Queries that change document vectors: fusion, training, the rows of the file, and builds that resume."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.commands.index import main
from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, Query
from rlkit.retrieval.engines import dense as module
from rlkit.retrieval.engines.document_queries import (
    DocumentQueries,
    fuse,
    read_document_queries,
    train_vectors,
)
from rlkit.retrieval.engines.index import build_index, open_index
from rlkit.retrieval.store import DocumentStore, write_documents
from tests.tiny_encoders import save_tiny_encoder

TEXTS = ["red wine", "stone castle", "green river", "iron bread", "queen horse"]
DOCUMENTS = [Document(f"d{i}", "", text) for i, text in enumerate(TEXTS)]
ROWS = [("king road", "d1"), ("blue", "d3"), ("north castle", "d1"), ("cheese", "d4"), ("blue", "d1")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    prompts = {"query": "query ", "document": "passage "}
    return {
        "cosine": save_tiny_encoder(folder / "cosine", prompts=prompts, similarity_fn_name="cosine"),
        "dot": save_tiny_encoder(folder / "dot", prompts=prompts, similarity_fn_name="dot"),
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_documents(folder, DOCUMENTS, None)
    return DocumentStore(folder)


def write_queries(path, rows=ROWS):
    lines = [json.dumps({"query": query, "document": document}) + "\n" for query, document in rows]
    path.write_text("".join(lines))
    return path


def vectors_of(folder):
    return np.load(folder / "dense" / "embeddings.npy")


def build(folder, model, **settings):
    return build_index(DOCUMENTS, folder, "dense", model=model, **settings)


def test_fuse_equals_the_formula_by_hand():
    documents = np.array([[1, 0], [0, 1]], np.float32)
    queries, rows = np.array([[0, 1], [0, 1], [0.6, 0.8]], np.float32), np.array([0, 0, 0])
    # .9 (1, 0) + .1 (.6, 2.8) = (.96, .28), which has length 1.
    for normalize in (False, True):
        np.testing.assert_allclose(
            fuse(documents, queries, rows, 0.1, normalize), [[0.96, 0.28], [0, 1]], 1e-6
        )
    # .5 (1, 0) + .5 (.6, 2.8) = (.8, 1.4)
    np.testing.assert_allclose(fuse(documents, queries, rows, 0.5, False)[0], [0.8, 1.4], 1e-6)
    unit = np.array([0.8, 1.4]) / np.hypot(0.8, 1.4)
    np.testing.assert_allclose(fuse(documents, queries, rows, 0.5, True)[0], unit, 1e-6)


def test_fuse_of_opposite_vectors_is_finite():
    opposite = fuse(np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]]), np.array([0]), 0.5, True)
    assert np.isfinite(opposite).all()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("block", [2, 1024])
def test_index_holds_fused_vectors(tmp_path, monkeypatch, models, similarity, block):
    monkeypatch.setattr(module, "BLOCK", block)
    augment = write_queries(tmp_path / "queries.jsonl")
    model = models[similarity]
    folder = build(tmp_path / "index", model, augment=augment, alpha=0.2)
    encoder = module.load_encoder(model)
    normalize = similarity == "cosine"
    expected = encoder.encode_document(TEXTS, normalize_embeddings=normalize, show_progress_bar=False)
    unfused = expected.copy()
    for document in ("d1", "d3", "d4"):
        row = int(document[1:])
        queries = [query for query, of in ROWS if of == document]
        sums = encoder.encode_query(queries, normalize_embeddings=normalize, show_progress_bar=False).sum(0)
        expected[row] = 0.8 * expected[row] + 0.2 * sums
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors_of(folder), expected, atol=1e-5)
    np.testing.assert_allclose(vectors_of(folder)[[0, 2]], unfused[[0, 2]], atol=1e-6)
    assert np.abs(expected[1] - unfused[1]).max() > 1e-2

    (query,) = encoder.encode_query(["red"], normalize_embeddings=normalize, show_progress_bar=False)[None]
    (result,) = open_index(folder).search([Query("red")], 5)
    np.testing.assert_allclose(result.scores, np.sort((query @ expected.T).ravel())[::-1], atol=1e-4)


def test_alpha_zero_equals_the_plain_index(tmp_path, models):
    augment = write_queries(tmp_path / "queries.jsonl")
    for similarity, model in models.items():
        plain = build(tmp_path / f"{similarity}-plain", model)
        zero = build(tmp_path / f"{similarity}-zero", model, augment=augment, alpha=0)
        np.testing.assert_allclose(vectors_of(zero), vectors_of(plain), atol=1e-6)


def test_documents_without_queries_keep_their_exact_vectors(tmp_path, models):
    augment = write_queries(tmp_path / "queries.jsonl", ROWS[:1])
    plain = build(tmp_path / "plain", models["dot"])
    fused = build(tmp_path / "fused", models["dot"], augment=augment, alpha=0.5)
    unchanged = [0, 2, 3, 4]
    assert (vectors_of(fused)[unchanged] == vectors_of(plain)[unchanged]).all()


def test_settings_of_the_fusion_are_in_the_header(tmp_path, models):
    augment = write_queries(tmp_path / "queries.jsonl", [*ROWS, ROWS[0], ROWS[0]])
    folder = build(tmp_path / "index", models["cosine"], augment=augment)
    stored = json.loads((folder / "index.json").read_text())["settings"]["augment"]
    assert len(stored.pop("sha256")) == 64
    assert stored == {"alpha": 0.01, "queries": 5, "documents": 3, "duplicates": 2}


@pytest.mark.parametrize("name", ["queries.csv", "queries.parquet", "queries.jsonl.gz"])
def test_queries_are_read_from_any_table(tmp_path, store, name):
    import pandas

    frame = pandas.DataFrame(ROWS, columns=["query", "document"])
    path = tmp_path / name
    if name.endswith("csv"):
        frame.to_csv(path, index=False)
    elif name.endswith("parquet"):
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    document_queries = read_document_queries(path, store)
    assert document_queries.rows.tolist() == [1, 1, 1, 3, 4]
    assert document_queries.queries == ["blue", "king road", "north castle", "blue", "cheese"]
    assert document_queries.of_block(2, 4)[0] == ["blue"]
    assert document_queries.of_block(2, 4)[1].tolist() == [1]


@given(order=st.permutations(ROWS))
def test_order_of_rows_does_not_matter(store, tmp_path_factory, order):
    path = tmp_path_factory.mktemp("order") / "queries.jsonl"
    document_queries = read_document_queries(write_queries(path, order), store)
    expected = read_document_queries(write_queries(path), store)
    assert document_queries.queries == expected.queries
    assert document_queries.rows.tolist() == expected.rows.tolist()


@given(seed=st.integers(0, 10**6), alpha=st.floats(0, 1), normalize=st.booleans())
def test_fuse_does_not_depend_on_the_order_of_queries(seed, alpha, normalize):
    rng = np.random.default_rng(seed)
    documents, queries = (rng.standard_normal((n, 8)).astype(np.float32) for n in (4, 12))
    rows, order = rng.integers(0, 4, 12), rng.permutation(12)
    first = fuse(documents, queries, rows, alpha, normalize)
    second = fuse(documents, queries[order], rows[order], alpha, normalize)
    # Rounding grows if a sum is close to 0 before it is normalized.
    np.testing.assert_allclose(first, second, atol=1e-3 if normalize else 1e-5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"query": "a", "document": "d0"}', '{"query": "a", "document": "x"}'],
            r":2: the document 'x' is not",
        ),
        (['{"query": " ", "document": "d0"}'], r":1: query must be a non-empty string, not ' '"),
        (['{"query": 7, "document": "d0"}'], r":1: query must be a non-empty string, not 7"),
        (['{"query": "a"}'], ":1: there is no document; each row needs query and document"),
        (['{"text": "a", "document": "d0"}'], ":1: there is no query; each row needs"),
        (['{"query": "a", "document": true}'], r":1: document must be the id of a document, not True"),
        (
            ['{"query": "a", "document": "d0", "passages_are_queries": true}'],
            ":1: query must not be a document",
        ),
        (['{"query": "a"'], r":1: the line is not valid JSON"),
        ([""], r"queries\.jsonl has no rows"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, store, lines, message):
    path = tmp_path / "queries.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        read_document_queries(path, store)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.1}, "alpha has no effect without queries to fuse"),
        ({"augment": "queries.jsonl", "alpha": 1.5}, r"alpha must be from 0 to 1, not 1\.5"),
        ({"augment": "queries.jsonl", "alpha": float("nan")}, "alpha must be from 0 to 1, not nan"),
        ({"augment": "/nowhere/queries.jsonl"}, r"there is no file /nowhere/queries\.jsonl"),
        ({"train_epochs": 3}, "train_epochs has no effect without queries to train on"),
        ({"train_queries": "q.jsonl", "train_epochs": 0}, "train_epochs must be an integer of at least 1"),
        ({"train_queries": "/nowhere/queries.jsonl"}, r"there is no file /nowhere/queries\.jsonl"),
    ],
)
def test_invalid_settings_raise_user_error(tmp_path, models, settings, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path / "index", models["cosine"], **settings)


class StopError(Exception):
    """Raised by a progress bar to interrupt a build."""


def stop_after_two_blocks(items, name, total):
    yield from items if name != "embeddings" else islice(items, 2)
    if name == "embeddings":
        raise StopError


def test_interrupted_build_fuses_each_block_once(tmp_path, monkeypatch, models):
    monkeypatch.setattr(module, "BLOCK", 2)
    augment = write_queries(tmp_path / "queries.jsonl")
    settings = {"model": models["dot"], "augment": augment, "alpha": 0.3, "source": ["corpus"]}
    with pytest.raises(StopError):
        build_index(DOCUMENTS, tmp_path / "index", "dense", progress=stop_after_two_blocks, **settings)
    encoded = []

    def count(items, name, total):
        for item in items:
            encoded.append(name)
            yield item

    resumed = build_index(iter(()), tmp_path / "index", "dense", progress=count, **settings)
    assert encoded == ["embeddings"]
    uninterrupted = build_index(DOCUMENTS, tmp_path / "whole", "dense", **settings)
    np.testing.assert_allclose(vectors_of(resumed), vectors_of(uninterrupted), atol=1e-6)


@pytest.mark.parametrize("change", ["alpha", "queries", "no queries"])
def test_interrupted_build_with_another_fusion_starts_over(tmp_path, monkeypatch, models, change):
    monkeypatch.setattr(module, "BLOCK", 2)
    augment = write_queries(tmp_path / "queries.jsonl")
    settings = {"augment": augment, "alpha": 0.3}
    with pytest.raises(StopError):
        build(tmp_path / "index", models["dot"], progress=stop_after_two_blocks, **settings)
    if change == "alpha":
        settings["alpha"] = 0.2
    elif change == "queries":
        write_queries(augment, ROWS[:3])
    else:
        settings = {}
    resumed = build(tmp_path / "index", models["dot"], **settings)
    uninterrupted = build(tmp_path / "whole", models["dot"], **settings)
    np.testing.assert_allclose(vectors_of(resumed), vectors_of(uninterrupted), atol=1e-6)


def test_approximate_index_searches_fused_vectors(tmp_path, models):
    augment = write_queries(tmp_path / "queries.jsonl")
    exact, approximate = (
        open_index(build(tmp_path / name, models["cosine"], augment=augment, alpha=0.5, **settings))
        for name, settings in (("exact", {}), ("approximate", {"approximate": True}))
    )
    (expected,), (result,) = (engine.search([Query("blue")], 2) for engine in (exact, approximate))
    np.testing.assert_allclose(result.scores[:1], expected.scores[:1], atol=1e-5)


def test_command_prints_alpha_times_n(tmp_path, models, capsys):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": d.id, "text": d.text}) + "\n" for d in DOCUMENTS))
    augment = write_queries(tmp_path / "queries.jsonl", [*ROWS, ROWS[0]])
    arguments = [str(corpus), "--engine", "dense", "--model", models["cosine"], "--augment", str(augment)]
    assert main([*arguments, "--alpha", "0.06", "-o", str(tmp_path / "index")]) == 0
    output = capsys.readouterr().out
    assert "5 queries fused into 3 documents: alpha 0.06, n 1.67 queries per document" in output
    assert "alpha * n 0.1; 1 duplicate rows dropped" in output


def queries_of(pairs):
    """Return the queries of a table of pairs of a query and a row."""
    pairs = sorted((row, query) for query, row in pairs)
    return DocumentQueries(np.array([row for row, _ in pairs]), [query for _, query in pairs], 0, "")


def unit_vectors(n, seed):
    vectors = np.random.default_rng(seed).standard_normal((n, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_one_step_of_training_equals_the_gradient_by_hand():
    documents, queries = np.eye(2, dtype=np.float32), np.array([[0.6, 0.8]], np.float32)
    # The cosines are .6 and .8, and the scores 12 and 16. The gradient of the score of a unit row d is
    # (q - cos d) / .05: for row 0, (0, 16). With one of two documents as the target, the loss is
    # ln(1 + e^4), and row 0 moves by .1 (1 - p) (0, 16) / 128, where p = 1 / (1 + e^4): a
    # query counts as much as in a full batch. Row 1 has no query.
    trained, losses = train_vectors(documents, queries, queries_of([("q", 0)]), epochs=1)
    moved = np.array([1, 0.1 * 16 / (1 + np.exp(-4)) / 128])
    np.testing.assert_allclose(trained, [moved / np.linalg.norm(moved), [0, 1]], atol=1e-5)
    np.testing.assert_allclose(losses, [np.log1p(np.exp(4))], rtol=1e-5)


def test_training_finds_the_documents_of_its_queries():
    documents, queries = unit_vectors(6, 0), unit_vectors(6, 1)
    written = queries_of([(f"q{i}", i) for i in range(6)])
    assert ((queries @ documents.T).argmax(1) != np.arange(6)).any()
    trained, losses = train_vectors(documents, queries, written, epochs=300)
    assert ((queries @ trained.T).argmax(1) == np.arange(6)).all()
    assert len(losses) == 300
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(np.linalg.norm(trained, axis=1), 1, rtol=1e-5)


def test_training_does_not_push_away_another_answer_of_a_query():
    documents, queries = unit_vectors(3, 0), np.repeat(unit_vectors(1, 1), 2, axis=0)
    trained, _ = train_vectors(documents, queries, queries_of([("q", 0), ("q", 1)]))
    before, after = (vectors @ queries[0] for vectors in (documents, trained))
    assert (after[:2] > before[:2]).all()


@pytest.mark.parametrize("pairs", [[("q", 0)], [("q", 0), ("q", 1), ("q", 2)]])
def test_training_with_nothing_to_distinguish_changes_nothing(pairs):
    documents, queries = unit_vectors(len(pairs), 0), np.repeat(unit_vectors(1, 1), len(pairs), axis=0)
    trained, losses = train_vectors(documents, queries, queries_of(pairs), epochs=2)
    np.testing.assert_allclose(trained, documents, atol=1e-6)
    assert losses == [0, 0]


@given(seed=st.integers(0, 10**6))
def test_documents_without_queries_keep_their_vectors_in_training(seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 6, 5)
    written = queries_of([(f"q{i}", row) for i, row in enumerate(rows)])
    documents = unit_vectors(6, seed)
    trained, _ = train_vectors(documents, unit_vectors(5, seed + 1), written, epochs=3)
    unchanged = ~np.isin(np.arange(6), rows)
    np.testing.assert_allclose(trained[unchanged], documents[unchanged], atol=1e-6)
    assert np.isfinite(trained).all()
    assert np.abs(trained - documents)[~unchanged].max() > 1e-3


def test_training_is_deterministic_and_leaves_its_arguments_unchanged():
    documents, queries = unit_vectors(300, 0), unit_vectors(300, 1)
    written, copies = queries_of([(f"q{i}", i) for i in range(300)]), (documents.copy(), queries.copy())
    first, second, third = (
        train_vectors(documents, queries, written, epochs=1, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert (first == second).all()
    assert (first != third).any()
    assert (documents == copies[0]).all()
    assert (queries == copies[1]).all()


@pytest.mark.parametrize("changes", [{}, {"augment": True}, {"approximate": True}])
def test_index_holds_trained_vectors(tmp_path, models, store, changes):
    table = write_queries(tmp_path / "queries.jsonl")
    if "augment" in changes:
        changes = {"augment": table, "alpha": 0.3}
    model = models["cosine"]
    plain = build(tmp_path / "plain", model, **changes)
    trained = build(tmp_path / "trained", model, train_queries=table, train_epochs=300, **changes)
    queries = read_document_queries(table, store)
    vectors = module.encode(module.load_encoder(model).encode_query, queries.queries, None, True)
    expected, losses = train_vectors(vectors_of(plain), vectors, queries, epochs=300)
    np.testing.assert_allclose(vectors_of(trained), expected, atol=1e-5)
    assert np.abs(vectors_of(trained) - vectors_of(plain)).max() > 1e-2
    stored = json.loads((trained / "index.json").read_text())["settings"]["train"]
    assert len(stored.pop("sha256")) == 64
    np.testing.assert_allclose(stored.pop("losses"), losses, rtol=1e-4)
    assert stored == {"epochs": 300, "queries": 5, "documents": 3, "duplicates": 0}
    assert not (trained / "dense" / "state.json").exists()
    ids = [open_index(folder).search_ids([Query("cheese")], 5)[0].ids for folder in (plain, trained)]
    assert ids[1][0] == "d4"
    assert ids[0].index("d4") > 0


def test_training_needs_the_cosine(tmp_path, models):
    table = write_queries(tmp_path / "queries.jsonl")
    with pytest.raises(UserError, match="train_queries needs the similarity cosine, not dot"):
        build(tmp_path / "index", models["dot"], train_queries=table)


@pytest.mark.parametrize("when", ["training", "lists"])
def test_build_that_stops_in_training_or_after_it_does_not_encode_again(tmp_path, models, when):
    table = write_queries(tmp_path / "queries.jsonl")
    settings = {"model": models["cosine"], "source": ["corpus"], "approximate": True}
    uninterrupted = build_index(DOCUMENTS, tmp_path / "whole", "dense", train_queries=table, **settings)

    def stop(items, name, total):
        yield from items if name != when else islice(items, 1)
        if name == when:
            raise StopError

    encoded = []

    def count(items, name, total):
        for item in items:
            encoded.append(name)
            yield item

    with pytest.raises(StopError):
        build_index(
            DOCUMENTS,
            tmp_path / "index",
            "dense",
            progress=stop,
            train_queries=table,
            train_epochs=2,
            **settings,
        )
    resumed = build_index(
        iter(()), tmp_path / "index", "dense", progress=count, train_queries=table, **settings
    )
    assert "embeddings" not in encoded
    np.testing.assert_allclose(vectors_of(resumed), vectors_of(uninterrupted), atol=1e-6)


def test_build_that_stops_while_vectors_are_replaced_encodes_again(tmp_path, monkeypatch, models):
    table = write_queries(tmp_path / "queries.jsonl")
    settings = {"model": models["cosine"], "source": ["corpus"], "train_queries": table}
    uninterrupted = build_index(DOCUMENTS, tmp_path / "whole", "dense", **settings)
    replace = module._replace_embeddings

    def replace_and_stop(folder, vectors):
        replace(folder, vectors)
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(module, "_replace_embeddings", replace_and_stop)
        with pytest.raises(StopError):
            build_index(DOCUMENTS, tmp_path / "index", "dense", **settings)
    resumed = build_index(iter(()), tmp_path / "index", "dense", **settings)
    np.testing.assert_allclose(vectors_of(resumed), vectors_of(uninterrupted), atol=1e-6)


def test_command_prints_the_training_of_vectors(tmp_path, models, capsys):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": d.id, "text": d.text}) + "\n" for d in DOCUMENTS))
    table = write_queries(tmp_path / "queries.jsonl")
    arguments = [str(corpus), "--engine", "dense", "--model", models["cosine"], "--train_epochs", "3"]
    with pytest.raises(UserError, match="--train_epochs has no effect without queries to train on"):
        main([*arguments, "-o", str(tmp_path / "index")])
    with pytest.raises(UserError, match="--train_epochs must be an integer of at least 1, not 0"):
        main([*arguments[:-1], "0", "--train_queries", str(table), "-o", str(tmp_path / "index")])
    assert main([*arguments, "--train_queries", str(table), "-o", str(tmp_path / "index")]) == 0
    output = capsys.readouterr().out
    assert "vectors of 3 documents trained on 5 queries: 3 epochs, loss " in output
