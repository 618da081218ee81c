"""`jobstatus profile`, and the server that commands call with a profile."""

from __future__ import annotations

import os
import shlex
import stat
import sys
import time

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.cli.target import DEFAULT_TIMEOUT
from tests.support.scripted_server import ScriptedServer, reply

CALLER = reply(pb.GetCallerIdentityResponse(identity=pb.CallerIdentity(principal="ci", role=pb.Role.ROLE_WORKER)))


@pytest.fixture
def config(tmp_path):
    return tmp_path / "config" / "config.toml"


@pytest.fixture
def run(run_here, config):
    """`jobstatus` with this file of profiles, and no variable that names a server."""
    command = run_here("")
    command.environment["JOBSTATUS_CONFIG"] = str(config)
    return command


@pytest.fixture
def server():
    with ScriptedServer(GetCallerIdentity=[CALLER]) as server:
        yield server


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("from-file\n")
    return str(path)


def write(config, text):
    config.parent.mkdir(exist_ok=True)
    config.write_text(text)


def sent(server):
    """The credentials of the last call."""
    return server.metadata[-1].get("authorization", "").removeprefix("Bearer ")


def good(done):
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refusal(done):
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    return done.stderr


def test_a_command_calls_the_server_of_its_profile(run, server, token_file):
    run("profile", "set", "prod", "--address", server.address, "--token-file", token_file, "--tenant", "web")
    good(run("whoami", "--profile", "prod"))
    good(run("whoami", env={"JOBSTATUS_PROFILE": "prod"}))
    assert [(call["authorization"], call["x-jobstatus-tenant"]) for call in server.metadata] == [
        ("Bearer from-file", "web")
    ] * 2


def test_the_current_profile_is_used_if_no_address_is_given(run, server, token_file):
    run("profile", "set", "prod", "--address", server.address, "--token-file", token_file)
    good(run("profile", "use", "prod"))
    good(run("whoami"))
    assert sent(server) == "from-file"


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_another_address_never_gets_the_token_of_a_profile(run, server, config, by):
    write(config, 'current = "prod"\n[profiles.prod]\naddress = "127.0.0.1:9"\ntoken = "secret"\n')
    flags = ["--address", server.address] if by == "flag" else []
    env = {"JOBSTATUS_ADDRESS": server.address if by == "variable" else ""}
    good(run("whoami", *flags, env=env))
    assert sent(server) == ""
    assert "credentials are for 127.0.0.1:9" in refusal(run("whoami", "--profile", "prod", *flags, env=env))


def test_the_address_of_the_profile_may_be_given_too(run, server, config):
    write(config, f'[profiles.prod]\naddress = "{server.address}"\ntoken = "secret"\n')
    good(run("whoami", "--profile", "prod", "--address", server.address))
    assert sent(server) == "secret"


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        (["--token", "flag"], {"JOBSTATUS_TOKEN": "variable"}, "flag"),
        (["--token", "flag"], {"JOBSTATUS_TOKEN_FILE": __file__}, "flag"),
        (["--token-command", "echo flag"], {"JOBSTATUS_TOKEN": "variable"}, "flag"),
        ([], {"JOBSTATUS_TOKEN": "variable"}, "variable"),
        ([], {"JOBSTATUS_TOKEN_COMMAND": "echo variable"}, "variable"),
        ([], {}, "profile"),
    ],
)
@pytest.mark.parametrize("kind", ['token = "profile"', 'token_command = ["echo", "profile"]'])
def test_a_flag_wins_over_a_variable_and_that_over_the_profile(run, server, config, flags, env, expected, kind):
    write(config, f'[profiles.prod]\naddress = "{server.address}"\n{kind}\n')
    good(run("whoami", "--profile", "prod", *flags, env=env))
    assert sent(server) == expected


