"""`hf-coverage tune-ttt`: what it prints and keeps is what the library says."""

import json
import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig

from hf_coverage import StepRule, score_responses, ttt_generate, tune_ttt
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.measure.corpus import encode_corpus
from hf_coverage.select.ttt_settings import STEP_SIZES, rule_name
from hf_coverage.select.ttt_step_size import measure_step_size
from hf_coverage.select.tune_ttt import split_groups
from tests.commands.shell import error_line, invoke, load
from tests.processes import run

COMMAND = "tune-ttt student --data corpus --n 4 --lr 0.01,0.3 --radius none,0.5 --output-dir out"
RULES = [StepRule(lr, radius) for lr in (0.01, 0.3) for radius in (None, 0.5)]


def strict(path):
    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=pytest.fail)


def shards():
    """When each file of scores was written."""
    return {str(path): path.stat().st_mtime_ns for path in Path("out/scores").glob("*/scores-*.safetensors")}


def library_choice(work, n=4, rules=RULES, name="student", **options):
    corpus = load_from_disk("corpus")
    score = [
        score_responses(*load(work, name), corpus, ttt=rule, progress=False)["logprob"] for rule in (None, *rules)
    ]
    known = {"reference_logprobs": corpus["reference_logprob"], "groups": corpus["prompt"]}
    return tune_ttt(score[0], dict(zip(rules, score[1:])), n, **known | options)


def test_it_is_the_library_s(work):
    output = invoke(f"{COMMAND} --seed 8")
    expected = library_choice(work, seed=8)
    found = strict("out/tune_ttt.json")
    assert found["chosen"] == rule_name(expected.rule)
    assert found["generation_settings"] == {
        name: value for name, value in (("ttt_lr", expected.rule.lr), ("ttt_radius", expected.rule.radius)) if value
    }
    assert found["difference"] == pytest.approx(expected.difference._asdict())
    assert found["cross_entropy_difference"] == pytest.approx(expected.cross_entropy_difference._asdict())
    assert found["choosing_half"]["results"]["plain"]["cov_4"] == expected.searched[0].cov(4)
    assert found["seed"] == 8
    assert found["origin"]["command"].startswith("hf-coverage tune-ttt student")
    assert found["sentence"] == expected.sentence
    assert expected.sentence in output
    for rule in RULES:
        assert f" {rule_name(rule)} " in output


def test_the_line_it_prints_decodes_with_the_chosen_steps(work):
    output = invoke(COMMAND)
    (line,) = re.findall(r"GenerationConfig\((.*?)\)", output)
    config = eval(f"GenerationConfig({line})", {"GenerationConfig": GenerationConfig})
    found = strict("out/tune_ttt.json")
    assert {name: getattr(config, name) for name in found["generation_settings"]} == found["generation_settings"]
    model, tokenizer = load(work, "student")
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    config.max_new_tokens, config.pad_token_id = 3, 0
    assert model.generate(ids, generation_config=config, custom_generate=ttt_generate).shape[1] > ids.shape[1]


def test_it_decodes_plainly_unless_it_is_shown_to_help(work):
    output = invoke(COMMAND)
    assert strict("out/tune_ttt.json")["helps"] is False
    assert "Leave it out, and decode plainly" in output
    assert "custom_generate" not in output


def test_it_helps_where_responses_repeat_themselves(work):
    """A response that says one word over and over is what steps towards each token make likelier."""
    words = ["cat", "dog", "sat", "ran", "mat", "red", "blue", "on"]
    rows = [
        {"prompt": f"the {a} {b}", "completion": f" {' '.join([c] * 8)}"}
        for a in words
        for b in words
        for c in words[:2]
    ]
    Dataset.from_list(rows).to_json("loops.jsonl")
    output = invoke("tune-ttt student --data loops.jsonl --n 1e6 --lr 1e-3,0.1 -o out")
    found = strict("out/tune_ttt.json")
    assert found["helps"]
    assert found["quantity"] == "upper bound on Cov_N"
    assert found["difference"]["high"] < 0
    settings = ", ".join(f"{name}={value!r}" for name, value in found["generation_settings"].items())
    assert f"Decode with model.generate(**inputs, do_sample=True, custom_generate=ttt_generate, {settings})" in output
    assert "only bounds were compared" in output
    assert found["other_half"]["results"]["plain"]["cov_upper_1000000"] > 0


