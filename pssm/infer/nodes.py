"""A few parameters without a Markov chain: weighted nodes around the mode, and the evidence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pssm._types import KeyLike
from pssm.fitting.fit import begin, prepared_arguments
from pssm.fitting.nodes import NodesEngine, NodesFit
from pssm.infer.path_marginal import path_marginal
from pssm.inspection.forms import has_path


def nodes(
    model: Callable[..., Any],
    *args: Any,
    approximation: str = "variational",
    num_nodes: int = 512,
    num_samples: int = 1000,
    key: KeyLike = 0,
    checkpoint: str | Path | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> NodesFit:
    """The posterior of at most four parameters by weighted quasi-random nodes, and the evidence `log p(y)`.

        w_i = p(y, theta_i) / q(theta_i),   q = t_4(mode, 1.3 (-Hessian)^{-1}) in unconstrained coordinates

    The nodes are scrambled Sobol points. A model whose states are integrated out exactly is taken as it is: then the
    result is exact up to Monte Carlo error. `StatePath` sites are integrated out by `path_marginal`, approximately:
    `pssm.infer.corrected` makes that exact.

    Args:
        model: a NumPyro model with one to four continuous unknowns beside its paths, or a `path_marginal`.
        args: the model's positional arguments, the data first.
        approximation: of the paths, as in `path_marginal`.
        num_nodes: number of nodes, a multiple of 8.
        num_samples: equally weighted draws, resampled from the nodes.
        key: random key, or a whole number; the same key gives the same fit.
        checkpoint: a new folder for the nodes; `pssm.infer.resume` goes on from it.
        progress_bar: show a progress bar, and the evidence in words.
        kwargs: the model's keyword arguments.

    Returns:
        A `NodesFit`: `.log_evidence`, `.standard_error`, `.khat`, `.ess`, and draws for `to_datatree`, `forecast`,
        `smoothed_states` and `save`. Weights that cannot be trusted are warned of.

    Raises:
        ValueError: there are more than four parameters, or a discrete one.

    Example:
        >>> from pssm import datasets, models
        >>> fit = nodes(models.local_level, datasets.load("nile").y, progress_bar=False)
        >>> fit.draws()["sigma_obs"].shape, fit.khat < 0.7
        ((1, 1000), True)

    Source:
        Importance sampling around the mode with randomised quasi-Monte Carlo: Owen 2013, chapters 9 and 17.
    """
    args, kwargs, labels = prepared_arguments("nodes", model, args, kwargs)
    if not hasattr(model, "posterior") and has_path(model, args, kwargs):
        model = path_marginal(model, approximation=approximation)
    engine = NodesEngine(model, args, kwargs, num_nodes=num_nodes, num_samples=num_samples)
    return begin(engine, key, checkpoint, progress_bar, labels)
