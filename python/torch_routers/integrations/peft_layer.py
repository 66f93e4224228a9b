"""The layer of the bridge to PEFT: a mixture that is switched, trained and frozen as an adapter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from torch_routers import lora


class RoutedLoraPeftLinear(lora.RoutedLoraLinear, BaseTunerLayer):
    """A `lora.RoutedLoraLinear` whose active mixture is the active adapter of PEFT.

    An adapter that is not active, or is loaded to be used alone, is at rest: no parameter of it
    requires a gradient, and the layer remembers which of them did. PEFT itself would train all of
    the adapter that becomes active; here what was frozen before is frozen again.
    """

    adapter_layer_names = ("routed_A", "routed_B", "routed_gate", "routed_tasks")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._active_adapter: list[str] = []
        self._at_rest: dict[str, dict[str, bool]] = {}

    # ---- which adapter is on ---------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        here = [name for name in names if name in self.routed_A]
        if len(here) > 1:
            raise ValueError(f"set_adapter: expected one adapter of each layer, got {here} of one")
        for mix in self.routed_A:
            self.set_requires_grad(mix, mix in names and not inference_mode)
        self.activate(names)

    def activate(self, names: list[str]) -> None:
        """Make the one of these adapters that the layer has the active one; nothing is trained."""
        self._active_adapter = names
        here = [] if self._disable_adapters else [name for name in names if name in self.routed_A]
        self.active_mix = here[0] if here else None

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled
        self.activate(self._active_adapter)

    # ---- what is trained -------------------------------------------------------------------------

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for mix in self.routed_A:
            if mix in names and requires_grad == (mix in self._at_rest):
                if requires_grad:
                    self._wake(mix)
                else:
                    self._rest(mix)

    def trained(self, mix: str) -> dict[str, bool]:
        """What is trained once the adapter is on."""
        return {**super().trained(mix), **self._at_rest.get(mix, {})}

    def set_trainable(self, mix: str, experts: Collection[str], router: bool) -> None:
        """From now on for the active adapter, and for others once they are active."""
        super().set_trainable(mix, experts, router)
        if self._at_rest.pop(mix, None) is not None and mix not in self._active_adapter:
            self._rest(mix)

    def _rest(self, mix: str) -> None:
        self._at_rest[mix] = self.trained(mix)
        super().set_trainable(mix, (), False)

    def _wake(self, mix: str) -> None:
        trained = self._at_rest.pop(mix)
        for kind in self.adapter_layer_names:
            if mix in getattr(self, kind):
                for name, parameter in getattr(self, kind)[mix].named_parameters():
                    parameter.requires_grad_(trained.get(f"{kind}.{name}", True))

    # ---- coming and going ------------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.routed_A:
            self.scope(adapter_name).remove()
            self.remove_mix(adapter_name)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise lora.MergeError(
            "merge_adapter: expected merge_and_unload, which takes the mixture out, got a merge "
            "that is to be undone"
        )

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: Any | None = None
    ) -> None:
        """Without PEFT's cast: factors and routers stay in float32."""
        device = self._factory().get("device") if device is None else device
        for kind in self.adapter_layer_names:
            if device is not None and adapter_name in getattr(self, kind):
                getattr(self, kind)[adapter_name].to(device)
