"""How rollouts look in the terminal: cells of the lists, and the text of one.

What a model wrote is never markup and never steers the terminal: everything is a rich `Text`, in which
control characters are made visible.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text

CELL = 60  # characters of a cell
KNOWN = (
    *("step", "rollout", "task_id", "prompt", "completion", "answer", "turns", "reward", "advantage"),
    *("truncated", "invalid", "length", "environment_tokens", "log_prob_gap"),
)
TOKENS = {
    "length": "{} tokens sampled",
    "environment_tokens": "{} from the environment",
}
# All but line end and tab: among them the beginnings of the terminal's commands, and bidirectional overrides.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters shown as signs: escape is ␛."""
    text = text.replace("\r\n", "\n")
    return CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])) if match[0] < " " else "\ufffd", text)


def number(value: float) -> str:
    """A number in few digits."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def cell(column: str, value: object) -> Text:
    """One cell of the list of rollouts."""
    if value is None:
        return Text("")
    if column == "truncated":
        return Text("yes" if value else "", style="yellow")
    if isinstance(value, int | float):
        return Text(number(value), justify="right")
    text = visible(" ".join(str(value).split()))
    short = text if len(text) <= CELL else text[: CELL - 1] + "…"
    return Text(short, style="red" if column == "invalid" else "", no_wrap=True)


def mean_cell(column: str, value: float | None) -> Text:
    """One cell of the list of steps."""
    if value is None:
        return Text("")
    if column in ("truncated", "invalid"):
        return Text(f"{value:.0%}", justify="right", style="yellow" if value else "")
    digits = "d" if isinstance(value, int) else ".1f" if column == "length" else ".3f"
    return Text(format(value, digits), justify="right")


def whole(row: Mapping[str, Any], of: int, search: str = "") -> Text:
    """All there is of one rollout: its numbers, the prompt, the turns, and the right answer."""
    text = Text()
    for line in _facts(row, of):
        text.append_text(line).append("\n")
    for title, style, content, body in _parts(row):
        text.append(f"\n── {visible(title)} ──\n", style=style)
        text.append(visible(content) + "\n", style=body)
    if search:
        # One line at a time would miss what goes on in the next one.
        text.highlight_regex(re.compile(re.escape(visible(search)), re.IGNORECASE), "black on yellow")
    return text


def _facts(row: Mapping[str, Any], of: int) -> Iterator[Text]:
    place = f"step {row['step']} · rollout {row['rollout']} of {of}"
    task = row.get("task_id")
    yield Text(place if task is None else f"{place} · task {visible(str(task))}", style="bold")
    facts = [f"{key} {number(row[key])}" for key in ("reward", "advantage") if row.get(key) is not None]
    if facts or row.get("truncated"):
        yield Text(" · ".join([*facts, *["truncated"] * bool(row.get("truncated"))]))
    parts = {key.removeprefix("rewards/"): row[key] for key in row if key.startswith("rewards/")}
    if parts:
        said = (f"{key} {'–' if value is None else number(value)}" for key, value in parts.items())
        yield Text(f"rewards: {' · '.join(said)}")
    if row.get("invalid") is not None:
        yield Text(f"invalid: {visible(str(row['invalid']))}", style="red")
    tokens = [form.format(row[key]) for key, form in TOKENS.items() if row.get(key) is not None]
    if row.get("log_prob_gap") is not None:
        tokens.append(f"log-prob gap {number(row['log_prob_gap'])} nats")
    if tokens:
        yield Text(" · ".join(tokens))
    others = [key for key in row if key not in KNOWN and not key.startswith("rewards/")]
    for key in others:
        if row[key] is not None:
            yield Text(visible(f"{key}: {row[key]}")[:500], style="dim")


def _parts(row: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Title, style of the title, text, and style of the text."""
    if row.get("prompt") is not None:
        yield "prompt", "bold magenta", str(row["prompt"]), ""
    turns = row.get("turns") or [{"role": "assistant", "content": row.get("completion")}]
    for number_, turn in enumerate(turns, start=1):
        role = str(turn.get("role"))
        title = role if role == "assistant" else f"environment ({role})"
        title = f"{title}, turn {number_}" if len(turns) > 1 else title
        if turn.get("tokens") is not None:
            title += f", {turn['tokens']} tokens"
        own = role == "assistant"
        said = "" if turn.get("content") is None else str(turn["content"])
        yield title, "bold cyan" if own else "bold yellow", said, "" if own else "yellow"
    if row.get("answer") is not None:
        yield "right answer", "bold green", str(row["answer"]), "green"
