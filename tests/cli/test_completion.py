"""`jobstatus completion`: what a shell offers."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.pseudo_terminal import PseudoTerminal

SCRIPTS = Path(sys.executable).parent
SHELLS = ("bash", "zsh", "fish")


@pytest.fixture
def offered(here):
    """What is offered for the last of these words, by the way that the script of fish asks."""

    def offer(*words: str, by=here) -> list[str]:
        variables = {
            "_JOBSTATUS_COMPLETE": "fish_complete",
            "COMP_WORDS": " ".join(["jobstatus", *words]),
            "COMP_CWORD": words[-1],
        }
        done = by(env=variables)
        assert (done.returncode, done.stderr) == (0, "")
        lines = [line.partition(",")[2].split("\t")[0] for line in done.stdout.splitlines()]
        return [line for line in lines if line]

    return offer


@pytest.fixture
def bash(cli):
    """An interactive bash that completes."""
    environment = {
        **cli.environment, "PS1": "> ", "HISTFILE": "/dev/null", "PATH": f"{SCRIPTS}:{os.environ['PATH']}"
    }  # fmt: skip
    with PseudoTerminal(["bash", "--norc", "--noprofile", "-i"], environment=environment) as opened:
        opened.type("bind 'set enable-bracketed-paste off'; eval \"$(jobstatus completion bash)\"; echo re''ady\n")
        opened.read_until("ready")
        yield opened


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_asks_us(here, shell):
    done = here("completion", shell)
    assert f"_JOBSTATUS_COMPLETE={shell}_complete" in done.stdout
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["li"], ["list"]),
        (["completion", "f"], ["fish"]),
        (["list", "--sta"], ["--state", "--stalled"]),
        (["list", "--state", "f"], ["failed"]),
        (["update", "x", "--state", "re"], ["retrying"]),
        (["create", "--state", ""], ["pending", "in_progress"]),
    ],
)
def test_commands_and_flags_and_states_are_offered(offered, words, expected):
    assert offered(*words) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["get"],
        ["update"],
        ["cancel"],
        ["delete"],
        ["watch"],
        ["wait", "x"],
        ["history"],
        ["list", "--id"],
        ["create", "--parent"],
    ],
)
def test_ids_are_offered_by_how_they_begin(offered, service, new_id, words):
    prefix = f"offered-{new_id()}-"
    ids = [service.create(id=f"{prefix}{number}").id for number in range(3)]
    assert offered(*words, prefix) == ids[::-1]


def test_the_newest_50_are_offered(offered, service, new_id):
    prefix = f"many-{new_id()}-"
    ids = [service.create(id=f"{prefix}{number}").id for number in range(51)]
    assert offered("get", prefix) == ids[:0:-1]


def test_nothing_is_offered_where_no_server_is(offered, offline):
    assert offered("get", "x", by=offline) == []


def test_the_server_that_is_named_is_asked(offered, offline, here, service, new_id):
    job_id = service.create(id=f"named-{new_id()}").id
    assert offered("get", "--address", here.address, job_id, by=offline) == [job_id]


def test_tab_completes_in_bash(bash, service, new_id):
    job_id = service.create(id=f"tab-{new_id()}", name="found").id
    bash.type(f"jobsta\thist\t{job_id[:-1]}\t\n")
    bash.read_until("pending")


SET_UP = {
    "zsh": "autoload -Uz compinit; compinit -u -D; eval \"$(jobstatus completion zsh)\"; PS1='> '; echo re''ady\n",
    "fish": "jobstatus completion fish | source; echo re''ady\n",
}


@pytest.fixture(params=SET_UP)
def other_shell(request, cli, tmp_path):
    """An interactive zsh or fish that completes."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    environment = {
        **cli.environment, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path),
        "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
    }  # fmt: skip
    flags = {"zsh": ["-f", "-i"], "fish": ["--no-config", "-i"]}[request.param]
    with PseudoTerminal([request.param, *flags], environment=environment) as opened:
        opened.type(SET_UP[request.param])
        opened.read_until("ready")
        yield opened


@pytest.mark.parametrize("flag", ["--state ", "--state="])
def test_tab_completes_in_other_shells(other_shell, service, new_id, flag):
    job_id = service.create(id=f"tab:{new_id()}:z").id
    other_shell.type(f"jobstatus list {flag}pend\t --json --id {job_id[:-1]}\t\n")
    other_shell.read_until(f'"id": "{job_id}"')


def test_names_are_shown_whole(other_shell, service, new_id):
    prefix = f"two:{new_id()}:"
    for number in range(2):
        service.create(id=f"{prefix}{number}", name=f"name {number}, with a comma")
    other_shell.type(f"jobstatus get {prefix}\t")
    other_shell.read_until("name 1, with a comma")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_a_value_is_offered_with_its_flag(here, shell):
    words = ["list", "--state=f"]
    cword = {"zsh": "2", "fish": words[-1]}[shell]
    variables = {"_JOBSTATUS_COMPLETE": f"{shell}_complete", "COMP_WORDS": " ".join(["jobstatus", *words])}
    assert "--state=failed" in here(env={**variables, "COMP_CWORD": cword}).stdout


def test_tab_completes_words_that_bash_breaks(bash, service, new_id):
    job_id = service.create(id=f"tab:{new_id()}:z", name="found").id
    bash.type(f"jobstatus get --address {service.address} {job_id[:-1]}\t\n")
    bash.read_until("name       found")
    bash.type(f"jobstatus list --id={job_id[:-1]}\t --state=pend\t\n")
    bash.read_until("found")
