#!/usr/bin/env bash
# One checkpoint on one machine in two halves: a server reads prompts, another answers, and the KV
# cache goes from one to the other by NIXL (pip install nixl).
set -euo pipefail

usage() {
  cat >&2 <<END
usage: $0 CKPT PREFILL_SET DECODE_SET [VLLM_OPTION...]

Prompts run in PREFILL_SET, e.g. w8a8, and answers in DECODE_SET, e.g. w4a8. Ask port 8000.

  PORT=8000             of the proxy; the servers take the next two
  PREFILL_GPUS=0        CUDA_VISIBLE_DEVICES of each half
  DECODE_GPUS=1
  PREFILL_CORES=...     on a machine without a GPU, vLLM's VLLM_CPU_OMP_THREADS_BIND of each half
  DECODE_CORES=...
END
  exit 2
}

(($# >= 3)) || usage
checkpoint=$1 prefill_set=$2 decode_set=$3
shift 3
here=$(dirname "$0")
port=${PORT:-8000}
connector='{"kv_connector": "NixlConnector", "kv_role": "%s", "kv_buffer_device": "%s"}'
buffer=cuda
command -v nvidia-smi >/dev/null || buffer=cpu

# half ROLE SET KV_ROLE SERVER_PORT SIDE_CHANNEL_PORT GPUS CORES VLLM_OPTION...
half() {
  local -a environment=("VLLM_NIXL_SIDE_CHANNEL_PORT=$5" "CUDA_VISIBLE_DEVICES=$6")
  [[ -z $7 ]] || environment+=("VLLM_CPU_OMP_THREADS_BIND=$7")
  # shellcheck disable=SC2059
  env "${environment[@]}" "$here/serve.sh" "$1" "$checkpoint" "$2" --host 127.0.0.1 --port "$4" \
    --kv-transfer-config "$(printf "$connector" "$3" "$buffer")" "${@:8}" &
}

# Whatever ends first, nothing is left running.
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap exit INT TERM
half prefill "$prefill_set" kv_producer $((port + 1)) 5600 "${PREFILL_GPUS:-0}" \
  "${PREFILL_CORES:-}" "$@"
half decode "$decode_set" kv_consumer $((port + 2)) 5601 "${DECODE_GPUS:-1}" \
  "${DECODE_CORES:-}" "$@"
python "$here/disaggregated_proxy.py" --port "$port" \
  --prefill "http://127.0.0.1:$((port + 1))" --decode "http://127.0.0.1:$((port + 2))" &
wait -n
