"""The book's workflow on a real Slurm of one machine, and before an API server of Kubernetes."""

from __future__ import annotations

import base64
import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from metasae_lib import Profile, Run
from metasae_lib.study.files import cache_folder
from metasae_lib.study.kept import agreement
from metasae_lib.study.plan import plan_text

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "workflow"))

import build  # noqa: E402
import cluster  # noqa: E402

EXTRA = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]["cluster"]
VOLUME = "--container-image python:3.11 --kubernetes-persistent-volumes book:/volume"
PAGE = """\
# %% tags=["parameters"]
profile = "tiny"
overrides = {}
runs_dir = "../runs"

# %%
print(profile)
"""
Start = Callable[..., subprocess.Popen[str]]
TRAINS = "--allowed-rules training"  # in the command of a job
# In place of the pages, which other tests make: where they would be made.
SITE = """\
import os
from pathlib import Path

Path("_build/html").mkdir(parents=True, exist_ok=True)
Path("_build/html/index.html").write_text(os.environ.get("SLURM_JOB_ID", "here"))
"""


def options(command: list[str]) -> dict[str, list[str]]:
    """Every option of a command line with what stands behind it."""
    found: dict[str, list[str]] = {}
    for word in command:
        if word.startswith("-"):
            found[word] = []
        elif found:
            found[list(found)[-1]].append(word)
    return found


def test_without_an_executor_the_command_is_as_before(tmp_path: Path) -> None:
    found = options(build.command(["tiny"], str(tmp_path)))
    assert found["--cores"] == ["all"] and found["-m"] == ["snakemake"]
    assert not {"--executor", "--jobs", "--retries", "--latency-wait"} & set(found)


def test_the_command_for_slurm(tmp_path: Path) -> None:
    found = options(build.command(["tiny"], str(tmp_path), "slurm", {}))
    assert found["--executor"] == ["slurm"] and found["--retries"] == ["2"]
    assert found["--slurm-logdir"] == ["_build/slurm"] and "--cores" not in found
    assert "executor=slurm" in found["--config"]


@pytest.mark.parametrize("executor", ["", "slurm", "kubernetes"])
def test_make_hands_the_executor_on(executor: str) -> None:
    """`-o`: as if the environment were new."""
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/ready", "book", "PROFILES=tiny", f"EXECUTOR={executor}"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = (line for line in done.stdout.splitlines() if "workflow/build.py" in line)
    given = line.split("workflow/build.py")[1].split()
    assert given == (["tiny", "--executor", executor] if executor else ["tiny"])


def hours(plan: str) -> float:
    number, unit = re.findall(r"^in all +([\d.,]+) (s|min|h)$", plan, re.M)[0]
    return float(number.replace(",", "")) / {"s": 3600, "min": 60, "h": 1}[unit]


@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2-large", "gemma-2-9b"])
def test_a_job_asks_for_twice_of_what_the_plan_says(name: str) -> None:
    """Read from the plan as it is printed."""
    profile = Profile.load(name)
    plan = plan_text(profile, ["a100"])
    asked = cluster.asked(profile, "03_cooccurrence")
    expected = min(24, max(4, 2 * hours(plan)))
    assert asked["runtime"] == pytest.approx(60 * expected, rel=0.01) and asked["gpu"] == 1
    loaded = re.findall(r"while it is loaded +up to ([\d.]+) GB", plan)[0]
    assert asked["mem_mb"] is not None and asked["mem_mb"] >= max(8000, 2000 * float(loaded))
    drawing = cluster.asked(profile, "07_scorecard")
    assert drawing == {"mem_mb": 8000, "runtime": 240, "gpu": None}


def test_without_a_gpu_the_host_holds_every_arm() -> None:
    profile = Profile.load("gpt2-large", {"device": "cpu"})
    arm = re.findall(r"one arm in training +([\d.]+) GB", plan_text(profile, ["cpu"]))[0]
    asked = cluster.asked(profile, "02_training")
    assert asked["gpu"] is None and asked["mem_mb"] is not None
    assert asked["mem_mb"] > 1000 * float(arm) * len(profile.arms())


