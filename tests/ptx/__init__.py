"""An emulator of the PTX that Triton makes for NVIDIA GPUs, in numpy: what runs here is the compiled kernel, and it is watched.

parse.py        the text of a kernel -> instructions, each with its line of PTX and of Triton source
machine.py      threads of many blocks at once: registers, control flow, barriers
arithmetic.py   instructions on registers
memory.py       global and shared memory; bounds, alignment, races, copies in flight
matrix.py       tensor cores, ldmatrix and stmatrix, TMA and mbarriers
tmem.py         the tensor memory of sm_100
launch.py       Triton's launches: compiled for an architecture, run on CPU tensors
"""
