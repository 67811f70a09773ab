"""Where the distribution of a path comes from: the protocol, and the two posteriors that the mode of the path makes."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpyro
from numpyro.distributions import constraints

from pssm._checks import check_choice, check_count
from pssm._types import Array, Key
from pssm.distributions import LowRankChain, LowRankMomentMatched, StatePath
from pssm.guides.model_run import PathSite
from pssm.linalg.potential import Potential
from pssm.modes.mode import noise_scale
from pssm.modes.variational import in_form, variational_fit

FAMILIES = ("chain", "moment_matched", "diagonal")
START_ITERS = 30  # most Gauss-Newton steps of a search that begins at the prior's path


class Posterior(Protocol):
    """The distribution of a path given the other latent sites: what a `PathGuide` is made of.

    Attributes:
        family: "chain", "moment_matched" or "diagonal"; the second is no joint density.
        needs_values: whether the distribution depends on the data or on other sites besides the path's prior.
        reads_data: whether it is made from the model's observed sites at each call.
    """

    needs_values: ClassVar[bool] = True

    @property
    def family(self) -> str: ...  # noqa: D102

    @property
    def reads_data(self) -> bool:  # noqa: D102
        return self.needs_values

    def distribution(self, site: PathSite) -> Any:
        """The path's distribution; called inside of the guide, with parameters made by `site.param`."""
        ...

    def evaluated(self) -> "Posterior":
        """The posterior outside of training."""
        return self

    def with_derivatives(self) -> "Posterior":
        """The posterior whose potentials have their full derivatives by the other sites, for samplers on its map."""
        return self

    def given_past(self) -> "Posterior":
        """The posterior for data whose end is missing: nothing in it may come from the whole series of the fit."""
        return self.evaluated()


@dataclass(frozen=True)
class Form:
    """The form of a distribution made from potentials; see `AutoStateSpace` for the options."""

    family: str
    rank: int
    diagonal: bool = True
    num_samples: int = 25

    @classmethod
    def of(cls, family: str, rank: int, diagonal: bool, num_samples: int) -> "Form":
        """The form of these options, checked."""
        check_choice("family", family, FAMILIES)
        rank = 0 if family == "diagonal" else check_count("rank", rank, least=0)
        diagonal = family == "diagonal" or (diagonal and family == "chain")
        if rank == 0 and not diagonal:
            raise ValueError("`rank` must be at least 1 where there is no diagonal.")
        return cls(family, rank, diagonal, num_samples)

    def distribution(
        self, prior: StatePath, potential: Potential, backward: Potential | None = None
    ) -> LowRankChain | LowRankMomentMatched:
        """The posterior of a prior and its potentials."""
        if not self.diagonal:
            potential = replace(potential, diagonal=None)  # zero, where the mode made it
        if self.family != "moment_matched":
            return LowRankChain.from_potential(prior, potential)
        key = numpyro.prng_key()
        return LowRankMomentMatched.from_potential(prior, potential, key, self.num_samples, backward=backward)


@dataclass(frozen=True)
class FromPotentials(Posterior):
    """A posterior made from potentials, in one of the forms.

    Attributes:
        form: the form.
    """

    form: Form

    @property
    def family(self) -> str:  # noqa: D102
        return self.form.family


@dataclass(frozen=True)
class AtMode(FromPotentials):
    """Potentials found again at the mode of the path, at every evaluation, for the current values of the other sites.

    Attributes:
        num_iters: Gauss-Newton steps from the path that is stored.
        stored: the search begins at a path from the start of the fit, a parameter; else, and for data of another shape,
            at the prior's.
    """

    num_iters: int = 4
    stored: bool = True

    def distribution(self, site: PathSite) -> LowRankChain | LowRankMomentMatched:  # noqa: D102
        start, num_iters = None, START_ITERS
        if self.stored:
            center = site.param("center", lambda _: jax.jit(lambda: start_of(self.form, site).center)())
            if center.shape == site.shape:
                start, num_iters = jax.lax.stop_gradient(center), self.num_iters
        found = site.at_mode(self.form.rank, self.form.diagonal, start=start, num_iters=num_iters)
        return self.form.distribution(site.prior, found)

    def given_past(self) -> "AtMode":  # noqa: D102
        return AtMode(replace(self.form, family="chain"), stored=False)


