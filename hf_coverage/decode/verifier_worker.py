"""The process that a verifier runs in, which may be killed at any moment.

`python -m hf_coverage.decode.verifier_worker` reads from its standard input what to run and where, then one response
a line, in base64, and answers each line with one of JSON. Responses are pickled, since JSON has no tuples, integer
keys, bytes or dates; a verifier's answer is not, since a pickle can run what it likes where it is read.
"""

import base64
import ctypes
import json
import os
import pickle
import signal
import sys
from typing import Any, TextIO

import dill

from hf_coverage.decode.verifier_calls import judge

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer requests until there are no more."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What the verifier prints must not pass for a reply, and it must not read a request.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if sys.platform == "linux":  # a verifier that hangs does not outlive a run that was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    start = json.loads(base64.b64decode(requests.readline()))
    os.chdir(start["folder"])
    sys.path[:] = start["path"]
    try:
        verifier = dill.loads(base64.b64decode(start["verifier"]))
    except Exception as error:  # told to the run, which stops with it
        _reply(replies, {"failed": f"{type(error).__name__}: {error}"})
        return
    _reply(replies, {"ready": True})
    for line in requests:
        (verdict,) = judge(verifier, pickle.loads(base64.b64decode(line)), 1)
        _reply(replies, verdict._asdict())


def _reply(replies: TextIO, content: dict[str, Any]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
