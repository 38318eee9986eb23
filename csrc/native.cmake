# The library target, one source per instruction set, each with its own flags.
# No fused multiply-add and no reordering of sums unless a kernel asks for it: every instruction set
# must encode and decode alike.
set(common -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra)

add_library(tqai_native SHARED
  csrc/attend.c csrc/dispatch.c csrc/history.c csrc/pages.c csrc/pool.c csrc/query.c csrc/spread.c csrc/kernels_scalar.c)
set_target_properties(tqai_native PROPERTIES
  PREFIX "" OUTPUT_NAME "_tqai_native" C_STANDARD 11 C_EXTENSIONS ON C_VISIBILITY_PRESET hidden)
target_compile_options(tqai_native PRIVATE ${common})
target_link_libraries(tqai_native PRIVATE Threads::Threads m)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  target_sources(tqai_native PRIVATE csrc/kernels_avx2.c csrc/kernels_avx512.c)
  target_compile_definitions(tqai_native PRIVATE TQAI_X86)
  set_source_files_properties(csrc/kernels_avx2.c PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(csrc/kernels_avx512.c PROPERTIES COMPILE_OPTIONS
    "-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx512vnni;-mprefer-vector-width=512")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  target_sources(tqai_native PRIVATE csrc/kernels_neon.c)
  target_compile_definitions(tqai_native PRIVATE TQAI_NEON)
endif()
