"""Terminal viewer for rollouts: steps on the left, the rollouts of a step on the right, one rollout below.

Slow work runs in the background: the means of the steps, and the search in all steps. Everything that comes
from a rollout is shown as a `Text`, because Textual parses markup in plain strings.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import DataTable, Footer, Input, Static

from rlkit.errors import UserError
from rlkit.view.bar import FilterBar
from rlkit.view.data import RolloutRow, Rollouts, sort_rollouts
from rlkit.view.lists import RolloutList, StepList, columns_of
from rlkit.view.text import render_rollout, visible

MAX_LISTED = 2000  # rollouts; a search in all steps stops there
SEARCH_DELAY_SECONDS = 0.2  # a search in all steps waits for this long a pause in typing
# Short names, so that all keys fit into a footer of 80 columns. Textual puts no space after a group's name.
STEP = Binding.Group("Step", compact=True)
ROLLOUT = Binding.Group("Row ", compact=True)
SORT = Binding.Group("Sort ", compact=True)


class Viewer(App[None]):
    """Application that browses the rollouts of a run.

    Args:
        rollouts: Rollouts of the run.
        step: Step to show first; None for the last one.
    """

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #status { height: 1; color: $text-muted; }
    #steps { width: auto; max-width: 40%; border-right: solid $panel; }
    #rollouts { height: 2fr; }
    #detail { height: 3fr; border-top: solid $panel; padding: 0 1; }
    #detail:focus { border-top: solid $accent; }
    .reading #bar, .reading #steps, .reading #rollouts { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "step(1)", "Next step", group=STEP),
        Binding("p", "step(-1)", "Previous step", group=STEP),
        Binding("j", "rollout(1)", "Next rollout", group=ROLLOUT),
        Binding("k", "rollout(-1)", "Previous rollout", group=ROLLOUT),
        Binding("slash", "field('search')", "Find", key_display="/"),
        Binding("a", "all_steps", "All"),
        Binding("f", "field('reward')", "Filter"),
        Binding("c", "clear", "Clear"),
        Binding("s", "sort", "Sort", group=SORT),
        Binding("S", "reverse", "Reverse the order", group=SORT),
        Binding("r", "reload", "Reload"),
        Binding("escape", "return_to_list", "Back"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, rollouts: Rollouts, step: int | None = None):
        super().__init__()
        self.data = rollouts
        self.step = max(rollouts.files) if step is None else step
        self.in_all_steps = False
        self.sort = ("rollout", False)  # column, and whether the order is descending
        self.rows: list[RolloutRow] = []  # rollouts of the step, or the matches in all steps

    def compose(self) -> ComposeResult:
        """Lay out the screen."""
        yield FilterBar()
        yield Static(id="status", markup=False)
        with Horizontal():
            yield StepList("steps")
            with Vertical():
                yield RolloutList("rollouts")
                with VerticalScroll(id="detail"):
                    yield Static(id="text", markup=False)
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Show the first step."""
        self.steps, self.list = self.query_one(StepList), self.query_one(RolloutList)
        self.bar = self.query_one(FilterBar)
        self.steps.show(self.data, self.step)
        self._show_step(self.step)
        self.list.focus()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """Hide "Back" in the list of rollouts, where it would do nothing."""
        return action != "return_to_list" or self.focused is None or self.focused.id != "rollouts"

    # Steps

    @on(DataTable.RowHighlighted, "#steps")
    def _select_step(self) -> None:
        # Read the cursor, not the message: with fast typing the message may be outdated.
        if self.steps.step != self.step:
            self._show_step(self.steps.step)

    def _show_step(self, step: int) -> None:
        self.step = step
        self._set_scope(in_all_steps=False)
        try:
            self.rows = self.data.step(step)
        except UserError as error:
            self.rows = []
            self._warn(error)
        self._refresh_list()

    @on(DataTable.RowSelected, "#steps")
    def _open_step(self) -> None:
        self.list.focus()

    def action_step(self, by: int) -> None:
        """Move by some steps."""
        self.steps.move(by)

    def action_reload(self) -> None:
        """Read the run again; the step, rollout, filters and order stay."""
        in_all_steps = self.in_all_steps
        try:
            self.data.reload()
        except UserError as error:
            self._warn(error)
            return
        step = self.step if self.step in self.data.files else max(self.data.files)
        self.steps.show(self.data, step)
        self._show_step(step)
        if in_all_steps:
            self.action_all_steps()

    # Rollouts

    def _refresh_list(self) -> None:
        # In all steps, the search has applied the filters already.
        matches = self.rows if self.in_all_steps else filter(self.bar.filters.keep, self.rows)
        rows = sort_rollouts(matches, *self.sort)
        self.list.show(rows[:MAX_LISTED], columns_of(self.rows, step=self.in_all_steps), self.sort)
        self.bar.offer_reasons(self.rows)
        if self.in_all_steps:
            self._show_status(f"{len(rows)} found")
        else:
            self._show_status(f"{len(rows)} of {len(self.rows)} rollouts")
        self._show_rollout()

    def action_rollout(self, by: int) -> None:
        """Move by some rollouts."""
        self.list.move(by)

    @on(DataTable.HeaderSelected, "#rollouts")
    def _sort_by(self, event: DataTable.HeaderSelected) -> None:
        column = event.column_key.value or "rollout"
        self.sort = column, column == self.sort[0] and not self.sort[1]
        self._refresh_list()

    def action_sort(self) -> None:
        """Sort by the next column."""
        columns = columns_of(self.rows, step=self.in_all_steps)
        index = columns.index(self.sort[0]) if self.sort[0] in columns else -1
        self.sort = columns[(index + 1) % len(columns)], False
        self._refresh_list()

    def action_reverse(self) -> None:
        """Reverse the order."""
        self.sort = self.sort[0], not self.sort[1]
        self._refresh_list()

    # Filters and search

    @on(FilterBar.Changed)
    def _apply_filters(self) -> None:
        if self.in_all_steps:
            self._search()
        else:
            self._refresh_list()

    def action_clear(self) -> None:
        """Clear the search and the filters."""
        self.bar.clear()

    def action_all_steps(self) -> None:
        """Search in all steps, or go back to the current one."""
        if self.in_all_steps:
            self._show_step(self.step)
            return
        self._set_scope(in_all_steps=True)
        self._search()

    def _set_scope(self, *, in_all_steps: bool) -> None:
        self.in_all_steps = in_all_steps
        self.workers.cancel_group(self, "search")
        self.bar.show_scope("in all steps" if in_all_steps else "in this step")

    @work(exclusive=True, group="search")
    async def _search(self) -> None:
        # Exclusive: each key pressed during the delay cancels the search before it.
        await asyncio.sleep(SEARCH_DELAY_SECONDS)
        steps, matches = list(self.data.files), []
        for count, step in enumerate(steps, start=1):
            try:
                matches += await asyncio.to_thread(self.data.find, step, self.bar.filters)
            except UserError as error:
                self._warn(error)
            self._show_status(f"searched {count} of {len(steps)} steps, found {len(matches)} rollouts")
            if len(matches) > MAX_LISTED:
                self.notify(f"more than {MAX_LISTED} rollouts found, showing the first", markup=False)
                break
        self.rows = matches[:MAX_LISTED]
        self._refresh_list()

    # One rollout

    @on(DataTable.RowHighlighted, "#rollouts")
    def _show_rollout(self) -> None:
        text = Text()
        if (key := self.list.current) is not None:
            step, number = key
            try:
                rows = self.data.step(step)
                text = render_rollout(rows[number - 1], len(rows), self.bar.filters.text)
            except (
                UserError,
                IndexError,
                KeyError,
            ):  # a run that resumes deletes the steps after its checkpoint
                text = Text("This rollout no longer exists. Press r to reload.")
        self.query_one("#text", Static).update(text)
        self.query_one("#detail").scroll_home(animate=False)

    @on(DataTable.RowSelected, "#rollouts")
    def _read_full_screen(self) -> None:
        self.screen.add_class("reading")
        self.query_one("#detail").focus()

    @on(Input.Submitted)
    def action_return_to_list(self) -> None:
        """Go back to the list, from a full-screen rollout or from a filter."""
        self.screen.remove_class("reading")
        self.list.focus()

    def action_field(self, name: str) -> None:
        """Focus a search or filter field."""
        self.screen.remove_class("reading")
        self.query_one(f"#{name}").focus()

    # Status and warnings

    def _show_status(self, counts: str) -> None:
        scope = "all steps" if self.in_all_steps else f"step {self.step}"
        self.query_one("#status", Static).update(Text(f"{visible(str(self.data.run))} · {scope} · {counts}"))

    def _warn(self, error: UserError) -> None:
        self.notify(visible(str(error)), severity="warning", markup=False)
