"""The one potential: all its earlier forms are the same density, and nothing is changed on the way."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pssm import nets
from pssm.distributions import LowRankChain, LowRankMomentMatched, StatePath
from pssm.linalg.low_rank import log_potential
from pssm.linalg.potential import Potential, as_potential
from pssm.nets.potentials import as_pseudo_observation

T, N, R = 4, 2, 1
RNG = np.random.default_rng(0)
PARTS = {
    "k": RNG.normal(size=(T, N)),
    "K": RNG.normal(size=(T, N, R)),
    "diag": RNG.uniform(size=(T, N)),
    "center": RNG.normal(size=(T, N)),
    "b": RNG.normal(size=(T, R)),
}
NEW = {"k": "slope", "K": "factor", "diag": "diagonal", "center": "center", "b": "factor_slope"}


def prior():
    return StatePath(jnp.zeros(N), jnp.eye(N), 0.5 * jnp.eye(N), jnp.eye(N), T)


def log_density(p, z):
    """By its formula, in NumPy."""
    p = {name: 0.0 if x is None else np.asarray(x) for name, x in vars(p).items()}
    x = z - p["center"]
    pull = np.einsum("tnr,tn->tr", p["factor"], x)
    return np.sum(p["slope"] * x - 0.5 * p["diagonal"] * x**2) + np.sum(p["factor_slope"] * pull - 0.5 * pull**2)


def test_all_forms_are_one(x64):
    given = Potential(**{NEW[name]: x for name, x in PARTS.items()})
    sd = RNG.uniform(0.5, 2.0, size=(T, N))
    relative = nets.PseudoObservation(
        K=PARTS["K"] * sd[..., None],
        diag=PARTS["diag"] * sd**2,
        b=PARTS["b"],
        c=PARTS["center"],
        k=PARTS["k"] * sd,
        relative=True,
    )
    chain = LowRankChain(prior(), PARTS["k"], PARTS["K"], **{n: PARTS[n] for n in ("diag", "center", "b")})
    forms = {
        "old names": Potential(**PARTS),
        "arguments": Potential(**given.arguments()),
        "encoder": as_pseudo_observation(relative, jnp.asarray(sd), R, True).psi(),
        "chain": chain.potential,
        "from_potential": LowRankChain.from_potential(prior(), given).potential,
        "proposal": as_potential(SimpleNamespace(**PARTS), T, N, jnp.float64),
        "chain as proposal": as_potential(chain, T, N, jnp.float64),
        "a draw of vmap": jax.tree.map(lambda x: x[0], jax.vmap(lambda p: p)(jax.tree.map(lambda x: x[None], given))),
    }
    for form, found in forms.items():
        for old, new in NEW.items():
            np.testing.assert_allclose(getattr(found, new), PARTS[old], rtol=1e-12, err_msg=f"{form} {new}")
            np.testing.assert_array_equal(getattr(found, old), getattr(found, new))
    assert set(chain.potential.arguments()) == set(PARTS)
    for name in PARTS:
        np.testing.assert_array_equal(getattr(chain, name), PARTS[name])
    assert given.c is given.center is given._asdict()["center"]


def test_a_moment_matched_posterior_has_no_diagonal():
    parts = {"k": PARTS["k"], "K": PARTS["K"], "center": PARTS["center"]}
    key = jax.random.key(0)
    q = LowRankMomentMatched.from_potential(prior(), Potential(**parts), key, 5)
    other = LowRankMomentMatched(prior(), parts["k"], parts["K"], key, 5, center=parts["center"])
    np.testing.assert_array_equal(q.mean, other.mean)
    with pytest.raises(ValueError, match="`potential` must have no `diagonal`"):
        LowRankMomentMatched.from_potential(prior(), Potential(**PARTS), key, 5)


def test_negative_diagonals_are_kept(x64):
    """A variational potential may be negative; whether that makes a density is for its user to decide."""
    p = Potential(PARTS["K"], -PARTS["diag"], slope=PARTS["k"], center=PARTS["center"])
    z = RNG.normal(size=(T, N))
    kept = replace(p, mask=jnp.ones(T, bool)).masked()
    scaled = replace(p, relative=True).in_state_units(2.0 * jnp.ones((T, N)))
    read = as_potential(p, T, N, jnp.float64)
    for name, found, expected in (("masked", kept, p), ("units", scaled, None), ("read", read, p), ("psi", p.psi(), p)):
        expected = -PARTS["diag"] / 4 if expected is None else expected.diagonal
        np.testing.assert_allclose(found.diagonal, expected, err_msg=name)
    each = jax.vmap(log_potential)(jax.tree.map(jnp.asarray, p), jnp.asarray(z))
    assert float(each.sum()) == pytest.approx(log_density(p, z))
    with pytest.raises(ValueError, match="`diag` must leave every conditional covariance positive definite"):
        LowRankChain.from_potential(prior(), replace(p, diagonal=-1e3 * PARTS["diag"]))


@pytest.mark.parametrize("sign", [1.0, -0.5])
def test_a_sum_is_the_product_of_the_densities(sign, x64):
    p = Potential(**{NEW[name]: x for name, x in PARTS.items()})
    other = Potential(RNG.normal(size=(T, N, 2)), sign * PARTS["diag"], center=RNG.normal(size=(T, N)))
    z = RNG.normal(size=(2, T, N))
    whole = [log_density(p + other, x) for x in z]
    each = [log_density(p, x) + log_density(other, x) for x in z]
    assert whole[0] - whole[1] == pytest.approx(each[0] - each[1])


def test_what_is_not_a_potential_is_named():
    with pytest.raises(TypeError, match="`kk` is no part"):
        Potential(PARTS["K"], kk=1)
    with pytest.raises(TypeError, match="`factor` is required"):
        Potential(slope=PARTS["k"])
    with pytest.raises(ValueError, match="`relative`"):
        Potential(PARTS["K"], relative=True).psi()
    with pytest.raises(ValueError, match=r"`proposal\.b` must have shape \(4, 1\)"):
        as_potential(Potential(PARTS["K"], b=PARTS["k"]), T, N, jnp.float32, "proposal.")
