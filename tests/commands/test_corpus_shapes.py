"""Corpora as people publish them: what their columns are taken for, and what is refused before a model is loaded."""

import json

import pytest
from datasets import Dataset, load_from_disk

from hf_coverage import score_answers
from hf_coverage.commands import inputs
from hf_coverage.commands.corpus_shapes import read_rows, split_answers, with_system_prompt
from hf_coverage.commands.inputs import read_responses
from hf_coverage.commands.options import RowOptions
from tests.commands.shell import error_line, invoke, load
from tests.commands.test_option_values import COMMANDS, TO_A_MODEL

SIZE = 10
ASKED = [f"the cat {word}" for word in ("sat", "ran", "on", "mat", "and", "red", "blue", "the", "a", "dog")]
SAID = [f"{word} the dog" for word in ("sat", "ran", "on", "mat", "and", "red", "blue", "the", "a", "dog")]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chats(end=()):
    return [[user("the"), assistant("a"), user(x), assistant(y), *end] for x, y in zip(ASKED, SAID)]


PROMPTS = [[user("the"), assistant("a"), user(x)] for x in ASKED]
SHARED = [
    [{"from": "human", "value": x}, {"from": "gpt", "value": y}] for x, y in zip(ASKED, SAID)
]  # fmt: skip
LINES = [f"\n{y}" for y in SAID]
# Every shape: its columns, and the prompts and responses that they are.
SHAPES = {
    "question": ({"question": ASKED, "answer": SAID}, ASKED, LINES),
    "instruction": ({"instruction": ASKED, "output": SAID}, ASKED, LINES),
    "input": (
        {"instruction": ASKED, "input": ["", *SAID[1:]], "output": SAID},
        [ASKED[0], *(f"{x}\n\n{y}" for x, y in zip(ASKED[1:], SAID[1:]))],
        LINES,
    ),
    "messages": ({"messages": chats()}, PROMPTS, [[assistant(y)] for y in SAID]),
    "messages that go on": ({"messages": chats([user("and")])}, PROMPTS, [[assistant(y)] for y in SAID]),
    "a prompt beside its chat": (
        {"prompt": ASKED, "messages": chats()}, PROMPTS, [[assistant(y)] for y in SAID],
    ),
    "sharegpt": (
        {"conversations": SHARED}, [[user(x)] for x in ASKED], [[assistant(y)] for y in SAID],
    ),
    "traces": (
        {"problem": ASKED, "generations": [[y, "no"] for y in SAID], "correctness": [[True, False]] * SIZE},
        ASKED,
        LINES,
    ),
    "all traces": (
        {"problem": ASKED, "generations": [[y, "no"] for y in SAID]},
        [x for x in ASKED for _ in range(2)],
        [z for y in LINES for z in (y, "\nno")],
    ),
    "verified traces": (
        {"problem": ASKED, "generations": [[y, "no"] for y in SAID], "correctness_math_verify": [[0, 1]] * SIZE},
        ASKED,
        ["\nno"] * SIZE,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_said():
    inputs._announce.cache_clear()


def written(work, columns, name="rows.jsonl"):
    Dataset.from_dict(columns).to_json(work / name)
    return str(work / name)


@pytest.mark.parametrize("shape", SHAPES)
def test_usual_columns_are_prompts_and_responses_and_it_is_said(work, capsys, shape):
    columns, prompts, completions = SHAPES[shape]
    rows = read_responses(written(work, columns), RowOptions())
    assert rows["prompt"][:] == prompts
    assert rows["completion"][:] == completions
    said = " ".join(capsys.readouterr().out.split())
    assert "rows.jsonl: took " in said
    assert said.count("took") == 1
    read_responses(str(work / "rows.jsonl"), RowOptions())
    assert capsys.readouterr().out == ""  # once is enough


@pytest.mark.parametrize("shape", SHAPES)
def test_where_no_response_is_wanted_none_is_needed(work, shape):
    columns, prompts, _ = SHAPES[shape]
    lost = {"answer", "output", "generations", "correctness", "correctness_math_verify"}
    found = read_responses(written(work, columns), RowOptions(), pairs=False)
    if shape == "a prompt beside its chat":
        assert found["prompt"][:] == ASKED
    elif shape == "messages that go on":
        assert found["prompt"][:] == chats([user("and")])
    else:
        assert found["prompt"][:] == list(prompts if "traces" not in shape else ASKED)
    assert set(columns) & lost <= set(found.column_names)  # for a verifier


def test_columns_that_are_named_win(work):
    columns = {"question": ASKED, "answer": SAID, "prompt": SAID, "completion": SAID, "mine": ASKED}
    source = written(work, columns)
    usual = read_responses(source, RowOptions())
    assert usual.column_names == list(columns)
    assert usual["prompt"][:] == SAID
    named = read_responses(source, RowOptions(prompt_column="mine", completion_column="question"))
    assert named["prompt"][:] == named["completion"][:] == ASKED
    single = read_responses(source, RowOptions(answer_column="mine"))
    assert single["completion"][:] == ASKED
    assert single["reference_logprob"][:] == [0.0] * SIZE
    asked = read_responses(source, RowOptions(answer_column="mine"), pairs=False)
    assert asked["completion"][:] == SAID
    shaped = read_responses(written(work, {"question": ASKED, "answer": SAID}), RowOptions(answer_column="answer"))
    assert shaped["prompt"][:] == ASKED
    assert shaped["completion"][:] == SAID
    assert shaped["reference_logprob"][:] == [0.0] * SIZE


def test_rows_are_shuffled_and_cut_as_asked(work):
    source = written(work, {"prompt": ASKED, "completion": SAID})
    assert read_responses(source, RowOptions(limit=3))["prompt"][:] == ASKED[:3]
    assert len(read_responses(source, RowOptions(limit=30))) == SIZE
    one, same, other = (read_responses(source, RowOptions(shuffle_seed=seed))["prompt"][:] for seed in (1, 1, 2))
    assert one == same != other
    assert sorted(one) == sorted(other) == sorted(ASKED)
    assert read_responses(source, RowOptions(shuffle_seed=1, limit=4))["prompt"][:] == one[:4]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"messages": [[user("a")]]}, "Row 0: nobody of the role `assistant` says anything"),
        ({"messages": [[assistant("a")]]}, "Row 0: the chat begins with its last turn of the assistant"),
        ({"conversations": [[{"from": "robot", "value": "a"}]]}, "`from` must be one of .* got 'robot'"),
        ({"problem": ["a"], "generations": [["b"]], "correctness": [[False]]}, "none of the `generations` is correct"),
        ({"problem": ["a"], "generations": [["b"]], "correctness": [[]]}, "1 `generations`, but 0 verdicts"),
        ({"prompt": ["a"], "answer": ["b"]}, "no column `completion` among .*`--completion-column`"),
        ({"x": ["a"]}, "no column `prompt` among .*`--prompt-column`"),
    ],
)
def test_rows_that_are_not_what_their_columns_promise_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        read_rows(Dataset.from_dict(columns))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_that_reads_rows_checks_its_columns_before_a_model_is_loaded(work, monkeypatch, name):
    monkeypatch.setattr("hf_coverage.inference.loading.load_whole", None)
    flags = {flag for option in COMMANDS[name].params for flag in option.opts}
    columns = ("--prompt-column", "--completion-column", "--answer-column")
    assert flags >= {*columns, "--limit", "--shuffle-seed"}
    for flag in columns:
        line = error_line(f"{TO_A_MODEL[name]} {flag} nowhere -o new")
        assert f"`{flag}` must be one of the data's columns, [" in line
        assert "but is 'nowhere'" in line
    if name not in ("sample", "best-of-n"):
        both = error_line(f"{TO_A_MODEL[name]} --answer-column prompt --completion-column completion -o new")
        assert "give one of them" in both


