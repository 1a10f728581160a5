"""Names of models as they fit into a picture or a table, and still tell the models apart."""

import re
from collections.abc import Sequence
from itertools import takewhile

__all__ = ["plain_text", "shorten", "step_labels", "tell_apart"]

_STEP = re.compile(r"(.*?)(\d+)")
_WORD = re.compile(r"([^\W\d_]+)[\s_-]*$")
_LONG = 16  # characters; shorter names are shown as they are


def shorten(name: str, most: int) -> str:
    """A name of at most `most` characters, what is too much left out in the middle: ends tell more than beginnings.

    Example:
        >>> shorten("organisation/model-of-135M-parameters-step-2000", 24)
        'organis…meters-step-2000'
    """
    if len(name) <= most:
        return name
    head = max(0, most - 1) // 3
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def tell_apart(names: Sequence[str], most: int = 28) -> list[str]:
    """Each name in at most `most` characters, different ones differently.

    Example:
        >>> tell_apart([f"a-very-long-name-that-{word}-in-its-middle-alone" for word in ("differs", "varies")], 20)
        ['…differ…', '…varie…']
    """
    shown = [shorten(name, most) for name in names]
    if _as_distinct(shown, names):
        return shown
    start, end = _common_length(names), _common_length([name[::-1] for name in names])
    inside = [name[start : max(start, len(name) - end)] for name in names]
    shown = [f"{'…' * (start > 0)}{shorten(text, most - 2)}{'…' * (end > 0)}" for text in inside]
    if _as_distinct(shown, names):
        return shown
    return [f"{place}: {shorten(name, most - len(str(place)) - 2)}" for place, name in enumerate(names, start=1)]


def step_labels(names: Sequence[str]) -> tuple[str, list[str]] | None:
    """What long names that differ in their last number alone count, and the numbers; None for other names.

    Example:
        >>> step_labels(["runs/first/checkpoint-500", "runs/first/checkpoint-1000"])
        ('checkpoint', ['500', '1000'])
    """
    found = [_STEP.fullmatch(name) for name in names]
    matches = [match for match in found if match is not None]
    if len(names) < 2 or len(matches) < len(names) or max(map(len, names)) < _LONG:
        return None
    if len({match[1] for match in matches}) > 1 or len({match[2] for match in matches}) < len(set(names)):
        return None
    word = _WORD.search(matches[0][1])
    return (word[1] if word else "model"), [match[2] for match in matches]


def plain_text(name: str) -> str:
    r"""A name as matplotlib shows it letter by letter: no formulas, one line, and none that legends leave out.

    Example:
        >>> print(plain_text("cost $a$"))
        cost \$a\$
    """
    text = " ".join(name.split()).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _common_length(names: Sequence[str]) -> int:
    """How many letters all names begin with."""
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*names)))


def _as_distinct(shown: Sequence[str], names: Sequence[str]) -> bool:
    return len(set(shown)) == len(set(names))
