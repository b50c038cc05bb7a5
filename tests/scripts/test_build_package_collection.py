"""The collection of package descriptions, built from small lists in apt's format."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlkit.envs.ranking.pairs.rows import read_rows
from rlkit.retrieval.collections.load import load_collection
from tests.quick import ROOT

pytestmark = pytest.mark.skipif(
    not Path("/usr/lib/apt/apt-helper").exists(), reason="the script reads apt's lists with apt-helper"
)
# package: (MD5, short, long, German, French); d has no French, and e has the description of b.
PACKAGES = {
    "b": ("2", "mail client", "Reads mail.\n\nAlso: news.", "Mailprogramm", "client de messagerie"),
    "a": ("1", "editor", "Edits: files.", "Editor für Texte", "éditeur"),
    "c": ("3", "game", "A game of chess.", "Spiel", "jeu"),
    "d": ("4", "shell", "Runs commands.", "Kommandozeile", None),
    "e": ("2", "mail client", "Reads mail.\n\nAlso: news.", "Mailprogramm", "client de messagerie"),
    "f": ("5", "empty", "", "leer", "vide"),
}


def paragraph(package, md5, language, short, long):
    lines = ["".join((" ", line or ".", "\n")) for line in long.split("\n")] if long else []
    return f"Package: {package}\nDescription-md5: {md5}\nDescription-{language}: {short}\n{''.join(lines)}\n"


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    for language, column in (("en", 1), ("de", 3), ("fr", 4)):
        content = "".join(
            paragraph(name, row[0], language, row[column], row[2] if language == "en" else "Text.")
            for name, row in PACKAGES.items()
            if row[column] is not None
        )
        path = folder / f"mirror_debian_dists_stable_main_i18n_Translation-{language}"
        path.write_text(content, encoding="utf-8")
    # apt keeps its lists compressed on some machines.
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return folder


def run_script(lists, out, *arguments):
    command = [sys.executable, "scripts/build_package_collection.py", "--lists", str(lists), "-o", str(out)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


def test_script_joins_translations_and_writes_a_collection(tmp_path, lists):
    result = run_script(lists, tmp_path / "out", "--languages", "de", "fr")
    assert result.returncode == 0, result.stderr
    assert "3 documents, 6 queries" in result.stdout
    collection = load_collection(str(tmp_path / "out"))
    documents = {document.id: document.text for document in collection.documents()}
    assert documents == {"a": "Edits: files.", "b": "Reads mail.\n\nAlso: news.", "c": "A game of chess."}
    assert (
        collection.queries["a/de"] == "Editor für Texte"
        and collection.queries["b/fr"] == "client de messagerie"
    )
    qrels = (tmp_path / "out" / "qrels" / "test.tsv").read_text().splitlines()[1:]
    assert sorted(qrels) == sorted(f"{name}/{code}\t{name}\t1" for name in "abc" for code in ("de", "fr"))
    for language, queries in (("en", ["editor", "mail client", "game"]), ("fr", None)):
        rows = read_rows(tmp_path / "out" / "augment" / f"{language}.jsonl")
        assert [row.document for row in rows] == ["a", "b", "c"]
        assert {row.source for row in rows} == {f"translation/{language}"}
        assert queries is None or [row.query for row in rows] == queries


def test_sample_depends_on_the_seed(tmp_path, lists):
    samples = set()
    for seed in range(6):
        arguments = ("--languages", "de", "--documents", "1", "--seed", str(seed))
        assert run_script(lists, tmp_path / str(seed), *arguments).returncode == 0
        (line,) = (tmp_path / str(seed) / "corpus.jsonl").read_text().splitlines()
        samples.add(json.loads(line)["_id"])
    assert len(samples) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--languages", "de", "ko"), "no descriptions in the language 'ko': run `apt-get update -o Acquire"),
        (("--languages", "en"), "--languages must not have en"),
        (("--languages", "de", "--documents", "0"), "--documents must be an integer of at least 1, not 0"),
    ],
)
def test_bad_options_are_errors_of_one_line(tmp_path, lists, arguments, message):
    result = run_script(lists, tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_damaged_list_is_named(tmp_path, lists):
    (damaged,) = lists.glob("*.gz")
    damaged.write_bytes(damaged.read_bytes()[:20])
    result = run_script(lists, tmp_path / "out", "--languages", "fr")
    assert result.returncode == 2 and str(damaged) in result.stderr