def test_an_interrupted_run_goes_on_and_a_further_lr_costs_one_pass(work):
    invoke(f"{COMMAND} --shard-rows 8")
    before, whole = strict("out/tune_ttt.json"), shards()
    assert len(whole) == 5 * 4
    # what an interruption leaves: some settings not begun, one half done
    shutil.rmtree("out/scores/lr-0.3_radius-0.5")
    Path("out/scores/lr-0.3/scores-00002.safetensors").unlink()
    Path("out/tune_ttt.json").unlink()
    kept = shards()
    invoke(f"{COMMAND} --shard-rows 8")
    after, again = strict("out/tune_ttt.json"), shards()
    assert {name: after[name] for name in after if name != "origin"} == {
        name: before[name] for name in before if name != "origin"
    }
    assert again.keys() == whole.keys()
    assert kept.items() <= again.items()
    invoke(f"{COMMAND.replace('0.01,0.3', '0.01,0.3,1').replace('none,0.5', 'none')} --shard-rows 8 --n 8")
    assert set(shards()) - set(again) == {f"out/scores/lr-1.0/scores-{index:05d}.safetensors" for index in range(4)}
    assert again.items() <= shards().items()
    assert list(strict("out/tune_ttt.json")["choosing_half"]["results"]) == ["plain", "lr 0.01", "lr 0.3", "lr 1.0"]


def test_steps_that_diverge_are_a_row_of_the_table(work):
    command = COMMAND.replace("0.01,0.3", "0.01,3e38").replace("none,0.5", "none") + " --steps 3"
    output = invoke(command)
    expected = library_choice(work, rules=[StepRule(0.01, num_steps=3)])
    found, name = strict("out/tune_ttt.json"), "lr 3e+38, steps 3"
    assert found["chosen"] == "lr 0.01, steps 3"
    assert found["diverged"] == [name]
    assert found["choosing_half"]["results"][name] is None
    assert found["difference"] == pytest.approx(expected.difference._asdict())
    assert re.search(rf"{re.escape(name)} .*–.*–.*diverged", output)
    assert f"could not be chosen: {name}" in output
    # which is kept as any other result
    before = shards()
    assert {Path(path).parent.name for path in before} == {"plain", "lr-0.01_steps-3", "lr-3e+38_steps-3"}
    invoke(command)
    assert shards() == before
    assert "must hold" in error_line("profile out/scores/lr-3e+38_steps-3 --n 4 -o profile")


def test_where_all_diverge_plain_decoding_is_the_choice(work):
    output = invoke("tune-ttt student --data corpus --n 4 --lr 3e38 --steps 3 -o out")
    found = strict("out/tune_ttt.json")
    assert (found["chosen"], found["difference"], found["generation_settings"]) == ("plain", None, {})
    assert "Every setting diverged, so that plain decoding is the choice." in output
    assert output.count("Decode plainly") == 1
    assert "GenerationConfig" not in output


def test_a_damaged_model_is_no_divergence(work):
    model, tokenizer = load(work, "student")
    model.transformer.ln_f.weight.data[0] = float("nan")
    model.save_pretrained("damaged")
    tokenizer.save_pretrained("damaged")
    assert "its weights are damaged" in error_line(COMMAND.replace("student", "damaged"))
    assert not shards()


def test_the_scores_are_score_folders(work):
    invoke(COMMAND)
    expected = library_choice(work, rules=[StepRule(0.3, 0.5)])
    invoke("compare out/scores/plain out/scores/lr-0.3_radius-0.5 --n 4 -o comparison")
    (path,) = Path("comparison").glob("results_*.json")
    found = strict(path)["results"]
    both = [expected.searched[1], expected.adapted]
    total = sum(profile.cov(4) * profile.num_rows for profile in both) / sum(profile.num_rows for profile in both)
    assert found["lr 0.3, radius 0.5"]["cov_4,none"] == pytest.approx(total)


