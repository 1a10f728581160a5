"""The profiles of a run's checkpoints: a file `step-<step>.json` each."""

from dataclasses import replace
from pathlib import Path

from hf_coverage import CoverageProfile
from hf_coverage.inference.files import write_atomically

__all__ = ["read_profiles", "step_of", "write_profile"]


def write_profile(profile: CoverageProfile, folder: Path, step: int) -> None:
    """Write a profile under the name of its step, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = replace(profile, name=f"step {step}").to_json()
    write_atomically(folder / f"step-{step}.json", text)


def read_profiles(folder: Path) -> dict[int, CoverageProfile]:
    """Read the profiles of a run, by step and in the order of the steps."""
    files = sorted(folder.glob("step-*.json"), key=step_of)
    return {step_of(file): CoverageProfile.from_json(file) for file in files}


def step_of(path: Path) -> int:
    """Read the step that a checkpoint or a profile is named by."""
    return int(path.stem.rsplit("-", 1)[1])
