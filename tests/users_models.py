"""Models as users write them, for tables of tests: other names of sites and axes, panels, masks, scans."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from pssm import LinearGaussianSSM, observe
from pssm.distributions import LinearGaussianMarginal, StatePath

T, S = 12, 3
ONE = jnp.eye(1)


class Case(NamedTuple):
    """A model with its arguments, and what is to be found out about it."""

    model: Any
    y: Any
    axes: dict[str, tuple[str, ...]]  # of the observed sites and some others
    time: str | None = "time"
    options: dict[str, Any] = {}
    methods: tuple[str, ...] = ("svi:normal",)
    exact: bool = False


def counts(*shape, missing=True):
    y = np.random.default_rng(0).poisson(3.0, shape).astype(float)
    if missing:
        y.reshape(-1)[y.size // 2] = np.nan
    return y


def walk(num_steps, size=1, batch=()):
    eye = jnp.eye(size)
    return StatePath(jnp.ones((*batch, size)), eye, 0.9 * eye, 0.3 * eye, num_steps)


def level(scale, size=1):
    eye = jnp.eye(size)
    return LinearGaussianSSM(jnp.zeros(size), 3.0 * eye, eye, scale * eye, jnp.ones((1, size)), ONE)


def flat_counts(counts):
    z = numpyro.sample("path", walk(len(counts)))
    rate = numpyro.deterministic("rate", jnp.exp(z[:, 0]))
    observe("arrivals", dist.Poisson(rate), counts)


def event_counts(counts):
    z = numpyro.sample("path", walk(len(counts), 2))
    observe("arrivals", dist.Poisson(jnp.exp(z.sum(-1))).to_event(1), counts)


def wide_counts(counts):
    z = numpyro.sample("path", walk(counts.shape[0], 2))
    loadings = numpyro.sample("loadings", dist.Normal(0, 1).expand((2, counts.shape[1])).to_event(2))
    observe("arrivals", dist.Poisson(jnp.exp(0.1 * z @ loadings)), counts)


def panel(flow):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("region", flow.shape[0]):
        numpyro.sample("flow", LinearGaussianMarginal(level(scale), flow.shape[1]), obs=flow)


def flat_panel(counts):
    """Data `(region, time)`: paths in a plate, and a second plate only over regions."""
    with numpyro.plate("region", counts.shape[0]):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        z = numpyro.sample("path", walk(counts.shape[1]))
        observe("arrivals", dist.Poisson(jnp.exp(offset[:, None] + z[..., 0])).to_event(1), counts)


def two_plates(counts):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("region", counts.shape[0], dim=-2):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        with numpyro.plate("time", counts.shape[1], dim=-1):
            observe("arrivals", dist.Normal(offset, scale), counts)


def days(sales):
    mean = numpyro.sample("mean", dist.Normal(3.0, 3.0))
    with numpyro.plate("day", len(sales)):
        shock = numpyro.sample("shock", dist.Normal(0.0, 1.0))
        observe("sales", dist.Normal(mean + shock, 1.0), sales)


def two_sites(counts, price):
    z = numpyro.sample("path", walk(counts.shape[0]))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    observe("price", dist.Normal(z + jnp.zeros(price.shape[1]), noise).to_event(2), price)
    observe("arrivals", dist.Poisson(jnp.exp(0.3 * z)).to_event(2), counts)


def by_name(data):
    z = numpyro.sample("path", walk(data["flow"].shape[0]))
    effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
    observe("flow", dist.Normal(z[:, 0] + effect * data["rain"], 1.0), data["flow"])
    observe("yearly", dist.Normal(z[:: len(z) // len(data["yearly"]), 0], 1.0).to_event(1), data["yearly"])


def in_a_scan(flow):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def step(z, y):
        z = numpyro.sample("level", dist.Normal(0.9 * z, scale))
        observe("flow", dist.Normal(z, 1.0), y)
        return z, None

    scan(step, 0.0, flow)


def plate_in_a_scan(flow):
    def step(z, y):
        with numpyro.plate("region", flow.shape[1]):
            z = numpyro.sample("level", dist.Normal(0.9 * z, 1.0))
            observe("flow", dist.Normal(z, 1.0), y)
        return z, None

    scan(step, jnp.zeros(flow.shape[1]), flow)


def as_many_states_as_steps(flow):
    """12 states, 12 steps, 12 loadings: nothing may be told from a size."""
    n = flow.shape[0]
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("weights", dist.Normal(0.0, 1.0).expand((n,)).to_event(1))
    numpyro.sample("flow", LinearGaussianMarginal(level(scale, n), n), obs=flow)


def square(counts):
    """A matrix of `(region, time)` of as many regions as steps, without a plate or an event."""
    z = numpyro.sample("path", walk(counts.shape[1]))
    offset = numpyro.sample("offset", dist.Normal(0.0, 1.0).expand((counts.shape[0],)).to_event(1))
    observe("arrivals", dist.Poisson(jnp.exp(0.2 * (offset[:, None] + z[:, 0]))), counts)


def masked(flow, mask):
    z = numpyro.sample("path", walk(len(flow)))
    with handlers.mask(mask=mask):
        numpyro.sample("flow", dist.Normal(z[:, 0], 1.0), obs=flow)


def partly_latent(flow, mask):
    z = numpyro.sample("path", walk(len(flow)))
    numpyro.sample("flow", dist.Normal(z[:, 0], 1.0), obs=flow, obs_mask=mask)


def scoped(flow):
    """Names with a slash, a parameter called as an axis, a factor, a NumPyro walk."""
    with handlers.scope(prefix="rivers"):
        z = numpyro.sample("path", dist.GaussianRandomWalk(0.5, num_steps=len(flow)))
        series = numpyro.sample("time", dist.HalfNormal(1.0))
        numpyro.factor("bonus", -0.1 * series)
        observe("flow", dist.Normal(z, series), flow)


def minibatch(flow):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("region", flow.shape[0], subsample_size=2) as index:
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        z = numpyro.sample("path", walk(flow.shape[1]))
        observe("flow", dist.Normal(offset[:, None, None] + z, scale).to_event(2), flow[index])


def constant(flow):
    mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
    numpyro.sample("flow", dist.Normal(mean, 1.0), obs=flow)


NUTS = ("nuts", "svi:normal")
MASK = np.arange(T) % 5 != 2
CASES = {
    "counts (time,)": Case(
        flat_counts,
        counts(T),
        {"arrivals": ("time",), "path": ("time", "state"), "rate": ("time",)},
        methods=("nuts", "nuts:states", "svi:chain"),
    ),
    "counts as one event": Case(event_counts, counts(T), {"arrivals": ("time",), "path": ("time", "state")}),
    "counts (time, obs)": Case(
        wide_counts, counts(T, S), {"arrivals": ("time", "series"), "loadings": ("loadings_dim_0", "loadings_dim_1")}
    ),
    "a panel": Case(panel, counts(S, T, 1), {"flow": ("region", "time", "series")}, exact=True, methods=NUTS),
    "a square panel": Case(panel, counts(T, T, 1), {"flow": ("region", "time", "series")}, exact=True),
    "a panel (series, time)": Case(
        flat_panel,
        counts(S, T),
        {"arrivals": ("region", "time"), "path": ("region", "time", "state"), "offset": ("region",)},
    ),
    "a square panel (series, time)": Case(flat_panel, counts(T, T), {"arrivals": ("region", "time")}),
    "two plates": Case(two_plates, counts(S, T), {"arrivals": ("region", "time")}, methods=NUTS),
    "the plate is time": Case(days, counts(T), {"sales": ("day",), "shock": ("day",)}, time="day", methods=NUTS),
    "two sites, two arguments": Case(
        two_sites,
        counts(T, 1),
        {"arrivals": ("time", "series"), "price": ("time", "price_series")},
        options={"args": (counts(T, 2),)},
        methods=("svi:chain",),
    ),
    "a dict": Case(
        by_name,
        {"flow": counts(T), "rain": np.ones(T), "yearly": counts(3)},
        {"flow": ("time",), "yearly": ("yearly_time",)},
        options={"dims": {"yearly": ("time",)}},
    ),
    "a scan": Case(in_a_scan, counts(T), {"flow": ("time",), "level": ("time",)}, methods=NUTS),
    "a plate in a scan": Case(
        plate_in_a_scan,
        counts(T, S),
        {"flow": ("time", "region"), "level": ("time", "region")},
        methods=NUTS,
    ),
    "as many states as steps": Case(
        as_many_states_as_steps,
        counts(T, 1),
        {"flow": ("time", "series"), "weights": ("weights_dim_0",)},
        exact=True,
    ),
    "a square without plates": Case(
        square, counts(T, T), {"arrivals": ("series", "time"), "offset": ("offset_dim_0",)}
    ),
    "a mask": Case(masked, counts(T, missing=False), {"flow": ("time",)}, options={"mask": MASK}),
    "an obs_mask": Case(
        partly_latent,
        counts(T, missing=False),
        {"flow": ("time",), "flow_observed": ("time",), "flow_unobserved": ("time",)},
        options={"mask": jnp.asarray(MASK)},
    ),
    "scopes": Case(
        scoped, counts(T), {"rivers/flow": ("time",), "rivers/path": ("time",), "rivers/time": ()}, methods=NUTS
    ),
    "a part of a plate": Case(
        minibatch,
        counts(4, T, 1),
        {"flow": ("region", "time", "series"), "offset": ("region",), "path": ("region", "time", "state")},
        methods=("nuts", "svi:mvn", "svi:normal"),
    ),
    "no state": Case(constant, counts(T, missing=False), {"flow": ("time",), "mean": ()}, methods=NUTS),
}


def run_of(case):
    """The model's positional and keyword arguments."""
    options = {n: x for n, x in case.options.items() if n not in ("args", "dims")}
    y = jax.tree.map(jnp.asarray, case.y)
    return (y, *case.options.get("args", ())), options
