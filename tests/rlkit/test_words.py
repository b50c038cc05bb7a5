"""Words in scripts with and without spaces between words: keywords, n-grams and truncation."""

import re
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlkit.words import (
    MAX_WORD_LENGTH,
    are_plain_words,
    bigrams_overlap,
    first_words,
    has_unspaced,
    keywords,
    ngrams,
    separate_characters,
    truncate_words,
    words,
)

SENTENCES = {
    "Chinese": ("巴黎是法国的首都", "法国的首都"),
    "traditional Chinese": ("臺北市位於臺灣島北部", "臺灣島"),
    "Japanese": ("東京タワーは1958年に完成した", "東京タワー"),
    "half-width Katakana": ("ｶﾞﾝﾀﾞﾑの作者", "ガンダム"),
    "Thai": ("กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย", "เมืองหลวง"),
    "Lao": ("ວຽງຈັນເປັນນະຄອນຫຼວງຂອງລາວ", "ນະຄອນຫຼວງ"),
    "Khmer": ("ភ្នំពេញជារាជធានីនៃប្រទេសកម្ពុជា", "រាជធានី"),
    "Burmese": ("နေပြည်တော်သည်မြန်မာနိုင်ငံ၏မြို့တော်ဖြစ်သည်", "မြန်မာ"),
    "Tibetan": ("བོད་ལྗོངས", "ལྗོངས"),
    "rare ideographs": ("𠮷野家は牛丼", "𠮷野家"),
}
UNSPACED_TEXT = st.text("巴黎是法国のアーกรุงเท่ពេញမြ、。", max_size=30)
LETTERS = st.characters(categories=["L", "N", "P", "Z"], max_codepoint=0x52F)


@pytest.mark.parametrize("language", SENTENCES)
def test_keywords_of_a_part_are_keywords_of_the_sentence(language):
    sentence, part = SENTENCES[language]
    assert keywords(part) and set(keywords(part)) <= set(keywords(sentence))
    assert has_unspaced(sentence)
    assert "".join(words(part)) in "".join(words(sentence))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("巴黎", ["巴黎"]),
        ("雪", ["雪"]),
        ("iPhone手机", ["iphone", "手机"]),
        ("2023年", ["2023", "年"]),
        ("巴黎，伦敦。", ["巴黎", "伦敦"]),
        ("ที่นี่", ["ที่นี่"]),  # two characters with their marks
        ("กรุง\u200bเทพ", ["กรุ", "รุง", "งเ", "เท", "ทพ"]),  # a possible line break
        ("ジョン・レノン", ["ジョ", "ョン", "レノ", "ノン"]),
        ("파리는 물", ["파리", "리는", "물"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # Hindi has spaces, and marks in its words
        ("ＡＢＣ１９１２", ["abc1912"]),
        ("Well-known café, a", ["well", "known", "café"]),
        ("", []),
    ],
)
def test_keywords_are_words_or_bigrams(text, expected):
    assert keywords(text, 2) == expected


@given(st.text(LETTERS))
@example("naïve İstanbul x_1 привет")
def test_keywords_of_alphabets_are_sequences_of_letters_and_digits(text):
    plain = re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower())
    if not any(unicodedata.category(c).startswith("M") for c in unicodedata.normalize("NFKC", text).lower()):
        assert keywords(text) == words(text) == plain
        assert keywords(text, 2) == [word for word in plain if len(word) > 1]
        assert are_plain_words(text)


@pytest.mark.parametrize("text", ["巴黎是", "智能手机 phone", "파리는", "हिन्दी", "ที่นี่"])
def test_are_plain_words_is_false_where_keywords_differ(text):
    assert not are_plain_words(text)


@given(UNSPACED_TEXT, UNSPACED_TEXT, UNSPACED_TEXT)
def test_keywords_find_any_part_of_a_sentence(before, part, after):
    """A part that starts with a combining mark would change the character before it."""
    if len(words(part)) > 1 and not unicodedata.category(after[:1] or "x").startswith("M"):
        missing = set(keywords(part)) - set(keywords(before + part + after))
        # A single character at an end of the part is a bigram with its neighbor in the sentence.
        assert all(len(words(keyword)) == 1 for keyword in missing)


