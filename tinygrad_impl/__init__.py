"""GPT-2 in tinygrad: the port of torch_ref, and the programs that train it, sample from it and compare two of it."""

from tinygrad_impl.device import provide_clang, provide_nvrtc, shield_compilers

# before anything compiles: tinygrad reads these settings once
provide_clang()
provide_nvrtc()
shield_compilers()
