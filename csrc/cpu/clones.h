// Functions compiled for several instruction sets, of which the loader takes the best that the processor has.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GRADSTATS_X86 1
#define GRADSTATS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GRADSTATS_CLONES
#endif
