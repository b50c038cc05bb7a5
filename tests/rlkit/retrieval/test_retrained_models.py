"""Caches of what a model computed are not used for the model that was trained in its place."""

import json
import os
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from rlkit.envs.ranking.rerank import RerankEnvironment
from rlkit.envs.ranking.tree import open_tree
from rlkit.envs.search.simulated import open_simulated
from rlkit.errors import UserError
from rlkit.retrieval.cache import collection_digest
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, Query
from rlkit.retrieval.engines import dense as dense_module
from rlkit.retrieval.engines.dense import OutdatedIndexError
from rlkit.retrieval.engines.index import build_index, open_index
from rlkit.retrieval.retrievers import open_retriever, retrieve

WORDS = ["red", "blue", "green", "river", "castle", "wine", "iron", "ship", "hill", "goat", "town", "shop"]
WORDS += ["market", "bridge", "mill"]
DOCUMENTS = [Document(f"d{i}", "", " ".join(WORDS[i % 7 : i % 7 + 3] + WORDS[-i % 5 :])) for i in range(40)]
QUERIES = {"a": "red river", "b": "castle wine shop", "c": "goat mill"}
COLLECTION = Collection(
    "small", lambda: iter(DOCUMENTS), QUERIES, {"test": {name: {"d1": 1} for name in QUERIES}}
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def new_encoder(tmp_path_factory):
    """Return the folder of a tiny BERT encoder with random weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture
def encoder(new_encoder, tmp_path):
    return shutil.copytree(new_encoder, tmp_path / "encoder")


def retrain(folder):
    """Train an encoder for some steps and save it over itself."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu").train()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(3):
        features = model.preprocess([document.text for document in DOCUMENTS[:8]])
        vectors = torch.nn.functional.normalize(model(features)["sentence_embedding"], dim=1)
        optimizer.zero_grad()
        torch.logsumexp(vectors @ vectors.T / 0.05, 1).mean().backward()
        optimizer.step()
    model.save(str(folder))


def edit_weights_unnoticed(folder):
    """Change weights in place, with the same size, time and inode of the file."""
    path = folder / "model.safetensors"
    status, content = path.stat(), bytearray(path.read_bytes())
    weights = np.frombuffer(content, np.float32, offset=len(content) - 4000)
    weights *= -1.5
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def change_pooling(folder):
    """Edit one value of a module's settings."""
    path = folder / "1_Pooling" / "config.json"
    assert '"mean"' in path.read_text()
    path.write_text(path.read_text().replace('"mean"', '"max"'))


