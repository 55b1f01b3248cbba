// c++ -std=c++17 minimal.cpp $(pkg-config --cflags --libs reshard) -pthread
#include <cstdio>
#include <reshard.hpp>
#include <thread>

void run(int rank) {  // rank 0 trains and has w as [2, 3]; rank 1 serves and wants it transposed, as [3, 2]
  float source[6] = {1, 2, 3, 4, 5, 6}, target[6] = {};
  reshard::Layout layout;
  auto w = layout.tensor("w", {2, 3});
  if (rank == 0)
    layout.tile(w, layout.buffer("trainer.w", source, sizeof source, reshard::f32, {2, 3}, RS_SOURCE));
  else  // the box from [0, 0], of [2, 3] elements; a step down is 1 element of the buffer, a step right 2
    layout.tile(w, layout.buffer("engine.w", target, sizeof target, reshard::f32, {3, 2}, RS_TARGET), 0, {0, 0}, {2, 3}, {1, 2});

  auto comm = reshard::Comm::loopback(1, rank, 2);  // threads; Comm::local connects processes
  reshard::Container weights(reshard::config(comm), layout);
  weights.connect();  // plans, once
  weights.sync(1);    // moves version 1, and again whenever the trainer has new weights
  if (rank == 1)
    for (float x : target) std::printf("%g ", x);  // 1 4 2 5 3 6
}

int main() { std::thread trainer(run, 0); run(1); trainer.join(); }
