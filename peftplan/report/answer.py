"""An estimate in at most 25 lines: verdicts, counts, the peak as a bar, changes that would help, what was assumed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from peftplan.planning.advising import advice_on, unfit
from peftplan.report.bar import bar, legend, segments, unit_of
from peftplan.report.cards import card_name
from peftplan.report.screen import INDENT, TIED, Colour, Glyphs, Part, Row, Screen, flowing, wrapped
from peftplan.report.tabular import assumption_rows, beside_card, reserved_range
from peftplan.results.estimate import Estimate
from peftplan.results.verdict import Verdict
from peftplan.units import GIB, MIB, format_bytes

MOST_LINES = 25
BEST = 3
"""Changes that are shown."""
MOST_UNKNOWN = 2
"""Reasons why a peak is a lower bound that are shown."""
MOST_NAMES = 8
"""Names of a list that are shown."""
WHICH_CARD = "which card? add --gpu NAME; peftplan fit with --which-gpu lists those that fit"
BLANK: Row = ()

COLOURS: dict[str, Colour] = {"fits": "green", "tight": "yellow"}
SOURCE = re.compile(r" \([^()]*\)")
"""Where a reason was read, which stands in parentheses; `-v` shows it."""
DERIVED = ("model", "model_class", "matched_modules", "quantized_parameters")
"""What is printed with the assumptions, and assumes nothing."""
OF_TRAINABLE = ("method", "target_modules", "r")
"""Options without which nobody knows how many parameters train."""
OF_CARD, OF_QUANT = ("compute_capability",), ("kbit_prepare",)
"""What goes without saying where a card is named, and where nothing is quantized."""
BY_WEIGHT = (
    *("trainer", "batch_size", "seq_len", "gradient_checkpointing", "loss", "optim", "target_modules", "dtype", "autocast"),
    *("adapter_dtype", "attn_implementation", "kbit_prepare", "quant", "double_quant", "compute_dtype", "every_n_layers"),
    *("compute_capability", "padding", "gradient_accumulation_steps", "keep_outputs", "use_cache", "keep_gradients"),
)
"""Assumptions, those that move most jobs' peaks the most first; the others follow."""


def answer(result: Estimate, screen: Screen) -> list[Row]:
    """The lines; notes and assumptions are cut where they would be too many."""
    rows = [*head(result, screen), BLANK, *_counts(result, screen), *peak(result, screen), *changes(result, screen)]
    notes, assumed = _notes(result, screen), _assumptions(result, screen)
    if len(rows) + len(notes) + 1 + len(assumed) <= MOST_LINES:
        return [*rows, *notes, BLANK, *assumed]
    rows = [row for row in rows if row]
    return [*rows, *_cut([row for row in (*notes, *assumed) if row], max(MOST_LINES - len(rows), 1))]


def answers(results: Sequence[Estimate], screen: Screen) -> list[Row]:
    """One job on different numbers of GPUs, in at most 25 lines: all verdicts, the peaks, then what helps and was assumed."""
    if len(results) == 1:
        return answer(results[0], screen)
    first = results[0]
    verdicts, peaks = [*_titled(first, screen), *_read(first, screen)], _counts(first, screen)
    for result in results:
        verdicts += [*_shared(result, screen), *_on_cards(result, screen)]
        number = 1 if result.distributed is None else result.distributed.strategy.world_size
        peaks += wrapped(f"{number} GPU{'s' * (number > 1)}: {_peak_in_words(result, screen)}", screen.columns)
    helps = [row for result in results for row in changes(result, screen) if row]
    notes = [*dict.fromkeys(row for result in results for row in _notes(result, screen) if row)]
    parts = [part for part in (verdicts, peaks, helps, notes, _assumptions(first, screen)) if part]
    if sum(map(len, parts)) + len(parts) - 1 <= MOST_LINES:
        return [row for part in parts for row in (BLANK, *part)][1:]
    rows = [row for part in parts for row in part]
    room = max(MOST_LINES - len(verdicts), 1)
    return [*verdicts, *_cut(rows[len(verdicts) :], room)]


def head(result: Estimate, screen: Screen) -> list[Row]:
    """The job, and the verdict on each card."""
    shared = [] if result.distributed is None else _shared(result, screen)
    return [*_titled(result, screen), *shared, *_read(result, screen), *_on_cards(result, screen)]


def _titled(result: Estimate, screen: Screen) -> list[Row]:
    return wrapped(screen.glyphs.dot.join(_title(result)), screen.columns, colour="bold")


def _shared(result: Estimate, screen: Screen) -> list[Row]:
    """How the job is divided among its GPUs."""
    return wrapped("one GPU" if result.distributed is None else result.distributed.words, screen.columns)


def _read(result: Estimate, screen: Screen) -> list[Row]:
    """The files that the job was read from."""
    if not result.config:
        return []
    from peftplan.report import configs

    return wrapped(configs.summary(result.config), screen.columns)


def _on_cards(result: Estimate, screen: Screen) -> list[Row]:
    rows = [row for text in result.warnings for row in wrapped(f"warning: {text}", screen.columns, colour="yellow")]
    return rows + [row for verdict in result.gpus for row in _verdict(verdict, result, screen)]


