"""A reference belongs to the scores it lies beside, and to no others."""

import json
import logging
import shutil

import numpy as np
import pytest
from datasets import Dataset

from hf_coverage.measure.reference import load_reference, read_reference, write_reference
from hf_coverage.measure.score_table import ScoreTable
from hf_coverage.measure.scores import Scores

FILES = ("reference.json", "reference.safetensors")
PAIRS = {"prompt": ["a", "b"], "completion": ["c", "d"]}
CORPORA = {
    "one": PAIRS | {"reference_logprob": [-1.0, -2.0]},
    "other density": PAIRS | {"reference_logprob": [-1.0, -3.0]},
    "single answers": PAIRS | {"reference_logprob": [0.0, 0.0]},
    "samples": PAIRS,
    "other text": PAIRS | {"completion": ["c", "e"], "reference_logprob": [-1.0, -2.0]},
    "other groups": PAIRS | {"reference_logprob": [-1.0, -2.0], "document": [0, 0]},
    "more rows": {"prompt": ["a"] * 3, "completion": ["c", "d", "e"], "reference_logprob": [-1.0] * 3},
}


def score_folder(path, name, *, tokens=None):
    corpus = Dataset.from_dict(CORPORA[name])
    table = ScoreTable.begin(path, {"rows": len(corpus), "shard_rows": 8, "corpus": tokens or name})
    table.write(0, Scores(np.full(len(corpus), -4.0), np.ones(len(corpus), dtype=np.int64)))
    write_reference(path, read_reference(corpus), {"name": path.name})
    return path


@pytest.mark.parametrize("name", CORPORA)
def test_what_is_written_is_read(tmp_path, name):
    reference, facts = load_reference(score_folder(tmp_path / "own", name))
    expected = read_reference(Dataset.from_dict(CORPORA[name]))
    assert reference.fingerprint == expected.fingerprint
    assert facts == {"kind": expected.kind, "name": "own"}


@pytest.mark.parametrize("other", [name for name in CORPORA if name != "one"])
@pytest.mark.parametrize("swapped", [FILES[:1], FILES[1:], FILES], ids=["json", "arrays", "both"])
def test_files_of_another_folder_are_refused(tmp_path, other, swapped):
    own, strange = score_folder(tmp_path / "own", "one"), score_folder(tmp_path / "strange", other)
    for file in swapped:
        shutil.copy(strange / file, own / file)
    with pytest.raises(ValueError, match="score into this folder again"):
        load_reference(own)


def test_a_folder_of_rows_asks_for_its_corpus(tmp_path):
    reference = read_reference(Dataset.from_dict(PAIRS))
    write_reference(tmp_path, reference, {"name": "model"}, corpus="abc")
    assert load_reference(tmp_path, corpus="abc")[0].fingerprint == reference.fingerprint
    with pytest.raises(ValueError, match=r"the reference of another corpus \(fingerprint abc\)"):
        load_reference(tmp_path, corpus="def")


def without_binding(folder):
    facts = json.loads((folder / "reference.json").read_text())
    del facts["binding"]
    (folder / "reference.json").write_text(json.dumps(facts))


def test_folders_from_before_are_read_with_a_word(tmp_path, caplog):
    own = score_folder(tmp_path / "own", "one")
    without_binding(own)
    with caplog.at_level(logging.WARNING):
        assert load_reference(own)[0].logprob.tolist() == [-1.0, -2.0]
    assert "written before references were bound" in caplog.text
    caplog.clear()
    load_reference(score_folder(own, "one"))  # a second run of the same scoring binds them
    assert not caplog.text


@pytest.mark.parametrize(
    ("file", "other", "message"),
    [
        ("reference.safetensors", "more rows", r"must have one entry for each of the 2 rows"),
        ("reference.safetensors", "samples", r"is not of the reference.safetensors beside it \(kind 'density'\)"),
        ("reference.json", "samples", r"is not of the reference.safetensors beside it \(kind 'samples'\)"),
    ],
)
def test_of_those_what_can_be_checked_is(tmp_path, file, other, message):
    own, strange = score_folder(tmp_path / "own", "one"), score_folder(tmp_path / "strange", other)
    without_binding(own)
    without_binding(strange)
    shutil.copy(strange / file, own / file)
    with pytest.raises(ValueError, match=message):
        load_reference(own)