def test_a_model_of_unknown_shape_is_given_room() -> None:
    profile = Profile.load("gpt2-large", {"model.source": "hub:some/model"})
    assert profile.shape is None
    asked = cluster.asked(profile, "02_training")
    assert asked == {"mem_mb": 64_000, "runtime": 24 * 60, "gpu": 1}


@pytest.mark.parametrize("executor", ["slurm", "kubernetes"])
def test_a_missing_plugin_is_one_sentence(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["build.py", "tiny", "--executor", executor])
    with pytest.raises(SystemExit, match=r"-m pip install .*'\.\[cluster\]'$"):
        build.main()


def test_without_slurm_nothing_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert str(cluster.missing("slurm", [])).endswith("no sbatch")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This environment's Python with the plugins; if they lack, one on top of it that has them."""
    if all(
        importlib.util.find_spec(f"snakemake_executor_plugin_{e}") for e in ("slurm", "kubernetes")
    ):
        return Path(sys.executable)
    folder = tmp_path_factory.mktemp("plugins")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (top,) = (folder / "lib").glob("python3*/site-packages")
    below = sysconfig.get_paths()["purelib"]
    (top / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    install = subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint",
         REPOSITORY / "requirements.lock", *EXTRA],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if install.returncode:
        pytest.skip(f"the plugins cannot be installed: {install.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "python"


def test_the_plugins_change_no_other_package(python: Path) -> None:
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    found = {entry["name"].lower(): entry["version"] for entry in json.loads(listed.stdout)}
    assert set(EXTRA) <= {f"{name}=={version}" for name, version in found.items()}
    # A new environment brings its own pip and setuptools.
    before = {
        d.name.lower(): d.version for d in distributions() if d.name not in ("pip", "setuptools")
    }
    assert before == {name: found.get(name) for name in before}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's workflow around a `tiny` of two arms, whose pages are not made."""
    folder = tmp_path / "repository"
    shutil.copytree(REPOSITORY / "workflow", folder / "workflow")
    (folder / "workflow" / "book.py").write_text(SITE)
    for name in ("src", "book", "_config.yml", "CITATION.cff"):
        (folder / name).symlink_to(REPOSITORY / name)
    profile = Profile.load("tiny").model_dump()
    profile["text"]["roles"] = {
        "train": 8000, "calibration": 1000, "scan": 2000, "contexts": 1000
    }  # fmt: skip
    profile["evaluation"] |= {"ce_rows": 2, "bootstrap": 10}
    profile["training"] |= {
        "train_tokens": 80_000, "arms": ["solo", "joint"], "seeds": [0], "seeds_frontier": 1,
        "frontier": [], "meta_posthoc": [], "checkpoint_every": 20,
    }  # fmt: skip
    (folder / "profiles").mkdir()
    (folder / "profiles" / "tiny.yml").write_text(yaml.safe_dump(profile))
    (folder / "notebooks").mkdir()
    for name in ("01_penalty", "02_training"):
        (folder / "notebooks" / f"{name}.py").write_text(PAGE)
    return folder


@pytest.fixture
def start(python: Path, copy: Path) -> Iterator[Start]:
    """Starts build.py there with an executor, EXECUTOR_ARGS and more of the environment."""
    started: list[subprocess.Popen[str]] = []

    def start(executor: str, arguments: str, **more: str) -> subprocess.Popen[str]:
        here = {"EXECUTOR_ARGS": arguments, "METASAE_CACHE": str(cache_folder())}
        process = subprocess.Popen(
            [python, "workflow/build.py", "tiny", "--executor", executor], cwd=copy, text=True,
            env=os.environ | here | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a group, and the group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_dry_run_for_kubernetes_shows_its_jobs(start: Start) -> None:
    """It needs the plugin and no cluster."""
    said, _ = start("kubernetes", f"{VOLUME} --dry-run --quiet progress").communicate()
    jobs = {
        (re.findall(r"    output: (?:runs/tiny/)?(\S+)", job) or [""])[0]: job
        for job in re.split(r"\n(?:local)?rule ", said)[1:]
    }
    assert set(jobs) == {
        "logs/training.done", "notebooks/01_penalty.ipynb", "notebooks/02_training.ipynb",
        "_build/html/index.html", "",
    }, said  # fmt: skip
    for name in ("logs/training.done", "notebooks/02_training.ipynb"):
        assert "gpu=1, gpu_manufacturer=nvidia" in jobs[name] and "mem_mb=8000" in jobs[name]
    assert "gpu=" not in jobs["notebooks/01_penalty.ipynb"]
    assert "mem_mb" not in jobs["_build/html/index.html"]  # made here


def test_kubernetes_needs_a_volume_and_an_image(start: Start) -> None:
    said, _ = start("kubernetes", "--container-image=python:3.11").communicate()
    assert "--kubernetes-persistent-volumes in EXECUTOR_ARGS" in said and said.count("\n") == 1


def checkpoints(copy: Path) -> dict[str, int]:
    """Steps of the newest checkpoint of every arm in training."""
    paths = copy.glob("runs/artefacts/arm-state-*/checkpoint-*.safetensors")
    return {path.parent.name: int(path.stem.split("-")[1]) for path in paths}


def wait_for(what: Callable[[], Any], process: subprocess.Popen[Any], seconds: int = 300) -> Any:
    """What a call gives at last; the process that should bring it about must live till then."""
    for _ in range(10 * seconds):
        if found := what():
            return found
        if process.poll() is not None:
            break
        time.sleep(0.1)
    end(process)
    pytest.fail(f"waited in vain:\n{process.communicate()[0]}")


SLURM = """\
# Of tests/test_cluster.py
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[None]:
    """A Slurm with one node, which has more cores and memory than there are, and a GPU in name."""
    if os.getuid() or not shutil.which("apt-get"):
        pytest.skip("a Slurm of its own needs root and Debian's packages")
    if not all(map(shutil.which, PROGRAMS)):
        apt = "apt-get -qq -o DPkg::Lock::Timeout=600"
        install = subprocess.run(
            f"{apt} update && {apt} -y install --no-install-recommends {' '.join(PACKAGES)}",
            shell=True, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if install.returncode:
            pytest.skip(f"Slurm cannot be installed: {install.stderr.strip()[-200:]}")
    # Jobs find the file at this place alone. A machine's own Slurm is left in peace.
    place = Path("/etc/slurm/slurm.conf")
    if place.exists() and not place.read_text().startswith(SLURM.splitlines()[0]):
        pytest.skip("this machine has a Slurm of its own")
    host = os.uname().nodename.split(".")[0]
    (tmp_path / "state").mkdir()
    (tmp_path / "spool").mkdir()
    running: list[subprocess.Popen[bytes]] = []

    def run(*command: str) -> None:
        """A process that ends with the tests, however they end."""
        child = ["setpriv", "--pdeathsig", "TERM", *command]
        running.append(subprocess.Popen(child, stderr=subprocess.DEVNULL, start_new_session=True))

    with open("/run/lock/metasae-slurm", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # there are ports for one Slurm
        place.write_text(SLURM.format(host=host, folder=tmp_path))
        place.with_name("gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null\n")
        try:
            if not said("munge", "-n"):
                Path("/run/munge").mkdir(exist_ok=True)
                shutil.chown("/run/munge", "munge", "munge")
                run("--reuid=munge", "--regid=munge", "--clear-groups", "munged", "-F", "--force")
            run("slurmctld", "-D", "-c")
            run("slurmd", "-D")
            wait_for(lambda: said("sinfo", "-h", "-o", "%t").strip() == "idle", running[-1], 60)
            yield
        finally:
            said("scancel", "--signal=KILL", "--full", "--me")  # what a failed test left running
            for process in reversed(running):
                process.terminate()
                process.wait()
            place.unlink()
            place.with_name("gres.conf").unlink()


def slurm_jobs() -> list[dict[str, str]]:
    """What Slurm itself knows of every job, the oldest first."""
    lines = said("scontrol", "--oneliner", "show", "job").splitlines()
    jobs = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if "JobId=" in line]
    return sorted(jobs, key=lambda job: int(job["JobId"]))


@pytest.mark.usefixtures("slurm")
def test_a_job_of_slurm_that_is_killed_goes_on(copy: Path, start: Start) -> None:
    for name in ("01_penalty", "02_training"):
        shutil.copy(REPOSITORY / "notebooks" / f"{name}.py", copy / "notebooks")
    often = "--slurm-init-seconds-before-status-checks 2 --seconds-between-status-checks 2"
    build = start("slurm", f"--slurm-status-command squeue {often}")
    reached = wait_for(lambda: len(found := checkpoints(copy)) == 2 and found, build)
    (training,) = [job for job in slurm_jobs() if job["Comment"] == "rule_training_wildcards_tiny"]
    assert training["JobState"] == "RUNNING"
    said("scancel", "--signal=KILL", "--full", training["JobId"])
    since = []
    wait_for(lambda: since.append(checkpoints(copy)) or build.poll() is not None, build)
    out = build.communicate()[0]
    assert build.returncode == 0 and "The book is ready" in out, out
    for arm, steps in reached.items():
        assert min(found[arm] for found in since if arm in found) >= steps  # none begins anew
    jobs = {job["Comment"].removeprefix("rule_"): job for job in slurm_jobs()}
    assert len(slurm_jobs()) == 4 and set(jobs) == {
        "training_wildcards_tiny", "notebook_wildcards_tiny_01_penalty",
        "notebook_wildcards_tiny_02_training",
    }  # fmt: skip
    assert {job["JobState"] for job in jobs.values()} == {"COMPLETED"}  # the last of each
    for name, job in jobs.items():
        assert (job["MinMemoryNode"], job["NumCPUs"], job["TimeLimit"]) == (
            "8000M",
            "4",
            "04:00:00",
        )
        assert job.get("TresPerJob") == (None if "01_penalty" in name else "gres:gpu:1")
    assert (copy / "_build" / "html" / "index.html").read_text() == "here"
    assert (copy / "runs" / "tiny" / "logs" / "training.log").exists()
    (log,) = copy.glob("_build/slurm/rule_training/tiny/*.log")  # of the job that was killed
    assert log.stem == training["JobId"]
    (copy / "runs").rename(copy / "on-slurm")
    here = start("local", "")
    out = here.communicate()[0]
    assert here.returncode == 0, out
    one, other = (Run(Profile.load(str(copy / "profiles" / "tiny.yml")), copy / name)
                  for name in ("runs", "on-slurm"))  # fmt: skip
    tables = agreement(one, other)
    assert {"arms", "training", "penalty_gradient"} <= set(tables.table)
    assert set(tables.agreement) == {"equal"}, tables


class Kubernetes(ThreadingHTTPServer):
    """As much of an API server as the plugin asks: a job's container runs here, as a process.

    It has what a container has: an environment of its own, an empty folder to begin in, and what is
    mounted. The first job that trains is killed before it begins.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.secrets = folder, dict[str, str]()
        self.jobs = dict[str, dict[str, Any]]()
        self.processes = dict[str, subprocess.Popen[bytes]]()

    def containers(self, mark: str) -> list[dict[str, Any]]:
        """The containers of the jobs whose command has a mark in it."""
        specs = [body["spec"]["template"]["spec"]["containers"] for body in self.jobs.values()]
        return [container for (container,) in specs if mark in container["args"][-1]]

    def run(self, name: str, body: dict[str, Any]) -> None:
        self.jobs[name] = body
        (container,) = body["spec"]["template"]["spec"]["containers"]
        command, work = [*container["command"], *container["args"]], self.folder / name
        training = self.containers(TRAINS)
        if len(training) == 1 and training[0] is container:
            command = ["sh", "-c", "kill -KILL $$"]
        keys = {e["name"]: e["valueFrom"]["secretKeyRef"]["key"] for e in container["env"]}
        values = {n: base64.b64decode(self.secrets[key]).decode() for n, key in keys.items()}
        work.mkdir()
        with (work / "log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=work, env=values | {"PATH": os.environ["PATH"], "HOME": str(work)},
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def status(self, name: str) -> dict[str, Any]:
        code = self.processes[name].poll()
        state = {} if code is None else {"failed": 1} if code else {"succeeded": 1}
        return self.jobs[name] | {"status": state}

    def pod(self, name: str) -> dict[str, Any]:
        code = self.processes[name].poll()
        state = {} if code is None else {"terminated": {"exitCode": code}}
        container = {"name": "snakemake", "image": "", "imageID": "", "ready": True,
                     "restartCount": 0, "state": state}  # fmt: skip
        return {"metadata": {"name": name}, "status": {"containerStatuses": [container]}}


class Answers(BaseHTTPRequestHandler):
    server: Kubernetes

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/jobs"):
            self.server.run(body["metadata"]["name"], body)
        else:
            self.server.secrets |= body.get("data", {})
        self.answer(body)

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        if place.path.endswith("/status"):
            self.answer(self.server.status(place.path.split("/")[-2]))
        elif place.path.endswith("/log"):
            self.answer("what it said")
        else:
            job = parse_qs(place.query)["labelSelector"][0].removeprefix("job-name=")
            self.answer({"items": [self.server.pod(job)]})

    def do_DELETE(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer({})

    def answer(self, content: object) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        """Nothing: the test says what went wrong."""


@pytest.fixture
def kubernetes(tmp_path: Path) -> Iterator[Kubernetes]:
    with Kubernetes(tmp_path) as server:
        threading.Thread(target=server.serve_forever).start()
        named = {
            "clusters": {"server": f"http://127.0.0.1:{server.server_port}"},
            "contexts": {"cluster": "here", "user": "here"}, "users": {},
        }  # fmt: skip
        config = {
            kind: [{"name": "here", kind.removesuffix("s"): value}] for kind, value in named.items()
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config | {"current-context": "here"}))
        yield server
        server.shutdown()
        for process in server.processes.values():
            end(process)


def test_jobs_of_kubernetes_share_the_volume(
    copy: Path, start: Start, kubernetes: Kubernetes
) -> None:
    config = str(kubernetes.folder / "kubeconfig")
    build = start("kubernetes", f"{VOLUME} --seconds-between-status-checks 1", KUBECONFIG=config)
    out, _ = build.communicate(timeout=300)
    logs = [path.read_text() for path in kubernetes.folder.glob("snakejob-*/log")]
    assert build.returncode == 0 and "The book is ready" in out, "\n".join([out, *logs])
    assert [code.returncode for code in kubernetes.processes.values()].count(0) == 3
    killed, again = kubernetes.containers(TRAINS)
    assert killed["args"][-1].replace("--attempt 1", "--attempt 2") == again["args"][-1]
    (drawing,) = kubernetes.containers("notebook=01_penalty")
    for container, gpu in ((again, "1"), (drawing, None)):
        assert container["image"] == "python:3.11"
        assert {"name": "book", "mountPath": "/volume"} in container["volumeMounts"]
        limits = container["resources"]["limits"]
        assert (limits["memory"], limits.get("nvidia.com/gpu")) == ("8000M", gpu)
        assert limits == limits | container["resources"]["requests"] | {"cpu": "4000m"}
    assert {path.stem for path in copy.glob("runs/tiny/notebooks/*")} == {
        "01_penalty", "02_training"
    }  # fmt: skip
    assert len(list(copy.glob("runs/artefacts/arm-*/artefact.json"))) >= 2
