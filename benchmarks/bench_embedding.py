"""Token and position embeddings with the tied head's gradient, against eager and Inductor.

The benchmark owns that gradient, so fastgpt copies it before it adds to it. In training it adds in place.
"""

from fastgpt.benchmarks.harness import Op
from fastgpt.records import Shape

embedding = Op("embedding", [Shape(32, 1024, 768, 1, 50304)], Shape(4, 64, 64, 1, 256))

test_embedding = embedding.benchmark()
