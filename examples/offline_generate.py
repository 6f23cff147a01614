"""Generate text from a merged checkpoint with vLLM's LLM class, and show which sets ran.

    python examples/offline_generate.py MERGED [--force-set w8a8] [--prompt "import os"]

It prints the text, and how many steps of each phase ran in which set before and after.
"""

import argparse


def main() -> None:
    """Load the checkpoint, generate, count the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder or Hub name of a merged checkpoint")
    parser.add_argument("--force-set", metavar="NAME", help="run everything in one set")
    parser.add_argument("--prompt", action="append", help="may be repeated, for a larger batch")
    parser.add_argument("--max-tokens", type=int, default=32, help="per prompt (default: 32)")
    parser.add_argument("--max-model-len", type=int, help="default: what the model was made for")
    parser.add_argument("--enforce-eager", action="store_true", help="start faster, run slower")
    args = parser.parse_args()

    from vllm import LLM, SamplingParams

    import vllm_qoq

    # The checkpoint says that its method is `qoq`, so vLLM needs no further flag.
    llm = LLM(
        args.checkpoint,
        max_model_len=args.max_model_len,
        enforce_eager=args.enforce_eager,
        additional_config={"qoq": {"force_set": args.force_set}} if args.force_set else {},
    )
    # Steps in which CUDA graphs were captured count, too, so what matters is the difference.
    before = vllm_qoq.step_counts(llm)
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    outputs = llm.generate(args.prompt or ["import os\n\ndef main("], sampling)
    after = vllm_qoq.step_counts(llm)

    for output in outputs:
        print(f"{output.prompt}{output.outputs[0].text}\n---")
    for phase, name in after:
        print(f"{phase:8} steps in {name:8} {before[phase, name]:4} -> {after[phase, name]:4}")


if __name__ == "__main__":
    main()
