"""The command line as a program: its help, its weight, its name."""

import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

import hf_coverage
from tests.commands.shell import invoke

ROOT = Path(hf_coverage.__file__).parents[1]
COMMANDS = ["sample", "score", "profile", "compare", "report"]


def test_help_teaches_and_loads_no_heavy_library():
    done = subprocess.run([sys.executable, "-m", "hf_coverage", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert all(f"hf-coverage {command}" in done.stdout for command in COMMANDS)
    heavy = {"torch", "transformers", "datasets", "matplotlib", "scipy"}
    check = f"import sys, hf_coverage.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_s_help_has_an_example(command):
    assert f"hf-coverage {command} " in invoke(f"{command} --help").replace("\n", " ")


def test_the_version_is_the_package_s():
    assert invoke("--version") == f"hf-coverage {hf_coverage.__version__}\n"


def test_hf_runs_it_as_an_extension(tmp_path):
    extensions = pytest.importorskip("huggingface_hub.cli.extensions")
    name = extensions._get_executable_name("coverage")
    assert f'\n[project.scripts]\n{name} = "hf_coverage.cli:app"\n' in (ROOT / "pyproject.toml").read_text()
    program = tmp_path / name
    program.write_text(f"#!{sys.executable}\nfrom hf_coverage.cli import app\napp()\n")
    program.chmod(0o755)
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / name
    extensions.ExtensionManifest(
        owner="org",
        repo=name,
        repo_id=f"org/{name}",
        short_name="coverage",
        executable_path=str(program),
        type="python",
        installed_at=datetime.now(timezone.utc),
    ).save(folder)
    environment = os.environ | {"HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "coverage", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == f"hf-coverage {hf_coverage.__version__}\n"
