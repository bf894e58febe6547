#!/usr/bin/env bash
# The paper's judge (App. F): Qwen2.5-72B-Instruct-AWQ under vLLM, in an environment of its own,
# because vLLM pins versions of torch and transformers that are not ours.
#
#   benchmarks/serve_qwen.sh                                  # about 41 GB of weights: one 80 GB GPU
#   MODEL=Qwen/Qwen2.5-7B-Instruct-AWQ benchmarks/serve_qwen.sh   # a smaller one: 12 GB are enough
#   GPUS=2 benchmarks/serve_qwen.sh                           # weights shared by two GPUs
#
# Then, in another terminal, notebooks/04_autointerp with
#   overrides = {"autointerp.judge": "http", "autointerp.model": "Qwen/Qwen2.5-72B-Instruct-AWQ"}
set -euo pipefail

VLLM=0.33.0
MODEL=${MODEL:-Qwen/Qwen2.5-72B-Instruct-AWQ}
GPUS=${GPUS:-1}
PORT=${PORT:-8000}
ENVIRONMENT=${ENVIRONMENT:-.venv-vllm-$VLLM}

if [ ! -x "$ENVIRONMENT/bin/vllm" ]; then
  python3 -m venv "$ENVIRONMENT"
  "$ENVIRONMENT/bin/pip" install --quiet "vllm==$VLLM"
fi

# Loopback only. Prompts share their first lines, so prefix caching pays. The context is short: the
# longest prompt, 40 examples of 32 tokens for the explainer, stays below 3,000 tokens.
exec "$ENVIRONMENT/bin/vllm" serve "$MODEL" \
  --host 127.0.0.1 --port "$PORT" --tensor-parallel-size "$GPUS" \
  --max-model-len 4096 --gpu-memory-utilization 0.92 --enable-prefix-caching --seed 0
