"""Trees of results, draws of the past and predictions, for models as users write them: right, or refused in one line.

Trees need draws only: here they are made by hand, scattered about one draw of the prior.
"""

import functools

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from situations import Situation, cases, check

import pssm
from pssm import LinearGaussianSSM, models, observe
from pssm.diagnostics import load_tree, save_tree, to_datatree
from pssm.diagnostics.groups import sites_of
from pssm.distributions import LinearGaussianMarginal, NonCenteredPath, StatePath
from pssm.fitting.results import FitRecord
from pssm.guides import AutoStateSpace
from pssm.infer import SVIFit, causal_draws, check_model
from pssm.inspection.axes import WholePlates, find_axes
from pssm.inspection.past import timed_arguments

T, S, DRAWS = 9, 3, 30
RNG = np.random.default_rng(0)
FLOW, PANEL, GRID = RNG.normal(size=(T, 1)), RNG.normal(size=(S, T, 1)), RNG.normal(size=(T, S))
SHORT = RNG.normal(size=(5, 2))
RAGGED = PANEL.copy()
RAGGED[1, 6:], RAGGED[2, :2] = np.nan, np.nan
SEEN = ~np.isnan(RAGGED[..., 0])


def with_gaps(y, *where):
    y = y.copy()
    for index in where:
        y[index] = np.nan
    return y


def fit_of(model, *args, **kwargs):
    """A fit with made-up draws."""
    with WholePlates():
        trace = handlers.trace(handlers.seed(model, 0)).get_trace(*args, **kwargs)
    draws = {}
    for name, s in trace.items():
        x = np.asarray(s["value"]) if s["type"] in ("sample", "deterministic") else None
        if x is not None and not s.get("is_observed"):
            noise = (
                0.1 * RNG.normal(size=(1, DRAWS, *x.shape)) if s["type"] == "sample" else np.zeros((1, DRAWS, *x.shape))
            )
            draws[name] = (x + noise).astype(x.dtype)
    return FitRecord("by hand", model, args, kwargs, lambda *_: draws, "")


def walk(y, size=1):
    eye = jnp.eye(size)
    return StatePath(jnp.zeros(size), eye, 0.9 * eye, 0.3 * eye, y.shape[-2])


def marginal(y, size=1, scale=0.3):
    eye = jnp.eye(size)
    return LinearGaussianMarginal(
        LinearGaussianSSM(jnp.zeros(size), eye, 0.9 * eye, scale * eye, jnp.ones((1, size)), scale * jnp.eye(1)),
        y.shape[-2],
    )


def see(y, z, name="y"):
    return observe(name, dist.Normal(z, 1.0).to_event(2), y)


# Names of axes


def sites_called_as_axes(y):
    for name in ("state", "series", "time", "draw", "chain", "horizon", "mean", "sd"):
        numpyro.sample(name, dist.Normal(0.0, 1.0))
    see(y, numpyro.sample("z", walk(y)))


def in_a_plate(plate):
    def model(y):
        with numpyro.plate(plate, len(y)):
            numpyro.sample("a", dist.Normal(0.0, 1.0))
            z = numpyro.sample("z", walk(y, 2))
            see(y, z[..., :1])

    return model


def integrated_in_a_plate(plate):
    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.1))
        with numpyro.plate(plate, len(y)):
            numpyro.sample("y", marginal(y, 2, scale), obs=y)

    return model


def beside_a_plate(plate, size):
    def model(y):
        with numpyro.plate(plate, size):
            numpyro.sample("a", dist.Normal(0.0, 1.0))
        see(y, numpyro.sample("z", walk(y, 2))[:, :1])

    return model


