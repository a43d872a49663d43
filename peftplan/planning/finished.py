"""The results of training: an adapter's file or a merged model's, and what merging needs. The sums are in
`peftplan.deployment`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from peftplan import parameters
from peftplan.deployment import adapter_file, checkpoint, merging, residents
from peftplan.deployment.merging import Need
from peftplan.deployment.safetensors import StoredTensor, file_bytes
from peftplan.deployment.scratch import Device
from peftplan.errors import RefusedError
from peftplan.job.adapting import config_of
from peftplan.job.inventory import adapter_dtypes
from peftplan.job.job import Job
from peftplan.storage import QuantConfig

LOADED_ADAPTER_DTYPE = "fp32"
"""What `PeftModel.from_pretrained` makes of an adapter in 16 bits (`autocast_adapter_dtype`), and so what is merged."""


@dataclass(frozen=True)
class AdapterFile:
    """`adapter_model.safetensors` of one adapter: its bytes with the header, and its tensors."""

    num_bytes: int
    tensors: tuple[StoredTensor, ...] = field(repr=False)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of its tensors."""
        return tuple(sorted({tensor.dtype for tensor in self.tensors}))

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        count = len(self.tensors)
        return {"name": "adapter_model.safetensors", "bytes": self.num_bytes, "tensors": count, "dtypes": list(self.dtypes)}


class Checkpoint(NamedTuple):
    """The merged model's safetensors files: bytes of each, headers included; the index of a sharded one is not among them."""

    dtype: str
    files: tuple[int, ...]
    tensors: int

    @property
    def num_bytes(self) -> int:
        """All files."""
        return sum(self.files)

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        return {"dtype": self.dtype, "bytes": self.num_bytes, "files": list(self.files), "tensors": self.tensors}


class MergeMemory(NamedTuple):
    """Bytes at the peak of `merge_and_unload` in one place: `cpu`, `gpu`, or `gpu_quantized`, into weights as they are stored."""

    place: str
    base: int
    adapter: int
    need: Need

    @property
    def total(self) -> int:
        """The sum."""
        return self.base + self.adapter + self.need.num_bytes

    def to_dict(self) -> dict[str, object]:
        """JSON values; `host` waits on the CPU while the GPU merges."""
        return {
            "base": self.base,
            "adapter": self.adapter,
            "temporaries": self.need.num_bytes,
            "total": self.total,
            "host": self.need.host_bytes,
            "largest": self.need.module.replace("{}", "*"),
        }


def shown_name(job: Job) -> str:
    """The method as results name it."""
    return job.method_name.replace("_", "-")


def peft_type_of(job: Job) -> str | None:
    """peft's name for the method, or None."""
    if job.method is not None:
        return job.method.peft_type
    return str(getattr(job.adapter["peft_type"], "value", job.adapter["peft_type"]))


def file_of(job: Job, fields: Mapping[str, object]) -> AdapterFile:
    """The file as training leaves it, in the dtypes of the trained tensors; `fields` holds fields that change no count too."""
    peft_type = peft_type_of(job)
    if peft_type is None:
        raise RefusedError(f"{shown_name(job)} is not a peft method, so peft writes no adapter file for it")
    adapter_dtype, trained_dtype = adapter_dtypes(job.setup)
    if job.method is None:
        from peftplan.libraries.saved import saved_tensors

        base_dtype = "fp32" if job.setup.kbit_prepare else job.setup.dtype
        in_file = saved_tensors(
            config_of(job.model, job.setup),
            job.adapter,
            task_type=job.architecture.task_type,
            dtype=base_dtype,
            adapter_dtype=trained_dtype or adapter_dtype,
        )
        return AdapterFile(file_bytes(in_file), in_file)
    trained = parameters.build(
        job.architecture,
        job.adaptation,
        dtype=job.setup.dtype,
        adapter_dtype=adapter_dtype,
        quant=job.quant,
        kbit_prepare=bool(job.setup.kbit_prepare),
        trained_dtype=trained_dtype,
        cast_back=job.setup.by.casts_back,
    )
    saving = adapter_file.Saving(
        peft_type,
        bias=str(getattr(job.config, "bias", fields.get("bias", "none"))),
        save_projection=bool(fields.get("save_projection", True)),
        token_indices=bool(getattr(job.config, "trainable_token_indices", fields.get("trainable_token_indices"))),
    )
    tensors = adapter_file.adapter_tensors(job.architecture, job.adaptation, trained, saving, adapter_dtype=adapter_dtype)
    return AdapterFile(file_bytes(tensors), tensors)


