"""A pipeline's folder, read and checked before anything large is loaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from qdiff.diffusers_backend.denoiser import NAMES
from qdiff.errors import UserError, first_line
from qdiff.io.diffusers_files import INDEX, component_names, import_diffusers, read_json


class Folder:
    """A folder that ``DiffusionPipeline.from_pretrained`` loads.

    Args:
        path: the folder.
        scheduler: class of a scheduler of diffusers, built from the folder's config; None takes the folder's own.

    Attributes:
        pipeline_class: class of the pipeline.
        call_parameters: what a call of it takes.

    Raises:
        UserError: it holds no pipeline that this diffusers knows, or the scheduler does not exist.
    """

    def __init__(self, path: str | Path, scheduler: str | None = None) -> None:
        self.path = Path(path)
        self.components = component_names(path)
        index = self.path / INDEX
        diffusers = import_diffusers()
        name = str(read_json(index).get("_class_name"))
        self.pipeline_class = getattr(diffusers, name, None) or _subclass(diffusers.DiffusionPipeline, name)
        if not (inspect.isclass(self.pipeline_class) and issubclass(self.pipeline_class, diffusers.DiffusionPipeline)):
            raise UserError(f"{index} names the pipeline {name}, which diffusers {diffusers.__version__} does not have")
        self.call_parameters = inspect.signature(self.pipeline_class.__call__).parameters
        self._scheduler = self._make_scheduler(diffusers, scheduler)

    def _make_scheduler(self, diffusers: Any, name: str | None) -> Any:
        config = self.path / "scheduler" / "scheduler_config.json"
        if not config.is_file():
            raise UserError(f"{self.path} has no scheduler ({config.name} is missing); copy the folder again")
        values = read_json(config)
        kind = getattr(diffusers, name or str(values.get("_class_name")), None)
        if not (inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)):
            known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
            raise UserError(f"diffusers has no scheduler {name}; give one of {', '.join(known)}")
        try:
            return kind.from_config(values)
        except TypeError as error:
            raise UserError(
                f"{kind.__name__} cannot be made from {config} ({first_line(error)}); give another --scheduler"
            ) from error

    def component(self, name: str | None) -> str:
        """Return the name of the network to quantize.

        Raises:
            UserError: the pipeline has no such component.
        """
        names = [n for n in self.components if (self.path / n / "config.json").is_file()]
        if name is None:
            name = next((n for n in NAMES if n in names), None)
            if name is None:
                raise UserError(f"{self.path} has no {' or '.join(NAMES)}; give --component one of {', '.join(names)}")
        if name not in names:
            raise UserError(f"{self.path} has no component {name}; give --component one of {', '.join(names)}")
        return name

    def calls(self, steps: int) -> int:
        """Return how often the network is called for an image."""
        try:
            self._scheduler.set_timesteps(steps)
        except (TypeError, ValueError):  # some need the image size; they take one call per step
            return steps
        return len(self._scheduler.timesteps)

    @property
    def training_steps(self) -> int:
        """T of the scheduler."""
        return int(getattr(self._scheduler.config, "num_train_timesteps", 1000))

    @property
    def scheduler_name(self) -> str:
        """Class of the scheduler."""
        return type(self._scheduler).__name__

    def describe(self, component: str) -> dict[str, Any]:
        """Return what decides the images besides weights, prompts and options (JSON values)."""
        folder = self.path / component / "config.json"
        network = read_json(folder) if folder.is_file() else {}
        return {
            "class": self.pipeline_class.__name__,
            "component": component,
            "network": {k: v for k, v in network.items() if not k.startswith("_")},
            "scheduler": self.scheduler_name,
        }

    def load(self) -> Any:
        """Return the pipeline in float32, with the scheduler that was asked for, or the folder's.

        Raises:
            UserError: a file is missing or damaged, or the pipeline takes another scheduler than this one.
        """
        try:
            pipe = self.pipeline_class.from_pretrained(str(self.path), local_files_only=True, scheduler=self._scheduler)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise UserError(f"{self.path} cannot be loaded: {first_line(error)}; copy the folder again") from error
        taken = type(getattr(pipe, "scheduler", None)).__name__
        # Some pipelines make a scheduler of their own from the config of any other.
        if taken != self.scheduler_name:
            raise UserError(
                f"{type(pipe).__name__} takes {taken} in place of {self.scheduler_name}; give --scheduler {taken}"
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def weights_of(self, component: str) -> Path | None:
        """Return the file of a component's weights; None if there are several."""
        files = sorted((self.path / component).glob("*.safetensors")) or sorted((self.path / component).glob("*.bin"))
        return files[0] if len(files) == 1 else None


def _subclass(base: type, name: str) -> type | None:
    """Return the imported class of this name that is derived from another."""
    for kind in base.__subclasses__():
        if kind.__name__ == name:
            return kind
        if found := _subclass(kind, name):
            return found
    return None
