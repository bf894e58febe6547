"""What a model or a text is by its content, for the keys of what is made from it.

A file counts by its whole SHA-256; a model or dataset of the hub by its commit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from metasae_lib.study import CorpusError, SubjectError
from metasae_lib.study.errors import first_line
from metasae_lib.study.files import cache_folder, content_hash, make_folder, write_json

# What transformers reads of a model's folder: weights, settings, tokenizer, chat template.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_OLD_WEIGHTS = "*.bin"


def folder_hashes(folder: Path, patterns: Sequence[str] = ("*",)) -> dict[str, str]:
    """SHA-256 of every file below a folder that fits one of the patterns, by relative path."""
    paths = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): content_hash(path) for path in sorted(paths)}


def model_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a model's folder that make the model what it is."""
    return folder_hashes(folder, [*_MODEL_FILES, _OLD_WEIGHTS])


def hub_commit(kind: Literal["model", "dataset"], name: str) -> str:
    """The commit that `owner/name[@revision]` stands for on this machine.

    Asked of the hub once and recorded in the cache, so that a run goes on from what it began with,
    also without a network, and whatever was uploaded since. Raises `SubjectError` or
    `CorpusError`.
    """
    name, _, revision = name.partition("@")
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    folder = cache_folder() / "revisions"
    record = folder / f"{kind}--{'--'.join([*name.split('/'), revision or 'main'])}.json"
    if not record.exists():
        from huggingface_hub import HfApi

        try:
            found = HfApi().repo_info(name, repo_type=kind, revision=revision or None).sha
        except Exception as error:  # the hub's many ways to fail
            refused = SubjectError if kind == "model" else CorpusError
            raise refused(
                f"the hub's {kind} {name} could not be reached ({type(error).__name__}: "
                f"{first_line(error)}): check the name, the network, and HF_TOKEN for a gated one, "
                f"or give a local copy"
            ) from error
        make_folder(folder)
        write_json(record, {"commit": found})
    return str(json.loads(record.read_text(encoding="utf-8"))["commit"])


def hub_model(name: str) -> str:
    """Folder of a hub model, downloaded at its commit. Raises `SubjectError`."""
    from huggingface_hub import snapshot_download

    commit, bare = hub_commit("model", name), name.partition("@")[0]
    try:
        folder = snapshot_download(bare, revision=commit, allow_patterns=list(_MODEL_FILES))
        if not list(Path(folder).glob("*.safetensors")):
            snapshot_download(bare, revision=commit, allow_patterns=[_OLD_WEIGHTS])
    except Exception as error:  # the hub, the network and the disk
        raise SubjectError(
            f"the hub model {name} could not be downloaded ({type(error).__name__}: "
            f"{first_line(error)}): check the network, the disk, and for a gated one its terms and "
            f"HF_TOKEN, and run again; what came is kept"
        ) from error
    return folder
