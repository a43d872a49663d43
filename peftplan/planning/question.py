"""A job and its cards, as data: the inputs of an estimate, from which it is repeated at other sizes or with changes."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, cast

from peftplan.errors import NeedsTraceError, NoRankFormulaError, RefusedError
from peftplan.job.adapting import config_of
from peftplan.job.inventory import Inventory, inventory, on_each_device, weights_in_vllm
from peftplan.job.job import Job
from peftplan.job.prepare import prepared
from peftplan.job.requirements import refused_batch, unmet
from peftplan.job.resolving import check_length, check_logits_to_keep
from peftplan.job.setup import AdviceSearch, Engine, parse_setup
from peftplan.job.tasks import without_loss
from peftplan.planning.assumed import NO_PICTURES, NOT_COUNTED, assumptions, config_facts, model_facts, outside
from peftplan.planning.over_gpus import over_gpus, refused_dtypes, release_notes
from peftplan.planning.verdicts import capability, card_notes, kernels_on, placed_on, verdict, vllm_of
from peftplan.results.estimate import Estimate
from peftplan.results.peaks import Peaks
from peftplan.results.verdict import Verdict

if TYPE_CHECKING:
    from peftplan.arrays import Sizes
    from peftplan.hardware.gpus import Gpu
    from peftplan.job.configs.plan import Bound
    from peftplan.results.advice import Advised
    from peftplan.results.config_documents import ConfigDocument
    from peftplan.results.documents import Assumptions
    from peftplan.results.grid import Grid
    from peftplan.results.host import Host


class Question(NamedTuple):
    """What `Estimate.origin` is: a job with its tensors, the cards, and how widely advice is searched."""

    inventory: Inventory
    cards: "tuple[Gpu, ...]" = ()
    search: AdviceSearch = "best"
    config: "ConfigDocument | None" = None
    """What the file of another tool says (`job.configs.plan.ConfigPlan.to_dict`)."""

    @property
    def first_card(self) -> "Gpu | None":
        """The card whose peaks and lines the estimate shows."""
        return self.cards[0] if self.cards else None

    @property
    def bound(self) -> "Bound | None":
        """What the peak is where the file has keys that no option says."""
        return self.config["bound"] if self.config else None

    @property
    def open(self) -> str | None:
        """Why there is no peak: keys that no option says and whose effect is not known."""
        if self.config is None or self.bound != "unknown":
            return None
        keys = [key for key, row in self.config["unsupported"].items() if row["effect"] == "unknown"]
        return f"unsupported keys ({', '.join(keys or self.config['unsupported'])})"

    def at(self, sizes: "Mapping[str, Sizes | None]", *, replays: int | None) -> "Estimate | Grid":
        """The job at other sizes: an Estimate for whole numbers, a Grid where one of them is a list or an array."""
        sizes = {name: value for name, value in sizes.items() if value is not None}
        if not any(isinstance(value, (list, tuple, range)) or getattr(value, "shape", ()) for value in sizes.values()):
            others = {name: value for name, value in sizes.items() if name not in ("batch_size", "seq_len")}
            if others:
                return analytic(self._replace(inventory=self._with(sizes)))
            setup = self.inventory.job.setup
            lengths, batch_size = "seq_len" in sizes, sizes.get("batch_size", setup.batch_size)
            return analytic(self._resized(batch_size, sizes.get("seq_len", setup.seq_len), sets_length=lengths))
        from peftplan.planning.at_sizes import grid

        setup = self.inventory.job.setup
        own = {"batch_size": setup.batch_size, "seq_len": setup.seq_len}
        return grid(self._with, {**own, **sizes}, cards=self.cards, replays=replays)

    def _with(self, options: Mapping[str, object]) -> Inventory:
        """The job with other options."""
        return inventory(prepared(self.inventory.job.request.changed(**options))) if options else self._of_any

    @property
    def _of_any(self) -> Inventory:
        """The job as none of its GPUs in particular: at other sizes another one may need the most."""
        holding = self.inventory.holding
        of_one = holding is not None and (holding.device is not None or holding.rank is not None)
        return inventory(self.inventory.job) if of_one else self.inventory

    def _resized(self, batch_size: object, seq_len: object, *, sets_length: bool) -> "Question":
        job = self.inventory.job
        sizes = {"batch_size": batch_size} | ({"seq_len": seq_len} if sets_length else {})
        setup = parse_setup({**job.setup.model_dump(exclude_unset=True), **sizes})
        check_length(setup.seq_len, job.architecture.max_positions)
        check_logits_to_keep(setup.logits_to_keep, setup.seq_len)
        resized = job._replace(setup=setup, request=job.request.changed(**sizes))
        return self._replace(inventory=self._of_any._replace(job=resized))

    def advice(self, estimate: Estimate) -> "dict[str, Advised]":
        """What to change for each card that the job does not fit."""
        from peftplan.planning.advising import advice

        return advice(estimate)

    def advise(self, on_card: Verdict) -> "Advised":
        """What to change so that the job fits a card."""
        from peftplan.planning.advice import advise
        from peftplan.planning.trials import trials

        job = self.inventory.job
        card = next(card for card in self.cards if card.id == on_card.gpu)

        def changed(**changes: object) -> Inventory:
            if self.config is not None:
                from peftplan.job.configs.with_file import check_map

                check_map(str(self.config["tool"]), changes)
            return inventory(prepared(job.request.changed(**changes))) if changes else self.inventory

        def judged(other: Inventory, cards: "list[Gpu]") -> Estimate:
            return analytic(Question(other, tuple(cards)), skip_unfit=True)

        return advise(job, trials(card, on_card, job.setup, changed, judged), everything=self.search == "all")

    def host(self, offloaded: int) -> "Host":
        """What the job needs besides the card; `offloaded` are bytes of checkpointed inputs in host memory."""
        from peftplan.planning.host import host

        job, built, static, _ = self.inventory
        return host(job, built, static, offloaded)


class Counted(NamedTuple):
    """What an engine says with one card's kernels. `runs_within`: whether the job runs where the allocator can take so many
    bytes: it releases cached memory before it fails.
    """

    peaks: Peaks | None = None
    runs_within: Callable[[int], bool] | None = None


def analytic(question: "Question", *, skip_unfit: bool = False) -> Estimate:
    """The estimate by formula, without peaks where a part of the job has none.

    `skip_unfit`: no replay for a job whose tensors alone do not fit a card.
    """
    from peftplan.analytic.engine import analytic_peaks

    job = question.inventory.job
    by_kernels: dict[object, Counted] = {}

    def peaks_on(card: "Gpu | None") -> Counted | str:
        if (why := without_loss(job.model, job.architecture, job.setup)) is not None:
            return why
        try:
            of, _ = here = kernels_on(card)
            if of not in by_kernels and here not in by_kernels:
                peaks = analytic_peaks(placed_on(question.inventory, card), compute_capability=of)
                by_kernels[here if peaks.by_processors else of] = Counted(peaks, peaks.runs_within)
            return by_kernels[of if of in by_kernels else here]
        except NeedsTraceError as missing:
            return f"{missing}{_hint(missing, job)}"

    return _estimated(question, peaks_on, engine="analytic", skip_unfit=skip_unfit)


def _hint(missing: NeedsTraceError, job: Job) -> str:
    """What to do about a part of the job without a formula."""
    if isinstance(missing, NoRankFormulaError):
        from peftplan.trace.followed import is_followed

        return NeedsTraceError.hint if is_followed(job) else missing.hint
    return missing.hint


def traced(question: "Question", *, record: bool, progress: Callable[[str, float], None] | None) -> Estimate:
    """The estimate by a trace. Raises RefusedError for what a trace does not follow, and for a model without a loss."""
    from peftplan.trace.followed import check_followed

    job = question.inventory.job
    check_followed(job)
    if (why := without_loss(job.model, job.architecture, job.setup)) is not None:
        raise RefusedError(why)
    from peftplan.planning.traced_reserved import with_care

    traced_on: dict[object, Counted] = {}

    def peaks_on(card: "Gpu | None") -> Counted:
        key = kernels_on(card)
        if key not in traced_on:
            of_card = placed_on(question.inventory, card)
            recorded = record and card == question.first_card
            ranks = traced_ranks(of_card, capability(card))
            peaks, runs_within = _trace(of_card.job, capability(card), ranks=ranks, record=recorded, progress=progress)
            traced_on[key] = Counted(*with_care(of_card, capability(card), peaks, runs_within))
        return traced_on[key]

    if not question.open and (peaks := peaks_on(question.first_card).peaks) is not None and peaks.devices:
        devices = zip((peak.allocated for peak in peaks.devices), on_each_device(question.inventory), strict=True)
        question = question._replace(inventory=max(devices, key=itemgetter(0))[1])
    return _estimated(question, peaks_on, engine="trace")


def traced_ranks(of_any: "Inventory", compute_capability: str) -> tuple[int, ...]:
    """The ranks that are traced: under ZeRO-1 and ZeRO-2 those that allocate and reserve most by formula."""
    distributed = of_any.job.distributed
    if distributed is None or distributed.strategy not in ("zero1", "zero2"):
        return (0,)
    from peftplan.analytic.engine import analytic_peaks
    from peftplan.analytic.of_ranks import OfRanks
    from peftplan.distributed.zero import likely_ranks

    try:
        peaks = analytic_peaks(of_any, compute_capability=compute_capability)
    except NeedsTraceError:
        return likely_ranks(of_any.parameters, distributed)
    assert isinstance(peaks, OfRanks)
    return peaks.largest_ranks


def _trace(
    job: Job, compute_capability: str, *, ranks: tuple[int, ...], record: bool, progress: Callable[[str, float], None] | None
) -> "tuple[Peaks, Callable[[int], bool]]":
    """The peaks of the trace engine, with the kernels of a card."""
    from peftplan.trace.collector import old_objects_let_be
    from peftplan.trace.traced import trace_peaks, traced_config

    with old_objects_let_be():
        return trace_peaks(
            config_of(job.model, job.setup),
            architecture=job.architecture,
            peft_config=traced_config(job.method, job.config, job.adapter, job.adaptation),
            quant=job.quant,
            setup=job.setup,
            script=job.script,
            distributed=job.distributed,
            ranks=ranks,
            compute_capability=compute_capability,
            multiprocessors=job.multiprocessors,
            record=record,
            progress=progress,
        )


def _estimated(
    question: "Question",
    peaks_on: "Callable[[Gpu | None], Counted | str]",
    *,
    engine: Engine,
    skip_unfit: bool = False,
) -> Estimate:
    """The result: peaks and lines are those of the first card, the verdict on each card is from its own.

    `peaks_on`: a card → the peaks, or what part of the job has none.
    """
    (job, built, static, _), cards = question.inventory, question.cards
    of_first = capability(question.first_card)
    counted = [question.open or peaks_on(card) for card in cards or (None,)]
    by_card = [Counted() if isinstance(peaks, str) else peaks for peaks in counted]
    peaks = by_card[0].peaks
    setup = job.setup
    refused_size = refused_batch(setup, job.replicas)
    vllm = vllm_of(setup, weights_in_vllm(question.inventory) if setup.use_vllm else 0)
    standing = static.bytes() if vllm or any(peaks.peaks is None for peaks in by_card) else 0
    assumed = assumptions(job, quantized=built.quantized)
    notes = card_notes(cards, job)
    if peaks is not None:
        notes += [*((NO_PICTURES,) if peaks.scope else ()), *release_notes(job, peaks)]
    if notes:
        assumed["notes"] = [*assumed.get("notes", ()), *notes]
    if peaks is not None:
        assumed |= cast("Assumptions", {"compute_capability": of_first, **peaks.assumed})
    short = None if setup.host_memory is None else question.host(assumed.get("offloaded_bytes", 0)).why_short
    refused = refused_size or short or refused_dtypes(job, built)
    warned = f"batch_size: {refused}" if refused_size else refused
    if (config := question.config) is not None:
        config = config.copy()
        config["bound"] = question.bound
    return Estimate(
        engine=engine,
        model=model_facts(job.architecture),
        method={
            "name": job.method.name if job.method else str(job.adapter.get("peft_type")).lower(),
            "config": config_facts(job.config, job.adapter),
        },
        parameters=built,
        adaptation=job.adaptation,
        lasting=static,
        assumptions=assumed,
        not_modelled=(f"{counted[0]}", *NOT_COUNTED) if peaks is None else outside(job, map(capability, cards or (None,)), peaks),
        gpus=tuple(
            verdict(
                card,
                standing,
                *of_card,
                refused=refused or unmet(setup, card.compute_capability),
                skip_unfit=skip_unfit,
                bound=question.bound,
                vllm=vllm,
            )
            for card, of_card in zip(cards, by_card, strict=False)
        ),
        peaks=peaks,
        warnings=job.warnings if warned is None or cards else (*job.warnings, warned),
        chosen=job.chosen - (question.config["defaults"].keys() if question.config else set()),
        asides=job.architecture.asides,
        origin=question,
        distributed=over_gpus(question.inventory, peaks),
        config=config,
    )
