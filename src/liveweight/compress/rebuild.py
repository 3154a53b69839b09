"""Giving a dense instance the structure and the tensors of a checkpoint: first all checks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liveweight.compress import edit, forms, packing, structure, swap
from liveweight.nn import ByBatch, Residual, ShortcutMask
from liveweight.nn.shortcut_mask import shortcut_mask

_MASKS = ("weight_mask", "bias_mask")


class Rebuild:
    """One load: checks the model against the file, then changes the model."""

    def __init__(
        self,
        path: object,
        model: nn.Module,
        entries: dict[str, dict],
        tensors: dict[str, Tensor],
        masks: dict[str, Tensor],
    ) -> None:
        self.path = path
        self.model = model
        self.entries = entries
        self.tensors = tensors
        self.masks = masks
        self.modules = dict(model.named_modules())
        self.sparse = {name: e for name, e in entries.items() if "format" in e}
        self.blocks = {n: e for n, e in entries.items() if e["type"] == "Residual"}
        self.replaced = {n for n, e in entries.items() if "format" in e or e["type"] == "Identity"}

    def apply(self) -> None:
        """Check everything, then change the model; on an error it is as it was."""
        with edit.undone_on_error(self.model), torch.no_grad():
            self._mask_shortcuts()
            for name, entry in self.entries.items():
                self._check_module(name, entry)
            self._check_tensors()
            # Copies into tensors that stay come last: they can no longer fail.
            copies = self._place_tensors()
            self._place_modules()
            for target, value in copies:
                target.copy_(value)

    def _fail(self, words: str) -> ValueError:
        return ValueError(f"load: {self.path} does not fit the model: {words}")

    def _mask_shortcuts(self) -> None:
        """Put masks behind the shortcuts that the file has masked, so that names are the file's."""
        for name, entry in self.entries.items():
            if entry["type"] != "ShortcutMask" or shortcut_mask(self.modules.get(name)):
                continue
            self._check_module(name, entry)
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            wrapped = ShortcutMask.behind(self.modules[name], entry["channels"], device)
            edit.replace_module_(self.model, name, wrapped)
        self.modules = dict(self.model.named_modules())

    def _check_module(self, name: str, entry: dict) -> None:
        module = self.modules.get(name)
        if module is None:
            raise self._fail(f"it has no module {name!r}")
        wanted = entry.get("dense") or entry.get("was") or entry["type"]
        masked = entry["type"] == "ShortcutMask" and shortcut_mask(module) is not None
        got = type(module[0] if masked else module).__name__
        if got != wanted:
            hint = "; load wants a dense instance" if forms.is_ours(module) else ""
            raise self._fail(f"{name} is a {got}, expected a {wanted}{hint}")
        if entry["type"] in ("Identity", "Residual", "ShortcutMask"):
            return
        was = entry.get("from", entry["sizes"])
        for size, value in entry["sizes"].items():
            if getattr(module, size) not in (value, was[size]):
                raise self._fail(f"{name} has {size} {getattr(module, size)}, expected {was[size]}")
        got = structure.conv_attributes(module) if "conv" in entry else {}
        for attribute, value in entry.get("conv", {}).items():
            if got[attribute] != value:
                raise self._fail(f"{name} has {attribute} {got[attribute]}, expected {value}")

    def _expected_shape(self, name: str, leaf: str, tensor: Tensor) -> tuple[int, ...]:
        """Shape of a tensor of the model once the module has the file's sizes."""
        sizes = self.entries.get(name, {}).get("sizes")
        if not sizes or tensor.dim() == 0:
            return tuple(tensor.shape)
        if "num_features" in sizes:
            return (sizes["num_features"],)
        inputs, outputs = sizes.values()
        if leaf in ("bias", "bias_mask"):
            return (outputs,)
        groups = getattr(self.modules[name], "groups", 1)
        return (outputs, inputs // groups, *tensor.shape[2:])

    def _check_tensors(self) -> None:
        """Compare the file's keys and shapes with what the model will have."""
        state = self.model.state_dict()
        for key, value in self.tensors.items():
            name, _, leaf = key.rpartition(".")
            module = self.modules.get(name)
            if module is None:
                raise self._fail(f"it has no module {name!r} for {key}")
            own = state.get(key)
            if own is None:
                self._check_new(key, name, leaf, module)
                continue
            expected = self._expected_shape(name, leaf, own)
            if tuple(value.shape) != expected:
                raise self._fail(f"{key} is {tuple(value.shape)}, expected {expected}")
        absent = [
            key
            for key in state
            if key not in self.tensors and key.rpartition(".")[0] not in self.replaced
        ]
        if absent:
            raise self._fail(f"the file has no tensor for {', '.join(absent[:5])}")

    def _check_new(self, key: str, name: str, leaf: str, module: nn.Module) -> None:
        """A tensor that a dense instance lacks: a mask, an added bias, a pattern of kernels."""
        entry = self.entries.get(name, {})
        if leaf == "kernels" and name in self.sparse:
            return
        if leaf == "bias" and "sizes" in entry and "bias" in module._parameters:
            base = module.weight
        elif leaf in _MASKS and module._parameters.get(leaf.removesuffix("_mask")) is not None:
            base = getattr(module, leaf.removesuffix("_mask"))
        else:
            raise self._fail(f"it has no tensor {key}")
        expected = self._expected_shape(name, leaf, base)
        if tuple(self.tensors[key].shape) != expected:
            got = tuple(self.tensors[key].shape)
            raise self._fail(f"{key} is {got}, expected {expected}")

    def _place_tensors(self) -> list[tuple[Tensor, Tensor]]:
        """Replace tensors that change shape or dtype; return (target, value) of all others."""
        copies: list[tuple[Tensor, Tensor]] = []
        renewed: dict[int, nn.Parameter] = {}
        for key, value in self.tensors.items():
            name, _, leaf = key.rpartition(".")
            if name in self.replaced:
                continue
            module = self.modules[name]
            old = getattr(module, leaf, None)
            if old is not None and old.shape == value.shape and old.dtype == value.dtype:
                copies.append((old, value))
                continue
            like = old if old is not None else getattr(module, "weight", None)
            value = value.to(like.device) if like is not None else value
            if id(old) in renewed:
                module._parameters[leaf] = renewed[id(old)]
            elif leaf in module._parameters:
                edit.set_parameter(module, leaf, value)
                if old is not None:  # a tied parameter stays tied
                    renewed[id(old)] = module._parameters[leaf]
            else:
                module.register_buffer(leaf, value)
        for name, entry in self.entries.items():
            if name not in self.replaced and "sizes" in entry:
                _set_sizes(self.modules[name], entry)
        return copies

    def _place_modules(self) -> None:
        for name in self.replaced:
            old = self.modules[name]
            entry = self.entries[name]
            new = nn.Identity() if entry["type"] == "Identity" else self._joined(name, entry, old)
            edit.replace_module_(self.model, name, new.train(old.training))
        for name, entry in self.blocks.items():
            settings = (entry["branch"], entry["shortcut"], entry["activation"])
            edit.replace_module_(self.model, name, Residual(self.modules[name], *settings))

    def _joined(self, name: str, entry: dict, old: nn.Module) -> nn.Module:
        """Return the sparse or packed module, or the choices by batch size, of an entry."""
        weight = self.tensors[f"{name}.weight"]
        dense = swap.dense_like(old, entry["sizes"], weight, self.tensors.get(f"{name}.bias"))
        for mask in _MASKS:
            if f"{name}.{mask}" in self.tensors:
                bits = self.tensors[f"{name}.{mask}"]
                dense.register_buffer(mask, bits.to(old.weight.device))
        parts = (name, *entry["parts"]) if entry["parts"] else ()
        names = entry.get("choices", [entry["format"]])
        names = [swap.format_on(n, dense.weight) for n in names]
        made = {n: self._form(name, n, entry, dense, parts) for n in dict.fromkeys(names)}
        new = made[names[0]]
        if entry["format"] == forms.BY_BATCH:
            sample_dim = 1 if isinstance(dense, nn.Linear) else 3
            choices = [made[n] for n in names]
            new = ByBatch(choices, entry["limits"], sample_dim=sample_dim, parts=parts)
        if "from" in entry:
            new.shrunk_from = dict(entry["from"])
        return new

    def _form(
        self, name: str, form: str, entry: dict, dense: nn.Module, parts: tuple[str, ...]
    ) -> nn.Module:
        options = {"activation": entry["activation"], "parts": parts}
        if form in (packing.LABEL, packing.JOINED):
            new = packing.make_packed(dense, form, **options)
        else:
            keep = self.tensors.get(f"{name}.kernels", self.masks.get(f"{name}.weight"))
            keep = keep.to(dense.weight.device) if keep is not None else None
            if form == "block":
                options["block"] = tuple(entry["block"])
            new = swap.make_sparse(dense, form, pool=entry.get("pool", 1), keep=keep, **options)
            new.batch_last = entry.get("batch_last", False)
        if entry.get("layout") is not None:
            new.layout = entry["layout"]
        return new


def _set_sizes(module: nn.Module, entry: dict) -> None:
    for size, value in entry["sizes"].items():
        setattr(module, size, value)
    if "from" in entry:
        module.shrunk_from = dict(entry["from"])
