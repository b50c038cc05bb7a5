"""`rlkit view`: the real application, driven by key presses without a terminal, on files of a run."""

import asyncio
import functools
import inspect
import math
import sys
from contextlib import asynccontextmanager

import pyarrow.parquet as pq
import pytest
from textual.widgets import Input, Select, Static
from textual.worker import WorkerState

from rlkit.commands import main as cli
from rlkit.errors import UserError
from rlkit.runs.record import RolloutFiles
from rlkit.view import app as view
from rlkit.view.app import Viewer
from rlkit.view.data import Filters, Rollouts, parse_range, searchable, sort_rollouts
from rlkit.view.text import render_rollout, visible

FAILED = "distribution: ValueError: [empty]"


def rollout(i, **fields):
    """Return a single-turn rollout; one in five is truncated and one in five is invalid."""
    invalid = i % 5 == 4
    return {
        "task_id": f"task-{i}",
        "prompt": f"What is {i} + {i}?",
        "completion": f"It is {2 * i}.",
        "answer": str(2 * i),
        "length": 10 * i + 1,
        "truncated": i % 5 == 3,
        "invalid": FAILED if invalid else None,
        "reward": None if invalid else i / 10,
        "level": "easy",
        "rewards/correct": None if invalid else i / 10,
        "rewards/brief": 1.0,
        "advantage": 0.5 - i / 10,
    } | fields


def with_turns(i):
    """Return a multi-turn rollout with markup and escape sequences."""
    turns = [
        {"role": "assistant", "content": f"<search>[bold]{i}[/]</search>", "tokens": 5},
        {"role": "user", "content": f"found [/] \x1b[31m{i}\nin a Library", "tokens": 4},
        {"role": "assistant", "content": f"It is {2 * i}. [", "tokens": 6},
    ]
    tokens = {"environment_tokens": 4, "log_prob_gap": 0.0125}
    return rollout(i, turns=turns, prompt="[/] Is [bold]it[/bold]?", task_id="[red]x[/blue]", **tokens)


@pytest.fixture
def directory(tmp_path, open_run):
    return open_run(tmp_path / "run")


@pytest.fixture
def run(directory):
    """Write ten rollouts for step 1, four for step 2, and two multi-turn rollouts for step 3."""
    for step, rows in enumerate((map(rollout, range(10)), map(rollout, range(4)), map(with_turns, (1, 2)))):
        directory.save_rollouts(step + 1, [row | {"step": step + 1} for row in rows])
    directory.flush()
    return directory.path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(view, "SEARCH_DELAY_SECONDS", 0)


class Browser:
    """The application, with what a user does and sees."""

    def __init__(self, app, pilot):
        self.app, self.pilot = app, pilot

    async def press(self, *keys):
        await self.pilot.press(*keys)
        await self.settle()

    async def type(self, field, text):
        self.app.query_one(f"#{field}", Input).value = text
        await self.settle()

    async def choose(self, field, value):
        self.app.query_one(f"#{field}", Select).value = value
        await self.settle()

    async def settle(self):
        working = (WorkerState.PENDING, WorkerState.RUNNING)
        await self.pilot.pause()
        while any(worker.state in working for worker in self.app.workers):
            await self.pilot.pause(0.01)
        await self.pilot.pause()

    def column(self, header, table="list"):
        table = getattr(self.app, table)
        headers = [str(column.label).rstrip(" ▲▼") for column in table.ordered_columns]
        index = headers.index(header)
        return [str(table.get_row_at(i)[index]) for i in range(table.row_count)]

    def headers(self):
        return [str(column.label) for column in self.app.list.ordered_columns]

    def text(self, name="text"):
        return str(self.app.query_one(f"#{name}", Static).content)

    def screen(self):
        return "\n".join(strip.text for strip in self.app.screen._compositor.render_strips())


@asynccontextmanager
async def browse(run, step=1, size=(140, 45)):
    app = Viewer(Rollouts(RolloutFiles(run)), step)
    async with app.run_test(size=size) as pilot:
        browser = Browser(app, pilot)
        await browser.settle()
        yield browser


