"""What a model writes about the nodes of a tree, from the leaves up (LATTICE, arXiv 2510.13217)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlkit.errors import UserError

MEMBERS = 12  # of a node that the model sees
_PROMPT = (
    "The documents below form one section of a library:\n{members}\n\nIn one sentence of at most 25 words, "
    "say what they have in common and what distinguishes them from other sections. Write only that sentence."
)


def summarise(
    children: Sequence[Sequence[int]], leaf: Sequence[int | None], shown: Mapping[int, str], model: str
) -> dict[int, str]:
    """A sentence for each inner node but the root, by its number.

    Args:
        children: of each node, parents before their children.
        leaf: the text's number of a leaf.
        shown: texts.
        model: hub name, folder or bundled model.

    Raises:
        UserError: the model cannot be opened, or it fails.
    """
    from rlkit.rollouts.text_generation import open_writer

    writer = open_writer(model, tokens=60, temperature=0.0)
    texts = {node: shown[number] for node, number in enumerate(leaf) if number is not None}
    for level in _levels(children):
        members = ["\n".join(f"- {texts[child]}" for child in children[node][:MEMBERS]) for node in level]
        prompts = [[{"role": "user", "content": _PROMPT.format(members=one)}] for one in members]
        for node, written in zip(level, writer.write(prompts, level), strict=True):
            if written.error is not None or not written.text:
                raise UserError(f"{model} wrote nothing about a node: {written.error or 'an empty text'}")
            texts[node] = " ".join(written.text.split())
    return {**{node: texts[node] for level in _levels(children) for node in level}, 0: ""}


def _levels(children: Sequence[Sequence[int]]) -> list[list[int]]:
    """Inner nodes but the root, those first whose children are all known by then."""
    height = [0] * len(children)
    for node in range(len(children) - 1, -1, -1):
        height[node] = 1 + max((height[child] for child in children[node]), default=-1)
    inner = range(1, max(height) + 1)
    found = [[n for n in range(1, len(children)) if height[n] == level] for level in inner]
    return [level for level in found if level]
