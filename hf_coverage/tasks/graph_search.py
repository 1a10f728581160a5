"""The graph-search task: find a path through a layered graph, with a data distribution whose density is known exactly.

Three classes of prompts share their graphs and differ in the path that answers them. Which class a prompt is of can
be read from it in principle (a parity of half of its numbers) and hardly be learned, so a model has to keep
probability on the answers of every class: a small setting in which cross-entropy falls while coverage gets worse.

References:
    arXiv 2510.15020, Appendix C (Figures 1 and 2).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_coverage.tasks.graph_tokenizer import PromptFormat, encode_prompts, graph_tokenizer
from hf_coverage.tasks.layered_graphs import LayeredGraphs, is_valid_path, sample_graphs

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedTokenizerFast

__all__ = ["GraphSearch", "GraphSearchDataset", "GraphSearchRows", "PathClass", "PathRule", "collate_rows"]

PathRule = Literal["layer_parity", "opposite_parity", "passable_parity", "uniform"]

_Row = dict[str, np.ndarray]

# numpy takes the seeds (0,), (0, 0) and (0, 0, 0) for one: without a last word of its own the first block would share
# rows with a corpus
_TRAINING = 0x7472


@dataclass(frozen=True)
class PathClass:
    """One class of prompts: which graphs it has and which path answers them.

    Args:
        rule: The node to take in a wide layer i (of 1 ... L): `"layer_parity"`: the one with the parity of i;
            `"opposite_parity"`: the other; `"passable_parity"`: the parity of i plus that of the sum of all passable
            nodes; `"uniform"`: either, with probability 1/2 each.
        num_wide_layers: Number of layers with two passable nodes, one even and one odd.
        signal: The class's bit, which its graphs carry as [`LayeredGraphs.signal`]; `None`: a fair coin.
    """

    rule: PathRule
    num_wide_layers: int
    signal: int | None = None


@dataclass(frozen=True)
class GraphSearchRows:
    """Sampled rows of the task.

    Args:
        graphs: B graphs.
        classes: `(B,)` indices of the rows' classes, counted from 0.
        prompts: B arrays of token ids.
        paths: `(B, L + 2)` the responses: token ids, which are the names of the nodes.
    """

    graphs: LayeredGraphs
    classes: np.ndarray
    prompts: list[np.ndarray]
    paths: np.ndarray


@dataclass(frozen=True)
class GraphSearch:
    """The task: a distribution over prompts and paths for every mixture of its classes.

    Mixtures are given as weights, one a class. D(y|x) is exact: the classes are weighted by what the prompt says of
    them (the number of wide layers and the signal), by Bayes' rule. On a mixture of classes 1 and 2 of Figure 1 the
    prompt decides the class, so D(y|x) is 0 or 1.

    Args:
        classes: The classes of prompts.
        num_layers: L, the layers between source and target.
        nodes_per_layer: W.
        num_names: Nodes are named by distinct integers below this number.
        prompt_format: `"paper"` or `"aligned"`, see [`encode_prompts`].

    Raises:
        ValueError: When the sizes cannot hold the classes.

    Example:
        >>> task = GraphSearch.figure_1(num_layers=4, nodes_per_layer=2, num_names=24)
        >>> rows = task.sample(1, (0.9, 0.1, 0.0), seed=0)
        >>> tokenizer = task.tokenizer()
        >>> tokenizer.decode(rows.prompts[0])
        '21 15 | 10 8 | 17 10 | 21 8 | 20 3 | 15 23 | 20 13 | 8 23 | 17 21 | 8 20 | 10 15 | 3 16 | 15 20 / 17 16 ='
        >>> tokenizer.decode(rows.paths[0])
        '17 21 8 20 3 16'
        >>> task.log_density(rows.graphs, rows.paths, (0.9, 0.1, 0.0))
        array([0.])

    References:
        arXiv 2510.15020, Appendix C.
    """

    classes: tuple[PathClass, ...]
    num_layers: int = 8
    nodes_per_layer: int = 4
    num_names: int = 100
    prompt_format: PromptFormat = "paper"

    def __post_init__(self) -> None:
        num_nodes, wide = self.num_layers * self.nodes_per_layer + 2, max(c.num_wide_layers for c in self.classes)
        if self.num_names < num_nodes:
            raise ValueError(f"`num_names` must be at least the {num_nodes} nodes of a graph, got {self.num_names}.")
        if wide > self.num_layers:
            raise ValueError(
                f"`num_layers` must be at least {wide}, the wide layers of a class, got {self.num_layers}."
            )
        if self.nodes_per_layer < 2:
            raise ValueError(f"`nodes_per_layer` must be at least 2, got {self.nodes_per_layer}.")
        if self.prompt_format not in ("paper", "aligned"):
            raise ValueError(f'`prompt_format` must be "paper" or "aligned", got {self.prompt_format!r}.')

    @classmethod
    def figure_1(
        cls,
        *,
        num_layers: int = 8,
        nodes_per_layer: int = 4,
        num_names: int = 100,
        num_wide_layers: int = 2,
        prompt_format: PromptFormat = "paper",
    ) -> GraphSearch:
        """The classes 1, 2, 3 of Figure 1: two wide layers; parity of the layer, its opposite, any path.

        Pre-training takes them in equal parts, fine-tuning as (0.9, 0.1, 0). Classes 1 and 2 carry the signals 0 and
        1, class 3 either.
        """
        classes = (
            PathClass("layer_parity", num_wide_layers, signal=0),
            PathClass("opposite_parity", num_wide_layers, signal=1),
            PathClass("uniform", num_wide_layers),
        )
        return cls(classes, num_layers, nodes_per_layer, num_names, prompt_format)

    @classmethod
    def figure_2(
        cls, horizon: int, *, nodes_per_layer: int = 4, num_names: int = 100, prompt_format: PromptFormat = "paper"
    ) -> GraphSearch:
        """The classes of Figure 2 with L = H = `horizon`, mixed as (0.94, 0.05, 0.01).

        One path only; H/2 wide layers and a parity of the passable nodes; four wide layers and any path.
        """
        classes = (
            PathClass("uniform", 0),
            PathClass("passable_parity", horizon // 2),
            PathClass("uniform", 4),
        )
        return cls(classes, horizon, nodes_per_layer, num_names, prompt_format)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt with its path: what a model of the task needs as positions."""
        wide, width = max(c.num_wide_layers for c in self.classes), self.nodes_per_layer
        path = self.num_layers + 2
        if self.prompt_format == "aligned":
            edges = width + 2 * width * (self.num_layers - 1) + 2
            return 2 * edges + self.num_layers + 4 + path
        # a wide last layer adds one edge, any other one adds as many as a layer has nodes
        inner = min(wide, self.num_layers - 1)
        edges = width + width * (self.num_layers - 1 + inner) + 1 + (wide - inner)
        return 3 * edges - 1 + 4 + path

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Build the tokenizer of the prompts and paths."""
        return graph_tokenizer(self.num_names)

    def sample(self, num_rows: int, weights: Sequence[float], *, seed: int | Sequence[int]) -> GraphSearchRows:
        """Draw rows: a class by its weight, a graph of the class, a path by the class's rule.

        Args:
            num_rows: B.
            weights: Probability of each class.
            seed: Seed of numpy's generator: the same rows for the same seed.
        """
        rng = np.random.default_rng(seed)
        classes = rng.choice(len(self.classes), size=num_rows, p=self._checked(weights))
        signals = np.array([-1 if c.signal is None else c.signal for c in self.classes])[classes]
        signals = np.where(signals < 0, rng.integers(2, size=num_rows), signals)
        graphs = sample_graphs(
            np.array([c.num_wide_layers for c in self.classes])[classes],
            signals,
            num_layers=self.num_layers,
            nodes_per_layer=self.nodes_per_layer,
            num_names=self.num_names,
            rng=rng,
        )
        parity = rng.integers(2, size=(num_rows, self.num_layers))
        for index, path_class in enumerate(self.classes):
            if path_class.rule != "uniform":
                rows = classes == index
                parity[rows] = _ruled_parity(path_class.rule, graphs[rows])
        prompts = encode_prompts(graphs, self.prompt_format, num_names=self.num_names, rng=rng)
        return GraphSearchRows(graphs, classes, prompts, graphs.walk(parity))

    def class_posterior(
        self, graphs: LayeredGraphs, weights: Sequence[float], *, read_signal: bool = True
    ) -> np.ndarray:
        """Compute the probability of each class given the prompt.

        Args:
            graphs: B graphs.
            weights: Probability of each class.
            read_signal: `False` keeps the signal from the reader: what a model knows at best that cannot compute it.

        Returns:
            `(B, C)` probabilities.

        Raises:
            ValueError: Naming the first graph that no class of the mixture has.
        """
        likelihood = np.zeros((len(graphs), len(self.classes)))
        for index, (path_class, weight) in enumerate(zip(self.classes, self._checked(weights))):
            chance = 0.5 if path_class.signal is None else (graphs.signal == path_class.signal)
            possible = graphs.num_wide_layers == path_class.num_wide_layers
            likelihood[:, index] = weight * possible * (chance if read_signal else 1.0)
        total = likelihood.sum(-1, keepdims=True)
        if not total.all():
            row = int((total[:, 0] == 0).argmax())
            raise ValueError(
                f"`graphs` row {row} has probability 0 under `weights`={tuple(weights)}: no density there."
            )
        return likelihood / total

    def log_density(
        self, graphs: LayeredGraphs, paths: np.ndarray, weights: Sequence[float], *, read_signal: bool = True
    ) -> np.ndarray:
        """Compute log D(y|x) of whole responses.

        Args:
            graphs: B graphs.
            paths: `(B, L + 2)` responses.
            weights: Probability of each class.
            read_signal: `False` gives the best density without the signal, see [`class_posterior`]; cross-entropy
                under D itself cannot be pressed below the entropy of that one by a model that is blind to the signal.

        Returns:
            `(B,)` nats; -inf for responses that D never gives.

        Raises:
            ValueError: Naming the first graph that no class of the mixture has.
        """
        valid = is_valid_path(graphs, paths)
        density = np.zeros(len(graphs))
        posterior = self.class_posterior(graphs, weights, read_signal=read_signal)
        for path_class, probability in zip(self.classes, posterior.T):
            if path_class.rule == "uniform":
                answer = valid * 0.5**path_class.num_wide_layers
            else:
                answer = (graphs.walk(_ruled_parity(path_class.rule, graphs)) == paths).all(-1)
            density += probability * answer
        with np.errstate(divide="ignore"):
            return np.log(density)

    def corpus(
        self, num_rows: int, weights: Sequence[float], *, seed: int | Sequence[int], as_text: bool = False
    ) -> datasets.Dataset:
        """Draw a reference corpus: `prompt`, `completion`, `reference_logprob` (nats) and `path_class` (from 1).

        Token ids have `tokenizer_fingerprint` beside them, by which they are known to be this task's.

        Args:
            num_rows: Number of rows.
            weights: Probability of each class.
            seed: Seed of the rows.
            as_text: Text in place of token ids.
        """
        import datasets

        from hf_coverage.inference.fingerprint import TOKENIZER_COLUMN, vocabulary_fingerprint

        rows = self.sample(num_rows, weights, seed=seed)
        prompts, completions = [p.tolist() for p in rows.prompts], rows.paths.tolist()
        tokenizer = self.tokenizer()
        known = {} if as_text else {TOKENIZER_COLUMN: [vocabulary_fingerprint(tokenizer)] * num_rows}
        if as_text:
            prompts = tokenizer.batch_decode(prompts)
            completions = [" " + text for text in tokenizer.batch_decode(completions)]
        return datasets.Dataset.from_dict(
            {
                "prompt": prompts,
                "completion": completions,
                "reference_logprob": self.log_density(rows.graphs, rows.paths, weights),
                "path_class": rows.classes + 1,
                **known,
            }
        )

    def _checked(self, weights: Sequence[float]) -> np.ndarray:
        checked = np.asarray(weights, dtype=np.float64)
        if checked.shape != (len(self.classes),) or (checked < 0).any() or not np.isclose(checked.sum(), 1):
            raise ValueError(
                f"`weights` must be {len(self.classes)} probabilities with sum 1, one a class, got {tuple(weights)}."
            )
        return checked / checked.sum()


def _ruled_parity(rule: PathRule, graphs: LayeredGraphs) -> np.ndarray:
    """`(B, L)` parities that a deterministic rule wants in the layers 1 ... L."""
    layer = np.broadcast_to(np.arange(1, graphs.layers.shape[1] + 1), graphs.layers.shape[:2])
    if rule == "layer_parity":
        return layer % 2
    if rule == "opposite_parity":
        return (layer + 1) % 2
    shift = (graphs.layers * graphs.passable).sum(axis=(1, 2))
    return (layer + shift[:, None]) % 2


class GraphSearchDataset:
    """A map-style dataset of token ids and labels, drawn block by block when first read.

    Row i depends on (task, weights, seed, block_rows, i) only, so a resumed run and every process of a distributed
    one see the rows an uninterrupted single process would. They are other rows than a corpus of the same seed holds.
    Only response tokens carry labels.

    Args:
        task: The task.
        weights: Probability of each class.
        num_rows: Number of rows.
        seed: Seed of the rows.
        block_rows: Rows drawn at a time.
        cached_blocks: Blocks kept in memory; `None` keeps all. Two are enough for reading in order.

    Example:
        >>> task = GraphSearch.figure_1(num_layers=4, nodes_per_layer=2, num_names=24, prompt_format="aligned")
        >>> row = GraphSearchDataset(task, (1.0, 0.0, 0.0), num_rows=10_000_000, seed=0)[5_000_000]
        >>> row["input_ids"].shape, int((row["labels"] != -100).sum())
        ((46,), 6)
    """

    def __init__(
        self,
        task: GraphSearch,
        weights: Sequence[float],
        num_rows: int,
        *,
        seed: int | Sequence[int],
        block_rows: int = 4096,
        cached_blocks: int | None = None,
    ) -> None:
        self._task, self._weights, self._num_rows = task, tuple(weights), num_rows
        self._seed = (seed,) if isinstance(seed, int) else tuple(seed)
        self._block_rows, self._cached_blocks = block_rows, cached_blocks
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> _Row:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of a dataset of {self._num_rows} rows")
        block, place = divmod(int(index), self._block_rows)
        tokens, prompt_sizes, sizes = self._block(block)
        ids = tokens[place, : sizes[place]]
        labels = ids.copy()
        labels[: prompt_sizes[place]] = -100
        return {"input_ids": ids, "labels": labels}

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of a block's rows, how many of them are the prompt's, and how many there are."""
        if block not in self._blocks:
            rows = self._task.sample(self._block_rows, self._weights, seed=(*self._seed, block, _TRAINING))
            prompt_sizes = np.array(list(map(len, rows.prompts)))
            # int16 holds every id and keeps the paper's 512,000 prompts within 150 MB
            tokens = np.zeros((self._block_rows, self._task.max_tokens), dtype=np.int16)
            for line, prompt, path in zip(tokens, rows.prompts, rows.paths):
                line[: len(prompt)] = prompt
                line[len(prompt) : len(prompt) + len(path)] = path
            self._blocks[block] = tokens, prompt_sizes, prompt_sizes + rows.paths.shape[1]
            if self._cached_blocks is not None and len(self._blocks) > self._cached_blocks:
                self._blocks.popitem(last=False)
        return self._blocks[block]


def collate_rows(rows: Sequence[_Row], *, pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """Stack rows into a batch of tensors, padded on the right to the longest.

    Args:
        rows: Rows of a [`GraphSearchDataset`].
        pad_token_id: Fills `input_ids`; the padding carries no labels, so any id will do.

    Returns:
        `input_ids`, `labels` and `attention_mask`, each `(B, T)` int64.
    """
    import torch

    fill = {"input_ids": pad_token_id, "labels": -100, "attention_mask": 0}
    length = max(len(row["input_ids"]) for row in rows)
    batch = {key: np.full((len(rows), length), value) for key, value in fill.items()}
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        batch["input_ids"][i, :size], batch["labels"][i, :size] = row["input_ids"], row["labels"]
        batch["attention_mask"][i, :size] = 1
    return {key: torch.from_numpy(value) for key, value in batch.items()}
