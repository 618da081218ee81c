# docs/deployment.md says how to run it. The server is closed by default: it does not start without certificate and key
# in /etc/jobstatus/tls, and /etc/jobstatus/auth/auth.toml.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE CHANGELOG.md buf.yaml ./
COPY protos protos
COPY generated generated
COPY jobstatus_grpc jobstatus_grpc
RUN python -m venv /opt/jobstatus \
    && /opt/jobstatus/bin/pip install --no-cache-dir '.[native,postgres,security,uvloop,web]' \
    && /opt/jobstatus/bin/pip uninstall --yes pip \
    && /opt/jobstatus/bin/python -m compileall -q /opt/jobstatus/lib

FROM python:${PYTHON}-slim
RUN groupadd --system --gid 10001 jobstatus \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin jobstatus \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/jobstatus /run/jobstatus
COPY --from=build /opt/jobstatus /opt/jobstatus
# With a read-only root, only these two folders are written to: a volume, and a tmpfs for sockets and temporary files.
ENV PATH=/opt/jobstatus/bin:$PATH PYTHONDONTWRITEBYTECODE=1 TMPDIR=/run/jobstatus
USER 10001:10001
VOLUME /var/lib/jobstatus
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --start-interval=2s \
    CMD ["jobstatus", "health", "--address", "unix:/run/jobstatus/socket"]
ENTRYPOINT ["jobstatus"]
CMD ["serve", "--listen", "0.0.0.0:50051", "--listen", "unix:/run/jobstatus/socket", \
    "--store", "sqlite:////var/lib/jobstatus/jobs.db", \
    "--auth", "/etc/jobstatus/auth/auth.toml", \
    "--tls-cert", "/etc/jobstatus/tls/tls.crt", "--tls-key", "/etc/jobstatus/tls/tls.key"]
