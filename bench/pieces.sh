# Runs the measurements of bench/gpu.sh and bench/tpu.sh, which source this file with the arguments OUT [PIECE ...].
# shellcheck shell=bash disable=SC2034

: "${pieces:?the names of all pieces}"
out=$(mkdir -p "$1/logs" && cd "$1" && pwd)
shift
(($#)) && pieces=("$@")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3} failed=0

# run NAME ARGS...: runs Python unless NAME is done already.
run() {
  local log=$out/logs/$1.log
  if [[ -e $log ]]; then
    echo "== $1: done"
  elif echo "== $1" && "$python" "${@:2}" 2>&1 | tee "$log.partial"; then
    mv "$log.partial" "$log"
  else
    echo "== $1: FAILED; see $log.partial"
    failed=1 # the exit code
  fi
}
bench() { run "$1" "bench/$2.py" --results "$out" "${@:3}"; }
step() { bench "$1" peers --name "$1" --repeat 3 --seconds 1 "${@:2}"; }
