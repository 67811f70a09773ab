"""Sets of sequences with a class each, from files that ship with the package."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pssm._checks import check_choice


class Sequences(NamedTuple):
    """Sequences of unequal length, each of one class, split into two parts by those who published them.

    Attributes:
        name: short name.
        train: one array `(time_i, n_obs)`, float64, for each sequence of the training part; no missing values.
        train_labels: class of each of them, numbers from 0 on, `(sequence,)`.
        test: the sequences of the test part.
        test_labels: their classes.
        classes: name of each class.
        columns: name of each observed variable.
        description: the measured quantity.
        source: where the data come from.
        licence: terms of use, and the authors to name.
    """

    name: str
    train: list[np.ndarray]
    train_labels: np.ndarray
    test: list[np.ndarray]
    test_labels: np.ndarray
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    description: str
    source: str
    licence: str


class _About(NamedTuple):
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    description: str
    source: str
    licence: str


_EMBEDDED = {
    "japanese_vowels": _About(
        tuple(f"speaker {k}" for k in range(1, 10)),
        tuple(f"cepstrum{k}" for k in range(1, 13)),
        "12 cepstral coefficients of nine men saying the vowels /ae/, a frame every 6.4 ms",
        "M. Kudo, J. Toyama and M. Shimbo (1999), UCI Machine Learning Repository, doi:10.24432/C5NS47",
        "CC BY 4.0; attribution: M. Kudo, J. Toyama, M. Shimbo, UCI Machine Learning Repository",
    ),
}


def load_sequences(name: str) -> Sequences:
    """An embedded set of sequences by name; see `available_sequences`, and PROVENANCE.md beside the files.

    Args:
        name: `japanese_vowels`.

    Returns:
        A `Sequences`: two lists of arrays `(time_i, n_obs)`, with labels.

    Raises:
        ValueError: unknown `name`; the message lists the known ones.

    Example:
        >>> vowels = load_sequences("japanese_vowels")
        >>> len(vowels.train), len(vowels.test), vowels.train[0].shape, vowels.classes[vowels.train_labels[0]]
        (270, 370, (20, 12), 'speaker 1')
    """
    check_choice("name", name, list(_EMBEDDED))
    with np.load(Path(__file__).parent / f"{name}.npz") as file:
        values, lengths, labels = file["values"] / 10.0 ** file["decimals"], file["lengths"], file["labels"]
        num_train = int(file["num_train"])
    parts = np.split(values, np.cumsum(lengths.astype(int))[:-1])
    labels = labels.astype(int)
    train, test = slice(None, num_train), slice(num_train, None)
    about = _EMBEDDED[name]
    return Sequences(name, parts[train], labels[train], parts[test], labels[test], *about)


def available_sequences() -> list[tuple[str, int, int, str]]:
    """The embedded sets of sequences.

    Returns:
        One `(name, sequences, longest, description)` per set; train and test counted together.

    Example:
        >>> [row[:3] for row in available_sequences()]
        [('japanese_vowels', 640, 29)]
    """
    every = [load_sequences(name) for name in _EMBEDDED]
    return [(s.name, len(s.train + s.test), max(map(len, s.train + s.test)), s.description) for s in every]
