"""The two lists: the steps of a run, and rollouts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.binding import Binding, BindingType
from textual.widgets import DataTable

from rlkit.errors import UserError
from rlkit.view.data import LISTED, RolloutRow, Rollouts, place
from rlkit.view.text import cell, mean_cell, visible

HEADS = {"rollout": "#", "task_id": "task", "log_prob_gap": "gap", "rollouts": "n", "truncated": "cut"}


class List(DataTable):
    """A list with a row as cursor, whose Enter stands in the footer."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "Open")]

    def __init__(self, id: str) -> None:
        super().__init__(id=id, cursor_type="row")

    def move(self, by: int) -> None:
        """Move the cursor; it stops at the ends."""
        self.move_cursor(row=self.cursor_row + by)

    def add_head(self, column: str, arrow: str = "") -> None:
        """Add a column under a short name."""
        name = visible(HEADS.get(column, column.removeprefix("rewards/")))
        self.add_column(Text(name + arrow), key=column)


class StepList(List):
    """The steps with their means, which come in while it is looked at, the newest first."""

    def show(self, rollouts: Rollouts, step: int) -> None:
        """List the steps, with the cursor at one."""
        self._steps = list(rollouts.files)
        self.clear(columns=True)
        try:
            rewards = rollouts.rewards(self._steps[-1])
        except UserError:  # the viewer says so when the step is chosen
            rewards = []
        columns = ("rollouts", *rewards, "length", "truncated", "invalid")
        for column in ("step", *columns):
            self.add_head(column)
        for number in self._steps:
            self.add_row(Text(str(number), justify="right"), *(Text() for _ in columns), key=str(number))
        row = self._steps.index(step)
        self.move_cursor(row=row)
        self.call_after_refresh(self.move_cursor, row=row)  # to scroll there it must know its height
        self._fill(rollouts)

    @property
    def step(self) -> int:
        """The step at the cursor."""
        return self._steps[self.cursor_row]

    @work(exclusive=True)
    async def _fill(self, rollouts: Rollouts) -> None:
        for step in reversed(self._steps):
            try:
                means = await asyncio.to_thread(rollouts.means, step)
            except UserError:
                continue
            for column in self.columns:
                if column.value in means:
                    value = mean_cell(column.value, means[column.value])
                    self.update_cell(str(step), column, value, update_width=True)


class RolloutList(List):
    """Rollouts, of one step or of several."""

    shown: Sequence[RolloutRow] = ()

    def show(self, rows: Sequence[RolloutRow], columns: Sequence[str], sort: tuple[str, bool]) -> None:
        """List rollouts; the one at the cursor stays there, where it is among them."""
        before = self.current
        self.shown = rows
        self.clear(columns=True)
        for column in columns:
            self.add_head(column, (" ▼" if sort[1] else " ▲") if column == sort[0] else "")
        for row in rows:
            self.add_row(*(cell(column, row.get(column)) for column in columns))
        self.go_to(before)

    @property
    def current(self) -> tuple[int, int] | None:
        """Step and place of the rollout at the cursor."""
        return place(self.shown[self.cursor_row]) if self.cursor_row < len(self.shown) else None

    def go_to(self, wanted: tuple[int, int] | None) -> None:
        """Move the cursor to a rollout, if it is listed."""
        places = [place(row) for row in self.shown]
        if wanted in places:
            self.move_cursor(row=places.index(wanted))


def columns_of(rows: Sequence[RolloutRow], *, step: bool) -> list[str]:
    """What a list says of rollouts: what they have."""
    there = {key for row in rows for key in row}
    return ["step"] * step + ["rollout", *(name for name in LISTED if name in there)]