def coefficients(y):
    with numpyro.plate("region", len(y)):
        for name in ("phi", "beta", "ar_partial"):
            numpyro.sample(name, dist.Normal(0.0, 1.0))
        numpyro.sample("ar", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        see(y, numpyro.sample("z", walk(y)))


def vectors(y):
    for name, size in (("phi", 2), ("beta", 2), ("ar_partial", 5)):
        numpyro.sample(name, dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    see(y, numpyro.sample("z", walk(y)))


def bases(y):
    """A user's sites ending in `_base`, one of them beside a path of its own name; and the noise of a path."""
    numpyro.sample("flow_base", dist.Normal(0.0, 1.0))
    numpyro.deterministic("flow", jnp.zeros(2))
    w = handlers.reparam(lambda: numpyro.sample("w", walk(y)), config={"w": NonCenteredPath()})()
    z = numpyro.sample("z", walk(y))
    numpyro.sample("z_base", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    see(y, z + w)


def scopes(y):
    def inner():
        with numpyro.plate("region", 2):
            numpyro.sample("a", dist.Normal(0.0, 1.0))
        see(y, numpyro.sample("z", walk(y, 2))[:, :1])

    numpyro.sample("out.in.a", dist.Normal(0.0, 1.0))
    handlers.scope(handlers.scope(inner, prefix="in"), prefix="out")()


def two_paths(y, x):
    z, w = numpyro.sample("z", walk(y, 2)), numpyro.sample("w", walk(x, 2))
    see(y, z[:, :1])
    see(x, w, "x")


def two_marginals(y, x):
    numpyro.sample("scale", dist.LogNormal(0.0, 0.1))
    numpyro.sample("y", marginal(y, 2), obs=y, infer={"state_names": ("level", "slope")})
    numpyro.sample("x", marginal(x, 2), obs=x, infer={"state_names": ("wind", "rain")})


def path_and_marginal(y, x):
    z = numpyro.sample("z", walk(y, 2), infer={"state_names": ("level", "slope")})
    see(y, z[:, :1])
    numpyro.sample("x", marginal(x, 3), obs=x, infer={"state_names": ("u", "v", "w")})


def one_path_two_sites(y, x):
    z = numpyro.sample("z", walk(y))
    see(y, z + jnp.zeros(y.shape[-1]))
    see(x, z, "x")


def three_plates(y):
    with numpyro.plate("a", 2, dim=-3), numpyro.plate("b", 3, dim=-2), numpyro.plate("c", 2, dim=-1):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        see(y, numpyro.sample("z", walk(y)) + m[..., None, None])


def parts(y):
    with numpyro.plate("region", len(y), subsample_size=2) as index:
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        see(y[index], numpyro.sample("z", walk(y)) + a[:, None, None])


def odd_sites(y):
    z = numpyro.sample("z", walk(y))
    for name, x in {
        "whole": jnp.arange(5),
        "truth": z[:, 0] > 0,
        "empty": jnp.zeros((0, 3)),
        "longer": jnp.zeros(T + 1),
        "square": jnp.zeros((T, T)),
        "number": jnp.asarray(3),
        "one_truth": z.sum() > 0,
    }.items():
        numpyro.deterministic(name, x)
    see(y, z)


def time_in_front(y):
    with numpyro.plate("region", y.shape[1]):
        z = numpyro.sample("z", walk(y))
    observe("y", dist.Normal(z[..., 0].T, 1.0), y)


def priors_in_factors(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.factor("one", -(m**2))
    numpyro.factor("each", -(m**2) * jnp.ones(len(y)))
    with numpyro.plate("group", 2):
        numpyro.factor("plated", jnp.zeros(2))
    see(y, numpyro.sample("z", walk(y)) + m)


PATH, OWN = ("time", "state"), ("time", "series")
NAMES = {
    "sites called as axes": (
        sites_called_as_axes,
        (FLOW,),
        {"posterior": {"mean": (), "sd": (), "time": (), "state": (), "chain": (), "z": PATH}},
    ),
    **{
        f"a plate {p}": (
            in_a_plate(p),
            (PANEL,),
            {
                "posterior": {"a": (q,), "z": (q, "time", state)},
                "observed_data": {"y": (q, "time", series)},
                "smoothed_states": {"mean": (q, "time", state), "signal_mean": (q, "time", series)},
                "forecast": {"mean": (q, "horizon", series)},
            },
        )
        for p, q, state, series in (
            ("series", "series", "state", "y_series"),
            ("state", "state", "z_state", "series"),
            ("draw", "draw_", "state", "series"),
            ("chain", "chain_", "state", "series"),
            ("horizon", "horizon_", "state", "series"),
            ("time", "time_", "state", "series"),
        )
    },
    **{
        f"integrated out in a plate {p}": (
            integrated_in_a_plate(p),
            (PANEL,),
            {
                "observed_data": {"y": (q, "time", series)},
                "smoothed_states": {"mean": (q, "time", state)},
                "forecast": {"q05": (q, "horizon", series)},
            },
        )
        for p, q, state, series in (
            ("state", "state", "y_state", "series"),
            ("horizon", "horizon_", "state", "series"),
            ("time", "time_", "state", "series"),
            ("y_state", "y_state", "state", "series"),
        )
    },
    "a plate time of other steps": (
        beside_a_plate("time", 4),
        (FLOW,),
        {"posterior": {"a": ("time_",), "z": PATH}, "observed_data": {"y": OWN}},
    ),
    "a plate state of as many": (
        beside_a_plate("state", 2),
        (FLOW,),
        {"posterior": {"a": ("state",), "z": ("time", "z_state")}, "smoothed_states": {"mean": ("time", "z_state")}},
    ),
    "a plate series of one": (
        beside_a_plate("series", 1),
        (FLOW,),
        {"posterior": {"a": ("series",)}, "observed_data": {"y": ("time", "y_series")}},
    ),
    "coefficients per plate": (
        coefficients,
        (PANEL,),
        {"posterior": {n: ("region",) for n in ("phi", "beta", "ar_partial")} | {"ar": ("region", "ar_dim_1")}},
    ),
    "vectors": (vectors, (FLOW,), {"posterior": {n: (f"{n}_dim_0",) for n in ("phi", "beta", "ar_partial")}}),
    "pssm's own vectors": (
        functools.partial(models.structural, ar=2, u=np.ones((T, 3)) * np.arange(T)[:, None]),
        (FLOW,),
        {"posterior": {"phi": ("lag",), "ar_partial": ("lag",), "beta": ("input",)}},
    ),
    "names that end in base": (
        bases,
        (FLOW,),
        {
            "posterior": {"flow_base": (), "flow": ("flow_dim_0",), "z_base": ("z_base_dim_0",), "w": PATH}
            | {"z": ("time", "z_state")}
        },
    ),
    "nested scopes": (
        scopes,
        (FLOW,),
        {"posterior": {"out/in/a": ("out.in.region",), "out.in.a": (), "out/in/z": PATH}, "forecast": {"mean": None}},
    ),
    "two paths": (
        two_paths,
        (FLOW, SHORT),
        {
            "posterior": {"z": PATH, "w": ("x_time", "w_state")},
            "observed_data": {"y": OWN, "x": ("x_time", "x_series")},
            "log_likelihood": {"y": ("time",), "x": ("x_time",)},
            "smoothed_states": {
                "mean_z": PATH,
                "mean_w": ("x_time", "w_state"),
                "signal_mean_x": ("x_time", "x_series"),
            },
            "forecast": {"mean_y": ("horizon", "series"), "mean_x": ("horizon", "x_series")},
        },
    ),
    "two paths of one size": (
        two_paths,
        (FLOW, GRID[:, :2]),
        {
            "posterior": {"z": PATH, "w": ("time", "w_state")},
            "observed_data": {"y": OWN, "x": ("time", "x_series")},
            "smoothed_states": {"mean_z": PATH, "mean_w": ("time", "w_state"), "signal_sd_y": OWN},
        },
    ),
    "two marginals": (
        two_marginals,
        (FLOW, SHORT[:, :1]),
        {
            "smoothed_states": {"mean_y": PATH, "mean_x": ("x_time", "x_state"), "signal_mean_y": OWN},
            "forecast": {"mean_y": ("horizon", "series"), "q95_x": ("horizon", "x_series")},
        },
    ),
    "a path and a marginal": (
        path_and_marginal,
        (FLOW, FLOW + 1),
        {"smoothed_states": {"mean_z": PATH, "mean_x": ("time", "x_state"), "signal_mean_x": ("time", "x_series")}},
    ),
    "two sites of one path": (
        one_path_two_sites,
        (GRID, FLOW),
        {
            "smoothed_states": {"mean": PATH, "signal_mean_y": OWN, "signal_mean_x": ("time", "x_series")},
            "forecast": {"mean_y": ("horizon", "series"), "mean_x": ("horizon", "x_series")},
        },
    ),
    "three plates": (
        three_plates,
        (RNG.normal(size=(2, 3, 2, T, 1)),),
        {"posterior": {"m": ("a", "b", "c")}, "forecast": {"sd": ("a", "b", "c", "horizon", "series")}},
    ),
    "a part of a plate": (parts, (PANEL,), {"posterior": {"a": ("region",)}, "observed_data": {"y": ("region", *OWN)}}),
    "odd sites": (
        odd_sites,
        (FLOW,),
        {
            "posterior": {"whole": ("whole_dim_0",), "truth": ("truth_dim_0",), "empty": ("empty_dim_0", "empty_dim_1")}
            | {"longer": ("longer_dim_0",), "square": ("square_dim_0", "square_dim_1"), "number": (), "one_truth": ()}
        },
    ),
    "time in front of the plate": (
        time_in_front,
        (GRID,),
        {"posterior": {"z": ("region", "time", "state")}, "forecast": {"mean": ("horizon", "series")}},
    ),
    "factors": (priors_in_factors, (FLOW,), {"log_likelihood": {"y": ("time",)}, "observed_data": {"y": OWN}}),
}


NO_FORECAST = ("pssm's own vectors", "names that end in base")  # needs inputs; has a path that is given as its noise


@functools.cache
def tree_of(name):
    model, args, _ = NAMES[name]
    ahead = 0 if name in NO_FORECAST else 2
    return to_datatree(fit_of(model, *(jnp.asarray(x) for x in args)), states=True, forecast=ahead)


@pytest.mark.parametrize("name", NAMES)
def test_every_site_has_its_own_axes(name, tmp_path):
    model, args, expected = NAMES[name]
    tree = tree_of(name)
    assert load_tree(save_tree(tree, tmp_path / "fit.nc")).identical(tree)
    for group, sites in expected.items():
        found = {str(x.attrs.get("site", n)): x.dims for n, x in tree[group].data_vars.items()}
        for site, dims in sites.items():
            lead = ("chain", "draw") if group in ("posterior", "log_likelihood") else ()
            assert dims is None or found[site] == (*lead, *dims), (group, site)
    assert tree.attrs["time_axis"] == "time"


def test_states_have_the_names_of_their_own_site():
    for name, expected in {
        "two marginals": {"state": ["level", "slope"], "x_state": ["wind", "rain"]},
        "a path and a marginal": {"state": ["level", "slope"], "x_state": ["u", "v", "w"]},
    }.items():
        group = tree_of(name)["smoothed_states"]
        assert {axis: group[axis].values.tolist() for axis in expected} == expected


def test_labels_of_plates_reach_every_group():
    names = ["north", "south", "west"]
    tree = to_datatree(fit_of(in_a_plate("draw"), jnp.asarray(RAGGED)), forecast=2, coords={"draw_": names})
    for group in ("posterior", "observed_data", "forecast"):
        assert tree[group]["draw_"].values.tolist() == names
    assert set(tree["log_likelihood"]["draw_"].values.tolist()) == set(names)


def test_given_names_stay_and_others_follow():
    dims = {"y": ("land", "day", "kind")}
    found = find_axes(in_a_plate("region"), (jnp.asarray(PANEL),), dims=dims)
    assert found.names == {"a": ("land",), "z": ("land", "day", "state"), "y": dims["y"]}
    assert found.time == "day"
    again = find_axes(two_paths, (jnp.asarray(FLOW), jnp.asarray(SHORT)))
    assert find_axes(two_paths, (jnp.asarray(FLOW), jnp.asarray(SHORT)), dims=again.names).times == again.times


# Points that were observed


def entries(y):
    z, m = numpyro.sample("z", walk(y)), numpyro.sample("m", dist.Normal(0.0, 1.0))
    observe("y", dist.Normal(z + m + jnp.zeros(y.shape[-1]), 1.0), y)


def panel(y, mask=True):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with numpyro.plate("region", len(y)):
        z = numpyro.sample("z", walk(y))
        with handlers.mask(mask=mask):
            see(y, scale * z)


def masked_steps(y, mask):
    z = numpyro.sample("z", walk(y))
    with handlers.mask(mask=mask):
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def inner_mask(y, mask):
    z = numpyro.sample("z", walk(y))
    numpyro.sample("y", dist.Normal(z + jnp.zeros(S), 1.0).mask(mask).to_event(2), obs=y)


def without_time(y, x, s):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    see(y, numpyro.sample("z", walk(y)) + m)
    observe("x", dist.Normal(m, 1.0).expand([len(x)]), x)
    observe("s", dist.Normal(m, 1.0), s)


def simplex(y):
    z = numpyro.sample("z", walk(y))
    observe("y", dist.Dirichlet(jnp.exp(z + jnp.zeros(3))), y)


SHARES = RNG.dirichlet(np.ones(3), T)
MASK = np.arange(T)[:, None] % 4 != 1
HOLE = with_gaps(GRID, (2, 1), (5, 0))
EMPTY = np.full((T, 1), np.nan)


def points(model, *args):
    """For every scored site: how many points `az.loo` counts, in all and by its second axis, and the summed score."""

    def run():
        fit = fit_of(model, *(jnp.asarray(x) for x in args))
        tree = to_datatree(fit)
        compared = az.compare({"a": tree, "b": tree}, var_name="y") if "y" in tree["log_likelihood"] else None
        assert compared is None or np.isfinite(compared["elpd"]).all()
        draw = {n: x[0, 3] for n, x in fit.draws().items()}
        trace = handlers.trace(handlers.seed(handlers.substitute(model, draw), 0)).get_trace(*map(jnp.asarray, args))
        found = {}
        for site, scores in tree["log_likelihood"].data_vars.items():
            loo = az.loo(tree, var_name=site, pointwise=True)
            score = float(jnp.sum(trace[site]["fn"].log_prob(trace[site]["value"])))
            np.testing.assert_allclose(scores.values[0, 3].sum(), score, rtol=1e-4)
            assert np.isfinite(loo.elpd_i).all()
            found[site] = int(loo.n_data_points)
            if "region" in scores.coords and "time" not in scores.dims:
                found[f"{site} by region"] = [int((scores["region"] == r).sum()) for r in range(S)]
        return found

    return run


POINTS = {
    "all": (points(entries, GRID), {"y": T * S}),
    "a column never seen": (points(entries, with_gaps(GRID, np.s_[:, 1])), {"y": T * (S - 1)}),
    "rows never seen": (points(entries, with_gaps(GRID, 0, 4)), {"y": (T - 2) * S}),
    "single entries": (points(entries, HOLE), {"y": T * S - 2}),
    "ragged ends": (points(panel, RAGGED), {"y": SEEN.sum(), "y by region": SEEN.sum(1).tolist()}),
    "ragged ends, integrated out": (
        points(integrated_in_a_plate("region"), RAGGED),
        {"y": SEEN.sum(), "y by region": SEEN.sum(1).tolist()},
    ),
    "a member never seen": (points(panel, with_gaps(PANEL, 1)), {"y": T * (S - 1)}),
    "a masked member": (points(panel, PANEL, np.arange(S) != 1), {"y": T * (S - 1)}),
    "masked steps": (points(masked_steps, FLOW, MASK), {"y": MASK.sum()}),
    "a mask inside": (points(inner_mask, GRID, np.arange(T * S).reshape(T, S) > 3 * S), {"y": T - 3}),
    "gaps of an event": (points(one_path_two_sites, HOLE, FLOW), {"y": T, "x": T}),
    "a site never seen": (points(one_path_two_sites, GRID, EMPTY), {"y": T}),
    "sites with other gaps": (
        points(one_path_two_sites, with_gaps(GRID, 4), with_gaps(FLOW, 3, 4)),
        {"y": T - 1, "x": T - 2},
    ),
    "sites without time": (
        points(without_time, FLOW, np.array([1.0, np.nan, 2.0, 3.0]), np.array(1.0)),
        {"y": T, "x": 3, "s": 1},
    ),
    "priors in factors": (points(priors_in_factors, with_gaps(FLOW, 2)), {"y": T - 1}),
    "whole events": (points(simplex, with_gaps(SHARES, 2)), {"y": T - 1}),
}
POINTS = {n: Situation(run, right, jit="eager", precisions=(True,)) for n, (run, right) in POINTS.items()}


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.filterwarnings("ignore:.*[Pp]areto")
@pytest.mark.filterwarnings("ignore:The point-wise LOO")
@pytest.mark.parametrize(("name", "precise", "jitted"), cases(POINTS))
def test_only_what_was_observed_is_scored(name, precise, jitted):
    check(POINTS[name], precise, jitted)


def test_nothing_observed_has_no_scores():
    assert "log_likelihood" not in to_datatree(fit_of(panel, jnp.full((S, T, 1), jnp.nan))).children


# Draws of the past


def path_of(steps, batch=()):
    return StatePath(jnp.zeros((*batch, 1)), jnp.eye(1), 0.9 * jnp.eye(1), 0.3 * jnp.eye(1), steps)


def transposed(y):
    """Data `(time, region)`, the path `(region, time, state)`."""
    with numpyro.plate("region", y.shape[1]):
        z = numpyro.sample("z", path_of(y.shape[0]))
        observe("y", dist.Normal(z[..., 0], 1.0).to_event(1), y.T)


def by_name(data):
    z = numpyro.sample("z", path_of(len(data["y"])))
    observe("y", dist.Normal(z[:, 0] + data["u"], 1.0), data["y"])


def keywords(*, u, y):
    by_name({"u": u, "y": y})


def two_arguments(y, x):
    z = numpyro.sample("z", path_of(len(y)))
    observe("y", dist.Poisson(jnp.exp(z[:, 0])), y)
    observe("x", dist.Normal(z, 1.0).to_event(2), x)


def of_the_rest(y):
    observe("y", dist.Normal(numpyro.sample("z", path_of(T))[:, 0], 1.0), FLOW[:, 0] + 0 * y.sum())


def differences(y):
    observe("y", dist.Normal(numpyro.sample("z", path_of(len(y) - 1))[:, 0], 1.0), jnp.diff(y))


def plain_nan(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("z", path_of(len(y)))[:, 0], 1.0), obs=y)


def with_a_total(y, total):
    z = numpyro.sample("z", path_of(len(y)))
    observe("y", dist.Normal(z[:, 0], 1.0), y)
    observe("total", dist.Normal(z.sum(), 1.0), total)


def past(model, change, *args, **kwargs):
    """Whether the arguments cut at step 4 are the same with another future, and with another past."""

    def run():
        cut = []
        for steps in (np.s_[:0], np.s_[4:], np.s_[:4]):
            a, k = jax.tree.map(jnp.asarray, change(args, kwargs, steps))
            cut.append(jax.tree.leaves(timed_arguments(model, a, k).past(4)))
        return [all(np.array_equal(x, y, equal_nan=True) for x, y in zip(cut[0], c, strict=True)) for c in cut[1:]]

    return run


def moved(y, steps, axis=0):
    y = y.copy()
    np.moveaxis(y, axis, 0)[steps] += 5
    return y


COUNTS = RNG.poisson(2.0, T)
LINE = FLOW[:, 0]
INPUTS = {"u": LINE + 1, "y": LINE}
PASTS = {
    "a panel (region, time, obs)": past(in_a_plate("region"), lambda a, k, s: ((moved(a[0], s, 1),), k), PANEL),
    "a panel (time, region)": past(transposed, lambda a, k, s: ((moved(a[0], s),), k), GRID),
    "a square panel (time, region)": past(transposed, lambda a, k, s: ((moved(a[0], s),), k), RNG.normal(size=(T, T))),
    "a dict with inputs": past(by_name, lambda a, k, s: (({**a[0], "y": moved(a[0]["y"], s)},), k), INPUTS),
    "data by keyword": past(keywords, lambda a, k, s: (a, {**k, "y": moved(k["y"], s)}), **INPUTS),
    "two data arguments": past(two_arguments, lambda a, k, s: (tuple(moved(x, s) for x in a), k), COUNTS, FLOW),
    "missing at the end": past(
        two_arguments, lambda a, k, s: (tuple(moved(x, s) for x in a), k), with_gaps(1.0 * COUNTS, np.s_[6:]), FLOW
    ),
}


def unchanged(args, kwargs, steps):
    return args, kwargs


ALL = "the future of the data cannot be hidden"
UNKNOWN_PASTS = {
    "data of the function's own": ((of_the_rest, unchanged, LINE), f"`fit`: the values of 'y' do not come.*{ALL}"),
    "differences": ((differences, unchanged, LINE), f"`fit`: the values of 'y' do not come.*{ALL}"),
    "no missing entries": ((plain_nan, unchanged, LINE), f"`fit`: NaN in 'y' must mean missing, so {ALL}"),
    "a total": ((with_a_total, unchanged, LINE, np.array(1.0)), f"`fit`: the observed site 'total'.*{ALL}"),
}
PASTS = {n: Situation(run, [True, False], jit="eager", precisions=(False,)) for n, run in PASTS.items()} | {
    n: Situation(past(*of), refused=words, jit="eager", precisions=(False,)) for n, (of, words) in UNKNOWN_PASTS.items()
}


@pytest.mark.parametrize(("name", "precise", "jitted"), cases(PASTS))
def test_draws_of_the_past_do_not_know_the_future(name, precise, jitted):
    check(PASTS[name], precise, jitted)


@pytest.mark.parametrize(
    ("model", "args"),
    [(transposed, (RNG.normal(size=(T, T)),)), (two_arguments, (COUNTS, FLOW))],
    ids=["square", "two"],
)
def test_the_draws_are_those_of_the_cut_data(model, args):
    guide = AutoStateSpace(model, rank=1)
    svi = SVI(model, guide, optax.adam(1e-9), Trace_ELBO())
    args = jax.tree.map(jnp.asarray, args)
    fit = SVIFit.of(svi, svi.run(jax.random.key(0), 1, *args, progress_bar=False), *args)
    found = []
    for steps in (np.s_[:0], np.s_[4:], np.s_[:4]):
        fit.args = tuple(jnp.asarray(moved(np.asarray(x), steps)) for x in args)
        found.append(causal_draws(fit, [4], num_samples=3)["z"])
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_a_guide_asked_for_the_past_of_other_axes_says_so():
    guide = AutoStateSpace(transposed, rank=1)
    with pytest.raises(ValueError, match=r"`args`.*\(3, 9\) \(batch, time\) in front; got \(9, 3\)"):
        guide.given_past(jax.random.key(0), {}, 2, jnp.asarray(GRID))


# Predictions over other steps


def predicted(model, *args, **options):
    def run():
        seeded = handlers.seed(functools.partial(model, **options), 0)
        draws = {
            n: s["value"][None]
            for n, s in handlers.trace(seeded).get_trace(*args, num_steps=T).items()
            if s["type"] == "sample" and n != "y"
        }
        return Predictive(functools.partial(model, **options), draws)(jax.random.key(0), *args, num_steps=T + 2)[
            "y"
        ].shape

    return run


def reparametrised(y=None, num_steps=None):
    z = handlers.reparam(lambda: numpyro.sample("z", path_of(num_steps)), config={"z": NonCenteredPath()})()
    see(y, z)


SAMPLED = {"states": "sampled", "location": 0.0, "scale": 1.0}
PREDICTIONS = {
    "states integrated out": Situation(predicted(models.local_level, location=0.0, scale=1.0), (1, T + 2, 1)),
    "a sampled path": Situation(
        predicted(models.local_level, **SAMPLED), refused="`z`.*9 steps|`z`.*11 steps.*`pssm.infer"
    ),
    "its noise": Situation(predicted(models.structural, seasonal=3, **SAMPLED), refused="`z_base`.*11 steps"),
    "the noise of an autoregression": Situation(
        predicted(models.autoregression, **SAMPLED), refused="`z_base`.*11 steps"
    ),
    "several series": Situation(predicted(models.lds, num_obs=2, n_state=2, states="sampled"), refused="`z`.*11 steps"),
    "counts": Situation(predicted(models.poisson_lds, num_obs=2, n_state=2), refused="`z`.*11 steps"),
    "a user's path in its noise": Situation(predicted(reparametrised), refused="`z_base`.*11 steps"),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_draws_of_a_path_are_no_forecast(name):
    situation = PREDICTIONS[name]
    if situation.refused is None:
        assert situation.run() == situation.right
        return
    with pytest.raises(ValueError, match=situation.refused) as caught:
        situation.run()
    assert "\n" not in str(caught.value)


# Studies of panels


def paths_of_regions(y):
    scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.3))
    with numpyro.plate("region", len(y)):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        z = numpyro.sample("z", path_of(y.shape[1]))
        see(y, scale * z + offset[:, None, None])


def paths_in_two_plates(y):
    scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.3))
    with numpyro.plate("draw", y.shape[0], dim=-2):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        with numpyro.plate("state", y.shape[1], dim=-1):
            z = numpyro.sample("z", path_of(y.shape[2]))
            observe("y", dist.Normal(scale * z[..., 0] + offset[..., None], 1.0).to_event(1), y)


