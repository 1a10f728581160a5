"""A command on two processes: it leaves the job in success and in failure, and holds its folder once."""

from pathlib import Path

from hf_coverage.inference.folder_lock import folder_lock
from tests.processes import Job, run_by_torchrun

SCORE = [Path(__file__).with_name("left_job.py"), "score", "student", "corpus", "--device", "cpu", "-o"]


def test_every_process_leaves_the_job_and_its_interpreter_ends_in_peace(work):
    done = run_by_torchrun(*SCORE, "out")
    output = done.stdout + done.stderr
    assert "Scores in out" in output
    assert output.count("LEFT") == 2
    check_ending(output)


def test_every_process_leaves_the_job_when_it_fails(work):
    with folder_lock("held", "another purpose"):
        done = Job(*SCORE, "held", ranks=2).wait()
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "for `another purpose`: wait until that is done" in output
    assert "LEFT" in output  # one that failed first may end the other
    check_ending(output)
    assert not Path("held").exists()


def check_ending(output):
    assert "STAYED" not in output
    for trace in ("terminate called", "destroy_process_group", "SIGABRT", "Signal 6"):
        assert trace not in output
