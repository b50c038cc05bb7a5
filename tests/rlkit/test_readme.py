"""README.md, CONTRIBUTING.md and docs/: the code runs, the tables are complete, the links resolve."""

import re
from dataclasses import fields

import pytest

from rlkit.check import check_environment
from rlkit.registry import load_environment
from rlkit.reward import call_reward
from rlkit.scoring import load_rewards
from tests.quick import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def environment_file(tmp_path):
    (block,) = (block for block in BLOCKS if "(Environment)" in block)
    assert len(block.splitlines()) <= 35
    file = tmp_path / "addition.py"
    file.write_text(block)
    return file


def test_environment_of_the_readme_passes_all_checks(environment_file):
    environment = load_environment(f"{environment_file}:Addition")
    checks = check_environment(environment, n=100)
    assert checks and [check for check in checks if not check.passed] == []


def test_reward_of_the_readme_can_be_listed_in_rewards(tmp_path):
    (block,) = (block for block in BLOCKS if block.startswith("def brief"))
    file = tmp_path / "my_rewards.py"
    file.write_text(block)
    names = ["distribution", f"{file}:brief"]
    rewards, weights = load_rewards(names, load_environment("causal-v1"), [0.9, 0.1])
    assert dict(zip(rewards, weights, strict=True)) == {"distribution": 0.9, "brief": 0.1, "correct": 0.0}
    assert call_reward(rewards["brief"], {"completion": "[0.5, 0.5]"}) == 1


def test_configuration_page_lists_exactly_rlkits_own_keys():
    from rlkit.arguments.keys import RankArguments, SFTArguments, TrainArguments

    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    listed = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    classes = (TrainArguments, SFTArguments, RankArguments)
    assert listed == {field.name for cls in classes for field in fields(cls)}


def test_readme_lists_exactly_the_commands():
    from rlkit.commands.main import COMMANDS

    assert set(re.findall(r"^\| `rlkit ([\w-]+)", README, re.MULTILINE)) == set(COMMANDS)


def test_layout_of_contributing_names_existing_files():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text.partition("\n## Layout\n")[2].partition("```\n")[2].partition("```")[0]
    folder = ""
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
        for name in names:
            path = ROOT / name if not line.startswith(" ") else ROOT / folder / name
            assert path.exists(), path


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "AGENTS.md",
    "CHANGELOG.md",
    *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/**/*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_of_pages_resolve(page):
    file = ROOT / page
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.S)
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            assert (file.parent / target.partition("#")[0]).exists(), target


def test_every_algorithm_has_a_page_with_its_required_keys():
    from rlkit.arguments.presets import PRESETS

    for name, preset in PRESETS.items():
        page = (ROOT / "docs" / "algorithms" / f"{name}.md").read_text()
        assert f"`algorithm: {name}`" in page
        for key in preset.needs:
            assert f"`{key}`" in page, (name, key)
