"""Exchanges modules for faster ones: a module's class becomes a subclass with the same parameters and names.

core/model.py remains the model. Before a replacement is used, its outputs and gradients are compared with the
original module's in float32, on the model's own inputs for a few tokens; attention and loss in a row as long as the
context too. If they differ, for example after an edit of core/model.py, the original module stays and one line reports
it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..core.model import GPT, Attention, Head, NextTokenLoss
from ..errors import StopForward, one_line
from ..machine.device import forked_random

TOLERANCE = 1e-5  # largest relative difference from the plain module; float32 rounds to about 1e-7
SEQUENCES, TOKENS = 2, 5  # of the comparison
LONG_WEIGHTS = 1 << 24  # attention weights of the heads in a row as long as the context; of one head there may be more
FEW_IDS = 64  # of the vocabulary, in such a row of the loss

_plain: dict[type, type] = {}  # replacement -> the class that it replaced


def swap(
    model: GPT,
    replacements: Mapping[type, type],
    say: Callable[[str], None],
    keep: Collection[nn.Module] = (),
    lasting: bool = False,
) -> int:
    """Replaces the class of every module if it is a key. Returns the number of replaced modules.

    A replacement is a subclass of its key without parameters of its own. A deliberate approximation, such as float8,
    has a method `exact` with the arguments of forward, which is compared instead. keep: modules to leave unchanged;
    lasting: unswap() does not undo it. If a replacement differs or fails, say reports it and the original module stays.
    """
    left = set(keep)
    chosen = [m for m in model.modules() if type(m) in replacements and m not in left]
    kinds = {m: kind_of(m) for m in chosen}  # now: a forward pass may replace a module's tensors
    given = _few_tokens(model, chosen) if chosen else {}
    verdicts: dict[Any, str | None] = {}
    count = 0
    for module in chosen:
        which, plain = kinds[module], type(module)
        replacement = replacements[plain]
        if which not in given:  # the model never calls one of this kind
            continue
        if which not in verdicts:
            verdict = _difference(module, replacement, *given[which], model.config.block_size)
            if verdict is not None and verdict not in verdicts.values():
                say(f"{plain.__name__}: {replacement.__name__} {verdict}; using core/model.py's {plain.__name__}")
            verdicts[which] = verdict
        if verdicts[which] is None:
            if not lasting:
                _plain[replacement] = plain
            module.__class__ = replacement
            count += 1
    return count


def unswap(model: nn.Module, *classes: type) -> None:
    """Restores the classes from before swap(). classes: undo only these replacements."""
    for module in model.modules():
        while type(module) in _plain and (not classes or isinstance(module, classes)):
            module.__class__ = _plain[type(module)]


@contextlib.contextmanager
def unswapped(model: nn.Module) -> Iterator[None]:
    """The classes from before swap(), for a while."""
    kinds = [(module, type(module)) for module in model.modules()]
    unswap(model)
    try:
        yield
    finally:
        for module, kind in kinds:
            module.__class__ = kind


@contextlib.contextmanager
def kept_buffers(*modules: nn.Module) -> Iterator[None]:
    """Restores the modules' buffers after a trial: an edited model may count its calls in one. Buffers that did not
    exist before it stay."""
    with torch.no_grad():
        held = [
            (m._buffers, name, buffer, None if buffer is None else buffer.clone())
            for m in {m: None for module in modules for m in module.modules()}
            for name, buffer in m._buffers.items()
        ]
    try:
        yield
    finally:
        for buffers, name, buffer, value in held:
            buffers[name] = buffer
            if buffer is not None and value is not None and not torch.equal(buffer, value):
                buffer.data.copy_(value)  # .data: for autograd no change, because gradients of the trial may follow


def kind_of(module: nn.Module) -> Any:
    """Modules of one kind are compared once: same classes, shapes, constants, settings, of the modules in them too."""
    return tuple(
        (type(m), tuple(p.shape for p in m.parameters(recurse=False)), *_constants(m), *_settings(m))
        for m in module.modules()
    )


def _constants(module: nn.Module) -> Iterator[int]:
    """Tensors without gradients: an edit that multiplies by one may count in another layer only."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if not tensor.requires_grad:
            yield id(tensor)


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training":
            yield name, repr(value) if isinstance(value, (int, float, str, tuple, functools.partial)) else id(value)


