r"""Reading final answers as mathematics, whole or not at all, and comparing them.

`math_verify.parse` takes the first part of a text that it understands: of `3\sqrt{2}` the 3, of `2^{10}` the 2. Here a
response's final answer is cut out first (what it boxes, what follows "answer", or else the mathematics that comes
last), and then all of it has to be understood by `latex2sympy2_extended`, or nothing is. `math_verify.verify`
compares. Imported where a verifier runs: no torch, no transformers.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, is_expr_of_only_symbols, latex2sympy, normalize_latex
from latex2sympy2_extended.math_normalization import extract_boxed_content
from math_verify import verify
from sympy.physics import units

__all__ = ["answers_agree", "final_answers", "gold_answer", "readings"]

# They warn that there is no time limit, which the verifier's `timeout` is.
for _name in ("parser", "grader"):
    logging.getLogger(f"math_verify.{_name}").setLevel(logging.ERROR)

_NORMAL = NormalizationConfig(basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none")
_WITH_UNITS = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")

_CHARACTERS = str.maketrans(
    {"−": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty "}
    | {"°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset "}
    | {"ℝ": r"\mathbb{R}", "∈": r"\in ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "~": " "}
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_FUNCTIONS = r"arc(?:sin|cos|tan)|(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|pi"
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_ENVIRONMENT = r"(?:\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|(?<!\\)\$[^$]+?(?<!\\)\$)"
_ENVIRONMENTS = re.compile(
    rf"{_ENVIRONMENT}(?:\s*(?:,|;|,?\s*and|,?\s*or)\s*{_ENVIRONMENT})*(?:\s*(?:\\?%|percent\b))?", re.DOTALL
)
_MATHEMATICS = (
    r"\\[A-Za-z]+(?:\{[A-Za-z ]*\})?|\\[^A-Za-z\s]|[\d.,:;+\-*/^_=<>()\[\]{}|!%&\s]|"
    r"(?<![A-Za-z\\])(?:[A-Za-z]|and|or|sqrt)(?![A-Za-z])"
)
_TRAILING_WORDS = re.compile(r"([\d}])\s+((?!percent|pct)[A-Za-z]{3,}(?: [A-Za-z]+)*)$")
_RUN = re.compile(rf"(?:{_MATHEMATICS})+(?:(?<=\d)[A-Za-z]+|(?<=\d\s)[A-Za-z]+)?")
_ANSWER = re.compile(r"answer[*_]*\s*(?:is|:|=)[*_]*\s*:?|####", re.IGNORECASE)
# Words that change what stands beside them, and which no grammar here knows: what they stand in is not read.
_CHANGES = re.compile(
    r"(?<!\\)\b(?:plus|minus|times|over|divided|multiplied|squared|cubed|root|power|half|halves|thirds?|quarters?|dozens?|"
    r"factorial|choose|mod|modulo)\b|\\ldots|\\dots|\\cdots|\.\.\.|\b\d{4}-\d\d-\d\d\b"
)
# latex2sympy reads 3 4 as 7, and 2^3^2 as 64.
_MISREAD = re.compile(r"\d\s+\d|\^\s*(?:\{[^{}]*\}|\w)\s*\^")
# Two coordinates are an interval to latex2sympy, and where they fall the empty set: a third one makes them a tuple.
_PAIR = re.compile(r"(?<![A-Za-z\\}])\(([^()\[\],;]+),([^()\[\],;]+)\)")
_LIST = re.compile(r"\[([^()\[\],;]+),([^()\[\],;]+)\]")
_THREE = r"(\1,\2,x_{31415})"
_THIRD = sympy.Symbol("x_{31415}", real=True)


def gold_answer(text: str) -> str:
    r"""The answer itself in what a corpus holds as one: what it boxes, what follows `####`, or all of it.

    Example:
        >>> gold_answer(r"so it is $\boxed{3\sqrt{2}}$."), gold_answer("2 + 2 = 4\n#### 4"), gold_answer(" 1/2")
        ('3\\sqrt{2}', '4', '1/2')
    """
    if "\\boxed" in text or "\\fbox" in text:
        return extract_boxed_content(text, mode="last")
    return text.rpartition("####")[2].strip()


def final_answers(response: str) -> Iterator[str]:
    r"""The pieces of a response that may be its final answer, each as a whole; one that boxes something means that.

    Example:
        >>> list(final_answers("We add 2 and 5. The answer is 7."))
        ['We add 2 and 5. The answer is 7.', '7', '7']
        >>> list(final_answers(r"Of $2$ and $5$, \boxed{5}."))
        ['5']
    """
    text = response.rpartition("</think>")[2].strip()
    if "\\boxed" in text or "\\fbox" in text:
        yield extract_boxed_content(text, mode="last")
        return
    yield text
    text = _spelled(re.sub(r"(?<!\S)\*\*([^*\n]+)\*\*(?!\w)", r"\1", text))  # bold, and no power
    # A dollar before an amount is money and opens no mathematics.
    text = re.sub(r"\\\$|\$(?=\s?\d[\d,.]*(?:\s+[A-Za-z]{2,}|[.,;!?)]*\s*$|[.,;!?)]+\s))", "", text)
    *_, start = 0, *(match.end() for match in _ANSWER.finditer(text))
    pieces = list(_ENVIRONMENTS.finditer(text, start))
    found = [piece[0] for piece in pieces] or [run for run in map(_trimmed, _runs(text, start)) if run]
    if start:
        yield re.split(r"[.?]+(?:\s|$)|\n", text[start:].strip(" *_\n"))[0].strip(" *_")
    if found and (found[0] != text or pieces):
        yield found[0 if start else -1]


@lru_cache(maxsize=64)
def readings(text: str) -> tuple[Any, ...]:
    r"""What the whole of a text may mean: SymPy's objects; none where some of it cannot be read.

    Two numbers in parentheses are an open interval and a point, and where the first is greater only a point.

    Example:
        >>> readings(r"3\sqrt{2}"), readings("(1, 2)"), readings("3 +")
        ((3*sqrt(2),), (Interval.open(1, 2), (1, 2)), ())
    """
    text = _spelled(re.sub(r"\$\$|(?<!\\)\$|\\[()\[\]]", " ", text).strip())
    text = re.sub(r"(?<=[^.])\.$", "", text)
    if re.fullmatch(r"[A-Za-z]{3,}(?: [A-Za-z]+)*", text):  # a word, and no product of letters
        text = rf"\text{{{text}}}"
    text = _TRAILING_WORDS.sub(r"\1\\text{ \2}", text)  # a unit, whatever it is
    plain = normalize_latex(text, config=_NORMAL)
    if _CHANGES.search(text) or _MISREAD.search(plain):
        return ()
    found = [_parsed(plain)]
    if _PAIR.search(plain) and not re.search(r"\\cup|\\cap|\\in\b", plain):
        found.append(_parsed(_PAIR.sub(_THREE, plain)))
    if found[0] is None and _LIST.search(plain):
        found.append(_parsed(_LIST.sub(_THREE, plain)))
    return tuple(value for value in found if value is not None)


def answers_agree(gold: str, answer: str) -> bool:
    r"""Whether two answers mean the same in one of their readings, and are not of different units.

    Example:
        >>> answers_agree(r"3\sqrt{2}", r"\sqrt{18}"), answers_agree(r"3\sqrt{2}", "3")
        (True, False)
        >>> answers_agree("5 cm", "5"), answers_agree("5 cm", "5 m")
        (True, False)
    """
    pairs = ((right, given) for right in readings(gold) for given in readings(answer))
    return any(_same(*pair) for pair in pairs) and _units_agree(_unit(gold), _unit(answer))


def _same(gold: Any, given: Any) -> bool:
    # math_verify takes what stands on the right: right for x = 3 and 1 + 2 = 3, wrong for x + 1 = 3
    unwraps = isinstance(given, sympy.Eq) and not isinstance(gold, (sympy.Rel, sympy.And))
    if unwraps and given.lhs.free_symbols and not is_expr_of_only_symbols(given.lhs):
        return False
    return verify(gold, given, allow_set_relation_comp=True, timeout_seconds=None) and _near(gold, given)


def _near(gold: Any, given: Any) -> bool:
    """False for numbers that only agree to six decimals because both are small."""
    if not all(getattr(value, "is_number", False) for value in (gold, given)):
        return True
    if any(value.has(sympy.UnevaluatedExpr) for value in (gold, given)):  # 50 % is also 50 and 1/2
        return True
    one, other = (complex(value.doit().evalf()) for value in (gold, given))
    return one == other or abs(one - other) <= 1e-4 * max(abs(one), abs(other))


def _parsed(text: str) -> Any:
    try:
        value = latex2sympy(text, is_real=True, convert_degrees=False, normalization_config=None)
    except Exception:  # whatever the parser raises, it says that it does not understand
        return None
    if value is None or value.has(sympy.nan, sympy.zoo) or (value.has(sympy.EmptySet) and "empty" not in text):
        return None
    value = value.xreplace({sympy.Symbol("i", real=True): sympy.I})
    return value.replace(
        lambda part: isinstance(part, sympy.Tuple) and part[-1:] == (_THIRD,),
        lambda part: sympy.Tuple(*part.args[:-1]),
    )


def _spelled(text: str) -> str:
    """Notations that latex2sympy takes for something else, as it takes them right."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: f"^{{{match[0].translate(_RAISED)}}}", text)
    text = re.sub(r"[¼-¾⅐-⅞]", lambda match: rf" {unicodedata.normalize('NFKC', match[0])} ".replace("⁄", "/"), text)
    text = re.sub(r"√\s*(\d+|\w|\([^()]*\))", lambda match: rf"\sqrt{{{match[1].strip('()')}}}", text)
    text = text.translate(_CHARACTERS)
    text = re.sub(r"\b(?:minus|negative)\s+(?=[\d.\\])", "-", text)
    text = re.sub(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![\w.])", r"\1\\cdot 10^{\2}", text)
    text = re.sub(r"\s*\*\*\s*(-?\w+)", r"^{\1}", text).replace("**", "^")
    text = re.sub(r"(?<![\d.,])\d{1,3}(?:(?: |\\[,!;: ]|,\\!|\{,\})\d{3})+(?![\d/])", _digits, text)
    text = re.sub(r"(?<![\d.}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\{?(\d+)\}?", _repeating, text)
    text = re.sub(r"(?<![\w.])(\d+)_(?:\{(\d+)\}|(\d))(?!\d)", _in_base, text)
    text = re.sub(rf"([\d}}])\s*(?:\\text\{{\s*)?({'|'.join(_SCALES)})s?\b\}}?", _scaled, text)
    text = re.sub(r"\[\s*(\[[^\[\]]+\](?:\s*,\s*\[[^\[\]]+\])*)\s*\]", _matrix, text)
    return re.sub(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1 ", text)


def _digits(match: re.Match[str]) -> str:
    return re.sub(r"\D", "", match[0])


def _repeating(match: re.Match[str]) -> str:
    whole, once, again = match[1] or "0", match[2], match[3]
    number = sympy.Rational(int(whole + once + again) - int(whole + once), (10 ** len(again) - 1) * 10 ** len(once))
    return rf"\frac{{{number.p}}}{{{number.q}}}"


def _in_base(match: re.Match[str]) -> str:
    try:
        return str(int(match[1], int(match[2] or match[3])))
    except ValueError:  # no number in that base: left as it is
        return match[0]


def _scaled(match: re.Match[str]) -> str:
    return rf"{match[1]}\cdot 10^{{{_SCALES[match[2]]}}}"


def _matrix(match: re.Match[str]) -> str:
    rows = re.findall(r"\[([^\[\]]+)\]", match[1])
    return r"\begin{bmatrix}" + r"\\".join(row.replace(",", "&") for row in rows) + r"\end{bmatrix}"


def _runs(text: str, start: int) -> Iterator[str]:
    """Stretches of plain text that are mathematics; letters alone only where nothing else is."""
    runs = [re.sub(r"^\s*(?:[aI]\s+)+", "", match[0]) for match in _RUN.finditer(text, start)]
    strong = [run for run in runs if re.search(r"\d|\\[A-Za-z]", run)]
    yield from strong or (run for run in runs if re.search(r"[A-HJ-Zb-z]", run))


def _trimmed(run: str) -> str:
    """A stretch without what belongs to the sentence around it."""
    while True:
        before = run
        run = re.sub(r"^(?:[\s,:;!=]|\.(?!\d)|(?:and|or)\b)+|(?:[\s,:;.=]|\b(?:and|or))+$", "", run)
        for opening, closing in (("([", ")]"), "{}"):  # of a half-open interval they differ
            opened, closed = (sum(map(run.count, marks)) for marks in (opening, closing))
            run = run[:-1] if closed > opened and run.endswith(tuple(closing)) else run
            run = run[1:] if opened > closed and run.startswith(tuple(opening)) else run
        if run == before:
            return run


def _unit(text: str) -> str:
    """The unit behind an answer, in letters; none is ''."""
    text = _spelled(re.sub(r"(?<!\\)\$", "", text).strip(" ."))
    written, without = (normalize_latex(text, config=config) for config in (_WITH_UNITS, _NORMAL))
    rest = written[len(without) :] if written.startswith(without) else ""
    return re.sub(r"\\(?:text|mbox)|[^A-Za-z/^\d]", "", rest)


def _units_agree(one: str, other: str) -> bool:
    known = [getattr(units, name, None) for name in (one, other)]
    if not all(isinstance(unit, units.Quantity) for unit in known):
        return True  # math_verify takes no notice of units, and of `5 apples` there is no more to know
    return bool(known[0] == known[1])
