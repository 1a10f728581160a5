"""Suites of checkpoints: revisions of one repository, adapters of one base, and what is no checkpoint yet."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel

from hf_coverage.commands import checkpoint_scores, score
from hf_coverage.commands.suites import list_revisions
from hf_coverage.inference.adapters import KeptBase
from hf_coverage.inference.fingerprint import config_fingerprint, weight_fingerprint
from hf_coverage.inference.loading import ModelOptions, load_model, model_name
from hf_coverage.select.checkpoints import distinct_names
from tests.commands.shell import error_line, invoke

# peft asks by the old name, its new one not being in all versions of transformers that it supports.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

COMMITS = {"main": "a" * 40, "step2": "a" * 40, "step10": "b" * 40, "refs/pr/1": "c" * 40}
MODELS = {"a" * 40: "student", "b" * 40: "other", "c" * 40: "teacher"}


@pytest.fixture
def hub(work, monkeypatch):
    """A cache of the Hub with three commits of one repository, and five names for them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(work / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = work / "hub" / "models--org--suite"
    for commit, model in MODELS.items():
        shutil.copytree(work / model, folder / "snapshots" / commit)
    for name, commit in COMMITS.items():
        ref = folder / "refs" / name
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    return folder


def loads(monkeypatch):
    """The names of models that commands load from here on."""
    loaded, original = [], score.load_model
    monkeypatch.setattr(score, "load_model", lambda name, how: (loaded.append(name), original(name, how))[1])
    return loaded


@pytest.mark.usefixtures("undrawn")
def test_revisions_are_candidates_named_by_themselves_and_known_by_their_commits(hub, work, monkeypatch):
    loaded = loads(monkeypatch)
    invoke("choose org/suite --revisions step* --data corpus --samples 4 -o out --device cpu")
    assert loaded == ["org/suite@step2", "org/suite@step10"]
    choice = json.loads((work / "out" / "choice.json").read_text())
    assert set(choice["losses"]) == {"step2", "step10"}
    found = json.loads((work / "out" / "best_checkpoint.json").read_text())
    assert found["best_model_checkpoint"] in ("org/suite@step2", "org/suite@step10")
    # the folders' own scores are the same numbers
    invoke("choose student other --data corpus --samples 4 -o folders --device cpu")
    folders = json.loads((work / "folders" / "choice.json").read_text())
    assert [folders["losses"][name] for name in ("student", "other")] == list(choice["losses"].values())

    del loaded[:]
    command = "choose org/suite@step2 org/suite@step10 --data corpus --samples 4 -o out --device cpu"
    invoke(command)
    assert loaded == []
    (hub / "refs" / "step10").write_text("c" * 40)  # the branch has moved
    line = error_line(command)
    assert loaded == ["org/suite@step10"]
    assert "holds the scores of something else (model.weights" in line


def test_any_command_takes_a_revision(hub, work):
    invoke("score org/suite@step10 corpus -o new --device cpu")
    reference = json.loads((work / "new" / "reference.json").read_text())
    assert reference["name"] == reference["model"] == "org/suite@step10"
    metadata = json.loads((work / "new" / "metadata.json").read_text())
    assert metadata["model"]["revision"] == "b" * 40
    invoke("sample prompts.jsonl --teacher org/suite@refs/pr/1 --k 1 --max-new-tokens 2 -o drawn --device cpu")
    assert "has a revision, and `revision` is step2: give one" in error_line(
        "score org/suite@step10 corpus -o x --revision step2"
    )
    assert "there is no file or folder ./org/suite@step10" in error_line("score ./org/suite@step10 corpus -o x")


def test_revisions_are_listed_in_the_order_of_their_numbers(hub, monkeypatch):
    assert list_revisions("org/suite", "step*") == ["step2", "step10"]
    assert list_revisions("org/suite", "refs/pr/*") == ["refs/pr/1"]
    with pytest.raises(ValueError, match="matches none of org/suite, which has main, refs/pr/1, step2, step10"):
        list_revisions("org/suite", "epoch*")
    with pytest.raises(ValueError, match="matches none of org/none, which is not in the local cache"):
        list_revisions("org/none", "*")
    line = error_line("tournament student --revisions step* --data corpus")
    assert "`revisions` are those of a repository on the Hub, but student is one checkpoint" in line
    # online it is the Hub that knows
    refs = type("Refs", (), {"branches": [type("Ref", (), {"name": "step7"})], "tags": []})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_refs", lambda _, repository: refs)
    assert list_revisions("org/suite", "step*") == ["step7"]


def test_a_snapshot_is_called_by_its_repository_and_revision(hub):
    folders = [hub / "snapshots" / commit for commit in MODELS]
    assert distinct_names(folders) == ["main", "step10", "refs-pr-1"]
    assert model_name(str(folders[1]), ModelOptions()) == "org/suite@step10"
    shutil.rmtree(hub / "refs")
    assert distinct_names(folders) == ["aaaaaaaa", "bbbbbbbb", "cccccccc"]
    assert distinct_names(["org/one@step1", "org/two@step1"]) == ["one/step1", "two/step1"]


@pytest.fixture
def adapters(work):
    """Three adapter checkpoints of one run over `student`, of two shapes, that have no tokenizer."""
    for number in range(3):
        torch.manual_seed(number)
        wrapped = {"target_modules": ["c_attn"]} if number < 2 else {"target_modules": ["c_proj"]}
        wrapped |= {"modules_to_save": ["ln_f"]} if number == 1 else {}  # not the last: it is taken off
        adapted = get_peft_model(
            GPT2LMHeadModel.from_pretrained(work / "student"),
            LoraConfig(init_lora_weights=False, fan_in_fan_out=True, **wrapped),
        )
        adapted.save_pretrained(work / "run" / f"checkpoint-{number}")
        config = work / "run" / f"checkpoint-{number}" / "adapter_config.json"
        facts = json.loads(config.read_text()) | {"base_model_name_or_path": "student"}
        config.write_text(json.dumps(facts))
    return work / "run"


@pytest.mark.usefixtures("undrawn")
def test_the_base_of_adapters_is_loaded_once(adapters, work, monkeypatch):
    loaded = loads(monkeypatch)
    invoke("choose run/checkpoint-0 run/checkpoint-1 run/checkpoint-2 --data corpus -o out --device cpu")
    assert loaded == ["student"]
    for number in range(3):
        fresh = load_model(f"run/checkpoint-{number}", ModelOptions(device="cpu"))
        metadata = json.loads((work / "out" / "scores" / f"run__checkpoint-{number}" / "metadata.json").read_text())
        assert metadata["model"]["weights"] == weight_fingerprint(fresh)
        assert metadata["model"]["config"] == config_fingerprint(fresh)
        invoke(f"score run/checkpoint-{number} corpus -o out/scores/run__checkpoint-{number} --device cpu")
    del loaded[:]
    invoke("profile run/checkpoint-0 run/checkpoint-1 student --corpus corpus -o profiles --device cpu")
    assert loaded == ["student", "student"]


@pytest.mark.usefixtures("undrawn")
def test_a_base_that_changed_makes_others_of_its_adapters(adapters, work):
    command = "choose run/checkpoint-0 run/checkpoint-1 --data corpus -o out --device cpu"
    invoke(command)
    record = work / "out" / "scores" / "run__checkpoint-0" / "checkpoint.json"
    assert json.loads(record.read_text())["base"]["files"]["model.safetensors"]
    (work / "student").unlink()
    shutil.copytree(work / "other", work / "student")
    assert "holds the scores of something else (model.weights" in error_line(command)


def test_a_base_that_an_adapter_wrote_to_is_loaded_anew(adapters, monkeypatch):
    kept, options, count = KeptBase(), ModelOptions(device="cpu"), []

    def load(name, how):
        count.append(name)
        return load_model(name, how)

    model = kept.load("run/checkpoint-0", options, load)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    again = kept.load("run/checkpoint-1", options, load)
    assert count == ["student", "student"]
    assert weight_fingerprint(again) == weight_fingerprint(load_model("run/checkpoint-1", options))
    kept.load("teacher", options, load)
    kept.load("run/checkpoint-1", options, load)
    assert count[2:] == ["teacher", "student"]


@pytest.mark.usefixtures("adapters")
def test_an_adapter_put_on_by_an_option_is_known_by_its_files(work, monkeypatch):
    command = "tournament student other --data corpus --n 2 --bootstrap 0 --adapter run/checkpoint-0 -o out"
    monkeypatch.setattr(checkpoint_scores, "score_into", lambda folder, *_, **__: folder.mkdir(parents=True))
    error_line(command)
    (record,) = (work / "out" / "scores").glob("*__student/checkpoint.json")
    assert "adapter_model.safetensors" in json.loads(record.read_text())["adapter"]["files"]


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (["pytorch_model_fsdp_0/__0_0.distcp"], "`accelerate merge-weights run/pytorch_model_fsdp_0 OUTPUT`"),
        (["zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"], "`python run/zero_to_fp32.py run OUTPUT "),
    ],
)
def test_parts_of_a_model_are_refused_with_the_way_to_make_one_of_them(work, monkeypatch, files, advice):
    for file in ["config.json", *files]:
        (work / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (work / "run" / file).write_text("{}")
    loaded = loads(monkeypatch)
    assert advice in error_line("choose student run --data corpus -o out")
    assert loaded == []
    assert advice in error_line("score run corpus -o out")
