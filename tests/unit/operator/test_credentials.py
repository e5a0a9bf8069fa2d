"""Certificates and when they are made anew."""

from __future__ import annotations

import ssl
import time
from itertools import pairwise

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from lockstep_api import tls
from lockstep_operator.credentials import Credentials, MasterKeys
from lockstep_operator.errors import ConfigError
from lockstep_operator.plan.renewal import SKEW_SECONDS, Validity, period, window

KEY, OTHER_KEY = b"a master key of this operator", b"a master key of another one"
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=40)
VALIDITIES = st.builds(lambda renew, times: Validity(renew * times, renew), st.floats(1, 1e7), st.floats(2, 10))
NOW = time.time()


def material(credentials: Credentials, uid: str = "uid") -> tls.Material:
    secret = credentials.secret(uid)
    return tls.Material(secret["tls.crt"], secret["tls.key"], secret["ca.crt"])


def at(moment: float, *accepted: bytes, key: bytes = KEY, validity: Validity | None = None) -> Credentials:
    return Credentials(MasterKeys(key, accepted), validity, clock=lambda: moment)


def shown(server: Credentials, client: ssl.SSLContext, uid: str = "uid") -> frozenset[str]:
    """Names in the certificate that a pod of ``uid`` is shown by ``client``."""
    return tls.names(tls.rehearse(material(server, uid).server(), client, tls.agents_name(uid)))


# ------------------------------------------------------------------------------------------------- renewal


@given(NAMES, VALIDITIES, st.floats(1.6e9, 4e9))
def test_a_certificate_is_valid_when_it_is_made_and_until_long_after_the_next_one(
    name: str, validity: Validity, now: float
) -> None:
    first, last = period(name, validity, window(name, validity, now))
    assert first <= now - SKEW_SECONDS + 1e-3
    assert last >= now + validity.seconds - validity.renew_seconds - 1e-3
    assert window(name, validity, last) > window(name, validity, now)  # it has been renewed when it ends


@given(NAMES, VALIDITIES, st.floats(1.6e9, 4e9), st.floats(0, 1e8))
def test_renewal_is_due_once_in_each_window(name: str, validity: Validity, now: float, later: float) -> None:
    between = window(name, validity, now + later) - window(name, validity, now)
    assert abs(between - later / validity.renew_seconds) <= 1


def test_jobs_are_not_renewed_all_at_once() -> None:
    validity = Validity()
    due = [sum(window(str(job), validity, hour * 3600) != window(str(job), validity, (hour + 1) * 3600)
               for job in range(1000)) for hour in range(24)]  # fmt: skip
    assert max(due) < 20  # 1000 jobs in 240 hours: 4 an hour


@pytest.mark.parametrize(("valid", "renew"), [(100, 51), (100, 0), (100, -1)])
def test_a_validity_that_leaves_no_time_to_renew_is_refused(valid: float, renew: float) -> None:
    with pytest.raises(ConfigError, match=f"renewed every {renew:g} s"):
        Validity(valid, renew)


# ---------------------------------------------------------------------------------------------- certificates


def test_the_same_key_makes_the_same_bytes_and_another_time_others() -> None:
    """So an operator that starts writes what is there already, and nothing is kept."""
    validity = Validity(100, 50)
    first = at(NOW, validity=validity)
    again = at(NOW, validity=validity)
    later = at(NOW + 50, validity=validity)
    assert first.secret("uid") == again.secret("uid")
    assert first.version("uid") == again.version("uid") != later.version("uid")
    assert first.secret("uid")["tls.key"] != later.secret("uid")["tls.key"]
    assert first.secret("uid")["token"] == later.secret("uid")["token"]
    assert first.secret("uid")["ca.crt"] == later.secret("uid")["ca.crt"]


def test_certificates_are_as_strict_verifiers_want_them() -> None:
    leaf = material(at(NOW))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=leaf.authorities.decode())
    server = leaf.server()
    assert tls.rehearse(server, context, tls.agents_name("uid")) == {}
    certificate = x509.load_pem_x509_certificate(leaf.certificate)
    assert 0 < certificate.serial_number < 2**159  # RFC 5280, 4.1.2.2
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_members_and_operator_know_each_other() -> None:
    mine = at(NOW)
    assert shown(mine, tls.Rotating(material(mine).client, tls.agents_name("uid"))) == {"uid.agents.lockstep"}
    assert shown(mine, mine.context("uid")) == {"operator.lockstep"}


def test_another_jobs_pod_is_not_taken_for_this_ones() -> None:
    """Its address may have been this job's a minute ago."""
    mine = at(NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'uid\.agents\.lockstep'"):
        shown(mine, mine.context("uid"), uid="another")


def test_another_operators_certificates_are_refused_on_both_sides() -> None:
    mine, other = at(NOW), at(NOW, key=OTHER_KEY)
    with pytest.raises(ssl.SSLCertVerificationError):  # by the client
        shown(other, mine.context("uid"))
    blind = material(other).client()
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):  # by the server
        shown(mine, blind)


@pytest.mark.parametrize(("days", "why"), [(-10, "expired"), (1, "not yet valid")])
def test_a_certificate_outside_its_time_is_refused(days: int, why: str) -> None:
    validity = Validity(86400, 3600)
    with pytest.raises(ssl.SSLCertVerificationError, match=why):
        shown(at(NOW + days * 86400, validity=validity), at(NOW, validity=validity).context("uid"))


def test_a_clock_that_is_behind_by_less_than_the_allowance_is_no_trouble() -> None:
    """The certificate is made by a clock that is ahead of the one that verifies it."""
    validity = Validity(86400, 3600)
    ahead = at(NOW + SKEW_SECONDS - 30, validity=validity)
    assert shown(ahead, ahead.context("uid")) == {"operator.lockstep"}


def test_the_operators_own_certificate_is_renewed_in_a_context_that_is_in_use() -> None:
    """The clock of ssl is the real one, and a certificate is begun up to a renewal's time before it is asked for."""
    now = time.time() - 3600
    credentials = Credentials(MasterKeys(KEY), Validity(4 * 3600, 3600), clock=lambda: now)
    context = credentials.context("uid")
    server = material(credentials).server()
    first = tls.Valid.of(tls.rehearse(server, context, "")).until
    now += 3600
    assert tls.Valid.of(tls.rehearse(server, context, "")).until == first + 3600


# ------------------------------------------------------------------------------------- another master key


def test_the_master_key_is_changed_in_steps_that_never_shut_anyone_out() -> None:
    old, new = KEY, OTHER_KEY
    steps = [
        at(NOW, key=old),
        at(NOW, new, key=old),  # the new one is believed
        at(NOW, old, key=new),  # and then used
        at(NOW, key=new),
    ]
    for before, after in pairwise(steps):
        for server, client in ((before, after), (after, before)):  # secrets reach pods one after another
            assert shown(server, client.context("uid")) == {"operator.lockstep"}
            accepted = [server.token("uid"), *server.secret("uid").get("accepted-tokens", b"").decode().split()]
            assert client.token("uid") in accepted
    with pytest.raises(ssl.SSLError):
        shown(steps[0], steps[-1].context("uid"))  # the old key alone is worth nothing then
    assert steps[-1].token("uid") not in steps[0].secret("uid")["token"].decode()
