"""The HTTP gateway of the server (`serve --http`): its RPCs for browsers, curl and Connect clients, over HTTP/1.1.

    listener    connections: uvicorn in the server's event loop, TLS, time limits, drain
    site        every request: Host, Origin, CORS, login, security headers, routes
    jobs        jobs as plain JSON, `/v1/jobs…`: a request becomes a call of an RPC
    vocabulary  the task API's form of a job, and the content queue's
    openapi     the description of /v1/jobs…, made from the tables of these two
    gateway     RPCs in the Connect protocol and in gRPC-Web, made from the service's descriptors
    calls       the context of a call, as the server's methods take it, and what cuts a call off
    http        a request, its body within limits, and responses

It knows nothing of `server`, which passes it the methods that it gives its transports: callers, limits, log, metrics
and drain are those of gRPC. Imported only with --http: uvicorn comes with the extra `web`.
"""
