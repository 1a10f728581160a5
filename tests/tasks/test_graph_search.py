"""The graph-search task against enumeration, slow searches and counting."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare
from transformers import AutoTokenizer

from hf_coverage.measure.corpus import encode_corpus, reference_kind
from hf_coverage.tasks.graph_search import GraphSearch, GraphSearchDataset, PathClass, collate_rows
from hf_coverage.tasks.graph_tokenizer import encode_prompts, graph_tokenizer
from hf_coverage.tasks.layered_graphs import LayeredGraphs, is_valid_path, valid_paths
from tests.tasks.graph_reference import canonical, parse_prompts

SMALL = GraphSearch.figure_1(num_layers=4, nodes_per_layer=2, num_names=24)
ALIGNED = GraphSearch.figure_1(num_layers=4, nodes_per_layer=2, num_names=24, prompt_format="aligned")
PAPER = GraphSearch.figure_1()
EQUAL = (1 / 3, 1 / 3, 1 / 3)
NINE_TO_ONE = (0.9, 0.1, 0.0)
FIGURE_2 = (0.94, 0.05, 0.01)
TASKS = {
    "small": (SMALL, EQUAL),
    "aligned": (ALIGNED, NINE_TO_ONE),
    "paper": (PAPER, EQUAL),
    "three layers": (GraphSearch.figure_1(num_layers=3, nodes_per_layer=3, num_names=11), EQUAL),
    "horizon 8": (GraphSearch.figure_2(8), FIGURE_2),
    "horizon 16": (GraphSearch.figure_2(16), FIGURE_2),
    "horizon 24": (GraphSearch.figure_2(24), FIGURE_2),
}


def slow_edges(graphs: LayeredGraphs, row: int) -> list[tuple[int, int]]:
    """The edges of one graph, from the definition."""
    layers = [[graphs.source[row]], *graphs.layers[row], [graphs.target[row]]]
    open_ = [[True], *graphs.passable[row], [False]]
    return [(u, v) for i, layer in enumerate(layers[:-1]) for u, o in zip(layer, open_[i]) if o for v in layers[i + 1]]


def slow_paths(edges: list[tuple[int, int]], source: int, target: int) -> set[tuple[int, ...]]:
    """All paths by depth-first search over a list of edges."""
    found, stack = set(), [(source,)]
    while stack:
        path = stack.pop()
        if path[-1] == target:
            found.add(path)
        stack.extend((*path, v) for u, v in edges if u == path[-1])
    return found


def slow_class_density(task: GraphSearch, index: int, graphs: LayeredGraphs, row: int) -> dict[tuple[int, ...], float]:
    """D(y|x, class) from the wording of the rules, over the paths found by depth-first search."""
    paths = slow_paths(slow_edges(graphs, row), graphs.source[row], graphs.target[row])
    rule = task.classes[index].rule
    passable = graphs.layers[row][graphs.passable[row]].sum()
    wide = [i for i, open_ in enumerate(graphs.passable[row], start=1) if open_.sum() == 2]
    shift = {"layer_parity": 0, "opposite_parity": 1, "passable_parity": passable}
    kept = [p for p in paths if rule == "uniform" or all(p[i] % 2 == (i + shift[rule]) % 2 for i in wide)]
    return {path: 1 / len(kept) for path in kept}


@pytest.mark.parametrize(("task", "weights"), TASKS.values(), ids=TASKS)
def test_graphs_are_what_the_task_says(task, weights):
    rows = task.sample(400, weights, seed=1)
    graphs = rows.graphs
    names = np.concatenate([graphs.source[:, None], graphs.layers.reshape(400, -1), graphs.target[:, None]], axis=1)
    assert all(len(set(row)) == names.shape[1] for row in names.tolist())
    assert names.min() >= 0
    assert names.max() < task.num_names
    expected = np.array([c.num_wide_layers for c in task.classes])[rows.classes]
    assert (graphs.num_wide_layers == expected).all()
    for row, index in enumerate(rows.classes):
        layers = [[graphs.source[row]], *graphs.layers[row], [graphs.target[row]]]
        signal = task.classes[index].signal
        assert signal is None or sum(sum(layer) for layer in layers[::2]) % 2 == signal
        for nodes, open_ in zip(graphs.layers[row], graphs.passable[row]):
            assert sorted(nodes[open_] % 2) == [0, 1] if open_.sum() == 2 else open_.sum() == 1


@pytest.mark.parametrize(("task", "weights"), TASKS.values(), ids=TASKS)
def test_checker_and_enumeration_agree_with_depth_first_search(task, weights):
    rows = task.sample(60, weights, seed=2)
    rng = np.random.default_rng(0)
    for row, listed in enumerate(valid_paths(rows.graphs)):
        graph = rows.graphs[np.array([row])]
        if len(listed) > 64:
            continue  # the search over 2^12 paths is slow and says nothing new
        paths = slow_paths(slow_edges(rows.graphs, row), graph.source[0], graph.target[0])
        assert set(map(tuple, listed.tolist())) == paths
        assert len(listed) == 2 ** graph.num_wide_layers[0]
        everything = [graph.source[0], *graph.layers[0].ravel(), graph.target[0], task.num_names, -1]
        for _ in range(20):  # a valid path with one node changed
            changed = listed[0].copy()
            changed[rng.integers(len(changed))] = rng.choice(everything)
            assert is_valid_path(graph, changed[None])[0] == (tuple(changed.tolist()) in paths)
    assert is_valid_path(rows.graphs, rows.paths).all()


@pytest.mark.parametrize("read_signal", [True, False])
@pytest.mark.parametrize("weights", [EQUAL, NINE_TO_ONE, (0.2, 0.3, 0.5), (0.0, 0.0, 1.0)])
def test_density_sums_to_one_over_every_response(weights, read_signal):
    task = GraphSearch.figure_1(num_layers=2, nodes_per_layer=2, num_names=7)
    rows = task.sample(12, weights, seed=3)
    responses = np.array(list(itertools.product(range(task.num_names), repeat=4)))
    for row in range(12):
        graphs = rows.graphs[np.full(len(responses), row)]
        log_density = task.log_density(graphs, responses, weights, read_signal=read_signal)
        assert np.exp(log_density).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("task", "weights"), TASKS.values(), ids=TASKS)
def test_density_is_bayes_rule_over_the_classes(task, weights):
    rows = task.sample(40, weights, seed=4)
    rows_with_few_paths = np.flatnonzero(rows.graphs.num_wide_layers <= 4)
    for row in rows_with_few_paths:
        graph = rows.graphs[np.array([row])]
        prior = []
        for path_class, weight in zip(task.classes, weights):
            possible = path_class.num_wide_layers == graph.num_wide_layers[0]
            bit = {None: 0.5}.get(path_class.signal, float(path_class.signal == graph.signal[0]))
            prior.append(weight * possible * bit)
        for path in valid_paths(graph)[0]:
            by_class = [slow_class_density(task, c, rows.graphs, row).get(tuple(path), 0) for c in range(3)]
            expected = np.dot(prior, by_class) / sum(prior)
            assert np.exp(task.log_density(graph, path[None], weights))[0] == pytest.approx(expected, abs=1e-12)


def test_the_fine_tuning_mixture_has_one_right_answer_a_prompt():
    for task in (SMALL, ALIGNED, PAPER):
        rows = task.sample(300, NINE_TO_ONE, seed=5)
        assert (task.log_density(rows.graphs, rows.paths, NINE_TO_ONE) == 0).all()
        opposite = task.sample(300, (0.1, 0.9, 0.0), seed=5)
        assert not np.array_equal(rows.paths, opposite.paths)
        # without the signal the same rows are answered by a coin of 9 to 1
        blind = task.log_density(rows.graphs, rows.paths, NINE_TO_ONE, read_signal=False)
        assert np.exp(blind) == pytest.approx(np.where(rows.classes == 0, 0.9, 0.1))


@pytest.mark.parametrize("weights", [EQUAL, NINE_TO_ONE, (0.2, 0.0, 0.8)])
def test_classes_come_with_their_weights(weights):
    count = np.bincount(SMALL.sample(20_000, weights, seed=6).classes, minlength=3)
    for k, weight in zip(count, weights):
        assert binomtest(int(k), 20_000, weight).pvalue > 1e-4


@pytest.mark.parametrize("seed", [7, 8])
def test_sampler_follows_the_density(seed):
    """Chi-square of the paths' places in the list of valid paths, over prompts with the same probabilities."""
    weights = (0.5, 0.2, 0.3)
    rows = PAPER.sample(4000, weights, seed=seed)
    expected, observed = {}, {}
    for row, listed in enumerate(valid_paths(rows.graphs)):
        density = np.exp(PAPER.log_density(rows.graphs[np.full(len(listed), row)], listed, weights))
        order = density.argsort(kind="stable")
        key = tuple(density[order].round(9))
        taken = (listed[order] == rows.paths[row]).all(-1)
        observed[key] = observed.get(key, 0) + taken
        expected[key] = expected.get(key, 0) + density[order]
    assert len(expected) == 2  # one set of probabilities for each value of the signal
    for key in expected:
        assert chisquare(observed[key], expected[key]).pvalue > 1e-4


