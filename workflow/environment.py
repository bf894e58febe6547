"""The environment of the workflow's inner processes, without the settings of other tools.

A user's Snakemake profile, IPython start-up, Jupyter kernels and matplotlib style are theirs, and a
launcher's left-over rank is nobody's: none of them may change what a book says or how it looks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

#: What such variables begin with.
_FOREIGN = (
    "SNAKEMAKE_", "JUPYTER_", "IPYTHON", "MATPLOTLIBRC", "MPL", "PAPERMILL", "SPHINX", "PYTHON",
    "MASTER_", "TORCHELASTIC_",
)  # fmt: skip
_RANKS = {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
#: Where tools look for settings and write what they must: folders of the build's own.
_FOLDERS = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
            "MPLCONFIGDIR", "XDG_CACHE_HOME")  # fmt: skip


def clean(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment for inner processes. folder: holds the tools' own folders, made here."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _RANKS and not name.startswith(_FOREIGN)
    }
    # What was downloaded from the hub and its login stay where the user has them.
    cache = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    kept.setdefault("HF_HOME", os.path.join(cache, "huggingface"))
    for name in _FOLDERS:
        path = folder.absolute() / name.lower()
        path.mkdir(parents=True, exist_ok=True)
        kept[name] = os.fspath(path)
    return kept | {
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel beside this Python, not one of the same name
        "PYTHONUTF8": "1",  # pages and bars hold φ and −, whatever the locale
        # A user id without a name, as in containers, has none to ask the system for.
        "USER": environment.get("USER") or "somebody",
    }
