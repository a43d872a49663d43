"""What was asked, read once: objects of other libraries become plain data, which can be asked again with changes."""

from __future__ import annotations

from typing import Any, NamedTuple

from peftplan.job import sources
from peftplan.job.loaded import Loaded, read
from peftplan.job.script import NO_SCRIPT, Script


class Request(NamedTuple):
    """A job as somebody asked for it. `options` are those of the setup and of the method, under peftplan's own names."""

    model: object
    """A name, a path, a config; of a loaded model its config."""
    method: str | None = None
    adapter: dict[str, object] | None = None
    """The fields of a `peft_config`."""
    stored: dict[str, object] | None = None
    """What a `quantization_config` says."""
    training: dict[str, object] | None = None
    """What `training_args` say."""
    script: Script = NO_SCRIPT
    options: dict[str, object] = {}  # noqa: RUF012
    loaded: Loaded | None = None

    def changed(self, **changes: Any) -> Request:
        """The same with another method or other options."""
        method = changes.pop("method", self.method)
        return self._replace(method=method, options={**self.options, **changes})

    @property
    def as_loaded(self) -> Loaded | None:
        """A loaded model that says itself what trains: neither a method nor an adapter config is given."""
        return self.loaded if self.method is None and self.adapter is None else None

    def all_options(self) -> dict[str, object]:
        """The options with what objects say beneath them; an option that is None sets nothing."""
        options = self.options
        if self.loaded is not None:
            options = self.loaded.options | {name: value for name, value in options.items() if value is not None}
        if self.stored is None and self.training is None:
            return options
        stored = self.stored or {}
        if options.get("quant") not in (None, stored.get("quant")):
            stored = {}  # another format than the object's: its details do not apply
        set_here = {name: value for name, value in options.items() if value is not None}
        return {**(self.training or {}), **stored, **set_here}


def read_request(
    model: object,
    *,
    method: str | None,
    peft_config: object,
    quantization_config: object,
    training_args: object,
    script: Script,
    **options: object,
) -> Request:
    """Read what was given. Raises InputError for an object that is none of the ecosystem's."""
    loaded = None
    if model is None:
        from peftplan.job import ecosystem

        model = ecosystem.base_model(peft_config)
    elif sources.module_config(model) is not None:
        loaded = read(model)
        model = loaded.config
    request = Request(model, method, script=script, options=options, loaded=loaded)
    if peft_config is None and quantization_config is None and training_args is None:
        return request
    from peftplan.job import ecosystem

    stored = None if quantization_config is None else ecosystem.quant_options(quantization_config)
    training = None if training_args is None else ecosystem.training_options(training_args)
    adapter = None if peft_config is None else ecosystem.adapter_config(peft_config)
    return request._replace(stored=stored, training=training, adapter=adapter)