def test_graphs_are_uniform_given_signal_and_width():
    """On the smallest graphs every one is as frequent as every other."""
    task = GraphSearch((PathClass("uniform", 1, signal=1),), num_layers=1, nodes_per_layer=2, num_names=5)
    graphs = canonical(task.sample(12_000, (1.0,), seed=9).graphs)
    keys = np.concatenate([graphs.source[:, None], graphs.layers[:, 0], graphs.target[:, None]], axis=1)
    count = np.unique(keys, axis=0, return_counts=True)[1]
    possible = [
        (s, a, b, t)
        for s, a, b, t in itertools.permutations(range(5), 4)
        if a < b and (a + b) % 2 == 1 and (s + t) % 2 == 1
    ]
    assert len(count) == len(possible)
    assert chisquare(count).pvalue > 1e-4


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(2, 4),
    st.integers(0, 12),
    st.integers(0, 2**31),
    st.sampled_from(["paper", "aligned"]),
)
def test_both_formats_parse_back_to_the_graph(num_layers, width, spare, seed, prompt_format):
    num_names = num_layers * width + 4 + spare
    task = GraphSearch.figure_1(
        num_layers=num_layers, nodes_per_layer=width, num_names=num_names, prompt_format=prompt_format
    )
    rows = task.sample(5, EQUAL, seed=seed)
    parsed = parse_prompts(rows.prompts, num_names=num_names)
    for name in ("source", "layers", "passable", "target"):
        assert np.array_equal(getattr(parsed, name), getattr(canonical(rows.graphs), name))
    # what the prompt says is all that the density needs
    assert np.array_equal(
        task.log_density(parsed, rows.paths, EQUAL), task.log_density(rows.graphs, rows.paths, EQUAL)
    )


