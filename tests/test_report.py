"""The HTML report and its figures, on made-up studies: escaping, self-containedness, and every kind of result."""

import re
import warnings
from dataclasses import dataclass, field
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pssm import plots
from pssm.plot_helpers import positions
from pssm.study.page import cell_text
from pssm.study.report import _level, write_report

HOSTILE = "<script>alert('x')</script> \"q\" & \U0001f680 $\\frac{1$ _a\u202e\x00"
NILE = [
    1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
    1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969,
]  # fmt: skip


@dataclass
class Result:
    name: str
    status: str = "done"
    note: str = ""
    objective: str = "exact posterior (Markov chain)"
    tree: xr.DataTree | None = None
    losses: np.ndarray | None = None
    seconds_compile: float = 3.21
    seconds_run: float = 12.34
    verdict: str = "Trust: agrees with the reference."
    diagnostics: dict = field(default_factory=dict)


def make_tree(y, time, *, chains=4, shift=0.0, horizon=12, num_states=1, series=None, seed=0):
    """A fit as the comparison leaves it: a random-walk smoother is close enough to look at."""
    rng = np.random.default_rng(seed)
    steps, p = y.shape
    series = series or [f"series {j}" for j in range(p)]
    filled = pd.DataFrame(y).interpolate(limit_direction="both").to_numpy()
    signal = pd.DataFrame(filled).ewm(alpha=0.25).mean().to_numpy()[::-1]
    signal = pd.DataFrame(signal).ewm(alpha=0.4).mean().to_numpy()[::-1]
    gap = np.isnan(y).astype(float)
    noise = np.nanstd(y - signal, axis=0)
    sd = noise * (0.35 + 0.9 * pd.DataFrame(gap).rolling(9, center=True, min_periods=1).mean().to_numpy())
    ahead = np.arange(1, horizon + 1)[:, None]
    mean, spread = np.repeat(signal[-1:], horizon, 0), noise * np.sqrt(1.0 + 0.12 * ahead)
    step = time[1] - time[0] if len(time) > 1 else 1
    labels = {"time": time, "horizon": time[-1] + step * np.arange(1, horizon + 1), "series": series}
    states = np.concatenate([signal[:, :1] * 0.6**k for k in range(num_states)], axis=1)
    z = {"q05": -1.645, "q25": -0.674, "q75": 0.674, "q95": 1.645}
    groups = {
        "posterior": xr.Dataset(
            {
                "s_level": (("chain", "draw"), rng.gamma(8 + shift, 5, size=(chains, 500))),
                "s_obs": (("chain", "draw"), rng.normal(122 + 4 * shift, 11, size=(chains, 500))),
                "phi": (("chain", "draw", "lag"), rng.normal(0.5, 0.1, size=(chains, 500, 2))),
                "z": (("chain", "draw", "time"), np.zeros((chains, 500, steps))),
            }
        ),
        "log_likelihood": xr.Dataset({"y": (("chain", "draw", "time"), np.zeros((chains, 2, steps)))}),
        "observed_data": xr.Dataset({"y": (("time", "series"), y)}, coords={k: labels[k] for k in ("time", "series")}),
        "smoothed_states": xr.Dataset(
            {
                "mean": (("time", "state"), states),
                "sd": (("time", "state"), np.repeat(sd[:, :1], num_states, 1)),
                "signal_mean": (("time", "series"), signal),
                "signal_sd": (("time", "series"), sd),
            },
            coords={"time": time, "state": [f"level {k}" for k in range(num_states)], "series": series},
        ),
        "forecast": xr.Dataset(
            {"mean": (("horizon", "series"), mean), "sd": (("horizon", "series"), spread)}
            | {q: (("horizon", "series"), mean + v * spread) for q, v in z.items()},
            coords={"horizon": labels["horizon"], "series": series},
        ),
    }
    return xr.DataTree.from_dict(groups)


