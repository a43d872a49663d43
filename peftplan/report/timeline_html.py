"""A timeline as one page: no network, nothing but this file; the drawing stands without its script."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape

from peftplan.ledger import Category
from peftplan.report.colours import COLOURS
from peftplan.report.timeline_svg import HEIGHT, LEFT, RIGHT, WIDTH, drawing
from peftplan.results.series import Series
from peftplan.units import format_bytes


def page(series: Series, *, title: str, notes: Sequence[str] = ()) -> str:
    """The whole document; its policy forbids every request."""
    total = series.total
    at = max(range(len(total)), key=total.__getitem__)
    highest = f"Peak {format_bytes(total[at])} ({total[at]:,} bytes), in {series.phase_at(series.times[at])}."
    reserved = f" Reserved: up to {format_bytes(max(series.reserved))} (dashed)." if series.reserved is not None else ""
    parts = {
        "TITLE": escape(title),
        "SUMMARY": escape(highest + reserved),
        "NOTES": "".join(f"<p><strong>{escape(note)}</strong></p>" for note in notes),
        "DRAWING": drawing(series),
        "LEGEND": "".join(_key(category, levels[at]) for category, levels in reversed(list(series.by_category.items()))),
        "DATA": json.dumps(_data(series, at), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _PAGE)


def _key(category: Category, num_bytes: int) -> str:
    return (
        f'<tr data-category="{category}"><td><span style="background:{COLOURS[category]}"></span>{category}</td>'
        f'<td class="bytes">{num_bytes:,}</td><td class="bytes">{format_bytes(num_bytes)}</td></tr>\n'
    )


def _data(series: Series, at: int) -> dict[str, object]:
    """What the script shows under the pointer; names of groups stand once and are numbered."""
    names: dict[str, int] = {}
    groups = [
        [[names.setdefault(group.name, len(names)), group.copies, group.bytes] for group in largest]
        for largest in series.largest or ()
    ]
    return {
        "times": list(series.times),
        "categories": {category: list(levels) for category, levels in series.by_category.items()},
        "reserved": None if series.reserved is None else list(series.reserved),
        "phases": [list(span) for span in series.phases],
        "groups": groups,
        "names": list(names),
        "peak": at,
        "box": [LEFT, WIDTH - RIGHT, WIDTH, HEIGHT],
    }


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --line: #8886; --text: #222; --back: #fff; }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --back: #181818; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1100px; margin: 1.5em auto;
  padding: 0 1em; }
h1 { font-size: 1.2em; }
svg { width: 100%; height: auto; display: block; touch-action: none; cursor: crosshair; }
svg text { font-size: 11px; fill: var(--text); }
svg .grid { stroke: var(--line); stroke-width: .5; }
svg .phase { stroke: var(--text); stroke-width: 1; }
svg .reserved { fill: none; stroke: var(--text); stroke-width: 1; stroke-dasharray: 5 3; }
#cursor { stroke: var(--text); stroke-width: 1; stroke-dasharray: 2 2; }
.columns { display: flex; flex-wrap: wrap; gap: 1em 3em; align-items: flex-start; }
table { border-collapse: collapse; }
td, th { padding: .1em 1em .1em 0; text-align: left; font-weight: normal; vertical-align: top; }
td.bytes { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td span { display: inline-block; width: .9em; height: .9em; margin-right: .5em; vertical-align: -.1em; }
#groups { flex: 1 1 24em; overflow-wrap: anywhere; }
caption { text-align: left; font-weight: bold; }
@media (max-width: 600px) {
  svg { overflow: visible; margin-top: 1.5em; }
  svg text { font-size: 26px; paint-order: stroke; stroke: var(--back); stroke-width: 5px; }
  svg .grid + text { text-anchor: start; transform: translate(10px, -7px); }
}
</style>
</head>
<body>
<h1>@TITLE@</h1>
<p>@SUMMARY@ From left to right: allocations and frees in order, not seconds. Point at a moment, or use the arrow keys.</p>
@NOTES@
@DRAWING@
<div class="columns">
<table id="levels"><caption id="moment">At the peak</caption>
<tbody>
@LEGEND@</tbody>
<tfoot><tr><td>allocated</td><td class="bytes" id="total"></td><td class="bytes" id="total-short"></td></tr>
<tr id="reserved-row"><td>reserved</td><td class="bytes" id="reserved"></td><td class="bytes" id="reserved-short"></td></tr>
</tfoot>
</table>
<table id="groups"><caption>Largest then</caption><tbody></tbody></table>
</div>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const [left, right, width] = data.box;
const first = data.times[0], last = data.times[data.times.length - 1];
const exact = n => n.toLocaleString("en-US");
const short = n => n >= 2 ** 30 ? (n / 2 ** 30).toFixed(2) + " GiB" : n >= 2 ** 20 ? (n / 2 ** 20).toFixed(2) + " MiB"
  : n >= 1024 ? (n / 1024).toFixed(2) + " KiB" : n + " B";
let shown = data.peak;
function phaseAt(time) {
  let found = "";
  for (const [phase, start] of data.phases) if (start <= time) found = phase;
  return found;
}
function cell(row, text, name) {
  const made = row.insertCell();
  made.textContent = text;
  if (name) made.className = name;
}
function show(index) {
  shown = Math.max(0, Math.min(data.times.length - 1, index));
  const time = data.times[shown];
  let total = 0;
  for (const row of document.querySelectorAll("#levels tbody tr")) {
    const bytes = data.categories[row.dataset.category][shown];
    total += bytes;
    row.cells[1].textContent = exact(bytes);
    row.cells[2].textContent = short(bytes);
  }
  at("total").textContent = exact(total);
  at("total-short").textContent = short(total);
  at("reserved-row").hidden = data.reserved === null;
  if (data.reserved !== null) {
    at("reserved").textContent = exact(data.reserved[shown]);
    at("reserved-short").textContent = short(data.reserved[shown]);
  }
  at("moment").textContent = phaseAt(time) + ", event " + exact(time) + (shown === data.peak ? ": the peak" : "");
  const body = document.querySelector("#groups tbody");
  body.replaceChildren();
  for (const [name, copies, bytes] of data.groups[shown] || []) {
    const row = body.insertRow();
    cell(row, short(bytes), "bytes");
    cell(row, copies + " ×", "bytes");
    cell(row, data.names[name]);
  }
  const x = left + (time - first) / Math.max(last - first, 1) * (right - left);
  at("cursor").setAttribute("x1", x);
  at("cursor").setAttribute("x2", x);
}
function pointed(event) {
  const box = at("plot").getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * width;
  const time = first + (x - left) / (right - left) * (last - first);
  let low = 0, high = data.times.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (data.times[middle] <= time) low = middle; else high = middle - 1;
  }
  show(low);
}
at("plot").addEventListener("pointermove", pointed);
at("plot").addEventListener("pointerdown", pointed);
at("plot").addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -25, PageDown: 25 }[event.key];
  if (step) { event.preventDefault(); show(shown + step); }
});
show(shown);
</script>
</body>
</html>
"""
