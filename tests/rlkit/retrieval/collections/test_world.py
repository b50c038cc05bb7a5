"""A world that nobody knows: every answer follows from its passages, and from nothing else."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.collections.names import BITS, shuffled, word
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.collections.world_text import CITY, COMPANY, FACTS, MAYOR, PERSON, TYPES
from rlkit.rewards.qa import exact_match, f1

WORLDS = st.builds(World, st.integers(0, 10**6), st.integers(100, 10**6))
LARGE_WORLDS = st.builds(World, st.integers(0, 10**6), st.integers(1000, 10**6))


def spaced(text):
    return f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.lower()).split())} "


def stands_in(words, text):
    return spaced(words) in spaced(text)


def index(passage_id):
    return int(passage_id.split("-")[2])


@given(WORLDS, st.data())
def test_a_passage_depends_on_its_number_alone(world, data):
    i = data.draw(st.integers(0, world.size - 1))
    passage = World(world.seed, world.size).passage(i)
    assert passage == world.passage(i) and passage.id == f"w{world.seed}-{world.size}-{i}"
    assert passage.title == world.name(i) and passage.title in passage.text
    assert 15 <= len(passage.text.split()) <= 70


@settings(max_examples=60, deadline=None)
@given(
    WORLDS, st.sampled_from(["train", "dev", "test"]), st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4])
)
def test_each_hop_follows_from_its_passage_and_the_question_tells_nothing(world, split, i, hops):
    question = world.question(split, i, [hops])
    assert question == World(world.seed, world.size).question(split, i, [hops])
    assert question.answerable and question.hops == len(question.supporting) == hops
    chain = [index(one) for one in question.supporting]
    assert stands_in(world.name(chain[0]), question.text)
    told = [*(world.name(at) for at in chain[1:]), question.answers[0]]
    for at, value in zip(chain, told, strict=True):
        assert stands_in(value, world.passage(at).text)
        assert not stands_in(value, question.text)
    assert all(world.name(at) in step.query for at, step in zip(chain, question.steps, strict=True))


@settings(max_examples=40, deadline=None)
@given(LARGE_WORLDS, st.integers(0, 10**6), st.sampled_from([1, 2, 3]))
def test_what_cannot_be_answered_stands_in_no_passage_about_it(world, i, hops):
    question = world.question("dev", i, [hops], unanswerable=1.0)
    assert not question.answerable and question.answers == ()
    at = index(question.supporting[-1])
    relation = question.kind.rpartition(" > ")[2]
    assert world.silence(at) == relation
    names = [r.name for r in FACTS[world.type(at)]]
    values = (
        [world.fact(at, "first mayor"), world.fact(at, "second mayor")]
        if relation == MAYOR
        else [world.fact(at, relation)]
    )
    target = next(r.target for r in FACTS[world.type(at)] if r.name == relation)
    others = {world.fact(at, n) for n in names if n not in (relation, MAYOR)}
    for value in values:
        if value not in others:  # another fact may have the same value
            said = str(value) if target is None else world.name(value)
            fillers = {world.name(world.fact(at, f)) for f in ("filler", "filler 2")}
            assert said in fillers or not stands_in(said, world.passage(at).text)


def test_what_is_chained_from_where_is_asked_in_one_split():
    world = World(0, 200)

    def chains(split):
        questions = (world.question(split, i) for i in range(400))
        return {(one.supporting[0], one.kind) for one in questions}

    asked = {split: chains(split) for split in ("train", "dev", "test")}
    for one, other in itertools.combinations(asked.values(), 2):
        assert not one & other
    assert all(len(found) > 50 for found in asked.values())


def test_other_seeds_ask_other_questions():
    world = World(0, 1000)
    assert [world.question("train", i).text for i in range(5)] != [
        world.question("train", i, seed=1).text for i in range(5)
    ]


def test_the_share_of_unanswerable_questions_is_what_was_asked():
    world = World(1, 5000)
    share = sum(not world.question("train", i, unanswerable=0.3).answerable for i in range(4000)) / 4000
    assert abs(share - 0.3) < 0.035  # nearly five standard errors


def test_guessing_does_not_pay():
    world = World(0, 10_000)
    frequent, _ = Counter(world.question("train", i).answers[0] for i in range(2000)).most_common(1)[0]
    guesses = [frequent, "the city of", "river", "km", "city of river km", "Works", frequent[:2]]
    dev = [world.question("dev", i, [1, 2, 3, 4]) for i in range(500)]
    for guess in guesses:
        paid = sum(f1(f"<answer>{guess}</answer>", question.answers) for question in dev)
        assert paid < 500 * 0.05, guess


def test_names_are_accepted_in_both_orders():
    world = World(0, 500)
    founders = [q for q in (world.question("train", i, [1]) for i in range(200)) if q.kind == "founder"]
    assert founders
    for question in founders:
        first, last = question.answers[0].split()
        assert question.answers[1] == f"{last}, {first}"
        assert exact_match(f"<answer>{last}, {first}</answer>", question.answers) == 1


def test_the_same_words_in_another_world_are_another_question():
    one, other = World(0, 10_000), World(0, 12_000)
    assert one.name(0) == other.name(0)
    ids = [{w.question("train", i, [1]).id for i in range(300)} for w in (one, other)]
    assert not ids[0] & ids[1]
    assert one.question("dev", 3, [2, 1], 0) == one.question("dev", 3, (1, 2), 0.0)
    with pytest.raises(UserError, match="at least 100 passages, not 3"):
        World(0, 3)


@given(st.integers(1, 4).map(lambda n: n * BITS), st.integers(0, 10**6), st.data())
def test_names_of_a_type_are_unique(bits, seed, data):
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), unique=True, max_size=50))
    assert len({word(shuffled(number, bits, seed), bits) for number in numbers}) == len(numbers)


def test_names_are_shared_between_types_and_persons():
    world = World(0, 5000)
    names = {kind: [world.name(i) for i in range(5000) if world.type(i) == kind] for kind in TYPES}
    assert all(len(set(one)) == len(one) for one in names.values())
    surnames = [name.split()[1] for name in names[PERSON]]
    assert len(set(surnames)) < len(surnames)
    words = {name.split()[0] for name in names[COMPANY]}
    assert words & set(names[CITY])


def test_years_fit_together():
    world = World(2, 3000)
    for i in range(0, 3000, 7):
        if world.type(i) == CITY:
            election = world.fact(i, "election")
            first, second = (
                world.fact(world.fact(i, f"{n} mayor"), "birth year") for n in ("first", "second")
            )
            assert 35 <= election - first < 55 and 30 <= election - second <= 75
            assert world.fact(i, "city founded") < 1800 < election
            assert world.mayor(i, election - 2) == world.fact(i, "first mayor")
            assert world.mayor(i, election + 2) == world.fact(i, "second mayor")
        if world.type(i) == COMPANY:
            age = world.fact(i, "company founded") - world.fact(world.fact(i, "founder"), "birth year")
            assert 20 <= age < 60


def test_a_million_passages_are_not_made_to_read_the_last():
    world = World(0, 10**6)
    assert world.passage(999_999).title == world.name(999_999)
    with pytest.raises(IndexError, match="passage 1000000 of a world of 1000000"):
        world.passage(10**6)
    assert [p.id for p in itertools.islice(world.passages(), 3)] == [
        "w0-1000000-0",
        "w0-1000000-1",
        "w0-1000000-2",
    ]


def test_question_of_a_world_that_is_too_small_is_an_error():
    """25 of 100 entities keep silent about a fact, a tenth of such questions is for dev: maybe none."""
    with pytest.raises(UserError, match=r"no unanswerable question with 1 hops in 'dev': raise world_size"):
        for seed in range(30):
            World(seed, 100).question("dev", 0, [1], unanswerable=1.0)