def make_study(results, y, time, *, label="flow", reference=None, **changes):
    rows = [
        {
            "method": r.name,
            "status": r.status,
            "verdict": r.verdict,
            "seconds_compile": r.seconds_compile,
            "seconds_run": r.seconds_run,
            "ess_min": 812.4 if r.status == "done" else np.nan,
            "rhat_max": r.diagnostics.get("rhat_max", np.nan),
            "elbo": -643.218 if r.losses is not None else np.nan,
            "evidence_kind": r.objective,
            "khat": np.max(r.diagnostics.get("khat", np.nan)),
            "elpd_lfo": -321.4567,
            "coverage90": 0.913,
            "never": np.nan,
        }
        for r in results
    ]
    parameters = [
        {
            "method": r.name,
            "parameter": name,
            "mean": 41.234567,
            "sd": 14.5,
            "error_in_sds": 0.02 if r.name == "nuts" else -0.81,
            "sd_ratio": 1.0 if r.name == "nuts" else 0.61,
            "ess_bulk": 1234.5 if r.name == "nuts" else np.nan,
            "r_hat": 1.0012 if r.name == "nuts" else np.nan,
        }
        for r in results
        if r.tree is not None
        for name in ("s_level", "s_obs")
    ]
    study = SimpleNamespace(
        name="nile",
        model_name="local_level",
        y=y,
        time=time,
        column=label,
        results={r.name: r for r in results},
        reference=reference or results[0].name,
        table=pd.DataFrame(rows),
        parameters=pd.DataFrame(parameters),
        settings={"versions": {"jax": "0.12.0", "numpyro": "0.22.0"}, "seed": 0, "command": "pssm compare nile"},
        warnings=[],
    )
    vars(study).update(changes)
    return study


def nile_study(**changes):
    y, time = np.array(NILE, dtype=float)[:, None], np.arange(1871, 1871 + len(NILE))
    y[10:16] = np.nan
    loss = 640 + 9e3 * np.exp(-np.arange(2000) / 60) + np.random.default_rng(1).gamma(2.0, 1.0, 2000)
    results = [
        Result("nuts", tree=make_tree(y, time), diagnostics={"rhat_max": 1.002, "ess_min": 812}),
        Result(
            "svi:mvn",
            objective="lower bound on the log evidence (ELBO)",
            tree=make_tree(y, time, chains=1, shift=1.0, seed=1),
            losses=loss,
            verdict="Check: close to the reference, a little too narrow.",
            diagnostics={"khat": 0.61},
        ),
        Result(
            "svi:normal",
            objective="lower bound on the log evidence (ELBO)",
            tree=make_tree(y, time, chains=1, shift=-2.0, seed=2),
            losses=loss + 3,
            verdict="Do not trust: too narrow.",
            diagnostics={"khat": 0.93},
        ),
        Result("nuts:states", "skipped", "needs more than the time budget", verdict=""),
    ]
    return make_study(results, y, time, **changes)