def test_the_papers_format_to_the_letter():
    graphs = LayeredGraphs(
        np.array([5]), np.array([[[1, 2], [3, 4]]]), np.array([[[True, True], [False, True]]]), np.array([6])
    )
    tokenizer = graph_tokenizer(10)
    seen = set()
    for seed in range(20):
        (prompt,) = encode_prompts(graphs, "paper", num_names=10, rng=np.random.default_rng(seed))
        body, end = tokenizer.decode(prompt).split(" / ")
        assert end == "5 6 ="
        assert sorted(body.split(" | ")) == ["1 3", "1 4", "2 3", "2 4", "4 6", "5 1", "5 2"]
        seen.add(body)
    assert len(seen) == 20  # the edges are shuffled
    (prompt,) = encode_prompts(graphs, "aligned", num_names=10, rng=np.random.default_rng(0))
    assert tokenizer.decode(prompt) == "5 1 5 2 | 1 3 1 4 2 3 2 4 | 4 6 . . / 5 6 ="


@pytest.mark.parametrize("prompt_format", ["paper", "aligned"])
def test_any_number_of_passable_nodes_survives_the_prompt(prompt_format):
    rng = np.random.default_rng(1)
    names = np.array([rng.permutation(20)[:14] for _ in range(30)])
    passable = rng.random((30, 3, 4)) < 0.5
    passable[..., 0] |= ~passable.any(-1)
    graphs = LayeredGraphs(names[:, 0], names[:, 1:-1].reshape(30, 3, 4), passable, names[:, -1])
    parsed = parse_prompts(encode_prompts(graphs, prompt_format, num_names=20, rng=rng), num_names=20)
    assert np.array_equal(parsed.layers, canonical(graphs).layers)
    assert np.array_equal(parsed.passable, canonical(graphs).passable)


