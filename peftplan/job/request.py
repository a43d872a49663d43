"""A request, read once: objects of other libraries become plain data, so that it can be repeated with changes."""

from typing import TYPE_CHECKING, NamedTuple

import peftplan.methods as methods
from peftplan.job import sources
from peftplan.job.script import NO_SCRIPT, OF_DDP, Script

if TYPE_CHECKING:
    from peftplan.job.ecosystem import Training
    from peftplan.job.loaded import Loaded


class Request(NamedTuple):
    """A job as the user requested it. `options`: those of the setup and of the method, under peftplan's own names."""

    model: object
    """A name, a path, or a config; the config of a loaded model."""
    method: str | None = None
    adapter: dict[str, object] | None = None
    """The fields of a `peft_config`."""
    stored: dict[str, object] | None = None
    """Options from a `quantization_config`."""
    training: "Training | None" = None
    """Options from `training_args`, and warnings."""
    script: Script = NO_SCRIPT
    options: dict[str, object] = {}  # noqa: RUF012
    loaded: "Loaded | None" = None

    def changed(self, **changes: object) -> "Request":
        """The same request with another method or other options."""
        method = _name_of(changes.pop("method", self.method))
        removed = {name for name, value in changes.items() if value is None}
        training = None if self.training is None else self.training.without(removed)
        return self._replace(method=method, options={**self.options, **changes}, training=training)

    @property
    def as_loaded(self) -> "Loaded | None":
        """The loaded model, if it decides what trains: neither a method nor an adapter config is set."""
        return self.loaded if self.method is None and self.adapter is None else None

    def all_options(self) -> dict[str, object]:
        """The options, over those from objects. An option that is None sets nothing."""
        options = self.options
        if self.loaded is not None:
            options = self.loaded.options | {name: value for name, value in options.items() if value is not None}
        if self.stored is None and self.training is None:
            return options
        stored = self.stored or {}
        if options.get("quant") not in (None, stored.get("quant")):
            stored = {}  # another format than the object's: its details do not apply
        trained = self.training.options if self.training is not None else {}
        set_here = {name: value for name, value in options.items() if value is not None}
        return {**trained, **stored, **set_here}


def _name_of(method: object) -> str | None:
    """The name of a method. Raises UnknownNameError for what is no text."""
    return method if method is None or isinstance(method, str) else methods.method_named(method).name


def read_request(
    model: object,
    *,
    method: object,
    peft_config: object,
    quantization_config: object,
    training_args: object,
    script: Script,
    **options: object,
) -> "Request":
    """Read the arguments of `estimate`. Raises InputError for an object of no known class."""
    loaded = None
    if model is None:
        from peftplan.job import ecosystem

        model = ecosystem.base_model(peft_config)
    elif sources.is_loaded(model):
        from peftplan.job.loaded import read

        loaded = read(model)
        model = loaded.config
    request = Request(model, _name_of(method), script=script, options=options, loaded=loaded)
    if peft_config is None and quantization_config is None and training_args is None:
        return request
    from peftplan.job import ecosystem

    stored = None if quantization_config is None else ecosystem.quant_options(quantization_config)
    request = request._replace(stored=stored)
    chosen = {name: value for name, value in {"method": request.method, **request.all_options()}.items() if value is not None}
    training = None if training_args is None else ecosystem.training(training_args, chosen, config=sources.load_config(model))
    adapter = None if peft_config is None else ecosystem.adapter_config(peft_config)
    of_ddp = {ours: getattr(training_args, f"ddp_{name}", None) for name, ours in OF_DDP.items()}
    script = script.model_copy(update={name: value for name, value in of_ddp.items() if value is not None})
    return request._replace(script=script, training=training, adapter=adapter)
