"""`vllm-qoq bench serving --online`: latency and goodput of whole servers, by request rate.

    load       which requests come, how fast, and what users expect
    tokenizer  words for dummy weights, so that prompts can be sent as text
    job        what is measured, checked before work begins
    records    what is written down as soon as it is measured
    server     `vllm serve` in a process of its own
    client     `vllm bench serve`, which sends the requests and times the answers
    run        serves one subject after the other, and asks it at every rate
    result     what was measured, and what follows from it
    report     the result as Markdown
    plot       the result as a picture

Nothing here imports vLLM: server and client are commands of it.
"""
