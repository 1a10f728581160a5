"""Answers are read whole: each accepts itself and its equals however they are wrapped, and nothing that it is not."""

import math

import pytest
from datasets import Dataset

from hf_coverage import evaluate_best_of_n
from hf_coverage.decode.verifiers import MathVerify
from tests.decode.best_of_n_runs import build

# An answer, what is equal to it, and what is not: among that always the part that a partial parse takes for it.
ANSWERS = [
    # powers and roots
    (r"3\sqrt{2}", [r"\sqrt{18}", "3*sqrt(2)", "3sqrt(2)", "3√2", r"3\sqrt2"], ["3", "2", r"3\sqrt{3}", r"\sqrt{2}"]),
    ("2^{10}", ["1024", "2^10", "2**10", "2¹⁰", r"4^5"], ["2", "10", "2^{11}", "20"]),
    ("10^{-3}", ["0.001", r"\frac{1}{1000}", "1e-3"], ["10", "-3", "10^3"]),
    (r"\sqrt[3]{2}", ["2^{1/3}"], ["2", r"\sqrt{2}", "3"]),
    ("x**2", ["x^2", "x²", r"x \cdot x"], ["x", "2x", "x^3"]),
    (r"\frac{\sqrt{3}}{2}", [r"\sqrt{3}/2", r"\sqrt{\frac{3}{4}}"], [r"\sqrt{3}", "3/2"]),
    ("5²", ["25", "5^2"], ["5", "2", "52"]),
    # fractions, mixed numbers, decimals
    (r"\frac{1}{2}", ["0.5", ".5", "1/2", r"\frac12", r"\dfrac{1}{2}", "½", r"\frac{2}{4}"], ["1", "2", "-1/2"]),
    ("-1/2", ["-0.5", "−0.5", r"-\frac{1}{2}", r"\frac{-1}{2}"], ["1/2", "-1", "2"]),
    (r"5\frac{1}{2}", ["5.5", "11/2", "5 1/2", "5½"], ["5", "1/2", r"\frac{5}{2}", "51/2"]),
    ("5 1/2", ["5.5", r"\frac{11}{2}"], ["3", "5", "1/2"]),
    (r"0.\overline{3}", ["1/3", "0.333333"], ["0", "3", "0.3", "0.33"]),
    (r"1.2\overline{34}", [r"\frac{611}{495}"], ["1.2", "1.234"]),
    ("3.", ["3", "3.0"], ["30", "0.3"]),
    # scientific notation and large numbers
    ("1.5e-3", ["0.0015", r"1.5\times 10^{-3}", r"1.5 \cdot 10^{-3}", "3/2000"], ["1.5", "-3", "1.5e3", "1.5e-4"]),
    (r"1.5\times 10^{-3}", ["0.0015", "1.5e-3", "1.5 × 10⁻³", "15E-4"], ["1.5", "10", r"10^{-3}"]),
    ("1e5", ["100000", "100,000", "10^5"], ["1", "5", "5e", "10"]),
    ("1.5e-10", [r"1.5\cdot 10^{-10}"], ["0", "1.6e-10", "1.5e-9"]),
    ("1,234", ["1234", "1 234", r"1\,234", "1{,}234"], ["1", "234", "1.234"]),
    ("1,234,567", ["1234567", r"1\,234\,567", "1 234 567"], ["1", "1234", "234567"]),
    (r"100\,000", ["100000", "1e5", "100,000"], ["100", "0", "000"]),
    ("5 million", ["5000000", r"5\times 10^6", "5,000,000"], ["5", "5 thousand"]),
    # percentages and units
    (r"50\%", ["50%", "50 percent", "0.5", "50"], ["5", "500"]),
    ("12.5 percent", [r"12.5\%", "0.125", "1/8"], ["1.25", "125"]),
    ("5 cm", ["5", r"5\text{ cm}", r"5\,\mathrm{cm}"], ["5 m", "50 mm", "6 cm", r"5\text{ kg}"]),
    (r"\$5", ["5", "5 dollars", "$5"], ["50", "0.5"]),
    (r"30^\circ", ["30", "30°", "30 degrees"], ["3", "300"]),
    # complex numbers
    ("3+4i", ["4i+3", "3 + 4 i", r"\sqrt{-16}+3"], ["3", "4", "3-4i", "7"]),
    ("(1+2i)(1-2i)", ["5"], ["1", "-3"]),
    ("2i", [r"\sqrt{-4}", "i+i"], ["2", "-2i"]),
    # intervals, tuples, sets, matrices
    ("[1,2)", [r"\left[1,2\right)", "[1, 2.0)"], ["1", "[1,2]", "(1,2)", "2"]),
    (r"(-\infty, 3]", [r"x \le 3", r"\left(-\infty,3\right]"], ["3", r"(-\infty, 3)", r"(-\infty, 4]"]),
    (r"(1,2)\cup(3,4)", [r"(3,4)\cup(1,2)", "(1,2)∪(3,4)"], ["(1,2)", "(3,4)", "(1,4)", r"(1,2)\cup(3,5)"]),
    ("(4,3)", [r"\left(4, 3\right)", "(4.0, 6/2)"], ["(5,2)", "(3,4)", "4", "3", r"\emptyset"]),
    ("(1, 2)", ["(2/2, 2)"], ["(2, 1)", "1", "2", "[1,2]"]),
    ("(1,2,3)", ["(1, 2, 6/2)"], ["(3,2,1)", "(1,2)", "3"]),
    ("(4,3),(2,1)", ["(2,1),(4,3)"], ["(4,3),(3,1)", "(4,3)", "1"]),
    (r"\{1,2,3\}", [r"\{3,2,1\}", "1,2,3", "1, 2 and 3"], [r"\{1,2\}", "1", "3"]),
    ("1,2", ["2,1", "1 and 2", r"1 \text{ or } 2"], ["1", "2", "1.2", "12"]),
    ("x=1 or x=2", ["1, 2", "x=2, x=1"], ["x=1", "2", "x=1 or x=3"]),
    (r"1 \pm \sqrt{2}", [r"1+\sqrt{2}, 1-\sqrt{2}"], ["1", r"1+\sqrt{2}"]),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        ["[[1,2],[3,4]]", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"],
        ["1", "[1,2]"],
    ),
    ("[[1,2],[4,3]]", [r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"], ["[[1,2],[5,3]]", "3"]),
    (
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        [r"\begin{pmatrix}1.0\\2\end{pmatrix}"],
        [r"\begin{pmatrix}1&2\end{pmatrix}", "1"],
    ),
    # expressions, equations, constants
    ("x^2+2x+1", ["(x+1)^2", "1+x(x+2)"], ["1", "x^2", "2x+1"]),
    ("y = 2x+1", ["2x+1", "y=1+2x"], ["2", "1", "y=2x"]),
    ("x < 3", ["3 > x", r"(-\infty, 3)"], ["3", r"x \le 3", "x > 3"]),
    (r"2\pi", ["2pi", "2π", "6.283185"], ["2", r"\pi", "6.28"]),
    (r"\frac{2}{3}\pi", [r"\frac{2\pi}{3}"], ["2/3", "2"]),
    (r"\infty", ["∞"], [r"-\infty", "0"]),
    (r"\log_2 8", ["3", r"\log_{2}{8}"], ["8", "2"]),
    ("sin(x)", [r"\sin x", r"\sin(x)"], ["x", r"\cos x"]),
    ("7!", ["5040"], ["7", "1"]),
    (
        "3",
        ["x=3", "1+2=3", "3.0", r"\frac{6}{2}"],
        ["x+1=3", "3!", "3 4", "30", r"3\sqrt{2}", "2^3", "3 squared", "3+4i"],
    ),
    ("64", ["2^{6}"], ["2^3^2", "2**3**2", "6"]),
    ("101_2", ["5", "101_{2}", "12_3"], ["101", "101_3", "2"]),
    (r"\binom{5}{2}", ["10"], ["5", "2"]),
    # words
    ("yes", [r"\text{yes}", "Yes"], ["no", "sye"]),
    ("east", [r"\text{east}"], ["seat", "west"]),
    (r"\text{(C)}", ["C", "(C)"], ["A", "(B)"]),
]
WRAPPED = [
    "{}",
    "${}$",
    r"\boxed{{{}}}",
    r"We get $x$ from $7$ and $8$, so \boxed{{{}}}.",
    "The answer is ${}$.",
    "The answer is {}",
    "First 17 and then 4.\n**Answer:** {}",
    "<think>It may be 17, or $4$, or \\boxed{{5}}.</think>\n${}$",
    "2 + 2 makes 4.\n#### {}",
]


def rewards(answer, responses):
    return MathVerify()(completions=responses, answer=[answer] * len(responses))


@pytest.mark.parametrize(("answer", "equal", "unequal"), ANSWERS, ids=[answer for answer, *_ in ANSWERS])
def test_an_answer_accepts_its_equals_and_nothing_else(answer, equal, unequal):
    cases = [(answer, 1.0), *((text, 1.0) for text in equal), *((text, 0.0) for text in unequal)]
    for number, (given, expected) in enumerate(cases):
        # the answer itself in all, and the others in three each: four given behind it are in every wrapping
        wrapped = WRAPPED[number % 3 :: 3] if number else WRAPPED
        responses = [text.format(given) for text in wrapped if "$" not in text or not given.startswith(("$", r"\$"))]
        assert dict(zip(responses, rewards(answer, responses))) == dict.fromkeys(responses, expected)


@pytest.mark.parametrize("answer", [answer for answer, *_ in ANSWERS if not answer.startswith(r"\$")])
def test_an_answer_of_a_corpus_may_be_wrapped_too(answer):
    for text in ("${}$", r"\boxed{{{}}}", r"Since $17 > 4$, it is $\boxed{{{}}}$.", "17 and 4.\n#### {}"):
        assert rewards(text.format(answer), [answer, rf"\boxed{{{answer}}}", "17"]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("so we get 0.5", "1/2", 1.0),
        ("so we get 3\\sqrt{2}.", "3", 0.0),
        ("so we get 3\\sqrt{2}.", r"\sqrt{18}", 1.0),
        ("It costs $5.", "5", 1.0),
        ("She pays $5 and gets $3 back, that is $2.", "2", 1.0),
        ("Tom has 12 apples.", "12", 1.0),
        ("(so it is 12)", "12", 1.0),
        ("The answer is 5, since 2+3=5 and 10 > 7", "5", 1.0),
        ("The answer is 5, since 2+3=5 and 10 > 7", "7", 0.0),
        ("The answer is yes, of course", "yes", 0.0),  # nothing says where the answer ends
        ("The answer is yes.", "yes", 1.0),
        ("$x=1$ and $x=2$", "1,2", 1.0),
        ("$x=1$ and $x=2$", "2", 0.0),
        ("I think it is B", r"\text{(B)}", 1.0),
        ("no idea", "3", 0.0),
        ("", "3", 0.0),
        (r"\boxed{3", "3", 0.0),  # cut off, perhaps within a number
        (r"\boxed{}", "3", 0.0),
        (r"The answer is $3 + $", "3", 0.0),
        (r"\boxed{3 \text{ and something}}", "4", 0.0),
        ("minus 5", "-5", 1.0),
        ("minus 5", "5", 0.0),
    ],
)
def test_final_answers_are_found_in_prose(response, answer, expected):
    assert rewards(answer, [response]) == [expected]


@pytest.mark.parametrize("answer", [12, 12.5, -3])
def test_an_answer_may_be_a_number(answer):
    assert rewards(answer, [str(answer), "17"]) == [1.0, 0.0]


UNREADABLE = [
    "",
    "3 +",
    "(3",
    "3 4",
    "2023-01-05",
    "0.333...",
    "1/0",
    "2^3^2",
    r"\{x \mid x>3\}",
    "5 squared",
    r"1,2,\ldots",
]


@pytest.mark.parametrize("answer", [*UNREADABLE, None, math.inf, [3], {"a": 3}], ids=repr)
def test_a_corpus_whose_answer_cannot_be_read_is_refused_before_anything_is_sampled(answer, monkeypatch):
    monkeypatch.setattr("hf_coverage.inference.sampler.Sampler.draw", None)
    good = {str: "3", float: 3.0}.get(type(answer), answer)
    corpus = Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": [good, answer, good]})
    rows = r"rows 1\." if good is not answer else r"rows 0, 1, 2\."
    with pytest.raises(ValueError, match=rf"{rows}.*cannot be read as mathematics.*drop the rows"):
        evaluate_best_of_n(build(), None, corpus, MathVerify(), k=1, max_new_tokens=1, timeout=None)


def test_answers_that_hang_are_refused_too():
    corpus = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["2", "9^{9^{9^{9}}}"]})
    with pytest.raises(ValueError, match=r"rows 1\..*timed out \(no reward within 5 seconds\)"):
        evaluate_best_of_n(build(), None, corpus, MathVerify(), k=1, max_new_tokens=1, timeout=5)
