"""Score tables: what comes back, what an interruption leaves, and what is refused."""

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hf_coverage.inference import forward_batches
from hf_coverage.inference.fingerprint import weight_fingerprint
from hf_coverage.measure.score_table import ScoreTable
from hf_coverage.measure.scores import Scores
from hf_coverage.measure.scoring import score_responses
from tests.measure import killed_run
from tests.processes import server


def score(folder, *, model=None, corpus=None, **arguments):
    corpus = killed_run.make_corpus().select(range(10)) if corpus is None else corpus
    arguments = {"shard_rows": 4, **arguments}
    return score_responses(model or killed_run.build(), None, corpus, output_dir=folder, progress=False, **arguments)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def table(tmp_path):
    """A finished table of ten rows in three shards."""
    folder = tmp_path / "table"
    score(folder)
    return folder


def test_a_table_holds_what_scoring_returns(tmp_path):
    corpus, model = killed_run.make_corpus().select(range(10)), killed_run.build()
    everything = {"per_token": True, "teacher": killed_run.build(1), "head_statistics": True}
    direct = score_responses(model, None, corpus, progress=False, **everything)
    scored = score(tmp_path, model=model, **everything)
    again = score(tmp_path, model=model, **everything)  # read, not scored
    for column in direct.column_names[2:]:
        for row in range(10):
            np.testing.assert_allclose(scored[row][column], direct[row][column], atol=1e-4)
        assert again[column][:] == scored[column][:]
    table = ScoreTable.open(tmp_path)
    assert table.logprob.dtype == np.float64
    assert table.logprob.tolist() == scored["logprob"][:]
    assert table.num_tokens.tolist() == scored["num_tokens"][:]
    shards = list(table.iter_shards())
    assert [len(shard) for shard in shards] == [4, 4, 2]
    assert [line.tolist() for line in Scores.concatenate(shards).token_kl] == scored["token_kl"][:]


def test_metadata_says_where_the_scores_came_from(table):
    metadata = json.loads((table / "metadata.json").read_text())
    assert (metadata["rows"], metadata["shard_rows"]) == (10, 4)
    assert metadata["model"]["weights"] == weight_fingerprint(killed_run.build())
    assert metadata["model"]["dtype"] == "float32"
    assert metadata["versions"].keys() == {"hf_coverage", "torch", "transformers"}
    assert metadata["options"]["append_eos"] is False
    with safe_open(table / "scores-00002.safetensors", framework="numpy") as file:
        header = json.loads(file.metadata()["hf_coverage"])
    assert header["rows"] == [8, 10]
    assert header["corpus"] == metadata["corpus"]


def test_only_missing_shards_are_scored_and_the_bytes_are_the_same(table, monkeypatch):
    monkeypatch.setattr(forward_batches, "find_reading", lambda *args, fastest, **kwargs: fastest)
    before = contents(table)
    (table / "scores-00001.safetensors").unlink()
    (table / ".scores-00001.safetensors.part").write_bytes(b"half a sha")  # what a killed run leaves
    model, read = killed_run.build(), []
    handle = model.transformer.wte.register_forward_hook(lambda _, args, output: read.append(args[0].numel()))
    score(table, model=model)
    handle.remove()
    lengths = [len(row["prompt"]) + len(row["completion"]) - 1 for row in killed_run.make_corpus().select(range(4, 8))]
    assert sum(lengths) <= sum(read) - 1 < 2 * sum(lengths)  # these rows and their padding, after the probe
    assert contents(table) == before


def test_a_crash_while_writing_leaves_no_shard(table, monkeypatch):
    (table / "scores-00001.safetensors").unlink()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        score(table)
    assert not (table / "scores-00001.safetensors").exists()
    monkeypatch.undo()
    score(table)
    assert len(ScoreTable.open(table).logprob) == 10


def test_a_model_that_moved_is_the_same_model(table):
    before, model = contents(table), killed_run.build()
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = False
    score(table, model=model.train())
    assert contents(table) == before


