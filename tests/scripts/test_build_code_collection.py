"""The collection of functions: queries from docstrings, documents without them, splits by module."""

import subprocess
import sys

import pytest

from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.collections.write import split_of
from tests.quick import ROOT

MODULE = '''
"""Module."""

def add_all(numbers):
    """Return the sum of {name}. The rest is not in the query."""
    total = 0  # a comment
    for number in numbers:
        total += number
    return total

def shared(a):
    """Do the same
    in each module.

    More.
    """
    def inner():
        "Docstring of an inner function."
        return a
    return inner

class Box:
    """A box."""

    @property
    def size(self):
        """Size in {name} boxes"""
        a = self.width
        b = self.height
        return a * b

    @size.setter
    def size(self, value):
        """Set the size of the box."""
        self.width = value
        self.height = value
        self.depth = value

    def _private(self):
        """Return something private."""
        a = 1
        b = 2
        return a + b

    def short(self):
        """Return something in one line."""
        return 1

    def undocumented(self):
        a = 1
        b = 2
        return a + b
'''
NAMES = [f"module{i}" for i in range(12)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder of modules, with some that are skipped."""
    folder = tmp_path_factory.mktemp("library")
    for name in NAMES:
        (folder / f"{name}.py").write_text(MODULE.replace("{name}", name))
    for name in ("_hidden/__init__.py", "test/test_all.py", "package/_part.py", "site-packages/other.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(MODULE.replace("{name}", "skipped"))
    (folder / "package" / "__init__.py").write_text(MODULE.replace("{name}", "package"))
    return folder


def run_script(*argv):
    command = [sys.executable, str(ROOT / "scripts" / "build_code_collection.py"), *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_script_builds_collection_of_public_functions(library, tmp_path):
    result = run_script("--folder", library, "-o", tmp_path / "code")
    assert result.returncode == 0, result.stderr
    collection = load_collection(str(tmp_path / "code"))
    documents = {document.id: document.text for document in collection.documents()}
    modules = [*NAMES, "package"]
    functions = ("add_all", "shared", "Box.size")
    assert documents.keys() == {f"{module}.{name}" for module in modules for name in functions}
    assert documents["module0.add_all"] == (
        "def add_all(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n"
        "    return total"
    )
    assert documents["module0.Box.size"].startswith("@property\ndef size(self):\n    a = self.width")
    assert "Docstring" not in documents["module0.shared"]
    splits = {}
    for split, judged in collection.qrels.items():
        for query, grades in judged.items():
            splits[collection.queries[query]] = split
            assert {split_of(name.split(".")[0]) for name in grades} == {split}
    assert splits["Return the sum of module3."] == split_of("module3")
    assert splits["Size in package boxes"] == split_of("package")
    assert "Do the same in each module." not in splits  # its functions are in several splits
    assert len(splits) == 2 * len(modules)


def test_query_of_several_functions_has_all_of_them(tmp_path):
    names = {}  # two modules of each split
    for i in range(100):
        split_names = names.setdefault(split_of(f"m{i}"), [])
        if len(split_names) < 2:
            split_names.append(f"m{i}")
    for split, modules in names.items():
        for module in modules:
            (tmp_path / f"{module}.py").write_text(MODULE.replace("{name}", split))
    result = run_script("--folder", tmp_path, "-o", tmp_path / "code")
    assert result.returncode == 0, result.stderr
    collection = load_collection(str(tmp_path / "code"))
    for split, modules in names.items():
        by_text = {collection.queries[query]: grades for query, grades in collection.judged(split).items()}
        assert by_text[f"Return the sum of {split}."].keys() == {f"{module}.add_all" for module in modules}


def test_standard_library_gives_the_same_collection_again(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        result = run_script("--documents", 300, "-o", folder)
        assert result.returncode == 0 and result.stdout.startswith("300 functions\n"), result.stderr
    files = ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv", "qrels/test.tsv"]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--documents", "two"), "argument --documents: invalid int value: 'two'"),
        (("--documents", 1), "use more documents"),
        (("--folder", "{empty}"), "has no Python module with documented functions"),
    ],
)
def test_bad_options_are_errors_of_one_line(tmp_path, argv, message):
    argv = [str(tmp_path) if value == "{empty}" else value for value in argv]
    result = run_script("-o", tmp_path / "code", *argv)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
