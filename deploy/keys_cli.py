"""`trifleet keys new`: make an API key. It is shown once; what is kept is its hash."""

import hashlib
import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy.output import writable
from deploy.tiers import check_names
from replicas.access import ADMIN, DEFAULT_TIER

PREFIX = "tf-"
KEY_BYTES = 32

app = typer.Typer(help="API keys of a fleet.", no_args_is_help=True)


@app.callback()
def _keys() -> None:
    """A group, though it has one command: `trifleet keys new`."""


@app.command()
def new(
    tier: Annotated[str, typer.Option(help=f"the key's tier, or {ADMIN}")] = DEFAULT_TIER,
    file: Annotated[
        Path | None, typer.Option(help="append the hash to this keys file (access.keys_file)", callback=writable)
    ] = None,
) -> None:
    """Make a key, print it, and print its hash or append that to a keys file."""
    console = Console()
    try:
        check_names([tier] if tier != ADMIN else [])
        is_new = file is None or not file.exists()
        before = "" if file is None or is_new else _text(file)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    line = f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {tier}"
    console.print(f"Key (shown this once): {key}", markup=False, soft_wrap=True, highlight=False)
    if file is None:
        console.print(f"Line for access.keys_file: {line}", markup=False, soft_wrap=True, highlight=False)
        return
    with file.open("a") as out:
        out.write(("\n" if before and not before.endswith("\n") else "") + line + "\n")
    if is_new:
        file.chmod(0o600)
    # What the fleet's settings hold is not known here, and a line with another tier does not count.
    condition = "" if tier in (ADMIN, DEFAULT_TIER) else f" whose settings have a tier {tier}"
    said = f"Its hash is in {file}; a running fleet{condition} takes it at once."
    console.print(said, markup=False, soft_wrap=True, highlight=False)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text in UTF-8: name a keys file, or one that is yet to be made.") from None
