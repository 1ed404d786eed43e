"""Files that commands write. That one can be written is found out before the work, not after it."""

import tempfile
from pathlib import Path

import typer

PICTURES = (".png", ".svg", ".pdf")


def writable(path: Path | None) -> Path | None:
    """Callback of an option that names a file: makes its folder. Raises `typer.BadParameter`, a sentence."""
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: name a file in it.")
    try:
        if path.is_file():  # its own mode counts; what is there stays
            with path.open("ab"):
                pass
        elif not path.exists():  # a pipe or a device is taken as it is: to open one may mean something to its reader
            _make(path.parent)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}.") from None
    return path


def folder(path: Path | None) -> Path | None:
    """Callback of an option that names a folder for several files: makes it. Raises as `writable`."""
    if path is None:
        return None
    try:
        _make(path)
    except OSError as error:
        raise typer.BadParameter(f"{path} is no folder that can be written to: {error.strerror}.") from None
    return path


def picture(path: Path | None) -> Path | None:
    """Callback of an option that names a picture: `writable`, and its ending is that of a picture."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"{path} does not end as a picture does: name a file in {', '.join(PICTURES)}.")
    return writable(path)


def _make(folder: Path) -> None:
    """Raises OSError where it cannot be made, or takes no files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
