"""Run alone: whatever writes files is killed when all is written and nothing is in its place yet."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_coverage import CoverageProfile
from hf_coverage.commands.inputs import write_origin
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.files import strict_json, write_atomically, written_whole
from hf_coverage.measure.reference import Reference, write_reference
from hf_coverage.measure.run_corpus import RunCorpus
from hf_coverage.plots import new_axes, save_figure
from hf_coverage.report.card import write_model_card
from hf_coverage.report.html import write_html_report
from hf_coverage.report.results import write_results, write_samples

CODES = np.arange(2, dtype=np.uint64)
PROFILE = CoverageProfile.from_logprobs([-1.0], [-1.0])


def write_dataset(folder: Path) -> None:
    with written_whole(folder / "corpus") as part:
        Dataset.from_dict({"a": [1]}).save_to_disk(part)


WRITERS = {
    "bytes": lambda folder: write_atomically(folder / "a.bin", b"whole"),
    "text": lambda folder: write_atomically(folder / "a.txt", "whole"),
    "json": lambda folder: strict_json({"a": 1}, folder / "a.json"),
    "dataset": write_dataset,
    "figure": lambda folder: save_figure(new_axes()[0], folder / "a.png"),
    "reference": lambda folder: write_reference(folder, Reference(CODES, CODES, None, "samples"), {}),
    "corpus": lambda folder: RunCorpus(EncodedCorpus([[1]], [[2]]), None, CODES[:1]).save(folder / "a.parquet"),
    "results": lambda folder: write_results(folder, {"a": 1.0}),
    "samples": lambda folder: write_samples(folder / "results_a.json", PROFILE),
    "html": lambda folder: write_html_report(folder / "a.html", title="a", summary=["b"], tables=[]),
    "card": lambda folder: write_model_card(folder, PROFILE, corpus="a", provenance={}),
    "origin": lambda folder: write_origin(folder, {"a": 1}),
}


def end_of(name: str, folder: Path) -> int:
    """How a process that writes, and is killed, ends: minus the signal, or 0 where the writer never got there."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
    try:
        WRITERS[name](folder)
    finally:
        os._exit(0)
    return 0


if __name__ == "__main__":
    root, ends = Path(sys.argv[1]), {}
    for name in WRITERS:
        (root / name).mkdir()
        ends[name] = end_of(name, root / name)
    (root / "ends.json").write_text(json.dumps(ends))
