"""What becomes of a run's record at W&B when there is no key, a wrong one, or no connection."""

from __future__ import annotations

import os
from collections.abc import Callable

_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
"""W&B's own (0.31)."""
_TALKING = ("online", "shared", "run")
_TIMEOUT_S = 10.0
_DEFAULT_URL = "https://api.wandb.ai"


def settle_wandb(say: Callable[[str], None]) -> None:
    """Sets `WANDB_MODE` to what will work; nothing is asked for, and nothing waited for longer than seconds.

    Without a key, or where the server cannot be reached, the run is recorded offline.

    Raises:
        ValueError: a mode that W&B does not know, an address that is none, or a key that it does not take.
    """
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in _MODES:
        raise ValueError(f"WANDB_MODE={mode!r}: set it to one of {', '.join(_MODES)}")
    if mode not in _TALKING:
        return
    url = (os.environ.get("WANDB_BASE_URL") or _DEFAULT_URL).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"WANDB_BASE_URL={url!r} is no address: write https://HOST")
    key = os.environ.get("WANDB_API_KEY") or _key_in_netrc(url)
    if key is None:
        _go_offline("W&B has no key here", say)
        return
    _check_key(key)
    if int(os.environ.get("RANK", "0")) != 0:
        return  # the first process alone talks to W&B
    answer = _ask(url, key)
    if answer is None:
        _go_offline(f"W&B cannot be reached at {url}", say)
    elif not answer:
        raise ValueError(f"W&B at {url} does not take the key: set WANDB_API_KEY, or WANDB_MODE=offline")


def _go_offline(reason: str, say: Callable[[str], None]) -> None:
    os.environ["WANDB_MODE"] = "offline"
    say(f"{reason}: the run is recorded offline, `wandb sync` sends it later")


def _key_in_netrc(url: str) -> str | None:
    from requests.utils import get_netrc_auth  # requests comes with W&B

    found = get_netrc_auth(url)
    return str(found[1]) if found else None


def _check_key(key: str) -> None:
    try:
        from wandb.sdk.lib.wbauth.validation import (
            check_api_key,
        )  # of W&B 0.31; says what is wrong in a sentence
    except ImportError:
        return  # the server will say

    wrong = check_api_key(key)
    if wrong is not None:
        raise ValueError(f"WANDB_API_KEY: {wrong} Set another one, or WANDB_MODE=offline")


def _ask(url: str, key: str) -> bool | None:
    """Whether the server knows the key; `None` where it does not answer."""
    import requests

    try:
        answer = requests.post(
            f"{url}/graphql", json={"query": "{viewer{id}}"}, auth=("api", key), timeout=_TIMEOUT_S
        )
    except requests.exceptions.RequestException:
        return None
    if answer.status_code in (401, 403):
        return False
    if not answer.ok:
        return None
    try:
        return bool((answer.json().get("data") or {}).get("viewer"))
    except ValueError:
        return None
