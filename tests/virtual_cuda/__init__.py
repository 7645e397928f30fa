"""A virtual GPU for the tests: CPU tensors that say they are on ``cuda:0``, and refuse what CUDA would refuse.

Inside `virtual_cuda()` everything below autograd and autocast comes to `dispatch.run`, which checks devices as CUDA's
kernels do, counts what the host waits for, what is copied and what is launched, computes on the CPU and wraps.

It shows tensors of two devices in one operation, ``.numpy()`` on the device, generators of the wrong device, weights
that were never moved, waits of the host, transfers, launches, and autocast's casts. It cannot show kernels that CUDA
lacks or that round differently, cuDNN, TF32, time, fragmented memory, or streams. Backward passes need the preload of
`preload`: the autograd engine of a CUDA build of torch asks the driver for streams.
"""

from virtual_cuda.checks import DeviceMismatch
from virtual_cuda.counts import Counts, Direction
from virtual_cuda.device import VirtualDevice, virtual_cuda

__all__ = ["Counts", "DeviceMismatch", "Direction", "VirtualDevice", "virtual_cuda"]
