"""Verifiers that misbehave, each where the response says how; a light module, since the worker imports it."""

import os
import re
import subprocess
import sys
import time

import numpy as np

ANSWERS = {
    "good": [1.0],
    "half": [np.float32(0.5)],
    "array": np.array([1.0]),
    "true": [True],
    "none": [None],
    "nan": [float("nan")],
    "inf": [float("-inf")],
    "huge": [10**400],
    "str": ["1"],
    "nested": [[1.0]],
    "scalar": 1.0,
    "nothing": None,
    "two": [1.0, 1.0],
    "empty": [],
}
EXPECTED = {
    "good": 1.0,
    "half": 0.5,
    "array": 1.0,
    "true": 1.0,
    "none": "returned None",
    "nan": "returned nan",
    "inf": "returned -inf",
    "huge": "returned inf",
    "str": "returned str",
    "nested": "returned list",
    "scalar": "returned float instead of a list",
    "nothing": "returned None instead of a list",
    "two": "returned 2 rewards for 1",
    "empty": "returned 0 rewards for 1",
    "raise": "raised KeyError",
    "quit": "raised SystemExit",
    "print": 1.0,
    "input": "raised EOFError",
}
DEADLY = {
    "loop": "timed out",
    "sleep": "timed out",
    "backtrack": "timed out",  # holds the interpreter's lock: no thread could stop it
    "children": "timed out",
    "exit": "ended its process",
}


def misbehave(completions, **columns):
    (response,) = completions
    if response == "raise":
        raise KeyError("no such thing")
    if response == "quit":
        sys.exit(3)
    if response == "print":
        print('{"reward": 0.0}', flush=True)
        return [1.0]
    if response == "input":
        return [float(input())]
    if response == "loop":
        while True:
            pass
    if response == "sleep":
        time.sleep(1000)
    if response == "backtrack":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "children":
        child = subprocess.Popen(["sleep", "1000"])
        with open(columns["path"][0], "w", encoding="utf-8") as file:
            file.write(str(child.pid))
        child.wait()
    if response == "exit":
        os._exit(7)
    return ANSWERS[response]


def pid_then_hang(completions, path):
    with open(path[0], "w", encoding="utf-8") as file:
        file.write(str(os.getpid()))
    time.sleep(1000)
    return [0.0]


async def coroutine(completions, **columns):
    return [float(len(text)) for text in completions]


def share_of_even(completions, level):
    """Raises for long responses to one prompt, so that there is an error to keep."""
    if level[0] == 3 and len(completions[0]) > 3:
        raise ValueError("too long")
    return [sum(token % 2 == 0 for token in response) / len(response) for response in completions]


def leave_a_child(completions, path, escapes):
    """Die, and leave a grandchild that holds the pipes of this process open for as long as it lives."""
    if completions[0] == "good":
        return [1.0]
    if os.fork() == 0:
        if escapes[0]:
            os.setsid()
        if os.fork() == 0:
            with open(path[0], "w", encoding="utf-8") as file:
                file.write(str(os.getpid()))
            time.sleep(1000)
        os._exit(0)
    while not (os.path.exists(path[0]) and os.path.getsize(path[0])):
        time.sleep(0.01)
    if completions[0] == "die":
        os._exit(7)
    if completions[0] == "hang":
        time.sleep(1000)
    return [0.5]
