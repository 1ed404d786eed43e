"""`trifleet k8s`: write what the manifests take from the settings, and check manifests without a cluster."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from deploy.settings import SettingsError

app = typer.Typer(help="The fleet on Kubernetes: generate from the settings, check manifests.", no_args_is_help=True)
console = Console()
errors = Console(stderr=True)


@app.command()
def render(
    file: Annotated[Path | None, typer.Option("--file", "-f", help="The fleet's settings (YAML).")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="An overlay's folder `generated`.", file_okay=False)] = None,
) -> None:
    """Write serveConfigV2 and the environment of one settings file, or renew all that a checkout's k8s/ has."""
    from dashboards.files import RULES
    from deploy.kubernetes.render import write_all, write_generated

    if (file is None) != (out is None):
        _fail("--file and --out belong together: give both, or neither to renew a checkout's k8s/.")
    try:
        if file is not None and out is not None:
            written = write_generated(file, out)
        elif Path("k8s/overlays").is_dir():
            written = write_all(Path("k8s"), RULES)
        else:
            _fail("There is no folder k8s/overlays here: go to a checkout, or give --file and --out.")
    except SettingsError as error:
        _fail(str(error))
    for path in written:
        console.print(str(path), soft_wrap=True, highlight=False)


@app.command()
def validate(
    source: Annotated[str, typer.Argument(help="A file of manifests, or - for the standard input.")],
    crds: Annotated[
        Path | None, typer.Option("--crds", help="Folder of further CustomResourceDefinitions.", file_okay=False)
    ] = None,
) -> None:
    """Check manifests: schemas, unknown fields, KubeRay's own rules, and whether they agree with the settings."""
    from deploy.kubernetes.schemas import MissingPackageError
    from deploy.kubernetes.validate import validate as run

    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text()
        count, problems = run(text, crds)
    except OSError as error:
        _fail(f"{source} cannot be read: {error.strerror}.")
    except UnicodeDecodeError:
        _fail(f"{source} cannot be read: it is not UTF-8 text.")
    except MissingPackageError as error:
        _fail(str(error))
    if not count and not problems:
        _fail(f"There is no manifest in {'the standard input' if source == '-' else source}.")
    for problem in problems:
        errors.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)
    if problems:
        _fail(f"{count} documents, {len(problems)} {'mistake' if len(problems) == 1 else 'mistakes'}.")
    console.print(f"[green]✓[/] {count} documents, no mistake found.")


def _fail(sentence: str) -> NoReturn:
    errors.print(sentence, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)
