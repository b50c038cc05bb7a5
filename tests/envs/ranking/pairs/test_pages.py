import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.ranking.pairs.pages import (
    Page,
    Section,
    linking_pages,
    read_pages,
    sentences,
    split_passages,
    write_pages,
)
from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document
from rlkit.words import words
from tests.envs.ranking.folders import write_beir


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
        ("See e.g. Fig. 3 (i.e. this). Next.", ["See e.g. Fig.", "3 (i.e. this).", "Next."]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("As J. Doe wrote, glibc 2.3.4 has it.", ["As J. Doe wrote, glibc 2.3.4 has it."]),
        ("信息检索。它很重要！", ["信息检索。", "它很重要！"]),
        (" \n ", []),
    ],
)
def test_sentences_end_at_punctuation_but_not_after_abbreviations(text, expected):
    assert sentences(text) == expected


@given(st.text(max_size=80))
def test_sentences_keep_all_characters_but_white_space(text):
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


@given(st.lists(st.text("ab .!A", max_size=40), max_size=4), st.integers(1, 8))
def test_passages_hold_whole_sentences_up_to_a_number_of_words(paragraphs, max_words):
    passages = split_passages(paragraphs, max_words)
    expected = [sentence for paragraph in paragraphs for sentence in sentences(paragraph)]
    assert " ".join(passages).split() == " ".join(expected).split()
    for passage in passages:
        assert len(words(passage)) <= max_words or passage in expected


def test_characters_count_as_words_in_scripts_without_spaces():
    sentence = "信息检索是一个重要的研究领域。"
    assert split_passages([sentence * 4], 30) == (f"{sentence} {sentence}",) * 2


def test_pages_are_read_as_they_were_written(tmp_path):
    folder = write_beir(tmp_path / "c", {"a": "text", "b": "text"}, {"q": "query"}, {"test": {"q": {"a": 1}}})
    pages = [
        Page("a", "A", (Section("S", ("One.", "Two.")),), ("b",)),
        Page("b", "", (), ()),
    ]
    write_pages(tmp_path / "c", pages)
    assert read_pages(load_collection(folder), tmp_path / "c") == pages


def test_document_without_structure_is_a_page_of_one_section(tmp_path):
    text = "First sentence. Second one.\n\nAnother paragraph."
    folder = write_beir(tmp_path / "c", {"a": ("Title", text)}, {"q": "query"}, {"test": {"q": {"a": 1}}})
    (page,) = read_pages(load_collection(folder), tmp_path / "c")
    passage = "First sentence. Second one. Another paragraph."
    assert page == Page("a", "Title", (Section("", (passage,)),))


def test_passages_of_one_judged_document_are_one_page(tmp_path):
    documents = [Document(f"{name}:{part}", name, f"Part {part}.") for name in "ab" for part in (0, 1)]
    collection = Collection(
        "passages", lambda: iter(documents), {}, {}, document_of=lambda name: name.partition(":")[0]
    )
    pages = read_pages(collection, tmp_path)
    assert [page.id for page in pages] == ["a", "b"]
    assert pages[0].passages == ["Part 0.", "Part 1."] and pages[0].title == "a"


def test_documents_without_a_page_are_counted(tmp_path, caplog):
    documents = {"a": "text", "b": "text", "c": "text"}
    folder = write_beir(tmp_path / "c", documents, {"q": "query"}, {"test": {"q": {"a": 1}}})
    write_pages(tmp_path / "c", [Page("a", "A", ())])
    assert len(read_pages(load_collection(folder), tmp_path / "c")) == 1
    assert "2 of 3 documents are not in" in caplog.text
    write_pages(tmp_path / "c", [Page("a", "A", ())] * 2)
    with pytest.raises(UserError, match=r"pages.jsonl:2: the page 'a' is a duplicate"):
        read_pages(load_collection(folder), tmp_path / "c")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "title": "", "sections": []}, "a page needs an id, a title"),
        ({"id": "a", "title": "", "links": [], "sections": [{"title": "", "passages": [1]}]}, "not a string"),
        ({"id": "z", "title": "", "links": [], "sections": []}, "no document 'z'"),
    ],
)
def test_invalid_pages_name_the_line(tmp_path, row, message):
    folder = write_beir(tmp_path / "c", {"a": "text"}, {"q": "query"}, {"test": {"q": {"a": 1}}})
    (tmp_path / "c" / "pages.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"pages.jsonl:1: .*{message}"):
        read_pages(load_collection(folder), tmp_path / "c")


def test_links_to_the_page_itself_and_to_unknown_pages_are_ignored():
    pages = [Page("a", "", (), ("b", "a", "unknown", "b")), Page("b", "", (), ("a",))]
    linking = linking_pages(pages)
    assert linking == {"a": [pages[1]], "b": [pages[0]]}
