"""What happens to every operation: checked as CUDA would, counted, computed on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from virtual_cuda.checks import INDEXING, PRODUCTS, check_devices, check_generator, check_products
from virtual_cuda.counts import Direction, Recorder
from virtual_cuda.operands import (
    inner_of,
    name_of,
    on_device,
    returns_what_it_writes,
    tensors_of,
    written_arguments,
)
from virtual_cuda.tensor import CPU, VirtualTensor, pinned

aten = torch.ops.aten

recorder = Recorder()
plain_attention = torch.nn.functional.scaled_dot_product_attention

_WAITING = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "torch.equal",
    aten.is_nonzero.default: "is_nonzero",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
    aten._linalg_check_errors.default: "whether a factorisation failed",
}
_CLAMPS = {aten.clamp.default, aten.clamp_.default}
# Operations that launch no kernel: views, and memory that is not written.
_NO_KERNEL = {
    *("detach", "alias", "view", "_unsafe_view", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze"),
    *("select", "slice", "split", "split_with_sizes", "unbind", "as_strided", "_reshape_alias", "unfold", "diagonal"),
    *("movedim", "lift_fresh", "is_pinned", "_local_scalar_dense", "empty", "empty_like", "new_empty", "chunk"),
    *("empty_strided", "new_empty_strided", "_fused_sdp_choice", "view_as_real", "is_same_size"),
}


class VirtualMode(TorchDispatchMode):
    """Passes every operation to `run`, those that create tensors included."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every operation would go through `torch._dynamo`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args: tuple, kwargs: dict):
    """Carry out an operation as CUDA would, or raise what it raises."""
    tensors = tensors_of(args, kwargs)
    virtual = [t for t in tensors if isinstance(t, VirtualTensor)]
    asked = kwargs.get("device")
    asked = None if asked is None else _indexed(torch.device(asked))
    to_device = asked is not None and asked.type == "cuda"
    if not virtual and not to_device:
        return _on_the_host(func, args, kwargs)
    if func is aten._to_copy.default:
        return _to_copy(args[0], asked, kwargs)
    if func is aten.copy_.default:
        return _copy_into(*args, **kwargs)
    if virtual:
        check_devices(func, args, tensors)
        check_products(func, tensors)
    target = asked if asked is not None else virtual[0].device
    check_generator(kwargs, target)
    _count(func, args)
    inner_args = tuple(inner_of(value) for value in args)
    inner_kwargs = {name: inner_of(value) for name, value in kwargs.items()}
    if to_device:
        inner_kwargs["device"] = CPU
    result = _compute(func, inner_args, inner_kwargs)
    if returns_what_it_writes(func):
        given = (*args, *kwargs.values())
        written = tuple(given[place] for place in written_arguments(func) if place < len(given))
        if written:
            return written[0] if len(func._schema.returns) == 1 else written
    if target.type != "cuda":
        return result
    return on_device(result, target)


def _on_the_host(func, args: tuple, kwargs: dict):
    """Pinned memory is the one thing of the host that a CUDA build without a GPU refuses."""
    if func is aten._pin_memory.default:
        return pinned.add(args[0].clone())
    if func is aten.is_pinned.default:
        return args[0] in pinned
    check_generator(kwargs, None)
    if kwargs.get("pin_memory"):
        return pinned.add(func(*args, **{**kwargs, "pin_memory": False}))
    return func(*args, **kwargs)