def test_the_settings_of_a_step_are_scored(work):
    invoke("tune-ttt student --data corpus --n 4 --lr 0.5 --decay 0.5 --lam 2 --steps 2 -o out")
    rule = StepRule(0.5, decay=0.5, lam=2.0, num_steps=2)
    expected = library_choice(work, rules=[rule])
    assert strict("out/tune_ttt.json")["difference"] == pytest.approx(expected.difference._asdict())
    assert Path("out/scores/lr-0.5_decay-0.5_lam-2.0_steps-2/metadata.json").is_file()
    Path("grid.yaml").write_text("lr: [0.5]\ntop-k: 3\nn: 4\n")
    invoke("tune-ttt student --data corpus --config grid.yaml -o out")
    assert strict("out/tune_ttt.json")["generation_settings"] == {"ttt_lr": 0.5, "ttt_top_k": 3}


def test_every_setting_is_tried_on_the_prompt_too(work):
    output = invoke("tune-ttt student --data corpus --n 4 --lr 0.3,0.5 --on-prompt -o out")
    rules = [TTTConfig(lr, on_prompt=prompt) for lr in (0.3, 0.5) for prompt in (False, True)]
    expected = library_choice(work, rules=rules)
    found = strict("out/tune_ttt.json")
    assert found["chosen"] == rule_name(expected.rule)
    assert found["difference"] == pytest.approx(expected.difference._asdict())
    assert list(found["choosing_half"]["results"]) == ["plain", *map(rule_name, rules)]
    assert "lr 0.5, on_prompt" in output


def test_scopes_are_tried_around_the_step_sizes_that_the_model_allows(work):
    """Not those of the configuration alone: what only adapters have is not asked of the head."""
    output = invoke("tune-ttt student --data corpus --n 4 --scope head,lora --rank 2 --cache stale -o out")
    model, tokenizer = load(work, "student")
    encoded = encode_corpus(load_from_disk("corpus"), tokenizer)
    middle = measure_step_size(model, encoded, TTTConfig(0.0))
    names = list(strict("out/tune_ttt.json")["choosing_half"]["results"])
    assert names[1:5] == [f"lr {float(f'{factor * middle:.2g}')}" for factor in STEP_SIZES]
    assert [name.partition(", ")[2] for name in names[5:]] == ["scope lora, rank 2, cache stale"] * 4
    assert f"'head' lie around {middle:g}" in output
    expected = library_choice(work, rules=[TTTConfig(0.5, scope="lora", rank=2, cache="stale")])
    invoke("tune-ttt student --data corpus --n 4 --lr 0.5 --scope lora --rank 2 --cache stale -o out")
    assert strict("out/tune_ttt.json")["difference"] == pytest.approx(expected.difference._asdict())