@pytest.mark.usefixtures("undrawn")
def test_choose_reads_questions_and_keeps_scores_by_how_they_were_read(work):
    written(work, {"question": ASKED, "answer": [f" {y}" for y in SAID]})
    said = invoke("choose student other --data rows.jsonl --answer-column answer -o out --device cpu")
    assert "took `question` for the prompt" in " ".join(said.split())
    record = next((work / "out" / "scores").glob("*student/checkpoint.json"))
    assert json.loads(record.read_text())["options"]["answer_column"] == "answer"
    assert json.loads((work / "out" / "scores" / record.parent.name / "reference.json").read_text())["kind"] == (
        "single_answer"
    )


def test_a_system_prompt_makes_chats_of_text():
    rows = with_system_prompt(Dataset.from_dict({"prompt": ["a"]}), "Be brief.")
    assert rows["prompt"][0] == [{"role": "system", "content": "Be brief."}, user("a")]
    again = Dataset.from_dict({"prompt": [[user("a")]]})
    assert with_system_prompt(again, "Be brief.")["prompt"][:] == rows["prompt"][:]
    with pytest.raises(ValueError, match="has a system's turn already"):
        with_system_prompt(rows, "x")
    with pytest.raises(ValueError, match="the prompt of row 0 is token ids"):
        with_system_prompt(Dataset.from_dict({"prompt": [[1]]}), "x")


