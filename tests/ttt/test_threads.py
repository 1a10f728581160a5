"""Threads that use one model at once: test-time training in one of them is none of the others' business."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_coverage.ttt.generate import ttt_generate
from hf_coverage.ttt.processor import TTTLogitsProcessor
from hf_coverage.ttt.row_networks import row_passes
from tests.ttt.head_reference import tiny_llama

PROMPTS = [[3, 4, 5], [6, 7, 8]]
SETTINGS = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 1}


def with_processor(model, prompt):
    with TTTLogitsProcessor(model, 0.4) as processor:
        return model.generate(torch.tensor([prompt]), logits_processor=[processor], **SETTINGS)


def with_steps_on_the_prompt(model, prompt):
    return model.generate(
        torch.tensor([prompt]), custom_generate=ttt_generate, ttt_lr=0.4, ttt_on_prompt=True, **SETTINGS
    )


def plain(model, prompt):
    return model.generate(torch.tensor([prompt]), logits_to_keep=0, **SETTINGS)


def wait(together):
    together.wait(timeout=20)


@pytest.mark.parametrize(
    "ways",
    [
        (with_processor, with_processor),
        (with_steps_on_the_prompt, with_steps_on_the_prompt),
        (with_steps_on_the_prompt, plain),
    ],
)
def test_heads_follow_what_their_own_thread_wrote(ways):
    model, together = tiny_llama(), threading.Barrier(2)
    expected = [way(model, prompt) for way, prompt in zip(ways, PROMPTS)]
    handle = model.register_forward_hook(lambda *_: wait(together))  # nobody goes on before both have made a pass
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda way, prompt: way(model, prompt), ways, PROMPTS))
    handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_adapters_are_those_of_their_own_thread():
    model, ids, seen = tiny_llama(), torch.tensor([PROMPTS[0]]), []

    def read():
        with torch.no_grad():
            return model(ids).logits

    expected = read()
    with ThreadPoolExecutor(1) as pool:

        def read_elsewhere(module, args):
            if torch.is_grad_enabled():  # a pass with adapters, whose hooks are on
                seen.append(pool.submit(read).result(timeout=20))

        handle = model.model.register_forward_pre_hook(read_elsewhere)
        model.generate(ids, custom_generate=ttt_generate, ttt_lr=0.2, ttt_scope="lora", **SETTINGS)
        handle.remove()
    assert len(seen) >= SETTINGS["max_new_tokens"] - 1
    assert all(torch.equal(logits, expected) for logits in seen)


def test_threads_leave_compilation_as_it_was():
    model, inside, leave, graphs = tiny_llama(), threading.Event(), threading.Event(), []

    def enter():
        with row_passes(model):
            inside.set()
            leave.wait(timeout=20)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with ThreadPoolExecutor(1) as pool:
        with row_passes(model):
            other = pool.submit(enter)
            assert not inside.wait(timeout=0.2)  # it has to wait for its turn
        leave.set()
        other.result(timeout=20)
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert graphs