def scaled_attention():
    model = killed_run.build()
    model.config.scale_attn_by_inverse_layer_idx = True
    return model


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"model": killed_run.build(1)}, "model.weights '.*', now '"),
        ({"model": killed_run.build().to(torch.bfloat16)}, "model.dtype 'float32', now 'bfloat16'"),
        ({"model": scaled_attention()}, "model.config '.*', now '"),
        ({"corpus": killed_run.make_corpus().select(range(1, 11))}, "corpus '.*', now '"),
        ({"corpus": killed_run.make_corpus().select(range(9))}, "corpus '.*', now '.*rows 10, now 9"),
        ({"batch_tokens": 64}, "options.batch_tokens 4096, now 64"),
        ({"per_token": True}, "options.per_token False, now True"),
        ({"teacher": killed_run.build(1)}, "teacher.weights None, now '"),
        ({"shard_rows": 5}, "shard_rows 4, now 5"),
    ],
)
def test_a_table_of_something_else_is_refused_and_left_alone(table, arguments, difference):
    before = contents(table)
    with pytest.raises(ValueError, match=f"scores of something else .*{difference}.*Score into a new folder"):
        score(table, **arguments)
    assert contents(table) == before


def truncate(path, _):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path, _):
    path.write_bytes(b"")


def flip_a_bit(path, _):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def take_the_next_shard(path, _):
    path.write_bytes(path.with_name("scores-00001.safetensors").read_bytes())


def take_other_weights(path, folder):
    score(folder / "other", model=killed_run.build(1))
    path.write_bytes((folder / "other" / path.name).read_bytes())


def take_another_corpus(path, folder):
    score(folder / "other", corpus=killed_run.make_corpus().select(range(20, 30)))
    path.write_bytes((folder / "other" / path.name).read_bytes())


def take_other_options(path, folder):
    score(folder / "other", share_prefixes=False)
    path.write_bytes((folder / "other" / path.name).read_bytes())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "truncated or is no safetensors file"),
        (empty, "truncated or is no safetensors file"),
        (flip_a_bit, "damaged: its content does not match its checksum"),
        (take_the_next_shard, r"its rows is \[4, 8\], expected \[0, 4\]"),
        (take_other_weights, "its weights is"),
        (take_another_corpus, "its corpus is"),
        (take_other_options, "its table is"),
    ],
)
def test_a_shard_that_does_not_belong_is_refused_and_left_alone(table, tmp_path, damage, reason):
    damage(table / "scores-00000.safetensors", tmp_path)
    before = contents(table)
    for use in (score, ScoreTable.open):
        with pytest.raises(ValueError, match=f"scores-00000.safetensors .*{reason}.*Move the file away"):
            use(table)
    assert contents(table) == before


