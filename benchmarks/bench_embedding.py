"""Token and position embeddings with the tied head's gradient, against eager and Inductor.

That gradient is the benchmark's here, so fastgpt copies it before it adds to it; in training it adds in place.
"""

from fastgpt.benchmarks.harness import Op
from fastgpt.verify import Shape

embedding = Op("embedding", [Shape(32, 1024, 768, 1, 50304)], Shape(4, 64, 64, 1, 256))

test_embedding = embedding.benchmark()
