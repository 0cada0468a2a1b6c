// Runs a function in a process of its own, so that what ends that one is only a failed test.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

namespace sim {

// 0 if it has returned. What it writes to memory that the processes share stays.
template <class F>
int apart(F f) {
  const pid_t child = fork();
  if (child == 0) {
    f();
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

}  // namespace sim