def _title(result: Estimate) -> Iterable[str]:
    config = result.method["config"]
    rank = f" r={config['r']}" if "r" in config else ""
    return str(result.model["name"]), f"{result.method['name']}{rank}", result.engine


def _verdict(verdict: Verdict, result: Estimate, screen: Screen) -> list[Row]:
    glyphs = screen.glyphs
    mark, colour = _looks(verdict, glyphs)
    assumed = ""
    if verdict.context_assumed and verdict.verdict != "does_not_run":
        assumed = f" (context {verdict.context_bytes / MIB:,.0f} MiB assumed)"
    words = _in_words(verdict, result)
    return wrapped(f"{mark} {card_name(verdict.gpu)}: {words}{assumed}", screen.columns, colour=colour)


def _looks(verdict: Verdict, glyphs: Glyphs) -> tuple[str, Colour]:
    """Mark and colour of a verdict."""
    if verdict.verdict == "fits":
        return glyphs.fits, "green" if verdict.scope is None else "yellow"
    if verdict.verdict == "tight":
        return glyphs.tight, "yellow"
    return (glyphs.unknown, "yellow") if verdict.verdict == "unknown" else (glyphs.fails, "red")


def _in_words(verdict: Verdict, result: Estimate) -> str:
    needed, usable, left = _gib(verdict)
    scope = "" if verdict.scope is None else f", {verdict.scope} only"
    if verdict.verdict == "does_not_run":
        return f"does not run: {SOURCE.sub('', verdict.reason or '')}"
    if verdict.verdict == "does_not_fit":
        least = "at least " if verdict.lower_bound else ""
        return f"does not fit{scope}, needs {least}{needed} GiB of {usable}, {left} short"
    if verdict.verdict == "unknown":
        if result.config and result.config["bound"] == "unknown":
            return f"unknown{scope}: {_open(result)}"
        return f"unknown{scope}, needs at {'most' if verdict.upper_bound else 'least'} {needed} GiB of {usable}: {_open(result)}"
    if verdict.runs_by_releasing_cache:
        return f"tight{scope}, needs {needed} GiB of {usable}: runs only because the allocator releases cached memory"
    return f"{verdict.verdict}{scope}, {'at least ' if verdict.upper_bound else ''}{left} GiB left"


def _open(result: Estimate) -> str:
    """Why a verdict is unknown, and what to do."""
    if result.config and result.config["unsupported"]:
        return "unsupported keys in the file"
    if result.peaks:
        if result.peaks.incomplete:
            return "the peak is a lower bound"
        return "reserved bytes are not known" if result.peaks.reserved is None else "what a late GPU reserves is not known"
    return f"no peak{', add --engine trace' if '--engine trace' in result.not_modelled[0] else ''}"


def _gib(verdict: Verdict) -> tuple[str, str, str]:
    """Needed, usable and what is left or short, in GiB; with more digits where little is left."""
    sizes = (verdict.needed_bytes, verdict.usable_bytes, abs(verdict.headroom_bytes))
    digits = next((digits for digits in (1, 2) if sizes[2] / GIB >= 10**-digits), 3)
    needed, usable, left = (f"{size / GIB:,.{digits}f}" for size in sizes)
    return needed, usable, left


def _counts(result: Estimate, screen: Screen) -> list[Row]:
    return wrapped(counts(result), screen.columns)


def counts(result: Estimate) -> str:
    """How many parameters train, unless a key that is not supported decides it."""
    trainable, total = result.trainable_parameters, result.total_parameters
    keys = result.config["unsupported"] if result.config else {}
    if deciding := [key for key, row in keys.items() if row["option"] in OF_TRAINABLE]:
        return f"trainable parameters unknown: unsupported keys ({', '.join(deciding)})"
    return f"trainable {trainable:,} of {total:,} parameters ({trainable / total:.4%})"


def peak(result: Estimate, screen: Screen) -> list[Row]:
    """The peak by category against the first card, and the peak of each phase."""
    peaks, dot = result.peaks, screen.glyphs.dot
    first = next((v for v in result.gpus if not v.lower_bound), None) if peaks else None
    parts = segments(result, first)
    rows = wrapped(_peak_in_words(result, screen), screen.columns)
    rows.append(bar(parts, first.usable_bytes if first else None, screen.glyphs))
    of = f"{format_bytes(first.needed_bytes)} of {card_name(first.gpu)}'s {format_bytes(first.usable_bytes)}: " if first else ""
    rows += flowing(legend(parts, screen.glyphs), screen.columns, between=dot, before=of)
    if peaks and (ends := reserved_range(peaks)):
        rows += wrapped(ends, screen.columns)
    return [*rows, *(row for beside in beside_card(result) for row in wrapped(f"and {beside}", screen.columns))]


