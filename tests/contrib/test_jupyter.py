"""A job in a notebook that is executed."""

from __future__ import annotations

import threading

import nbformat
import pytest
from nbclient import NotebookClient

from jobstatus_grpc import JobState, JobStatusClient
from jobstatus_grpc.contrib.jupyter import JobView
from tests.support.service import Service

CODE = """
from jobstatus_grpc import JobStatusClient
from jobstatus_grpc.contrib.jupyter import show

client = JobStatusClient({address!r})
client.update({id!r}, reason="shown")
job = show(client, {id!r})
job.state.name
"""


@pytest.mark.slow  # a kernel starts in five seconds
def test_a_cell_shows_a_job_until_its_end(service: Service, client: JobStatusClient):
    job = client.create("render <all>", state=JobState.IN_PROGRESS)

    def end_once_shown() -> None:
        for seen in client.watch(job.id):
            if seen.reason == "shown":
                client.update(job.id, progress=40, state=JobState.FAILED, error="no paper")

    ending = threading.Thread(target=end_once_shown)
    ending.start()
    code = CODE.format(address=service.address, id=job.id)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=50).execute()
    ending.join()
    shown, result = notebook.cells[0].outputs
    assert result.data["text/plain"] == "'FAILED'"
    assert "<b>render &lt;all&gt;</b>" in shown.data["text/html"]
    assert "failed 40 % no paper" in shown.data["text/html"]


def test_a_console_shows_a_line(client: JobStatusClient):
    job = client.create("render", state=JobState.IN_PROGRESS, progress=12.6, reason="page 3")
    assert repr(JobView(job)) == "render in_progress 13 % page 3"
