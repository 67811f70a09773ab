"""What is written of a fit, and when: manifests, and writers that a run calls after each of its pieces."""

import time
from typing import Any

import numpy as np
from numpyro.infer import MCMC, NUTS, SVI

from pssm.fitting.chains import ChainsState
from pssm.fitting.model_record import pack_call
from pssm.fitting.train import Settings, TrainState
from pssm.storage.folder import FitFolder
from pssm.storage.packing import UnpackableError, pack, pack_leaves, provenance

SECONDS = 5.0  # between two checkpoints of SVI


def remember(mcmc: MCMC, *, seed: Any, seconds: float, interrupted: bool = False) -> None:
    """Notes on NumPyro's object what it does not know of its run, for `save`."""
    mcmc.run_info = {"seed": seed, "seconds": seconds, "interrupted": interrupted}  # type: ignore[attr-defined]


def run_info(mcmc: MCMC) -> dict[str, Any]:
    """What `remember` noted; empty entries for a run of NumPyro's own."""
    return getattr(mcmc, "run_info", {"seed": None, "seconds": float("nan"), "interrupted": False})


def nuts_manifest(mcmc: MCMC, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fixed part of a manifest, and the arrays of the arguments.

    Raises:
        TypeError: the kernel is not NUTS.
    """
    kernel = mcmc.sampler
    if type(kernel) is not NUTS or kernel.model is None:
        raise TypeError(f"`fit` must be of NUTS with a model; its kernel is {type(kernel).__name__}.")
    call, arrays = pack_call(kernel.model, args, kwargs)
    settings = {
        "num_warmup": mcmc.num_warmup,
        "num_chains": mcmc.num_chains,
        "chain_method": mcmc.chain_method if isinstance(mcmc.chain_method, str) else "vectorized",
        "target_accept_prob": float(kernel._target_accept_prob),
        "dense_mass": pack(kernel._dense_mass, {}),
        "max_tree_depth": pack(kernel._max_tree_depth, {}),
    }
    return {"kind": "nuts", **call, "settings": settings}, arrays


def svi_manifest(
    svi: SVI, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fixed part of a manifest, and the arrays of the arguments."""
    call, arrays = pack_call(svi.model, args, kwargs)
    held_out: dict[str, np.ndarray] = {}
    given = list(settings.callables)
    try:
        validation = pack(settings.validation, held_out)
    except UnpackableError:
        validation, held_out = None, {}
        given.append("validation")
    arrays = {**arrays, **{f"validation {n}": x for n, x in held_out.items()}}
    entry = {"settings": settings.plain, "validation": validation, "given": given}
    return {"kind": "svi", "guide": type(svi.guide).__name__, **call, **entry}, arrays


class NutsWriter:
    """Writes state and new draws of a run of NUTS.

    Args:
        folder: where.
        num_samples: draws of each chain that are asked for.
        seed: the run's random key.
        saved: groups of draws that are there already.
    """

    def __init__(self, folder: FitFolder, num_samples: int, seed: Any, saved: int = 0):
        self.folder, self.num_samples, self.seed, self.saved = folder, num_samples, seed, saved

    def __call__(self, run: ChainsState) -> None:
        """Writes what is new."""
        self.folder.put("state", pack_leaves(run.state))
        for draws in run.draws[self.saved :]:
            self.folder.append("draws", draws)
        self.saved = len(run.draws)
        warmup = self.folder.manifest["settings"]["num_warmup"]
        progress = {"iterations": run.iterations, "num_samples": self.num_samples}
        done = run.iterations - warmup >= self.num_samples
        self.folder.commit(progress=progress, complete=done, provenance=provenance(run.seconds, self.seed))


class SVIWriter:
    """Writes the state of a run of SVI, at most every few seconds.

    Args:
        folder: where.
        settings: of the run.
        seed: the run's random key.
    """

    def __init__(self, folder: FitFolder, settings: Settings, seed: Any):
        self.folder, self.settings, self.seed = folder, settings, seed
        self._last = -np.inf

    def __call__(self, run: TrainState, ended: str = "") -> None:
        """Writes the state, if it is time or the run has `ended`, for the reason given."""
        if not ended and time.monotonic() - self._last < SECONDS:
            return
        self.folder.put("state", pack_leaves({"state": run.state}))
        if run.best is not None:
            self.folder.put("best", pack_leaves({"state": run.best}))
        self.folder.put("history", {"losses": run.losses, "validation": run.validation})
        progress = {"num_steps": self.settings.num_steps, "steps": run.step}
        done = ended in ("num_steps", "patience")
        notes = provenance(run.seconds, self.seed)
        self.folder.commit(progress=progress, complete=done, ended=ended, provenance=notes)
        self._last = time.monotonic()


def start_folder(path: Any, manifest: dict[str, Any], arrays: dict[str, Any], *, force: bool = False) -> FitFolder:
    """A new folder with the arguments in it; nothing counts before the first commit."""
    folder = FitFolder.create(path, manifest, force=force)
    if arrays:
        folder.put("arguments", arrays)
    return folder


__all__ = ["NutsWriter", "SVIWriter", "nuts_manifest", "remember", "run_info", "start_folder", "svi_manifest"]
