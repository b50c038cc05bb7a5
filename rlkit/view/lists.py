"""The two lists of the viewer: the steps of a run, and rollouts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.binding import Binding, BindingType
from textual.widgets import DataTable

from rlkit.errors import UserError
from rlkit.view.data import LIST_COLUMNS, RolloutRow, Rollouts, rollout_key
from rlkit.view.text import cell, mean_cell, visible

# Short headers, since the list of steps shares the screen with the rollouts.
HEADERS = {"rollout": "#", "task_id": "task", "log_prob_gap": "gap", "rollouts": "n", "truncated": "trunc"}


class RowTable(DataTable):
    """A table with a row cursor; the footer shows its Enter key, which DataTable's own binding hides."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "Open")]

    def __init__(self, id: str) -> None:
        super().__init__(id=id, cursor_type="row")

    def move(self, by: int) -> None:
        """Move the cursor by some rows, at most to the first or last one."""
        self.move_cursor(row=self.cursor_row + by)

    def add_header(self, column: str, arrow: str = "") -> None:
        """Add a column with its short header."""
        name = visible(HEADERS.get(column, column.removeprefix("rewards/")))
        self.add_column(Text(name + arrow), key=column)


class StepList(RowTable):
    """The steps of a run with their means, which are read in the background, the newest first."""

    def show(self, rollouts: Rollouts, step: int) -> None:
        """List the steps and put the cursor on one."""
        self._steps = list(rollouts.files)
        self.clear(columns=True)
        try:
            rewards = rollouts.rewards(self._steps[-1])
        except UserError:  # the viewer shows the error when the step is selected
            rewards = []
        columns = ("rollouts", *rewards, "length", "truncated", "invalid")
        for column in ("step", *columns):
            self.add_header(column)
        for number in self._steps:
            self.add_row(Text(str(number), justify="right"), *(Text() for _ in columns), key=str(number))
        row = self._steps.index(step)
        self.move_cursor(row=row)
        # Once more after the layout: before it, the height is unknown and the list does not scroll.
        self.call_after_refresh(self.move_cursor, row=row)
        self._fill_means(rollouts)

    @property
    def step(self) -> int:
        """Step at the cursor."""
        return self._steps[self.cursor_row]

    @work(exclusive=True)
    async def _fill_means(self, rollouts: Rollouts) -> None:
        for step in reversed(self._steps):
            try:
                means = await asyncio.to_thread(rollouts.means, step)
            except UserError:
                continue
            for column in self.columns:
                if column.value in means:
                    value = mean_cell(column.value, means[column.value])
                    self.update_cell(str(step), column, value, update_width=True)


class RolloutList(RowTable):
    """Rollouts of one or more steps."""

    rows_shown: Sequence[RolloutRow] = ()

    def show(self, rows: Sequence[RolloutRow], columns: Sequence[str], sort: tuple[str, bool]) -> None:
        """List rollouts, and keep the cursor on the current one if it is among them."""
        previous = self.current
        self.rows_shown = rows
        self.clear(columns=True)
        sort_column, descending = sort
        arrow = " ▼" if descending else " ▲"
        for column in columns:
            self.add_header(column, arrow if column == sort_column else "")
        for row in rows:
            self.add_row(*(cell(column, row.get(column)) for column in columns))
        self.go_to(previous)

    @property
    def current(self) -> tuple[int, int] | None:
        """Step and number of the rollout at the cursor."""
        if self.cursor_row >= len(self.rows_shown):
            return None
        return rollout_key(self.rows_shown[self.cursor_row])

    def go_to(self, key: tuple[int, int] | None) -> None:
        """Move the cursor to a rollout if it is listed."""
        keys = [rollout_key(row) for row in self.rows_shown]
        if key in keys:
            self.move_cursor(row=keys.index(key))


def columns_of(rows: Sequence[RolloutRow], *, step: bool) -> list[str]:
    """Return the columns of a list: those that any of the rollouts has, after the step if `step` is set."""
    available = {key for row in rows for key in row}
    return ["step"] * step + ["rollout", *(name for name in LIST_COLUMNS if name in available)]