def driven(test):
    """Turn an async test into a function with the same fixtures, which pytest can run."""

    @functools.wraps(test)
    def run(**fixtures):
        asyncio.run(test(**fixtures))

    run.__signature__ = inspect.signature(test)
    return run


# The data


def test_parse_range_reads_numbers_and_open_ranges():
    assert parse_range(" 0.2 .. 1e1 ") == (0.2, 10)
    assert parse_range("..-.5") == (-math.inf, -0.5)
    assert parse_range("3..") == (3, math.inf)
    assert parse_range("1") == (1, 1)
    assert parse_range(" ") is None
    for text in ("a", "1-2", "1 2", "nan"):
        with pytest.raises(ValueError, match="is not a range"):
            parse_range(text)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"reward": (0.1, 0.2)}, [1, 2]),
        ({"length": (-math.inf, 11)}, [0, 1]),
        ({"truncated": True}, [3]),
        ({"truncated": False}, [0, 1, 2, 4]),
        ({"invalid": True}, [4]),
        ({"invalid": False}, [0, 1, 2, 3]),
        ({"invalid": FAILED}, [4]),
        ({"invalid": "another"}, []),
        ({"text": "IT IS 6"}, [3]),
        ({"text": "what is 2"}, [2]),
        ({"text": "it is", "truncated": False, "invalid": False, "length": (5, 50)}, [1, 2]),
    ],
)
def test_filters_keep_rollouts_that_meet_all_conditions(filters, expected):
    assert [i for i in range(5) if Filters(**filters).keep(rollout(i))] == expected


def test_search_covers_the_prompt_and_every_turn():
    assert Filters("library").keep(with_turns(1))
    assert len(searchable(with_turns(1))) == 4
    assert Filters("It is").keep(rollout(1, turns=[]))


def test_sort_rollouts_puts_missing_values_last_in_both_directions():
    rows = [{"n": 1, "a": 2}, {"n": 2, "a": None}, {"n": 3, "a": 1}, {"n": 4}, {"n": 5, "a": 2}]
    assert [row["n"] for row in sort_rollouts(rows, "a", descending=False)] == [3, 1, 5, 2, 4]
    assert [row["n"] for row in sort_rollouts(rows, "a", descending=True)] == [1, 5, 3, 2, 4]


def test_means_ignore_missing_values(run):
    means = Rollouts(RolloutFiles(run)).means(1)
    assert means["rollouts"] == 10
    assert means["reward"] == means["rewards/correct"] == pytest.approx((45 - 13) / 80)
    assert (means["truncated"], means["invalid"], means["length"]) == (0.2, 0.2, 46)


def test_find_reads_only_the_columns_that_it_needs(run, monkeypatch):
    columns_read, read = [], pq.read_table
    monkeypatch.setattr(
        pq, "read_table", lambda path, columns: columns_read.append(columns) or read(path, columns=columns)
    )
    rollouts = Rollouts(RolloutFiles(run))
    assert columns_read == []
    assert [row["rollout"] for row in rollouts.find(1, Filters(reward=(0, 0.1)))] == [1, 2]
    assert [row["rollout"] for row in rollouts.find(3, Filters("LIBRARY"))] == [1, 2]
    rollouts.means(1)
    by_reward, by_text, means = map(set, columns_read)
    assert not {"prompt", "completion", "turns", "answer", "level"} & (by_reward | means)
    assert {"prompt", "turns"} < by_text and not {"completion", "answer", "level"} & by_text


def test_rollouts_cache_a_step_until_its_file_changes(run, directory):
    rollouts = Rollouts(RolloutFiles(run))
    assert rollouts.step(2) is rollouts.step(2) and rollouts.means(2)["rollouts"] == 4
    directory.save_rollouts(2, [rollout(i) for i in range(6)])
    directory.flush()
    assert len(rollouts.step(2)) == rollouts.means(2)["rollouts"] == 6


