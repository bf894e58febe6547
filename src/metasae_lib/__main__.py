"""Commands: `python -m metasae_lib fetch PROFILE...`, `plan`, `train`, `keep` and `prune`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from metasae_lib.study.errors import MetaSAEError, ProfileError
from metasae_lib.study.kept import KeptRun, keep
from metasae_lib.study.plan import machines, plan_text, shape_of
from metasae_lib.study.profile import Profile
from metasae_lib.study.prune import KINDS, prunable, prune
from metasae_lib.study.run import Run


def _train(options: argparse.Namespace) -> None:
    """Train the arms of a run, among the processes of a launcher if one started this."""
    from metasae_lib.study import distributed  # these load torch
    from metasae_lib.train.training import tensorboard, train_arms

    try:
        overrides = yaml.safe_load(options.overrides)
    except yaml.YAMLError:
        raise ProfileError(f"--overrides is not YAML: {options.overrides}") from None
    run = Run.open(Profile.load(options.profile, overrides), options.runs_dir)
    watch = tensorboard(Path(options.tensorboard)) if options.tensorboard else None
    distributed.start()
    train_arms(run, watch)


def _plan(profile: Profile, machine: str | None) -> str:
    """The plan for one machine, or for all whose speeds are assumed."""
    if machine != "here":
        return plan_text(profile, [machine] if machine else list(machines()))
    shape = shape_of(profile)
    from metasae_lib.measure.speed import measured_costs  # loads torch

    return plan_text(profile, [], measured_costs(profile, shape))


def _keep(folder: str) -> None:
    """Store a run's small tables and values in results/, with a picture of its headline."""
    from metasae_lib.show import figures

    target = keep(folder)
    run = KeptRun(target)
    if not run.profile.synthetic:
        figures.effect(run.load_table("effects")).savefig(target / "effect.png", dpi=100)
    print(f"kept in {target}")


def _prune(runs_dir: Path, free: Sequence[str]) -> None:
    """Free some kinds of artefacts, and say what is left that could go."""
    if free:
        size = sum(part.size for part in prune(runs_dir, free))
        print(f"freed {size / 1e9:.2f} GB of {' and '.join(free)}")
    left = prunable(runs_dir)
    print(f"{'kind':10}{'GB':>8}{'made in':>10}  what goes with it")
    for kind, meaning in KINDS.items():
        size = sum(part.size for part in left if part.kind == kind)
        minutes = sum(part.seconds for part in left if part.kind == kind) / 60
        print(f"{kind:10}{size / 1e9:8.2f}{minutes:6.0f} min  {meaning}")
    if not free:
        print('make prune FREE="unused states" frees the kinds that it names')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one sentence on standard error otherwise."""
    parser = argparse.ArgumentParser(prog="python -m metasae_lib")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download and convert what profiles need")
    fetch.add_argument("profiles", nargs="+", metavar="PROFILE")
    plan = commands.add_parser("plan", help="what a profile will cost, before anything is spent")
    plan.add_argument("profile", metavar="PROFILE")
    plan.add_argument(
        "--gpu",
        choices=["here", *machines()],
        help="one machine (by default all whose speeds are assumed); here: measured on this one",
    )
    kept = commands.add_parser("keep", help="store a finished run's small tables in results/")
    kept.add_argument("folder", metavar="RUN", help="folder of the run, made here or elsewhere")
    train = commands.add_parser(
        "train",
        help="train the arms of a profile; start it with torchrun --nproc-per-node=N "
        "to share them among N GPUs",
    )
    train.add_argument("profile", metavar="PROFILE")
    train.add_argument("--runs-dir", default="runs")
    train.add_argument(
        "--overrides", default="{}", metavar="YAML", help="such as '{training.lambda2: [0.3]}'"
    )
    train.add_argument(
        "--tensorboard", metavar="FOLDER", help="write the arms' losses there as they are trained"
    )
    pruned = commands.add_parser("prune", help="what of the artefacts may go, and freeing it")
    pruned.add_argument("free", nargs="*", metavar="KIND", help=", ".join(KINDS))
    pruned.add_argument("--runs-dir", default="runs")
    options = parser.parse_args(arguments)
    try:
        if options.command == "train":
            _train(options)
        elif options.command == "keep":
            _keep(options.folder)
        elif options.command == "prune":
            _prune(Path(options.runs_dir), options.free)
        elif options.command == "plan":
            print(_plan(Profile.load(options.profile), options.gpu))
        else:
            profiles = [Profile.load(name) for name in options.profiles]
            from metasae_lib.subject.model import fetch as fetch_model  # loads torch

            for profile in profiles:
                fetch_model(profile)
    except MetaSAEError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
