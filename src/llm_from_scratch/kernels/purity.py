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

from ..core.model import GPT
from ..errors import CannotRecord

PACKAGE = __name__.partition(".")[0]
CALM = (torch, F, nn, math)  # a function of these depends on its arguments only, or is an operation
CHANGES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR", "IMPORT_NAME")
UNFIT = (
    setattr, delattr, getattr, vars, globals, locals, open, input, exec, eval, next, id, __import__, print, breakpoint,
)  # fmt: skip
HIDDEN = {  # what no recorded operation shows
    "detach", "detach_", "data", "no_grad", "enable_grad", "inference_mode", "set_grad_enabled", "requires_grad_",
    "register_hook", "__dict__", "numpy", "tolist", "item", "data_ptr", "grad", "requires_grad", "grad_fn", "is_leaf",
    "is_grad_enabled", "is_inference", "is_inference_mode_enabled", "retain_grad", "autograd", "_C", "_version",
}  # fmt: skip
HIDING = [getattr(torch, name) for name in HIDDEN if hasattr(torch, name)]  # by any name
COMPARED = (bool, int, float, str, tuple, type(None), torch.dtype)
HELD = (torch.Tensor, nn.Module)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """The values that the code of forward may read: attributes of the modules and their classes, and global names."""

    def __init__(self, model: GPT):
        """Raises CannotRecord if the code changes something, or uses what is neither torch's nor the package's, such as
        Python's random numbers."""
        own = {c for m in model.modules() for c in type(m).__mro__ if not _is_from(c, "torch", "builtins")}
        names, self.places = _read([vars(c) for c in own])
        for owner in [*map(vars, model.modules()), *map(vars, own)]:
            for name in names & owner.keys():
                value, is_class = owner[name], isinstance(owner, types.MappingProxyType)
                fixed = _is_plain(value) or isinstance(value, HELD) or value is model.config
                if not fixed and not (is_class and isinstance(value, (types.FunctionType, property))):
                    raise CannotRecord(f"an attribute {name} may change ({type(value).__name__})")
                self.places += [(owner, name)] if is_class else []
        self.config, self.own, self.names = vars(model.config), vars(model), names
        self.parts = list(model.modules())[1:]  # not the model, whose programs would keep it
        self.kind = type(model)
        self.kept = self._compared()  # so that their identities stay unique
        self.state = [_identity(value) for value in self.kept]
        if any(self._hooks()):
            raise CannotRecord("a module has hooks")

    def is_same(self, model: GPT) -> bool:
        same = type(model) is self.kind and not any(self._hooks())
        return same and [_identity(value) for value in self._compared()] == self.state

    def _hooks(self) -> Iterator[Any]:
        return (owner[hooks] for owner in (self.own, *map(vars, self.parts)) for hooks in HOOKS)

    def _compared(self) -> list[Any]:
        values = [*self.config.values(), *map(type, self.parts), *(owner.get(name) for owner, name in self.places)]
        for owner in (self.own, *map(vars, self.parts)):
            values += [value for name, value in owner.items() if name[0] != "_" or name in self.names]
            values += [*owner["_parameters"].values(), *owner["_modules"].values(), *owner["_buffers"].values()]
        return values


def _read(classes: list[Mapping[str, Any]]) -> tuple[set[str], list[tuple[Mapping[str, Any], str]]]:
    """The names of attributes and the places of global names that forward reads, in the functions that it calls too."""
    waiting = [f for c in classes for name, f in c.items() if name == "forward" or _is_operator(name, f)]
    seen = set[Any]()
    names, places = {"forward"}, list[tuple[Mapping[str, Any], str]]()
    while waiting:
        f = waiting.pop()
        if f in seen or _is_from(f, "torch", f"{PACKAGE}.kernels"):
            continue  # kernels are compared with what they replace
        seen.add(f)
        if not isinstance(f, types.FunctionType) or vars(f):
            raise CannotRecord(f"{getattr(f, '__qualname__', f)} is not a plain function")
        if not _is_plain((*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values())):
            raise CannotRecord(f"{f.__qualname__} has a default argument that may change")
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


def _identity(value: Any) -> Any:
    """A value that differs if the object is replaced. A constant tensor may be changed in place; a parameter is read in
    every step."""
    if isinstance(value, COMPARED):
        return value
    is_constant = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and not value.is_inference()
    return (id(value), value._version) if is_constant else id(value)


def _is_operator(name: str, value: Any) -> bool:
    """Such as __getitem__, which is called without its name."""
    return name.startswith("__") and name != "__init__" and isinstance(value, types.FunctionType)


def _is_calm(value: Any) -> bool:
    if any(value is hiding for hiding in HIDING):
        return False
    if isinstance(value, types.ModuleType):
        return value in CALM
    if isinstance(value, type):
        return issubclass(value, BaseException) or _is_from(value, "torch", "builtins")
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        is_hidden = _is_from(value, "torch") and value.__name__.startswith("_")  # such as _set_grad_enabled
        return value not in UNFIT and not is_hidden and _is_from(value, "torch", "builtins", PACKAGE)
    return _is_plain(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, COMPARED) and (not isinstance(value, tuple) or all(map(_is_plain, value)))


def _is_from(value: Any, *packages: str) -> bool:
    return any(f"{value.__module__}.".startswith(f"{package}.") for package in packages)
