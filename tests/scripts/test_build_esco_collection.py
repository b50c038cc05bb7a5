"""The collections of ESCO's tables, from invented tables of the same layout."""

import csv
import subprocess
import sys

import pytest

from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.collections.write import split_of
from tests.quick import ROOT

PLACES = [f"{first}{second}" for first in ("north", "south", "hill", "river") for second in "abcdefgh"]
URL = "http://data.europa.eu/esco/occupation/"


def occupation(town):
    """Return an invented cell of occupations.csv. Labels and description have no separator."""
    return (
        f"{town} bridge keeper {town} crossing keeper {town}-crossing  watcher keeper of {town} bridges "
        f"keeper (night) {town} toll gate watcher shared bridge watcher {town} bridge keeper "
        f"{town.title()} bridge keepers open the bridge for ships. They talk to Captains.\n\n"
    )


def watcher(town):
    return f"{town} tower watcher light watcher of {town} {town.title()} tower watchers watch a tower."


ROWS = {f"keeper-{town}": occupation(town) for town in PLACES}
ROWS |= {f"watcher-{town}": watcher(town) for town in PLACES}
AMBIGUOUS = {
    "acronym": "ICT keeper bridge keeper ICT keepers keep ICT.",
    "language": "teacher of Latin latin teacher Teachers of Latin teach Latin.",
    "lower": "no description here",
}


def write_table(folder, name, rows, columns=("id", "description")):
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *[(URL + key, cell) for key, cell in rows.items()]])


def run_script(*argv):
    command = [sys.executable, str(ROOT / "scripts" / "build_esco_collection.py"), *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def queries_of(collection):
    """Return the split and the relevant documents of each query string."""
    return {
        collection.queries[query]: (split, set(grades))
        for split, judged in collection.qrels.items()
        for query, grades in judged.items()
    }


def test_titles_are_queries_for_the_descriptions_of_occupations(tmp_path):
    write_table(tmp_path, "occupations", ROWS | AMBIGUOUS)
    result = run_script(tmp_path, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("64 occupations, 3 ambiguous rows left out\n")
    collection = load_collection(str(tmp_path / "out"))
    documents = {document.id: document.text for document in collection.documents()}
    assert documents.keys() == ROWS.keys()
    expected = "Northa bridge keepers open the bridge for ships. They talk to Captains."
    assert documents["keeper-northa"] == expected
    queries = queries_of(collection)
    split = split_of("keeper-northa")
    titles = {query for query, (_, ids) in queries.items() if "keeper-northa" in ids}
    # Neither the preferred label, nor titles with "of" or parentheses, nor one of occupations in all splits.
    assert titles == {"northa crossing keeper", "northa-crossing watcher"}
    assert all(queries[title] == (split, {"keeper-northa"}) for title in titles)


def test_labels_are_queries_for_the_descriptions_of_skills(tmp_path):
    skills = {f"skill-{name}": f"repair {name} service {name} Repairing things in {name}." for name in PLACES}
    write_table(tmp_path, "skills", skills)
    result = run_script(tmp_path, "--table", "skills", "--documents", 20, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("20 skills, 0 ambiguous rows left out\n")
    queries = queries_of(load_collection(str(tmp_path / "out")))
    assert len(queries) == 20
    for query, (split, ids) in queries.items():
        (skill,) = ids
        town = skill.removeprefix("skill-")
        assert query == f"repair {town} service {town}" and split == split_of(skill)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (None, None, "there is no file"),
        (
            ROWS,
            ("conceptUri", "preferredLabel"),
            "the columns must include id and description, not conceptUri,",
        ),
        (AMBIGUOUS, ("id", "description"), "must have labels in lower case before each description"),
        (dict(list(ROWS.items())[:1]), ("id", "description"), "use more documents"),
    ],
)
def test_other_tables_are_errors_of_one_line(tmp_path, rows, columns, message):
    if rows is not None:
        write_table(tmp_path, "occupations", rows, columns)
    result = run_script(tmp_path, "-o", tmp_path / "out")
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
