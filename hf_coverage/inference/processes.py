"""What the processes of a job do together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hf_coverage.inference.folder_lock import folder_lock

__all__ = ["map_over_processes", "on_main_process", "split_over_processes", "writing_to"]

_T = TypeVar("_T")
_R = TypeVar("_R")


def on_main_process(function: Callable[[], _T]) -> _T:
    """Call a function on the main process, and return its value, or raise its error, on all of them.

    Example:
        >>> on_main_process(lambda: 2 + 2)
        4
    """
    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:  # raised below, on every process: the others would wait for ever
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def writing_to(*folders: str | PathLike[str] | None) -> Iterator[None]:
    """Keep other jobs out of folders for as long as a block runs on the processes of this one, see `folder_lock`.

    Args:
        folders: The folders that the main process writes to; None is none.
    """
    with ExitStack() as stack:

        def lock() -> None:
            for folder in folders:
                if folder is not None:
                    stack.enter_context(folder_lock(folder))

        if any(folder is not None for folder in folders):
            on_main_process(lock)
        yield


def split_over_processes(function: Callable[[Sequence[_T]], Iterable[_R]], items: Sequence[_T]) -> list[_R]:
    """Give every process of a job its part of some items, in turn, and every process all results.

    Args:
        function: Makes a result of each of the items that this process has, in their order; there may be none.
        items: The same on every process.

    Returns:
        One result an item, in the order of the items.

    Example:
        >>> split_over_processes(lambda own: [len(word) for word in own], ["a", "list", "of", "words"])
        [1, 4, 2, 5]
    """
    state = PartialState()
    places = range(state.process_index, len(items), state.num_processes)
    own = list(zip(places, function([items[place] for place in places]), strict=True))
    found = dict(gather_object(own))
    return [found[place] for place in range(len(items))]


def map_over_processes(
    function: Callable[[_T], _R],
    items: Sequence[_T],
    *,
    after_round: Callable[[Sequence[_T], _T | None], Any] | None = None,
    together: bool = False,
) -> list[_R]:
    """Call a function with every item, each on one process of a job, and return all results on every process.

    The processes take the items in rounds of one each, so that they can keep pace with one another.

    Args:
        function: What to call.
        items: The same on every process; None is none.
        after_round: Called on every process after each round with the items of all processes in it, and with its own,
            None where there was none left. Here a process reports, and takes part in passes of a sharded model that
            the others have made, which wait for it.
        together: Whether it takes all processes to call the function with an item, as with a model that is split over
            them: then each calls it with every item, and a round has one.

    Returns:
        One result an item, in the order of the items.

    Example:
        >>> map_over_processes(len, ["a", "list"], after_round=lambda together, own: print(together, own))
        ['a'] a
        ['list'] list
        [1, 4]
    """
    size = 1 if together else PartialState().num_processes

    def run(own: Sequence[_T]) -> Iterator[_R]:
        for index, start in enumerate(range(0, len(items), size)):
            mine = own[index] if index < len(own) else None
            if mine is not None:
                yield function(mine)
            if after_round is not None:
                after_round(items[start : start + size], mine)

    return list(run(items)) if together else split_over_processes(lambda own: list(run(own)), items)
