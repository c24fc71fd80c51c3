"""Texts as a terminal may be given them."""


def printable(text: str) -> str:
    """A text in which what a terminal would obey is written as an escape: names of files and captions are anybody's."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
