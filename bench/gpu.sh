#!/usr/bin/env bash
# Measures one NVIDIA GPU, piece by piece.
set -euo pipefail

pieces=(right headline profile variants sizes memory kernels decode more)
case ${1:---help} in
  -h | --help)
    cat << END
usage: bench/gpu.sh OUT [PIECE ...]

Pieces, by default all in this order: ${pieces[*]}

Each measurement writes a JSON file (or a trace) into OUT and its output into OUT/logs. One that is done is skipped, so
the same command resumes. One that fails is reported, the others run, and the exit code is 1.

Environment: PYTHON (python3) with this project, JAX for CUDA, torch and transformers; NANOGPT, a checkout of nanoGPT;
TOKAMAX, a directory with tokamax (see bench/kernels.py); MICRO_BATCH (32), sequences at a time beside the peers;
TOPOLOGY (h100), the chip's name for gpt2_jax.plan.
END
    exit 0
    ;;
esac

# shellcheck source=bench/pieces.sh
source "$(dirname "${BASH_SOURCE[0]}")/pieces.sh"

small=(--config gpt2-124m --batch_size 64 --micro_batch_size 32)
for piece in "${pieces[@]}"; do
  case $piece in
    right) # attention, the training step, learning, resuming and determinism
      run right -m pytest -n 0 -m gpu tests/accelerators -rA
      ;;
    headline) # 124M: tokens/s, MFU and memory by micro-batch; then beside the compiled peers
      step peers-sweep-124m --config gpt2-124m --batch_size 128 --micro_batch_size 16 \
        --sweep micro_batch_size=8,32,64,128
      bench peers-124m peers --case 124m --transformers ${NANOGPT:+--nanogpt "$NANOGPT"} --compile yes \
        --batch_size 128 --micro_batch_size "${MICRO_BATCH:-32}" --repeat 5
      ;;
    profile) # a trace for XProf
      run profile -m gpt2_jax.train "${small[@]}" --steps 20 --optimizer.warmup_steps 2 --log.profile 2:5 \
        --data.train '' --data.val '' --data.text stdlib --data.tokenizer bytes --eval.tokens 65536 \
        --checkpoint.every 0 --out "$out/profile-run"
      ;;
    variants) # one setting at a time
      step peers-variants-model "${small[@]}" \
        --sweep model.loss_chunk=0,1024,16384 model.scan_layers=true model.attention=xla
      for flag in xla_gpu_enable_latency_hiding_scheduler=true xla_gpu_enable_command_buffer= \
        xla_gpu_enable_triton_gemm=false xla_gpu_autotune_level=0 xla_gpu_deterministic_ops=true; do
        XLA_FLAGS="${XLA_FLAGS:-} --$flag" step "peers-variants-${flag%%=*}" "${small[@]}"
      done
      JAX_OPTIMIZATION_LEVEL=O1 step peers-variants-jax_optimization_level "${small[@]}"
      CUDA_DEVICE_MAX_CONNECTIONS=1 step peers-variants-cuda_device_max_connections "${small[@]}"
      ;;
    sizes) # the larger models by micro-batch, with and without rematerialisation
      for sweep in 1558m:32:dots,none:16,8,4 774m:32:none,dots:16,8 355m:64:none:32,16; do
        IFS=: read -r size batch remat micro <<< "$sweep"
        step "peers-sweep-$size" --config "gpt2-$size" --batch_size "$batch" --grid \
          --sweep "model.remat=$remat" "micro_batch_size=$micro"
      done
      ;;
    memory) # what the compiler predicts, to compare with the peak memory in the headline and in sizes
      for size in 124m:16 355m:16 774m:8 1558m:4; do
        run "plan-${size%:*}" -m gpt2_jax.plan --config "gpt2-${size%:*}" --topology "${TOPOLOGY:-h100}:1" --json \
          --batch_size 32 --micro_batch_size "${size#*:}"
      done
      ;;
    kernels) # attention and the loss beside tokamax, and the fastest matmul
      PYTHONPATH=$PYTHONPATH${TOKAMAX:+:$TOKAMAX} bench kernels kernels --batch 32
      ;;
    decode) # generation beside transformers
      bench decode decode --batch 1 8 64 --prompt 64 --dtype bfloat16
      ;;
    more) # start-up and checkpoints
      bench startup startup --repeat 5
      bench checkpoint checkpoint --config gpt2-124m --batch_size 32 --micro_batch_size 32
      ;;
    *)
      echo "error: unknown piece $piece; bench/gpu.sh --help lists them" >&2
      exit 2
      ;;
  esac
done
exit "$failed"
