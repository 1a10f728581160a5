"""Options that several commands share, how dataclasses become options, and `--config`, which gives any from a file."""

import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
import yaml

from hf_coverage.commands.console import printing
from hf_coverage.functional.checks import check_n
from hf_coverage.inference.folder_lock import folder_lock
from hf_coverage.inference.loading import ModelOptions, ServedOptions, changed_settings, is_served, join_job
from hf_coverage.report.provenance import running_command

__all__ = [
    "DEFAULT_N",
    "AppendEos",
    "BatchSize",
    "BatchTokens",
    "ConfigFile",
    "CorpusName",
    "CorpusOptions",
    "Levels",
    "Regret",
    "Revisions",
    "RowOptions",
    "Seed",
    "Sources",
    "Split",
    "Stratified",
    "TopK",
    "TopP",
    "command_line",
    "output_folder",
    "parse_n",
    "read_config",
    "refuse_at_server",
]

DEFAULT_N = "2,4,8,16"
"""The N that are reported unless others are asked for."""

_MOST = 10**9
"""The largest size that is taken for meant."""

_ROWS = "Rows and columns"

_PANELS = {ModelOptions: "Loading the model", ServedOptions: "Loading the model"}


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a YAML file the defaults of a command's options, which its command line overrides."""
    if path is None or context.resilient_parsing:
        return path
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold `option: value` lines, but holds a {type(values).__name__}.")
    parameters = {parameter.name: parameter for parameter in context.command.params if parameter.name != "config"}
    defaults = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in parameters:
            known = ", ".join(sorted(str(known).replace("_", "-") for known in parameters if known != "help"))
            raise typer.BadParameter(f"{path} has an unknown key `{key}`; `{context.info_name}` knows {known}.")
        if value == "":
            raise typer.BadParameter(f"{path} has nothing for `{key}`: leave the line out, or give it a value.")
        parameter = parameters[name]
        if isinstance(value, dict):  # what a command line gives as JSON
            value = json.dumps(value)
        many = getattr(parameter, "multiple", False) or parameter.nargs == -1
        defaults[name] = [value] if many and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def parse_n(values: list[str] | None, flag: str = "--n") -> tuple[float, ...]:
    """The N of `--n 2,4 --n 5.7` as numbers, whole ones as integers."""
    numbers: list[float] = []
    for text in ",".join(values or [DEFAULT_N]).split(","):
        try:
            number = check_n(float(text))
        except ValueError as error:
            raise typer.BadParameter(
                f"{text.strip()!r} is not an N: give numbers >= 1, such as `{flag} 2,4,8`."
            ) from error
        numbers.append(int(number) if number == int(number) else number)
    return tuple(dict.fromkeys(numbers))


def _n_values(values: list[str] | None) -> Any:
    return list(map(str, parse_n(values)))


def refuse_at_server(loading: ModelOptions, **asked: bool) -> None:
    """Refuse what needs the model itself where `--base-url` leaves it at a server; the names are those of flags."""
    wanted = next((name for name, value in asked.items() if value), None)
    if is_served(loading) and wanted is not None:
        raise typer.BadParameter(
            f"`--{wanted.replace('_', '-')}` needs the model itself, and with `--base-url` it is a server's: leave "
            "either out."
        )


