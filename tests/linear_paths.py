"""An oracle for models with one noise and a start of which nothing is known: their definition, step by step."""

import jax
import numpy as np
from numpyro import handlers


def evidence(path, num_flat, num_noise, y):
    """`log` of the integral of the density of the observed entries over all starts, the limit of a diffuse one.

    Args:
        path: the series `(time, obs)` of a definition, from `num_flat` unknown numbers and `num_noise` standard normal
            ones; affine in both.
        num_flat: unknown numbers.
        num_noise: standard normal numbers.
        y: data `(time, obs)`, NaN where missing.
    """
    seen = np.isfinite(y).ravel()
    zero = path(np.zeros(num_flat), np.zeros(num_noise)).ravel()

    def columns(count, of):
        return (
            np.array([path(*of(np.eye(count)[i])).ravel() - zero for i in range(count)])
            .reshape(count, len(zero))
            .T[seen]
        )

    X = columns(num_flat, lambda e: (e, np.zeros(num_noise)))
    F = columns(num_noise, lambda e: (np.zeros(num_flat), e))
    V = F @ F.T
    off = y.ravel()[seen] - zero[seen]
    solved = np.linalg.solve(V, np.column_stack([X, off]))
    information = X.T @ solved[:, :-1]
    left = off - X @ np.linalg.solve(information, X.T @ solved[:, -1]) if num_flat else off
    value = -0.5 * (left @ np.linalg.solve(V, left) + np.linalg.slogdet(V)[1])
    value -= 0.5 * np.linalg.slogdet(information)[1] if num_flat else 0.0
    return value - 0.5 * (len(off) - num_flat) * np.log(2 * np.pi)


def trace(model, y, values=None, key=1, **options):
    """The trace of a model at some values of its sites, by default at draws from the prior."""
    fn = handlers.seed(handlers.substitute(model, values or {}), key)
    return handlers.trace(fn).get_trace(y, **options)


def numbers(found):
    """The values of all sites but the data."""
    return {n: np.asarray(s["value"], float) for n, s in found.items() if n != "y" and "value" in s}


def log_likelihood(found, y):
    """Of a trace."""
    return float(found["y"]["fn"].log_prob(y))


def integrated(model, y, values, **options):
    """Log evidence and mean path of a model whose states are sampled: its density is the exponential of a quadratic."""
    import jax.numpy as jnp

    def log_density(base):
        found = trace(model, y, {**values, "z_base": base}, states="sampled", **options)
        site = found["y"]["fn"]
        value = jnp.asarray(y if y.ndim > 1 else y[:, None])
        return jnp.sum(site.log_prob(value)) - 0.5 * base @ base - 0.5 * len(base) * jnp.log(2 * jnp.pi)

    base = trace(model, y, values, states="sampled", **options)["z_base"]["value"]
    zero = jnp.zeros_like(base)
    value, gradient, hessian = jax.jit(
        lambda b: (log_density(b), jax.grad(log_density)(b), jax.hessian(log_density)(b))
    )(zero)
    best = np.linalg.solve(-hessian, gradient)
    log_evidence = value + 0.5 * gradient @ best + 0.5 * len(zero) * np.log(2 * np.pi)
    log_evidence -= 0.5 * np.linalg.slogdet(-hessian)[1]
    path = trace(model, y, {**values, "z_base": best}, states="sampled", **options)["z"]["value"]
    return float(log_evidence), np.asarray(path)
