"""Any diffusers pipeline as the commands' `Pipeline`: its own loop samples, and its network is called through us."""

from __future__ import annotations

import contextlib
import copy
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qdiff.diffusers_backend.denoiser import read_call
from qdiff.diffusers_backend.folder import Folder
from qdiff.diffusers_backend.interception import UNIFORM, Reached, ended_at_a_step, intercepted, refusals_told
from qdiff.diffusers_backend.module import Denoiser
from qdiff.diffusers_backend.recording import arguments_of, check_options, count_classes
from qdiff.errors import UserError, require_at_least
from qdiff.io.prompt_lines import read_prompts
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel
from qdiff.sampling import Network, OnCall, OnStep
from qdiff.sampling.noise import CALIBRATION_STREAM


@dataclass(frozen=True)
class Loop:
    """A pipeline's own sampling loop, in the place of a `qdiff.sampling.Sampler`.

    Attributes:
        seed: the noise of image i depends only on (seed, i).
        calls: network calls per image.
    """

    seed: int
    calls: int

    def visited(self) -> list[float]:
        """Return nothing: what the network gets as timesteps is not known before the loop runs."""
        return []


class DiffusersPipeline(Pipeline):
    """A folder that diffusers loads.

    Args:
        folder: holds model_index.json.
        component: the network to quantize; None takes ``unet`` or ``transformer``.
        scheduler: class of a scheduler of diffusers; None takes the folder's.
        steps: num_inference_steps.
        seed: the noise of image i depends only on (seed, i).
        count, batch_size: images per run and per batch.
        prompts: used in turn; for text pipelines.
        options: further keywords of the pipeline's call; ``class_labels`` are used in turn.
        precision: ``autocast`` calls the network in half precision on CUDA.

    Raises:
        UserError: the folder holds no pipeline, or an option does not suit it.
    """

    _calls_in_loop: int | None = None  # counted when they are first needed

    def __init__(
        self,
        folder: str | Path,
        component: str | None = None,
        scheduler: str | None = None,
        steps: int = 50,
        seed: int = 1234,
        count: int = 1,
        batch_size: int = 4,
        prompts: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        precision: str = "full",
    ) -> None:
        require_at_least(1, {"--steps": steps})
        self.folder = Folder(folder, scheduler)
        self.prompts, self.options = list(prompts), dict(options or {})
        check_options(self.folder.pipeline_class, self.prompts, self.options)
        self.component, self.precision_name = self.folder.component(component), precision
        super().__init__(Path(folder).name, Loop(seed, self.folder.calls(steps)), count, batch_size)
        self.labels = self._asked(self.options.get("class_labels"))
        if "num_inference_steps" in self.folder.call_parameters:
            self.options["num_inference_steps"] = steps
        self.config = {
            "pipeline": self.folder.describe(self.component),
            "sampler": {
                "kind": self.folder.scheduler_name,
                "steps": steps,
                "guidance_scale": self.options.get("guidance_scale"),
            },
            "weights": str(folder),
            "prompts": self.prompts,
            "options": self.options,
            "precision": precision,
            "num_images": count,
        }

    @classmethod
    def from_args(cls, args: Namespace) -> DiffusersPipeline:
        """Return the pipeline that the options of `options.add_pipeline_options` describe.

        Raises:
            UserError: the options contradict each other.
        """
        require_at_least(1, {"--n_samples": args.n_samples, "--batch_size": args.batch_size})
        require_at_least(0, {"--seed": args.seed})
        if args.prompt is not None and args.from_file is not None:
            raise UserError("--prompt and --from-file contradict each other; leave one of them out")
        prompts = [] if args.prompt is None else [args.prompt]
        if args.from_file is not None:
            prompts = read_prompts(args.from_file)
        given = {n: getattr(args, n) for n in ("guidance_scale", "negative_prompt", "height", "width")}
        options = {name: value for name, value in given.items() if value is not None}
        if args.classes is not None:
            options["class_labels"] = _numbers(args.classes)
        together = args.batch_size or min(4, args.n_samples)
        return cls(
            args.pipeline,
            args.component,
            args.scheduler,
            args.steps,
            args.seed,
            args.n_samples,
            together,
            prompts,
            options,
            args.precision,
        )

    def _asked(self, classes: Sequence[int] | None) -> list[int] | None:
        """Return the requested class of each image; None if no classes are given."""
        return [classes[i % len(classes)] for i in range(self.count)] if classes else None

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.network.input_shape

    @property
    def context_shape(self) -> tuple[int, int] | None:
        return self.network.context_shape

    @property
    def conditional(self) -> bool:
        return self.context_shape is not None

    @property
    def training_steps(self) -> int:
        return self.folder.training_steps

    def load(self, device: torch.device, network: bool = True) -> None:
        """Load the pipeline; its network is loaded in any case, since the pipeline cannot be built without."""
        self.pipe = self.folder.load()
        if self.labels is None and "class_labels" in self.folder.call_parameters:
            self.labels = self._asked(range(count_classes(self.pipe)))
        network = self.pipe.components[self.component]
        self.network, self.weights = Denoiser(network), self.folder.weights_of(self.component)
        self.move_to(device)
        self.probe()

    def move_to(self, device: torch.device) -> None:
        self.device = device
        self.pipe.to(device)

    def probe(self, rows: Sequence[int] = (0, 1)) -> tuple[Tensor, ...]:
        """Return the network's inputs at the first call for some images, and note how it is called."""
        heard: list[tuple[Tensor, Tensor, Tensor | None]] = []

        def first_call(*args: Any, **keywords: Any) -> None:
            heard.append(self.network.describe(*read_call(self.network.network, args, keywords)))
            raise Reached

        with contextlib.suppress(Reached), intercepted(self.network.network, first_call), torch.no_grad():
            self._run(rows, calibration=True)
        if not heard:
            raise UserError(f"{type(self.pipe).__name__} does not call its {self.component}; name another --component")
        return tuple(i for i in heard[0] if i is not None)

    def under_own_names(self, qnn: QuantModel) -> QuantModel:
        view = copy.copy(qnn)
        view._modules = {**qnn._modules, "model": qnn.model.network}
        return view

    def precision(self) -> contextlib.AbstractContextManager:
        if self.precision_name == "autocast" and self.device.type == "cuda":
            return torch.autocast("cuda")
        return contextlib.nullcontext()

    def _run(self, rows: Sequence[int], calibration: bool) -> Any:
        seed = self.sampler.seed + (CALIBRATION_STREAM if calibration else 0)
        made = arguments_of(self.pipe, rows, self.prompts, seed, self.options)
        if "output_type" in self.folder.call_parameters and not (calibration and hasattr(self.pipe, "vae")):
            made["output_type"] = "np"
        with refusals_told(self.pipe):
            return self.pipe(**made)

    def count_calls(self, rows: Sequence[int]) -> int:
        """Return how often the loop calls its network: it is run, with the network's first answer every time.

        Raises:
            UserError: the answer is no sample, as of a ControlNet.
        """
        answers: list[Tensor] = []

        def again(*inputs: Tensor) -> Tensor:
            answers.append(answers[0] if answers else self.network(*inputs))
            if answers[0].dim() != inputs[0].dim():
                raise UserError(f"{self.component} answers with something else than a sample; {UNIFORM}")
            return answers[0]

        self.sample(again, rows, calibration=True)
        return len(answers)

    @torch.no_grad()
    def sample(
        self,
        network: Network,
        rows: Sequence[int],
        calibration: bool = False,
        on_call: OnCall | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Run the pipeline's loop for the images numbered ``rows`` with ``network`` in the place of its own.

        Returns:
            Images [N, C, H, W] in [−1, 1]; with ``calibration``, whatever the loop ends with.
        """
        if on_step is not None:
            raise UserError("a diffusers pipeline does not show its predicted x_0; leave out --sequence")

        def called(*args: Any, **keywords: Any) -> Any:
            dtype = next(a for a in (*args, *keywords.values()) if isinstance(a, Tensor)).dtype
            x, t, context = self.network.describe(*read_call(self.network.network, args, keywords))
            if on_call is not None:
                on_call(*_halves(x, t, context, len(rows)))
            with self.precision():
                output = network(x, t) if context is None else network(x, t, context)
            output = output.to(dtype)
            return (output,) if keywords.get("return_dict", True) is False else SimpleNamespace(sample=output)

        # Some pipelines give their scheduler no generator, so that its noise is drawn from the global one.
        forked = torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])
        with intercepted(self.network.network, called), forked:
            torch.manual_seed(self.sampler.seed + rows[0])
            made = self._run(rows, calibration).images
        images = torch.as_tensor(made) if isinstance(made, Tensor) else torch.from_numpy(made).movedim(-1, 1)
        return images if calibration else images.to(self.device) * 2 - 1

    def sample_latents(self, network: Network, rows: Sequence[int]) -> Tensor:
        if self._calls_in_loop is None:  # guidance may call the network twice a step
            self._calls_in_loop = self.count_calls(rows)
        calls, last = 0, self._calls_in_loop

        def counted(*inputs: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return network(*inputs)

        with ended_at_a_step(self.pipe, lambda: calls == last) as made:
            self.sample(counted, rows, calibration=True)
        if not made:
            raise UserError(
                f"{type(self.pipe).__name__} takes no step of its scheduler after its last network call, so that its "
                f"result is not seen; {UNIFORM}"
            )
        return made[0]

    def with_steps(self, steps: int) -> DiffusersPipeline:
        made = copy.copy(self)
        made._calls_in_loop = None
        if "num_inference_steps" in self.options:
            made.options = {**self.options, "num_inference_steps": steps}
            made.sampler = Loop(self.sampler.seed, self.folder.calls(steps))
        return made


def _halves(
    x: Tensor, t: Tensor, context: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return a call's inputs before guidance doubled the batch: (x, t, condition, unconditional)."""
    if len(x) == count:
        return x, t, context, None
    if len(x) == 2 * count and context is not None:  # diffusers puts the unconditional half first
        return x[:count], t[:count], context[count:], context[:count]
    raise UserError(
        f"the pipeline calls its network with {len(x)} rows for {count} images; record it with qdiff.quantize_pipeline"
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--classes is {text}; give numbers separated by commas, e.g. 0,1,7") from None
