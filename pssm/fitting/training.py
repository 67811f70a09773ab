"""How `fit_svi` trains, and where a run of it is."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIState

from pssm._checks import check_count
from pssm._types import Array


@dataclass(frozen=True)
class Settings:
    """How `fit_svi` trains; its arguments of the same names."""

    guide: Any = "mvn"
    rank: int = 4
    num_steps: int = 5000
    learning_rate: Any = 0.01
    clip_norm: float | None = 100.0
    optimizer: Any = None
    loss: Any = None
    kl_schedule: Callable[[Array], Any] | None = None
    step_args: Callable[..., Any] | None = None
    validation: tuple[Any, ...] | None = None
    validate_every: int | None = None
    patience: int | None = None
    schedule_steps: int | None = None  # over which the step size decays, where a resumed run has more

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps, least=10)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"`clip_norm` must be positive, or None; got {self.clip_norm}.")
        if self.validation is not None and not isinstance(self.validation, tuple):
            raise TypeError(f"`validation` must be a tuple of arguments, (y,); got {type(self.validation).__name__}.")
        for name in ("validate_every", "patience"):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value)
                if self.validation is None:
                    raise ValueError(f"`{name}` needs `validation=`, the held-out arguments of the model.")

    @property
    def every(self) -> int:
        """Steps between two validations."""
        return self.validate_every or max(self.num_steps // 50, 1)

    @property
    def plain(self) -> dict[str, Any]:
        """What JSON can hold; an entry that it cannot is None, and named by `callables`."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "validation"}
        return {n: x if isinstance(x, int | float | str | None) else None for n, x in kept.items()}

    @property
    def callables(self) -> list[str]:
        """The entries that a file cannot hold: whoever resumes gives them again."""
        return [f.name for f in fields(self) if f.name != "validation" and not _is_plain(getattr(self, f.name))]

    def weight(self, step: int) -> float:
        """The weight of the KL divergence at a step."""
        return 1.0 if self.kl_schedule is None else float(self.kl_schedule(jnp.asarray(step)))


class TrainState(NamedTuple):
    """Where a run of SVI is.

    Attributes:
        state: NumPyro's state after the last step, with the optimiser's.
        best: the state with the least validation loss, None without validation.
        losses: one for each step taken.
        validation: rows of (steps taken, validation loss), `(count, 2)`.
        seconds: time spent.
        last_loss: of the last step tried.
        trouble: "loss" or "gradient" where this was not finite in the step tried last, which was not taken.
    """

    state: SVIState
    best: SVIState | None
    losses: np.ndarray
    validation: np.ndarray
    seconds: float = 0.0
    last_loss: float = float("nan")
    trouble: str = ""

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.losses)

    step = steps  # an older name

    @property
    def empty(self) -> bool:
        """Whether no step has been taken."""
        return not self.steps

    @property
    def best_step(self) -> int:
        """Steps taken when the validation loss was least; the last step without validation."""
        found = self.validation
        return int(found[np.nanargmin(found[:, 1]), 0]) if np.isfinite(found[:, 1]).any() else self.steps

    @property
    def chosen(self) -> SVIState:
        """The best state where there is one, or the last."""
        return self.state if self.best is None else self.best

    @classmethod
    def start(cls, state: SVIState) -> "TrainState":
        """Nothing done yet."""
        return cls(state, None, np.zeros(0, jnp.result_type(float)), np.zeros((0, 2)))


def _is_plain(x: Any) -> bool:
    return isinstance(x, int | float | str | None)
