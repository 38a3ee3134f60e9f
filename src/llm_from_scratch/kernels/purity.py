"""Whether a model's forward may be recorded once for all steps: what it depends on, apart from its operations."""

from __future__ import annotations

import builtins
import dis
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch.nn import functional as F

from ..config import GPTConfig
from ..core.model import GPT
from ..errors import CannotRecord

PACKAGE = __name__.partition(".")[0]
CALM = (torch, F, nn, math)  # a function of these depends on its arguments only, or is an operation
CHANGES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR", "IMPORT_NAME")
UNFIT = (setattr, delattr, getattr, vars, globals, locals, open, input, exec, eval, next, id)
HIDDEN = {  # what no recorded operation shows
    "detach", "detach_", "data", "no_grad", "enable_grad", "inference_mode", "set_grad_enabled", "requires_grad_",
    "register_hook", "numpy", "tolist", "item", "data_ptr", "grad",
}  # fmt: skip
COMPARED = (bool, int, float, str, tuple, type(None), torch.dtype)
FIXED = (*COMPARED, torch.Tensor, nn.Module, GPTConfig)
CODE, CLASS = (types.FunctionType, property), types.MappingProxyType
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARTS = ("_parameters", "_modules")


class Watch:
    """What the code of forward reads: attributes of the modules and their classes, and global names."""

    def __init__(self, model: GPT):
        """Raises CannotRecord if the code changes something, or uses what is neither torch's nor the package's, such as
        Python's random numbers."""
        own = {c for m in model.modules() for c in type(m).__mro__ if not _is_from(c, "torch", "builtins")}
        names, self.places = _read([vars(c) for c in own])
        for owner in [*map(vars, model.modules()), *map(vars, own)]:
            for name in names & owner.keys():
                value = owner[name]
                if not isinstance(value, FIXED) and not (isinstance(value, CODE) and isinstance(owner, CLASS)):
                    raise CannotRecord(f"an attribute {name} may change ({type(value).__name__})")
                self.places.append((owner, name))
        self.config = vars(model.config)
        self.hooks = [getattr(m, hooks) for m in model.modules() for hooks in HOOKS]
        self.parts: list[Any] = [getattr(m, parts) for m in model.modules() for parts in PARTS]
        if any(self.hooks):
            raise CannotRecord("a module has hooks")
        self.state = self._state()

    def is_same(self) -> bool:
        return not any(self.hooks) and self._state() == self.state

    def _state(self) -> list[Any]:
        found: list[Any] = [tuple(self.config.values())]
        for owner, name in self.places:
            value = owner.get(name)
            found.append(value if isinstance(value, COMPARED) else id(value))
        return found + [id(value) for part in self.parts for value in part.values()]


def _read(classes: list[Mapping[str, Any]]) -> tuple[set[str], list[tuple[Mapping[str, Any], str]]]:
    """The names of attributes and the places of global names that forward reads, in the functions that it calls too."""
    waiting, seen = [c["forward"] for c in classes if "forward" in c], set[Any]()
    names, places = {"forward"}, list[tuple[Mapping[str, Any], str]]()
    while waiting:
        f = waiting.pop()
        if f in seen or _is_from(f, "torch", f"{PACKAGE}.kernels"):
            continue  # kernels are compared with what they replace
        seen.add(f)
        for step in _steps(f.__code__):
            if step.opname in CHANGES or set(f.__code__.co_freevars) - {"__class__"}:
                raise CannotRecord(f"{f.__qualname__} may change from step to step ({step.opname} {step.argval})")
            if step.argval in HIDDEN and step.opname.startswith("LOAD"):
                raise CannotRecord(f"{f.__qualname__} uses {step.argval}")
            if step.opname == "LOAD_GLOBAL":
                value = f.__globals__.get(step.argval, getattr(builtins, step.argval, None))
                if not _is_calm(value):
                    raise CannotRecord(f"{f.__qualname__} uses {step.argval}")
                places.append((f.__globals__, step.argval))
                waiting += [value] if isinstance(value, types.FunctionType) else []
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                names.add(step.argval)
                found = [getattr(c[step.argval], "fget", c[step.argval]) for c in classes if step.argval in c]
                waiting += [value for value in found if isinstance(value, types.FunctionType)]
    return names, places


def _steps(code: types.CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _steps(inner)


def _is_calm(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        return value in CALM
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return value not in UNFIT and _is_from(value, "torch", "builtins", "typing", "collections", PACKAGE)
    return isinstance(value, FIXED)


def _is_from(value: Any, *packages: str) -> bool:
    return any(f"{value.__module__}.".startswith(f"{package}.") for package in packages)
