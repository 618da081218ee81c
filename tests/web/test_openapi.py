"""The description in OpenAPI is that of the server: schemathesis sends what it allows, and what it does not."""

from __future__ import annotations

import json

import hypothesis
import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

from jobstatus_grpc.web import openapi

SCHEMA = schemathesis.openapi.from_dict(openapi.document())

# A schema cannot say which body goes with which vocabulary of the query, nor which field may be null where.
LEFT_OUT = [positive_data_acceptance]


def test_the_server_serves_the_description(web):
    assert web.request("GET", "/openapi.json").json() == json.loads(json.dumps(openapi.document()))


# The streams of events have no end.
@SCHEMA.exclude(path_regex="/events$").parametrize()
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_the_server_answers_as_described(case, web):
    case.call_and_validate(base_url=web.url, excluded_checks=LEFT_OUT)
