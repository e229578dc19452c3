#!/usr/bin/env bash
# Measures the TPU chips of one host, piece by piece. It should take under 30 minutes, and has not run on a TPU yet.
set -euo pipefail

pieces=(right headline options kernels)
case ${1:---help} in
  -h | --help)
    cat << END
usage: bench/tpu.sh OUT [PIECE ...]

Pieces, by default all in this order: ${pieces[*]}

Each measurement writes a JSON file into OUT and its output into OUT/logs. One that is done is skipped, so the same
command resumes. One that fails is reported, the others run, and the exit code is 1.

Environment: PYTHON (python3) with this project, its tests and JAX for TPU; MICRO_BATCH (16), sequences at a time.
END
    exit 0
    ;;
esac

# shellcheck source=bench/pieces.sh
source "$(dirname "${BASH_SOURCE[0]}")/pieces.sh"

micro=${MICRO_BATCH:-16}
all=(--config gpt2-124m --micro_batch_size "$micro" --devices 0)

for piece in "${pieces[@]}"; do
  case $piece in
    right) # learning, resuming, attention and updates beside the CPU's, experimental options beside none
      run right -m pytest -n 0 -m tpu tests/accelerators -rA
      ;;
    headline) # 124M on one chip, by micro-batch: tokens/s, MFU and memory
      step peers-sweep-124m --config gpt2-124m --batch_size 64 --micro_batch_size 16 --sweep micro_batch_size=8,32
      ;;
    options) # of the compiler, on all chips: none, the experimental ones, and half as much memory on the chip
      step peers-options "${all[@]}" --sweep compiler_options=experimental
      LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-} --xla_tpu_scoped_vmem_limit_kib=32768" step peers-options-32768 "${all[@]}"
      ;;
    kernels) # attention by the tiles of its kernel, the loss, and the fastest matmul
      bench kernels kernels --batch "$micro"
      ;;
    *)
      echo "error: unknown piece $piece; bench/tpu.sh --help lists them" >&2
      exit 2
      ;;
  esac
done
exit "$failed"
