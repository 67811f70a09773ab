"""The loop of `fit_svi`: compiled pieces of a run, between which there is time to look, validate, stop and save."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from pssm._checks import check_count
from pssm._keys import is_key
from pssm._types import Array
from pssm.fitting.devices import everywhere, partition
from pssm.objectives.constraint import without_constraints
from pssm.objectives.weighted_kl import WeightedKL

FIRST_PIECE = 10  # steps before anything is timed
LONGEST_PIECE = 1000
SECONDS = 1.0  # that a piece should take: progress is to be seen, and Ctrl-C heard


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
    """

    state: SVIState
    best: SVIState | None
    losses: np.ndarray
    validation: np.ndarray
    seconds: float

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)

    @property
    def best_step(self) -> int:
        """Steps taken when the validation loss was least; the last step without validation."""
        found = self.validation
        return int(found[np.nanargmin(found[:, 1]), 0]) if np.isfinite(found[:, 1]).any() else self.step

    @property
    def chosen(self) -> SVIState:
        """The best state where there is one, or the last."""
        return self.state if self.best is None else self.best

    @classmethod
    def start(cls, state: SVIState) -> "TrainState":
        """Nothing done yet."""
        return cls(state, None, np.zeros(0, jnp.result_type(float)), np.zeros((0, 2)), 0.0)


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        run: where it is.
        reason: "num_steps", "patience", "interrupted", or what was not finite: "loss" or "gradient".
        loss: of the last step tried.
    """

    run: TrainState
    reason: str
    loss: float


def train(
    svi: SVI,
    run: TrainState,
    settings: Settings,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    progress_bar: bool = True,
    each: Callable[[TrainState], None] | None = None,
) -> Outcome:
    """Goes on from `run` to `settings.num_steps`, or until something ends it; `each` is called after every piece.

    The steps do not depend on how they are cut into pieces: one compiled program takes any number of them. A step
    whose loss, or whose new parameters, are not finite is not taken.
    """
    advance = _program(svi, settings, args, kwargs)
    validate = None if settings.validation is None else _validation(svi, settings.validation, kwargs)
    together = jax.process_count() > 1  # then all processes must cut alike, so not by the clock
    size, timed, reason, last = FIRST_PIECE, False, "num_steps", np.nan
    leader = jax.process_index() == 0
    with tqdm(total=settings.num_steps, initial=run.step, disable=not (progress_bar and leader)) as bar:
        while run.step < settings.num_steps:
            if settings.patience and _waited(run, settings) >= settings.patience:
                reason = "patience"
                break
            count = min(size, settings.num_steps - run.step)
            if validate is not None:
                count = min(count, settings.every - run.step % settings.every)
            begun = time.perf_counter()
            try:
                state, losses, done, ended = advance(run.state, count)
                losses = np.asarray(losses)[: int(done)]
                took = time.perf_counter() - begun
                taken, last = len(losses) - (ended != ""), losses[-1]
                new = run._replace(state=state, losses=np.append(run.losses, losses[:taken]))
                if (
                    validate is not None
                    and taken == count
                    and (new.step % settings.every == 0 or new.step == settings.num_steps)
                ):
                    new = _validated(new, validate)
                run = new._replace(seconds=run.seconds + time.perf_counter() - begun)
                if each is not None and not ended:
                    each(run)
            except KeyboardInterrupt:
                if not run.step:
                    raise
                reason = "interrupted"
                break
            bar.update(taken)
            bar.set_postfix_str(_words(run), refresh=False)
            if timed and not together:
                size = int(np.clip(size * SECONDS / max(took, 1e-4), 1, min(4 * size, LONGEST_PIECE)))
            size, timed = (100 if together else size), True
            if ended:
                reason = ended
                break
    return Outcome(run, reason, float(last))


def _program(svi: SVI, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """`(state, count) -> (state, losses, steps tried, why it ended early)` with one compilation for every count.

    Arrays that are spread over devices enter as arguments; all others are constants, as in NumPyro's own `run`.
    """
    spread, rebuild = partition((args, kwargs))

    def one(state: SVIState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[SVIState, Array]:
        step, now = state.optim_state[0], svi
        if settings.step_args is not None:
            args = settings.step_args(step, jax.random.fold_in(state.rng_key, 1), *args)
            args = args if isinstance(args, tuple) else (args,)
        if settings.kl_schedule is not None:
            now = copy.copy(svi)
            now.loss = WeightedKL(svi.loss, settings.kl_schedule(step))
        return now.update(state, *args, **kwargs)

    @_compiled_for(spread)
    def pieces(state: SVIState, count: Array, spread: list[Array]) -> Any:
        args, kwargs = rebuild(spread)

        def body(carry: Any) -> Any:
            i, state, losses, _ = carry
            new, loss = one(state, args, kwargs)
            sound = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(new.optim_state) if _is_float(x)]).all()
            why = jnp.where(jnp.isfinite(loss), jnp.where(sound, 0, 2), 1)
            state = jax.tree.map(lambda new, old: jnp.where(why == 0, new, old), new, state)
            return i + 1, state, losses.at[i].set(loss), why

        start = (jnp.zeros((), int), state, jnp.zeros(LONGEST_PIECE), jnp.zeros((), int))
        return jax.lax.while_loop(lambda c: (c[0] < count) & (c[3] == 0), body, start)

    def advance(state: SVIState, count: int) -> tuple[SVIState, Array, int, str]:
        done, state, losses, why = pieces(state, np.asarray(count), spread)
        return state, losses, int(done), ("", "loss", "gradient")[int(why)]

    return advance


def _compiled_for(spread: list[Array]) -> Callable[..., Any]:
    """`jax.jit`; where data are spread over devices, with results that are whole on each of them."""
    return jax.jit if not spread else partial(jax.jit, out_shardings=everywhere(spread[0]))


def _validation(svi: SVI, validation: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[SVIState], float]:
    """The unweighted loss on held-out arguments, with the same random draws each time."""
    spread, rebuild = partition((validation, kwargs))

    @_compiled_for(spread)
    def loss(state: SVIState, spread: list[Array]) -> Array:
        args, kwargs = rebuild(spread)
        key = jax.random.key_data(jax.random.key(0)) if not is_key(state.rng_key) else jax.random.key(0)
        state = state._replace(rng_key=key, mutable_state=without_constraints(state.mutable_state))
        return svi.evaluate(state, *args, **kwargs)

    return lambda state: float(loss(state, spread))


def _validated(run: TrainState, validate: Callable[[SVIState], float]) -> TrainState:
    loss = validate(run.state)
    least = np.nanmin(run.validation[:, 1], initial=np.inf)
    history = np.append(run.validation, [[run.step, loss]], axis=0)
    return run._replace(validation=history, best=run.state if loss < least or run.best is None else run.best)


def _waited(run: TrainState, settings: Settings) -> int:
    """Validations since the best one; none count while the weight of the KL divergence still changes."""
    since = run.validation[run.validation[:, 0] > run.best_step, 0] if len(run.validation) else ()
    end = settings.weight(settings.num_steps)
    return sum(settings.weight(int(step)) == end for step in since)


def _words(run: TrainState) -> str:
    text = f"loss {run.losses[-100:].mean():.4g}" if run.step else ""
    return f"{text}, validation {run.validation[-1, 1]:.4g}" if len(run.validation) else text


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _is_plain(x: Any) -> bool:
    return isinstance(x, int | float | str | None)