def loaded_parameters(job: Job, *, adapter_dtype: str, quant: QuantConfig | None) -> parameters.Parameters:
    """Base and adapter as loaded for inference, without preparation for training."""
    return parameters.build(
        job.architecture, job.adaptation, dtype=job.setup.dtype, adapter_dtype=adapter_dtype, quant=quant, kbit_prepare=False
    )


def adapter_bytes(job: Job) -> int:
    """Bytes of the adapter's file. Raises RefusedError where peft writes none."""
    fields = {} if job.config is None else job.config.model_dump()
    return file_of(job, {**fields, **job.adapter}).num_bytes


def model_bytes(job: Job) -> int:
    """Bytes of the model's files, of a method that trains the base itself."""
    return checkpoint_of(job).num_bytes


def merge_on_cpu(job: Job) -> int:
    """Host memory at the peak of a merge into the base in its own dtype. Raises RefusedError where there is none."""
    merging.refuse_unmergeable(peft_type_of(job), name=shown_name(job), quant=None)
    return _merge_on(job, "cpu", None).total


def checkpoint_of(job: Job) -> Checkpoint:
    """The merged model in the dtype of the base, not quantized; of a method that trains the base itself, that base."""
    if shown_name(job) not in merging.TRAINS_BASE:
        merging.refuse_unmergeable(peft_type_of(job), name=shown_name(job), quant=None)
    dense = loaded_parameters(job, adapter_dtype=LOADED_ADAPTER_DTYPE, quant=None)
    storages = checkpoint.merged_storages(job.architecture, job.adaptation, dense, dtype=job.setup.dtype)
    return Checkpoint(job.setup.dtype, checkpoint.shards(storages), sum(map(len, storages)))


def merges_of(job: Job) -> tuple[MergeMemory, ...]:
    """Into the base in its own dtype, on the CPU and on a GPU."""
    merging.refuse_unmergeable(peft_type_of(job), name=shown_name(job), quant=None)
    return _merge_on(job, "cpu", None), _merge_on(job, "gpu", None)


def quantized_merge(job: Job) -> MergeMemory:
    """Into the base as it is stored, on a GPU."""
    merging.refuse_unmergeable(peft_type_of(job), name=shown_name(job), quant=job.quant)
    return _merge_on(job, "gpu", job.quant)


def _merge_on(job: Job, device: Device, quant: QuantConfig | None) -> MergeMemory:
    loaded, dtype = loaded_parameters(job, adapter_dtype=LOADED_ADAPTER_DTYPE, quant=quant), job.setup.dtype
    kind = merging.Merging(str(peft_type_of(job)), dtype, LOADED_ADAPTER_DTYPE, device, quant)
    adapter = residents.adapter_bytes(job.adaptation, loaded, dtype=LOADED_ADAPTER_DTYPE, device=device)
    return MergeMemory(
        place=device if quant is None else "gpu_quantized",
        base=residents.base_bytes(job.architecture, loaded, dtype=dtype, device=device),
        adapter=adapter + residents.shared_bytes(job.adaptation, dtype=LOADED_ADAPTER_DTYPE, device=device),
        need=merging.largest_need(job.architecture, job.adaptation, loaded, kind),
    )
