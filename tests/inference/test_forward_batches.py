"""Plans over random corpora: every response token predicted exactly once, at its place, within the limits."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.forward_batches import Batch, Limits, build_step, plan_batches, tokens_read
from hf_coverage.inference.self_check import Reading


@st.composite
def corpora(draw) -> EncodedCorpus:
    """Prompts that repeat and responses from one token to many, in any order."""
    pool = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=40), min_size=1, max_size=5))
    rows = draw(st.lists(st.tuples(st.sampled_from(pool), st.integers(1, 30)), min_size=1, max_size=25))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    return EncodedCorpus(
        [prompt for prompt, _ in rows], [generator.integers(10, 99, length).tolist() for _, length in rows]
    )


LIMITS = st.builds(Limits, tokens=st.integers(1, 300), positions=st.integers(1, 60))


def steps_of(corpus, batch, *, cached):
    """The passes as an engine runs them, with the row at each line of a pass."""
    lengths = [len(corpus.completions[row]) for row in batch.rows]
    slots = dict(zip(batch.rows, np.cumsum([0, *lengths[:-1]])))
    first = build_step(corpus, batch.rows, np.array(list(slots.values())), 0, batch.cuts[0], context=0)
    yield batch.rows, 0, first
    for wave in batch.waves:
        own = np.array([slots[row] for row in wave])
        for start, stop in zip(batch.cuts, batch.cuts[1:]):
            context = start if cached else 0
            yield wave, context, build_step(corpus, wave, own, start, stop, context=context)


@settings(max_examples=200, deadline=None)
@given(corpus=corpora(), limits=LIMITS, share=st.booleans(), cached=st.booleans())
def test_every_response_token_is_predicted_once_by_all_that_precedes_it(corpus, limits, share, cached):
    batches = plan_batches(
        corpus, range(len(corpus)), limits, reading=Reading.SHARED if share and cached else Reading.PADDED
    )
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(corpus)))
    for batch in batches:
        expected = [(row, token) for row in batch.rows for token in range(len(corpus.completions[row]))]
        seen = {}
        passes = list(steps_of(corpus, batch, cached=cached))
        assert len(passes) == batch.num_forwards
        for rows, context, step in passes:
            line_rows = {int(line): row for row, line in zip(rows, step.sequences)}
            for pick, label, slot in zip(step.pick, step.labels, step.slots):
                row, token = expected[slot]
                line, place = divmod(int(step.positions[pick]), step.ids.shape[1])
                assert label == corpus.completions[row][token]
                before = corpus.prompts[row] + corpus.completions[row][:token]
                assert context + place == len(before) - 1
                assert step.ids[line, : place + 1].tolist() == before[context:]
                if context:  # behind a cache, a line belongs to one row
                    assert line_rows[line] == row
                assert slot not in seen
                seen[slot] = token
        assert len(seen) == len(expected)


@settings(max_examples=200, deadline=None)
@given(corpus=corpora(), limits=LIMITS, share=st.booleans())
def test_limits_hold(corpus, limits, share):
    for batch in plan_batches(corpus, range(len(corpus)), limits, reading=Reading.SHARED if share else Reading.PADDED):
        for rows, _, step in steps_of(corpus, batch, cached=True):
            assert len(step.positions) <= limits.positions
            # Only what cannot be divided may be larger: one row, or one prompt.
            assert step.ids.size <= limits.tokens or len(step.ids) == 1 or len(rows) == 1


@settings(max_examples=50, deadline=None)
@given(corpus=corpora(), limits=LIMITS)
def test_sharing_never_reads_more_tokens(corpus, limits):
    def read(share):
        batches = plan_batches(corpus, range(len(corpus)), limits, reading=Reading.SHARED if share else Reading.PADDED)
        return sum(
            np.count_nonzero(step.ids) for batch in batches for *_, step in steps_of(corpus, batch, cached=True)
        )

    assert read(True) <= read(False)


def test_a_prompt_runs_once_however_many_waves_its_responses_take():
    corpus = EncodedCorpus([[7] * 50] * 20, [[1 + row] * 10 for row in range(20)])
    (batch,) = plan_batches(corpus, range(20), Limits(tokens=64, positions=1000))
    assert batch.cuts == (50, 59)
    assert len(batch.waves) > 1
    assert sum(step.ids.size for *_, step in steps_of(corpus, batch, cached=True)) == 50 + 20 * 9


def test_prompts_of_nearly_equal_length_share_a_pass_without_padding():
    corpus = EncodedCorpus([[7] * 50] * 4 + [[8] * 48] * 4, [[1] * 10] * 8)
    (batch,) = plan_batches(corpus, range(8), Limits(tokens=1000, positions=1000))
    assert batch == Batch(rows=tuple(range(8)), cuts=(48, 59), waves=(tuple(range(8)),))


def test_one_token_responses_of_one_prompt_take_one_line():
    corpus = EncodedCorpus([[7] * 50] * 4, [[1], [2], [3], [4]])
    (batch,) = plan_batches(corpus, range(4), Limits(tokens=1000, positions=2))
    ((_, _, step),) = steps_of(corpus, batch, cached=True)
    assert step.ids.shape == (1, 50)
    assert step.positions.tolist() == [49]
    assert step.labels.tolist() == [1, 2, 3, 4]


def test_similar_lengths_meet():
    corpus = EncodedCorpus([[7] * length for length in (100, 3, 90, 4)], [[1]] * 4)
    batches = plan_batches(corpus, range(4), Limits(tokens=220, positions=100))
    assert [batch.rows for batch in batches] == [(0, 2), (3, 1)]
    assert tokens_read(corpus, 0) == 100
