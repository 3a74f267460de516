"""A function in the place of a module's forward, which looks like it to those who read signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from torch import nn


def method_like(forward: Callable[..., Any], function: Callable[..., Any], module: nn.Module) -> MethodType:
    """`function(module, ...)` as a method of `module`, with the name and the signature of its `forward`.

    It has no `__wrapped__`: Accelerate (1.15, `unwrap_model(keep_fp32_wrapper=False)`) follows that to the
    innermost function and puts it in the method's place.
    """
    own: Any = getattr(forward, "__func__", forward)
    method: Any = wraps(own)(function)
    method.__signature__ = inspect.signature(own)
    del method.__wrapped__
    return MethodType(method, module)
