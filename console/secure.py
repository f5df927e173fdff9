"""`dspex secure`: who may connect to a system, and what an operator of a server of their own must know."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspex.console.options import Options, common
from dspex.console.render import dim, green, print_json, print_table

if TYPE_CHECKING:
    from dspex.compose.secure import Secured

__all__ = ["secure"]

PATIENCE = 10.0
"""Seconds to wait for a running system to take a change in."""


@click.group(short_help="Say who may do what: identities, accounts, TLS.")
def secure() -> None:
    """Access rules for a system: an identity for each role, program and client, and accounts that keep them apart.

    `dspex secure init` makes them, `dspex up --secure` runs with them.
    """


@secure.command(short_help="Make identities, certificates and the server's configuration.")
@click.argument("app", required=False, type=click.Path())
@click.option("--program", "programs", multiple=True, metavar="NAME", help="A program to be served; may be repeated.")
@click.option("--client", "clients", multiple=True, metavar="NAME", help="A client; may be repeated.")
@click.option("--host", "hosts", multiple=True, metavar="HOST", help="A name of the server; may be repeated.")
@common
def init(
    options: Options, app: str | None, programs: tuple[str, ...], clients: tuple[str, ...], hosts: tuple[str, ...]
) -> int:
    """Make what is missing in DATA/secure; what is there stays as it is.

    APP is what `dspex up` would be given; its programs get identities. Without --client there is one, named client.
    """
    from dspex.compose.app import load_app
    from dspex.compose.secure import Secured
    from dspex.core.access import Role

    settings = options.settings()
    secured = Secured(settings.data, settings.prefix)
    if not clients and not any(user.role is Role.CLIENT for user in secured.users):
        clients = ("client",)
    found = [program.name for program in load_app(app)] if app else []
    made = secured.add(programs=[*found, *programs], clients=clients, hosts=hosts)
    known = _taken_in(options, secured)
    if options.json:
        said = {"folder": str(secured.folder), "made": made, "in_force": known, "identities": _table(secured)}
        print_json(said)
        return 0
    for name in made:
        click.echo(f"{green('made')}  {name:<24} {dim(str(secured.folder / f'{name}.json'))}")
    if not made:
        click.echo(f"nothing was missing in {secured.folder}")
    _say_taken_in(known)
    click.echo(
        "\nRun the system with `dspex up APP --secure`. A client is given its .json, its .nk and ca.pem, and says\n"
        f"NATS_CREDS={next((f'{name}.json' for name in made if name.startswith('client-')), 'client-NAME.json')}; "
        "the `nats` command takes the same file as a context.\n"
        "A server of your own must include what `dspex secure show` prints."
    )
    return 0


@secure.command("list", short_help="Name the identities.")
@common
def list_(options: Options) -> int:
    """Name the identities of a data folder, and where each one's context is."""
    secured = _existing(options)
    rows = _table(secured)
    if options.json:
        for row in rows:
            print_json(row)
        return 0
    print_table(["identity", "account", "public key", "context"], [
        [row["identity"], row["account"], row["public"], row["context"]] for row in rows
    ])  # fmt: skip
    return 0


@secure.command(short_help="Take a client's identity away.")
@click.argument("client")
@common
def revoke(options: Options, client: str) -> int:
    """Take the identity of CLIENT away. A running system ends its connections within seconds and refuses it."""
    from dspex.core.access import Role

    secured = _existing(options)
    secured.remove(Role.CLIENT, client)
    known = _taken_in(options, secured)
    if options.json:
        print_json({"revoked": client, "in_force": known})
        return 0
    click.echo(f"{green('revoked')}  {client}")
    _say_taken_in(known)
    return 0


@secure.command(short_help="Give an identity another seed.")
@click.argument("identity")
@common
def rotate(options: Options, identity: str) -> int:
    """Give IDENTITY another seed: a client's name, or a name that `dspex secure list` shows.

    A running system ends the connections made with the old one within seconds; its own processes connect again with the
    new one. A client needs its new .nk.
    """
    from dspex.core.errors import ConfigurationError

    secured = _existing(options)
    found = secured.identity(identity)
    if found is None:
        raise ConfigurationError(f"there is no identity {identity} in {secured.folder}; `dspex secure list` names them")
    secured.rotate(*found)
    known = _taken_in(options, secured)
    if options.json:
        print_json({"rotated": Path(secured.context(*found)).stem, "in_force": known})
        return 0
    click.echo(f"{green('rotated')}  {dim(secured.context(*found).removesuffix('.json') + '.nk')}")
    _say_taken_in(known)
    return 0


@secure.command(short_help="Print what a server of your own must include.")
@common
def show(options: Options) -> int:
    """Print accounts, users, exports and imports for the configuration of a nats-server of your own.

    There are public keys in it and no secrets. Include it, turn JetStream on, and set `tls` as you do: clients of this
    folder trust DATA/secure/ca.pem, or name another `ca` in their context.
    """
    from dspex.bus.access import accounts_text

    secured = _existing(options)
    click.echo(accounts_text(secured.users, secured.subjects), nl=False)
    return 0


@secure.command(short_help="Print who may send what.")
@common
def rules(options: Options) -> int:
    """Print every subject of a secured system, who may send there and what for; as tables for a page of Markdown."""
    from dspex.core.access import system_table, table
    from dspex.core.subjects import Subjects

    subjects = Subjects(options.settings().prefix, tenants=True)
    between, within = table(subjects), system_table(subjects)
    if options.json:
        for subject, who, by, why in between:
            print_json({"subject": subject, "who": who, "served_by": by, "why": why})
        return 0
    click.echo("| subject | who may send there | served by | what for |\n|---|---|---|---|")
    for subject, who, by, why in between:
        click.echo(f"| `{subject}` | {who} | {by} | {why} |")
    click.echo("\n| within one account | may publish | may subscribe to |\n|---|---|---|")
    for role, publish, subscribe in within:
        click.echo(f"| {role} | {_code(publish)} | {_code(subscribe)} |")
    return 0


def _taken_in(options: Options, secured: Secured) -> bool | None:
    """Whether the system that runs in this folder has taken the change in, which is waited for; None: none runs."""
    from dspex.compose.settings import PLACE, Place

    try:
        place = Place.model_validate_json((options.settings().data / PLACE).read_bytes())
        os.kill(place.pid, 0)
    except (OSError, ValueError):
        return None
    until = time.monotonic() + PATIENCE
    while not secured.in_force and time.monotonic() < until:
        time.sleep(0.1)
    return secured.in_force


def _say_taken_in(known: bool | None) -> None:
    if known:
        click.echo("The system that runs has taken it in.")
    elif known is False:
        click.echo(
            "The system that runs has not taken it in: it has no access rules, or a server of your own, which is to\n"
            "include what `dspex secure show` prints, and to be told twice to reload."
        )


def _code(subjects: str) -> str:
    return ", ".join(f"`{subject}`" for subject in subjects.split())


def _existing(options: Options) -> Secured:
    from dspex.compose.secure import Secured, is_secured
    from dspex.core.errors import ConfigurationError

    settings = options.settings()
    if not is_secured(Path(settings.data)):
        raise ConfigurationError(f"{settings.data} has no identities; `dspex secure init` makes them")
    return Secured(settings.data, settings.prefix)


def _table(secured: Secured) -> list[dict[str, Any]]:
    return [
        {
            "identity": Path(secured.context(user.role, user.name)).stem, "account": user.account,
            "public": user.public, "context": secured.context(user.role, user.name),
        }
        for user in secured.users
    ]  # fmt: skip
