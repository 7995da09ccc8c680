"""Models: the worker's model and its names, for OpenAI's routes."""

import time
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from rbee_worker.errors import ModelError, ModelNotFound
from rbee_worker.events import Ready
from rbee_worker.runtime.source import locate
from rbee_worker.worker.worker import Worker

Status = Literal["ready", "loading", "failed"]


class Model(TypedDict):
    """A model that serves, or is to."""

    id: str
    object: Literal["model"]
    created: Annotated[int, Field(description="Seconds since 1970.")]
    owned_by: str
    status: Status
    max_model_len: Annotated[
        int | None, Field(description="Tokens of prompt and output together at most; null until the model is ready.")
    ]


class ModelList(TypedDict):
    """Every name of the model."""

    object: Literal["list"]
    data: list[Model]


class Models:
    """The worker's model and its names.

    Args:
        worker: serves the model.
        names: names for the model beside its own. Answers have the first of them.
    """

    def __init__(self, worker: Worker, names: Sequence[str] = ()) -> None:
        self._worker = worker
        self._names = tuple(dict.fromkeys(names))
        self._created = int(time.time())

    def listed(self) -> list[Model]:
        """An entry for each name of the model: the one that serves, else the one whose load was asked for last.

        Empty: no model serves, and no load is running or has failed. This may read from the disk.
        """
        loads = self._worker.loads
        if (own := self._served()) is not None:
            status: Status = "ready"
        elif (asked := self._asked()) and (loads.running or loads.error is not None):
            status = "loading" if loads.running else "failed"
            own = _name_of(asked)
        else:
            return []
        return [self._model(name, status) for name in self._names or (own,)]

    def find(self, name: str) -> Model:
        """The model with this name.

        Raises:
            ModelNotFound: no model has the name.
        """
        listed = self.listed()
        if listed and name == self._served():
            return {**listed[0], "id": name}
        for model in listed:
            if model["id"] == name:
                return model
        raise ModelNotFound(f"There is no model of this name.{self._hint()}")

    def check(self, name: str | None) -> None:
        """Check the name of the model in a request. While no model serves, every name is accepted.

        Raises:
            ModelNotFound: the model that serves does not have this name.
        """
        served = self._served()
        if not name or served is None or name in (served, *self._names):
            return
        last = self._worker.loads.latest
        if isinstance(last, Ready) and name == self._asked():
            return  # the name with which it was loaded, such as a path
        raise ModelNotFound(f"The requested model is not served here.{self._hint()}")

    @property
    def name(self) -> str:
        """The name of the model in answers; empty without a model and without given names."""
        return self._names[0] if self._names else self._served() or ""

    def _served(self) -> str | None:
        """The model's own name; None: no model serves."""
        model = self._worker.engine.model
        return model.name if model is not None else None

    def _model(self, name: str, status: Status) -> Model:
        model = self._worker.engine.model
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "rbee-worker",
            "status": status,
            "max_model_len": model.context_length if model is not None else None,
        }

    def _asked(self) -> str:
        broadcast = self._worker.loads.broadcast
        return broadcast.model if broadcast is not None else ""

    def _hint(self) -> str:
        return f" This worker serves {self.name}." if self._served() is not None else ""


def _name_of(asked: str) -> str:
    """The name that a model will have after its load, as far as it is known before."""
    try:
        return locate(asked).name
    except ModelError:
        return asked
