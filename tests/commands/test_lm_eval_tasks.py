"""Tasks of lm-evaluation-harness as corpora: what is scored is what the harness itself scores."""

import json

import pytest
from datasets import Dataset, load_from_disk
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_coverage import score_responses
from hf_coverage.commands.lm_eval_tasks import TaskOptions, task_rows
from tests.commands.shell import error_line, invoke

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness about itself

DOCS = {
    "question": ["the cat", "a dog", "red mat", "blue cat sat"],
    "choices": [["sat", "ran"], ["on", "mat"], ["and", "red"], ["blue", "the"]],
    "label": [0, 1, 1, 0],
    "solution": ["sat on the mat #### cat", "ran #### dog", "red #### mat", "blue #### cat"],
    "answer": ["cat", "dog", "mat", "cat"],
    "test": ["assert f() == 1"] * 4,
}
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/docs.jsonl, test: {folder}/docs.jsonl}}
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
"""
MARK = """
metric_list: [{metric: exact_match, regexes_to_ignore: ["(?s).*#### "]}]
filter_list:
  - name: strict
    filter:
      - {function: regex, regex_pattern: "#### (\\\\w+)"}
      - {function: take_first}
"""
TASKS = {
    "choice": 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n',
    "whole": f"output_type: generate_until\ndoc_to_target: solution\n{MARK}",
    "bare": f"output_type: generate_until\ndoc_to_target: answer\n{MARK}",
    "code": "output_type: generate_until\ndoc_to_target: test\nunsafe_code: true\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_target: solution\n",
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture
def tasks(work, monkeypatch):
    """A folder of tasks, and the harness knowing no others, which takes seconds."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", work / "cache")
    folder = work / "tasks"
    folder.mkdir()
    Dataset.from_dict(DOCS).to_json(folder / "docs.jsonl")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON.format(folder=folder)}{text}")
    original = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **how: original(self, **(how | {"include_defaults": False}))
    )
    return str(folder)


@pytest.fixture
def loaded(work):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "student")
    tokenizer.chat_template = TEMPLATE
    return GPT2LMHeadModel.from_pretrained(work / "student").eval(), tokenizer


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("chat", [False, True])
def test_what_is_scored_is_what_the_harness_scores(tasks, loaded, shots, chat):
    model, tokenizer = loaded
    options = TaskOptions(
        shots, include_path=tasks, chat=chat, multiturn=chat, system_prompt="the mat" if chat else None
    )
    rows = task_rows("choice", options, tokenizer)
    ours = score_responses(model, tokenizer, rows, progress=False)["logprob"][:]

    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    task = TaskManager(include_path=tasks).load(["choice"])["tasks"]["choice"]
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(0)
    task.build_all_requests(
        rank=0,
        world_size=1,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=theirs.apply_chat_template,
        system_instruction=options.system_prompt,
    )
    right = [one for one in task.instances if one.idx == one.doc["label"]]
    assert [one.args for one in right] == list(zip(rows["prompt"], rows["completion"]))
    expected = [value for value, _ in theirs.loglikelihood(right, disable_tqdm=True)]
    assert ours == pytest.approx(expected, abs=1e-4)
    assert all(prompt.count("assistant") == (shots + 1 if chat else 0) for prompt in rows["prompt"])


def test_a_target_is_the_response_where_the_task_counts_it_as_right(tasks):
    rows = task_rows("whole", TaskOptions(1, include_path=tasks))
    assert rows["completion"][:] == [f" {text}" for text in DOCS["solution"]]
    assert all("####" in prompt for prompt in rows["prompt"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bare", "'cat', which is no response to its prompt: the task itself does not count it as right"),
        ("code", "'assert f.. == 1', which is no response to its prompt: the task runs code"),
    ],
)
def test_a_target_that_is_no_response_is_refused_unless_a_field_is_named(tasks, name, reason):
    with pytest.raises(ValueError, match=rf"{reason}.*`--target`, one of \[.*'solution'"):
        task_rows(name, TaskOptions(include_path=tasks))
    rows = task_rows(name, TaskOptions(target="solution", include_path=tasks, limit=2))
    assert rows["completion"][:] == [f" {text}" for text in DOCS["solution"][:2]]
    with pytest.raises(ValueError, match="`--target` must be a field of text"):
        task_rows(name, TaskOptions(target="choices", include_path=tasks))


def test_what_is_no_task_of_responses_is_refused(tasks):
    with pytest.raises(ValueError, match="the harness knows no such task"):
        task_rows("none", TaskOptions(include_path=tasks))
    with pytest.raises(ValueError, match="it is a loglikelihood_rolling task"):
        task_rows("rolling", TaskOptions(include_path=tasks))
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        task_rows("choice", TaskOptions(include_path=tasks, chat=True))


def test_the_command_makes_a_corpus_that_a_teacher_scores_if_there_is_one(tasks, work):
    command = f"sample --from lm-eval:whole --num-fewshot 1 --limit 3 --include-path {tasks}"
    invoke(f"{command} -o plain")
    rows = load_from_disk("plain")
    assert rows.column_names == ["prompt", "completion", "doc_id"]
    origin = json.loads((work / "plain" / "origin.json").read_text())
    assert (origin["from"], origin["num_fewshot"], origin["limit"]) == ("lm-eval:whole", 1, 3)
    invoke(f"{command} --teacher teacher --device cpu -o scored")
    assert load_from_disk("scored").column_names == [*rows.column_names, "reference_logprob"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prompts.jsonl --from lm-eval:x", "has its own data: leave the source out"),
        ("--from prompts --teacher teacher", "`--from prompts` needs a source of prompts"),
        ("prompts.jsonl --from lm-eval", "`--from` must be one of prompts, texts, pairs, lm-eval:TASK"),
        ("prompts.jsonl --from pairs:x", "`--from` must be one of"),
        ("prompts.jsonl --teacher teacher --num-fewshot 2", "`--num-fewshot` is for `--from lm-eval:TASK`"),
        ("prompts.jsonl --teacher teacher --apply-chat-template", "`--apply-chat-template` is for"),
        ("--from lm-eval:x --prompt-column a", "knows its rows and columns"),
    ],
)
def test_options_that_do_not_go_together_are_refused(work, words, message):
    assert message in " ".join(invoke(f"sample {words} -o out", code=2).replace("│", " ").split())


def test_the_error_of_a_task_is_one_line(tasks, work):
    assert "Name the field that is one with `--target`" in error_line(
        f"sample --from lm-eval:bare --include-path {tasks} -o out"
    )
