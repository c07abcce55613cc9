"""The shared token's file: what it must be, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc.handshake import TOKEN_VARIABLE, load_token

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"  {TOKEN}\n")
    path.chmod(0o600)
    return path


def test_a_token_is_read_without_the_whitespace_around_it(path: Path) -> None:
    assert load_token(str(path)) == TOKEN.encode()


def test_a_long_token_is_read_whole(path: Path) -> None:
    path.write_text(TOKEN * 1000)
    assert load_token(str(path)) == TOKEN.encode() * 1000


def test_the_environment_names_the_file_where_nothing_else_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, str(path))
    assert load_token(None) == TOKEN.encode()
    with pytest.raises(ConfigError, match="other: No such file"):
        load_token("other")


def test_a_file_in_the_home_folder_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    assert load_token("~/token") == TOKEN.encode()


def test_without_a_file_the_error_says_how_to_make_one_and_where_to_name_it() -> None:
    with pytest.raises(ConfigError, match=r"token_hex\(32\).*chmod 600.*runtime.token_file.*--token-file"):
        load_token(None)


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o604, 0o602, 0o660, 0o644])
def test_a_file_that_others_can_read_or_write_is_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}\): chmod 600 {path}"):
        load_token(str(path))


def test_a_link_is_judged_by_what_it_leads_to(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    assert load_token(str(link)) == TOKEN.encode()
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_token(str(link))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_a_file_of_another_user_is_refused(path: Path) -> None:
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match=r"another user \(uid 12345\)"):
        load_token(str(path))


def test_token_in_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="no regular file"):
            load_token(str(path))


@pytest.mark.parametrize("content", ["", " \n", TOKEN[1:] + " " * 20, "0123456" * 10])
def test_a_token_that_can_be_guessed_is_refused_and_not_shown(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(ConfigError, match="at least 32") as raised:
        load_token(str(path))
    assert TOKEN[1:] not in str(raised.value)


def test_a_file_far_too_long_for_a_token_is_refused(path: Path) -> None:
    path.write_text(TOKEN * 3000)
    with pytest.raises(ConfigError, match="has 96000 bytes, as no token has"):
        load_token(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"token file {tmp_path}/none: No such file"):
        load_token(str(tmp_path / "none"))