PANELS = {
    "a path in a plate": (paths_of_regions, RAGGED),
    "a marginal in a plate": (integrated_in_a_plate("region"), RAGGED),
    "two plates": (paths_in_two_plates, RNG.normal(size=(2, S, T))),
}


@pytest.mark.filterwarnings("ignore:SVI has not converged")
@pytest.mark.parametrize("name", PANELS)
def test_a_study_of_a_panel_has_every_group_for_every_method_that_applies(name, tmp_path):
    model, y = PANELS[name]
    methods = [m for m in check_model(model, jnp.asarray(y)).applicable if m != "exact marginal"]
    assert len(methods) == (3 if name == "a marginal in a plate" else 8)
    few = {"num_warmup": 10, "num_samples": 6, "num_chains": 1, "svi_steps": 12, "horizon": 2, "progress": False}
    study = pssm.compare(model, y, methods, out=tmp_path / "out", leave_future_out=len(methods) == 3, **few)
    for method, result in study.results.items():
        assert result.status == "done", (method, result.note)
        assert {"posterior", "observed_data", "log_likelihood", "smoothed_states", "forecast"} <= set(
            result.tree.children
        )
        assert "No " not in result.note, result.note
        shape = next(iter(sites_of(result.tree["log_likelihood"]).values())).shape
        assert np.prod(shape[2:]) == np.sum(~np.isnan(y))
    study.report(tmp_path / "out")
