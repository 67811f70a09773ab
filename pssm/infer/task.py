"""Posterior draws of a fit, or of a model and its draws, beside the source of their states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from pssm._checks import check_choice, is_pandas, unmasked
from pssm._keys import as_key
from pssm._types import Array, Key
from pssm.distributions import LinearGaussianMarginal
from pssm.distributions.unwrap import unwrap
from pssm.fitting.draws import flatten_draws, trace_with
from pssm.fitting.point import PointFit
from pssm.fitting.results import Fit, record_of
from pssm.infer.causal import causal_draws
from pssm.infer.horizon import Horizon, inputs_of, longer_arguments
from pssm.infer.sources import ExactSource, source_of, sources_of
from pssm.inspection.forms import integrated, plain_model

PARAMETERS = ("fixed", "laplace")


class Task(NamedTuple):
    """Posterior draws and the source of their states: `draws` are merged over chains and thinned.

    `labels` are those of the data and inputs, where these came as frames.
    """

    source: Any
    draws: dict[str, Array]
    key: Key
    fit: Any = None
    labels: Any = None

    @property
    def count(self) -> int:
        """Number of draws; one where parameters are learned and nothing is drawn."""
        return next((len(x) for x in self.draws.values()), 1)

    @property
    def origins(self) -> tuple[Any, Any]:
        """What states and observations are counted from, mostly 0."""
        return self.source.origins({name: x[0] for name, x in self.draws.items()})

    def map(self, one: Callable[..., Any], times: int = 1) -> Any:
        """`one(sample, key)` for every draw, as often as `times` says, in batches, as NumPy arrays."""
        rows = jnp.repeat(jnp.arange(self.count), times)
        keys = jax.random.split(self.key, len(rows))
        if self.count == 1 and times > 1:  # one point: what does not depend on the key is computed once
            point = {name: x[0] for name, x in self.draws.items()}
            found = jax.jit(jax.vmap(one, (None, 0)))(point, keys)
            return jax.tree.map(np.asarray, found)

        @jax.jit
        def run(draws: dict[str, Array]) -> Any:
            def row(xs: tuple[Array, Array]) -> Any:
                return one({name: x[xs[0]] for name, x in draws.items()}, xs[1])

            return jax.lax.map(row, (rows, keys), batch_size=50)

        return jax.tree.map(np.asarray, run(self.draws))

    def redrawn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Task":
        """Draws from the guide for other arguments."""
        if self.fit is None or record_of(self.fit).guide is None:
            raise ValueError("`fit`: the codes of future frames come from a guide, and this fit has none.")
        found = record_of(self.fit).sample(self.count, self.key, args, kwargs)
        return self._replace(draws=flatten_draws(found))

    def given_past(self, known: int) -> "Task":
        """Draws whose path knows the first observations only."""
        if self.fit is None or record_of(self.fit).guide is None:
            raise ValueError(
                "`origin`: the drawn states know the whole series. Fit the beginning of the series, or use a model "
                "with its states integrated out, or a guide."
            )
        found = causal_draws(self.fit, [known], num_samples=self.count, key=self.key)
        return self._replace(draws={n: jnp.asarray(x[0]) for n, x in found.items()})


def task_of(
    fit: Any,
    draws: Any,
    args: tuple,
    kwargs: dict[str, Any],
    most: int,
    key: Any,
    site: str | None,
    parameters: str | None = None,
) -> Task:
    """From a fit, or from a model with its draws; `parameters` says what a point fit knows of its own."""
    model, thinned, first, args, kwargs, key = run_of(fit, draws, args, kwargs, most, as_key(key), parameters)
    if draws is None:
        return Task(source_of(model, first, args, kwargs, site), thinned, key, fit, record_of(fit).labels)
    labels = None
    if any(is_pandas(x) for x in (*args[:1], kwargs.get("u"))):
        from pssm.times.labels import labels_beside  # pandas, which is there already

        labels = labels_beside(args[0] if args else None, kwargs.get("u"))
    return Task(source_of(model, first, args, kwargs, site), thinned, key, None, labels)


def steps_of(
    task: Task,
    known: int,
    horizon: int,
    u_future: Any,
    y_future: Any = None,
    future: Any = None,
    *,
    strict: bool = False,
) -> Horizon:
    """The steps of a forecast, with the rows of frames in their places.

    A model whose states are integrated out may go on without arguments that do; with `strict` it may not.
    """
    source = task.source
    if is_pandas(u_future) or is_pandas(y_future):
        from pssm.times.frames import inputs_of_steps, known_of_steps, steps_ahead  # pandas, which is there already
        from pssm.times.labels import column_names

        labels = task.labels
        behind = labels if labels is None or labels.time is None else labels._replace(time=labels.time[:known])
        steps, inputs, columns = steps_ahead(behind, horizon), labels and labels.inputs, labels and labels.columns
        inputs = column_names(inputs_of(source)) if inputs is None else inputs
        u_future = inputs_of_steps("u_future", u_future, steps, horizon, inputs, known)
        y_future = known_of_steps("y_future", y_future, steps, horizon, columns, known)
    try:
        ahead = longer_arguments(source, known, horizon, u_future, future)
    except ValueError as error:
        if strict or not isinstance(source, ExactSource):
            raise
        ahead = Horizon(known, horizon, u_future, source.args, source.kwargs, why=str(error))
    return ahead._replace(y_future=None if y_future is None else unmasked(y_future, "y_future"))


def exact_task(
    fit: Any,
    draws: Any = None,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    most: int,
    key: Any = 0,
    site: str | None = None,
    parameters: str | None = None,
) -> Task:
    """`task_of` where the states are integrated out exactly.

    Raises:
        ValueError: they are not.
    """
    task = task_of(fit, draws, args, kwargs or {}, most, key, site, parameters)
    if not isinstance(task.source, ExactSource):
        raise ValueError("`fit`: its model has no `LinearGaussianMarginal` site, so there are no exact predictions.")
    return task


def run_of(
    fit: Any, draws: Any, args: tuple, kwargs: dict[str, Any], most: int, key: Key, parameters: str | None = None
) -> tuple[Any, ...]:
    """The model that has the states, its draws, the first of them, its arguments, and a key."""
    if parameters is not None:
        check_choice("parameters", parameters, PARAMETERS)
        if draws is not None or not isinstance(fit, PointFit):
            raise ValueError(
                "`parameters` goes with a fit at one point (`fit_ml`, `fit_map`); other fits have posterior draws of "
                "them. Leave it out."
            )
    if draws is not None:
        thinned = thin(draws, most)
        first = {name: x[0] for name, x in thinned.items()}
        if marginal_site(trace_with(fit, first, *args, **kwargs)) is None:
            raise ValueError(
                "`model` has no `LinearGaussianMarginal` site, so its states cannot be integrated out exactly. "
                'pssm\'s linear models have one with states="marginal".'
            )
        return fit, thinned, first, args, kwargs, key
    if args or kwargs:
        raise TypeError("a fit has its own arguments: `*args` and `**kwargs` go with a model and its draws.")
    record = record_of(fit)
    guide_key, key = jax.random.split(key)
    if parameters == "laplace":
        thinned = {n: jnp.asarray(x) for n, x in fit.approximate_draws(most, guide_key).items()}
    else:
        thinned = thin(record.draws(most, guide_key), most)
    first = {name: x[0] for name, x in thinned.items()}
    model = plain_model(record.model)
    found = integrated(model, first, record.args, record.kwargs)
    model, kwargs = (model, record.kwargs) if found is None else found
    model = handlers.substitute(model, data=record.params) if record.params else model
    return model, thinned, first, record.args, kwargs, key


def states_of(
    fit: Fit | Callable[..., Any], draws: dict[str, Any] | None = None, *args: Any, **kwargs: Any
) -> list[tuple[str, str]]:
    """Every observed site with states and the site that has them: a path that it follows, or the series itself."""
    model, _, first, args, kwargs, _ = run_of(fit, draws, args, kwargs, 1, as_key(0))
    return [(s.site, s.holder) for s in sources_of(model, first, args, kwargs)]


def marginal_site(trace: dict[str, Any]) -> tuple[str, LinearGaussianMarginal, Array] | None:
    """Name, distribution and value of the observed `LinearGaussianMarginal` of a trace, or None if it has none."""
    for name, site in trace.items():
        fn = unwrap(site["fn"])[0] if site["type"] == "sample" else None
        if isinstance(fn, LinearGaussianMarginal):
            return name, fn, site["value"]
    return None


def thin(draws: dict[str, Any], most: int) -> dict[str, Array]:
    """At most `most` draws, evenly spaced over all chains."""
    flat = flatten_draws(draws)
    total = next((len(x) for x in flat.values()), 1)
    rows = np.linspace(0, total - 1, min(most, total)).astype(int)
    return {name: x[rows] for name, x in flat.items()}
