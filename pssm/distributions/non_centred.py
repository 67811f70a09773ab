"""The path prior through the standard normal noise that drives it."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer.reparam import Reparam

from pssm._types import Array
from pssm.distributions.state_path import StatePath, check_steps


class NonCenteredPath(Reparam):
    """Samples a `StatePath` site through the standard normal noise that drives it.

    The site `name` becomes deterministic; the noise is a new site `name_base` of event shape `(noise_size,)`. Often
    easier for NUTS where single states are weakly identified, and the only way for a singular `Q`.

    Example:
        >>> import jax.numpy as jnp, numpyro
        >>> def model():
        ...     numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), jnp.eye(1), jnp.eye(1), 5))
        >>> model = numpyro.handlers.reparam(model, config={"z": NonCenteredPath()})
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
        >>> trace["z"]["type"], trace["z_base"]["value"].shape
        ('deterministic', (5,))
    """

    def __call__(self, name: str, fn: dist.Distribution, obs: Array | None) -> tuple[None, Array]:
        """Replaces the site; `obs` must be None."""
        if obs is not None:
            raise ValueError(f"`{name}` is observed: an observed path cannot be non-centred.")
        path, shape, _ = self._unwrap(fn)
        if not isinstance(path, StatePath):
            raise TypeError(f"`{name}` must be a StatePath to be non-centred; got {type(path).__name__}.")
        base = dist.Normal(jnp.zeros(path.noise_size, path.m0.dtype), 1.0).to_event(1).expand(shape)
        noise = numpyro.sample(f"{name}_base", base, infer={"path_noise": True, "first": path.n_state})
        check_steps(f"{name}_base", noise, base, path.num_steps)
        return None, path.path_from_noise(noise)
