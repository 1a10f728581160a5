"""Settings of a recipe: a YAML file with a section for each dataclass, and the command line over it."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_coverage.inference.files import write_atomically

__all__ = ["Settings", "parse_section", "read_settings", "refuse_other_settings"]

Settings = dict[str, dict[str, Any]]
"""Values by section and name."""


def read_settings(arguments: Sequence[str], sections: Sequence[str], *, description: str | None) -> Settings:
    """Read `--config file.yaml` and lay `--section.name value` over it; a name alone is of the first section."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the settings.")
    known, rest = parser.parse_known_args(arguments)
    settings: Settings = {name: {} for name in sections}
    settings |= yaml.safe_load(known.config.read_text(encoding="utf-8"))
    while rest:
        flag, values = rest.pop(0), []
        while rest and not rest[0].startswith("--"):
            values.append(yaml.safe_load(rest.pop(0)))
        if not flag.startswith("--") or not values:
            parser.error(f"expected `--section.name value`, got {flag!r}")
        section, _, name = flag.removeprefix("--").rpartition(".")
        settings.setdefault(section or sections[0], {})[name] = values[0] if len(values) == 1 else values
    unknown = sorted(settings.keys() - set(sections))
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}: expected {', '.join(sections)}")
    return settings


def parse_section(kind: type, section: Mapping[str, Any]) -> Any:
    """Turn a section into its dataclass, with the types and the complaints of `HfArgumentParser`."""
    flags: list[str] = []
    for name, value in section.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return HfArgumentParser(kind).parse_args_into_dataclasses(flags, look_for_args_file=False)[0]


def refuse_other_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Keep a run's settings in its folder, and refuse to go on there with others.

    Args:
        output: The run's folder.
        settings: What the results depend on.

    Raises:
        ValueError: when the folder holds a run with other settings.
    """
    file, text = output / "settings.json", json.dumps(settings, indent=2, sort_keys=True)
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    elif json.loads(file.read_text(encoding="utf-8")) != json.loads(text):
        raise ValueError(f"{output} holds a run with other settings (see {file}): choose another `--output_dir`.")
