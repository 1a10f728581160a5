"""Which of the valid paths does a checkpoint of the small job take? Their mean probabilities, class by class.

    python -m recipes.graph_search.paths runs/graph_search_small/finetune/checkpoint-300

Takes any number of checkpoints.
"""

import sys

import numpy as np
from transformers import GPT2LMHeadModel

from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.loading import load_whole
from hf_coverage.measure.scoring import score_encoded
from hf_coverage.tasks.graph_search import GraphSearch
from hf_coverage.tasks.layered_graphs import valid_paths


def main() -> None:
    task = GraphSearch.figure_1(num_layers=4, nodes_per_layer=2, num_names=24, prompt_format="aligned")
    rows = task.sample(1000, (0.5, 0.5, 0.0), seed=0)
    paths = np.stack(valid_paths(rows.graphs))  # four a graph
    pairs = EncodedCorpus(
        prompts=[prompt.tolist() for prompt in rows.prompts for _ in range(paths.shape[1])],
        completions=paths.reshape(-1, paths.shape[-1]).tolist(),
    )
    right = (paths == rows.paths[:, None]).all(-1)
    # the other class's path takes the other node in both wide layers
    other = (paths != rows.paths[:, None]).sum(-1) == 2
    for checkpoint in sys.argv[1:]:
        model = load_whole(GPT2LMHeadModel, checkpoint)
        p = np.exp(score_encoded(model, pairs).logprob).reshape(right.shape)
        for path_class in (0, 1):
            of_class = rows.classes == path_class
            own, others, mixed = (p[of_class][mask[of_class]].mean() for mask in (right, other, ~right & ~other))
            total = p[of_class].sum(-1).mean()
            print(
                f"{checkpoint}, prompts of class {path_class + 1}: its own path {own:.2f}, "
                f"the other class's {others:.2f}, each mixed one {mixed:.2f}, all four {total:.2f}"
            )


if __name__ == "__main__":
    main()
