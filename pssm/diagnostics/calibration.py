"""Simulation-based calibration: does an inference method find the parameters that the model has drawn?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import xarray as xr
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI

from pssm._checks import check_choice, check_count
from pssm._keys import as_key
from pssm._types import Array, Key, KeyLike
from pssm.fitting.start import GUIDES, build_svi, prepared
from pssm.fitting.training import Settings
from pssm.guides.paths import FAMILIES

Draws = dict[str, Any]
Sampler = Callable[[Key, Array], Draws]


@dataclass(frozen=True)
class Calibration:
    """Ranks of the true values among the posterior draws, over many simulated series.

    Attributes:
        ranks: number of draws, of `num_draws`, below the true value, for every site, `(simulation, ...)`.
        num_draws: posterior draws that each true value was ranked among.
        p_values: of the test that the ranks are uniform, for every entry of every site.
        method: the calibrated method, in words.
    """

    ranks: xr.Dataset
    num_draws: int
    p_values: xr.Dataset
    method: str

    @property
    def smallest(self) -> tuple[str, float]:
        """The entry that fits worst and its p-value, corrected for the number of entries (Bonferroni)."""
        entries = [(name, x) for name, values in self.p_values.items() for x in values.values.ravel()]
        name, value = min(entries, key=lambda entry: entry[1])
        return str(name), float(min(1.0, value * len(entries)))

    @property
    def verdict(self) -> str:
        """One sentence: whether the method is calibrated, at this number of simulations."""
        name, value = self.smallest
        count = self.ranks.sizes["simulation"]
        if value >= 0.05:
            return (
                f"{self.method}: no sign of miscalibration in {count} simulations (smallest corrected p {value:.2g})."
            )
        scaled = self.ranks[name] / self.num_draws
        center, spread = float(scaled.mean()), float(scaled.var())
        if abs(center - 0.5) > 3 * np.sqrt(1 / 12 / scaled.size):
            what = "too high" if center < 0.5 else "too low"
        else:
            what = "too narrow" if spread > 1 / 12 else "too wide"
        return f"{self.method}: posteriors of `{name}` are {what} (corrected p {value:.2g}, {count} simulations)."

    def to_datatree(self) -> xr.DataTree:
        """Group `prior_sbc` with the ranks as numbers between 0 and 1, as `arviz.plot_ecdf_pit` takes them."""
        named = _spread_out(self.ranks, self.num_draws).rename(simulation="draw").expand_dims(chain=[0])
        return xr.DataTree.from_dict({"prior_sbc": named})


def simulation_based_calibration(
    model: Callable[..., Any],
    method: str | Sampler = "nuts",
    *args: Any,
    num_simulations: int = 100,
    num_draws: int = 99,
    sites: tuple[str, ...] | None = None,
    data_site: str = "y",
    key: KeyLike = 0,
    num_warmup: int = 500,
    thin: int = 5,
    num_steps: int = 2000,
    learning_rate: float = 0.02,
    rank: int = 4,
    progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> Calibration:
    """Draws parameters and a series from the model, infers, and ranks the truth among the posterior draws; many times.

    If the method is right the ranks are uniform: over 0 .. num_draws, for every latent value. A peak in the middle
    means that posteriors are too wide, peaks at both ends that they are too narrow, a slope that they are biased.

    Args:
        model: a NumPyro model whose first argument is the data: called with None it draws them. Its priors must not be
            made from the data (pssm's models scale theirs by `y`: fix that by `scale=`, or write your own).
        method: "nuts", "svi:" and a guide that `fit_svi` knows ("svi:mvn", "svi:chain", ...), or a function
            `(key, y) -> draws by site`, `(num_draws, ...)` each, independent of each other.
        args: the model's arguments after the data.
        num_simulations: number of series.
        num_draws: posterior draws for each, independent or nearly so.
        sites: latent sites to rank; all by default.
        data_site: the observed site.
        key: random key, or a whole number. Calls with equal keys, also the default, give equal draws.
        num_warmup: of NUTS.
        thin: NUTS keeps one draw of every `thin`.
        num_steps: of SVI.
        learning_rate: of SVI.
        rank: of SVI's `AutoStateSpace`.
        progress: called with (done, total) after each series.
        kwargs: the model's keyword arguments.

    Returns:
        A `Calibration`.

    Raises:
        ValueError: an unknown method, site or data site, a count below 1, or draws that are NaN or of the wrong number.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(y=None):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mu, 1).expand([3]).to_event(1), obs=y)
        >>> def exact(key, y):
        ...     return {"mu": y.sum() / 4 + 0.5 * jax.random.normal(key, (99,))}
        >>> found = simulation_based_calibration(model, exact, num_simulations=60)
        >>> found.smallest[1] > 0.01
        True

    Source:
        Talts et al. 2018; the test of uniformity is ArviZ's (Säilynoja et al. 2022).
    """
    for name, value in (("num_simulations", num_simulations), ("num_draws", num_draws), ("thin", thin)):
        check_count(name, value)
    sim_key, fit_key = jax.random.split(as_key(key))

    @jax.jit
    def simulate(key: Key) -> tuple[Draws, Array]:
        trace = handlers.trace(handlers.seed(model, key)).get_trace(None, *args, **kwargs)
        latent = {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and n != data_site}
        if data_site not in trace:
            raise ValueError(f"`data_site` {data_site!r} is not a site of the model; it has {', '.join(trace)}.")
        return latent, trace[data_site]["value"]

    truths, series = jax.lax.map(simulate, jax.random.split(sim_key, num_simulations))
    chosen = tuple(truths) if sites is None else sites
    for name in chosen:
        check_choice("sites", name, tuple(truths))
    if callable(method):
        sampler = method
    elif method == "nuts":
        sampler = _nuts(model, num_warmup, num_draws, thin, args, kwargs)
    else:
        options = tuple(f"svi:{guide}" for guide in (*GUIDES, *FAMILIES))
        check_choice("method", method, ("nuts", *options))
        settings = Settings(
            guide=method.removeprefix("svi:"), rank=rank, num_steps=num_steps, learning_rate=learning_rate
        )
        svi = build_svi(model, settings)
        sampler = _svi(svi, series[0], num_draws, num_steps, args, kwargs)
    ranks = {name: [] for name in chosen}
    for i in range(num_simulations):
        draws = sampler(jax.random.fold_in(fit_key, i), series[i])
        for name in chosen:
            ranks[name].append(_rank(name, np.asarray(truths[name][i]), draws, num_draws))
        if progress is not None:
            progress(i + 1, num_simulations)
    found = xr.Dataset({n: (("simulation", *_dims(n, x[0])), np.stack(x)) for n, x in ranks.items()})
    label = method if isinstance(method, str) else getattr(method, "__name__", "the sampler")
    return Calibration(found, num_draws, _uniformity(found, num_draws), label)


def _rank(name: str, truth: np.ndarray, draws: Draws, num_draws: int) -> np.ndarray:
    if name not in draws:
        raise ValueError(f"`method` gave no draws of site {name!r}; it gave {', '.join(draws)}.")
    values = np.asarray(draws[name])
    if values.shape != (num_draws, *truth.shape):
        raise ValueError(
            f"`method` must give draws of shape {(num_draws, *truth.shape)} of {name!r}; got {values.shape}."
        )
    if np.isnan(values).any():
        raise ValueError(f"`method` gave draws of {name!r} that are NaN.")
    return (values < truth).sum(0)


def _dims(name: str, x: np.ndarray) -> tuple[str, ...]:
    return tuple(f"{name}_dim_{i}" for i in range(x.ndim))


def _spread_out(ranks: xr.Dataset, num_draws: int) -> xr.Dataset:
    """Ranks as numbers between 0 and 1: uniform within the step of each rank, so that equal ranks do not pile up."""
    rng = np.random.default_rng(0)
    return ranks.map(lambda x: (x + rng.uniform(size=x.shape)) / (num_draws + 1))


def _uniformity(ranks: xr.Dataset, num_draws: int) -> xr.Dataset:
    import arviz  # noqa: F401  registers the accessor; takes seconds to import

    uniform = _spread_out(ranks, num_draws)
    found = {}
    for name, x in uniform.items():
        result = x.azstats.uniformity_test(dim="simulation")  # p-value and the contribution of each simulation
        found[name] = result[0]
    return xr.Dataset(found)


def _nuts(model: Any, num_warmup: int, num_draws: int, thin: int, args: tuple, kwargs: dict[str, Any]) -> Sampler:
    mcmc = MCMC(
        NUTS(model),
        num_warmup=num_warmup,
        num_samples=thin * num_draws,
        thinning=thin,
        progress_bar=False,
        jit_model_args=True,  # one compiled program serves all series
    )

    def sampler(key: Key, y: Array) -> Draws:
        mcmc.run(key, y, *args, **kwargs)
        return mcmc.get_samples()

    return sampler


def _svi(svi: SVI, first: Array, num_draws: int, num_steps: int, args: tuple, kwargs: dict[str, Any]) -> Sampler:
    """One compiled program: start, optimise, draw. The guide's first call happens outside of it."""
    guide: Any = svi.guide
    prepared(guide, jax.random.key(0), (first, *args), kwargs)

    @jax.jit
    def sampler(key: Key, y: Array) -> Draws:
        start_key, draw_key = jax.random.split(key)
        state = svi.init(start_key, y, *args, **kwargs)
        state, _ = jax.lax.scan(lambda s, _: svi.update(s, y, *args, **kwargs), state, length=num_steps)
        params = svi.get_params(state)
        return guide.sample_posterior(draw_key, params, y, *args, sample_shape=(num_draws,), **kwargs)

    return sampler
