"""Rewards for a simulated search engine: parsing of documents, their form, and their answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.simulation import form, holds_answer, obeys, requested_documents, split_documents

TWO_DOCUMENTS = 'Doc 1(Title: "Paris") It lies on the Seine.\nDoc 2: A city in France.'


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        (TWO_DOCUMENTS, [("Paris", "It lies on the Seine."), ("", "A city in France.")]),
        ("Doc 1: a\n\n\nDoc 2: b\n\n b continues", [("", "a"), ("", "b b continues")]),
        ("Document 1: a", [("", "a")]),
        ("Doc 1(Title: Paris) a (b) c", [("Paris", "a (b) c")]),
        ('Doc 1(Title: "A (film)") a', [("A (film)", "a")]),
        ("Here you are:\nDoc 1: a", [("", "a")]),
        ("Doc 1: a\nDoc 2:\nDoc 3: c", [("", "a"), ("", "c")]),
        ("Doc 1:\nDoc 2:", []),
        ("", []),
    ],
)
def test_split_documents_of_the_requested_form(text, documents):
    assert split_documents(text) == requested_documents(text) == documents


HEADINGS = [
    *("Doc {}: ", "Document {}: ", "Doc {}. ", "Doc {}) ", "Doc {} - ", "Doc {} – ", "Doc {} — ", "Doc {}—"),
    *(
        "Doc #{}: ",
        "Doc No. {}: ",
        "Doc {}/3: ",
        "Doc{}: ",
        "DOC {}: ",
        "[Doc {}]: ",
        "[Doc {}] ",
        "Doc [{}]: ",
    ),
    *("Doc {}：", "Doc {}\n", "Document {}:\n\n", "Doc {} ", "Doc {} | ", "> Doc {}: ", "  Doc {}: "),
    *("**Doc {}:** ", "**Doc {}**: ", "**Doc {}**\n", "***Doc {}.*** ", "*Doc {}:* ", "__Doc {}__: "),
    *(
        "- Doc {}: ",
        "* Doc {}\n",
        "• Doc {}: ",
        "- **Doc {}:** ",
        "{}. **Doc {}:** ",
        "### Doc {}\n",
        "# Doc {}: ",
    ),
    *("Result {}: ", "Search result {}: ", "**Passage {}:** ", "Useful document {}: ", "Source {}\n"),
    *("{}. ", "{}) ", "[{}] ", "({}) ", "{}: ", "{} - ", "{}\n", "#{}: ", "【{}】", "{}、"),
    *("**{}.** ", "### {}.\n", "- {}. ", "**[{}]** "),
]
INTRODUCTIONS = [
    *(
        "",
        "Useful output:\n",
        "**Noisy output:**\n\n",
        "Here are the documents:\n\n",
        "Sure! Here they are.\n",
    ),
    "Certainly, here are 3 documents.\n\nUseful output:\n",
]


@pytest.mark.parametrize("heading", HEADINGS)
def test_split_documents_reads_every_usual_heading(heading):
    bodies = ["Paris is a city.", "In 1912. It sank; see (a) [b].", "The 1. FC won 3:1 on 1. May 1821."]
    for num_documents in (1, 2, 3):
        for first in (0, 1):
            expected = [("", body) for body in bodies[:num_documents]]
            lines = [f"{heading.replace('{}', str(i))}{body}" for i, (_, body) in enumerate(expected, first)]
            for introduction in INTRODUCTIONS:
                for separator in ("\n", "\n\n", "\n---\n"):
                    output = introduction + separator.join(lines)
                    assert split_documents(output) == expected, output
                    assert split_documents(f"```\n{output}\n```") == expected, output


@pytest.mark.parametrize(
    "heading", ["Doc 1 {}", "Doc 1{}", "**Doc 1** {}", "Doc 1: {}", "1. {}", "Doc 1 {}:"]
)
@pytest.mark.parametrize("title", ['(Title: "T (2001)")', "(Title: T (2001))", "(title: “T (2001)”)"])
def test_split_documents_reads_titles(heading, title):
    assert split_documents(f"{heading.replace('{}', title)} a (b)") == [("T (2001)", "a (b)")]


@pytest.mark.parametrize(
    ("text", "bodies"),
    [
        # Numbers and names within a document.
        ("Doc 1: He died on\n1. May 1821.\nDoc 2: b\n2. c", ["He died on 1. May 1821.", "b 2. c"]),
        ("It sank in\n1912. Many died.", ["It sank in", "1912. Many died."]),
        ("1912. It sank.\n1913. It did not.", ["1912. It sank.", "1913. It did not."]),
        ("1. a\n1912. b\n2. c\n4. d", ["a 1912. b", "c 4. d"]),
        ("1. a\n   1. x\n   2. y\n2. b", ["a 1. x 2. y", "b"]),
        ("1) a\n1. x\n2. y\n2) b", ["a 1. x 2. y", "b"]),
        ("1. May 1821 was a Tuesday.", ["1. May 1821 was a Tuesday."]),
        ("1.5 million live there.", ["1.5 million live there."]),
        ("1:0 was the result.", ["1:0 was the result."]),
        ("1-bedroom flats are rare.", ["1-bedroom flats are rare."]),
        ("World War 2: it began in 1939.", ["World War 2: it began in 1939."]),
        ("Paris is a city.\nSource 1: Wikipedia", ["Paris is a city.", "Source 1: Wikipedia"]),
        ("Doc 1: a\nArticle 2: of the law", ["a Article 2: of the law"]),
        ("Doc 1: .NET\nDoc 2: -5 degrees\nDoc 3: *b* c", [".NET", "-5 degrees", "*b* c"]),
        ("Doc 1:1912 was\nDoc 2: 1.5 km", ["1912 was", "1.5 km"]),
        # Titles behind the heading, in bold type, and instead of the text.
        ("**Doc 1: Paris**\nIt is *the* city.", ["Paris It is *the* city."]),
        ("Doc 1(Title: It is a city.) \nDoc 2(Title: a (b) c)", ["It is a city.", "a (b) c"]),
        # No headings.
        ("as Doc 1: said", ["as Doc 1: said"]),
        ("I cannot do that.", ["I cannot do that."]),
        ("a\nb", ["a", "b"]),
        ("- a\n- b", ["a", "b"]),
        ("a\ncontinued\n\nb", ["a continued", "b"]),
        ("Here are two documents:\n\na\n\nb", ["a", "b"]),
        ("Useful output:\na", ["a"]),
        ("Useful output:", []),
        ("```\n```", []),
    ],
)
def test_split_documents_keeps_text_that_is_no_heading(text, bodies):
    assert split_documents(text) == [("", body) for body in bodies]


@given(st.text(alphabet='Doc 12.:)([]*#-—`\n aé<>T"', max_size=60))
def test_split_documents_returns_documents_of_one_line(text):
    assert all(body and body == " ".join(body.split()) for _, body in split_documents(text))


@given(st.lists(st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=30), max_size=5))
def test_form_rejects_what_only_split_documents_accepts(bodies):
    """The reward demands the form of the prompt, whatever a search engine accepts."""
    for heading in ("**Doc {}:** ", "{}. ", "- Doc {}: ", "Doc {}. ", "Result {}: ", "### Doc {}\n"):
        lines = [heading.format(i) + f"a{body}" for i, body in enumerate(bodies, 1)]
        assert form("\n".join(lines), len(lines)) == 0


@given(
    st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=9), min_size=1, max_size=7)
)
def test_split_documents_round_trips(bodies):
    completion = "\n".join(f"Doc {i}: {body}" for i, body in enumerate(bodies, 1))
    assert [body for _, body in split_documents(completion)] == bodies
    assert form(completion, len(bodies)) == 1
    assert form(completion, len(bodies) + 1) == 0


def test_form_requires_the_number_of_documents_and_nothing_before_them():
    assert form(f"Sure!\n{TWO_DOCUMENTS}", 2) == 0
    assert form(TWO_DOCUMENTS, 2) == 1 and form(TWO_DOCUMENTS, 1) == 0


def test_documents_in_a_thought_do_not_count():
    thought = "<think>\nDoc 1: the Rhine\n</think>\n"
    assert split_documents(thought + TWO_DOCUMENTS) == split_documents(TWO_DOCUMENTS)
    assert form(thought + TWO_DOCUMENTS, 2) == obeys(thought + TWO_DOCUMENTS, ["Seine"], 2, True) == 1
    assert form(f"<think>\n{TWO_DOCUMENTS}", 2) == 0


def test_holds_answer_matches_whole_words():
    assert holds_answer("It is on the Seine.", ["Rhine", "Seine"])
    assert not holds_answer("the Seinemaritime", ["Seine"])


@pytest.mark.parametrize(
    ("text", "holds", "expected"),
    [
        (TWO_DOCUMENTS, True, 1),
        (TWO_DOCUMENTS, False, 0),
        (TWO_DOCUMENTS.replace("Seine", "Loire"), False, 1),
        (TWO_DOCUMENTS.replace("Seine", "Loire"), True, 0),
        ("It lies on the Seine.", True, 0),  # not in the form of a document
        (f"{TWO_DOCUMENTS}\nDoc 3: more", True, 0),  # one document too many
        ('Doc 1(Title: "Seine") A river.\nDoc 2: b', True, 1),  # the title counts, too
    ],
)
def test_obeys(text, holds, expected):
    assert obeys(text, ["Seine"], 2, holds) == expected
