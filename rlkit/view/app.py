"""The terminal browser of rollouts: steps on the left, the rollouts of one step, and the text of one below.

What is long runs beside the screen: the means of steps, and the search in all of them. Whatever comes from
a rollout is shown as a `Text`, because Textual reads markup in plain strings.
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
from rlkit.view.bar import Bar
from rlkit.view.data import RolloutRow, Rollouts, ordered
from rlkit.view.lists import RolloutList, StepList, columns_of
from rlkit.view.text import visible, whole

MOST = 2000  # rollouts in the list: a search in all steps ends there
PAUSE = 0.2  # seconds without a key before all steps are searched
# So short that all keys stand in a footer of 80 columns. Textual sets no space between a group and a key.
STEP = Binding.Group("Step", compact=True)
ROLLOUT = Binding.Group("Row ", compact=True)
SORT = Binding.Group("Sort ", compact=True)


class Viewer(App[None]):
    """The browser.

    Args:
        rollouts: of the run.
        step: where to begin; None: at the last.
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
        Binding("a", "everywhere", "All"),
        Binding("f", "field('reward')", "Filter"),
        Binding("c", "clear", "Clear"),
        Binding("s", "sort", "Sort", group=SORT),
        Binding("S", "reverse", "The other way", group=SORT),
        Binding("r", "reload", "Reload"),
        Binding("escape", "leave", "Back"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, rollouts: Rollouts, step: int | None = None):
        super().__init__()
        self.data = rollouts
        self.step = max(rollouts.files) if step is None else step
        self.everywhere = False
        self.sort = ("rollout", False)  # and whether the highest come first
        self.rows: list[RolloutRow] = []  # of the step, or what was found in all

    def compose(self) -> ComposeResult:
        """Lay out the screen."""
        yield Bar()
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
        self.bar = self.query_one(Bar)
        self.steps.show(self.data, self.step)
        self._show_step(self.step)
        self.list.focus()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """Offer the way back only from where there is one."""
        return action != "leave" or self.focused is None or self.focused.id != "rollouts"

    # Steps

    @on(DataTable.RowHighlighted, "#steps")
    def _step_chosen(self) -> None:
        # Not what the message says, which may be an old one: the cursor is where it is by now.
        if self.steps.step != self.step:
            self._show_step(self.steps.step)

    def _show_step(self, step: int) -> None:
        self.step = step
        self._set_everywhere(False)
        try:
            self.rows = self.data.step(step)
        except UserError as error:
            self.rows = []
            self._say(error)
        self._refresh()

    @on(DataTable.RowSelected, "#steps")
    def _step_opened(self) -> None:
        self.list.focus()

    def action_step(self, by: int) -> None:
        """Go some steps on, or back."""
        self.steps.move(by)

    def action_reload(self) -> None:
        """Look again what there is; step, rollout, filters and order stay."""
        everywhere = self.everywhere
        try:
            self.data.reload()
        except UserError as error:
            self._say(error)
            return
        step = self.step if self.step in self.data.files else max(self.data.files)
        self.steps.show(self.data, step)
        self._show_step(step)
        if everywhere:
            self.action_everywhere()

    # Rollouts

    def _refresh(self) -> None:
        kept = self.rows if self.everywhere else filter(self.bar.filters.keep, self.rows)
        shown = ordered(kept, *self.sort)
        self.list.show(shown[:MOST], columns_of(self.rows, step=self.everywhere), self.sort)
        self.bar.offer_reasons(self.rows)
        self._tell(f"{len(shown)} found" if self.everywhere else f"{len(shown)} of {len(self.rows)} rollouts")
        self._read()

    def action_rollout(self, by: int) -> None:
        """Go some rollouts on, or back."""
        self.list.move(by)

    @on(DataTable.HeaderSelected, "#rollouts")
    def _sort_by(self, event: DataTable.HeaderSelected) -> None:
        column = event.column_key.value or "rollout"
        self.sort = column, column == self.sort[0] and not self.sort[1]
        self._refresh()

    def action_sort(self) -> None:
        """Sort by the next column."""
        columns = columns_of(self.rows, step=self.everywhere)
        place = columns.index(self.sort[0]) if self.sort[0] in columns else -1
        self.sort = columns[(place + 1) % len(columns)], False
        self._refresh()

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self.sort = self.sort[0], not self.sort[1]
        self._refresh()

    # Filters and search

    @on(Bar.Changed)
    def _filter(self) -> None:
        if self.everywhere:
            self._search()
        else:
            self._refresh()

    def action_clear(self) -> None:
        """Show everything again."""
        self.bar.clear()

    def action_everywhere(self) -> None:
        """Look in all steps, or in this one again."""
        if self.everywhere:
            self._show_step(self.step)
            return
        self._set_everywhere(True)
        self._search()

    def _set_everywhere(self, everywhere: bool) -> None:
        self.everywhere = everywhere
        self.workers.cancel_group(self, "search")
        self.bar.say_scope("in all steps" if everywhere else "in this step")

    @work(exclusive=True, group="search")
    async def _search(self) -> None:
        await asyncio.sleep(PAUSE)
        steps, found = list(self.data.files), []
        for count, step in enumerate(steps, start=1):
            try:
                found += await asyncio.to_thread(self.data.find, step, self.bar.filters)
            except UserError as error:
                self._say(error)
            self._tell(f"searched {count} of {len(steps)} steps, {len(found)} rollouts found")
            if len(found) > MOST:
                self.notify(f"more than {MOST} found: the rest is left out", markup=False)
                break
        self.rows = found[:MOST]
        self._refresh()

    # One rollout

    @on(DataTable.RowHighlighted, "#rollouts")
    def _read(self) -> None:
        text = Text()
        if (place := self.list.current) is not None:
            step, rollout = place
            try:
                rows = self.data.step(step)
                text = whole(rows[rollout - 1], len(rows), self.bar.filters.text)
            except (UserError, IndexError, KeyError):  # the run was resumed and has taken it back
                text = Text("It is not there any more: press r.")
        self.query_one("#text", Static).update(text)
        self.query_one("#detail").scroll_home(animate=False)

    @on(DataTable.RowSelected, "#rollouts")
    def _read_alone(self) -> None:
        self.screen.add_class("reading")
        self.query_one("#detail").focus()

    @on(Input.Submitted)
    def action_leave(self) -> None:
        """Leave the whole screen or a filter, and be in the list."""
        self.screen.remove_class("reading")
        self.list.focus()

    def action_field(self, name: str) -> None:
        """Go to a filter."""
        self.screen.remove_class("reading")
        self.query_one(f"#{name}").focus()

    # What is said

    def _tell(self, counts: str) -> None:
        where = "all steps" if self.everywhere else f"step {self.step}"
        self.query_one("#status", Static).update(Text(f"{visible(str(self.data.run))} · {where} · {counts}"))

    def _say(self, error: UserError) -> None:
        self.notify(visible(str(error)), severity="warning", markup=False)
