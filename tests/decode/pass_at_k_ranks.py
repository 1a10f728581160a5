"""Pass@k rewards on two processes, groups lying on both."""

import json
import sys
from pathlib import Path

from accelerate import Accelerator, PartialState

from hf_coverage.decode.pass_at_k_reward import PassAtKReward

PROMPTS = ["a", "b", "a", "b", "a", [{"role": "user", "content": "c"}], "b", [{"role": "user", "content": "c"}]]
COMPLETIONS = ["1", "0", "0", "1", ".5", "1", "1", "1"]
MINE = (slice(0, 3), slice(3, 8))


def number(prompts, completions, **columns):
    return [float(completion) for completion in completions]


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    mine = MINE[accelerator.process_index]
    found = PassAtKReward(number, 2)(prompts=PROMPTS[mine], completions=COMPLETIONS[mine])
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads must not outlive the interpreter
