"""What of a runs folder's artefacts may go, and that a run goes on after it went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metasae_lib import Profile, Run
from metasae_lib.__main__ import main
from metasae_lib.study.errors import ArtefactError
from metasae_lib.study.prune import KINDS, prunable, prune
from metasae_lib.study.run import Artefact


def made(run: Run, stage: str, inputs: dict[str, object], version: int = 1) -> Artefact:
    """A finished artefact of 1,000 bytes and its record."""
    artefact = run.artefact(stage, inputs, version)
    with artefact.lock():
        (artefact.folder / "data.npy").write_bytes(bytes(1000))
        artefact.finish({"seconds": 60})
    return artefact


def names(run: Run, kind: str) -> set[str]:
    """Of what could go: folders, or files of states with their folders."""
    artefacts = run.runs_dir / "artefacts"
    return {str(p.path.relative_to(artefacts)) for p in prunable(run.runs_dir) if p.kind == kind}


def test_what_no_run_stands_on_is_unused(run: Run, tiny: Profile) -> None:
    other = Run.open(Profile.load("tiny", {"training.lambda2": [0.1]}), run.runs_dir)
    shared = made(run, "tokens", {"seed": 0})
    made(other, "tokens", {"seed": 0})
    own = made(other, "fidelity", {"arm": 1})
    answers = other.artefact("answers", {"judge": "paid"})
    (answers.folder / "answers.sqlite").write_bytes(b"paid for")
    half = other.artefact("counts", {"arm": 1})  # never finished
    (half.folder / "partial.npz").write_bytes(b"123")
    assert not names(run, "unused")
    for marker in (other.folder / "artefacts").iterdir():
        marker.unlink()
    assert names(run, "unused") == {own.folder.name, half.folder.name}
    freed = prune(run.runs_dir, ["unused"])
    assert sum(part.size for part in freed) >= 1003
    assert not own.folder.exists() and not half.folder.exists()
    assert shared.complete and (answers.folder / "answers.sqlite").exists()


def test_older_versions_go_with_what_was_made_from_them(run: Run) -> None:
    old, new = made(run, "arm", {"seed": 0}), made(run, "arm", {"seed": 0}, 2)
    deeper = {"on": {"arms": [old.folder.name]}}
    below = made(run, "fidelity", deeper)
    made(run, "fidelity", {"arm": new.folder.name})
    last = made(run, "sensitivity", {"fidelity": below.folder.name})
    assert names(run, "unused") == {old.folder.name, below.folder.name, last.folder.name}


def test_states_go_only_where_their_arm_is_trained(run: Run) -> None:
    inputs = {"arm": {"seed": 0}, "width": 8}
    state = run.artefact("arm-state", inputs, 2)
    for step in (10, 20, 30):
        (state.folder / f"final-{step}.safetensors").write_bytes(bytes(100))
    for steps in (10, 20):
        made(run, "arm", {**inputs, "steps": steps}, 2)
    made(run, "arm", {"arm": {"seed": 0}, "width": 9, "steps": 30}, 2)
    gone = {f"{state.folder.name}/final-{step}.safetensors" for step in (10, 20)}
    assert names(run, "states") == gone
    prune(run.runs_dir, ["states"])
    assert [path.name for path in state.folder.iterdir()] == ["final-30.safetensors"]


def test_what_is_locked_stays_and_keeps_passes_from_going(run: Run, tiny: Profile) -> None:
    counts, contexts = made(run, "cross-counts", {"a": 1}), made(run, "contexts", {"arm": 1})
    made(run, "tokens", {"seed": 0})
    assert names(run, "counts") == {counts.folder.name}
    for kind in ("counts", "contexts"):
        with contexts.lock(), pytest.raises(ArtefactError, match=f"may read {kind}: wait for its"):
            prune(run.runs_dir, [kind])
    (run.folder / "artefacts" / contexts.folder.name).unlink()
    with contexts.lock():
        assert not prune(run.runs_dir, ["unused"])
    assert counts.complete and contexts.complete
    assert len(prune(run.runs_dir, list(KINDS))) == 2


def test_a_killed_removal_leaves_what_is_made_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = made(run, "counts", {"arm": 1})
    monkeypatch.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune(run.runs_dir, ["counts"])
    assert (counts.folder / "data.npy").exists()
    assert not run.artefact("counts", {"arm": 1}).complete


def test_command(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    made(run, "residuals", {"role": "scan"})
    folder = ["--runs-dir", str(run.runs_dir)]
    assert main(["prune", *folder]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{kind} " in listed for kind in KINDS) and " 1 min" in listed
    assert main(["prune", "residuals", *folder]) == 0
    assert "freed 0.00 GB of residuals" in capsys.readouterr().out
    assert not names(run, "residuals")
    assert main(["prune", "everything", *folder]) == 2
    assert "'everything' is no kind of artefacts: name unused," in capsys.readouterr().err
    assert main(["prune", "--runs-dir", str(run.runs_dir / "none")]) == 2
    assert "holds no artefacts" in capsys.readouterr().err


def test_a_run_goes_on_after_everything_went(tmp_path: Path) -> None:
    """Weights and counts are the same; a longer training begins anew, to the same weights."""
    from metasae_lib.measure import scan_arms
    from metasae_lib.train import train_arms

    small = {"training.arms": ["solo"], "training.seeds": [0], "training.train_tokens": 4096,
             "text.roles": dict.fromkeys(("train", "calibration", "scan", "contexts"), 4000),
             "dictionary.n_features": 64}  # fmt: skip
    longer = small | {"training.train_tokens": 8192}
    expected: dict[int, Any] = {}
    freed = set[str]()
    for pruned in (False, True):
        runs_dir = tmp_path / str(pruned)
        for changes in (small, small, longer):
            run = Run.open(Profile.load("tiny", changes), runs_dir)
            arms = train_arms(run)
            n11 = scan_arms(run, arms)["solo-seed0"].n11.copy()
            found = (arms["solo-seed0"].sae.W_enc.numpy(), n11)
            key = run.profile.training.train_tokens
            for one, other in zip(expected.setdefault(key, found), found, strict=True):
                assert np.array_equal(one, other)
            if pruned:
                freed |= {part.kind for part in prune(runs_dir, list(KINDS))}
    assert freed == {"states", "residuals", "counts"}