def _peak_in_words(result: Estimate, screen: Screen) -> str:
    peaks = result.peaks
    if not peaks:
        from peftplan.report.configs import REHEARSE

        why = result.not_modelled[0]
        then = f"; {REHEARSE}" if why.endswith("(no formula yet)") else ""
        return f"no peak: {why}; the counted part takes {format_bytes(result.ledger.bytes())}{then}"
    unit, name = unit_of(peaks.allocated)
    others = [f"{phase} {nbytes / unit:,.2f}" for phase, nbytes in peaks.by_phase.items() if phase != peaks.phase]
    bound = {"at_least": "at least ", "at_most": "at most "}.get(result.bound or "", "")
    return f"peak {bound}{peaks.allocated / unit:,.2f} {name} in {peaks.phase}; {screen.glyphs.dot.join(others)}"


def changes(result: Estimate, screen: Screen) -> list[Row]:
    """The best changes for the card that misses the least."""
    if not (cards := unfit(result)):
        tight = any(verdict.verdict == "tight" for verdict in result.gpus)
        return _divided(result, screen) if tight else []
    from peftplan.report import advice

    nearest, advised = cards[0], advice_on(result, cards[0])
    rows = []
    if best := advised.rows(None if advised.everything else BEST):
        outcomes = [advice.outcome(change) for change in best]
        widest = max(map(len, outcomes))
        by = " (by formulas)" if result.engine == "trace" else ""
        rows = wrapped(f"to fit {card_name(nearest.gpu)}, {_gib(nearest)[2]} GiB less{by}:", screen.columns)
        for brings, change in zip(outcomes, best, strict=True):
            line = f"{INDENT}{brings.ljust(widest)}  {advice.command_line(change, nearest.gpu)}"
            rows += wrapped(line, screen.columns, colour=COLOURS.get(change.verdict or ""), indent=" " * (widest + 6))
        if result.config:
            from peftplan.report import configs

            keys = configs.keys_of(result.config, (name for change in best for name in change.options))
            rows += [] if keys is None else wrapped(keys, screen.columns)
    if sentence := advice.without_help(nearest.gpu, advised, strategy=advice.kept_strategy(result)):
        rows += wrapped(sentence, screen.columns)
    return [BLANK, *rows]


def _divided(result: Estimate, screen: Screen) -> list[Row]:
    """What leaves more room on several GPUs, where the job just fits."""
    from peftplan.report.fitting import divided

    sentence = divided(result.assumptions)
    return [] if sentence is None else [BLANK, *wrapped(sentence, screen.columns)]


def _notes(result: Estimate, screen: Screen) -> list[Row]:
    """What a reader must know of the numbers."""
    peaks = result.peaks
    lines = _incomplete(peaks.incomplete) if peaks else []
    if result.config:
        from peftplan.report import configs

        lines += configs.unsupported(result.config, has_peak=bool(result.peaks))
    lines += [f"note: {note}" for note in result.assumptions.get("notes", ()) if note not in result.asides]
    missing = [what for what in result.not_modelled if not (result.gpus and what == "CUDA context")]
    if peaks:
        lines += [f"not counted: {'; '.join(missing)}"] if missing else []
        lines += [WHICH_CARD] if not (result.gpus or result.config or result.distributed) else []
    rows = [row for line in lines for row in wrapped(line, screen.columns)]
    return [BLANK, *rows] if rows else []


def _incomplete(unknown: Sequence[str]) -> list[str]:
    """Why a peak is a lower bound; of many reasons the first ones, and how many more."""
    lines = [f"the peak is a lower bound: {what}" for what in unknown[:MOST_UNKNOWN]]
    more = len(unknown) - MOST_UNKNOWN
    return [*lines, f"and {more} more that the trace could not follow (-v)"] if more > 0 else lines


def _assumptions(result: Estimate, screen: Screen) -> list[Row]:
    """What was assumed and not set, what weighs most first; then what is off."""
    hidden = {*DERIVED, *result.chosen, *(OF_CARD if result.gpus else ()), *(OF_QUANT if _dense(result) else ())}
    values = {name: value for name, value in assumption_rows(result.assumptions) if name not in hidden}
    ordered = [name for name in BY_WEIGHT if name in values]
    ordered += [name for name in values if name not in BY_WEIGHT]
    off = [name for name in ordered if values[name] == "no"]
    by_tool = result.config["defaults"] if result.config else {}
    items = [_item(name, values[name], by_tool.get(name)) for name in ordered if name not in off]
    items += [f"no{TIED}{', '.join(off)}"] if off else []
    return flowing(items, screen.columns, between=screen.glyphs.dot, before="assumed: ")


def _dense(result: Estimate) -> bool:
    return result.assumptions.get("quant") == "none"


def _item(name: str, text: str, at: str | None = None) -> str:
    """A name and its value; what is a tool's default says whose."""
    if at:
        return f"{_item(name, text)} ({at.partition(' ')[0]} default)"
    if text == "yes":
        return name
    names = text.split(", ")
    if len(names) > MOST_NAMES:
        text = f"{', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES} more"
    return f"{name} {text}"


def _cut(rows: list[Row], room: int) -> list[Row]:
    """The first lines; the last one ends with where the others are."""
    if len(rows) <= room:
        return rows
    return [*rows[: room - 1], (Part(f"{INDENT}and {len(rows) - room + 1} more lines: -v"),)]