def _indexed(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _count(func, args: tuple) -> None:
    if func in _WAITING:
        recorder.wait(_WAITING[func])
    if func in INDEXING:
        indices = [i for i in args[1] if i is not None]
        for index in indices:
            if not isinstance(index, VirtualTensor):
                _count_transfer(index, CPU, args[0].device, non_blocking=False)
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            recorder.wait("index by a mask")
    name = name_of(func)
    if name not in _NO_KERNEL:
        recorder.kernel(name)


def _compute(func, args: tuple, kwargs: dict):
    if func is aten._scaled_dot_product_efficient_attention.default:
        return _attention(*args, **kwargs)
    if func is aten.cudnn_batch_norm.default:
        return *aten.native_batch_norm.default(*args), torch.empty(0, dtype=torch.uint8)
    if func in (aten._softmax.default, aten._log_softmax.default) and args[2]:  # half_to_float
        return func(args[0].float(), args[1], False)
    special = func in _CLAMPS or func in PRODUCTS
    half = special and any(t.dtype == torch.float16 for t in tensors_of(args, {}))
    # CUDA takes the bounds in float32; the CPU's kernel refuses those that half precision cannot hold.
    if half and func in _CLAMPS:
        found = args[0].float().clamp(*args[1:], **kwargs).half()
        return args[0].copy_(found) if func is aten.clamp_.default else found
    if half:  # CUDA sums products in float32; CPUs without half precision take ten times as long
        args = tuple(a.float() if isinstance(a, Tensor) and a.dtype == torch.float16 else a for a in args)
        return func(*args, **kwargs).half()
    return func(*args, **kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: object, scale: float | None = None) -> tuple:
    made = aten._scaled_dot_product_attention_math.default(q, k, v, bias, scale=scale)[0]
    return made, made.new_empty(0), torch.empty(0), torch.empty(0)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *given: object, scale: float | None = None, **options):
    """Take the place of `scaled_dot_product_attention`: CUDA's fused kernel where it takes the shapes.

    PyTorch's own choice asks the driver. With gradients, masks or odd widths it is the plain composition here.
    """
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    plain = learns or given or options or query.dim() != 4 or query.shape[-1] % 8
    if plain or not isinstance(query, VirtualTensor):
        return plain_attention(query, key, value, *given, scale=scale, **options)
    op = aten._scaled_dot_product_efficient_attention
    return op(query, key, value, None, False, 0.0, False, scale=scale)[0]


def _to_copy(tensor: Tensor, asked: torch.device | None, kwargs: dict) -> Tensor:
    source = tensor.device
    target = source if asked is None else asked
    inner = tensor.inner if isinstance(tensor, VirtualTensor) else tensor
    options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
    if target.type == "meta":
        return aten._to_copy.default(inner, device=target, **options)
    non_blocking = bool(kwargs.get("non_blocking"))
    changes = kwargs.get("dtype", tensor.dtype) != tensor.dtype
    leaves = source.type == "cuda" and target.type == "cpu"
    # Where the host need not wait, the copy goes to pinned memory.
    _count_transfer(tensor, source, target, non_blocking, changes, to_pinned=leaves and non_blocking)
    made = aten._to_copy.default(inner, **options)
    if target.type == "cuda":
        return VirtualTensor(made, target)
    return pinned.add(made) if leaves and non_blocking else made


def _copy_into(own: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    plain = own.dtype == source.dtype and own.shape == source.shape and own.is_contiguous()
    to_pinned = not isinstance(own, VirtualTensor) and own in pinned
    _count_transfer(source, source.device, own.device, bool(non_blocking), not plain, to_pinned)
    aten.copy_.default(inner_of(own), inner_of(source))
    return own


def _count_transfer(
    tensor: Tensor,
    source: torch.device,
    target: torch.device,
    non_blocking: bool,
    converts: bool = False,
    to_pinned: bool = False,
) -> None:
    """Count a copy.

    Args:
        converts: dtype or layout change on the way: what leaves the host is then a pageable temporary.
        to_pinned: the copy's end on the host is pinned memory.
    """
    if source == target:
        recorder.kernel("_to_copy")
        return
    size = tensor.numel() * tensor.element_size()
    if source.type == target.type:
        recorder.transfer(Direction.D2D, True, False, size)
    elif target.type == "cuda":
        is_pinned = tensor in pinned and not converts and tensor.is_contiguous()
        recorder.transfer(Direction.H2D, is_pinned, not (is_pinned and non_blocking), size)
    else:
        recorder.transfer(Direction.D2H, to_pinned, not (to_pinned and non_blocking), size)
