"""Names of axes: every axis has one of its own, and no two axes share one."""

from collections.abc import Iterable

# Of an axis: "plate", "time", "state", "series" or "named", and the plate, the site or the name that it is of.
Kind = tuple[str, str]
TIME: Kind = ("time", "")
RESERVED = ("chain", "draw", "horizon", "time")  # axes of the trees of results: plates called so get "_" at their end

Found = dict[str, list[Kind | None]]
Shapes = dict[str, tuple[int, ...]]


def plate_names(plates: Iterable[str]) -> dict[str, str]:
    """The plates by the names of their axes."""
    return {f"{name}_" if name in RESERVED else name: name for name in plates}


def settle_time(found: Found, shapes: Shapes) -> None:
    """The plate "time" is time, unless a site in it has time besides, or time has other lengths."""
    plate: Kind = ("plate", "time")
    lengths: dict[Kind | None, set[int]] = {plate: set(), TIME: set()}
    for name, axes in found.items():
        for axis, size in zip(axes, shapes[name], strict=True):
            if axis in lengths:
                lengths[axis].add(size)
    both = any(plate in axes and TIME in axes for axes in found.values())
    if not both and (not lengths[TIME] or lengths[plate] <= lengths[TIME]):
        for name, axes in found.items():
            found[name] = [TIME if axis == plate else axis for axis in axes]


def name_axes(
    found: Found, shapes: Shapes, given: dict[str, tuple[str, ...]], first: tuple[str, ...] = ()
) -> dict[str, tuple[str, ...]]:
    """Names of the axes of every site; an axis that is not known is `<site>_dim_<position>`.

    An axis of two lengths is two axes. Plates have their own names; then who asks first has a name, and a further axis
    of that kind is `<site>_<kind>`.

    Args:
        found: the axes of every site.
        shapes: their sizes.
        given: names of the axes of some sites, which stay as they are; the name "time" makes an axis that of time.
        first: the sites that ask first.
    """
    names: dict[tuple[Kind, int], str] = {}
    for site, own in given.items():
        every = zip(found[site], shapes[site], own, strict=True)
        names |= {(a, n): x for a, n, x in every if a is not None and (a, x) != (TIME, "time")}
    asked = []
    for site in dict.fromkeys((*first, *found)):
        axes = found[site] = [a if a not in found[site][:i] else None for i, a in enumerate(found[site])]
        asked += [(a, n, site) for a, n in zip(axes, shapes[site], strict=True) if a is not None]
    for axis, size, site in sorted(asked, key=lambda x: x[0][0] not in ("plate", "named")):  # a stable sort
        if (axis, size) not in names:
            kind, own = axis
            plain = own if kind in ("plate", "named") else kind
            plain += "_" if kind == "plate" and plain in RESERVED else ""
            names[axis, size] = _free(plain, site, names.values())
    return {
        site: tuple(
            f"{site}_dim_{i}" if a is None else names[a, n]
            for i, (a, n) in enumerate(zip(axes, shapes[site], strict=True))
        )
        for site, axes in found.items()
    }


def state_axes(names: dict[str, tuple[str, ...]], paths: Iterable[str], integrated: Iterable[str]) -> dict[str, str]:
    """The axes of states: that of every path, and one for every series whose states are integrated out."""
    states = {site: names[site][-1] for site in paths}
    taken = {axis for axes in names.values() for axis in axes}
    for site in integrated:
        states[site] = _free("state", site, taken)
        taken.add(states[site])
    return states


def _free(plain: str, site: str, taken: Iterable[str]) -> str:
    """A name that is not taken."""
    name = plain if plain not in taken else f"{site}_{plain}"
    while name in taken:
        name += "_"
    return name
