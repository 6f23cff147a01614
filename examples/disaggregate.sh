#!/usr/bin/env bash
# One checkpoint on one machine in two halves: a server reads prompts, another answers, and the KV
# cache goes from one to the other by NIXL (pip install nixl).
set -euo pipefail

usage() {
  cat >&2 <<END
usage: $0 CKPT PREFILL_SET DECODE_SET [VLLM_OPTION...]

Prompts run in PREFILL_SET, e.g. w8a8, and answers in DECODE_SET, e.g. w4a8. Ask port 8000.

  PORT=8000             of the proxy; the servers take the next two, and NIXL the two after these
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

# A server that lacks NIXL says so after a minute, and one whose port NIXL finds in use says nothing.
python - "$port" <<'END'
import importlib.util
import socket
import sys

try:
    ports = range(int(sys.argv[1]), int(sys.argv[1]) + 5)
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
except (ValueError, OverflowError):
    sys.exit(f"error: PORT={sys.argv[1]}: is no number of a port with four behind it; try 8000")
except OSError as error:
    sys.exit(f"error: port {port}: {error.strerror}; choose other ports with PORT=...")
if importlib.util.find_spec("nixl") is None:
    sys.exit("error: NIXL is not installed beside vLLM; pip install nixl")
END

# half ROLE SET KV_ROLE SERVER_PORT SIDE_CHANNEL_PORT GPUS CORES VLLM_OPTION...
half() {
  local -a environment=("VLLM_NIXL_SIDE_CHANNEL_PORT=$5" "CUDA_VISIBLE_DEVICES=$6")
  [[ -z $7 ]] || environment+=("VLLM_CPU_OMP_THREADS_BIND=$7")
  # shellcheck disable=SC2059
  env "${environment[@]}" "$here/serve.sh" "$1" "$checkpoint" "$2" --host 127.0.0.1 --port "$4" \
    --kv-transfer-config "$(printf "$connector" "$3" "$buffer")" "${@:8}" &
}

# Whatever ends first, nothing is left running. Each part is a group of processes (set -m), because
# a server that is told to stop while it starts may not, and then leave its engine behind.
stop() {
  local group second
  trap '' HUP INT TERM  # a second one would leave what does not end at once
  disown -a
  kill -- "${parts[@]/#/-}" 2>/dev/null || true
  for ((second = 0; second < 20; second++)); do
    kill -0 -- "${parts[@]/#/-}" 2>/dev/null || break
    sleep 1
  done
  for group in "${parts[@]}"; do kill -KILL -- "-$group" 2>/dev/null || true; done
  [[ -z $ended ]] || echo "error: $ended ended, and its reason stands above" >&2
}
parts=() ended=
trap stop EXIT
trap exit HUP INT TERM
set -m
half prefill "$prefill_set" kv_producer $((port + 1)) $((port + 3)) "${PREFILL_GPUS:-0}" \
  "${PREFILL_CORES:-}" "$@"
parts+=($!)
half decode "$decode_set" kv_consumer $((port + 2)) $((port + 4)) "${DECODE_GPUS:-1}" \
  "${DECODE_CORES:-}" "$@"
parts+=($!)
python "$here/disaggregated_proxy.py" --port "$port" \
  --prefill "http://127.0.0.1:$((port + 1))" --decode "http://127.0.0.1:$((port + 2))" &
parts+=($!)

status=0
wait -n -p part || status=$?
case $part in
  "${parts[0]}") ended="the server that reads prompts" ;;
  "${parts[1]}") ended="the server that answers" ;;
  *) ended="the proxy" ;;
esac
exit "$status"
