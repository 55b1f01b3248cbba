// c++ -std=c++17 world.cpp $(pkg-config --cflags --libs reshard) -pthread
#include <cstdio>
#include <map>
#include <reshard.hpp>
#include <string>
#include <thread>
#include <vector>

// The model's config.json, and how each side cuts it: a trainer with Megatron's TP 2 on ranks 0 and 1, an engine with vLLM's TP 1 on rank 2.
const char *const spec = R"({
  "model": {"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 6, "vocab_size": 64, "tie_word_embeddings": true, "torch_dtype": "float32"},
  "source": {"framework": "megatron", "ranks": "0-1", "tensor_model_parallel_size": 2, "make_vocab_size_divisible_by": 8},
  "target": {"framework": "vllm", "ranks": "2"}})";

using Params = std::map<std::string, std::vector<int64_t>>;  // the framework's own names, with the shapes on one rank
const Params trained = {
    {"embedding.word_embeddings.weight", {32, 4}},
    {"decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", {4}},
    {"decoder.layers.0.self_attention.linear_qkv.weight", {6, 4}},
    {"decoder.layers.0.self_attention.linear_proj.weight", {4, 2}},
    {"decoder.layers.0.mlp.linear_fc1.layer_norm_weight", {4}},
    {"decoder.layers.0.mlp.linear_fc1.weight", {6, 4}},
    {"decoder.layers.0.mlp.linear_fc2.weight", {4, 3}},
    {"decoder.final_layernorm.weight", {4}}};
const Params served = {
    {"model.embed_tokens.weight", {64, 4}},
    {"model.layers.0.input_layernorm.weight", {4}},
    {"model.layers.0.self_attn.qkv_proj.weight", {12, 4}},
    {"model.layers.0.self_attn.o_proj.weight", {4, 4}},
    {"model.layers.0.post_attention_layernorm.weight", {4}},
    {"model.layers.0.mlp.gate_up_proj.weight", {12, 4}},
    {"model.layers.0.mlp.down_proj.weight", {4, 6}},
    {"model.norm.weight", {4}}};

void run(int rank) {
  std::map<std::string, std::vector<float>> memory;
  reshard::Preset preset(spec, rank);
  for (const auto &[name, shape] : rank < 2 ? trained : served) {
    auto &m = memory[name];
    m.resize(shape[0] * (shape.size() > 1 ? shape[1] : 1), rank + 1.0f);  // a trainer's rank has its number everywhere
    preset.bind(name.c_str(), m.data(), m.size() * sizeof(float), reshard::f32, shape, rank < 2 ? RS_SOURCE : RS_TARGET);
  }
  auto comm = reshard::Comm::loopback(1, rank, 3);  // threads; Comm::local connects processes
  reshard::Container weights(reshard::config(comm), preset);
  weights.connect();  // plans, once; the ranks compare their specs, no tables go around
  weights.sync(1);    // moves version 1, and again whenever the trainer has new weights
  if (rank == 2)      // rows of gate, then of up, each from both ranks
    for (size_t row = 0; row < 12; row++) std::printf("%g ", memory["model.layers.0.mlp.gate_up_proj.weight"][4 * row]);
}

int main() {
  std::thread trainers[] = {std::thread(run, 0), std::thread(run, 1)};
  run(2);  // 1 1 1 2 2 2 1 1 1 2 2 2
  for (auto &t : trainers) t.join();
}
