// The threads of a block, one after another: a phase for all threads, then the
// next phase.
#pragma once

#include "cuda_blocks.h"

struct Phases {
  bool backwards;  // a phase in which one thread needs what another does gives
                   // other results

  template <typename Phase>
  void operator()(const Phase& phase) const {
    for (int thread = 0; thread < gradrep::kThreads; ++thread)
      phase(backwards ? gradrep::kThreads - 1 - thread : thread);
  }
};