@pytest.mark.usefixtures("undrawn")
def test_a_response_ends_before_what_stops_it(work):
    written(work, {"prompt": ASKED[:4], "answer": SAID[:4]})
    command = "best-of-n student rows.jsonl --k 4 --max-new-tokens 8 --device cpu"
    invoke(f"{command} -o plain")
    invoke(f"{command} -o stopped --stop cat --stop red")

    def read(folder):
        lines = (work / folder / "samples-00000.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if '"text"' in line]

    plain, stopped = read("plain"), read("stopped")
    assert any("cat" in row["text"] or "red" in row["text"] for row in plain)
    assert not any("cat" in row["text"] or "red" in row["text"] for row in stopped)
    assert any(len(row["ids"]) < 8 and not row["finished"] for row in stopped)
    assert "stop" in error_line(f"{command} -o plain --stop cat")


def test_answers_are_what_follows_the_reasoning_a_row_for_each_problem():
    traces = {"prompt": ["a", "b", "a"], "completion": ["x # 1", "y # 2", "z # 1"]}
    rows = split_answers(Dataset.from_dict(traces), "#")
    assert rows.to_dict() == {"prompt": ["a", "b"], "answer": [" 1", " 2"], "reasoning": ["x ", "y "]}
    said = [[assistant(text)] for text in traces["completion"]]
    chats_ = Dataset.from_dict({"prompt": [[user(text)] for text in traces["prompt"]], "completion": said})
    assert split_answers(chats_, "#")["answer"][:] == [" 1", " 2"]
    with pytest.raises(ValueError, match="Row 2: the same prompt has another answer in row 0, and one alone is right"):
        split_answers(Dataset.from_dict(traces | {"completion": ["x # 1", "y # 2", "z # 3"]}), "#")
    with pytest.raises(ValueError, match="Row 1: the response has no '#', so it is not known where its answer begins"):
        split_answers(Dataset.from_dict(traces | {"completion": ["x # 1", "y", "z # 1"]}), "#")


@pytest.mark.usefixtures("undrawn")
def test_answers_are_scored_with_the_model_s_own_reasoning_averaged_out(work):
    model, tokenizer = load(work, "student")
    written(work, {"problem": ASKED, "generations": [["blue on cat", "red on cat"]] * SIZE})
    invoke("score student rows.jsonl --reasonings 8 --max-reasoning-tokens 6 --separator on -o answers --device cpu")
    found = load_from_disk("answers")
    assert found["answer"][:] == [" cat"] * SIZE
    corpus = Dataset.from_dict({"prompt": ASKED, "answer": [" cat"] * SIZE})
    how = {"separator": "on", "samples": 8, "max_reasoning_tokens": 6, "progress": False}
    assert found["answer_logprob"][:] == score_answers(model, tokenizer, corpus, **how)["answer_logprob"][:]
    written(work, {"question": ASKED, "answer": SAID, "short": [" cat"] * SIZE}, "named.jsonl")
    invoke(
        "score student named.jsonl --answer-column short --reasonings 8 --max-reasoning-tokens 6 --separator on "
        "-o named --device cpu"
    )
    assert load_from_disk("named")["answer_logprob"][:] == found["answer_logprob"][:]
    assert "answers" in invoke("profile answers --n 2 -o profiles")
    assert "is not empty: choose another folder" in error_line("score student rows.jsonl --reasonings 8 -o answers")
