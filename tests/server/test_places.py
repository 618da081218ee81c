"""Places for open calls: what one caller gets, and what is left to others."""

from __future__ import annotations

import pytest

from jobstatus_grpc.server.places import Places, host_of


def taken(places, caller):
    """Take places until there is none; return how many."""
    before = places.taken_by(caller)
    while places.has(caller):
        places.take(caller)
    return places.taken_by(caller) - before


@pytest.mark.parametrize(("limit", "first", "second"), [(1, 1, 0), (2, 2, 0), (9, 8, 1), (1000, 889, 99)])
def test_a_caller_leaves_places_to_the_next(limit, first, second):
    places = Places(limit)
    assert [taken(places, "a"), taken(places, "b")] == [first, second]
    assert places.taken == first + second


def test_a_place_that_is_free_again_can_be_taken():
    places = Places(9)
    taken(places, "a")
    places.free("a")
    assert taken(places, "a") == 1


@pytest.mark.parametrize("peer", ["ipv4:10.0.0.1:50000", "ipv6:[::1]:50000", "unix:", "unix:7"])
def test_the_host_of_a_peer_has_no_port(peer):
    assert host_of(peer) == {"ipv4": "ipv4:10.0.0.1", "ipv6": "ipv6:[::1]", "unix": "unix"}[peer.partition(":")[0]]
