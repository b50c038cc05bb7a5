"""Search and filter fields, in two lines above the lists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Input, Select, Static

from rlkit.view.data import Filters, RolloutRow, invalid_reasons, parse_range
from rlkit.view.text import cell

TRUNCATED_OPTIONS = [("truncated: any", None), ("truncated", True), ("not truncated", False)]
INVALID_OPTIONS: list[tuple[str, Any]] = [("invalid: any", None), ("invalid", True), ("valid", False)]


class FilterBar(Vertical):
    """Input fields of `Filters`; a malformed range is red and leaves its filter unchanged."""

    DEFAULT_CSS = """
    FilterBar, FilterBar Horizontal { height: auto; }
    #search { width: 1fr; }
    #scope { width: auto; padding: 0 1; }
    #reward, #length, #truncated { width: 1fr; }
    #invalid { width: 2fr; }
    .malformed { color: $error; }
    """

    class Changed(Message):
        """Posted when the filters have changed."""

    def __init__(self) -> None:
        super().__init__(id="bar")
        self.filters = Filters()
        self._reasons: list[str] = []  # offered so far, from all steps that were shown

    def compose(self) -> ComposeResult:
        """Lay out the fields."""
        with Horizontal():
            yield Input(id="search", placeholder="search prompts and turns", compact=True)
            yield Static("in this step", id="scope", markup=False)
        with Horizontal():
            yield Input(id="reward", placeholder="reward 0.2..0.8", compact=True)
            yield Input(id="length", placeholder="length ..100", compact=True)
            yield Select(TRUNCATED_OPTIONS, id="truncated", allow_blank=False, compact=True)
            yield Select(INVALID_OPTIONS, id="invalid", allow_blank=False, compact=True)

    @on(Input.Changed)
    @on(Select.Changed)
    def _changed(self, event: Message) -> None:
        event.stop()
        filters = Filters(
            text=self.query_one("#search", Input).value,
            reward=self._range("reward"),
            length=self._range("length"),
            truncated=self._select("truncated").value,
            invalid=self._select("invalid").value,
        )
        if filters != self.filters:
            self.filters = filters
            self.post_message(self.Changed())

    def _range(self, name: str) -> tuple[float, float] | None:
        field = self.query_one(f"#{name}", Input)
        try:
            limits = parse_range(field.value)
        except ValueError:
            # Likely half typed: keep the last valid range until it is complete.
            field.add_class("malformed")
            return getattr(self.filters, name)
        field.remove_class("malformed")
        return limits

    def _select(self, name: str) -> Any:
        return self.query_one(f"#{name}", Select)

    def clear(self) -> None:
        """Clear the search and all filters."""
        for field in self.query(Input):
            field.value = ""
        for name in ("truncated", "invalid"):
            self._select(name).value = None

    def offer_reasons(self, rows: Iterable[RolloutRow]) -> None:
        """Add the reasons why these rollouts are invalid to the options of the filter."""
        new = [reason for reason in invalid_reasons(rows) if reason not in self._reasons]
        if not new:
            return
        self._reasons += new
        select = self._select("invalid")
        selected = select.value
        reason_options = [(cell("invalid", reason).plain, reason) for reason in self._reasons]
        # Setting options resets the value, which would clear the filter and post Changed.
        with select.prevent(Select.Changed):
            select.set_options([(Text(label), value) for label, value in [*INVALID_OPTIONS, *reason_options]])
            select.value = selected

    def show_scope(self, scope: str) -> None:
        """Show the scope of the search."""
        self.query_one("#scope", Static).update(Text(scope))