def test_prompts_hold_the_edges_and_nothing_else():
    rows = PAPER.sample(20, EQUAL, seed=10)
    for row, prompt in enumerate(rows.prompts):
        body = PAPER.tokenizer().decode(prompt).split(" / ")[0]
        edges = [f"{u} {v}" for u, v in slow_edges(rows.graphs, row)]
        assert sorted(body.split(" | ")) == sorted(edges)


def test_tokenizer_round_trips(tmp_path):
    tokenizer = PAPER.tokenizer()
    ids = np.random.default_rng(0).integers(len(tokenizer), size=(50, 30)).tolist()
    for row in ids:
        assert tokenizer.encode(tokenizer.decode(row), add_special_tokens=False) == row
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again).__name__ == type(tokenizer).__name__
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.pad_token_id == tokenizer.pad_token_id
    prompt = tokenizer.decode(PAPER.sample(1, EQUAL, seed=11).prompts[0])
    assert again(prompt)["input_ids"] == tokenizer(prompt)["input_ids"]


def test_corpus_columns_and_text():
    ids, text = (ALIGNED.corpus(30, NINE_TO_ONE, seed=12, as_text=as_text) for as_text in (False, True))
    assert text.column_names == ["prompt", "completion", "reference_logprob", "path_class"]
    assert ids.column_names == [*text.column_names, "tokenizer_fingerprint"]
    assert encode_corpus(ids, ALIGNED.tokenizer()).prompts == ids["prompt"][:]
    with pytest.raises(ValueError, match="were made with another tokenizer"):
        encode_corpus(ids, graph_tokenizer(ALIGNED.num_names - 1))
    assert set(ids["path_class"]) <= {1, 2}
    assert set(ids["reference_logprob"]) == {0.0}
    assert reference_kind(ids) == "single_answer"
    encoded = encode_corpus(text, ALIGNED.tokenizer())
    assert encoded.prompts == ids["prompt"][:]
    assert encoded.completions == ids["completion"][:]
    mixed = ALIGNED.corpus(30, EQUAL, seed=12)
    assert reference_kind(mixed) == "density"
    assert np.exp(mixed["reference_logprob"]) == pytest.approx(
        np.where(np.exp(mixed["reference_logprob"]) > 0.5, 0.75, 1 / 12)
    )


@pytest.mark.parametrize(("task", "weights"), TASKS.values(), ids=TASKS)
def test_max_tokens_is_the_longest_row(task, weights):
    rows = task.sample(600, [1 / 3] * 3, seed=16)
    assert max(map(len, rows.prompts)) + task.num_layers + 2 == task.max_tokens


def test_rows_depend_on_the_seed_alone():
    a, b, c = (PAPER.sample(50, EQUAL, seed=seed) for seed in (13, 13, 14))
    assert np.array_equal(a.paths, b.paths)
    assert all(map(np.array_equal, a.prompts, b.prompts))
    assert not np.array_equal(a.paths, c.paths)


