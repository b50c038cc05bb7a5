"""Summaries of tree nodes that a model writes, bottom-up from the leaves (LATTICE, arXiv 2510.13217)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlkit.errors import UserError
from rlkit.rewards.thinking import after_thinking

MAX_MEMBERS = 12  # children of a node in the prompt
_PROMPT = (
    "The documents below form one section of a library:\n{members}\n\nIn one sentence of at most 25 words, "
    "say what they have in common and what distinguishes them from other sections. Write only that sentence."
)


def summarize_nodes(
    children: Sequence[Sequence[int]], leaf: Sequence[int | None], shown: Mapping[int, str], model: str
) -> dict[int, str]:
    """Return a one-sentence summary of each inner node; the root's is "".

    Args:
        children: Children of each node; parents precede their children.
        leaf: Number of the text of each leaf; None for an inner node.
        shown: Text to show of each leaf, by number of the text.
        model: Hub name, folder or bundled model.

    Raises:
        UserError: The model cannot be loaded, or it writes nothing.
    """
    from rlkit.rollouts.text_generation import load_text_model

    text_model = load_text_model(model, max_tokens=60, temperature=0.0)
    texts = {node: shown[number] for node, number in enumerate(leaf) if number is not None}
    # One batch per level, because a summary is written from those of the children.
    for level in _levels(children):
        members = ["\n".join(f"- {texts[child]}" for child in children[node][:MAX_MEMBERS]) for node in level]
        prompts = [
            [{"role": "user", "content": _PROMPT.format(members=member_list)}] for member_list in members
        ]
        generations = text_model.generate(prompts, level)  # the seed is the number of the node
        for node, generation in zip(level, generations, strict=True):
            summary = " ".join(after_thinking(generation.text).split())
            if generation.error is not None or not summary:
                reason = generation.error or "the model wrote nothing, or only a thought"
                raise UserError(f"cannot summarize a node of the tree with {model}: {reason}")
            texts[node] = summary
    return {**{node: texts[node] for level in _levels(children) for node in level}, 0: ""}


def _levels(children: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group the inner nodes except the root by height, so that children precede their parents."""
    height = [0] * len(children)
    for node in range(len(children) - 1, -1, -1):
        height[node] = 1 + max((height[child] for child in children[node]), default=-1)
    inner_heights = range(1, max(height) + 1)
    levels = [[n for n in range(1, len(children)) if height[n] == level] for level in inner_heights]
    return [level for level in levels if level]
