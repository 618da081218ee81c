"""The description of `/v1/jobs…` in OpenAPI 3.1, made from the tables of the vocabularies and the filters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, TypeAlias, get_type_hints

from jobstatus_grpc.job import limits
from jobstatus_grpc.web.http import PROBLEM_TYPE
from jobstatus_grpc.web.jobs import EVENT_STREAM, FILTERS, JSON, MAX_WAIT_SECONDS, MERGE_PATCH, REPEATED, UNREACHABLE
from jobstatus_grpc.web.vocabulary import TAG_HASH_DIGITS, VOCABULARIES, Vocabulary

Schema: TypeAlias = "dict[str, Any]"

_TIME: Schema = {"type": "string", "format": "date-time"}

_ID: Schema = {"type": "string", "pattern": f"^[A-Za-z0-9._:-]{{1,{limits.MAX_ID_BYTES}}}$"}

_TYPES: Mapping[type, Schema] = {str: {"type": "string"}, bool: {"type": "boolean"}, float: {"type": "number"}}

_FIELDS: Mapping[str, Schema] = {
    "id": _ID,
    "progress": {"type": "number", "minimum": 0, "maximum": 100},
    "createdAt": _TIME,
    "updatedAt": {**_TIME, "description": "Absent until the job changes."},
    "estimatedCompletion": _TIME,
}

_ERRORS = {
    400: "The request is not valid; `violations` name the fields.",
    401: "No valid token.",
    403: "The role, or the origin of the page, does not allow it.",
    404: "No such job, or it was deleted or has expired.",
    406: "No such profile in the Accept header.",
    408: "The body did not arrive in time.",
    409: "The job's state does not allow it, or the id is taken.",
    412: "If-Match names another revision.",
    413: "The body is too large.",
    415: "Not a content type that is taken.",
    421: "The host is not this server.",
    429: "Over a limit; retry after the time in Retry-After.",
    500: "A bug in the server; its log has the details.",
    503: "Retry after the time in Retry-After.",
}

_PARAMETERS: Mapping[str, Schema] = {
    "id": {"in": "path", "required": True, "schema": _ID},
    "vocabulary": {
        "in": "query",
        "description": "The form of jobs; also as a profile in the Accept header: `application/json; profile=content`.",
        "schema": {"type": "string", "enum": list(VOCABULARIES), "default": next(iter(VOCABULARIES))},
    },
    "attempt": {
        "in": "query",
        "description": "The attempt that writes; with the state of a worker that begins, the one that it claims.",
        "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
    },
    "pageSize": {
        "in": "query",
        "description": f"0: 50 jobs. Above {limits.MAX_PAGE_SIZE}: {limits.MAX_PAGE_SIZE}.",
        "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
    },
    "pageToken": {"in": "query", "description": "From the Link of the page before.", "schema": {"type": "string"}},
    "If-Match": {
        "in": "header",
        "description": (
            'Write only this revision of the job: the ETag that it was received with, the revision (`"7"`), or `*`.'
        ),
        "schema": {"type": "string", "pattern": rf'^(\*|"[0-9]{{1,18}}(-[0-9a-f]{{{TAG_HASH_DIGITS}}})?")$'},
    },
    "If-None-Match": {
        "in": "header",
        "description": "ETags that are known: 304 if the job still has one of them.",
        "schema": {"type": "string"},
    },
    "Prefer": {
        "in": "header",
        "description": f"`wait=N`: before a 304 wait N seconds, at most {MAX_WAIT_SECONDS}, for a change.",
        "schema": {"type": "string"},
    },
    "Idempotency-Key": {
        "in": "header",
        "description": f"1 to {limits.MAX_REQUEST_ID_BYTES} characters: a retry with the same has no second effect.",
        "schema": {"type": "string", "minLength": 1, "maxLength": limits.MAX_REQUEST_ID_BYTES},
    },
    "Last-Event-ID": {
        "in": "header",
        "description": "The id of the last event that was received: the stream continues after it.",
        "schema": {"type": "string"},
    },
}

_JOBS = (
    f"Jobs. {UNREACHABLE} has the ids, separated by commas, of those that are left out because what is stored of them "
    "is damaged: `?` where the id is not known either, `...` where there are more."
)

_FILTER_DESCRIPTIONS = {
    "state": "A word of the vocabulary.",
    "label": "`KEY=VALUE`; all must match.",
    "namePrefix": "The beginning of the name.",
    "createdAfter": "The first instant that counts.",
    "createdBefore": "The first instant that does not.",
    "done": "Whether the job has ended.",
    "stalled": "Whether its worker is silent.",
}


def document() -> Schema:
    """Return the description."""
    job = {"anyOf": [_ref(f"{each.document.__name__}") for each in VOCABULARIES.values()]}
    written = {"anyOf": [_ref(f"{each.document.__name__}Fields") for each in VOCABULARIES.values()]}
    in_path, vocabulary = _parameter("id"), _parameter("vocabulary")
    jobs = {"type": "array", "items": job}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "jobstatus",
            "version": version("jobstatus-grpc"),
            "description": "Jobs as plain JSON, in the form of a task API or of a content queue.",
        },
        "security": [{}, {"token": []}, {"login": []}],
        "paths": {
            "/v1/jobs": {
                "get": _operation(
                    "listJobs",
                    "A page of jobs, the newest first; `Link` with rel=next leads to the next.",
                    [vocabulary, *_filters(), _parameter("pageSize"), _parameter("pageToken")],
                    {200: _reply(_JOBS, jobs, "Link", UNREACHABLE)},
                ),
                "post": _operation(
                    "createJob",
                    "Create a job.",
                    [vocabulary, _parameter("Idempotency-Key")],
                    {201: _reply("The job.", job, "ETag", "Location")},
                    body=_body(written, JSON),
                ),
            },
            "/v1/jobs/events": {
                "get": _operation(
                    "watchJobs",
                    "Events of all jobs that match: snapshots, `synced`, then changes. It has no end.",
                    [vocabulary, *_filters(), _parameter("Last-Event-ID")],
                    {200: _events()},
                )
            },
            "/v1/jobs/{id}": {
                "get": _operation(
                    "getJob",
                    "A job.",
                    [in_path, vocabulary, _parameter("If-None-Match"), _parameter("Prefer")],
                    {200: _reply("The job.", job, "ETag"), 304: {"description": "The job has not changed."}},
                ),
                "patch": _operation(
                    "updateJob",
                    "Write the fields that the body has; null clears one. name, which only a creation sets, createdAt "
                    "and updatedAt are ignored: a document that was read can be sent back.",
                    [in_path, vocabulary, *map(_parameter, ("attempt", "If-Match", "Idempotency-Key"))],
                    {200: _reply("The job.", job, "ETag")},
                    body=_body(written, JSON, MERGE_PATCH),
                ),
                "delete": _operation(
                    "deleteJob",
                    "Delete a job that has ended.",
                    [in_path, vocabulary, _parameter("If-Match")],
                    {204: {"description": "It is deleted."}},
                ),
            },
            "/v1/jobs/{id}:cancel": {
                "post": _operation(
                    "cancelJob",
                    "Ask for the end of a job: one that no worker is on ends at once.",
                    [in_path, vocabulary, _ANY_REVISION, _parameter("Idempotency-Key")],
                    {200: _reply("The job.", job, "ETag")},
                    body={"content": {JSON: {"schema": _CANCEL}}},
                )
            },
            "/v1/jobs/{id}/events": {
                "get": _operation(
                    "watchJob",
                    "Events of a job until its end.",
                    [in_path, vocabulary, _parameter("Last-Event-ID")],
                    {200: _events(), 204: {"description": "The end was received already: do not reconnect."}},
                )
            },
        },
        "components": {
            "schemas": {**_schemas(VOCABULARIES.values()), "Problem": _PROBLEM},
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "login": {"type": "apiKey", "in": "cookie", "name": "jobstatus"},
            },
        },
    }


_ANY_REVISION: Schema = {
    "name": "If-Match",
    "in": "header",
    "description": "Only `*`: a cancellation is of the job as it is, at any revision.",
    "schema": {"type": "string", "const": "*"},
}

_CANCEL: Schema = {
    "type": "object",
    "properties": {
        "reason": {"type": ["string", "null"]},
        "cascade": {
            "type": ["boolean", "null"],
            "description": "Ask for the end of its children as well, of their children, and so on.",
        },
    },
    "additionalProperties": False,
}

_PROBLEM: Schema = {
    "type": "object",
    "description": "An error (RFC 9457).",
    "required": ["title", "status", "detail"],
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What went wrong and what to do."},
        "reason": {"type": "string", "description": "For machines: that of the gRPC API, such as JOB_NOT_FOUND."},
        "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
        "violations": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "description"],
                "properties": {"field": {"type": "string"}, "description": {"type": "string"}},
            },
        },
    },
}


def _schemas(vocabularies: Iterable[Vocabulary]) -> dict[str, Schema]:
    """Return the documents of each vocabulary, and those of its requests: no field is required, and null clears."""
    schemas = {}
    for vocabulary in vocabularies:
        document: Any = vocabulary.document
        fields = {name: _field(vocabulary, name, kind) for name, kind in get_type_hints(document).items()}
        schemas[document.__name__] = {
            "type": "object",
            "required": sorted(document.__required_keys__),
            "properties": fields,
            "additionalProperties": False,
        }
        written = {**fields, "id": {**_ID, "pattern": _ID["pattern"].replace("{1,", "{0,")}}
        schemas[f"{document.__name__}Fields"] = {
            "type": "object",
            "properties": {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in written.items()},
            "additionalProperties": False,
        }
    return schemas


def _field(vocabulary: Vocabulary, name: str, kind: type) -> Schema:
    if name == vocabulary.state_field:
        return {"type": "string", "enum": list(dict.fromkeys(vocabulary.words.values()))}
    return _FIELDS.get(name, _TYPES[kind])


def _filters() -> list[Schema]:
    return [
        {
            "name": name,
            "in": "query",
            "description": _FILTER_DESCRIPTIONS.get(name, "One of these." if name in REPEATED else "This one."),
            "schema": {"type": "array", "items": _filter_schema(name)} if name in REPEATED else _filter_schema(name),
        }
        for name in FILTERS
    ]


def _filter_schema(name: str) -> Schema:
    if name in ("done", "stalled"):
        return {"type": "boolean"}
    if name in ("createdAfter", "createdBefore"):
        return _TIME
    if name == "label":
        return {"type": "string", "pattern": "^[^=]+=.*$"}
    if name == "state":
        words = (word for each in VOCABULARIES.values() for word in each.words.values())
        return {"type": "string", "enum": list(dict.fromkeys(words))}
    if name in ("id", "parentId"):
        return _ID
    return {"type": "string", "minLength": int(name == "namePrefix")}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _parameter(name: str) -> Schema:
    return {"name": name, **_PARAMETERS[name]}


def _operation(
    name: str, summary: str, parameters: list[Schema], replies: Mapping[int, Schema], *, body: Schema | None = None
) -> Schema:
    problem = {PROBLEM_TYPE: {"schema": _ref("Problem")}}
    errors = {code: {"description": text, "content": problem} for code, text in _ERRORS.items()}
    return {
        "operationId": name,
        "summary": summary,
        "parameters": parameters,
        **({} if body is None else {"requestBody": body}),
        "responses": {str(code): reply for code, reply in {**replies, **errors}.items()},
    }


def _body(schema: Schema, *types: str) -> Schema:
    return {"required": True, "content": {each: {"schema": schema} for each in types}}


def _reply(description: str, schema: Schema, *headers: str) -> Schema:
    return {
        "description": description,
        "headers": {name: {"schema": {"type": "string"}} for name in headers},
        "content": {JSON: {"schema": schema}},
    }


def _events() -> Schema:
    text = (
        "Server-sent events: `snapshot`, `updated` and `removed` with a job, `synced` and `reset` with `{}`, `problem`."
    )
    return {"description": text, "content": {EVENT_STREAM: {"schema": {"type": "string"}}}}
