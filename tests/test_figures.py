"""Every figure draws, labels its axes, stays legible, and leaves nothing behind."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from metasae_lib.show import figures

ARMS = pd.DataFrame(
    {
        "arm": ["solo-seed0", "solo-seed1", "joint-lambda0.3-sigma1-seed0", "control-sigma1-seed0"],
        "kind": ["solo", "solo", "joint", "control"],
        "seed": [0, 1, 0, 0],
    }
)


def along(**columns: np.ndarray) -> pd.DataFrame:
    """Every arm with a series of rows each."""
    return ARMS.merge(pd.DataFrame(columns), how="cross")


def grid() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [("joint", a, b, rng.normal(), rng.normal()) for a in (0.1, 0.3, 1) for b in (0.3, 1, 3)]
    rows += [("control", 0.0, 1.0, 0.0, 0.0), ("solo", np.nan, np.nan, 0.4, -0.2)]
    frame = pd.DataFrame(
        rows, columns=["kind", "lambda2", "sigma_sq", "d_l2_pct", "d_mean_abs_phi_pct"]
    )
    others = [("jumprelu", 0.5), ("ortsae", 0.6), ("a kind to come", 0.7)]
    frame = pd.concat(
        [frame, pd.DataFrame(others, columns=["kind", "d_l2_pct"]).assign(d_mean_abs_phi_pct=-1.0)],
        ignore_index=True,
    )
    frame["low"], frame["high"] = frame.d_mean_abs_phi_pct - 1, frame.d_mean_abs_phi_pct + 1
    frame["selected"] = (frame.lambda2 == 0.3) & (frame.sigma_sq == 1)
    return frame.assign(setting=frame.kind)


def plane(side: int) -> pd.DataFrame:
    x, y = (g.ravel() for g in np.meshgrid(*[np.linspace(-1, 1, side)] * 2))
    values = {"x": x, "y": y, "u": x, "v": y, "penalty": np.exp(-(x**2))}
    return pd.DataFrame(values).assign(what_x=0.9, what_y=0.0)


R = np.linspace(0, 2, 50)
PHI = np.array([-0.1, -0.01, -0.001, 0.001, 0.01, 0.1])
DRAWINGS: dict[str, Callable[[], Figure]] = {
    "penalty_profile": lambda: figures.penalty_profile(
        pd.concat(
            pd.DataFrame({"r": R, "sigma_sq": s, "penalty": np.exp(-R), "push": R}) for s in (1, 3)
        )
    ),
    "push_2d": lambda: figures.push_2d(plane(21), plane(3)),
    "push_3d": lambda: figures.push_3d(
        pd.DataFrame(np.linspace(-1, 1, 63).reshape(9, 7), columns=[*"xyzuvw", "penalty"])
    ),
    "escape": lambda: figures.escape(
        pd.DataFrame(
            [(s, 10.0 + s, a, b) for s in range(5) for a in (0.3, 1) for b in (0.1, 1)],
            columns=["step", "angle", "sigma_sq", "lambda2"],
        )
    ),
    "ablation": lambda: figures.ablation(
        pd.DataFrame(
            {
                "architecture": ["BatchTopK", "BatchTopK", "JumpReLU", "JumpReLU"],
                "penalty": ["solo", "joint", "solo", "joint"],
                "l0": [32.1, 32.0, 33.0, 31.0],
                "l2": [0.2, 0.21, 0.22, 0.24],
            }
        )
    ),
    "training_curve": lambda: figures.training_curve(
        along(tokens=np.arange(1, 9) * 1e5, penalty=np.linspace(1, 0.1, 8)), "penalty", "mean p"
    ),
    "losses": lambda: figures.losses(
        along(tokens=np.arange(1, 9) * 1e5, l2=np.linspace(1, 0.1, 8), dead=np.arange(8))
    ),
    "makeup": lambda: figures.makeup(
        pd.DataFrame(
            {
                "dimension": [4, 9, -1],
                "share": [0.7, 0.1, 0.2],
                "varying": [0.2, 0.2, 0.6],
                "trained": [0.2, 0.2, 0.6],
            }
        ),
        pd.DataFrame({"position": [1, 2, 3], "norm": [9.0, 8.0, 8.0]}),
    ),
    "fidelity_pairs": lambda: figures.fidelity_pairs(
        pd.DataFrame(
            {
                "setting": ["joint-lambda0.3", "control"],
                "kind": ["joint", "control"],
                "d_l2_pct": [2.0, 0],
                "l2_low": [1.0, 0],
                "l2_high": [3.0, 0],
                "d_ce_nats": [0.02, 0],
                "ce_low": [np.nan, 0],
                "ce_high": [np.nan, 0],
            }
        )
    ),
    "same_features": lambda: figures.same_features(
        pd.DataFrame(
            {
                "comparison": ["solo and its start", "two solo seeds"],
                "of": ["row", "nearest"],
                "cosine": [0.5, 0.6],
                "least": [0.4, 0.6],
                "largest": [0.55, 0.6],
            }
        )
    ),
    "frontier": lambda: figures.frontier(
        pd.DataFrame(
            {
                "arm": list("abcde"),
                "kind": ["solo", "frontier", "solo", "frontier", "joint"],
                "seed": [0, 0, 1, 1, 0],
                "l2": [0.1, 0.11, 0.1, 0.12, 0.105],
                "mean_abs": [2e-3, 1.9e-3, 2.1e-3, 2e-3, 1.9e-3],
                "null_mean_abs": 1e-3,
                "selected": [False] * 4 + [True],
            }
        )
    ),
    "fidelity": lambda: figures.fidelity(
        ARMS.assign(
            arm="critic-steps100to10-" + ARMS.arm, l2=[0.1, 0.11, 0.12, 0.1], ce_overhead_pct=2.0
        )
    ),
    "time_spent": lambda: figures.time_spent(
        pd.DataFrame({"stage": ["a", "b"], "seconds": [1.0, 70.0]})
    ),
    "threshold_calibration": lambda: figures.threshold_calibration(
        along(selected_rate=np.array([0, 1e-3, 1e-2]), scan_rate=np.array([1e-4, 1e-3, 2e-2]))
    ),
    "density_difference": lambda: figures.density_difference(
        pd.DataFrame(
            {"phi": PHI, "width": 0.1, "difference": [1, 2, -30, 9, 1, 0], "low": -1, "high": 1}
        )
    ),
    "density_difference of one seed": lambda: figures.density_difference(
        pd.DataFrame({"phi": PHI, "width": 0.1, "difference": 0.0, "low": np.nan, "high": np.nan})
    ),
    "trade_off": lambda: figures.trade_off(grid(), grid()),
    "trade_off of one point": lambda: figures.trade_off(grid().query("selected"), grid()),
    "against_chance": lambda: figures.against_chance(
        ARMS.assign(mean_abs=2e-3, low=1.9e-3, high=2.2e-3, null_mean_abs=1e-3, noise_floor=8e-4)
    ),
    "effect": lambda: figures.effect(
        pd.DataFrame(
            {
                "comparison": ["seed 0", "all"],
                "change_pct": [-1.0, 2],
                "low": [-2.0, 1],
                "high": [0, 3],
            }
        ),
        {"paper": -7.5, "paper, against its own seeds": -2.3},
    ),
    "firing_rates": lambda: figures.firing_rates(
        along(rate=np.array([0.0, 1e-4, 1e-3, 1e-2])),
        along(
            rate=np.array([1e-3, 1e-2]),
            mean_abs=np.array([1e-3, 5e-3]),
            null_mean_abs=np.array([5e-4, 1e-3]),
        ),
    ),
    "clustered": lambda: figures.clustered(
        along(link=np.array([0.1, 0.5, 0.7]), change_pct=np.array([9, 5.0, -1]))
    ),
    "cluster": lambda: figures.cluster(
        pd.DataFrame({"feature": ["3 “he”", "12 “her”"], 3: [1, 0.6], 12: [0.6, 1]})
    ),
    "probes": lambda: figures.probes(
        pd.DataFrame(
            [
                (kind, task, k, 0.7)
                for kind in ("solo", "random")
                for task in ("spam?", "grammatical?")
                for k in (1, 5)
            ]
            + [("dense", "spam?", 576, 0.9)],
            columns=["kind", "task", "k", "auc"],
        )
    ),
    "recovery_at_l2": lambda: figures.recovery_at_l2(
        pd.DataFrame(
            [
                ("solo", 0, 0.3, 0.6, 0.5),
                ("frontier", 0, 0.4, 0.5, 0.5),
                ("joint", 0, 0.3, 0.6, 0.4),
            ],
            columns=["kind", "seed", "l2", "f1", "mcc"],
        )
    ),
    "phi_distribution": lambda: figures.phi_distribution(
        along(phi=PHI, density=np.array([0, 1, 90, 80, 2, 1]))
    ),
    "activation_norms": lambda: figures.activation_norms(
        pd.DataFrame(
            {"quantile": [0, 0.5, 1], "norm": [10.0, 100, 1000], "mean": 130.0, "std": 20.0}
        )
    ),
    "elasticity": lambda: figures.elasticity(
        along(scale=np.array([0.9, 1, 1.1]), change_pct=np.array([5.0, 0, -4]))
    ),
    "split_counts": lambda: figures.split_counts(
        pd.DataFrame(
            {
                "role": ["null", "joint", "same start"],
                "a": "solo-seed0",
                "b": "joint-seed1",
                "splits": [3, 20, 0],
                "merges": [4, 18, 0],
            }
        )
    ),
    "sense_information": lambda: figures.sense_information(
        ARMS.assign(word=["too", "let", "too", "let"], share=[0.1, 0.9, 0.2, -0.1], chance=0.05)
    ),
    "recovery": lambda: figures.recovery(
        pd.DataFrame(
            [(a, p, a / 2, a / 3) for a in (0.0, 0.1, 1.0) for p in ("senses", "correlated")] * 2,
            columns=["lambda2", "pair", "recovered", "blending"],
        )
    ),
    "phi_against_recovery": lambda: figures.phi_against_recovery(
        ARMS.assign(
            lambda2=[0, 0, 0.3, 0],
            mean_abs_phi=0.01,
            recovered=[0.9, 0.8, 0.1, 0.9],
            atoms_mean_abs_phi=0.012,
        )
    ),
    "judge_controls": lambda: figures.judge_controls(
        pd.DataFrame(
            [
                (group, condition, score, 0.5, 0.4, 0.6, 0.0)
                for group in ("planted", "features")
                for condition in ("right", "shuffled", "empty")
                for score in ("fuzzing", "spearman", "detection")
            ],
            columns=["group", "condition", "score", "mean", "low", "high", "chance"],
        )
    ),
    "fuzzing_difference": lambda: figures.fuzzing_difference(
        pd.DataFrame(
            {
                "score": [-0.5, 0.5] * 2,
                "difference": [-0.1, 0.1] * 2,
                "low": -0.2,
                "high": 0.2,
                "judge": ["lexical"] * 2 + ["in-process"] * 2,
            }
        )
    ),
    "scores_together": lambda: figures.scores_together(
        ARMS.assign(fuzzing=[-1, 0, 0.5, 1], spearman=[0, 0.1, np.nan, 1], detection=0.5)
    ),
    "scorecard_overview": lambda: figures.scorecard_overview(
        pd.DataFrame(
            {
                "section": ["result"] * 3 + ["set-up"],
                "group": ["agrees", "not run", "agrees", "set otherwise"],
            }
        )
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_figure_is_labelled_legible_and_leaves_nothing_open(name: str) -> None:
    rc = dict(plt.rcParams)
    figure = DRAWINGS[name]()
    picture, _ = figure._repr_png_()  # type: ignore[attr-defined]
    assert picture.startswith(b"\x89PNG") and len(picture) < 400_000
    for ax in figure.axes:
        if ax.get_label() == "<colorbar>":
            continue
        assert ax.get_xlabel()
        left, bottom, right, top = ax.xaxis.label.get_window_extent().extents
        assert left >= 0 and bottom >= 0 and right <= figure.bbox.x1 and top <= figure.bbox.y1
        assert (
            ax.get_ylabel()
            or not ax.get_yaxis().get_tick_params()["labelleft"]
            or ax.get_yticklabels()
        )
    texts = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    assert texts and min(t.get_fontsize() for t in texts) >= 9
    assert to_rgb(figure.get_facecolor()) == (1, 1, 1)  # a card of its own in dark mode
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == rc


def test_the_same_table_gives_the_same_picture() -> None:
    first, second = (DRAWINGS["trade_off"]()._repr_png_() for _ in range(2))  # type: ignore[attr-defined]
    assert first == second


def test_points_lie_where_their_marks_are_drawn() -> None:
    picture, offered = DRAWINGS["trade_off"]()._repr_png_()  # type: ignore[attr-defined]
    pixels = mpl.image.imread(io.BytesIO(picture))[..., :3]
    places = {point["arm"]: point for point in offered["points"]}
    assert len(offered["points"]) == 2 * len(grid())
    # Others have their marks under them.
    for arm in ("solo", "jumprelu", "ortsae"):
        row = int(places[arm]["top"] * len(pixels))
        column = int(places[arm]["left"] * pixels.shape[1])
        colour = figures.style.GREY if arm == "solo" else figures.KINDS[arm][0]
        np.testing.assert_allclose(pixels[row, column], to_rgb(colour), atol=0.01)
    assert places["jumprelu"]["words"] == "jumprelu: mean |φ| −1.0% (−2.0% to +0.0%), L2 +0.5%"
    assert "the paper, λ₂ = 0.1, σ² = 0.3" in offered["points"][0]["words"]


def test_every_drawing_function_is_tried() -> None:
    drawn = {name.split(" ")[0] for name in DRAWINGS}
    made = {name for name, value in vars(figures).items() if hasattr(value, "__wrapped__")}
    assert made - {"style"} == drawn


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=12))
def test_pareto_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    frame = pd.DataFrame(points, columns=["d_l2_pct", "d_mean_abs_phi_pct"])
    front = figures.pareto_front(frame)
    expected = {
        p for p in points
        if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
    }  # fmt: skip
    assert set(front.itertuples(index=False, name=None)) == expected
    assert list(front.d_l2_pct) == sorted(front.d_l2_pct)


def test_colours_and_markers_of_kinds_differ() -> None:
    arms = {kind: look for kind, look in figures.KINDS.items() if kind not in ("paper", "null")}
    assert len({colour for colour, _ in arms.values()}) == len(arms)
    assert len({marker for _, marker in figures.KINDS.values()}) == len(figures.KINDS)
