"""`refine`: the free potentials of a fitted guide, improved without noise."""

from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers

from pssm._keys import as_key
from pssm._types import Array, KeyLike
from pssm.fitting.results import SVIFit, elbo
from pssm.guides.model_run import ModelRun
from pssm.guides.paths import PathGuide
from pssm.guides.posteriors import Free
from pssm.linalg.potential import Potential
from pssm.modes.variational import in_form, variational_fit


def refine(fit: SVIFit, *, num_iters: int = 8, key: KeyLike = 0, num_particles: int = 500) -> SVIFit:
    """The fit with the potentials of the highest bound at the other sites' medians: `ELBO(refined) >= ELBO(fit)`.

    Natural-gradient steps from the fit's own potentials (`pssm.modes.variational_fit`), without a learning rate and
    without noise. Free potentials are positive: negative curvature is cut, and with a small rank the curvature is that
    of the principal factors. The two bounds are compared on the same draws, and the better fit is returned.

    Args:
        fit: from `fit_svi`, or `SVIFit.of(svi, result, ...)`, with an `AutoStateSpace(potentials="free")`.
        num_iters: most steps.
        key: random key of the comparison, or a whole number.
        num_particles: draws of the comparison.

    Returns:
        A fit with new parameters and the optimiser begun again, or `fit` itself where nothing was gained.

    Raises:
        TypeError: the guide has no free potentials of a chain.
        ValueError: the model subsamples a plate around the path.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from pssm.distributions import StatePath, observe
        >>> from pssm.infer import elbo, fit_svi
        >>> def model(y):
        ...     z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), len(y)))
        ...     observe("y", dist.Poisson(jnp.exp(z)).to_event(2), y)
        >>> fit = fit_svi(model, jnp.ones((10, 1)), guide="chain", rank=1, num_steps=20, progress_bar=False)
        >>> elbo(refine(fit))[0] >= elbo(fit)[0]
        True
    """
    guide: Any = fit.svi.guide
    posterior = guide.posterior if isinstance(guide, PathGuide) else None
    if not isinstance(posterior, Free) or posterior.family == "moment_matched":
        raise TypeError(
            '`fit` must have an AutoStateSpace(potentials="free") of the family "chain" or "diagonal"; its guide is a '
            f"{type(guide).__name__}. Potentials of other guides are found, or made by networks, at every evaluation."
        )
    model = handlers.substitute(fit.svi.model, data=fit.params)
    run = ModelRun(model, fit.args, fit.kwargs, {})
    others = {} if guide._others is None else guide._others.median(fit.params, fit.args, fit.kwargs)
    centers = {name: fit.params[f"{name}_{guide.prefix}_center"] for name in guide._paths}
    values, form = {**others, **centers}, posterior.form
    params = dict(fit.params)
    for name in guide._paths:
        stored = {part: params.get(f"{name}_{guide.prefix}_{part}") for part in ("center", "scale", "k", "K", "diag")}
        shape = run.trace(values)[name]["fn"].shape()
        if stored["center"].shape != shape:
            raise ValueError(
                f"`fit` has parameters of `{name}` for all series, {stored['center'].shape}, and a model that takes a "
                f"part of them, {shape}: run it on all of them, in one batch."
            )

        @jax.jit
        def found(stored: dict[str, Array], values: dict[str, Array], name: str = name) -> dict[str, Array]:
            prior, log_lik = run.path_prior(name, values), run.log_lik(name, values)
            factor, slope = stored["K"] / stored["scale"][..., None], stored["k"] / stored["scale"]
            start = Potential(factor, stored["diag"], center=stored["center"], slope=slope)
            best = variational_fit(prior, log_lik, start=start, num_iters=num_iters).potential
            form_ = in_form(prior, best, form.rank, form.diagonal, signed=False)
            scale = jnp.where(form_.scale > 0, form_.scale, 1.0)
            K = jnp.zeros_like(stored["K"]).at[..., : form_.rank].set(form_.factor * scale[..., None])
            new = {"center": form_.center, "scale": scale, "k": form_.slope * scale, "K": K}
            if form.diagonal:
                new["diag"] = jnp.maximum(form_.diagonal, 1e-6 / scale**2)
            return new

        given = {part: x for part, x in stored.items() if x is not None}
        given.setdefault("diag", jnp.zeros_like(stored["center"]))
        for part, x in found(given, values).items():
            params[f"{name}_{guide.prefix}_{part}"] = x
        values[name] = params[f"{name}_{guide.prefix}_center"]
    if not all(bool(jnp.isfinite(jnp.asarray(x)).all()) for x in jax.tree.leaves(params)):
        return fit
    state = fit.svi.init(as_key(key), *fit.args, init_params=params, **fit.kwargs)
    refined = SVIFit(params, state, fit.losses)
    for name, x in vars(fit).items():
        setattr(refined, name, x)
    refined.run = None
    before, after = (elbo(x, key=key, num_particles=num_particles)[0] for x in (fit, refined))
    return refined if after > before else fit