def swap_tokens(folder):
    """Exchange two words of the tokenizer, which leaves the size of the file as it is."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["wine"], vocabulary["mill"] = vocabulary["mill"], vocabulary["wine"]
    path.write_text(json.dumps(tokenizer))


CHANGES = [retrain, edit_weights_unnoticed, change_pooling, swap_tokens]


def scores(retriever):
    engine = open_retriever(retriever, COLLECTION)
    results = engine.search([Query(text) for text in QUERIES.values()], 40)
    return [dict(zip((d.id for d in r.documents), r.scores, strict=True)) for r in results]


def assert_close(first, second):
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_retriever_scores_a_changed_model_as_its_copy(encoder, tmp_path, kind, change):
    before = scores(f"{kind}:{encoder}")
    change(encoder)
    after = scores(f"{kind}:{encoder}")
    shutil.copytree(encoder, tmp_path / "copy")
    (tmp_path / "cache").rename(tmp_path / "old cache")
    assert_close(after, scores(f"{kind}:{tmp_path / 'copy'}"))
    assert before != after


def test_copy_of_a_model_uses_its_cached_index(encoder, tmp_path):
    first = scores(f"dense:{encoder}")
    folders = sorted((tmp_path / "cache" / "search").iterdir())
    shutil.copytree(encoder, tmp_path / "copy")
    retrain(encoder)  # the index names this folder, whose model is now another one
    assert_close(scores(f"dense:{tmp_path / 'copy'}"), first)
    assert sorted((tmp_path / "cache" / "search").iterdir()) == folders


@pytest.mark.parametrize("change", CHANGES)
def test_index_folder_of_a_changed_model_is_refused(encoder, tmp_path, change):
    folder = build_index(DOCUMENTS, tmp_path / "index", "dense", model=str(encoder))
    shutil.copytree(encoder, tmp_path / "copy")
    open_index(folder)
    change(encoder)
    with pytest.raises(OutdatedIndexError, match=r"have changed since .*`rlkit index --overwrite`"):
        open_index(folder)
    assert len(open_index(folder, model=str(tmp_path / "copy")).documents) == 40
    build_index(DOCUMENTS, folder, "dense", model=str(encoder), overwrite=True)
    open_index(folder)


def test_index_without_a_fingerprint_is_opened_with_a_warning(encoder, tmp_path, caplog):
    folder = build_index(DOCUMENTS, tmp_path / "index", "dense", model=str(encoder))
    header = json.loads((folder / "index.json").read_text())
    assert header["settings"].pop("model_fingerprint")
    (folder / "index.json").write_text(json.dumps(header))
    open_index(folder)
    assert "does not say which weights" in caplog.text


def test_interrupted_build_does_not_resume_with_a_changed_model(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(dense_module, "BLOCK", 10)

    def interrupt(items, name, total):
        yield from items if name != "embeddings" else islice(items, 2)
        if name == "embeddings":
            raise KeyboardInterrupt

    settings = {"model": str(encoder), "source": ["corpus"]}
    with pytest.raises(KeyboardInterrupt):
        build_index(DOCUMENTS, tmp_path / "index", "dense", progress=interrupt, **settings)
    retrain(encoder)
    build_index(DOCUMENTS, tmp_path / "index", "dense", **settings)
    build_index(DOCUMENTS, tmp_path / "fresh", "dense", **settings)
    vectors, fresh = (np.load(tmp_path / n / "dense" / "embeddings.npy") for n in ("index", "fresh"))
    np.testing.assert_array_equal(vectors, fresh)


def test_tree_is_built_again_for_a_retrained_model(encoder):
    before = open_tree(COLLECTION, f"dense:{encoder}", 4, 8, "words")
    assert open_tree(COLLECTION, f"dense:{encoder}", 4, 8, "words") == before
    retrain(encoder)
    assert open_tree(COLLECTION, f"dense:{encoder}", 4, 8, "words") != before


def test_summaries_are_written_again_by_a_retrained_model(tiny_model, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "writer")
    trees = []
    for seed in (0, 1):
        tiny_model("llama", seed=seed, max_position_embeddings=2048).save_pretrained(tmp_path / "writer")
        trees.append(open_tree(COLLECTION, "words", 8, 8, str(tmp_path / "writer")))
    assert trees[0].texts != trees[1].texts and trees[0].children == trees[1].children


def test_simulated_documents_are_written_again_by_a_retrained_model(tiny_model, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "writer")
    texts = []
    for seed in (0, 1, 1):
        tiny_model("llama", seed=seed, max_position_embeddings=2048).save_pretrained(tmp_path / "writer")
        engine = open_simulated(str(tmp_path / "writer"), tokens=8, cache=str(tmp_path / "documents"))
        (result,) = engine.search([Query("river")], 1)
        texts.append([document.text for document in result.documents])
    assert texts[0] != texts[1] == texts[2] and engine.cache.hits == 1


def test_candidates_of_rerank_are_those_of_the_retrained_model(encoder, tmp_path):
    folder = tmp_path / "collection"
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": d.id, "title": d.title, "text": d.text} for d in DOCUMENTS]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"_id": name, "text": text} for name, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\td1\t1\n" for q in QUERIES)
    )

    def prompts(model):
        environment = RerankEnvironment(collection=str(folder), retriever=f"dense:{model}", candidates=5)
        return [task["prompt"] for task in environment.tasks("test", 3, 0)]

    before = prompts(encoder)
    retrain(encoder)
    after = prompts(encoder)
    shutil.copytree(encoder, tmp_path / "copy")
    (tmp_path / "cache").rename(tmp_path / "old cache")
    assert after == prompts(tmp_path / "copy") != before


def test_collection_without_a_source_is_identified_by_all_documents():
    many = [Document(str(i), "", f"word {i}") for i in range(300)]
    collection = Collection("many", lambda: iter(many), {}, {})
    changed = [*many[:250], Document("250", "", "another word"), *many[251:]]
    first = collection_digest(collection)
    assert collection_digest(replace(collection, documents=lambda: iter(changed))) != first
    assert collection_digest(replace(collection, documents=lambda: iter(list(many)))) == first
    # A source says whether documents have changed, without reading them.
    assert collection_digest(replace(collection, source=["a"])) != collection_digest(
        replace(collection, source=["b"])
    )


def test_missing_model_raises_user_error():
    for name in ("dense:/nowhere/model", "hybrid:nobody/no-such-model"):
        with pytest.raises(UserError, match="cannot be loaded"):
            open_retriever(name, COLLECTION)


def test_retrieve_ranks_with_the_model_of_the_last_training(encoder):
    first = retrieve(open_retriever(f"dense:{encoder}", COLLECTION), COLLECTION, QUERIES, 40)
    retrain(encoder)
    second = retrieve(open_retriever(f"dense:{encoder}", COLLECTION), COLLECTION, QUERIES, 40)
    assert first != second and first.keys() == second.keys()
