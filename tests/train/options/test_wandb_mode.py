"""W&B: a run goes on offline where there is no key or no connection, and is refused with a wrong key."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer
from threading import Thread

import pytest

from chunkdist.train.options import wandb_mode
from chunkdist.train.options.wandb_mode import settle_wandb

KEY = "x" * 40


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "RANK", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    return []


def settled(said: list[str]) -> str | None:
    """The mode that the run ends up with."""
    os.environ["WANDB_MODE"] = ""
    settle_wandb(said.append)
    return os.environ["WANDB_MODE"] or None


def test_without_a_key_it_is_offline(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_mode, "_ask", lambda url, key: True)
    assert settled(said) == "offline"
    assert said == ["W&B has no key here: the run is recorded offline, `wandb sync` sends it later"]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert settled(said) is None
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert settled(said) is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert settled(said) == "offline"


def test_a_host_that_cannot_be_reached_costs_seconds_not_the_run(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens at the discard port
    begin = time.monotonic()
    assert settled(said) == "offline"
    assert time.monotonic() - begin < 15
    assert said[0].startswith("W&B cannot be reached at http://127.0.0.1:9: the run is recorded offline")


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, object]]]:
    """A server that answers as it is told."""
    answer: dict[str, object] = {"status": 200, "body": b'{"data": {"viewer": {"id": "me"}}}'}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(int(str(answer["status"])))
            self.end_headers()
            self.wfile.write(bytes(answer["body"]))  # type: ignore[call-overload]

        def log_message(self, *args: object) -> None:
            pass

    server = TCPServer(("127.0.0.1", 0), Handler)  # an HTTPServer asks DNS for its name
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", answer
    server.shutdown()
    server.server_close()


def test_a_key_that_the_server_does_not_take_is_refused(
    said: list[str], server: tuple[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answer = server
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert settled(said) is None
    for status, body in ((401, b""), (403, b""), (200, b'{"data": {"viewer": null}}')):
        answer.update(status=status, body=body)
        with pytest.raises(
            ValueError, match="does not take the key: set WANDB_API_KEY, or WANDB_MODE=offline"
        ):
            settled(said)
    answer.update(status=502, body=b"bad gateway")
    assert settled(said) == "offline"
    answer.update(status=401)
    monkeypatch.setenv("RANK", "1")  # the first process alone talks to W&B
    assert settled(said) is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WANDB_MODE", "sometimes", "WANDB_MODE='sometimes': set it to one of online, offline"),
        ("WANDB_API_KEY", "short", "WANDB_API_KEY: API key must have 40"),
        ("WANDB_BASE_URL", "my.host", "WANDB_BASE_URL='my.host' is no address"),
    ],
)
def test_settings_that_cannot_be(
    said: list[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        settle_wandb(said.append)


@pytest.mark.parametrize("mode", ["offline", "disabled", "dryrun"])
def test_a_run_that_does_not_talk_is_left_alone(
    said: list[str], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    ask: Callable[[str, str], bool] = lambda url, key: pytest.fail("asked")  # noqa: E731
    monkeypatch.setattr(wandb_mode, "_ask", ask)
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    settle_wandb(said.append)
    assert os.environ["WANDB_MODE"] == mode
    assert not said
