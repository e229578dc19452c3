#!/usr/bin/env bash
# What there is to measure on one NVIDIA GPU, in the order of what matters most: see the usage below.
set -euo pipefail

usage() {
  cat << 'END'
usage: bench/gpu.sh OUTDIR [PIECE ...]

Pieces, in this order, or those that are named:

  right        does the GPU compute what the CPU does (bench/right.py)
  headline     124M, 1,024 tokens, bfloat16: tokens/s, MFU and memory by micro-batch; then beside the compiled peers
  why          the operations that take the time of an update; the fastest matrix product of the card
  variants     one setting at a time: logits in memory, scanned layers, flags of XLA
  sizes        1558M, 774M and 355M: the micro-batches that fit, with and without rematerialisation
  kernels      attention and the loss alone, beside tokamax's
  decode       generation beside transformers, 1, 8 and 64 prompts
  determinism  do two runs leave the same bits
  more         start-up and checkpoints

Each measurement writes a JSON file into OUTDIR and its output into OUTDIR/logs, and is skipped if its file is there:
the same command goes on where the last one ended. A measurement that fails is reported, and the others run.

Environment: PYTHON (python3), with jax for CUDA, torch and transformers; BUDGET, seconds for all (580): what would
start later does not; NANOGPT, a checkout of nanoGPT; LLMC, one of llm.c with a built train_gpt2cu; TOKAMAX, a directory
that tokamax is installed in (bench/kernels.py says why not beside this project); MICRO_BATCH (32), sequences at a time
beside the peers. Packages that this project needs and the Python lacks come from bench/wheels, if that is there; nothing
is downloaded.
END
}

case ${1:---help} in
  -h | --help)
    usage
    exit 0
    ;;
esac

mkdir -p "$1/logs"
out=$(cd "$1" && pwd)
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
budget=${BUDGET:-580}
pieces=("$@")
((${#pieces[@]})) || pieces=(right headline why variants sizes kernels decode determinism more)
failed=0

# Pure Python that is missing, beside the checkout and not in the Python's own place.
install() {
  local site=$root/build/site
  export PYTHONPATH=$root:$site${PYTHONPATH:+:$PYTHONPATH}
  if compgen -G "$root/bench/wheels/*.whl" > /dev/null && ! "$python" -c 'import grain, tyro' 2> /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$root"/bench/wheels/*.whl
  fi
  if ! "$python" -c 'import importlib.metadata as m; m.version("gpt2_jax")' 2> /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade --target "$site" "$root"
  fi
}

# measure NAME SECONDS COMMAND...: runs a benchmark that writes OUTDIR/NAME-DEVICE.json, for at most so long.
measure() {
  local name=$1 limit=$2 left=$((budget - SECONDS))
  shift 2
  if compgen -G "$out/$name-*.json" > /dev/null; then
    echo "$name: there already"
    return
  fi
  if ((left < 20)); then
    echo "$name: not started, the $budget s are over; the same command goes on"
    failed=1
    return
  fi
  ((limit < left)) || limit=$left
  echo "== $name (at most $limit s)"
  # SIGTERM first: what was measured until then can be written.
  if timeout --kill-after=15 "$limit" "$python" "$@" --results "$out" > "$out/logs/$name.log" 2>&1; then
    cat "$out/logs/$name.log"
  else
    echo "$name: FAILED with exit code $?; the end of $out/logs/$name.log:"
    tail -n 15 "$out/logs/$name.log"
    failed=1
    return 1
  fi
}

step() {
  measure "$1" "$2" bench/train_step.py --name "$1" --repeat 3 --seconds 1 "${@:3}" || true
}

right() {
  measure right 150 bench/right.py || echo "what follows is worth nothing until that is right"
}

headline() {
  local peers=(--transformers)
  [[ -z ${NANOGPT:-} ]] || peers+=(--nanogpt "$NANOGPT")
  [[ -z ${LLMC:-} ]] || peers+=(--llmc "$LLMC")
  step train_step-gpt2-124m 200 --config gpt2-124m --batch_size 128 --micro_batch_size 16 \
    --sweep micro_batch_size=8,32,64,128
  measure peers-124m 300 bench/peers.py --case 124m "${peers[@]}" --compile yes --batch 128 \
    --micro-batch "${MICRO_BATCH:-32}" --repeat 5 || true
}

why() {
  # Without CUDA graphs, or the profiler may see each as one operation.
  XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" measure why 90 bench/why.py --config gpt2-124m \
    --batch_size 64 --micro_batch_size 32 || true
}

variants() {
  local flag one=(--config gpt2-124m --batch_size 64 --micro_batch_size 32)
  step variants-model 150 "${one[@]}" --sweep loss_chunk=0,1024,16384 scan_layers=true attention=xla
  # Each in a process of its own anyway; a flag that this XLA does not know ends it, and is reported.
  for flag in xla_gpu_enable_latency_hiding_scheduler=true xla_gpu_enable_command_buffer= \
    xla_gpu_enable_triton_gemm=false xla_gpu_autotune_level=0; do
    XLA_FLAGS="${XLA_FLAGS:-} --$flag" step "variants-${flag%%=*}" 60 "${one[@]}"
  done
}

sizes() {
  step train_step-gpt2-1558m 200 --config gpt2-1558m --batch_size 32 --grid \
    --sweep remat=dots,none micro_batch_size=16,8,4
  step train_step-gpt2-774m 120 --config gpt2-774m --batch_size 32 --grid --sweep remat=none,dots micro_batch_size=16,8
  step train_step-gpt2-355m 120 --config gpt2-355m --batch_size 64 --grid --sweep remat=none micro_batch_size=32,16
}

kernels() {
  PYTHONPATH=$PYTHONPATH${TOKAMAX:+:$TOKAMAX} measure kernels 120 bench/kernels.py --batch 32 || true
}

decode() {
  measure decode 120 bench/decode.py --batch 1 8 64 --prompt 64 --dtype bfloat16 || true
}

determinism() {
  measure determinism 120 bench/determinism.py --config gpt2-124m --batch_size 16 --micro_batch_size 8 || true
}

more() {
  measure startup 120 bench/startup.py --repeat 5 || true
  measure checkpoint 120 bench/checkpoint.py --config gpt2-124m --batch_size 32 --micro_batch_size 32 || true
}

cd "$root"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
install
"$python" -c 'import jax, torch, transformers; print("jax", jax.__version__, "torch", torch.__version__,
  "transformers", transformers.__version__)'
for piece in "${pieces[@]}"; do
  case $piece in
    right) right ;;
    headline) headline ;;
    why) why ;;
    variants) variants ;;
    sizes) sizes ;;
    kernels) kernels ;;
    decode) decode ;;
    determinism) determinism ;;
    more) more ;;
    *)
      echo "error: unknown piece $piece; bash bench/gpu.sh --help lists them" >&2
      exit 2
      ;;
  esac
done
echo "$SECONDS s; $out: $(find "$out" -maxdepth 1 -name '*.json' | wc -l) files"
exit "$failed"
