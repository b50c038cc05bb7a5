"""The two lines above the lists: search and filters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Input, Select, Static

from rlkit.view.data import Filters, RolloutRow, parse_range, reasons
from rlkit.view.text import cell

CUT = [("cut or not", None), ("truncated", True), ("not truncated", False)]
VALID: list[tuple[str, Any]] = [("valid or not", None), ("invalid", True), ("valid", False)]


class Bar(Vertical):
    """The fields of `Filters`; what cannot be read leaves its filter as it was, and is red."""

    DEFAULT_CSS = """
    Bar, Bar Horizontal { height: auto; }
    #search { width: 1fr; }
    #scope { width: auto; padding: 0 1; }
    #reward, #length, #truncated { width: 1fr; }
    #invalid { width: 2fr; }
    .wrong { color: $error; }
    """

    class Changed(Message):
        """The filters are others."""

    def __init__(self) -> None:
        super().__init__(id="bar")
        self.filters = Filters()
        self._reasons: list[str] = []  # of all rollouts seen so far

    def compose(self) -> ComposeResult:
        """Lay out the fields."""
        with Horizontal():
            yield Input(id="search", placeholder="search prompts and turns", compact=True)
            yield Static("in this step", id="scope", markup=False)
        with Horizontal():
            yield Input(id="reward", placeholder="reward 0.2..0.8", compact=True)
            yield Input(id="length", placeholder="length ..100", compact=True)
            yield Select(CUT, id="truncated", allow_blank=False, compact=True)
            yield Select(VALID, id="invalid", allow_blank=False, compact=True)

    @on(Input.Changed)
    @on(Select.Changed)
    def _changed(self, event: Message) -> None:
        event.stop()
        filters = Filters(
            text=self.query_one("#search", Input).value,
            reward=self._range("reward"),
            length=self._range("length"),
            truncated=self._chosen("truncated").value,
            invalid=self._chosen("invalid").value,
        )
        if filters != self.filters:
            self.filters = filters
            self.post_message(self.Changed())

    def _range(self, name: str) -> tuple[float, float] | None:
        field = self.query_one(f"#{name}", Input)
        try:
            limits = parse_range(field.value)
        except ValueError:
            field.add_class("wrong")
            return getattr(self.filters, name)
        field.remove_class("wrong")
        return limits

    def _chosen(self, name: str) -> Any:
        return self.query_one(f"#{name}", Select)

    def clear(self) -> None:
        """Let everything through."""
        for field in self.query(Input):
            field.value = ""
        for name in ("truncated", "invalid"):
            self._chosen(name).value = None

    def offer_reasons(self, rows: Iterable[RolloutRow]) -> None:
        """Offer the reasons of these rollouts besides those offered before."""
        new = [reason for reason in reasons(rows) if reason not in self._reasons]
        if not new:
            return
        self._reasons += new
        choice = self._chosen("invalid")
        value = choice.value
        found = [(cell("invalid", reason).plain, reason) for reason in self._reasons]
        with choice.prevent(Select.Changed):
            choice.set_options([(Text(label), value) for label, value in [*VALID, *found]])
            choice.value = value

    def say_scope(self, scope: str) -> None:
        """Say where it is looked."""
        self.query_one("#scope", Static).update(Text(scope))
