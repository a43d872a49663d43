#!/bin/sh
# Installs the base package with its lowest and its newest dependencies on each Python, and runs the main job.
#
#   sh tools/versions.sh            # python3.10 to python3.13 of the PATH
#   PYTHONS="/opt/python3.12/bin/python" sh tools/versions.sh
#   EXTRA=trace PYTHONS=python3.12 sh tools/versions.sh        # with the trace extra, and a trace (several GB each)
#
# Needs uv (pip install uv). Prints one line per combination; exits 1 if one of them fails.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
for python in ${PYTHONS:-python3.10 python3.11 python3.12 python3.13}; do
  for resolution in lowest-direct highest; do
    venv="$work/venv"
    rm -rf "$venv"
    log="$work/log"
    if uv venv -q --python "$python" "$venv" >"$log" 2>&1 &&
      uv pip install -q --python "$venv/bin/python" --resolution "$resolution" "$root${EXTRA:+[$EXTRA]}" >>"$log" 2>&1 &&
      (cd "$work" && "$venv/bin/peftplan" estimate llama-2-70b --method qlora --r 16 >"$work/out" 2>>"$log") &&
      grep -q 207,093,760 "$work/out" &&
      { [ -z "${EXTRA:-}" ] || (cd "$work" && "$venv/bin/peftplan" estimate smollm2-135m --seq-len 128 --engine trace >>"$log" 2>&1); }
    then result=ok
    else result=FAILED; failed=1
    fi
    versions=$(uv pip list -q --python "$venv/bin/python" 2>/dev/null | awk '/^(click|rich|pydantic|torch|transformers|peft) / { printf "%s %s, ", $1, $2 }')
    echo "$("$venv/bin/python" -V 2>&1), $resolution: $result (${versions%, })"
    [ "$result" = ok ] || tail -3 "$log"
  done
done
exit $failed