@pytest.mark.parametrize(("name", "value"), [("TOKEN", "s"), ("TOKEN_FILE", __file__), ("TOKEN_COMMAND", "echo s")])
def test_another_address_never_gets_the_token_of_the_variables(run, server, name, value):
    env = {"JOBSTATUS_ADDRESS": "grpcs://prod", f"JOBSTATUS_{name}": value}
    done = run("whoami", "--address", server.address, env=env)
    line = f"jobstatus: not used for {server.address}: JOBSTATUS_{name}, for the server of JOBSTATUS_ADDRESS; "
    assert (done.returncode, sent(server)) == (0, "")
    assert done.stderr == f"{line}give the flags, such as --token-file\n"


def test_another_address_gets_neither_the_certificate_nor_plain_tokens_by_the_variables(run, server):
    env = {f"JOBSTATUS_{name}": __file__ for name in ("CERT", "KEY")}
    env |= {"JOBSTATUS_ADDRESS": "grpcs://prod", "JOBSTATUS_INSECURE": "1"}
    done = run("whoami", "--address", server.address, env=env)
    assert (done.returncode, ": JOBSTATUS_CERT, JOBSTATUS_KEY, JOBSTATUS_INSECURE, for" in done.stderr) == (0, True)
    done = run("whoami", "--address", "jobs.invalid:1", "--token", "x", "--timeout", "1s", env=env)
    assert (done.returncode, "without encryption" in done.stderr) == (2, True)


@pytest.mark.parametrize("address", ["", "{}"])
def test_the_token_of_the_variables_is_for_the_address_of_the_variables_or_any(run, server, address):
    env = {"JOBSTATUS_ADDRESS": address.format(server.address), "JOBSTATUS_TOKEN": "variable"}
    good(run("whoami", "--address", server.address, env=env))
    assert sent(server) == "variable"


def test_a_token_by_a_flag_is_for_the_address_by_a_flag(run, server):
    env = {"JOBSTATUS_ADDRESS": "grpcs://prod", "JOBSTATUS_TOKEN_FILE": __file__}
    good(run("whoami", "--address", server.address, "--token", "flag", env=env))
    assert sent(server) == "flag"


def test_the_token_of_the_profile_takes_the_place_of_one_for_another_address(run, server, config):
    write(config, f'[profiles.a]\naddress = "{server.address}"\ntoken = "profile"\n')
    env = {"JOBSTATUS_ADDRESS": "grpcs://prod", "JOBSTATUS_TOKEN": "variable"}
    assert run("whoami", "--profile", "a", "--address", server.address, env=env).returncode == 0
    assert sent(server) == "profile"


def test_the_command_of_run_has_no_token_for_another_address(run, server):
    env = {"JOBSTATUS_ADDRESS": "grpcs://prod", "JOBSTATUS_TOKEN": "variable"}
    done = run("run", "--address", server.address, "--", "sh", "-c", "echo ${JOBSTATUS_TOKEN-none}", env=env)
    assert done.stdout == "none\n"


def test_a_profile_may_have_a_timeout(run, config):
    write(config, '[profiles.prod]\naddress = "127.0.0.1:9"\ntimeout = "100ms"\n')
    begin = time.monotonic()
    assert run("whoami", "--profile", "prod").returncode == 4
    assert time.monotonic() - begin < DEFAULT_TIMEOUT.total_seconds() / 2


def test_two_tokens_are_refused(run, token_file):
    done = run("whoami", "--token", "a", "--token-file", token_file)
    assert "give one of the token, the token file and the token command" in refusal(done)


def test_a_token_command_that_fails_is_one_line(run, config):
    write(config, '[profiles.prod]\naddress = "127.0.0.1:9"\ntoken_command = "sh -c \'echo locked >&2; exit 7\'"\n')
    assert "the token command sh ended with exit code 7: locked" in refusal(run("whoami", "--profile", "prod"))


