"""A job of two processes that `test_callback_processes.py` starts through torchrun; every check runs on both."""

import sys
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import EarlyStoppingCallback

from hf_coverage.measure.callback import CoverageCallback, CoverageWarning
from tests.measure.callback_runs import (
    StopAt,
    coverage_history,
    make_trainer,
    metrics_by_definition,
    reference_corpus,
    tiny_model,
    token_rows,
    without_times,
)

N = (2, 4)
# An odd number of rows, so that the two processes have unequal shares.
CORPUS = reference_corpus(rows=23)
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "kl", "greater_is_better": False}


def check_values_and_best_model(folder: Path) -> None:
    """Both processes report the same floats, those of the definition, and agree on the best checkpoint."""
    trainer = make_trainer(folder, CoverageCallback(CORPUS, N), learning_rate=0.1, **BEST)
    trainer.train()
    (first, second) = gather_object([without_times(coverage_history(trainer))])
    assert len(first) == 4
    assert first == second
    (first, second) = gather_object([(trainer.state.best_metric, trainer.state.best_model_checkpoint)])
    assert first == second
    assert first[0] == min(entry["eval_kl"] for entry in coverage_history(trainer))
    metrics = trainer.evaluate()
    expected = metrics_by_definition(trainer.model, CORPUS, N)
    assert all(abs(metrics[f"eval_{key}"] - value) < 1e-5 for key, value in expected.items())
    assert metrics["eval_kl"] == trainer.state.best_metric


def check_training_is_not_changed(folder: Path) -> None:
    """With dropout on, the weights of both processes end as they do without the callback."""
    plain = make_trainer(folder / "plain", gradient_accumulation_steps=2)
    plain.train()
    ours = CoverageCallback(CORPUS, N, every_n_steps=1)
    watched = make_trainer(folder / "watched", ours, gradient_accumulation_steps=2)
    watched.train()
    weights = watched.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.model.state_dict().items())


def check_resumption(folder: Path) -> None:
    """A run that is stopped and resumed, its callback rebuilt from the checkpoint, equals an uninterrupted one."""
    settings = {"eval_steps": 1, "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    whole = make_trainer(folder / "whole", CoverageCallback(CORPUS, N, every_n_evals=3), **settings)
    whole.train()
    make_trainer(folder / "parts", CoverageCallback(CORPUS, N, every_n_evals=3), StopAt(5), **settings).train()
    resumed = make_trainer(folder / "parts", CoverageCallback(CORPUS, N, every_n_evals=3), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in coverage_history(resumed)] == [1, 4, 7]
    assert without_times(coverage_history(resumed)) == without_times(coverage_history(whole))
    assert isinstance(resumed.callback_handler.callbacks[0], CoverageCallback)


def check_early_stopping_on_several_datasets(folder: Path) -> None:
    """Both processes stop at the same step."""
    trainer = make_trainer(
        folder,
        EarlyStoppingCallback(early_stopping_patience=1),
        CoverageCallback(CORPUS, N),
        eval_dataset={"code": token_rows(5, seed=6), "prose": token_rows(4, seed=7)},
        learning_rate=0.0,
        **(BEST | {"metric_for_best_model": "eval_prose_kl"}),
    )
    trainer.train()
    assert gather_object([trainer.state.global_step]) == [4, 4]
    assert trainer.evaluate()["eval_code_kl"] == trainer.state.best_metric


def check_warning_comes_from_one_process(folder: Path) -> None:
    """What concerns the whole run is said once."""
    trainer = make_trainer(folder, CoverageCallback(CORPUS, N), **(BEST | {"greater_is_better": True}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    number = sum(warning.category is CoverageWarning for warning in caught)
    assert gather_object([number]) == [1, 0]


def check_sharded_weights(folder: Path) -> None:
    """A model whose weights are parted between the processes is scored like a whole one, and its changes are seen."""
    whole = make_trainer(folder, CoverageCallback(CORPUS, N)).evaluate()
    model = tiny_model()
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    trainer = make_trainer(folder, CoverageCallback(CORPUS, N), model=model)
    metrics = trainer.evaluate()
    assert all(abs(metrics[key] - whole[key]) < 1e-5 for key in ("eval_cov_2", "eval_kl"))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(3.0)
    changed = trainer.evaluate()["eval_kl"]
    assert changed != metrics["eval_kl"]
    (first, second) = gather_object([changed])
    assert first == second


if __name__ == "__main__":
    root = Path(sys.argv[1])
    check_values_and_best_model(root / "best")
    check_training_is_not_changed(root / "unchanged")
    check_resumption(root / "resumed")
    check_early_stopping_on_several_datasets(root / "stopped")
    check_warning_comes_from_one_process(root / "warned")
    check_sharded_weights(root / "sharded")
    state = PartialState()
    assert state.num_processes == 2
    if state.is_main_process:
        (root / "done").touch()
    state.destroy_process_group()
