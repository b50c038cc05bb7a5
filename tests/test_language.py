"""The words of CONTRIBUTING.md's glossary: phrases that no prose of the project uses, and vague names."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_VAGUE_NAMES = 2  # per 1,000 bindings


def read_block(language: str) -> list[str]:
    """Return the lines of CONTRIBUTING's fenced block with this info string."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.search(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1].splitlines()


def read_glossary() -> list[tuple[re.Pattern[str], str]]:
    """Return (banned phrase, replacement) pairs."""
    entries = [re.split(r"\s+# ", line, maxsplit=1) for line in read_block("glossary")]
    return [(re.compile(pattern, re.IGNORECASE), replacement) for pattern, replacement in entries]


def tracked_files(*patterns: str) -> list[Path]:
    """Return the files of the checkout that match, without those reached through symbolic links."""
    output = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *patterns],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = [ROOT / name for name in output.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def python_prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every comment, docstring and string literal that has a space in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, " ".join(node.value.split())
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip("# ")
        if comments and comments[-1][0] + comments[-1][1].count("\n") + 1 == token.start[0]:
            comments[-1] = (comments[-1][0], f"{comments[-1][1]}\n{text}")
        else:
            comments.append((token.start[0], text))
    for line, text in comments:
        yield line, " ".join(text.split())


def document_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the paragraphs of a page, a config or the Makefile, without the glossary."""
    text = path.read_text()
    if path.name == "CONTRIBUTING.md":
        text = re.sub(
            r"^```(glossary|names)\n.*?^```",
            lambda block: "\n" * block[0].count("\n"),
            text,
            flags=re.M | re.S,
        )
    line = 1
    for paragraph in text.split("\n\n"):
        yield line, " ".join(word for word in paragraph.split() if word != "#")
        line += paragraph.count("\n") + 2


def binding_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every variable, argument, attribute, function and class that the code binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def test_prose_has_no_phrase_of_the_glossary():
    prose = [(path, python_prose(path.read_text())) for path in tracked_files("*.py")]
    prose += [(path, document_prose(path)) for path in tracked_files("*.md", "*.yaml", "Makefile")]
    glossary = read_glossary()
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; write {replacement}"
        for path, passages in prose
        for line, text in passages
        for pattern, replacement in glossary
        if (match := pattern.search(text))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "phrase",  # with underscores: the phrases must not occur in this file
    [
        "resumes_if_it_goes_on_from_a_checkpoint",
        "a_request_that_is_asked_again",
        "growing_pauses_between_retries",
        "files_are_written_whole",
        "a_run_that_was_told_to_leave",
        "an_object_that_remembers_its_history",
        "the_end_token_of_a_turn",
        "what_stands_in_the_prompt",
        "the_server_is_well",
        "the_tasks_are_dealt_out",
        "in_so_many_steps",
        "the_answer_of_one_who_knows",
        "made-up_problems",
        "any_data_set_of_the_hub",
        "the_colour_of_a_curve",
        "a_normalised_score",
        "50_%_of_tasks",
    ],
)
def test_glossary_finds_banned_phrases(phrase):
    text = phrase.replace("_", " ")
    assert any(pattern.search(text) for pattern, _ in read_glossary())


@pytest.mark.parametrize(("pattern", "replacement"), read_glossary())
def test_glossary_does_not_ban_its_own_replacements(pattern, replacement):
    assert not pattern.search(replacement)


@pytest.mark.parametrize("roots", [("rlkit", "envs", "rewards"), ("tests", "benchmarks", "scripts", ".ci")])
def test_names_are_not_vague(roots):
    vague = set(read_block("names")[0].split())
    files = tracked_files(*(f"{root}/*.py" for root in roots))
    names = [
        (f"{path.relative_to(ROOT)}:{line}", name)
        for path in files
        for line, name in binding_names(ast.parse(path.read_text()))
    ]
    problems = [f"{where}: {name}" for where, name in names if name.strip("_") in vague]
    assert len(problems) <= MAX_VAGUE_NAMES * len(names) / 1000, "\n".join(problems)


def test_python_prose_joins_comment_lines_and_skips_keys():
    source = 'x = {"key": "two words"}\n# a comment that\n# goes on\ny = 1  # trailing\n'
    assert list(python_prose(source)) == [(1, "two words"), (2, "a comment that goes on trailing")]
