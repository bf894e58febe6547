"""What the book's first page says: the answer, its picture, and each claim with its verdicts.

Every number comes from a run's tables, fresh or kept, or from the paper's own values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from citation import Citation
from metasae_lib import Run
from metasae_lib.show import figures, sentences
from metasae_lib.show import published as paper
from metasae_lib.show.scorecard import saved_scorecard
from metasae_lib.study.errors import ArtefactError
from metasae_lib.study.kept import KeptRun, agreement
from metasae_lib.study.machine import commit
from sources import line

_BADGES = {
    paper.AGREES: "success", paper.SAME_DIRECTION: "info", paper.DISAGREES: "danger",
    paper.INCONCLUSIVE: "dark",
}  # fmt: skip
PICTURE = "answer.png"


def toy(name: str) -> bool:
    """Whether a profile only tests the machinery."""
    return name.startswith("tiny")


def write(
    published: Mapping[str, Any],
    runs: Mapping[str, Run],
    folder: Path,
    where: Citation,
    silent: Collection[str] = (),
) -> None:
    """Write the generated pieces of the first page into a folder.

    silent: runs for which an announced one answers.
    """
    telling = {
        name: run
        for name, run in runs.items()
        if not toy(name) and name not in silent and run.has_table("effects")
    }
    # What a run of one seed finds stands with its pages, unless there is no other.
    several = {n: run for n, run in telling.items() if "seeds" in sentences.effects_by_way(run)}
    telling = several or telling
    pieces = {
        "answer.md": _answer(telling, folder / PICTURE, where),
        "cite.md": where.box(),
        "claims.md": _claims(published, telling),
        "findings.md": "\n\n".join(findings(run, link=True) for run in runs.values()),
    }
    for name, text in pieces.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _answer(runs: Mapping[str, Run], picture: Path, where: Citation) -> str:
    """The answer in one sentence, and one picture that shows it."""
    if not runs:
        return (
            "No run of this book can answer yet: a toy profile shows that every step works, and "
            "its numbers say nothing about the paper."
        )
    said = "; ".join(sentences.answer(run) for run in runs.values())
    said = said[0].upper() + said[1:]
    rows = []
    for name, run in runs.items():
        ways = sentences.effects_by_way(run)
        for way, words in (("seeds", "against its solo partner"), ("frontier", "at equal L2")):
            if way in ways:
                rows.append(ways[way] | {"comparison": f"{name}: {words}"})
    if not rows:
        return f"**{said}.**"
    frame, data = pd.DataFrame(rows), picture.with_suffix(".csv")
    figures.effect(frame).savefig(picture)
    frame.to_csv(data, index=False)
    source = f"{{download}}`{data.name} <generated/{data.name}>`"
    return (
        f"**{said}.**\n\n```{{figure}} generated/{PICTURE}\n:name: fig-answer\n"
        ":alt: Intervals of the percent change of mean absolute phi by joint training, two rows a "
        "run: against the solo partner and at equal L2, with lines at zero and at the paper's "
        "values.\n\nChange of mean |φ| by joint training, pair by pair, with 95% intervals for new "
        "seeds and new features: against the solo dictionary of the same seed, and against solo "
        "dictionaries that reconstruct as badly. Lines off zero: the paper's two values.\n```\n\n"
        + line([source], where.file("workflow/landing.py", commit()))
    )


def _claims(published: Mapping[str, Any], runs: Mapping[str, Run]) -> str:
    """What the paper claims, in its own numbers, each with the verdict of every run."""
    gpt2, gemma = published["gpt2-large"], published["gemma-2-9b"]
    best = next(row for row in gpt2["table1"]["rows"] if row.get("selected"))

    def value(key: str, of: Mapping[str, Any] = gpt2) -> Any:
        return of[key]["value"]

    at = "gpt2-large.table1.lambda0.3-sigma1"
    claims = [
        (f"mean |φ| between features is {-best['d_mean_abs_phi_pct']:g}% lower than in a"
         " dictionary trained alone (Table 1)", f"{at}.d_mean_abs_phi_pct"),
        (f"automated interpretability (fuzzing) is {value('fuzz_delta_pct')}% higher (§5.2)",
         "gpt2-large.fuzz_delta_pct"),
        (f"the price is {best['d_l2_pct']:g}% more reconstruction error", f"{at}.d_l2_pct"),
        (f"… and cross-entropy {value('joint_ce_overhead_pct')}% above the language model's instead"
         f" of {value('solo_ce_overhead_pct')}% (§5.3)", "gpt2-large.joint_minus_solo_ce_points"),
        ("without the penalty nothing changes (§5.1)", "gpt2-large.lambda0_control"),
        ("λ₂ = 1 is too much: mean |φ| rises (§6)", "gemma-2-9b.lambda1_failure"),
        ("on Gemma 2 9B the same setting gives a fuzzing score"
         f" {value('fuzz_delta_pct_selected', gemma)}% higher (§6)",
         "gemma-2-9b.fuzz_delta_pct_selected"),
        ("features of ambiguous words such as *too*, *let*, *cookies* and *flash* split into"
         " their senses (§5.4, §6): [what splits, and what merges](together/case-studies.md)", ""),
    ]  # fmt: skip
    verdicts = {name: saved_scorecard(run).set_index("id").verdict for name, run in runs.items()}
    lines = []
    for text, value_id in claims:
        badges = [_badge(name, card.get(value_id, "")) for name, card in verdicts.items()]
        lines.append(" ".join([f"- {text}", *filter(None, badges)]))
    return "\n".join(lines)


def _badge(name: str, verdict: str) -> str:
    if not verdict:
        return ""
    kind = _BADGES.get(verdict, "light")
    words = verdict if kind != "light" else "not judged"
    return f"{{bdg-{kind}}}`{name}: {words}`"


def findings(run: Run, link: bool) -> str:
    """What the scorecard of a run found, in its own sentences."""
    try:
        said = (
            run.load_json("synthsaebench_sentences")
            if run.profile.synthetic
            else [str(sentence) for sentence in run.load_json("headline")["sentences"]]
        )
    except (ArtefactError, KeyError, TypeError):
        said = ["The scorecard of this run has not drawn its conclusions yet."]
    name = run.profile.name
    shown = f"**[{name}]({name}/index.md)**" if link else f"**{name}**"
    tiny = " (a test of the machinery: its numbers say nothing)" if toy(name) else ""
    kept = f" ({kept_mark(run)})" if isinstance(run, KeptRun) else ""
    return f"{shown}{tiny}{kept}\n\n" + "\n".join(f"- {sentence}" for sentence in said)


def kept_mark(run: KeptRun) -> str:
    """Where a kept run comes from, in a few words."""
    made = run.provenance()
    hardware = made["hardware"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"
    return f"kept run of {made['date'][:10]}, {machine}, commit {made['commit'][:8]}"


def agreement_sentence(fresh: Run, kept: KeptRun | None) -> str:
    """Whether a fresh run gives what is kept of it; empty if nothing is."""
    if kept is None:
        return ""
    found = agreement(fresh, kept)
    counts = found.agreement.value_counts()
    text = ", ".join(f"{n} {what}" for what, n in counts.items())
    differs = found[found.agreement == "differs"]
    where = "; ".join(f"`{row.table}` ({row.where})" for row in differs.head(8).itertuples())
    return (
        f"A run of this profile is kept in `results/` ({kept_mark(kept)}). Of its {len(found)} "
        f"tables this run has {text}" + (f": {where}" if where else "") + "."
    )
