"""The command line, `hf-coverage`: also `python -m hf_coverage`, and `hf coverage` where it is installed in `hf`."""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from hf_coverage import __version__
from hf_coverage.commands import (
    best_of_n,
    choose,
    compare,
    profile,
    report,
    sample,
    score,
    suggest,
    tournament,
    tune_ttt,
)
from hf_coverage.commands.console import print_error, print_interrupted
from hf_coverage.commands.inputs import leave_job
from hf_coverage.commands.options import command_line

__all__ = ["app"]

_HELP = """\
Measure whether a language model still covers the good responses.

Best-of-N and reinforcement learning amplify only what a model already samples now and then. Cov_N is the share of \
good responses that are so unlikely that about N samples will miss them. Lower is better.
"""

_STEPS = """\
[bold]From nothing to a report[/]

hf-coverage sample prompts.jsonl --teacher TEACHER --output-dir corpus

hf-coverage score MODEL corpus --output-dir scores/MODEL

hf-coverage profile scores/MODEL

hf-coverage compare scores/BASE scores/MODEL

hf-coverage report scores/BASE scores/MODEL --card

hf-coverage choose RUN/checkpoint-* --data corpus --samples 16

hf-coverage best-of-n MODEL problems.jsonl --verifier math-verify

hf-coverage suggest MODEL --data corpus --n 16 --steps 1000

hf-coverage tune-ttt MODEL --data corpus --n 16

Exit codes: 0 done, 1 something failed, 2 the command line or the configuration file is wrong.
"""


# How typer ends a command and says that the command line is wrong.
_FRAMEWORK = (typer.Exit, typer.Abort, TyperException)


class _Commands(TyperGroup):
    """Commands whose errors are one line on the standard error and exit code 1, or 130 after an interruption."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, word in pairwise(["", *args]):
            if not word or (word.startswith("--") and word.endswith("=")):  # as an unset variable of a shell leaves it
                flag = next((text.rstrip("=") for text in (word, before) if text.startswith("-")), None)
                what = "an argument is empty" if flag is None else f"`{flag}` is given nothing"
                raise typer.BadParameter(f"{what}: leave it out, or give it a value.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (*_FRAMEWORK, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                raise
            if isinstance(error, KeyboardInterrupt):
                print_interrupted()
                raise typer.Exit(130) from error
            print_error(error)
            raise typer.Exit(1) from error
        finally:
            leave_job()


app = typer.Typer(
    name="hf-coverage",
    cls=_Commands,
    help=_HELP,
    epilog=_STEPS,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-coverage {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _help(command: Callable[..., None]) -> str:
    """A command's documentation with each paragraph on one line, so that the terminal breaks it and not the source."""
    return "\n\n".join(" ".join(text.split()) for text in (command.__doc__ or "").split("\n\n"))


for _command, _examples, *_folders in (
    (sample.sample, sample.EXAMPLES),
    (score.score, score.EXAMPLES),
    (profile.profile, profile.EXAMPLES),
    (compare.compare, compare.EXAMPLES),
    (report.report, report.EXAMPLES),
    (choose.choose, choose.EXAMPLES),
    (tournament.tournament, tournament.EXAMPLES),
    (best_of_n.best_of_n, best_of_n.EXAMPLES, best_of_n.written_folders),
    (suggest.suggest, suggest.EXAMPLES),
    (tune_ttt.tune_ttt, tune_ttt.EXAMPLES),
):
    app.command(help=_help(_command), epilog=_examples)(command_line(_command, *_folders))