def test_corrupt_file_is_a_user_error(run):
    (run / "rollouts" / "step-000002.parquet").write_bytes(b"PAR1 not really")
    rollouts = Rollouts(RolloutFiles(run))
    for read in (rollouts.step, rollouts.means, lambda step: rollouts.find(step, Filters())):
        with pytest.raises(UserError, match=r"cannot read .*step-000002\.parquet"):
            read(2)


# The page of a rollout


def test_render_rollout_shows_numbers_prompt_and_answer():
    text = render_rollout(rollout(3, step=1, rollout=4), 10).plain
    assert "step 1 · rollout 4 of 10 · task task-3" in text
    assert "reward 0.3 · advantage 0.2 · truncated" in text
    assert "rewards: correct 0.3 · brief 1" in text and "31 tokens sampled" in text and "level: easy" in text
    assert (
        text.index("── prompt ──\nWhat is 3")
        < text.index("It is 6.")
        < text.index("── reference answer ──\n6")
    )
    for missing in ("invalid", "gap", "None", "environment", "turn 1"):
        assert missing not in text


def test_render_rollout_shows_turns_and_highlights_matches():
    row = with_turns(2) | {"step": 3, "rollout": 2, "invalid": FAILED}
    text = render_rollout(row, 2, search="library")
    assert f"invalid: {FAILED}" in text.plain
    assert "4 from the environment · log-prob gap 0.0125 nats" in text.plain
    assert (
        "assistant, turn 1, 5 tokens" in text.plain and "environment (user), turn 2, 4 tokens" in text.plain
    )
    assert text.plain.count("It is 4.") == 1  # the completion is not shown in addition to the turns
    styles = {text.plain[span.start : span.end].strip(): str(span.style) for span in text.spans}
    assert styles["found [/] ␛[31m2\nin a Library"] == "yellow" and "Library" in styles
    assert "<search>[bold]2[/]</search>" not in styles  # assistant turns are unstyled


def test_render_rollout_accepts_a_nearly_empty_row():
    row = {"step": 1, "rollout": 1, "completion": None}
    assert "step 1 · rollout 1 of 1" in render_rollout(row, 1).plain


def test_visible_replaces_control_characters():
    assert visible("a\x1b[2J\x07\r\nb\tc\x9b1m\u202ed\r") == "a␛[2J␇\nb\tc\ufffd1m\ufffdd␍"


# The application


@driven
async def test_viewer_starts_at_the_last_step_and_shows_means(run):
    async with browse(run, step=None) as browser:
        assert browser.app.step == 3
        assert browser.column("step", "steps") == ["1", "2", "3"]
        assert browser.column("n", "steps") == ["10", "4", "2"]
        assert browser.column("correct", "steps") == ["0.400", "0.150", "0.150"]
        assert browser.column("invalid", "steps") == ["20%", "0%", "0%"]


@driven
async def test_list_hides_missing_columns(run, directory):
    directory.save_rollouts(4, [{"prompt": "p", "completion": "c", "reward": 1.0}])
    directory.flush()
    async with browse(run) as browser:
        assert "gap" not in browser.headers() and "invalid" in browser.headers()
        await browser.press("n", "n")
        assert "gap" in browser.headers()
        await browser.press("n")
        assert browser.headers() == ["# ▲", "reward"]
        assert "── prompt ──\np" in browser.text()


@driven
async def test_list_sorts_by_key_and_by_click(run):
    async with browse(run) as browser:
        await browser.press(*["s"] * 4)
        assert browser.headers()[:5] == ["#", "task", "reward", "advantage", "length ▲"]
        await browser.press("S")
        assert browser.column("length") == [str(10 * i + 1) for i in range(9, -1, -1)]
        browser.app.sort = "reward", True
        await browser.press("r")
        assert browser.column("#") == ["9", "8", "7", "6", "4", "3", "2", "1", "5", "10"]
        await browser.pilot.click("#rollouts", offset=(6, 0))
        await browser.settle()
        assert browser.app.sort == ("task_id", False)


