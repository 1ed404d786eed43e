"""`trifleet dashboards`: write the dashboards and rules to files, or push the dashboards into a Grafana.

The Grafana packages take a second to import, so each command imports what it needs: `trifleet --help` stays quick.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Grafana dashboards and Prometheus rules.", no_args_is_help=True)
console = Console()


@app.command("export")
def export_command(
    directory: Annotated[Path, typer.Argument(help="Folder to write to; made if missing.", file_okay=False)],
) -> None:
    """Write the dashboards as JSON for Grafana's import, and the rules as YAML for Prometheus."""
    from dashboards.catalog import export, export_rules

    try:
        files = [*export(directory), export_rules(directory)]
    except OSError as error:
        typer.echo(f"{directory} cannot be written to ({error.strerror}): name another folder.", err=True)
        raise typer.Exit(1) from None
    for file in files:
        console.print(str(file), soft_wrap=True, highlight=False)


@app.command("push")
def push_command(
    url: Annotated[str, typer.Option(help="Grafana's address.")],
    token: Annotated[str, typer.Option(envvar="GRAFANA_TOKEN", help="Token of a Grafana service account.")],
    folder: Annotated[str, typer.Option(help="Title of the folder; made if missing.")] = "TriAttention fleet",
    prometheus: Annotated[
        str, typer.Option(help="Prometheus as Grafana reaches it, for the datasource if there is none.")
    ] = "http://localhost:9090",
) -> None:
    """Create or update the dashboards in a running Grafana. Doing it again changes nothing."""
    from dashboards.provision import ProvisionError, push

    try:
        for pushed in push(url, token, folder, prometheus):
            console.print(f"{pushed.outcome:9}  {pushed.title}  {pushed.url}", soft_wrap=True, highlight=False)
    except ProvisionError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
