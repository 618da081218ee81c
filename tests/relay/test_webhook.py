"""Webhooks: what is sent, its signature, and what happens when the receiver fails."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
import standardwebhooks
from cloudevents.core.bindings.http import HTTPMessage, from_http_event

from jobstatus_grpc.job import Job, JobState
from jobstatus_grpc.relay.event import Event
from jobstatus_grpc.relay.targets import DeliveryError, Webhook, _seconds_of, read_secrets
from tests.support.certificates import Authority
from tests.support.loop import on_a_loop
from tests.support.receiver import Receiver

pytestmark = pytest.mark.slow  # waits for retries

SECRETS = [f"whsec_{base64.b64encode(bytes(range(size))).decode()}" for size in (24, 64)]


def event_in(received):
    """Read a request as the library of CloudEvents does."""
    return from_http_event(HTTPMessage(dict(received.headers), received.body))


@pytest.mark.parametrize("flags", [[], ["--structured"]], ids=["binary", "structured"])
def test_an_end_is_a_cloudevent(relaying, receiver, service, make, flags):
    relaying("--webhook", f"{receiver.url}/hooks?a=b", "--source", "/jobs/ünits", *flags)
    job = make("FAILED", name="nightly “backup”", result=None)
    (received,) = receiver.wait_for(1)
    event = event_in(received)
    assert received.path == "/hooks?a=b"
    assert (event.get_source(), event.get_type(), event.get_subject()) == (
        "/jobs/ünits", "jobstatus.v1.job.failed", job.id
    )  # fmt: skip
    assert (event.get_id(), event.get_time()) == (received.id, job.finished_at.ToDatetime(timezone.utc))
    data = event.get_data()
    assert (data["id"], data["name"], data["state"], data["done"]) == (job.id, job.name, "JOB_STATE_FAILED", True)
    assert service.get(job.id).revision == int(data["revision"])


def test_the_two_modes_have_the_same_attributes(relaying, receiver, make, tmp_path):
    (tmp_path / "other").mkdir()
    relaying("--webhook", receiver.url)
    relaying("--webhook", receiver.url, "--structured", folder=tmp_path / "other")
    make()
    binary, structured = (event_in(each) for each in receiver.wait_for(2))
    assert binary.get_attributes() == structured.get_attributes()
    assert binary.get_data() == structured.get_data()


@pytest.mark.parametrize("is_in_a_file", [True, False])
def test_a_request_is_signed_by_each_secret(relaying, receiver, make, tmp_path, is_in_a_file):
    text = "\n".join(SECRETS)
    (tmp_path / "secret").write_text(f"{text}\n")
    flags = ["--webhook-secret-file", f"{tmp_path}/secret"] if is_in_a_file else []
    relay = relaying("--webhook", receiver.url, *flags, **({} if is_in_a_file else {"JOBSTATUS_WEBHOOK_SECRET": text}))
    make()
    (received,) = receiver.wait_for(1)
    for secret in SECRETS:
        verified = standardwebhooks.Webhook(secret).verify(received.body, dict(received.headers))
        assert verified == received.job
        assert secret not in relay.said
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(SECRETS[0]).verify(received.body + b" ", dict(received.headers))


def test_without_a_secret_there_is_no_signature(relaying, receiver, make):
    relaying("--webhook", receiver.url)
    make()
    (received,) = receiver.wait_for(1)
    assert "webhook-signature" not in received.headers
    assert abs(int(received.headers["webhook-timestamp"]) - time.time()) < 60


@pytest.mark.parametrize("status", [0, 301, 400, 404, 410, 429, 500, 503])
def test_a_request_that_is_not_answered_with_2xx_is_sent_again_under_the_same_id(relaying, receiver, make, status):
    receiver.answer = lambda number, headers: (status if number < 3 else 200, {"Location": f"{receiver.url}/elsewhere"})
    relay = relaying("--webhook", receiver.url)
    make()
    receiver.wait_for(1)
    assert [each.status for each in receiver.received] == [status] * 3 + [200]
    assert len({each.id for each in receiver.received}) == 1
    assert {each.path for each in receiver.received} == {"/"}, "redirects are not followed"
    relay.wait_until_said("events are delivered again")
    assert relay.said.count("was not delivered") == 1


def test_a_receiver_that_is_too_slow_gets_the_event_again(relaying, receiver, make):
    def answer(number, headers):
        time.sleep(0 if number else 1)
        return 200, {}

    receiver.answer = answer
    relay = relaying("--webhook", receiver.url, "--delivery-timeout", "200ms")
    make()
    received = receiver.wait_until(lambda received: len(received) == 2)
    assert len({each.id for each in received}) == 1
    assert "no answer within 0.2 s" in relay.said


def test_a_receiver_of_https_must_have_a_certificate_that_is_trusted(relaying, make, tmp_path):
    authority, context = Authority(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue().write(tmp_path, "receiver"))
    with Receiver(context=context) as receiver:
        flags = ("--webhook", receiver.url, "--retry-for", "0s", "--concurrency", "1")
        relay = relaying(*flags)
        make()
        relay.wait_until_said("was given up")
        assert "certificate verify failed" in relay.dead_letters[0]["error"]
        relay.stop()
        relaying(*flags, SSL_CERT_FILE=authority.write(tmp_path))
        job = make()
        assert [each.job["id"] for each in receiver.wait_for(1)] == [job.id]


def test_what_a_receiver_that_is_away_does_not_get_is_a_dead_letter(relaying, make):
    with Receiver() as gone:
        pass
    relay = relaying("--webhook", gone.url, "--retry-for", "0s")
    make()
    relay.wait_until_said("was given up")
    assert "Connection refused" in relay.dead_letters[0]["error"]


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 64])
def test_a_host_that_is_not_there_does_not_end_the_relay(relaying, make, host):
    relay = relaying("--webhook", f"http://{host}/", "--retry-for", "0s")
    make()
    relay.wait_until_said("was given up")
    assert relay.dead_letters[0]["error"].startswith("the request failed: ")
    assert relay.stop() == 0


def test_no_request_is_sent_before_the_time_that_the_receiver_asked_for(relaying, receiver, make):
    receiver.answer = lambda number, headers: (200, {}) if number else (429, {"Retry-After": "2"})
    relaying("--webhook", receiver.url, "--concurrency", "1")
    jobs = [make() for _ in range(5)]
    first, *rest = receiver.wait_until(lambda received: len(received) == len(jobs) + 1)
    assert min(each.at for each in rest) - first.at >= 1.9
    assert {each.job["id"] for each in rest} == {job.id for job in jobs}


def test_a_pause_that_cannot_be_read_does_not_end_the_relay(relaying, receiver, make):
    pause = "Thu, 01 Jan 2026 00:00:00 +9999999999900"
    receiver.answer = lambda number, headers: (200, {}) if number else (503, {"Retry-After": pause})
    relaying("--webhook", receiver.url)
    job = make()
    assert receiver.wait_for(1)[0].job["id"] == job.id


def test_what_a_receiver_says_cannot_write_to_a_terminal():
    assert str(DeliveryError("the answer was 500 \x1b[2Jred\r\n")) == "the answer was 500  [2Jred"


def test_an_event_that_fails_holds_up_no_other(relaying, receiver, service, make):
    bad = make("IN_PROGRESS")
    receiver.answer = lambda number, headers: (500 if headers["ce-subject"] == bad.id else 200, {})
    relay = relaying("--webhook", receiver.url, "--retry-for", "3s", "--concurrency", "1")
    service.update(bad.id, state="JOB_STATE_FAILED")
    receiver.wait_until(lambda received: bool(received))
    good = [make() for _ in range(20)]
    assert {each.job["id"] for each in receiver.wait_for(20)} == {job.id for job in good}
    assert relay.dead_letters == []
    relay.wait_until_said("was given up")
    assert [letter["event"]["subject"] for letter in relay.dead_letters] == [bad.id]


def test_a_dead_letter_has_the_event_and_the_error_and_is_for_its_owner_only(relaying, receiver, make):
    receiver.answer = lambda number, headers: (500, {})
    relay = relaying("--webhook", f"{receiver.url}/secret-path", "--retry-for", "100ms")
    job = make("ABORTED")
    relay.wait_until_said("was given up")
    (letter,) = relay.dead_letters
    assert letter["error"] == "the answer was 500 Internal Server Error"
    assert letter["event"]["id"] == receiver.received[0].id
    assert letter["event"]["data"] == receiver.received[0].job
    assert letter["event"]["subject"] == job.id
    assert relay.dead_letter_file.stat().st_mode & 0o777 == 0o600
    assert "secret-path" not in relay.said
    assert "secret-path" not in relay.dead_letter_file.read_text()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--webhook", "ftp://a"], "must begin with https://"),
        (["--webhook", "https://"], "must begin with https://"),
        (["--webhook", "https://me:pw@a"], "must not have a user or a password"),
        (["--webhook", "https://a/b c"], "must not have a #, spaces"),
        (["--webhook", "https://a:x"], "--webhook: the URL"),
        (["--webhook", "https://a", "--slack", "https://b"], "Give one of --webhook, --slack and --exec"),
        ([], "Give one of --webhook, --slack and --exec"),
        (["--webhook", "https://a", "--not-done"], "No job that has ended matches"),
        (["--webhook", "https://a", "--on", "middle"], "--on"),
        (["--webhook", "https://a", "--source", "a b"], "must be a URI"),
        (["--webhook", "https://a", "--webhook-secret-file", "/etc/hostname"], "/etc/hostname: secret 1"),
        (["--webhook", "https://a", "--webhook-file", "/etc/hostname"], "Give one of --webhook and --webhook-file"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_done(refused, tmp_path, flags, text):
    code, said = refused(*flags)
    assert (code, said.count("\n")) == (2, 1)
    assert text in said
    assert not (tmp_path / "relay.state").exists()


def test_a_url_may_be_in_a_file(relaying, receiver, make, tmp_path):
    (tmp_path / "url").write_text(f"{receiver.url}/x\n")
    relaying("--webhook-file", f"{tmp_path}/url")
    make()
    assert receiver.wait_for(1)[0].path == "/x"


@pytest.mark.parametrize("text", ["", "whsec_", "whsec_é", "AAA", "c2hvcnQ=", f"whsec_{'A' * 88}", f"{SECRETS[0]} x"])
def test_a_bad_secret_is_refused_without_being_shown(text):
    with pytest.raises(ValueError, match=r"^(there is no secret|secret \d .*)$") as caught:
        read_secrets(text)
    assert not text or text not in f"{caught.value}".replace("whsec_ and", "")


def test_a_pause_may_be_given_in_seconds_or_as_a_date():
    in_a_minute = datetime.now(timezone.utc) + timedelta(minutes=1)
    assert _seconds_of("7") == 7
    assert 50 < _seconds_of(format_datetime(in_a_minute, usegmt=True)) <= 60
    assert [_seconds_of(text) for text in ("", "-1", "soon", "Wed, 21 Oct 2015 07:28:00 GMT")] == [0, 0, 0, 0]
    assert _seconds_of("9" * 30) == 3600


@on_a_loop
async def test_a_request_that_is_given_up_before_it_is_connected_is_not_sent(receiver, monkeypatch):
    resolve, is_free = socket.getaddrinfo, threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **how: is_free.wait(20) and resolve(*where, **how))
    now = datetime.now(timezone.utc)
    job = Job(id="a", state=JobState.PENDING, revision=1, created_at=now, updated_at=now)
    with pytest.raises(DeliveryError, match="no answer within"):
        await Webhook(receiver.url, timeout_seconds=0.1).deliver(Event(id="e", source="/", job=job, data={}))
    is_free.set()
    for thread in threading.enumerate():
        if thread.name == "delivery":
            await asyncio.to_thread(thread.join)
    assert receiver.received == []
