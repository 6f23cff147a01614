"""What `vllm-qoq doctor` says of a machine.

examine  the facts, which kernels run on each GPU, and what the judgement says
probe    whether torch and the kernels work, in a process of its own
trial    every kernel run on a GPU and compared with its reference
judge    what is missing and how to get it, from the facts alone
report   the same for people
"""
