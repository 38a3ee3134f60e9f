"""The shards of a checkpoint that each process writes, and the parts of a saved tensor that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.shards import Place
from ..core.sizes import tied_names
from ..core.weights import plain_names
from ..machine.team import Team
from .sharding import is_sharded, local, own_rows, shard_of


def place_of(tensor: Tensor) -> Place | None:
    """Where the rows belong that this process holds of a sharded tensor; None if it holds all."""
    whole = not is_sharded(tensor) or local(tensor).shape == tensor.shape
    return None if whole else Place(0, own_rows(tensor).start, tensor.size(0))


@torch.no_grad()
def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights of these names to a model, sharded or not. Others stay as they are."""
    for name, tensor in model.state_dict().items():
        if name in weights:
            tensor.copy_(shard_of(tensor, weights[name]))


def own_share(contents: dict[str, Any], team: Team) -> dict[str, Any]:
    """The contents of a checkpoint (see write_checkpoint) with only the tensors that this process writes. All processes
    take part. Each tensor is written once, by a process that holds it; the bytes are balanced."""
    kind = "adapter" if contents["adapter"] else "model"
    weights, tied = plain_names(contents[kind]), tied_names(contents["model_config"])
    tensors = {name: tensor for name, tensor in weights.items() if tied.get(name) not in weights}
    places = {name: place_of(tensor) for name, tensor in tensors.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for name, slots in contents["optimizer"]["state"].items():
        numbers[name] = {slot: value for slot, value in slots.items() if not isinstance(value, Tensor)}
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{slot}"] = value
                places[f"{name}/{slot}"] = place_of(value)
    held = {name: local(tensor) for name, tensor in tensors.items()}
    own = {name: held[name] for name in _written_here(held, places, team)}
    state: dict[str, dict[str, Any]] = {}
    for theirs in team.gather(numbers):  # a process may keep the state of some parameters only
        for name, values in theirs.items():
            state.setdefault(name, {}).update(values)
    for key in [key for key in own if "/" in key]:
        name, _, slot = key.rpartition("/")
        state[name][slot] = own.pop(key)
    parts = {name: place for name, place in places.items() if place is not None}
    return contents | {kind: own, "optimizer": contents["optimizer"] | {"state": state}, "parts": parts}


def _written_here(held: dict[str, Tensor], places: dict[str, Place | None], team: Team) -> set[str]:
    """The names of the tensors that this process writes. held: what it has."""
    own = {
        name: (place.begin if place else 0, tensor.nbytes)
        for name, tensor in held.items()
        if (place := places[name]) is None or tensor.shape[place.dim]
    }
    holders: dict[tuple[str, int], list[int]] = {}
    sizes: dict[tuple[str, int], int] = {}
    for rank, theirs in enumerate(team.gather(own)):
        for name, (begin, size) in theirs.items():
            holders.setdefault((name, begin), []).append(rank)
            sizes[name, begin] = size
    loads, chosen = [0] * team.size, set()
    # large ones first, after those that only one process has
    for key in sorted(holders, key=lambda key: (len(holders[key]) > 1, -sizes[key], key)):
        rank = min(holders[key], key=loads.__getitem__)
        loads[rank] += sizes[key]
        chosen |= {key[0]} if rank == team.rank else set()
    return chosen