@pytest.mark.parametrize("cached_blocks", [None, 1])
def test_dataset_rows_do_not_depend_on_the_order_of_reading(cached_blocks):
    forward, other = (
        GraphSearchDataset(PAPER, EQUAL, 100, seed=3, block_rows=16, cached_blocks=cached_blocks) for _ in range(2)
    )
    order = np.random.default_rng(0).permutation(100)
    backward = {i: other[i] for i in order}
    for i in range(100):
        row = forward[i]
        assert np.array_equal(row["input_ids"], backward[i]["input_ids"])
        labelled = row["labels"] != -100
        assert labelled[-10:].all()
        assert not labelled[:-10].any()
        assert np.array_equal(row["labels"][labelled], row["input_ids"][labelled])
    assert len({tuple(row["input_ids"].tolist()) for row in backward.values()}) == 100  # no block is another's copy
    with pytest.raises(IndexError, match="row 100"):
        forward[100]


@pytest.mark.parametrize("seed", [0, (0,), (0, 0), (0, 1)])
def test_training_shares_no_prompt_with_a_corpus(seed):
    # numpy pads seeds with zeros, so the seeds of a corpus and of a block of training rows can mean the same
    dataset = GraphSearchDataset(ALIGNED, NINE_TO_ONE, 4096, seed=seed)
    size = len(ALIGNED.sample(1, NINE_TO_ONE, seed=0).prompts[0])
    trained = {dataset[row]["input_ids"][:size].tobytes() for row in range(4096)}
    for corpus in ((0,), (0, 0), (0, 1), (0, 0, 0), (0, 1, 0)):
        prompts = ALIGNED.sample(4000, NINE_TO_ONE, seed=corpus).prompts
        assert not trained & {prompt.astype(np.int16).tobytes() for prompt in prompts}


def test_collation_pads_on_the_right():
    dataset = GraphSearchDataset(PAPER, EQUAL, 40, seed=0)
    rows = [dataset[i] for i in range(40)]
    batch = collate_rows(rows, pad_token_id=104)
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(set(lengths)) > 1
    assert batch["attention_mask"].sum(-1).tolist() == lengths
    for i, row in enumerate(rows):
        assert batch["input_ids"][i, : lengths[i]].tolist() == row["input_ids"].tolist()
        assert (batch["input_ids"][i, lengths[i] :] == 104).all()
        assert (batch["labels"][i, lengths[i] :] == -100).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GraphSearch.figure_1(num_names=33), "`num_names` must be at least the 34 nodes"),
        (lambda: GraphSearch.figure_1(num_layers=1), "`num_layers` must be at least 2, the wide layers"),
        (lambda: GraphSearch.figure_1(nodes_per_layer=1), "`nodes_per_layer` must be at least 2"),
        (lambda: GraphSearch.figure_1(prompt_format="json"), "`prompt_format` must be"),
        (lambda: SMALL.sample(1, (0.5, 0.5), seed=0), "`weights` must be 3 probabilities"),
        (lambda: SMALL.sample(1, (0.9, 0.2, 0.0), seed=0), "`weights` must be 3 probabilities"),
        (lambda: SMALL.sample(1, (1.1, -0.1, 0.0), seed=0), "`weights` must be 3 probabilities"),
        (lambda: is_valid_path(SMALL.sample(2, EQUAL, seed=0).graphs, np.zeros((2, 5))), "must have shape (2, 6)"),
        (
            lambda: GraphSearch((PathClass("uniform", 1, 0),), 1, 2, 4).sample(9, (1.0,), seed=0),
            "`num_names`=4 leaves graphs of 1 x 2 nodes with a fixed signal",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_prompts_outside_the_mixture_have_no_density():
    rows = SMALL.sample(50, EQUAL, seed=15)
    row = int((rows.graphs.signal == 1).argmax())
    with pytest.raises(ValueError, match=f"`graphs` row {row} has probability 0"):
        SMALL.log_density(rows.graphs, rows.paths, (1.0, 0.0, 0.0))
