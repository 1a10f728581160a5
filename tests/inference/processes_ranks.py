"""Two processes share work, and note in which order they did what; run as torchrun runs them."""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from hf_coverage.inference.processes import map_over_processes, split_over_processes


def main(folder: Path) -> None:
    state, events = PartialState(cpu=True), []

    def square(item: int) -> int:
        events.append(item)
        return item * item

    mapped = map_over_processes(square, range(5), after_round=lambda together, own: events.append([*together, own]))
    split = split_over_processes(lambda own: [(state.process_index, item) for item in own], "abc")
    few = split_over_processes(list, "a")
    facts = {"events": events, "mapped": mapped, "split": split, "few": few, "none": map_over_processes(square, [])}
    (folder / f"{state.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads must not outlive the interpreter
