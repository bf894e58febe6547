"""Other tools' settings, and accounts of every kind: neither changes what a run gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from metasae_lib.study.errors import ArtefactError
from metasae_lib.study.files import atomic_write, cache_folder

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "workflow"))

import build  # noqa: E402
from environment import clean  # noqa: E402

NOTEBOOK = """\
# %% [markdown]
# # A page

# %% tags=["parameters"]
profile = "tiny"
overrides = {}
runs_dir = "../runs"

# %%
import os
import sys
import pandas as pd
import matplotlib
from metasae_lib import Profile
from metasae_lib.show import figures
from metasae_lib.subject.model import compute_device
from metasae_lib.study import distributed

# %%
"shown by IPython alone"
print(sys.prefix, os.environ.get("WORLD_SIZE"), distributed.world_size(), __debug__)
compute_device(Profile.load(profile))

# %%
figures.time_spent(pd.DataFrame({"stage": ["a_b"], "seconds": [1.0]}))
"""


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """An environment in which everything is set otherwise."""
    home = tmp_path / "home"
    ipython = home / ".ipython" / "profile_default"
    (ipython / "startup").mkdir(parents=True)
    (ipython / "ipython_config.py").write_text(
        "get_config().InteractiveShell.ast_node_interactivity = 'all'\n"
    )
    (ipython / "startup" / "00.py").write_text("raise SystemExit('the user's own start-up')\n")
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        '{"argv": ["false"], "display_name": "no", "language": "x"}'
    )
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 31\n")
    (home / ".config" / "snakemake" / "mine").mkdir(parents=True)
    (home / ".config" / "snakemake" / "mine" / "config.yaml").write_text("dry-run: true\n")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "pandas.py").write_text("raise ImportError('not this one')\n")
    return os.environ | {
        "HOME": str(home), "JUPYTER_PATH": str(tmp_path / "jupyter"),
        "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"), "MPLBACKEND": "no.such.backend",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "SNAKEMAKE_PROFILE": "mine",
        "PYTHONPATH": str(tmp_path / "modules"), "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "1",
        "WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "MASTER_ADDR": "192.0.2.1",
        "METASAE_CACHE": str(cache_folder()),
    }  # fmt: skip


def outputs(folder: Path, environment: dict[str, str]) -> list[object]:
    """What the notebook's cells give in an environment: texts, and pictures whole."""
    (folder / "notebooks").mkdir(parents=True)
    source = folder / "notebooks" / "01_page.py"
    source.write_text(NOTEBOOK)
    subprocess.run(
        [sys.executable, "workflow/execute.py", "tiny", source, "--runs", folder / "runs"],
        cwd=REPOSITORY, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    made = nbformat.read(folder / "runs" / "tiny" / "notebooks" / "01_page.ipynb", as_version=4)
    return [
        (output.get("text"), output.get("data", {}).get("text/plain", "").split(" at 0x")[0],
         output.get("data", {}).get("image/png"))
        for cell in made.cells if cell.cell_type == "code" for output in cell.outputs
    ]  # fmt: skip


def test_other_tools_settings_change_nothing(hostile: dict[str, str], tmp_path: Path) -> None:
    plain = clean({k: v for k, v in os.environ.items()}, tmp_path / "plain-settings")
    expected = outputs(tmp_path / "plain", plain)
    found = outputs(tmp_path / "hostile", clean(hostile, tmp_path / "settings"))
    assert found == expected and len(expected) == 3
    assert f"{sys.prefix} None 1 True" in str(expected[0])


@pytest.mark.parametrize("own", [{}, {"XDG_CACHE_HOME": "/its/own"}, {"HF_HOME": "/its/hub"}])
def test_the_hubs_downloads_and_login_stay_where_they_are(
    own: dict[str, str], tmp_path: Path
) -> None:
    user = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "XDG_CACHE_HOME")} | own
    asked = "from huggingface_hub import constants as c; print(c.HF_HUB_CACHE, c.HF_TOKEN_PATH)"
    places = [
        subprocess.run([sys.executable, "-c", asked], env=environment, check=True,
                       capture_output=True, text=True).stdout
        for environment in (user, clean(user, tmp_path))
    ]  # fmt: skip
    assert places[0] == places[1]


def test_snakemake_reads_no_profile_of_the_user(hostile: dict[str, str], tmp_path: Path) -> None:
    """The user's would only be shown what would run, and say that all is well."""
    command = [*build.command(["tiny"], str(tmp_path)), "--list-rules"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=clean(hostile, tmp_path / "settings"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "notebook" in done.stdout + done.stderr


def test_snakemake_says_what_it_lacks(tmp_path: Path) -> None:
    done = subprocess.run(
        build.command(["nosuch"], str(tmp_path)), cwd=REPOSITORY, capture_output=True, text=True,
        check=False, env=clean(os.environ, tmp_path / "settings"),
    )  # fmt: skip
    assert done.returncode and "there is no profile 'nosuch'" in done.stdout + done.stderr


def test_no_book_is_never_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "REPOSITORY", tmp_path)
    monkeypatch.setattr(build, "command", lambda *_: ["true"])
    monkeypatch.setattr(sys, "argv", ["build.py", "tiny", "--output", str(tmp_path)])
    (tmp_path / "profiles").symlink_to(REPOSITORY / "profiles")
    assert build.main() == 1
    said = capsys.readouterr()
    assert "No book was made" in said.err and "ready" not in said.out


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("home", ["/nonexistent", None])
def test_an_account_without_a_home_or_a_name(home: str | None, tmp_path: Path) -> None:
    """In a locale without UTF-8, as a user id that has no name: it works, or says what to do."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0",
                   "PYTHONUTF8": "0"} | ({"HOME": home} if home else {})  # fmt: skip
    tmp_path.chmod(0o777)

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["setpriv", "--reuid", "54321", "--clear-groups", sys.executable, *arguments],
            cwd=REPOSITORY, env=environment | more, capture_output=True, encoding="utf-8",
            check=False,
        )  # fmt: skip

    if run("-c", "import numpy").returncode:
        pytest.skip("another user cannot read this Python")
    drawn = run(
        "-c",
        "from metasae_lib.show import figures; import pandas as pd;"
        "figures.time_spent(pd.DataFrame({'stage': ['a'], 'seconds': [1.0]}))._repr_png_()",
    )
    assert drawn.returncode == 0, drawn.stderr
    assert run("-m", "metasae_lib", "plan", "tiny").returncode == 0
    fetched = run("-m", "metasae_lib", "fetch", "tiny")
    assert fetched.returncode == 2 and "METASAE_CACHE" in fetched.stderr
    assert fetched.stderr.count("\n") == 1
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    trained = run("-m", "metasae_lib", "train", "tiny", "--runs-dir", str(closed))
    assert trained.returncode == 2 and "choose a folder of yours" in trained.stderr
    assert trained.stderr.count("\n") == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    tmp_path.chmod(0o755)
    child = os.fork()
    if not child:
        os.setuid(54321)
        try:
            with atomic_write(path) as temporary:
                temporary.write_text("x")
        except ArtefactError as error:
            os._exit(0 if "another user's" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
