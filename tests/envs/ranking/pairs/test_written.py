import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.ranking.pairs.selection import QueryExample
from rlkit.envs.ranking.pairs.written import (
    FEW_SHOT,
    GRADED,
    INSTRUCTIONS,
    SIX_TYPES,
    describe,
    graded_prompts,
    graded_rows,
    query_prompts,
    query_rows,
)
from rlkit.retrieval.documents import Document
from rlkit.retrieval.queries import JudgedQuery
from rlkit.rollouts.text_generation import Generation

DOCUMENTS = [Document("a", "Cats", "sleep all day"), Document("b", "", "dogs bark")]
EXAMPLES = [QueryExample("e", "birds sing", "Why do birds sing?")]
QUERIES = [JudgedQuery("q1", "why do cats sleep", {"a": 1}), JudgedQuery("q2", "dogs", {"b": 2, "a": 0})]


def test_prompts_have_the_examples_and_the_instruction():
    prompts = list(query_prompts(FEW_SHOT, DOCUMENTS, EXAMPLES, per_document=2, seed=0, instruction="Write."))
    assert [prompt.id for prompt in prompts] == [f"few_shot/{name}/{i}" for name in "ab" for i in range(2)]
    assert prompts[0].messages == [
        {
            "role": "user",
            "content": "Write.\n\nDocument: birds sing\nQuery: Why do birds sing?\n\n"
            "Document: Cats: sleep all day\nQuery:",
        }
    ]
    assert len({prompt.seed for prompt in prompts}) == 4


def test_six_types_have_instructions_of_their_own():
    assert SIX_TYPES == ("question", "claim", "title", "keywords", "web_search", "free")
    assert len({INSTRUCTIONS[source] for source in SIX_TYPES}) == 6
    for source in SIX_TYPES:
        assert "Write only" in INSTRUCTIONS[source] and "{" not in INSTRUCTIONS[source]


@given(st.permutations(DOCUMENTS), st.sampled_from([FEW_SHOT, *SIX_TYPES]), st.integers(0, 2))
def test_prompt_of_a_document_does_not_depend_on_the_others(documents, source, seed):
    def by_id(documents, per_document):
        prompts = query_prompts(source, documents, EXAMPLES, per_document=per_document, seed=seed)
        return {prompt.id: prompt for prompt in prompts}

    everything = by_id(DOCUMENTS, 3)
    assert by_id(documents, 3) == everything
    assert by_id(documents[:1], 2).items() <= everything.items()


def test_unusable_replies_are_dropped_and_counted():
    texts = [
        "Query: where cats sleep",
        "Where cats sleep!",
        "…",
        "why do birds sing",
        "word " * 26,
        "word " * 25,
        "I'm sorry, but I can't help with that.",
        "Document: how to list files",
    ]
    replies = {f"few_shot/a/{i}": Generation(text) for i, text in enumerate(texts)}
    written = query_rows(FEW_SHOT, DOCUMENTS[:1], EXAMPLES, replies, per_document=len(texts) + 1)
    assert [(row.id, row.query) for row in written.rows] == [
        ("few_shot/a/0", "where cats sleep"),
        ("few_shot/a/5", " ".join(["word"] * 25)),
    ]
    assert written.rows[0].passages == ("Cats: sleep all day",) and written.rows[0].targets == (1.0,)
    assert (written.rows[0].source, written.rows[0].document) == (FEW_SHOT, "a")
    assert written.dropped == {
        "duplicate": 1,
        "empty": 1,
        "copy of an example": 1,
        "too long": 1,
        "refusal": 1,
        "another document": 1,
        "failed": 1,
    }
    line = describe(FEW_SHOT, written)
    assert line.startswith(
        "few_shot: 2 rows, 2 distinct queries (duplicates 0.0%), dropped 77.8% (duplicate "
    )
    assert "trigrams of a query from its document 0.0%" in line


def test_queries_that_two_documents_share_count_as_duplicates():
    replies = {"title/a/0": Generation("Animals"), "title/b/0": Generation("animals")}
    line = describe("title", query_rows("title", DOCUMENTS, [], replies, per_document=1))
    assert "2 rows, 1 distinct queries (duplicates 50.0%), dropped 0.0%" in line


def test_copied_trigrams_are_reported():
    replies = {"title/a/0": Generation("sleep all day long")}
    line = describe("title", query_rows("title", DOCUMENTS[:1], [], replies, per_document=1))
    assert "from its document 50.0%" in line


def test_graded_lists_have_one_passage_per_grade():
    prompts = list(graded_prompts(QUERIES, 0))
    assert [prompt.id for prompt in prompts] == [
        f"graded/{name}/{g}" for name in ("q1", "q2") for g in (3, 2, 1, 0)
    ]
    assert prompts[0].messages[0]["content"].endswith("\n\nQuery: why do cats sleep\nPassage:")
    replies = {prompt.id: Generation(f"passage\n{prompt.id}") for prompt in prompts}
    written = graded_rows(QUERIES, replies, 0)
    (first, second) = written.rows
    assert first.query == "why do cats sleep" and first.answers == ("a",) and second.answers == ("b",)
    for row in written.rows:
        assert sorted(row.targets) == [0, 1, 2, 3]
        for passage, target in zip(row.passages, row.targets, strict=True):
            assert passage == f"passage {row.id}/{target:.0f}"
    assert graded_rows(QUERIES[1:], replies, 0).rows == [second]
    orders = {row.targets for seed in range(20) for row in graded_rows(QUERIES, replies, seed).rows}
    assert len(orders) > 5


def test_graded_list_with_an_empty_or_repeated_passage_is_dropped():
    replies = {prompt.id: Generation(prompt.id) for prompt in graded_prompts(QUERIES, 0)}
    unusable = {"graded/q1/2": Generation(" "), "graded/q2/0": Generation("graded/q2/1")}
    written = graded_rows(QUERIES, replies | unusable, 0)
    assert not written.rows and written.dropped == {"empty": 1, "duplicate": 1}
    assert describe(GRADED, written) == "graded: no rows, dropped 100.0% (empty 50.0%, duplicate 50.0%)"


def test_graded_list_with_a_failed_prompt_or_a_refusal_is_dropped():
    replies = {prompt.id: Generation(prompt.id) for prompt in graded_prompts(QUERIES, 0)}
    del replies["graded/q1/2"]
    written = graded_rows(QUERIES, replies, 0)
    assert [row.query for row in written.rows] == ["dogs"] and written.dropped == {"failed": 1}
    replies["graded/q1/2"] = Generation("As an AI language model, I have no opinion.")
    assert graded_rows(QUERIES, replies, 0).dropped == {"refusal": 1}


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("where do cats", None),
        ("where do cats sleep\nand wh", "where do cats sleep"),
        ("Here is a query:\nwhere do", None),
        ("<think>a\nb</think>where do", None),
        ("<think>The user wants", None),
    ],
)
def test_truncated_query_is_dropped_unless_its_line_is_complete(text, query):
    def rows_of(reply):
        return query_rows("title", DOCUMENTS[:1], [], {"title/a/0": reply}, per_document=1)

    written = rows_of(Generation(text, truncated=True))
    assert [row.query for row in written.rows] == ([query] if query else [])
    assert written.dropped == ({} if query else {"truncated": 1})
