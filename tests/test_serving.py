"""The script that starts the paper's judge, against the parser of the vLLM that it names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "serve_qwen.sh"
# What vLLM's parser imports and our environment lacks; the rest of its requirements is CUDA.
BESIDE = (
    "aiohappyeyeballs", "aiohttp", "aiosignal", "apache-tvm-ffi", "cachetools", "cbor2",
    "cloudpickle", "fastapi", "frozenlist", "llguidance", "msgspec", "multidict", "openai_harmony",
    "partial_json_parser", "propcache", "py-cpuinfo", "pybase64", "starlette", "uvloop",
    "xgrammar", "yarl",
)  # fmt: skip
# Stands where the script expects vLLM's own command, and says what vLLM makes of its arguments.
COMMAND = """#!{python}
import json, os, sys
os.environ["VLLM_PLUGINS"] = ""  # TransformerLens has one, which asks for more
sys.path.append({site!r})
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
vllm.platforms._current_platform = CpuPlatform()  # it looks for a GPU else
from vllm.entrypoints.common.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
assert sys.argv[1] == "serve"
found = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[2:]))
plain = str | int | float
print(json.dumps({{key: value for key, value in found.items() if isinstance(value, plain)}}))
"""


@pytest.fixture(scope="module")
def site() -> Path:
    """vLLM without what it requires, of the version that the script names; made once."""
    version = re.search(r"^VLLM=(\S+)", SCRIPT.read_text(), re.MULTILINE)
    assert version
    folder = REPOSITORY / "_build" / f"vllm-{version[1]}"
    if not (folder / "ready").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
        ]
        done = subprocess.run(
            [*command, f"vllm=={version[1]}", *BESIDE], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"vLLM cannot be had from the package index here: {done.stderr[-200:]}")
        (folder / "ready").touch()
    return folder


def test_vllm_takes_the_arguments_of_the_script(site: Path, tmp_path: Path) -> None:
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(COMMAND.format(python=sys.executable, site=str(site)))
    command.chmod(0o755)
    done = subprocess.run(
        [SCRIPT], env=os.environ | {"ENVIRONMENT": str(tmp_path), "GPUS": "2", "PORT": "8123"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-600:]
    found = json.loads(done.stdout.splitlines()[-1])
    given = {
        "host": "127.0.0.1", "port": 8123, "tensor_parallel_size": 2, "max_model_len": 4096,
        "gpu_memory_utilization": 0.92, "seed": 0, "enable_prefix_caching": True,
    }  # fmt: skip
    assert given.items() <= found.items()
    assert "Qwen/Qwen2.5-72B-Instruct-AWQ" in (found.get("model_tag"), found.get("model"))
