"""The engine of SVI: compiled pieces of a run, a schedule for the KL divergence, validation and early stopping."""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.svi import SVIRunResult, SVIState

from pssm._keys import is_key
from pssm._types import Array, Key
from pssm.devices import everywhere, local_copy, partition
from pssm.fitting.loop import FAILED, Arrays, Parts, check_more
from pssm.fitting.results import SVIFit, convergence
from pssm.fitting.start import build_svi, initial_state, on_host, state_shapes
from pssm.fitting.training import Settings, TrainState
from pssm.objectives import WeightedKL
from pssm.objectives.constraint import constraint_weights, without_constraints
from pssm.storage.folder import SavedFitError
from pssm.storage.packing import UnpackableError, pack, pack_leaves, unpack, unpack_leaves

LONGEST = 1000  # steps in a piece, at most
VALIDATION = "validation "  # before the names of the held-out arrays in a folder


class SVIEngine:
    """NumPyro's SVI. One compiled program takes any number of steps, so pieces and breaks change no number.

    A step whose loss, or whose new parameters, are not finite is not taken.

    Arguments as in `fit_svi`; a run of NumPyro's own goes on with its `svi`.
    """

    kind, counts, pace, save_every = "svi", ("steps", "num_steps"), 1.0, 5.0
    labels: Any = None

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        settings: Settings,
        svi: SVI | None = None,
    ):
        self.model, self.train_settings, self.longest = model, settings, LONGEST
        self.spread_args, self.spread_kwargs = args, kwargs
        self.args, self.kwargs = local_copy((args, kwargs))
        self.spread = bool(partition((args, kwargs, settings.validation))[0])
        self.svi = build_svi(model, settings) if svi is None else svi
        self.total = self.target = settings.num_steps
        self._advance: Callable[..., Any] | None = None
        self._validate: Callable[[SVIState], float] | None = None

    @classmethod
    def of(cls, fit: SVIFit) -> tuple["SVIEngine", TrainState]:
        """The engine and the run of a fit, also of one by NumPyro's own `svi.run`."""
        svi, steps = fit.svi, max(len(fit.losses), 10)
        settings = fit.settings or Settings(guide=svi.guide, optimizer=svi.optim, loss=svi.loss, num_steps=steps)
        run = fit.run or TrainState.start(fit.state)._replace(losses=np.asarray(fit.losses))
        return cls(svi.model, fit.args, fit.kwargs, settings, svi), run

    def start(self, key: Key) -> TrainState:
        """The run before the first step."""
        return TrainState.start(initial_state(self.svi, key, self.args, self.kwargs))

    def advance(self, run: TrainState, count: int) -> TrainState:
        """At most `count` steps more; none beyond the next validation."""
        settings, state = self.train_settings, run.state
        if self._advance is None:
            state = on_host(state) if self.spread else state
            self._advance = steps_of(self.svi, settings, self.spread_args, self.spread_kwargs)
        if settings.validation is not None:
            count = min(count, settings.every - run.steps % settings.every)
        state, losses, done, trouble = self._advance(state, count)
        losses = np.asarray(losses)[: int(done)]
        taken = len(losses) - (trouble != "")
        new = run._replace(
            state=state, losses=np.append(run.losses, losses[:taken]), last_loss=float(losses[-1]), trouble=trouble
        )
        due = settings.validation is not None and not trouble
        if due and (new.steps % settings.every == 0 or new.steps == settings.num_steps):
            new = self._validated(new)
        return new

    def done(self, run: TrainState) -> str:
        """What ended the run."""
        settings = self.train_settings
        if run.trouble:
            return run.trouble
        if run.steps >= settings.num_steps:
            return "num_steps"
        return "patience" if settings.patience and _waited(run, settings) >= settings.patience else ""

    def words(self, run: TrainState) -> str:
        """The losses of late."""
        text = f"loss {run.losses[-100:].mean():.4g}" if run.steps else ""
        return f"{text}, validation {run.validation[-1, 1]:.4g}" if len(run.validation) else text

    def leaves(self, run: TrainState) -> Parts:
        """States and losses."""
        states = {"state": run.state} | ({} if run.best is None else {"best": run.best})
        parts: Parts = {part: [pack_leaves({"state": state})] for part, state in states.items()}
        return parts | {"history": [{"losses": run.losses, "validation": run.validation}]}

    def settings(self) -> tuple[dict[str, Any], Arrays]:
        """The arguments of `fit_svi`, and the names of those that a file cannot hold."""
        held_out: Arrays = {}
        given = list(self.train_settings.callables)
        try:
            validation = pack(self.train_settings.validation, held_out)
        except UnpackableError:
            validation, held_out = None, {}
            given.append("validation")
        entry = {"settings": self.train_settings.plain, "validation": validation, "given": given}
        return entry | {"guide": type(self.svi.guide).__name__}, {VALIDATION + n: x for n, x in held_out.items()}

    @classmethod
    def reopen(cls, saved: Any) -> "SVIEngine":
        """The engine of a saved folder; `saved.given` has what a file cannot hold."""
        missing = [n for n in saved.manifest.get("given", []) if n not in saved.given]
        if missing:
            names = ", ".join(f"`{n}`" for n in missing)
            raise ValueError(f"{names} must be given again: a file cannot hold what this fit was run with.")
        known = {f.name for f in dataclasses.fields(Settings)}
        if not set(saved.given) <= known:
            raise TypeError(f"`given` has what is no argument of `fit_svi`: {sorted(set(saved.given) - known)}.")
        options = {n: x for n, x in saved.manifest["settings"].items() if n in known}
        held_out = {n.removeprefix(VALIDATION): x for n, x in saved.arrays.items() if n.startswith(VALIDATION)}
        options["validation"] = unpack(saved.manifest["validation"], held_out)
        return cls(saved.model, saved.args, saved.kwargs, Settings(**{**options, **saved.given}))

    def restore(self, parts: Parts, steps: int, seconds: float) -> TrainState:
        """The run that `leaves` was given."""
        shapes = {"state": state_shapes(self.svi, jax.random.key(0), self.args, self.kwargs)}
        state, best = (unpack_leaves(shapes, parts[p][0])["state"] if parts.get(p) else None for p in ("state", "best"))
        history = parts["history"][0] if parts.get("history") else {}
        if set(history) != {"losses", "validation"}:
            raise SavedFitError("`path`: the saved fit has no losses.")
        return TrainState(state, best, history["losses"], history["validation"], seconds)

    def extended(self, run: TrainState, target: int | None) -> "SVIEngine":
        """The engine for more steps, with the step sizes of the first run."""
        settings = self.train_settings
        target = settings.num_steps if target is None else target
        check_more("num_steps", target, run.steps, "steps taken")
        every = settings.every if settings.validation is not None else None
        first = settings.schedule_steps or settings.num_steps
        settings = dataclasses.replace(settings, num_steps=target, schedule_steps=first, validate_every=every)
        return SVIEngine(self.model, self.spread_args, self.spread_kwargs, settings, self.svi)

    def result(self, run: TrainState, ended: str, seed: Any) -> SVIFit:
        """The fit of a run that has ended for a reason, with its convergence in words."""
        if self.spread:
            run = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)) if isinstance(x, jax.Array) else x, run)
        settings, chosen, svi = self.train_settings, run.chosen, self.svi
        found = SVIRunResult(svi.get_params(chosen), chosen, jnp.asarray(run.losses))
        fit = SVIFit.of(svi, found, *self.args, **self.kwargs)
        fit.run, fit.settings, fit.ended, fit.seed = run, settings, ended, seed
        schedule = settings.kl_schedule
        if schedule is not None:
            weights = np.asarray(jax.vmap(lambda i: jnp.asarray(schedule(i), float))(jnp.arange(run.steps)))
            end = settings.weight(settings.num_steps)
            changing = np.flatnonzero(weights != end)
            fit.converged, fit.message = convergence(run.losses[changing[-1] + 1 if changing.size else 0 :])
            if end != 1.0:
                fit.objective = f"surrogate: the KL divergence has the weight {end:g}"
        for site, weight in constraint_weights(chosen.mutable_state).items():
            fit.objective = f"surrogate: the likelihood of `{site}` has the weight {float(weight):.3g}"
        if ended == "patience":
            fit.converged = True
            fit.message = f"the validation loss was least after {run.best_step} steps and has not fallen since."
        if ended == "interrupted":
            fit.message = f"it was interrupted after {run.steps} of {settings.num_steps} steps."
        fit.converged = fit.converged and ended not in ("interrupted", *FAILED)
        return fit

    def _validated(self, run: TrainState) -> TrainState:
        if self._validate is None:
            self._validate = _validation(self.svi, self.train_settings.validation, self.spread_kwargs)
        loss = self._validate(run.state)
        least = np.nanmin(run.validation[:, 1], initial=np.inf)
        history = np.append(run.validation, [[run.steps, loss]], axis=0)
        return run._replace(validation=history, best=run.state if loss < least or run.best is None else run.best)


def steps_of(svi: SVI, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
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

        start = (jnp.zeros((), int), state, jnp.zeros(LONGEST), jnp.zeros((), int))
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


def _waited(run: TrainState, settings: Settings) -> int:
    """Validations since the best one; none count while the weight of the KL divergence still changes."""
    since = run.validation[run.validation[:, 0] > run.best_step, 0] if len(run.validation) else ()
    end = settings.weight(settings.num_steps)
    return sum(settings.weight(int(step)) == end for step in since)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)
