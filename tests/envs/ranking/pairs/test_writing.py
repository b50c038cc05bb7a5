import pytest

from rlkit.envs.ranking.pairs.writing import is_refusal, read_passage, read_query, writing_prompt


@pytest.mark.parametrize(
    ("reply", "query"),
    [
        ("cheap flights to Lisbon", "cheap flights to Lisbon"),
        ("Query: “cheap flights to Lisbon”\nQuery: another", "cheap flights to Lisbon"),
        ("\n\n1. how  to list files", "how to list files"),
        ("Claim: files are sorted by name", "files are sorted by name"),
        ("Keywords: files, folders", "files, folders"),
        ("query planner settings", "query planner settings"),
        ("title bar color in xterm", "title bar color in xterm"),
        ("3.5 inch floppy disk", "3.5 inch floppy disk"),
        ("<think>a query, say</think>sorted files", "sorted files"),
        ("<think>no end", ""),
        ("**Query:** cheap flights", "cheap flights"),
        ("1. Query: cheap flights", "cheap flights"),
        ('Here is a search query:\n"cheap flights"', "cheap flights"),
        ("what is meant by this:", "what is meant by this:"),
        (' "…" ', ""),
    ],
)
def test_query_is_the_first_line_without_label_and_quotes(reply, query):
    assert read_query(reply) == query


@pytest.mark.parametrize(
    ("reply", "passage"),
    [
        ("Passage: Knead\nthe dough.", "Knead the dough."),
        ("Passage that does not answer it: Knead it.", "Knead it."),
        ("<think>dough</think> Knead: then rest.", "Knead: then rest."),
        ("***", ""),
    ],
)
def test_passage_is_the_reply_on_one_line_without_labels(reply, passage):
    assert read_passage(reply) == passage


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, I can’t help with that",
        "Sorry, but I cannot write this.",
        "My apologies, I am unable to do so",
        "I apologize, but I'm not able to write a query.",
        "I cannot fulfill this request",
        "I'm unable to assist with that",
        "I can't help with that",
        "As an AI language model, I have no documents",
        "As a large language model, I",
        "<think>This is harmful.</think>\n\n**I'm sorry, but I won't do that.**",
    ],
)
def test_refusals_are_recognized(reply):
    assert is_refusal(reply)


@pytest.mark.parametrize(
    "query",
    [
        "I can't open a file",
        "I can't provide a proof of address, what else works?",
        "I'm sorry, but I missed my flight. How do I rebook?",
        "I am sorry poem for a friend",
        "As an AI engineer, which papers should I read?",
        "Sorry, how do I list files?",
        "I cannot help thinking about lunch; find a restaurant",
        "",
    ],
)
def test_queries_that_resemble_refusals_are_none(query):
    assert not is_refusal(query)


def test_prompt_shows_the_examples_before_the_document():
    (message,) = writing_prompt("a b c d", [("e f g", "h")], instruction="Write.", max_words=2)
    assert message["content"] == "Write.\n\nDocument: e f …\nQuery: h\n\nDocument: a b …\nQuery:"
