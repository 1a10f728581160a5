"""Jobs of several processes never run at once, however many workers share the tests, and take a port that is free."""

from pathlib import Path


def test_a_file_that_starts_jobs_puts_them_into_their_group_and_names_no_port():
    texts = {file.name: file.read_text() for file in Path(__file__).parent.rglob("test_*.py")}
    jobs = {name: text for name, text in texts.items() if "torch.distributed.run" in text}
    assert len(jobs) > 10
    for name, text in jobs.items():
        assert 'xdist_group("ranks")' in text, name
        assert "--standalone" in text, name
        assert "master_port" not in text or name == Path(__file__).name