class Loads(HTMLParser):
    """Collects everything a browser would fetch or run."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched, self.images = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "data", "action", "poster", "background"):
                (self.images if tag == "img" else self.fetched).append(value)


def check_report(path):
    """Parses the report, and asserts what holds for every one of them."""
    text = path.read_text(encoding="utf-8")
    loads = Loads()
    loads.feed(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(loads.tags)
    assert all(src.startswith("data:image/png;base64,") for src in loads.images)
    assert all(link.startswith("#") for link in loads.fetched)
    assert not re.search(r"@import|url\(", text)
    assert "could not be drawn" not in text
    assert not list(path.parent.glob(".*")), "temporary files left behind"
    return text, loads


@pytest.fixture(scope="module")
def nile_report(tmp_path_factory):
    return write_report(nile_study(), tmp_path_factory.mktemp("nile") / "new" / "folder")


def test_full_report(nile_report):
    path = nile_report
    text, loads = check_report(path)
    assert path.name == "report.html"
    assert path.parent.name == "folder"
    names = {p.name for p in path.parent.glob("*.png")}
    assert names == {
        "states_nuts.png",
        "states_svi-mvn.png",
        "states_svi-normal.png",
        "posteriors.png",
        "khat.png",
        "losses.png",
    }
    assert len(loads.images) == len(names)
    assert all((path.parent / n).read_bytes().startswith(b"\x89PNG") for n in names)
    for piece in ("6 missing", "needs more than the time budget", "91.3 %", "0.93", "local_level", "1871", "1,234"):
        assert piece in text, piece
    assert "never" not in text.split("<body>")[1].split("How to read")[0]  # a column without a value is left out


def test_verdicts_come_first_and_are_marked_without_colour(nile_report):
    text, _ = check_report(nile_report)
    body = text.split("<body>")[1]
    assert body.index("Do not trust: too narrow.") < body.index("<table")
    for word in ("good", "check", "not reliable", "not run"):
        assert f">{word}<" in body


def test_hostile_labels_are_escaped(tmp_path):
    y, time = np.random.default_rng(0).normal(size=(30, 1)), np.arange(30)
    tree = make_tree(y, time, series=[HOSTILE], num_states=2)
    tree["smoothed_states"] = tree["smoothed_states"].to_dataset().assign_coords(state=[HOSTILE, "b"])
    tree["posterior"] = tree["posterior"].to_dataset().rename(s_obs=HOSTILE.replace("/", ""))
    results = [
        Result(HOSTILE, tree=tree, note=HOSTILE, verdict=HOSTILE, objective=HOSTILE, diagnostics={HOSTILE: 1.0}),
        Result("../../etc", tree=tree, losses=np.ones(5), diagnostics={"khat": 0.2}),
    ]
    hostile = dict.fromkeys(("name", "model_name"), HOSTILE) | {"warnings": [HOSTILE], "settings": {HOSTILE: HOSTILE}}
    study = make_study(results, y, time, label=HOSTILE, **hostile)
    study.table[HOSTILE] = HOSTILE
    study.parameters["parameter"] = HOSTILE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_report(study, tmp_path / "out")
    text, _ = check_report(path)
    assert "<script" not in text.lower()
    assert "\x00" not in text
    assert "\u202e" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in text
    assert "\U0001f680" in text
    assert {p.name for p in tmp_path.iterdir()} == {"out"}, "written outside of the folder"
    assert all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", p.name) for p in path.parent.iterdir())


def test_one_method_only(tmp_path):
    study = nile_study()
    study.results = {"nuts": study.results["nuts"]}
    study.table, study.parameters = study.table[:1], study.parameters[:2]
    _, loads = check_report(write_report(study, tmp_path))
    assert len(loads.images) == 2
    assert not (tmp_path / "khat.png").exists()


@pytest.mark.parametrize("status", ["failed", "interrupted", "skipped"])
def test_method_that_did_not_finish(tmp_path, status):
    y = np.arange(20.0)[:, None]
    study = make_study([Result("svi:mvn", status, "out of <memory>", verdict="")], y, np.arange(20))
    text, _ = check_report(write_report(study, tmp_path))
    assert status in text
    assert "out of &lt;memory&gt;" in text


def test_dates_two_series_and_a_long_gap(tmp_path):
    time = np.datetime64("2020-01-01") + np.arange(400)
    y = np.random.default_rng(3).normal(size=(400, 2)).cumsum(0)
    y[100:180, 0] = np.nan
    y[::7, 1] = np.nan
    tree = make_tree(y, time, num_states=3, series=["north", "south"])
    text, _ = check_report(write_report(make_study([Result("nuts", tree=tree)], y, time), tmp_path))
    assert "2020-01-01" in text
    assert "2021-02-03" in text
    figure = plots.plot_states(tree)
    assert len(figure.axes) == 2 * 2 + 3
    assert [ax.get_ylabel() for ax in figure.axes[:3]] == ["north", "north", "south"]


def test_all_missing_words_as_labels_and_numbers_that_are_not_finite(tmp_path):
    y, time = np.full((6, 1), np.nan), np.array(list("abcdef"))
    tree = make_tree(np.arange(6.0)[:, None], np.arange(6))
    tree["observed_data"] = xr.Dataset({"y": (("time", "series"), y)}, coords={"time": time})
    tree["smoothed_states"] = tree["smoothed_states"].to_dataset() * np.nan
    bad = Result("svi:mvn", tree=tree, losses=np.full(9, np.nan), diagnostics={"khat": np.nan, "divergences": np.inf})
    with np.errstate(divide="raise", invalid="raise"):
        check_report(write_report(make_study([bad], y, time), tmp_path))


def test_plain_study_without_tables(tmp_path):
    study = make_study([Result("nuts")], np.zeros((0, 1)), np.zeros(0))
    study.table, study.parameters, study.settings = pd.DataFrame(), pd.DataFrame(), {}
    check_report(write_report(study, tmp_path))


def test_a_figure_that_fails_is_reported_and_does_not_stop_the_report(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no <ink>")

    monkeypatch.setattr(plots, "plot_posteriors", broken)
    text = write_report(nile_study(), tmp_path).read_text(encoding="utf-8")
    assert "could not be drawn" in text
    assert "no &lt;ink&gt;" in text
    assert not (tmp_path / "posteriors.png").exists()


def test_report_is_replaced_as_a_whole(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(nile_study(), tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert not [p for p in tmp_path.iterdir() if p.name != "report.html"]


@pytest.mark.parametrize("horizon", [np.arange(1, 13), np.arange(12.0), None])
def test_forecast_follows_the_data_whatever_its_labels(horizon):
    time = np.array(["2001-01-01", "2001-01-02", "2001-01-03"], dtype="datetime64[D]")
    x, future, dates = positions(time, 3, horizon, 12)
    assert dates
    assert future[0] == x[-1] + 1
    assert len(future) == 12


@pytest.mark.parametrize(
    ("verdict", "diagnostics", "level"),
    [
        ("Trust: agrees.", {"khat": 0.9}, "good"),
        ("do not trust", {}, "bad"),
        ("Usable with care", {}, "check"),
        ("", {"rhat_max": 1.001, "ess_min": 900.0, "khat": np.nan}, "good"),
        ("", {"rhat_max": 1.001, "ess_min": 90.0}, "check"),
        ("", {"rhat_max": 1.2}, "bad"),
        ("", {"khat": np.inf}, "bad"),
        ("", {"khat": None}, "check"),
    ],
)
def test_marker_follows_the_verdict_then_the_diagnostics(verdict, diagnostics, level):
    assert _level(Result("m", verdict=verdict, diagnostics=diagnostics))[0] == level


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("mean", 0.000123456, "0.0001235"),
        ("mean", 15099.4, "15,099"),
        ("mean", -1.5, "−1.5"),
        ("num_draws", 4000, "4,000"),
        ("coverage90", 0.9, "90.0 %"),
        ("seconds_run", 1234.5, "1,234 s"),
        ("rhat_max", float("inf"), "∞"),
        ("status", pd.NA, '<span class="none">–</span>'),
        ("odd", [1, "<b>"], "[1, &#x27;&lt;b&gt;&#x27;]"),
    ],
)
def test_numbers_are_written_to_be_read(column, value, text):
    assert cell_text(column, value) == text


def test_posteriors_keep_the_reference_readable():
    rng = np.random.default_rng(0)
    trees = {
        name: xr.DataTree.from_dict({"posterior": xr.Dataset({"s": (("chain", "draw"), rng.normal(0, sd, (2, 400)))})})
        for name, sd in {"nuts": 1.0, "wild": 1e6, "stuck": 0.0}.items()
    }
    left, right = plots.plot_posteriors(trees).axes[0].get_xlim()
    assert right - left < 30
    with pytest.raises(ValueError, match="`parameters`"):
        plots.plot_posteriors(trees, ["nothing"])


@pytest.mark.parametrize(("end", "scale"), [(640.0, "log"), (-500.0, "asinh"), (None, "linear")])
def test_loss_axis_shows_start_and_end(end, scale):
    loss = np.random.default_rng(0).normal(0, 2, 3000)
    loss[-9:] = np.nan
    if end is not None:
        loss += end + 1e5 * np.exp(-np.arange(3000) / 40)
    figure = plots.plot_losses({"svi:chain": loss})
    assert [ax.get_yscale() for ax in figure.axes] == ([scale] if scale == "linear" else [scale, "linear"])
    assert "9 steps not finite" in figure.legends[0].get_texts()[0].get_text()
    figure.draw_without_rendering()


def test_states_need_data():
    with pytest.raises(ValueError, match="`tree`"):
        plots.plot_states(xr.DataTree())
