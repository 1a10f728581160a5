"""Score and sample on the ranks of a job that hold one model together, and say what came of it."""

import json
import sys

from datasets import Dataset

from hf_coverage import sample_corpus, score_responses
from hf_coverage.commands.inputs import leave_job
from hf_coverage.inference.loading import ModelOptions, load_model, loading_facts

if __name__ == "__main__":
    model = load_model(sys.argv[1], ModelOptions(tp=True, device="cpu"))
    rows = {"prompt": [[1, 2, 3], [1, 2, 3], [4]], "completion": [[5, 6], [7], [6, 5, 4]]}
    # of few tokens, so that there is more than one batch
    scored = score_responses(model, None, Dataset.from_dict(rows), batch_tokens=4, progress=False)
    drawn = sample_corpus(model, None, [[1, 2, 3], [4]], k=2, max_new_tokens=3, batch_size=2, progress=False)
    found = {"facts": loading_facts(model), "logprob": scored["logprob"][:]}
    found |= {"completion": drawn["completion"][:], "reference": drawn["reference_logprob"][:]}
    print(json.dumps(found), flush=True)
    leave_job()
