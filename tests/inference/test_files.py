"""A file is there whole or not at all, whatever writes it and however it ends."""

import json
import os
import signal
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from hf_coverage.inference.files import read_json, strict_json, write_atomically, written_whole
from hf_coverage.plots import new_axes, save_figure
from tests.processes import run


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    run(Path(__file__).with_name("killed_writers.py"), folder)
    return folder


WRITERS = ["bytes", "text", "json", "dataset", "figure", "reference", "corpus"]
WRITERS += ["results", "samples", "html", "card", "origin"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_writer_leaves_nothing_under_the_final_name(name, killed):
    ends = json.loads((killed / "ends.json").read_text())
    assert ends.keys() == set(WRITERS)
    assert ends[name] == -signal.SIGKILL
    (left,) = (path.name for path in (killed / name).iterdir())
    assert left.startswith(".")
    assert left.endswith(".part")


def test_what_a_killed_writer_leaves_is_written_over(tmp_path):
    (tmp_path / ".a.txt.part").mkdir()
    (tmp_path / ".a.txt.part" / "half").write_text("ha")
    (tmp_path / ".corpus.part").write_text("ha")
    write_atomically(tmp_path / "a.txt", "whole")
    with written_whole(tmp_path / "corpus") as part:
        Dataset.from_dict({"a": [1]}).save_to_disk(part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "corpus"]
    assert load_from_disk(tmp_path / "corpus")["a"][:] == [1]


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_what_was_there(kind, tmp_path):
    (tmp_path / "a.txt").write_text("before")

    def fail(name, write):
        with written_whole(tmp_path / name) as part:
            write(part)
            raise kind

    with pytest.raises(type(kind)):
        fail("a.txt", lambda part: part.write_text("af"))
    with pytest.raises(type(kind)):
        fail("corpus", Dataset.from_dict({"a": [1]}).save_to_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


def test_a_file_keeps_its_mode_and_a_link_its_place(tmp_path):
    target, link = tmp_path / "a.txt", tmp_path / "link.txt"
    target.write_text("before")
    target.chmod(0o600)
    link.symlink_to("a.txt")
    write_atomically(link, "äfter")
    assert link.is_symlink()
    assert target.read_bytes() == "äfter".encode()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    strict_json({"a": 1}, tmp_path / "pipe")
    assert json.loads(reader.communicate(timeout=60)[0]) == {"a": 1}
    assert (tmp_path / "pipe").is_fifo()


def test_an_empty_folder_stays_the_one_it_is(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path / "corpus")
    with written_whole(".") as part:
        Dataset.from_dict({"a": [1]}).save_to_disk(part)
    assert load_from_disk(".")["a"][:] == [1]
    assert not list(Path.cwd().glob(".*"))


def test_json_is_the_same_text_in_the_file(tmp_path):
    text = strict_json({"format": 1, "kl": float("nan"), "name": "é", "rates": np.array([0.5])}, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text + "\n"
    assert read_json(tmp_path / "a.json", version=1) == {"format": 1, "kl": None, "name": "é", "rates": [0.5]}


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.svg", "a.pdf", "a"])
def test_a_figure_is_what_matplotlib_writes(name, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "a"}):
        figure, _ = new_axes()
        for folder, save in (("ours", save_figure), ("theirs", lambda figure, path: figure.savefig(path))):
            (tmp_path / folder).mkdir()
            save(figure, tmp_path / folder / name)
    ours, theirs = ([path.name for path in (tmp_path / folder).iterdir()] for folder in ("ours", "theirs"))
    assert ours == theirs == [name if "." in name else "a.png"]
    if name.endswith((".svg", ".pdf")):  # but for the date
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("ours", "theirs"))
        assert abs(len(first) - len(second)) < 10


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="is not supported"):
        save_figure(new_axes()[0], tmp_path / "a.xyz")
    assert not list(tmp_path.iterdir())