@dataclass(frozen=True)
class Variational(FromPotentials):
    """Potentials of the highest bound, found again at every evaluation for the current values of the other sites.

    No gradient goes through the search: at its end the bound has no slope along the potentials, so the gradient by the
    other sites is that of the bound at these potentials. `with_derivatives` takes a fixed number of steps instead, with
    sites clipped at zero, and differentiates through them.

    Attributes:
        num_iters: steps from the moments that are stored.
        stored: the search begins at moments from the start of the fit, parameters; else, and for data of another shape,
            at the mode or the prior.
        through: whether the potentials have derivatives.
    """

    num_iters: int = 4
    stored: bool = True
    through: bool = False

    def distribution(self, site: PathSite) -> LowRankChain | LowRankMomentMatched:  # noqa: D102
        start, num_iters = None, 2 * self.num_iters
        if self.stored:
            made: list[Potential] = []

            def param(part: str) -> Array:
                def init(_: Key) -> Array:
                    if not made:
                        made.append(jax.jit(lambda: start_of(self.form, site))())
                    return getattr(made[0], part)

                return jax.lax.stop_gradient(site.param(part, init))

            center, scale = param("center"), param("scale")
            if center.shape == site.shape:
                spread = scale[..., None] ** 2 * jnp.eye(scale.shape[-1], dtype=scale.dtype)
                start, num_iters = (center, spread), self.num_iters
        values = site.values if self.through else jax.lax.stop_gradient(site.values)
        prior, log_lik = site.run.path_prior(site.name, values), site.run.log_lik(site.name, values)
        options = {"line_search": not self.through, "through": self.through}
        fit = variational_fit(prior, log_lik, start=start, num_iters=num_iters, **options)
        found = in_form(prior, fit.potential, self.form.rank, self.form.diagonal)
        return self.form.distribution(site.prior, found if self.through else jax.lax.stop_gradient(found))

    def with_derivatives(self) -> "Variational":  # noqa: D102
        return replace(self, through=True)

    def given_past(self) -> "Variational":  # noqa: D102
        return Variational(replace(self.form, family="chain"), stored=False)


@dataclass(frozen=True)
class Free(FromPotentials):
    """Potentials that are parameters, started at the mode.

    Slope and factor are trained in units of the posterior's conditional scale at the start; that scale and the center
    are parameters too, so that a fit's `params` hold all there is, but no gradient reaches them.
    """

    needs_values: ClassVar[bool] = False

    def distribution(self, site: PathSite) -> LowRankChain | LowRankMomentMatched:  # noqa: D102
        made: list[Potential] = []

        def param(part: str, constraint: Any = constraints.real) -> Array:
            def init(_: Key) -> Array:
                if not made:
                    made.append(start_of(self.form, site))
                return getattr(made[0], part)

            return site.param(part, init, constraint)

        center = jax.lax.stop_gradient(param("center"))
        if center.shape != site.shape:
            raise ValueError(
                f"`{site.name}_{site.prefix}_center` and the guide's other parameters are those of paths of shape "
                f"{center.shape} (..., time, state); the model now has {site.shape}. For other data than those of the "
                'fit use potentials="mode", or an AmortizedStateSpace.'
            )
        scale = jax.lax.stop_gradient(param("scale"))
        slope, factor = param("k") / scale, param("K") / scale[..., None]
        diagonal = param("diag", constraints.positive) if self.form.diagonal else None
        return self.form.distribution(site.prior, Potential(factor, diagonal, center=center, slope=slope))

    def given_past(self) -> AtMode:  # noqa: D102
        return AtMode(self.form).given_past()


def start_of(form: Form, site: PathSite) -> Potential:
    """Potentials at the mode in units of their `scale`, for all trials of a plate, the subsampled ones in turn."""
    small = [plate for plate in site.plates if plate[2] != plate[3]]
    if len(small) > 1:
        names = ", ".join(plate[0] for plate in small)
        raise ValueError(f"`model` subsamples `{site.name}` in more than one plate: {names}.")

    @jax.jit  # one program: piece by piece it would be hundreds
    def at_mode(values: dict[str, Array], indices: dict[str, Array]) -> Potential:
        # Values of other sites in the same plate belong to the first minibatch: a start only.
        own = site._replace(run=site.run.with_indices(indices), values=values)
        found = own.at_mode(form.rank, form.diagonal, start=None, num_iters=START_ITERS)
        scale = jnp.where(found.scale > 0, found.scale, 1.0)
        # A diagonal of zero cannot grow. Beside all columns it need not, and may be as small as rounding lets it be.
        least = 1e-6 if form.rank < scale.shape[-1] else 10 * float(jnp.finfo(scale.dtype).eps)
        floor = least / jnp.broadcast_to(noise_scale(own.run.path_prior(site.name, values)), scale.shape) ** 2
        slope, factor = found.slope * scale, found.factor * scale[..., None]
        return Potential(factor, jnp.maximum(found.diagonal, floor), center=found.center, slope=slope, scale=scale)

    if not small:
        return at_mode(site.values, {})
    ((name, dim, size, full),) = small
    rows = [jnp.arange(first, first + size) % full for first in range(0, full, size)]
    parts = [at_mode(site.values, {name: indices}) for indices in rows]

    def join(core: int, *xs: Array) -> Array:
        return jax.lax.slice_in_dim(jnp.concatenate(xs, axis=dim - core), 0, full, axis=dim - core)

    return jax.tree.map(join, parts[0].cores, *parts)
