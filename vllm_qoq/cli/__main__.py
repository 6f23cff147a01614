"""The command `vllm-qoq` as `python -m vllm_qoq.cli`."""

import sys

from vllm_qoq.cli.main import main

sys.exit(main())