def inputs(model: GPT, modules: list[nn.Module], *tokens: Tensor) -> dict[Any, tuple[Any, dict[str, Any]]]:
    """The arguments with which model(*tokens) calls a module of each kind. It runs until the last kind is called."""
    found: dict[Any, tuple[Any, dict[str, Any]]] = {}
    kinds = {m: kind_of(m) for m in modules}
    wanted = len(set(kinds.values()))

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.setdefault(kinds[module], (args, kwargs))
        if len(found) == wanted:
            raise StopForward

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    try:
        with contextlib.suppress(StopForward):
            model(*tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _few_tokens(model: GPT, modules: list[nn.Module]) -> dict[Any, tuple[Any, dict[str, Any]]]:
    """inputs() for a few tokens, in the precision of the weights."""
    device, config, training = model.lm_head.weight.device, model.config, model.training
    shape = SEQUENCES, min(TOKENS, config.block_size) + 1
    ids = torch.randint(int(config.vocab_size or 1), shape, generator=torch.Generator().manual_seed(0)).to(device)
    dtype, model.compute_dtype = model.compute_dtype, None
    try:
        # with gradients, to see which inputs need one
        with torch.enable_grad(), forked_random(device), kept_buffers(model):
            return inputs(model.eval(), modules, ids[:, :-1], ids[:, 1:])
    finally:
        model.compute_dtype = dtype
        model.train(training)


def _longer(module: nn.Module, args: Any, T: int) -> tuple[Any, ...]:
    """The arguments for a row of T random numbers, the whole context, for modules in which a token's place matters: an
    edit, such as a window of attention, may change only the later ones. Attention has as many heads as fit, the loss a
    head of a few ids: its short rows were compared with the whole vocabulary. Empty for other modules."""
    random = torch.Generator().manual_seed(0)

    def draw(like: Tensor, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=random).to(like) * like.detach().std()
        return drawn.requires_grad_(like.requires_grad)

    if isinstance(module, Attention) and len(args) == 5 and args[3] is None:
        heads, groups = args[0].size(1), args[1].size(1)
        shared = heads // groups  # queries' heads per head of keys
        groups = max(1, min(groups, LONG_WEIGHTS // (T * T * shared)))
        sizes = shared * groups, groups, groups
        return *(draw(t, 1, n, T, t.size(-1)) for t, n in zip(args, sizes, strict=False)), *args[3:]
    if isinstance(module, NextTokenLoss) and len(args) == 3:
        x, targets, head = args
        few = min(FEW_IDS, len(head.weight))
        return draw(x, 1, T, x.size(-1)), targets[:1, torch.arange(T) % targets.size(1)] % few, _smaller(head, few)
    return ()


def _smaller(head: Head, few: int) -> Head:
    """The head of the first few ids of the vocabulary."""
    made: Any = {}
    for t in (*head.parameters(), *head.buffers()):
        if t.dim() and len(t) == len(head.weight):
            part = t.detach()[:few].clone()
            made[id(t)] = nn.Parameter(part, t.requires_grad) if isinstance(t, nn.Parameter) else part
    return copy.deepcopy(head, made)


def _difference(module: nn.Module, replacement: type, args: Any, kwargs: dict[str, Any], length: int) -> str | None:
    """How the replacement differs from the module's present class on these arguments, in training too, where an edit
    may act, if the module has no others in it; then in a row of this length. None if it does not differ. Without
    dropout."""
    training, precision = module.training, torch.get_float32_matmul_precision()
    is_single = next(module.children(), None) is None
    name = "p" if isinstance(module, nn.Dropout) else "dropout"
    rate = getattr(module, name, None)

    def differences() -> Iterator[str | None]:
        for mode in (False, True) if is_single else (False,):
            yield _difference_now(module.train(mode), replacement, args, kwargs)
        if longer := _longer(module, args, length):
            yield _difference_now(module.eval(), replacement, longer, {})

    torch.set_float32_matmul_precision("highest")  # without TensorFloat-32, whose rounding differs between kernels
    try:
        if isinstance(rate, float):
            setattr(module, name, 0.0)
        return next(filter(None, differences()), None)
    finally:
        torch.set_float32_matmul_precision(precision)
        module.train(training)
        if isinstance(rate, float):
            setattr(module, name, rate)


def _difference_now(module: nn.Module, replacement: type, args: Any, kwargs: dict[str, Any]) -> str | None:
    plain, passes = type(module), []
    try:
        for cls, forward in ((plain, _exact(plain)), (replacement, _exact(replacement))):
            module.__class__ = cls
            passes.append(_Pass(forward, module, args, kwargs))
        # a replacement may omit outputs that its caller does not need, such as logits
        pairs = zip(passes[0].outputs, passes[1].outputs, strict=True)
        both = [i for i, pair in enumerate(pairs) if all(isinstance(t, Tensor) for t in pair)]
        expected, found = ([p.outputs[i] for i in both] + p.gradients(both) for p in passes)
    except Exception as error:
        return f"fails ({type(error).__name__}: {one_line(error, 100)})"
    finally:
        module.__class__ = plain
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:
            return "returns another shape"
        a, b = a.detach(), b.detach()
        apart = float((a - b).norm() / a.norm().clamp(min=1e-30))
        if not apart <= TOLERANCE:
            return f"returns a different result (relative difference {apart:.0e})"
    return None


def _exact(replacement: Any) -> Callable:
    return getattr(replacement, "exact", replacement.forward)


class _Pass:
    """One forward pass through a module, ready for the gradients of its floating-point inputs and parameters."""

    def __init__(self, forward: Callable, module: nn.Module, args: Any, kwargs: dict[str, Any]):
        self.leaves: list[Tensor] = []
        modules = [module, *(a for a in tree_leaves((args, kwargs)) if isinstance(a, nn.Module))]
        for m in modules:
            self.leaves += [p for p in m.parameters() if p.requires_grad]
        args, kwargs = tree_map(self._leaf, (args, kwargs))
        device = self.leaves[0].device if self.leaves else torch.device("cpu")
        with torch.enable_grad(), forked_random(device), kept_buffers(*modules):
            self.outputs = tree_leaves(forward(module, *args, **kwargs))

    def _leaf(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        leaf = value.detach().clone().requires_grad_(value.requires_grad)
        self.leaves += [leaf] if leaf.requires_grad else []
        return leaf

    def gradients(self, outputs: list[int]) -> list[Tensor]:
        """Gradients of a weighted sum of these outputs; zeros for inputs that do not affect it."""
        total: Any = 0
        for t in (self.outputs[i] for i in outputs):
            if t.requires_grad:
                weights = torch.arange(1, t.numel() + 1, device=t.device, dtype=t.dtype).cos().view_as(t)
                total = total + (t * weights).sum()
        if not isinstance(total, Tensor):
            return []
        found = torch.autograd.grad(total, self.leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g.to_dense() for x, g in zip(self.leaves, found, strict=True)]
