import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlkit.envs.ranking.pairs.pages import Page, Section, read_pages
from rlkit.errors import UserError
from rlkit.registry import load_object
from rlkit.retrieval.collections.load import load_collection

PAGE = r""".TH {name} {section} 2024 "Linux"
.SH NAME
{name} \- {description}
.SH LIBRARY
Standard C library
.SH SYNOPSIS
.nf
.B "int {name}(int fd);"
.fi
.SH DESCRIPTION
The first sentence describes what the call does with a file. The second sentence
is about the argument
.IR fd ,
which must be open.
.PP
A second paragraph of the page follows here.
.SS Notes on Linux
The note is under a heading of its own.
.SH SEE ALSO
.BR {link} (2),
.BR missing (3)
"""
BODY = (
    "The first sentence describes what the call does with a file. The second sentence is about the argument "
    "fd, which must be open. A second paragraph of the page follows here. The note is under a heading of its "
    "own."
)


def build(folder, *files):
    """Run the script and return the process."""
    command = [sys.executable, "scripts/build_man_collection.py", "-o", folder, "--files", *files]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def write_page(folder, name, description, link):
    path = folder / f"{name}.2"
    path.write_text(PAGE.format(name=name, section=2, description=description, link=link))
    return path


def test_documents_are_bodies_and_queries_are_descriptions(tmp_path):
    files = [
        write_page(tmp_path, "open-file", "open a file - or not", "close"),
        write_page(tmp_path, "close", "close a file", "open-file"),
        write_page(tmp_path, "shut", "close a file", "open-file"),
    ]
    result = build(tmp_path / "man", *files)
    assert result.returncode == 0, result.stderr
    assert "3 pages, 2 queries" in result.stdout
    collection = load_collection(str(tmp_path / "man"))
    documents = {document.id: document for document in collection.documents()}
    assert documents["close.2"].title == "close(2)" and documents["close.2"].text == BODY
    assert sorted(collection.queries.values()) == ["close a file", "open a file - or not"]
    judged = {
        collection.queries[query]: sorted(grades)
        for split in collection.qrels.values()
        for query, grades in split.items()
    }
    assert judged == {"open a file - or not": ["open-file.2"], "close a file": ["close.2", "shut.2"]}
    pages = {page.id: page for page in read_pages(collection, tmp_path / "man")}
    sections = (Section("DESCRIPTION", (BODY,)),)
    assert pages["close.2"] == Page("close.2", "close(2)", sections, ("open-file.2",))
    assert pages["open-file.2"].links == ("close.2",)


def test_pages_without_description_or_body_are_left_out(tmp_path):
    only_reference = tmp_path / "read.2"
    only_reference.write_text(".TH read 2\n.SH NAME\nread \\- read\n.SH DESCRIPTION\nSee open(2).\n")
    files = [only_reference, write_page(tmp_path, "close", "close a file", "read")]
    result = build(tmp_path / "man", *files)
    assert result.returncode == 0, result.stderr
    (row,) = map(json.loads, (tmp_path / "man" / "corpus.jsonl").read_text().splitlines())
    assert row["_id"] == "close.2"
    result = build(tmp_path / "empty", only_reference)
    assert result.returncode == 2 and "no page has both a description and a body" in result.stderr


@pytest.mark.parametrize("name", ["absent.2"])
def test_missing_page_is_one_line(tmp_path, name):
    result = build(tmp_path / "man", tmp_path / name)
    assert result.returncode == 2 and "mandoc cannot render" in result.stderr
    assert "Traceback" not in result.stderr


def test_installed_pages_are_no_aliases():
    """Container images often have no man pages; then the error says how to install them."""
    installed_files = load_object("scripts/build_man_collection.py:installed_files")
    try:
        files = installed_files()
    except UserError as error:
        assert "apt-get install manpages manpages-dev" in str(error)
    else:
        assert len({file.name for file in files}) == len(files) and not any(map(Path.is_symlink, files))