def test_groups_are_documents_where_asked(work):
    rows = [{"prompt": f"the cat {k}", "completion": " sat on mat", "book": k // 3} for k in range(15)]
    Dataset.from_list(rows).to_json("books.jsonl")
    invoke("tune-ttt student --data books.jsonl --n 1e6 --lr 0.1 --group-by book -o out")
    found = strict("out/tune_ttt.json")
    assert (found["choosing_half"]["num_prompts"], found["other_half"]["num_prompts"]) == (2, 3)
    first = split_groups([row["book"] for row in rows])
    assert found["choosing_half"]["num_rows"] == first.sum()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--n 4", "--n 1"), "`n` must be above 1"),
        (("--n 4", "--n 0.5"), "`n` must be a finite number >= 1"),
        (("0.01,0.3", "0"), "`lr` must be above 0: with 0 it is plain decoding"),
        (("0.01,0.3", "-1"), "`lr` must be finite and at least 0"),
        (("none,0.5", "0"), "`radius` must be positive"),
        (("--lr", "--top-k 3 --lr"), "`top_k` must not be combined with `radius`"),
        (("--lr", "--scope tail --lr"), '`scope` must be "head", "lora" or "all", got \'tail\''),
        (("--lr", "--rank 4 --lr"), "`rank` is that of adapters"),
        (("--lr", "--cache stale --lr"), "`cache` is exact whatever the head does"),
        (("--data corpus", "--data missing.jsonl"), "there is no file missing.jsonl"),
        (("--data corpus", "--data prompts.jsonl"), "`completion`"),
        (("--data corpus", "--data few.jsonl"), "at least 4 prompts (or documents)"),
        (("--data corpus", "--data answers.jsonl"), "has scored answers"),
        (("student", "capped --tokenizer teacher"), "soft-capping"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_is_scored(work, changed, message):
    Dataset.from_dict({"prompt": ["the", "a", "cat"], "completion": [" sat on"] * 3}).to_json("few.jsonl")
    answers = {"prompt": ["the", "a"], "answer": ["1", "2"], "answer_logprob": [-1.0, -2.0]}
    Dataset.from_dict(answers | {"reference_answer_logprob": [0.0, 0.0]}).to_json("answers.jsonl")
    if "capped" in changed[1]:
        small = {"vocab_size": 13, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
        small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1}
        Gemma2ForCausalLM(Gemma2Config(**small, pad_token_id=0, final_logit_softcapping=5.0)).save_pretrained("capped")
    assert message in error_line(COMMAND.replace(*changed))
    assert not Path("out/tune_ttt.json").exists()
    assert not shards()


def test_responses_that_steps_cannot_reach_are_refused(work):
    Dataset.from_dict({"prompt": ["the", "a", "cat", "dog"], "completion": [" sat"] * 4}).to_json("short.jsonl")
    line = error_line(COMMAND.replace("--data corpus", "--data short.jsonl"))
    assert "every response is one token long" in line
    assert not Path("out").exists()
    # steps on a prompt reach them
    rows = {"prompt": [f"the {word}" for word in ("cat", "dog", "mat", "red")], "completion": [" sat"] * 4}
    Dataset.from_dict(rows).to_json("prompted.jsonl")
    invoke("tune-ttt student --data prompted.jsonl --on-prompt --n 1000 --lr 0.1 -o other")


def test_an_n_at_which_a_bound_says_nothing_is_refused_and_the_next_one_scores_nothing(work):
    rows = [
        {"prompt": f"the {word}", "completion": " on mat and red dog sat"} for word in ("cat", "dog", "mat", "red")
    ]
    Dataset.from_list(rows).to_json("long.jsonl")
    command = "tune-ttt student --data long.jsonl --n {} --lr 0.01 -o out"
    line = error_line(command.format(2))
    assert "`n` = 2 is too small to choose by" in line
    before = shards()
    invoke(command.format(re.search(r"N = (\S+) would", line)[1]))
    assert shards() == before


def test_scores_of_something_else_are_not_taken(work):
    invoke(COMMAND)
    assert "holds the scores of something else" in error_line(COMMAND.replace("student", "other"))


@pytest.mark.parametrize(
    ("option", "words"), [("--lr 0.1,fast", "'fast' is none for"), ("--radius 1,x", "'x' is none for")]
)
def test_what_is_no_number_is_a_usage_error(work, option, words):
    assert words in invoke(f"tune-ttt student --data corpus --n 4 {option}", code=2)


@pytest.mark.slow
def test_two_processes_keep_what_one_keeps_and_speak_once(work):
    options = "tune-ttt student --data corpus -n 4 --lr 0.3 --device cpu"
    printed = run(*f"-m hf_coverage {options} -o two".split(), ranks=2)
    assert printed.count("Lower is better") == 1
    invoke(f"{options} -o one")
    one, two = strict("one/tune_ttt.json"), strict("two/tune_ttt.json")
    assert one["difference"] == pytest.approx(two["difference"])
