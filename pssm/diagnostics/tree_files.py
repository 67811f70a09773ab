"""Trees as netCDF files."""

from pathlib import Path

import xarray as xr

from pssm.storage.files import whole_file


def save_tree(tree: xr.DataTree, path: str | Path) -> Path:
    """Writes a tree to netCDF (h5netcdf), whole or not at all: a temporary file is moved into place.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    with whole_file(path) as partial:
        tree.to_netcdf(partial, engine="h5netcdf")
    return path


def load_tree(path: str | Path) -> xr.DataTree:
    """Reads a tree written by `save_tree` into memory; equal to what was saved.

    Raises:
        FileNotFoundError: there is no such file.
    """
    dates = xr.coders.CFDatetimeCoder(time_unit="us")  # nanoseconds, the default, begin in 1677
    with xr.open_datatree(path, engine="h5netcdf", decode_times=dates) as tree:
        return tree.load()