@driven
async def test_sorting_keeps_the_cursor_on_its_rollout(run):
    async with browse(run) as browser:
        await browser.press("j", "j", "S")
        assert "rollout 3 of 10" in browser.text() and browser.app.list.cursor_row == 7


@driven
async def test_filters_combine_and_survive_a_change_of_step(run):
    async with browse(run) as browser:
        await browser.type("reward", "0.2..0.6")
        assert browser.column("#") == ["3", "4", "6", "7"]
        await browser.type("length", "..60")
        assert browser.column("#") == ["3", "4", "6"]
        await browser.choose("truncated", True)
        assert browser.column("#") == ["4"] and "rollout 4 of 10" in browser.text()
        assert "1 of 10 rollouts" in browser.text("status")
        await browser.press("c")
        assert len(browser.column("#")) == 10
        await browser.choose("invalid", True)
        assert browser.column("#") == ["5", "10"]
        await browser.choose("invalid", False)
        assert len(browser.column("#")) == 8
        await browser.choose("invalid", FAILED)
        assert browser.column("#") == ["5", "10"]
        await browser.press("n")  # to a step without invalid rollouts
        assert browser.column("#") == [] and browser.text() == ""
        await browser.press("c")
        assert len(browser.column("#")) == 4


@driven
async def test_malformed_range_leaves_the_filter_unchanged(run):
    async with browse(run) as browser:
        await browser.type("reward", "0.5..")
        before = browser.column("#")
        await browser.type("reward", "0.5..x")
        assert browser.column("#") == before == ["6", "7", "8", "9"]
        assert browser.app.query_one("#reward").has_class("malformed")
        await browser.type("reward", "")
        assert not browser.app.query_one("#reward").has_class("malformed") and len(browser.column("#")) == 10


@driven
async def test_search_covers_a_step_and_then_all_steps(run):
    async with browse(run) as browser:
        await browser.press("slash", *"it", "space", *"IS", "space", *"2")
        assert browser.column("#") == ["2"]
        await browser.press("enter", "a")  # enter moves the focus from the field to the list
        assert browser.text("scope") == "in all steps"
        assert [*zip(browser.column("step"), browser.column("#"), strict=True)] == [
            ("1", "2"),
            ("2", "2"),
            ("3", "1"),
        ]
        await browser.press("j", "j")
        assert "step 3 · rollout 1 of 2" in browser.text() and "Library" in browser.text()
        await browser.press("a")
        assert browser.text("scope") == "in this step" and browser.column("#") == ["2"]


@driven
async def test_filters_apply_to_all_steps_until_a_step_is_selected(run):
    async with browse(run) as browser:
        await browser.press("a")
        assert len(browser.column("#")) == 16
        await browser.choose("truncated", True)
        assert browser.column("step") == ["1", "1", "2"]
        await browser.press("n")
        assert browser.app.step == 2 and "step" not in browser.headers() and browser.column("#") == ["4"]


@driven
async def test_search_stops_at_the_maximum_number_of_rollouts(run, monkeypatch):
    monkeypatch.setattr(view, "MAX_LISTED", 12)
    async with browse(run) as browser:
        await browser.press("a")
        assert len(browser.column("#")) == 12


@driven
async def test_full_screen_rollout_can_be_changed_and_closed(run):
    async with browse(run) as browser:
        await browser.press("j", "enter")
        assert browser.app.focused.id == "detail" and not browser.app.list.display
        assert "What is 1 + 1?" in browser.screen() and "esc Back" in browser.screen()
        await browser.press("j")
        assert "rollout 3 of 10" in browser.screen()
        await browser.press("k", "k", "k")
        assert "rollout 1 of 10" in browser.screen()
        await browser.press("n")
        assert "step 2 · rollout 1 of 4" in browser.screen()
        await browser.press("escape")
        assert browser.app.list.display and browser.app.focused is browser.app.list


@driven
async def test_step_keys_stop_at_the_first_and_last_step(run):
    async with browse(run) as browser:
        await browser.press("n")
        assert browser.app.step == 2 and len(browser.column("#")) == 4
        await browser.press("n", "n", "n")
        assert browser.app.step == 3
        await browser.press("p", "p", "p", "p")
        assert browser.app.step == 1 and "step 1 · rollout 1 of 10" in browser.text()


