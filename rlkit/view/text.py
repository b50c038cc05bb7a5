"""Rendering of rollouts in the terminal: cells of the lists, and the page of one rollout.

Model output is untrusted. It is wrapped in a rich `Text`, which parses no markup, and its control characters
are replaced by visible symbols, so that it cannot send commands to the terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text

MAX_CELL_CHARACTERS = 60
MAX_FIELD_CHARACTERS = 500  # of a column that only some environments have
SHOWN_COLUMNS = (  # all others are listed as `name: value`
    *("step", "rollout", "task_id", "prompt", "completion", "answer", "turns", "reward", "advantage"),
    *("truncated", "invalid", "length", "environment_tokens", "log_prob_gap"),
)
TOKENS = {
    "length": "{} tokens sampled",
    "environment_tokens": "{} from the environment",
}
# C0 and C1 controls except newline and tab (they introduce escape sequences), and bidirectional overrides.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Replace control characters by visible symbols; escape becomes ␛."""
    text = text.replace("\r\n", "\n")
    return CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])) if match[0] < " " else "\ufffd", text)


def _format_number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def cell(column: str, value: object) -> Text:
    """Return a cell of the list of rollouts, in one line."""
    if value is None:
        return Text("")
    if column == "truncated":
        return Text("yes" if value else "", style="yellow")
    if isinstance(value, int | float):
        return Text(_format_number(value), justify="right")
    text = visible(" ".join(str(value).split()))
    if len(text) > MAX_CELL_CHARACTERS:
        text = text[: MAX_CELL_CHARACTERS - 1] + "…"
    return Text(text, style="red" if column == "invalid" else "", no_wrap=True)


def mean_cell(column: str, value: float | None) -> Text:
    """Return a cell of the list of steps."""
    if value is None:
        return Text("")
    if column in ("truncated", "invalid"):
        return Text(f"{value:.0%}", justify="right", style="yellow" if value else "")
    digits = "d" if isinstance(value, int) else ".1f" if column == "length" else ".3f"
    return Text(format(value, digits), justify="right")


def render_rollout(row: Mapping[str, Any], num_rollouts: int, search: str = "") -> Text:
    """Return the page of one rollout: its numbers, prompt, turns and reference answer.

    Args:
        row: Rollout to render.
        num_rollouts: Number of rollouts in its step.
        search: String to highlight; case is ignored.
    """
    text = Text()
    for line in _facts(row, num_rollouts):
        text.append_text(line).append("\n")
    for title, title_style, content, content_style in _sections(row):
        text.append(f"\n── {visible(title)} ──\n", style=title_style)
        text.append(visible(content) + "\n", style=content_style)
    if search:
        # Over the complete text: line by line, a match across a line break would be missed.
        text.highlight_regex(re.compile(re.escape(visible(search)), re.IGNORECASE), "black on yellow")
    return text


def _facts(row: Mapping[str, Any], num_rollouts: int) -> Iterator[Text]:
    heading = f"step {row['step']} · rollout {row['rollout']} of {num_rollouts}"
    if row.get("task_id") is not None:
        heading += f" · task {visible(str(row['task_id']))}"
    yield Text(heading, style="bold")
    facts = [
        f"{key} {_format_number(row[key])}" for key in ("reward", "advantage") if row.get(key) is not None
    ]
    if row.get("truncated"):
        facts.append("truncated")
    if facts:
        yield Text(" · ".join(facts))
    rewards = []
    for key, value in row.items():
        if key.startswith("rewards/"):
            rewards.append(
                f"{key.removeprefix('rewards/')} {'–' if value is None else _format_number(value)}"
            )
    if rewards:
        yield Text(f"rewards: {' · '.join(rewards)}")
    if row.get("invalid") is not None:
        yield Text(f"invalid: {visible(str(row['invalid']))}", style="red")
    tokens = [form.format(row[key]) for key, form in TOKENS.items() if row.get(key) is not None]
    if row.get("log_prob_gap") is not None:
        tokens.append(f"log-prob gap {_format_number(row['log_prob_gap'])} nats")
    if tokens:
        yield Text(" · ".join(tokens))
    for key, value in row.items():
        if value is not None and key not in SHOWN_COLUMNS and not key.startswith("rewards/"):
            yield Text(visible(f"{key}: {value}")[:MAX_FIELD_CHARACTERS], style="dim")


def _sections(row: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield title, style of the title, content and style of the content."""
    if row.get("prompt") is not None:
        yield "prompt", "bold magenta", str(row["prompt"]), ""
    # Files from before multi-turn rollouts have no turns.
    turns = row.get("turns") or [{"role": "assistant", "content": row.get("completion")}]
    for turn_number, turn in enumerate(turns, start=1):
        role = str(turn.get("role"))
        by_model = role == "assistant"
        title = role if by_model else f"environment ({role})"
        if len(turns) > 1:
            title += f", turn {turn_number}"
        if turn.get("tokens") is not None:
            title += f", {turn['tokens']} tokens"
        content = "" if turn.get("content") is None else str(turn["content"])
        if by_model:
            yield title, "bold cyan", content, ""
        else:
            yield title, "bold yellow", content, "yellow"
    if row.get("answer") is not None:
        yield "reference answer", "bold green", str(row["answer"]), "green"
