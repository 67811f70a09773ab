"""The names of the methods of a study, what each computes, and how much work it may do."""

from dataclasses import dataclass

from pssm.fitting.corrected import EXACT
from pssm.fitting.point import LIKELIHOOD, MODE
from pssm.guides.paths import BOUND, FAMILIES, SURROGATE

PATH_GUIDES = {f"svi:{family}": f"AutoStateSpace ({family.replace('_', '-')})" for family in FAMILIES}
GUIDE_NAMES = {"svi:mvn": "AutoMultivariateNormal", "svi:normal": "AutoNormal"} | PATH_GUIDES
POINTS = ("ml", "map")  # one point, without uncertainty of the parameters
APPROXIMATE = {  # paths integrated out approximately, then corrected: by the approximation
    "nuts:laplace": "laplace",
    "nuts:variational": "variational",
    "nuts:importance": "importance",
    "nodes:variational": "variational",
}
METHODS = ("nuts", "nuts:states", "nuts:transport", *APPROXIMATE, *GUIDE_NAMES, *POINTS)
PATH_METHODS = ("nuts:states", "nuts:transport", *APPROXIMATE, *PATH_GUIDES)  # the path is among their unknowns
CHAINS = tuple(name for name in METHODS if name.startswith("nuts"))
DEFAULT_METHODS = ("nuts", "nuts:states", "svi:mvn", "svi:normal")
OBJECTIVES = (
    {"nuts": "exact posterior (Markov chain), states integrated out where the model allows"}
    | {"nuts:states": "exact posterior (Markov chain), states sampled in non-centred form"}
    | {"nuts:transport": "exact posterior (Markov chain), states sampled through the map of a fitted chain"}
    | dict.fromkeys(APPROXIMATE, EXACT + ", where the weights say so (paths integrated out approximately, corrected)")
    | dict.fromkeys(GUIDE_NAMES, BOUND)
    | {"svi:moment_matched": SURROGATE}
    | {"ml": LIKELIHOOD, "map": MODE}
)
KNOWN = "Its forecast and its states take the parameters as known."


@dataclass(frozen=True)
class Settings:
    """How much work each method may do.

    Attributes:
        seed: one whole number fixes every random choice.
        num_warmup: NUTS adaptation steps per chain.
        num_samples: NUTS draws per chain.
        num_chains: NUTS chains.
        svi_steps: optimisation steps.
        horizon: forecast steps, 0 for none.
        budget: seconds a method may be expected to take before its draws or steps are cut; None for no limit.
        progress: show progress bars.
    """

    seed: int = 0
    num_warmup: int = 1000
    num_samples: int = 1000
    num_chains: int = 4
    svi_steps: int = 5000
    horizon: int = 10
    budget: float | None = None
    progress: bool = True
