"""Contents of pairs of tags, such as `<query>...</query>`, in time linear in the length.

The regular expression `<query>(.*?)</query>` is quadratic: on many opening tags without a closing one, it
searches to the end after each of them.
"""

from __future__ import annotations


def tag_contents(text: str, tag: str) -> list[str]:
    """Return the content of each complete pair of tags, from left to right.

    A pair begins at the first opening tag after the previous pair and ends at the next closing tag.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    contents: list[str] = []
    start = text.find(opening)
    while start >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            break
        contents.append(text[start:end])
        start = text.find(opening, end + len(closing))
    return contents