@driven
async def test_markup_and_escape_sequences_in_a_rollout_are_shown_literally(run):
    async with browse(run, step=3) as browser:
        screen = browser.screen()
        for text in (
            "[red]x[/blue]",
            "[/] Is [bold]it[/bold]?",
            "<search>[bold]1[/]</search>",
            "found [/] ␛[31m1",
        ):
            assert text in screen
        assert "\x1b" not in screen
    async with browse(run) as browser:
        assert FAILED in browser.screen()
        await browser.choose("invalid", FAILED)
        await browser.type("search", "[/nothing")
        assert browser.column("#") == []


@driven
async def test_reload_follows_a_run_that_trains_or_resumes(run, directory):
    async with browse(run, step=3) as browser:
        await browser.press("j")
        directory.rewind(2)
        directory.save_rollouts(3, [with_turns(i) for i in range(5)])
        directory.save_rollouts(4, [rollout(0)])
        directory.flush()
        await browser.press("r")
        assert browser.column("n", "steps") == ["10", "4", "5", "1"]
        assert browser.app.step == 3 and "rollout 2 of 5" in browser.text()
        directory.rewind(2)
        await browser.press("k")
        assert "no longer exists" in browser.text()
        await browser.press("r")
        assert browser.app.step == 2 and browser.column("step", "steps") == ["1", "2"]
        directory.rewind(0)
        await browser.press("r")  # warns that there are no rollouts, and keeps what is shown
        assert browser.column("step", "steps") == ["1", "2"]


@driven
async def test_viewer_survives_a_corrupt_file(run):
    (run / "rollouts" / "step-000002.parquet").write_bytes(b"PAR1 not really")
    async with browse(run) as browser:
        assert browser.column("n", "steps") == ["10", "", "2"]
        await browser.press("n")
        assert browser.column("#") == []
        await browser.press("a")
        assert len(browser.column("#")) == 12


@driven
async def test_footer_fits_80_columns_and_q_quits(run):
    async with browse(run, size=(80, 24)) as browser:
        footer = browser.screen().splitlines()[-1]
        for key in (
            "Open",
            "np Step",
            "jk Row",
            "/ Find",
            "a All",
            "f Filter",
            "sS Sort",
            "r Reload",
            "q Quit",
        ):
            assert key in footer
        await browser.press("slash", "q")
        assert browser.app.is_running and browser.app.query_one("#search", Input).value == "q"
        await browser.pilot.press("escape", "q")
        await browser.pilot.pause()
        assert not browser.app.is_running


# The command


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlkit", "view", *map(str, arguments)])
        code = cli.main()
        return code, capsys.readouterr().err

    return run


def test_help_lists_the_keys(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "rlkit view" in text and "--step" in text
    for key in ("n, p", "j, k", "enter, esc", "s, S", "  /", "  a", "  f", "  c", "  r", "  q"):
        assert key in text


def test_command_rejects_bad_input_in_one_line(command, run, directory, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    assert command(folder) == (
        2,
        f"rlkit: {folder} is not a run directory (it has no config.yaml and no rollouts/)\n",
    )
    assert "not a run directory" in command(tmp_path / "nowhere")[1]
    assert command(run, "--step", 9) == (
        2,
        f"rlkit: {run} has no rollouts of step 9; its steps range from 1 to 3\n",
    )
    assert command(run) == (2, "rlkit: rlkit view requires a terminal; use rlkit report for an HTML page\n")
    directory.rewind(0)
    assert "has no rollouts yet" in command(run)[1]


def test_command_starts_the_viewer_at_the_step(command, run, monkeypatch):
    started = []
    monkeypatch.setattr(Viewer, "run", lambda app: started.append((app.data.run, app.step)))
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True, raising=False)
    assert command(run, "--step", 2)[0] == 0
    assert started == [(run, 2)]