def test_bigrams_overlap_in_one_character():
    assert bigrams_overlap("巴黎", "黎是") and bigrams_overlap("กรุ", "รุง")
    for first, second in [("巴黎", "是法"), ("", "巴黎"), ("cat", "tree"), ("黎", "黎是"), ("巴黎", "巴黎")]:
        assert not bigrams_overlap(first, second)
    assert all(bigrams_overlap(*pair) for pair in pairwise(keywords("巴黎是法国的首都")))


def test_ngrams_count_two_characters_as_a_word():
    assert list(ngrams("One two, three", 2)) == [("one", "two"), ("two", "three")]
    assert list(ngrams("one", 2)) == list(ngrams("巴黎是", 2)) == list(ngrams("", 2)) == []
    assert list(ngrams("巴黎是法国", 2)) == [tuple("巴黎是法"), tuple("黎是法国")]
    assert list(ngrams("iPhone手机 new", 2)) == [("iphone", "手", "机"), ("手", "机", "new")]


@given(st.lists(st.sampled_from(["one", "two", "巴黎", "是", "new。"]), max_size=12), st.integers(1, 4))
def test_ngrams_of_a_part_are_ngrams_of_the_string(parts, length):
    for start in range(len(parts)):
        for end in range(start, len(parts)):
            part = " ".join(parts[start:end])
            assert set(ngrams(part, length)) <= set(ngrams(" ".join(parts), length))


@pytest.mark.parametrize(
    ("text", "max_words", "truncated"),
    [
        ("a b c", 3, "a b c"),
        ("a  b\nc", 3, "a  b\nc"),
        ("a b\nc d", 3, "a b c …"),
        ("巴黎是法国的首都", 4, "巴黎是法 …"),
        ("巴黎是法国的首都", 8, "巴黎是法国的首都"),
        ("iPhone手机 is new", 3, "iPhone手机 …"),
        ("ที่นี่มี", 2, "ที่นี่ …"),
        ("a", 0, "…"),
        ("", 0, ""),
    ],
)
def test_truncate_words(text, max_words, truncated):
    assert truncate_words(text, max_words) == truncated


NORMAL_WORDS = st.text(st.characters(codec="latin-1", categories=["L", "P", "N"]), min_size=1).map(
    lambda word: word[:MAX_WORD_LENGTH]
)


@given(st.lists(NORMAL_WORDS, max_size=20), st.integers(1, 20))
def test_truncate_words_counts_normal_words_by_spaces(text_words, max_words):
    text = " ".join(text_words)
    shown = text if len(text_words) <= max_words else " ".join([*text_words[:max_words], "…"])
    assert truncate_words(text, max_words) == shown


@given(
    st.text(st.sampled_from("ax/=. 巴黎。กุ\u0301\u0e31") | st.characters(), max_size=300),
    st.integers(1, 100),
    st.integers(0, 8),
)
@example("x" * 20_000, 5, 0)
@example("法" * 20_000, 5, 0)
@example("https://example.org/?q=" + "aGVsbG8gd29ybGQ" * 500, 30, 0)
@example("ก" + "\u0e31" * 20_000, 5, 0)
@example("。" * 20_000, 5, 0)
def test_first_words_are_bounded_and_a_prefix(text, max_words, repeats):
    text *= 2**repeats
    beginning = first_words(text, max_words)
    assert " ".join(text.split()).startswith(beginning)
    assert len(beginning) <= max_words * (MAX_WORD_LENGTH + 1)
    assert first_words(beginning, max_words) == beginning
    if not re.search(r"\s", text):
        assert len(beginning) <= MAX_WORD_LENGTH * max_words


def test_one_long_word_counts_as_many():
    assert len(first_words("x" * 20_000, 100)) == MAX_WORD_LENGTH + 99 * 8
    assert len(first_words("法" * 20_000, 100)) == 100
    url = "https://example.org/" + "path/" * 20
    assert truncate_words(f"{url} and more", 100) == f"{url} and more"


def test_separate_characters():
    assert separate_characters("Paris 1912") == "Paris 1912"
    assert separate_characters("iPhone手机").split() == ["iPhone", "手", "机"]
    assert separate_characters("约翰·列侬").split() == list("约翰列侬")
    assert separate_characters("葛\U000e0100城").split() == ["葛", "城"]
    assert separate_characters("ｶﾞ").split() == ["ガ"]
    assert separate_characters("a·b") == "a·b"
