"""Skips what the blocks of this GPU have too little shared memory for, 99 KB on some."""

import pytest

from vllm_qoq.ops import kv_ops


def skip_without_room(head_size, bits, group, query_len=1):
    """Skips the test unless `kv_decode` runs for `group` query heads of each KV head."""
    for lacking in kv_ops.lacking_shared_memory(head_size, bits, group, query_len):
        pytest.skip(lacking)