def output_folder(text: str, *, show_default: bool | str = True) -> Any:
    """Describe the folder that a command writes to, as the annotation of its `output_dir`."""
    return typer.Option("--output-dir", "-o", help=text, show_default=show_default)


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=read_config,
        is_eager=True,
        help="YAML file with values for these options; what stands on the command line wins.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors and progress.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, with the lines and the tables, instead of them.")
]
Levels = Annotated[
    list[str] | None,
    typer.Option(
        # torchrun takes `--n` for a prefix of its own options and stops; `-n` passes
        "--n",
        "-n",
        callback=_n_values,
        show_default=DEFAULT_N,
        help="N to report, comma-separated; real numbers.",
    ),
]
Regret = Annotated[
    float, typer.Option(help="Loss of expected reward, in (0, 1), that the Best-of-N budget is computed for.")
]
Sources = Annotated[
    list[str], typer.Argument(help="Score folders, or models where `--corpus` is given.", metavar="SCORES")
]
CorpusName = Annotated[
    str | None, typer.Option("--corpus", help="Reference corpus to score models on first: folder, file or Hub id.")
]
Split = Annotated[str | None, typer.Option(help="Split of a data set that has several.")]
AppendEos = Annotated[
    bool,
    typer.Option("--append-eos", help="End every text response with the EOS token; the same for corpus and models."),
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens computed in one forward pass.")]
Stratified = Annotated[
    bool,
    typer.Option(
        "--stratified",
        help="Where prompts have one right answer: find its exact Pass@N of stratified samples too. Scoring takes "
        "longer.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Responses sampled at once.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Keep the likeliest tokens, renormalised.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this mass, renormalised.")]
Revisions = Annotated[
    str | None,
    typer.Option(help="Pattern of branches and tags, such as 'step*': a checkpoint each, of every Hub id given."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]


@dataclass(frozen=True)
class RowOptions:
    """Which rows of a data set are read, and which of their columns.

    Attributes:
        split: Of a data set that has several.
        prompt_column: Column of prompts; None for what is usual.
        completion_column: Column of responses; None for what is usual.
        answer_column: Column of single right answers.
        limit: How many rows of the data are used.
        shuffle_seed: Seed of the order that they are taken in; None for theirs.
    """

    split: Split = None
    prompt_column: Annotated[
        str | None,
        typer.Option(help="Column of prompts; by default `prompt`, or what is usual.", rich_help_panel=_ROWS),
    ] = None
    completion_column: Annotated[
        str | None,
        typer.Option(help="Column of responses; by default `completion`, or what is usual.", rich_help_panel=_ROWS),
    ] = None
    answer_column: Annotated[
        str | None,
        typer.Option(
            help="Column of single right answers: what verifiers compare with (by default `answer`, or else "
            "`completion`); scoring takes it for the response, with D(y|x) = 1.",
            rich_help_panel=_ROWS,
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use that many rows of the data, from its start.", rich_help_panel=_ROWS)
    ] = None
    shuffle_seed: Annotated[
        int | None, typer.Option(min=0, help="Seed to shuffle the rows with first.", rich_help_panel=_ROWS)
    ] = None


@dataclass(frozen=True)
class CorpusOptions(RowOptions):
    """How a reference corpus is read.

    Attributes:
        append_eos: Whether the end-of-sequence token is part of every response.
        group_by: Column whose equal values make rows dependent; None for `document`, or else `prompt`.
    """

    append_eos: AppendEos = False
    group_by: Annotated[
        str | None,
        typer.Option(help="Column whose equal values make rows dependent; by default `document`, or else `prompt`."),
    ] = None

    def key(self) -> dict[str, Any]:
        """What decides which rows are read, as it is written down beside their scores."""
        return changed_settings(self, "split", "append_eos", "group_by")


def _output_dir(*, output_dir: Path | None = None, **options: Any) -> list[Path]:
    return [] if output_dir is None else [output_dir]


def command_line(
    command: Callable[..., None], folders: Callable[..., Sequence[Path]] = _output_dir
) -> Callable[..., None]:
    """A command as typer takes it: each dataclass that it takes becomes an option for every field; and `--config`.

    Numbers are finite, and none but a seed larger than any size that is meant. While the command runs, no other
    process may run one that writes to the same folder.

    Args:
        command: A function of options and arguments in typer's annotations, and of dataclasses. A field's annotation
            is typer's too, or its help stands in its metadata, as transformers' `HfArgumentParser` has it.
        folders: Where the command writes, from its options.

    Returns:
        A function of the options alone, which makes the dataclasses of them and calls the command.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {name: p.annotation for name, p in parameters.items() if is_dataclass(p.annotation)}

    def run(*, config: ConfigFile = None, quiet: Quiet = False, json: AsJson = False, **values: Any) -> None:
        for one in flat:
            _check_number(one, values.get(one.name))
        with printing(quiet=quiet, as_json=json), _locked(folders(**values), values.get("device")):
            for name, group in groups.items():
                values[name] = group(**{one.name: values.pop(one.name) for one in fields(group)})
            command(**values)

    flat: list[inspect.Parameter] = []
    for name, one in parameters.items():
        flat += _field_options(groups[name]) if name in groups else [one.replace(kind=one.KEYWORD_ONLY)]
    own = inspect.signature(run).parameters
    flat += [own[name] for name in ("config", "quiet", "json")]
    spread: Any = wraps(command)(run)
    spread.__signature__ = inspect.Signature(flat)
    return spread


def _check_number(parameter: inspect.Parameter, value: Any) -> None:
    """Refuse what typer's own types let pass: NaN and infinities, and sizes that are typing errors."""
    flag = f"--{parameter.name.replace('_', '-')}"
    if isinstance(value, float) and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number: give one, or leave it out.", param_hint=flag)
    if type(value) is int and value > _MOST and parameter.name not in ("seed", "shuffle_seed"):
        text = f"{value:,} is taken for a typing error: give at most {_MOST:,}."
        raise typer.BadParameter(text, param_hint=flag)


@contextmanager
def _locked(folders: Sequence[Path], device: str | None) -> Iterator[None]:
    """Hold folders for a job: its main process does, and what it raises is raised on all processes."""
    with ExitStack() as stack:

        def lock() -> None:
            for folder in dict.fromkeys(map(os.path.realpath, folders)):
                stack.enter_context(folder_lock(folder, running_command()))
            if folders and not os.access(folders[-1], os.W_OK):  # before hours of work for it
                text = (
                    f"{folders[-1]} may not be written to: choose another `--output-dir`, or change its permissions."
                )
                raise PermissionError(text)

        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            lock()
        else:
            from hf_coverage.inference.processes import on_main_process

            join_job(device)
            on_main_process(lock)
        yield


def _field_options(group: Any) -> list[inspect.Parameter]:
    found, annotations = [], get_type_hints(group, include_extras=True)
    for one in fields(group):
        annotation = annotations[one.name]
        if "help" in one.metadata:
            flags = [f"--{one.name.replace('_', '-')}"] if annotation is bool else []  # without a `--no-`
            option = typer.Option(*flags, help=one.metadata["help"], rich_help_panel=_PANELS.get(group))
            annotation = Annotated[annotation, option]
        default = inspect.Parameter.empty if one.default is MISSING else one.default
        found.append(
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return found
