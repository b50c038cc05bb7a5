import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.ranking.pairs.pages import Page, Section, sentences
from rlkit.envs.ranking.pairs.structure import GENERATORS, ict, wlp

NAMES = ["a", "b", "c", "d"]


def sentence(*numbers):
    """Return a sentence of five words that no other numbers give."""
    return "Word " + " ".join(f"w{number}" for number in numbers) + " ends it."


@st.composite
def page_lists(draw):
    """Return four pages with two sections of two passages of two or three sentences."""
    pages = []
    for i, name in enumerate(NAMES):
        sections = tuple(
            Section(
                f"S{j}",
                tuple(
                    " ".join(sentence(i, j, k, m) for m in range(draw(st.integers(2, 3)))) for k in range(2)
                ),
            )
            for j in range(2)
        )
        links = tuple(draw(st.lists(st.sampled_from(NAMES), max_size=3)))
        pages.append(Page(name, f"Title {name}", sections, links))
    return pages


SEEDS = st.integers(0, 3)


@given(page_lists(), SEEDS)
def test_ict_passage_does_not_contain_its_query(pages, seed):
    rows = list(ict(pages, seed, 3, keep=0))
    assert len(rows) == 3 * len(pages)
    by_id = {page.id: page for page in pages}
    for row in rows:
        page = by_id[row.document]
        assert row.query not in row.passages[0] and row.passages[0].startswith(f"{page.title}: ")
        source = next(passage for passage in page.passages if row.query in passage)
        rest = [part for part in sentences(source) if part != row.query]
        assert row.passages == (f"{page.title}: {' '.join(rest)}",)


def test_ict_keeps_the_sentence_in_a_tenth_of_the_passages():
    pages = [
        Page(str(i), "", (Section("", (" ".join(sentence(i, j) for j in range(4)),)),)) for i in range(500)
    ]
    rows = list(ict(pages, 0, 4))
    share = sum(row.query in row.passages[0] for row in rows) / len(rows)
    assert len(rows) == 2000 and 0.08 < share < 0.12
    always = list(ict(pages, 0, 4, keep=1))
    assert all(row.query in row.passages[0] for row in always)
    assert [row.query for row in always] == [row.query for row in rows]


@given(page_lists(), SEEDS)
def test_bfs_pairs_the_first_section_with_another_passage_of_the_page(pages, seed):
    rows = list(GENERATORS["bfs"](pages, seed, 4))
    assert len(rows) == 4 * len(pages)
    by_id = {page.id: page for page in pages}
    for row in rows:
        page = by_id[row.document]
        assert any(row.query in passage for passage in page.sections[0].passages)
        assert row.query not in row.passages[0]
        assert row.passages[0].removeprefix(f"{page.title}: ") in page.passages


@given(page_lists(), SEEDS)
def test_wlp_passage_is_of_a_page_that_links_to_the_query_page(pages, seed):
    by_id = {page.id: page for page in pages}
    for row in wlp(pages, seed, 4):
        (source,) = row.passage_documents
        assert source != row.document and row.document in by_id[source].links
        assert row.passages[0].removeprefix(f"{by_id[source].title}: ") in by_id[source].passages
        assert any(row.query in passage for passage in by_id[row.document].sections[0].passages)
        linking = {page.id for page in pages if row.document in page.links} - {row.document}
        assert row.answers[0] == row.document and set(row.answers[1:]) == linking


@given(page_lists(), SEEDS)
def test_crop_spans_are_a_tenth_to_a_half_of_the_page(pages, seed):
    rows = list(GENERATORS["crop"](pages, seed, 4))
    assert len(rows) == 4 * len(pages)
    by_id = {page.id: page for page in pages}
    for row in rows:
        text = " ".join(by_id[row.document].passages)
        num_words = len(text.split())
        assert row.passages[0].startswith(f"{by_id[row.document].title}: ")
        for span in (row.query, row.passages[0].partition(": ")[2]):
            assert span in text
            assert max(round(0.1 * num_words), 4) <= len(span.split()) <= round(0.5 * num_words)


@pytest.mark.parametrize("source", GENERATORS)
@given(pages=page_lists(), seed=SEEDS, order=st.permutations(NAMES))
def test_rows_depend_on_seed_and_page_alone(source, pages, seed, order):
    rows = list(GENERATORS[source](pages, seed, 3))
    assert len({row.id for row in rows}) == len(rows)
    by_id = {page.id: page for page in pages}
    shuffled = GENERATORS[source]([by_id[name] for name in order], seed, 3)
    assert {row.id: row for row in rows} == {row.id: row for row in shuffled}
    more = {row.id: row for row in GENERATORS[source](pages, seed, 4)}
    assert all(more[row.id] == row for row in rows)


def test_title_is_the_query_of_bfs_for_a_page_of_one_section():
    page = Page("a", "Red fox", (Section("", ("A sentence about it.", "Another one.")),))
    rows = list(GENERATORS["bfs"]([page], 0, 4))
    assert sorted((row.query, row.passages) for row in rows) == [
        ("Red fox", ("A sentence about it.",)),
        ("Red fox", ("Another one.",)),
    ]


def test_scripts_without_spaces_have_rows_of_all_sources():
    text = "信息检索是一个重要的研究领域。它研究如何找到文档。"
    pages = [
        Page(
            name,
            "标题",
            (Section("一", (text,)), Section("二", (f"{name}另一段关于搜索引擎的文字。",))),
            (link,),
        )
        for name, link in (("a", "b"), ("b", "a"))
    ]
    for source, generator in GENERATORS.items():
        rows = list(generator(pages, 0, 2))
        assert len(rows) == 4, source
        assert all(len(row.query) >= 4 for row in rows)


def test_pages_without_enough_text_give_no_rows():
    pages = [Page("a", "", ()), Page("b", "", (Section("", ("Too short.",)),), ("a",))]
    for generator in GENERATORS.values():
        assert not list(generator(pages, 0, 4))
