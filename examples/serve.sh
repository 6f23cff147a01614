#!/usr/bin/env bash
# One merged checkpoint, three kinds of server. The names of its sets: vllm-qoq inspect CKPT
set -euo pipefail

usage() {
  cat >&2 <<END
usage: $0 combined CKPT [VLLM_OPTION...]
       $0 prefill  CKPT SET [VLLM_OPTION...]
       $0 decode   CKPT SET [VLLM_OPTION...]

  combined  prompts and generation on one server, by the routing of the checkpoint
  prefill   prompts only, for a disaggregated deployment: all in SET, e.g. w8a8
  decode    generation only, the other half: all in SET, e.g. w4a16

prefill and decode load only SET. Connect them with a KV connector of vLLM, by its option
--kv-transfer-config.
END
  exit 2
}

(($# >= 2)) || usage
role=$1 checkpoint=$2
shift 2

case $role in
  combined) ;;
  prefill | decode)
    # The sets of one checkpoint share the format of the KV cache, so each instance
    # may run another one.
    [[ ${1:-} =~ ^[a-z][a-z0-9]*$ ]] || usage
    set -- --additional-config "{\"qoq\": {\"force_set\": \"$1\"}}" "${@:2}"
    ;;
  *) usage ;;
esac

exec vllm serve "$checkpoint" --quantization qoq "$@"
