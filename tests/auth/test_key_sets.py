"""Keys of a URL: when they are read, and what stays when they cannot be."""

from __future__ import annotations

import asyncio
import gc
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobstatus_grpc.auth.key_sets import (
    REFRESH_SECONDS,
    RETRY_SECONDS,
    UNKNOWN_KEY_SECONDS,
    KeySource,
    UrlKeySet,
)
from jobstatus_grpc.errors import IdentityUnavailableError
from tests.support.issuer import JwksServer, jwk_of, jwks_of
from tests.support.timing import Clock

ONE, TWO = jwks_of(jwk_of("ed25519", "1")), jwks_of(jwk_of("ed25519", "2"))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def no_exceptions_from_proxies(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def issuer():
    with JwksServer(ONE) as server:
        yield server


@pytest.fixture
def run(issuer, clock):
    """Run a scenario with the keys of the issuer's URL; it finds them by kid."""

    def run(scenario, **source):
        async def main():
            keys = UrlKeySet(KeySource(url=issuer.url, **source), seconds=clock)

            async def find(kid):
                return [key.kid for key in await keys.find(kid, "EdDSA")]

            return await scenario(find)

        return asyncio.run(main())

    return run


async def refused(find):
    with pytest.raises(IdentityUnavailableError, match="cannot be read now"):
        await find("1")


def test_the_keys_are_read_once_for_many_calls(run, issuer):
    async def scenario(find):
        return await asyncio.gather(*(find("1") for _ in range(50))), await find("1")

    assert run(scenario) == ([["1"]] * 50, ["1"])
    assert len(issuer.requests) == 1


def test_an_unknown_key_is_looked_for_once_a_minute(run, issuer, clock):
    async def scenario(find):
        await find("1")
        issuer.body = TWO
        before = [await find("2"), await find("2"), await find("1")]
        clock.seconds += UNKNOWN_KEY_SECONDS
        return before, await asyncio.gather(find("2"), find("2")), await find("1")

    assert run(scenario) == ([[], [], ["1"]], [["2"], ["2"]], [])
    assert len(issuer.requests) == 2


@pytest.mark.parametrize(("status", "body"), [(500, ONE), (200, "nonsense"), (200, "x" * 2_000_000), (302, ONE)])
def test_the_last_good_keys_stay_while_the_issuer_is_away(run, issuer, clock, caplog, status, body):
    async def scenario(find):
        await find("1")
        issuer.status, issuer.body, issuer.location = status, body, "http://127.0.0.1:9/"
        for _ in range(3):
            clock.seconds += UNKNOWN_KEY_SECONDS
            assert await find("2") == []
        assert await find("1") == ["1"]
        issuer.status, issuer.body = 200, TWO
        clock.seconds += UNKNOWN_KEY_SECONDS
        return await find("2")

    assert run(scenario) == ["2"]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert f"the keys of {issuer.url} cannot be read" in errors[0]
    assert "the keys from before stay in use" in errors[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_keys_of_this_machine_are_read_without_a_proxy(issuer, monkeypatch, host):
    with JwksServer(TWO) as proxy:
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        (key,) = KeySource(url=issuer.url.replace("127.0.0.1", host)).fetch()
    assert (key.kid, proxy.requests) == ("1", [])


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_https_keys_are_read_through_the_proxy_of_the_environment(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy, ThreadPoolExecutor() as threads:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        fetch = threads.submit(KeySource(url="https://keys.example/jwks?key=K").fetch)
        with proxy.accept()[0] as connection:
            assert connection.recv(100).startswith(b"CONNECT keys.example:443 ")
        with pytest.raises(OSError):
            fetch.result()
    del fetch
    gc.collect()  # Python 3.11.2 leaves a socket that a proxy has closed to the collector


def test_the_log_has_the_url_without_its_query(issuer, caplog):
    issuer.status = 503
    keys = UrlKeySet(KeySource(url=f"{issuer.url}?key=secret"))
    with pytest.raises(IdentityUnavailableError):
        asyncio.run(keys.find("1", "EdDSA"))
    assert (f"the keys of {issuer.url} cannot be read" in caplog.text, "secret" in caplog.text) == (True, False)


def test_a_key_that_the_issuer_removes_is_refused_after_a_while(run, issuer, clock):
    async def scenario(find):
        await find("1")
        issuer.body = TWO
        clock.seconds += REFRESH_SECONDS
        assert await find("1") == ["1"]  # the keys are read beside this call
        while await find("1"):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        return await find("2")

    assert run(scenario) == ["2"]


def test_an_issuer_that_has_never_answered_is_unavailable_and_is_asked_again(run, issuer, clock):
    async def scenario(find):
        issuer.status = 503
        await refused(find)
        await refused(find)
        asked = len(issuer.requests)
        issuer.status = 200
        clock.seconds += RETRY_SECONDS
        return asked, await find("1")

    assert run(scenario) == (1, ["1"])


def test_the_url_gets_the_token_of_a_file_as_it_is_now(run, issuer, tmp_path, clock):
    path = tmp_path / "token"

    async def scenario(find):
        for text in ("one\n", "two\n"):
            path.write_text(text)
            await find(text)
            clock.seconds += UNKNOWN_KEY_SECONDS

    run(scenario, token_file=str(path))
    assert [request["Authorization"] for request in issuer.requests] == ["Bearer one", "Bearer two"]
