"""The benchmark suite, installed as fastgpt.benchmarks: `fastgpt bench`, or `python -m benchmarks` beside it."""
