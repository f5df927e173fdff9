"""Whose a task is, on a system with access rules: there the server says with every message which account it is from."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from dspex.bus.client import Client
from dspex.core.access import Role, account_of
from dspex.core.codec import NOT_JSON
from dspex.core.headers import REQUEST_INFO, STUDY
from dspex.core.limits import Scope
from dspex.core.subjects import Subjects

__all__ = ["asker_of", "limited_by", "may_see", "same_tenant"]

_EVERYWHERE = account_of(Role.CONSOLE)


def asker_of(client: Client, headers: Mapping[str, str]) -> str:
    """The account that a request is from; "" on a system that is open to all.

    The server writes the header whenever a request leaves its account, over whatever the sender wrote there. A request
    without it comes from an agent of the same program.
    """
    own = client.identity.account
    if not own or REQUEST_INFO not in headers:
        return own
    try:
        account = msgspec.json.decode(headers[REQUEST_INFO]).get("acc")
    except (*NOT_JSON, AttributeError):
        account = None
    return account if isinstance(account, str) and account else "?"


def limited_by(subjects: Subjects, subject: str, headers: Mapping[str, str] | None) -> tuple[Scope, ...]:
    """Whose limits hold for a task that was stored under a subject: its tenant's, where the server says who that is,
    and its study's. A client's account is `CLIENT_alice`, its tenant `alice`."""
    tenant, study = subjects.tenant_of(subject), headers.get(STUDY, "") if headers else ""
    found = [Scope("tenant", tenant.removeprefix(account_of(Role.CLIENT)))] if tenant else []
    return tuple([*found, Scope("study", study[:256])] if study else found)


def may_see(asker: str, tenant: str) -> bool:
    """Whether a task is for the eyes of whoever asks: its own account, and the console. All are on an open system."""
    return asker == "" or asker in (tenant, _EVERYWHERE)


def same_tenant(subjects: Subjects, sent: str, submitted: str) -> bool:
    """Whether who sent a stored message may have a hand in a task, going by the subjects of both."""
    return not subjects.tenants or subjects.tenant_of(sent) in (subjects.tenant_of(submitted), _EVERYWHERE)