def test_what_is_no_table_or_no_whole_one_is_refused(table, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no score table: there is no metadata.json"):
        ScoreTable.open(tmp_path / "nowhere")
    (table / "scores-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 shards, the first is scores-00002.*the same scoring again"):
        ScoreTable.open(table)
    (table / "metadata.json").write_text('{"format": "something"}')
    with pytest.raises(ValueError, match="must be of format 'hf-coverage scores', version 1, got"):
        score(table)
    (table / "metadata.json").write_text('{"for')
    with pytest.raises(ValueError, match=r"metadata\.json is damaged"):
        score(table)


def test_wrong_sizes_are_named(table):
    with pytest.raises(ValueError, match="`scores` must have 4 rows for shard 0, got 1"):
        ScoreTable.open(table).write(0, Scores(np.zeros(1), np.ones(1, dtype=np.int64)))
    with pytest.raises(ValueError, match="`shard_rows` must be at least 1, got 0"):
        score(table, shard_rows=0)


def tokens_read(monkeypatch, model):
    """Lengths of what the model reads from now on, without the check that comes first."""
    monkeypatch.setattr(forward_batches, "find_reading", lambda *args, fastest, **kwargs: fastest)
    read = []
    model.transformer.wte.register_forward_hook(lambda _, args, output: read.append(args[0].shape))
    return read


def test_rows_in_any_order_become_the_shards_of_a_whole_table(tmp_path, table):
    model, whole = killed_run.build(), ScoreTable.open(table)
    scored = score(tmp_path / "some", model=model, rows=[7, 2, 5], per_token=True)
    assert scored["prompt"][:] == killed_run.make_corpus().select([7, 2, 5])["prompt"][:]
    np.testing.assert_allclose(scored["logprob"][:], whole.logprob[[7, 2, 5]], atol=1e-4)
    with pytest.raises(ValueError, match="lacks 3 of 3 shards"):
        ScoreTable.open(tmp_path / "some")
    sample = ScoreTable.open_sample(tmp_path / "some")
    rows, scores = sample.read_rows()
    assert rows.tolist() == [7, 2, 5]
    known, found = sample.look_up(np.array([0, 5, 7]))
    assert known.tolist() == [False, True, True]
    assert found.logprob.tolist() == scores.logprob[[2, 0]].tolist()
    again = score(tmp_path / "some", model=model, rows=[5, 0, 7, 1, 3, 4, 6, 8, 9], per_token=True)
    assert again["token_logprobs"][0] == scored["token_logprobs"][2]
    assert sorted(contents(tmp_path / "some")) == sorted(contents(table))
    np.testing.assert_allclose(ScoreTable.open(tmp_path / "some").logprob, whole.logprob, atol=1e-4)


def test_what_was_scored_in_another_order_is_not_scored_again(tmp_path, monkeypatch):
    model = killed_run.build()
    first = score(tmp_path, model=model, rows=[7, 2, 5, 4, 6])
    read = tokens_read(monkeypatch, model)
    score(tmp_path, model=model, rows=[2, 4])
    lengths = [len(row["prompt"]) + len(row["completion"]) - 1 for row in killed_run.make_corpus().select(range(10))]
    whole = score(tmp_path, model=model)
    # a probe for the output head each time; rows 4 to 7 are known but for none, and in 0 to 3 row 2 is
    others = [rows * columns for rows, columns in read if rows * columns > 1]
    assert sum(others) <= 2 * sum(lengths[row] for row in (0, 1, 3, 8, 9))
    assert [whole["logprob"][row] for row in (7, 2, 5, 4, 6)] == first["logprob"][:]
    assert not list(tmp_path.glob("rows-*"))


def test_rows_that_are_none_are_named(tmp_path):
    for rows in ([], [1, 1]):
        with pytest.raises(ValueError, match="`rows` must be the numbers of one row or more, each once"):
            score(tmp_path, rows=rows)
    with pytest.raises(ValueError, match=r"`rows` must lie in \[0, 10\), but 10 does not"):
        score(tmp_path, rows=[3, 10])


def test_damaged_rows_are_refused(tmp_path):
    score(tmp_path, rows=[7, 2])
    (path,) = tmp_path.glob("rows-*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"rows-.* is truncated .*Move the file away"):
        score(tmp_path)


def test_twenty_kills_lose_nothing(tmp_path):
    """SIGKILL at random points of the run; whatever it had reached, the runs after it end with the same bytes."""
    context = server()
    start = time.perf_counter()
    killed_run.run(tmp_path / "whole")
    duration = time.perf_counter() - start
    expected = contents(tmp_path / "whole")

    generator, kills, cut_short, folder = random.Random(0), 0, 0, tmp_path / "killed"
    while kills < 20:
        started = context.Event()
        process = context.Process(target=killed_run.run, args=(folder, started))
        process.start()
        assert started.wait(60)
        time.sleep(generator.uniform(0, duration / 2))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            cut_short += 0 < len(list(folder.glob("scores-*"))) < killed_run.ROWS / killed_run.SHARD_ROWS
        if process.exitcode == 0 or kills == 20:  # done, or to be finished now: compare, and start over
            killed_run.run(folder)
            assert contents(folder) == expected
            shutil.rmtree(folder)
    assert cut_short >= 5
