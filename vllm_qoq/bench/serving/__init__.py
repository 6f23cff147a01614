"""`vllm-qoq bench serving`: whole engines side by side, at fixed lengths of prompts and answers.

    shapes    well-known models, so that no download is needed
    formats   weights and caches that are compared
    cases     lengths and batch sizes
    job       what is measured, checked before work begins
    records   what an engine's process is asked, and what it writes down
    engine    that process: vLLM's engine, and the measurement of a case
    limits    another process, which measures the card
    process   processes that are measured, and what their logs say
    guard     the program that ends such a process with who asked for it
    work      the folder from which a run that was stopped goes on
    run       starts one process after the other
    floor     the time that the bytes and operations alone need
    result    what was measured, and what follows from it
    report    the result as Markdown
    plot      the result as a picture
    online    servers instead of engines, and requests that arrive one by one

`vllm-qoq bench table` puts the runs of several models side by side: `table` and `table_plot`.

Only `engine` imports vLLM.
"""
