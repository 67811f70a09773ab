"""The slow tests, and their division into parts of about equal time: `make slow PART=2/5`."""

from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
DURATIONS = HERE / "durations.txt"  # `seconds nodeid`, written by `make slow DURATIONS=tests/durations.txt`
UNKNOWN = 10.0  # seconds of a test that was never measured


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


SLOW = set(_lines(HERE / "slow.txt"))


def part(text: str) -> tuple[int, int]:
    """`(k, n)` of `k/n`."""
    k, _, n = text.partition("/")
    if not (k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise ValueError(f"`--part` must be k/n with 1 <= k <= n, such as 2/5; got {text!r}.")
    return int(k), int(n)


def durations() -> dict[str, float]:
    """Measured seconds by test."""
    return {name: float(seconds) for seconds, name in (line.split(" ", 1) for line in _lines(DURATIONS))}


def save_durations(path: Path, found: dict[str, float]) -> None:
    """Writes the seconds of tests, longest first."""
    lines = [f"{seconds:.1f} {name}" for name, seconds in sorted(found.items(), key=lambda x: (-x[1], x[0]))]
    path.write_text("\n".join(lines) + "\n")


def of_part(names: list[str], k: int, n: int) -> set[str]:
    """Those of the k-th of n parts. The cases of one test function, which share compiled programs, stay together."""
    seconds, groups = durations(), defaultdict(list)
    for name in names:
        groups[name.partition("[")[0]].append(name)
    weights = {group: sum(seconds.get(name, UNKNOWN) for name in cases) for group, cases in groups.items()}
    totals, parts = [0.0] * n, [set() for _ in range(n)]
    for group in sorted(groups, key=lambda group: (-weights[group], group)):
        lightest = totals.index(min(totals))
        totals[lightest] += weights[group]
        parts[lightest] |= set(groups[group])
    return parts[k - 1]
