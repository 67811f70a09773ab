"""`AutoStateSpace`: a guide for any NumPyro model that has `StatePath` sites."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoGuide, AutoNormal

from pssm._checks import check_choice
from pssm._types import Array, Key
from pssm.distributions import StatePath
from pssm.guides.model_run import ModelRun, unwrap
from pssm.guides.paths import PathGuide
from pssm.modes.mode import PotentialsAtMode, noise_scale


class AutoStateSpace(PathGuide):
    """A guide whose state paths follow the structured low-rank posterior, given the other latent sites.

    Every `StatePath` site of the model gets a `LowRankChain` (or one of the other families) built on the site's own
    prior at the sampled values of the other sites; those get an ordinary guide. The potentials start at the mode of
    the path: on a linear-Gaussian model with `rank` = size of the state that start is the exact posterior.

    Use it with `Trace_ELBO` or `TraceConditionalKL_ELBO` (lower variance) for the families "chain" and "diagonal",
    whose objective is a lower bound on the log evidence; "moment_matched" is the published recursion, whose objective
    is a surrogate that can exceed it, and needs `TraceConditionalKL_ELBO` or `TraceMeanField_ELBO`.

    Args:
        model: a NumPyro model with at least one unobserved `StatePath` site. Under a plate with subsampling the
            potentials of all trials are parameters ("free"), indexed as NumPyro indexes its own.
        rank: columns of the low-rank factors.
        diagonal: whether a diagonal goes beside them: much sharper at small rank. Not for "moment_matched".
        family: "chain", "moment_matched" or "diagonal" (a chain of rank 0).
        potentials: "free" (trained parameters, started at the mode) or "mode" (found again at every evaluation for the
            current values of the other sites; nothing of them is trained, gradients flow through the mode).
        global_guide: makes the guide of the other latent sites, from a model: an AutoGuide class or a function.
        num_samples: particles inside "moment_matched".
        mode_iters: Gauss-Newton steps at every evaluation with `potentials="mode"`.
        prefix: as in NumPyro's guides; parameters are called `{site}_{prefix}_K` and so on.
        init_loc_fn: start of the other sites.

    Raises:
        ValueError: an unknown family, or a model without a `StatePath`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from pssm.distributions import StatePath, observe
        >>> def model(counts):
        ...     z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), 20))
        ...     observe("counts", dist.Poisson(jnp.exp(z)).to_event(2), counts)
        >>> guide = AutoStateSpace(model, rank=1)
        >>> result = SVI(model, guide, optax.adam(1e-2), Trace_ELBO()).run(
        ...     jax.random.key(0), 10, jnp.ones((20, 1)), progress_bar=False)
        >>> guide.sample_posterior(jax.random.key(1), result.params, jnp.ones((20, 1)), sample_shape=(3,))["z"].shape
        (3, 20, 1)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        rank: int,
        diagonal: bool = True,
        family: str = "chain",
        potentials: str = "free",
        global_guide: Callable[..., AutoGuide] = AutoNormal,
        num_samples: int = 25,
        mode_iters: int = 4,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
    ):
        check_choice("potentials", potentials, ("free", "mode"))
        self.potentials, self.mode_iters = potentials, mode_iters
        super().__init__(
            model,
            rank=rank,
            diagonal=diagonal,
            family=family,
            global_guide=global_guide,
            num_samples=num_samples,
            prefix=prefix,
            init_loc_fn=init_loc_fn,
            create_plates=create_plates,
        )

    @property
    def path_params(self) -> set[str]:
        """Names of the paths' own parameters."""
        return {
            f"{name}_{self.prefix}_{part}" for name in self._paths for part in ("center", "scale", "k", "K", "diag")
        }

    def at_mode(self) -> "AutoStateSpace":
        """This guide, once run, with a chain whose potentials are found at the mode for whatever it is called with."""
        guide = copy.copy(self)
        guide.family, guide.potentials, guide.mode_iters = "chain", "mode", 1
        return guide

    def _potentials(self, name: str, run: ModelRun, values: dict[str, Array], prior: StatePath) -> dict[str, Array]:
        given = self._parameters(name, run, values)
        if self.potentials == "mode":
            return self._at_mode(name, run, values, given["center"], self.mode_iters)._asdict()
        return given

    def _parameters(self, name: str, run: ModelRun, values: dict[str, Array]) -> dict[str, Array]:
        """The potentials of a path site from their parameters.

        `k` and `K` are trained in units of the posterior's conditional scale at the start; that scale and the centre
        are parameters too, so that a fit's `params` hold all there is, but no gradient reaches them.
        """
        made: list[dict[str, Array]] = []

        def param(part: str, constraint: Any = constraints.real) -> Array:
            def init(_: Key) -> Array:
                if not made:
                    made.append(self._initial(name, run, values))
                return made[0][part]

            event_dim = 3 if part == "K" else 2
            value = numpyro.param(f"{name}_{self.prefix}_{part}", init, constraint=constraint, event_dim=event_dim)
            return jnp.asarray(value)

        given = {"center": jax.lax.stop_gradient(param("center"))}
        if self.potentials == "mode":
            return given
        scale = jax.lax.stop_gradient(param("scale"))
        given |= {"k": param("k") / scale, "K": param("K") / scale[..., None]}
        if self.diagonal:
            given["diag"] = param("diag", constraints.positive)
        return given

    def _initial(self, name: str, run: ModelRun, values: dict[str, Array]) -> dict[str, Array]:
        """Start of the parameters, for all trials of a plate, the subsampled ones in turn."""
        sizes = {f.name: (f.size, self._prototype_frame_full_sizes[f.name]) for f in self._frames(name)}
        small = {n: both for n, both in sizes.items() if both[0] != both[1]}
        if len(small) > 1:
            raise ValueError(f"`model` subsamples `{name}` in more than one plate: {', '.join(small)}.")

        @jax.jit  # one program: piece by piece it would be hundreds
        def at_mode(values: dict[str, Array], indices: dict[str, Array]) -> dict[str, Array]:
            # Values of other sites in the same plate belong to the first minibatch: a start only.
            own = run.with_indices(indices)
            return self._scaled(self._at_mode(name, own, values, None, 30), unwrap(own.trace(values)[name]["fn"])[0])

        if not small:
            return at_mode(values, {})
        (plate, (size, full)), dim = (
            next(iter(small.items())),
            next(f.dim for f in self._frames(name) if f.name in small),
        )
        rows = [jnp.arange(first, first + size) % full for first in range(0, full, size)]
        parts = [at_mode(values, {plate: indices}) for indices in rows]

        def join(part_name: str) -> Array:
            axis = dim - (3 if part_name == "K" else 2)
            joined = jnp.concatenate([p[part_name] for p in parts], axis=axis)
            return jax.lax.slice_in_dim(joined, 0, full, axis=axis)

        return {part_name: join(part_name) for part_name in parts[0]}

    def _scaled(self, found: PotentialsAtMode, prior: StatePath) -> dict[str, Array]:
        parts = {"center": found.center}
        if self.potentials == "mode":
            return parts
        floor = 1e-6 / jnp.broadcast_to(noise_scale(prior), found.scale.shape) ** 2
        scale = jnp.where(found.scale > 0, found.scale, 1.0)
        parts |= {"scale": scale, "k": found.k * scale, "K": found.K * scale[..., None]}
        if self.diagonal:
            parts["diag"] = jnp.maximum(found.diag, floor)
        return parts