def test_without_need_no_token_command_runs(run, server, config, tmp_path):
    command = shlex.join(["touch", str(tmp_path / "ran")])
    write(config, f'[profiles.prod]\naddress = "{server.address}"\ntoken_command = {command!r}\n')
    good(run("whoami", "--profile", "prod", "--token", "x"))
    good(run("profile", "show", "prod"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[profiles.prod]\naddres = "a:1"\n', "line 2: profiles.prod.addres: there is no such setting; did you mean"),
        ('[profiles.prod]\ntenant = "a"\n', "profiles.prod: address missing"),
        ('[profiles.prod]\naddress = "nowhere"\n', "line 2: profiles.prod.address: 'nowhere' is not an address"),
        ('[profiles.prod]\naddress = "a:1"\ntimeout = "soon"\n', "line 3: profiles.prod.timeout: 'soon'"),
        ('[profiles.prod]\naddress = "a:1"\ntoken = "secret"\ntoken_file = "t"\n', "line 4: profiles.prod.token_file"),
        ('[profiles.prod]\naddress = "a:1"\ncert = "c"\n', "cert and key go together"),
        ('[profile.prod]\naddress = "a:1"\n', "line 1: profile: there is no such setting; did you mean profiles?"),
        ('current = "prd"\n[profiles.prod]\naddress = "a:1"\n', "no profile 'prd'"),
        ("secret\n", "is not TOML"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_an_error_that_names_the_place(run, config, text, says):
    write(config, text)
    for command in (["whoami"], ["profile", "list"], ["profile", "set", "other", "--address", "a:1"]):
        message = refusal(run(*command))
        assert says in message
        assert '"secret"' not in message
    assert config.read_text() == text


def test_an_unknown_profile_is_an_error_with_the_nearest_name(run):
    assert "there are: none; make it with jobstatus profile set" in refusal(run("list", "--profile", "prod"))
    run("profile", "set", "prod", "--address", "a:1")
    for command in (["list", "--profile"], ["profile", "show"], ["profile", "use"], ["profile", "delete"]):
        assert "did you mean prod?" in refusal(run(*command, "prdo"))


def test_the_file_is_for_its_user_alone(run, config):
    run("profile", "set", "prod", "--address", "a:1", "--token", "secret")
    assert stat.S_IMODE(os.stat(config).st_mode) == 0o600
    config.chmod(0o644)
    run("profile", "set", "prod", "--tenant", "web")
    assert stat.S_IMODE(os.stat(config).st_mode) == 0o600
    assert [path.name for path in config.parent.iterdir()] == [config.name]


def test_show_prints_all_settings_but_no_secret(run, config):
    write(config, '[profiles.a]\naddress = "a:1"\ntoken = "secret"\ninsecure = true\ntimeout = "90s"\nca = "ca.pem"\n')
    assert dict(line.split(maxsplit=1) for line in good(run("profile", "show", "a")).splitlines()) == {
        "address": "a:1", "token": "(set, not shown)", "insecure": "true", "timeout": "90s",
        "ca": f"{config.parent}/ca.pem",
    }  # fmt: skip


def test_show_prints_no_command_which_may_hold_a_secret(run):
    run("profile", "set", "a", "--address", "a:1", "--token-command", "get --password secret")
    assert "secret" not in good(run("profile", "show", "a"))


def test_set_changes_what_is_given_and_list_and_delete_see_it(run):
    run("profile", "set", "prod", "--address", "a:1", "--tenant", "web")
    run("profile", "set", "dev", "--address", "b:1")
    run("profile", "set", "prod", "--timeout", "90s", "--server-name", 'q"uote')
    run("profile", "use", "prod")
    assert good(run("profile", "list")) == "* prod  a:1\n  dev   b:1\n"
    shown = good(run("profile", "show", "prod"))
    assert ['q"uote' in shown, "web" in shown, "90s" in shown] == [True] * 3
    good(run("profile", "delete", "prod"))
    assert good(run("profile", "list")) == "  dev  b:1\n"


def test_a_profile_that_moves_loses_its_token(run, config):
    run("profile", "set", "prod", "--address", "a:1", "--token", "secret")
    done = run("profile", "set", "prod", "--address", "b:1")
    assert "The token was for a:1 and is removed" in done.stderr
    assert "secret" not in config.read_text()


def test_a_new_token_takes_the_place_of_the_old_one(run, config, token_file):
    run("profile", "set", "prod", "--address", "a:1", "--token", "secret")
    run("profile", "set", "prod", "--token-file", token_file)
    assert "secret" not in config.read_text()
    assert token_file in config.read_text()


def test_comments_and_other_profiles_stay_as_they_are(run, config):
    others = '# of the team\n\n[profiles.a] # first\naddress = "a:1" # keep\n\n# about b\n'
    write(config, f'{others}[profiles.b]\naddress = "b:1"\n\n# about c\n[profiles.c]\naddress = "c:1"\n')
    run("profile", "set", "b", "--tenant", "web")
    run("profile", "use", "c")
    text = config.read_text()
    assert text.startswith(f'current = "c"\n\n{others}[profiles.b]\n')
    assert text.endswith('tenant = "web"\n\n# about c\n[profiles.c]\naddress = "c:1"\n')


def test_a_file_in_another_form_of_toml_is_not_changed(run, config):
    write(config, 'profiles = {a = {address = "a:1"}}\n')
    assert "edit it by hand" in refusal(run("profile", "set", "a", "--tenant", "web"))
    assert config.read_text() == 'profiles = {a = {address = "a:1"}}\n'


def test_a_file_that_is_a_link_stays_one(run, config, tmp_path):
    write(config, "")
    config.replace(tmp_path / "real.toml")
    config.symlink_to(tmp_path / "real.toml")
    run("profile", "set", "a", "--address", "a:1")
    assert config.is_symlink()
    assert "a:1" in (tmp_path / "real.toml").read_text()


def test_paths_are_kept_as_absolute_ones(run, config, token_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run("profile", "set", "a", "--address", "a:1", "--token-file", "token")
    assert f'token_file = "{token_file}"' in config.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prod"], "is new and needs --address"),
        (["a b", "--address", "a:1"], "is not a name"),
        (["prod", "--address", "a:1", "--token", "a", "--token-command", "b"], "Give one of --token, --token-file"),
        (["prod", "--address", "a:1", "--cert", __file__], "--cert and --key go together"),
    ],
)
def test_wrong_settings_write_nothing(run, config, arguments, says):
    assert says in refusal(run("profile", "set", *arguments))
    assert not config.exists()


def test_variables_are_not_kept_in_a_profile(run, config):
    run("profile", "set", "prod", "--address", "a:1", env={"JOBSTATUS_TOKEN": "secret", "JOBSTATUS_TENANT": "web"})
    assert config.read_text() == '[profiles.prod]\naddress = "a:1"\n'


def test_the_file_is_found_in_the_folders_of_xdg(run, tmp_path):
    del run.environment["JOBSTATUS_CONFIG"]
    run("profile", "set", "a", "--address", "a:1", env={"XDG_CONFIG_HOME": str(tmp_path / "x")})
    run("profile", "set", "a", "--address", "a:1", env={"HOME": str(tmp_path), "XDG_CONFIG_HOME": ""})
    assert (tmp_path / "x/jobstatus/config.toml").exists()
    assert (tmp_path / ".config/jobstatus/config.toml").exists()


def test_a_user_without_a_home_has_no_profiles(run, monkeypatch):
    def no_such_user(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", no_such_user)
    del run.environment["JOBSTATUS_CONFIG"]
    del run.environment["HOME"]
    assert good(run("profile", "list")) == ""


def test_a_home_that_cannot_be_read_has_no_profiles(run):
    del run.environment["JOBSTATUS_CONFIG"]
    assert good(run("profile", "list", env={"HOME": f"/{'x' * 300}"})) == ""


def test_the_command_of_run_finds_the_server_of_the_profile(run, cli, config, token_file):
    write(config, f'[profiles.a]\naddress = "{cli.address}"\ntoken_command = ["cat", "{token_file}"]\n')
    script = 'echo "$JOBSTATUS_TOKEN_COMMAND $JOBSTATUS_PROFILE" && exec "$0" -m jobstatus_grpc get "$JOBSTATUS_JOB_ID"'
    done = run("run", "--profile", "a", "--", "sh", "-c", script, sys.executable)
    assert done.stdout.startswith(f"cat {token_file} \n")
    assert "in_progress" in done.stdout
