"""A float network with its leaves replaced by quantized ones."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.config import Ablation, QuantConfig
from qdiff.errors import UserError, first_few
from qdiff.interface import SteppedNetwork, family_of
from qdiff.kernels.integer_matmul import check_integer_products, int8_is_exact
from qdiff.kernels.packed_weight import WeightCache
from qdiff.modes import check_is_float, first_tokens, leaf_modes, leaves, quantized_layers, watched_tokens
from qdiff.modulation import memories
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import ActQuantizer, Quantizer, calibrated_act_quantizers, share_timesteps
from qdiff.ranges.calibrated_timesteps import at_timestep, watched
from qdiff.tracing.attention_calls import route_attention
from qdiff.tracing.replay import ReplayedNetwork
from qdiff.tracing.trace import Call, call_directly, count_calls
from qdiff.weight_forms import WeightForm
from qdiff.wrapping import log, replace_leaves, without_prefix


class QuantModel(nn.Module):
    """Wraps a denoising network for post-training quantization.

    The network's layers are replaced in place (parameters are shared, not copied), its parameters are frozen, and it
    is put in eval mode: reconstruction and sampling run without dropout. Outside of `quantized` it computes the same
    as the float network.

    Args:
        network: network with float weights.
        config: widths and ranges.
        example: some inputs of the network, batch first, on its device. A network that is not a
            `qdiff.interface.SteppedNetwork` runs on them once, to find its attention and the layers it never calls;
            None asks the network's ``example_inputs()`` if it has that, and else takes the layers alone.
        call: ``call(network, *inputs)`` runs the network, kept as ``call_network``; None calls it with the inputs.
        units: names of modules to reconstruct as a whole; None cuts the network automatically. Not for a
            `SteppedNetwork`.
        ends: names of the first and the last layer, for ``keep_ends`` and `QuantConfig.layer_bits`; None takes the
            family's.

    ``qnn(x, t, context)``: x [N, C, H, W], t [N], context [N, L, D] or None → [N, C, H, W]. Keywords are passed on.
    Attributes that this class does not have are looked up in the network; ``config`` is this class's, and the
    network's is ``qnn.model.config``.

    Attributes:
        left_in_float: the reason why a layer with products, or the products of a module itself, are not quantized, by
            name.
        act_timesteps: the timesteps of the ranges per timestep; None if the config has no such ranges.
    """

    def __init__(
        self,
        network: nn.Module,
        config: QuantConfig,
        example: Sequence[Tensor] | None = None,
        *,
        call: Call | None = None,
        units: Sequence[str] | None = None,
        ends: tuple[str, str] | None = None,
    ) -> None:
        super().__init__()
        check_is_float(network)
        self.config = config
        self.family = family_of(network)
        self.model = network
        self.ends = ends = ends or self.family.ends
        if config.keep_ends and ends is None:
            raise UserError(f"the first and last layer of {type(network).__name__} are not known; leave out keep_ends")
        self.call_network, self._unit_names, self._replayed = call or call_directly, units, None
        unused, products = (), {}
        if example is None and hasattr(network, "example_inputs"):
            example = network.example_inputs()
        if example is not None and not isinstance(network, SteppedNetwork):
            unused, products = self._route_attention(example)
        self.left_in_float = {**replace_leaves(network, config, ends, unused, self.family.prefix), **products}
        if not leaves(network):
            raise UserError(f"{type(network).__name__} has no layer that can be quantized")
        device = self.device
        if device.type != "meta":  # quantizers have values even if the network has none, so they stay on the CPU
            for module in network.modules():
                if isinstance(module, Quantizer):
                    module.to(device)
        self.act_timesteps = share_timesteps(network)
        self.requires_grad_(False)
        self.eval()

    def _route_attention(self, example: Sequence[Tensor]) -> tuple[Sequence[str], dict[str, str]]:
        """Find the network's attention and make it a leaf.

        Returns:
            Names of layers that are never called, and of modules whose products stay in float, with the reason.
        """
        counts = count_calls(self.model, example, self.call_network)
        # o = W·â holds after any sequence of inputs, so a layer may change from call to call instead of from step to
        # step; but ranges of changes are recorded step by step.
        repeated = counts.repeated(self.model) if self.config.modulate else []
        if repeated and not self.config.act_dynamic:
            raise UserError(
                f"{repeated[0]} is called several times per forward; give dynamic ranges, or leave out modulate"
            )
        for name in repeated:
            if len(counts.shapes[name]) > 1:
                raise UserError(f"{name} is called with inputs of several shapes per forward; leave out modulate")
        unused, reasons = counts.never_called(self.model), {}
        if self.config.attention_widths is not None:
            route_attention(self.model, counts.attention)
            reasons = dict.fromkeys(counts.products, "it multiplies two activations by itself")
            if reasons:
                log.warning("products of %d modules stay in float: %s", len(reasons), first_few(reasons))
        return unused, reasons

    def as_steps(self, inputs: Sequence[Tensor]) -> SteppedNetwork:
        """Return the network as a sequence of steps, the units of reconstruction.

        Args:
            inputs: some inputs, batch first; used the first time, if the network is not a `SteppedNetwork`.

        Raises:
            UserError: the network cannot be cut into units.
        """
        if isinstance(self.model, SteppedNetwork):
            return self.model
        if self._replayed is None:
            some = [i[:2] if i.is_meta else i[:2].to(self.device) for i in inputs]
            replayed = ReplayedNetwork(self.model, some, leaves(self.model), self.call_network, self._unit_names)
            self._replayed = [replayed]  # in a list, because it is a view of this network and not a part of it
        return self._replayed[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            network = self.__dict__.get("_modules", {}).get("model")
            if network is None or name.startswith("__"):
                raise
            return getattr(network, name)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the network's parameters."""
        return next(layer.weight.dtype for layer in self.layers().values())

    def forward(self, *inputs: Tensor | None, **keywords: Any) -> Tensor:
        while inputs and inputs[-1] is None:  # a missing condition is not passed on
            inputs = inputs[:-1]
        if self.config.ablation is Ablation.CLEARED_STATE:
            for memory in filter(None, (layer.memory for layer in self.layers().values())):
                memory.clear()
        with at_timestep(self.act_timesteps, inputs):
            return self.model(*inputs, **keywords) if keywords else self.call_network(self.model, *inputs)

    def train(self, mode: bool = True) -> QuantModel:
        """Stay in eval mode: neither reconstruction nor sampling may run with dropout."""
        return super().train(False)

    def layers(self) -> dict[str, QuantModule]:
        """Return the quantized convolutions and linear layers by their name in the float network."""
        return quantized_layers(self.model)

    def act_quantizers(self) -> dict[str, ActQuantizer]:
        """Return all activation quantizers by name."""
        return {n: m for n, m in self.model.named_modules() if isinstance(m, ActQuantizer)}

    def calibrated_act_quantizers(self) -> dict[str, ActQuantizer]:
        """Return the activation quantizers whose range is state, not dynamic, by name."""
        return calibrated_act_quantizers(self.model)

    @property
    def own_ends(self) -> tuple[str, str] | None:
        """`ends` as `QuantConfig.layer_bits` names them."""
        return without_prefix(self.ends, self.family.prefix)

    @contextlib.contextmanager
    def quantized(self, weights: bool = True, activations: bool = True) -> Iterator[QuantModel]:
        """Quantize inside the block; weights or activations whose width is None stay in float.

        Raises:
            UserError: a quantizer that would be used is not set (no calibration, no checkpoint loaded).
        """
        self.assert_initialised(weights, activations)
        with leaf_modes([self.model], weights, activations), watched(self.act_timesteps), watched_tokens(self.model):
            yield self

    @contextlib.contextmanager
    def trajectory(self) -> Iterator[QuantModel]:
        """Run one batch through a sampling trajectory: inside the block, modulated layers remember the previous step.

        Every batch needs its own block. The layers' state is dropped at the end, also on an exception. Without
        modulation the block has no effect.

        Raises:
            RuntimeError: a trajectory is open already.
        """
        compensates = self.config.ablation is not Ablation.NO_COMPENSATION
        with memories(self.layers(), compensates), watched(self.act_timesteps), watched_tokens(self.model):
            yield self

    def assert_initialised(self, weights: bool = True, activations: bool = True) -> None:
        """Raise a `UserError` that names the first quantizer of the requested kinds, or constant, that is not set."""
        advice = "calibrate the network or load a checkpoint first"
        if self.config.bos_aware and (weights or activations) and not first_tokens(self.model):
            raise UserError(f"no layer knows what it makes of the context's first token; {advice}")
        kinds = {"activation": activations, "weight": weights}
        found = {n: m for n, m in self.model.named_modules() if isinstance(m, Quantizer) and kinds[_kind(m)]}
        if not found:
            return
        # Stacked, so that the host waits for the GPU only once.
        flags = torch.stack([m.initialised for m in found.values()]).tolist()
        for (name, module), initialised in zip(found.items(), flags, strict=True):
            if not initialised:
                raise UserError(f"the {_kind(module)} quantizer {name} has no range; {advice}")

    def release_float_weights(self) -> None:
        """Replace the float weights by dequantized ones; from now on only ``quantized(weights=True)`` works.

        Memory use is that of the float network. Afterwards native files can be written and loaded, published files can
        only be loaded, and state dicts cannot be used.

        Raises:
            UserError: a weight quantizer is not set.
        """
        self.assert_initialised(weights=True, activations=False)
        for layer in self.layers().values():
            layer.release_float_weight()

    def pack_weights(self, cache_bytes: int = 0, integer: bool = False) -> None:
        """Keep only the integers of the weights, packed at their width; may be called again with other arguments.

        ``with qnn.quantized():`` then dequantizes no weights in advance. Each layer dequantizes its weight when it is
        called, and its result is the same to the bit. Afterwards native files can be written, but nothing can be
        loaded; using float weights, calibration, state dicts or published files raises a `UserError`.

        Args:
            cache_bytes: size of the cache of dequantized weights that all layers share (`WeightCache`).
            integer: multiply quantized inputs and weights as integers (`qdiff.kernels.integer_matmul`); results equal
                the simulation's up to float32 rounding. Attention's two products stay simulated, and so do layers whose
                input or weight is in float: all layers outside of ``quantized(activations=True)``, the last layer under
                ``keep_ends``, and in a modulated network without ``rest_bits`` all layers at the first step.

        Raises:
            UserError: the weights have no width or are not quantized yet; or ``integer`` is set and activations have no
                width, ranges differ per channel, or a layer has groups.
        """
        if self.config.weight_bits is None:
            raise UserError(
                "the weights of this network have no width and cannot be packed; add --ptq and --weight_bit"
            )
        self.assert_initialised(weights=True, activations=False)
        if integer:
            self._assert_multiplies_integers()
            int8_is_exact(self.device)  # checked now, since it waits for the device, which a call should not do
        cache = WeightCache(cache_bytes)
        for layer in self.layers().values():
            if len(layer.weight_quantizers) > 0:
                layer.pack()
                layer.packed.cache, layer.packed.multiplies_integers = cache, integer and len(layer.act_quantizers) > 0

    def _assert_multiplies_integers(self) -> None:
        check_integer_products(self.config)
        for name, layer in self.layers().items():
            layer.assert_multiplies_integers(name)

    @property
    def is_packed(self) -> bool:
        """Whether `pack_weights` was called."""
        return any(layer.form is WeightForm.PACKED for layer in self.layers().values())

    def reset_fired(self) -> None:
        """Reset the count of how often each activation quantizer fired."""
        for quantizer in self.act_quantizers().values():
            quantizer.fired = 0

    def silent_quantizers(self) -> list[str]:
        """Return the names of the activation quantizers that have not fired since the last reset."""
        return [name for name, quantizer in self.act_quantizers().items() if quantizer.fired == 0]

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args, **kwargs) -> None:
        for name, layer in self.layers().items():  # check all layers before loading anything
            layer.assert_loads_state_dict(state, f"{prefix}model.{name}.")
        super()._load_from_state_dict(state, prefix, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Device of the network: of its first parameter that has values, if any has."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        first = next(tensors)
        return next((t for t in itertools.chain([first], tensors) if not t.is_meta), first).device


def _kind(quantizer: Quantizer) -> str:
    return "activation" if isinstance(quantizer, ActQuantizer) else "weight"
