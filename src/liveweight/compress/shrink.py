"""Removing dead units physically: smaller dense layers that compute the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liveweight import _graph
from liveweight.compress import edit
from liveweight.compress.inputs import (
    ExampleInputs,
    as_example_inputs,
    detached,
    difference,
    run,
)
from liveweight.compress.report import ShrinkReport, ShrinkRow


def shrink_(model: nn.Module, example_inputs: object) -> ShrinkReport:
    """Remove the neurons and channels of a model that cannot change its output.

    Unit c of a layer goes where every outgoing weight in every follower is zero, or where all its
    incoming weights are zero, so that followers see a constant v: then v = 0, or W[:, c] v is
    added to the followers' biases. The latter is exact, and done, for Linear followers and for
    convolutions that do not pad with zeros. Equality holds in eval mode (running statistics of
    BatchNorm) and is checked on example_inputs.

    model           changed in place; Parameters are replaced, so build optimizers afterwards
    example_inputs  a tensor, a tuple of arguments or a dict of keyword arguments
    returns         ShrinkReport; layers that cannot be proven safe are left alone and named there

    Raises TypeError and ValueError for unusable example_inputs, RuntimeError where the smaller
    model disagrees on example_inputs; the model is then as it was.
    """
    inputs = as_example_inputs("shrink_", model, example_inputs)
    expected = detached(run(model, inputs))
    size = sum(p.numel() for p in model.parameters())
    try:
        graph = _graph.trace(model)
    except _graph.GraphError as error:
        note = f"nothing was removed: {error}"
        return ShrinkReport(parameters_before=size, parameters_after=size, notes=[note])
    with edit.undone_on_error(model):
        report = _Shrinker(model, graph, inputs).run()
        words = difference(expected, run(model, inputs))
        if words:
            raise RuntimeError(f"shrink_: the smaller model disagrees on example_inputs: {words}")
    report.parameters_before = size
    report.parameters_after = sum(p.numel() for p in model.parameters())
    return report


def _input_size(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def _output_size(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


class _Shrinker:
    """One call of shrink_: passes over the layers until nothing more can go.

    Removing a unit can leave another one without inputs or without readers, hence the passes.
    """

    def __init__(self, model: nn.Module, graph: _graph.Graph, inputs: ExampleInputs) -> None:
        self.model = model
        self.graph = graph
        self.inputs = inputs
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tied = edit.tied_parameters(model)
        self.rows = {name: self._row(layer.module, name) for name, layer in graph.layers.items()}
        self.followed = {f.name for layer in graph.layers.values() for f in layer.followers}
        self.notes: list[str] = []

    def _row(self, module: nn.Module, name: str) -> ShrinkRow:
        units, inputs = _output_size(module), _input_size(module)
        kind = "linear" if isinstance(module, nn.Linear) else "conv"
        return ShrinkRow(name, kind, units, units, inputs, inputs)

    def run(self) -> ShrinkReport:
        """Shrink every layer that may be shrunk; return the report without parameter counts."""
        able = []
        for name, layer in self.graph.layers.items():
            reason = self._why_not(layer)
            self.rows[name].note = f"left alone: {reason}" if reason else ""
            able += [] if reason else [layer]
        while self._pass(able):
            pass
        rows = list(self.rows.values())
        for name, reason in self.graph.skipped.items():
            row = self._row(self.modules[name], name)
            row.note = f"left alone: {reason}"
            rows.append(row)
        return ShrinkReport(layers=rows, notes=self.notes)

    def _why_not(self, layer: _graph.Layer) -> str:
        if not layer.safe:
            return layer.why_unsafe
        touched = [layer.name, *([layer.norm] if layer.norm else [])]
        for name in [*touched, *(f.name for f in layer.followers)]:
            reason = edit.why_not_plain(self.modules[name], self.tied)
            if reason:
                return reason if name == layer.name else f"{name}: {reason}"
        for follower in layer.followers:
            if _input_size(self.modules[follower.name]) != layer.channels * follower.fan:
                return f"{follower.name} reads it in another shape"
        return ""

    def _pass(self, layers: list[_graph.Layer]) -> bool:
        silent = {layer.name: self._silent(layer) for layer in layers}
        unread = {layer.name: self._unread(layer) for layer in layers}
        wanted = {
            follower.name
            for layer in layers
            if bool((silent[layer.name] & ~unread[layer.name]).any())
            for follower in layer.followers
        }
        seen = self._capture(wanted) if wanted else {}
        changed = False
        for layer in layers:
            dead = unread[layer.name] | self._unread(layer)
            constant = silent[layer.name] & ~dead
            folds: dict[str, Tensor] = {}
            if constant.any():
                constant, folds = self._foldable(layer, constant, seen)
            changed |= self._remove(layer, dead, constant, folds)
        return changed

    def _silent(self, layer: _graph.Layer) -> Tensor:
        """Units whose output does not depend on the input: no incoming weight, or a zero norm."""
        silent = edit.zeros_of(layer.module.weight).flatten(1).all(1)  # [units]
        norm = self.modules[layer.norm] if layer.norm else None
        if norm is not None and norm.weight is not None:
            silent = silent | edit.zeros_of(norm.weight)
        return silent

    def _unread(self, layer: _graph.Layer) -> Tensor:
        """Units whose every outgoing weight is zero in every follower."""
        unread = torch.ones(layer.channels, dtype=torch.bool, device=layer.module.weight.device)
        for follower in layer.followers:
            zeros = edit.zeros_of(self.modules[follower.name].weight)
            unread &= (
                zeros.flatten(2).all(2).all(0)
                if zeros.dim() == 4
                else (zeros.unflatten(1, (layer.channels, follower.fan)).all(2).all(0))
            )
        return unread

    def _capture(self, names: set[str]) -> dict[str, Tensor]:
        """Run the example inputs once and return what each named layer receives."""
        seen: dict[str, Tensor] = {}
        handles = []
        for name in names:

            def keep(_module, args, name=name) -> None:
                seen[name] = args[0].detach().clone()

            handles.append(self.modules[name].register_forward_pre_hook(keep))
        try:
            run(self.model, self.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _foldable(
        self, layer: _graph.Layer, constant: Tensor, seen: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return which constant units may go, and per follower their values [units, fan].

        The values are read off the run, so that norm, activation and pooling in between need no
        formula here; that a unit without inputs is constant follows from its layer's safety.
        """
        able, values = constant.clone(), {}
        for follower in layer.followers:
            module = self.modules[follower.name]
            if follower.name not in seen:
                return torch.zeros_like(constant), {}
            value, steady = _constant_values(module, seen[follower.name], layer.channels)
            values[follower.name] = value
            nonzero = value.ne(0).any(1)
            if isinstance(module, nn.Conv2d) and _pads_with_zeros(module):
                self._keep(layer, able & nonzero, f"{follower.name} pads with zeros")
                able &= ~nonzero
            self._keep(layer, able & ~steady, f"not the same everywhere before {follower.name}")
            able &= steady
        return able, values

    def _keep(self, layer: _graph.Layer, units: Tensor, why: str) -> None:
        count = int(units.sum())
        if count:
            word = "unit" if count == 1 else "units"
            self.rows[layer.name].note = f"kept {count} constant {word}: {why}"

    def _remove(
        self, layer: _graph.Layer, dead: Tensor, constant: Tensor, values: dict[str, Tensor]
    ) -> bool:
        gone = dead | constant
        if bool(gone.all()):
            gone = gone.clone()
            gone[0] = False  # a layer keeps at least one unit
            self.rows[layer.name].note = "kept 1 of its dead units: a layer keeps at least one"
        if not gone.any():
            return False
        row = self.rows[layer.name]
        for follower in layer.followers:
            folded = constant & gone
            if folded.any():
                self._fold(follower, folded, values[follower.name])
        if values:
            nonzero = torch.stack([v.ne(0).any(1) for v in values.values()]).any(0)
            row.folded += int((constant & gone & nonzero).sum())
        self._cut(layer, torch.nonzero(~gone).flatten())
        return True

    def _fold(self, follower: _graph.Follower, units: Tensor, values: Tensor) -> None:
        """Add W[:, c] v_c of the constant units c to the follower's bias."""
        module = self.modules[follower.name]
        weight = module.weight.detach().double()
        if weight.dim() == 4:
            weight = weight.sum((2, 3))  # [out, channels]
            values = values[:, :1]
        parts = weight.unflatten(1, values.shape) * (values.double() * units[:, None])
        added = parts.flatten(1).sum(1)  # [out]
        if not added.any():
            return
        if module.bias is None:
            edit.remember_shape_(module, _SIZES[type(module)])
            self.notes.append(f"{follower.name}: got a bias that holds its inputs' constants")
            edit.set_parameter(module, "bias", added.to(module.weight.dtype))
        else:
            bias = (module.bias.detach().double() + added).to(module.bias.dtype)
            edit.set_parameter(module, "bias", bias)
        if module._buffers.get("bias_mask") is not None:
            # A pruned bias that now holds a constant must not be cleared again by its mask.
            mask = module._buffers["bias_mask"]
            module._buffers["bias_mask"] = mask | added.ne(0).to(mask.dtype)

    def _cut(self, layer: _graph.Layer, keep: Tensor) -> None:
        """Keep the given units of a layer, of its norm, and of the followers' inputs."""
        module, row, channels = layer.module, self.rows[layer.name], layer.channels
        edit.remember_shape_(module, _SIZES[type(module)])
        edit.take_(module, ("weight", "bias", "weight_mask", "bias_mask"), 0, keep)
        if layer.norm:
            norm = self.modules[layer.norm]
            edit.remember_shape_(norm, ("num_features",))
            edit.take_(norm, ("weight", "bias", "running_mean", "running_var"), 0, keep)
            edit.take_(norm, ("weight_mask", "bias_mask"), 0, keep)
            norm.num_features = len(keep)
        for follower in layer.followers:
            reader = self.modules[follower.name]
            fan = follower.fan
            columns = torch.arange(channels * fan, device=keep.device).view(channels, fan)
            edit.remember_shape_(reader, _SIZES[type(reader)])
            edit.take_(reader, ("weight", "weight_mask"), 1, columns[keep].flatten())
            size = "in_features" if isinstance(reader, nn.Linear) else "in_channels"
            setattr(reader, size, len(keep) * fan)
            self.rows[follower.name].inputs_after = len(keep) * fan
        size = "out_features" if isinstance(module, nn.Linear) else "out_channels"
        setattr(module, size, len(keep))
        row.units_after = len(keep)


_SIZES = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: ("in_channels", "out_channels"),
}


def _pads_with_zeros(module: nn.Conv2d) -> bool:
    if module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return module.padding == "same" and any(k > 1 for k in module.kernel_size)
    return any(p > 0 for p in module.padding)


def _constant_values(module: nn.Module, x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return what each channel brings to a follower, [channels, fan], and where it is steady.

    A Linear may see another constant at every position of a flattened map: its fan positions.
    """
    if isinstance(module, nn.Conv2d):
        rows = x.movedim(-3, 0).flatten(1).T  # [batch * H * W, channels]
    else:
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]  # [batch, channels * fan]
    steady = rows.eq(rows[:1]).all(0).view(channels, -1).all(1)
    return rows[0].view(channels, -1), steady
