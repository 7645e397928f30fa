"""What keeps the benchmark's tests short: a model that is soon exported, and processes that are none."""

from __future__ import annotations

import pickle
from typing import Any, ClassVar

from qdiff.benchmark.fresh_process import ProcessMemory

# One level, 6 blocks: exporting takes seconds where the tiny model of the other tests takes ten.
SMALL = """
data: {dataset: DIGITS, image_size: 8, channels: 1}
model:
  {in_channels: 1, out_ch: 1, ch: 32, ch_mult: [1], num_res_blocks: 1, attn_resolutions: [], dropout: 0.1,
   resamp_with_conv: true}
diffusion: {beta_schedule: linear, beta_start: 0.0001, beta_end: 0.0005, num_diffusion_timesteps: 1000}
"""


class HereProcess:
    """Behaves as `FreshProcess` and runs its tasks here: a real one takes seconds to start.

    Attributes:
        tasks: names of all tasks so far, of all processes.
        open, most_open: how many processes are there, and were at the same time.
    """

    tasks: ClassVar[list[str]] = []
    open = most_open = 0

    @classmethod
    def forget(cls) -> None:
        cls.tasks.clear()
        cls.open = cls.most_open = 0

    def __enter__(self) -> HereProcess:
        cls = type(self)
        cls.open += 1
        cls.most_open = max(cls.open, cls.most_open)
        return self

    def __exit__(self, *_: object) -> None:
        type(self).open -= 1

    def run(self, task: Any, *args: Any) -> Any:
        self.tasks.append(task.__name__)
        return pickle.loads(pickle.dumps(task(*pickle.loads(pickle.dumps(args)))))  # as they would travel

    def measured(self, task: Any, *args: Any) -> ProcessMemory:
        self.tasks.append(task.__name__)
        self.kept = task(*pickle.loads(pickle.dumps(args)))
        return ProcessMemory(1_000_000, 3_000_000, 6_000_000)

    def on_kept(self, task: Any, *args: Any) -> Any:
        self.tasks.append(task.__name__)
        return task(self.kept, *args)
