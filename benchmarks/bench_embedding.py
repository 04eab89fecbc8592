"""Token and position embeddings with the tied head's gradient, against eager and Inductor."""

from fastgpt.benchmarks.harness import Op
from fastgpt.verify import Shape

embedding = Op("embedding", [Shape(32, 1024, 768, 1, 50304)], Shape(4, 64, 64, 1, 256))

test_embedding = embedding.benchmark()
